"""The range of every tensor of a fp32 .tflite, observed over calibration images."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable

import numpy as np

Ranges = dict[str, tuple[float, float]]
"""Lowest and highest value to be told apart, by the name of a tensor."""

BINS = 2048
SHARE = 0.9999
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

    def within(self, share: float) -> tuple[float, float]:
        """Return the range of this share of the values, as many left out at either end."""
        total = self.counts.sum()
        if not total:
            return self.low, self.high
        summed, cut = np.cumsum(self.counts) / total, (1 - share) / 2
        low, high = np.searchsorted(summed, [cut, 1 - cut])
        edges = np.linspace(self.low, self.high, BINS + 1)
        return float(edges[low]), float(edges[min(high + 1, BINS)])


def observe(model: bytes, images: np.ndarray, known: Ranges | None = None) -> Ranges:
    """Return for each tensor the range of 99.99% of its values; half of the rest is at either end.

    model, images: as for `visit`; the images are gone through twice. known: ranges to be kept as they
    are. Of min-max, moving average, percentiles, entropy and least squared error, this loses least
    (benchmarks/int8).
    """
    known = known or {}
    seen: dict[str, Histogram] = collections.defaultdict(Histogram)

    def unknown(see: Callable[[Histogram, np.ndarray], None]) -> Callable[[str, np.ndarray], None]:
        return lambda name, values: None if name in known else see(seen[name], values)

    visit(model, images, unknown(Histogram.widen))
    visit(model, images, unknown(Histogram.count))
    return {name: histogram.within(SHARE) for name, histogram in seen.items()} | known
