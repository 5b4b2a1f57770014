"""The range of every tensor of a fp32 .tflite, observed over calibration images."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

Ranges = dict[str, tuple[float, float]]
"""Lowest and highest value to be told apart, by the name of a tensor."""


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


def observe(model: bytes, images: np.ndarray) -> Ranges:
    """Return the lowest and highest value of each tensor over all images; arguments as of `visit`."""
    ranges: Ranges = {}

    def see(name: str, values: np.ndarray) -> None:
        low, high = ranges.get(name, (np.inf, -np.inf))
        ranges[name] = min(low, float(values.min())), max(high, float(values.max()))

    visit(model, images, see)
    return ranges
