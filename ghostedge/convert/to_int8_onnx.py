"""int8 for ONNX Runtime: static, per-channel, as QuantizeLinear / DequantizeLinear pairs (QDQ).

Two things make the file fast where plain quantization is slower than float: the rewrites in
ORT_INT8, and a float front. Both were chosen by measurement (benchmarks/rewrites).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from ghostedge.convert.ranges import Ranges
from ghostedge.convert.rewrites import ORT_INT8, rewrite
from ghostedge.convert.rewrites.gather_upsample import gather_upsample
from ghostedge.convert.rewrites.graph import Graph
from ghostedge.errors import GhostEdgeError
from ghostedge.pixels import STEP

BATCH = 50
THIN = 32
"""Up to so many channels, and products for each value of a convolution's result, float is faster: an
int8 kernel of ONNX Runtime costs by the pixel, whatever the number of channels."""
SHARE = 0.05
"""Of the weights, what the float front may hold: they take four bytes each there."""


class _Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = (
            {"image": images[i : i + BATCH].transpose(0, 3, 1, 2).astype(np.float32)}
            for i in range(0, len(images), BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(
    model: Path,
    output: Path,
    images: np.ndarray,
    ranges: Ranges | None = None,
    in_float: Collection[str] = (),
    narrow: bool = False,
) -> None:
    """Quantize model.onnx, calibrated by min-max on raw uint8 pixels (images, size, size, 3).

    The final softmax and the front (see `front`) stay in float. Activations are uint8: with int8
    ones the 1.0x net takes twice as long on x86 with VNNI. Where the normalised input is quantized,
    its scale is 1/64 and its zero point 128, which is exact.

    Args:
        model: reads "image", raw pixels (batch, 3, size, size); see `to_onnx.with_raw_pixels`.
        ranges: of tensors of `model`, in place of calibrated ones. A tensor that is joined with
            another for int8 (a ghost module's cheap half) has the range of the whole.
        in_float: names of nodes of `model` that stay in float as well.
        narrow: weights in 7 bits, whose products no CPU's 16-bit sums saturate with.

    Raises GhostEdgeError where `ranges` or `in_float` has a name that the model has not.
    """
    given = onnx.load(model)
    for node in given.graph.node:
        node.name = node.name or node.output[0]
    ranges = ranges or {}
    _known(in_float, {node.name for node in given.graph.node}, "node")
    tensors = {name for node in given.graph.node for name in node.output}
    _known(ranges, tensors, "tensor")
    rewritten = rewrite(given, ORT_INT8)
    in_float = {*in_float, *front(rewritten)}
    in_float |= {node.name for node in rewritten.graph.node if node.op_type == "Softmax"}
    rewritten = rewrite(rewritten, [functools.partial(gather_upsample, in_float=in_float)])
    left = {name for node in rewritten.graph.node for name in node.output}
    overrides: dict[str, list[dict[str, Any]]] = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
        for name, (low, high) in ranges.items()
        if name in left
    }
    if "normalized" in left:
        exact = {"scale": np.array(1 / STEP, np.float32), "zero_point": np.array(128, np.uint8)}
        overrides["normalized"] = [{**exact, "quant_type": QuantType.QUInt8}]
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends its own pre-processing
    try:
        quantize_static(
            rewritten,
            output,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=narrow,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=sorted(in_float),
            extra_options={"TensorQuantOverrides": overrides},
        )
    finally:
        logging.getLogger().setLevel(level)
    quantized = onnx.load(output)
    _shorten(quantized.graph)
    onnx.save(quantized, output)


def front(model: onnx.ModelProto) -> list[str]:
    """Return the names of the first nodes, as many as float computes faster than int8.

    The front ends where a single tensor carries everything, so that one QuantizeLinear is added, and
    before the first of these: a tensor with more than THIN channels, a convolution with more than
    THIN products for each value of its result, a node that is not of (batch, channels, height,
    width), and what would bring it to more than SHARE of the weights.
    """
    view, nodes = Graph(model), list(model.graph.node)
    weights = [sum(_size(view, name) for name in node.input) for node in nodes]
    made: set[str] = {value.name for value in model.graph.input}
    end = 0
    for index, node in enumerate(nodes):
        shape = view.shape(node.output[0])
        kernels = view.constant(node.input[1]) if node.op_type == "Conv" else None
        if shape is None or len(shape) != 4 or (shape[1] or THIN + 1) > THIN:
            break
        if kernels is not None and kernels[0].size > THIN:
            break
        if sum(weights[: index + 1]) > SHARE * sum(weights):
            break
        made |= set(node.output)
        if len(made & {name for later in nodes[index + 1 :] for name in later.input}) == 1:
            end = index + 1
    return [node.name for node in nodes[:end]]


def _size(view: Graph, name: str) -> int:
    value = view.constant(name)
    return 0 if value is None or value.ndim < 2 else value.size


def _known(names: Collection[str], there: set[str], kind: str) -> None:
    for name in names:
        if name not in there:
            raise GhostEdgeError(f"The model has no {kind} {name}: take the name from model.onnx.")


def _shorten(graph: onnx.GraphProto) -> None:
    """Give what the quantizer added short names, and leave out shapes: a fifth of the bytes."""
    del graph.value_info[:]
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    kept = {value.name for value in (*graph.input, *graph.output)}
    kept |= {name for node in graph.node if node not in pairs for name in node.output}
    short: dict[str, str] = {}
    for node in pairs:
        for name in (*node.input[1:], *node.output, *node.input[:1]):
            if name not in kept:
                short.setdefault(name, f"q{len(short)}")
        node.name = ""
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
