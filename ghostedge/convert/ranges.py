"""The range of every tensor of a fp32 .tflite, observed over calibration images."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

Ranges = dict[str, tuple[float, float]]
"""Lowest and highest value to be told apart, by the name of a tensor."""

BINS = 2048
PARTS = np.linspace(1, 0.2, 33)
"""Of a range, to choose from; the whole one first, which a tie leaves."""
ONE = np.ones(33)
INFINITE = 1e30
"""Such a width is of a padding with the lowest float, which says nothing about the values."""


def visit(model: bytes, images: np.ndarray, see: Callable[[str, np.ndarray], None]) -> None:
    """Call `see` with the name and the values of each computed tensor, for batch after batch of images.

    `model` is a fp32 .tflite of raw pixels, `images` uint8 (images, size, size, 3); the last batch is
    filled up with images from the start. The values are valid during the call only. Plain kernels,
    which compute everything that the file says; one thread.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keeping all tensors is meant for debugging
        net = Interpreter(
            model_content=model,
            num_threads=1,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
    net.allocate_tensors()
    entry = net.get_input_details()[0]
    computed = {int(tensor) for op in net._get_ops_details() for tensor in op["outputs"]}
    found = [
        (detail["name"], net.tensor(detail["index"]))
        for detail in net.get_tensor_details()
        if detail["index"] in {*computed, entry["index"]} and detail["dtype"] == np.float32
    ]
    batch = entry["shape"][0]
    for start in range(0, len(images), batch):
        part = np.take(images, range(start, start + batch), axis=0, mode="wrap")
        net.set_tensor(entry["index"], part.astype(np.float32))
        net.invoke()
        for name, values in found:
            see(name, values())


class Histogram:
    """All values of a tensor, counted in equal parts of their range, which zero belongs to."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.counts = np.zeros(BINS)

    def widen(self, values: np.ndarray) -> None:
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def count(self, values: np.ndarray) -> None:
        """Count values of a range that is known by now."""
        width = self.high - self.low
        if 0 < width < INFINITE:
            places = ((values.ravel() - np.float32(self.low)) * np.float32(BINS / width)).astype(
                int
            )
            self.counts += np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)

    @property
    def middles(self) -> np.ndarray:
        return self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS

    def least_error(self) -> tuple[float, float]:
        """Return the range in which 8 bits have the least mean squared error.

        Both ends are drawn in together, then each alone.
        """
        low, high = self.low, self.high
        if not self.counts.any():
            return low, high
        values = self.middles
        for lows, highs in ((PARTS, PARTS), (PARTS, ONE), (ONE, PARTS)):
            bottom, top = low * lows[:, None], high * highs[:, None]
            step = (top - bottom) / 255
            rounded = np.clip(np.rint((values - bottom) / step), 0, 255) * step + bottom
            best = int(((values - rounded) ** 2 @ self.counts).argmin())
            low, high = float(bottom[best, 0]), float(top[best, 0])
        return low, high


def observe(model: bytes, images: np.ndarray) -> Ranges:
    """Return for each tensor the range in which int8 has the least mean squared error.

    Arguments are those of `visit`. The images are gone through twice. Of min-max, moving average,
    percentiles, entropy and this, it lost least (benchmarks/int8).
    """
    seen: dict[str, Histogram] = {}
    visit(model, images, lambda name, values: seen.setdefault(name, Histogram()).widen(values))
    visit(model, images, lambda name, values: seen[name].count(values))
    return {name: histogram.least_error() for name, histogram in seen.items()}
