"""Exact rewrites on the way to TFLite and to int8, into forms that the kernels take and take fast.

Each pass is a module with one function that changes a model in place and returns how many sites it
changed; its docstring says what it matches, what it proves first, and why the result computes the
same. What a pass cannot prove it leaves alone. Which passes run, and in what order, is decided here,
by measurement (benchmarks/rewrites).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx

from ghostedge.convert.rewrites.average_pool import average_pool
from ghostedge.convert.rewrites.depthwise import depthwise
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.convert.rewrites.full_lanes import full_lanes
from ghostedge.convert.rewrites.gate_product import gate_product
from ghostedge.convert.rewrites.graph import captured
from ghostedge.convert.rewrites.hard_sigmoid import hard_sigmoid
from ghostedge.convert.rewrites.hard_sigmoid_clip import hard_sigmoid_clip
from ghostedge.convert.rewrites.nearest_upsample import nearest_upsample
from ghostedge.convert.rewrites.padded_max_pool import padded_max_pool
from ghostedge.convert.rewrites.strided_concat import strided_concat
from ghostedge.convert.rewrites.thin_concat import thin_concat
from ghostedge.convert.rewrites.wide_concat import wide_concat

Pass = Callable[[onnx.ModelProto], int]
FlatPass = Callable[[Flat], int]

TFLITE: tuple[Pass, ...] = (
    nearest_upsample,
    average_pool,
    hard_sigmoid,
    padded_max_pool,
    thin_concat,
    strided_concat,
)
"""Before the converter, on the simplified ONNX graph."""

ORT_INT8: tuple[Pass, ...] = (
    wide_concat,
    hard_sigmoid_clip,
    average_pool,
    full_lanes,
)
"""Before ONNX Runtime's quantizer, on the simplified ONNX graph; model.onnx itself stays as it is.
`gather_upsample` follows for what is not left in float (`to_int8_onnx.quantize`)."""

CONVERTED: tuple[FlatPass, ...] = (depthwise, gate_product)
"""After the converter, on the float .tflite files; int8 is made of the result."""


def rewrite(model: onnx.ModelProto, passes: Sequence[Pass] = TFLITE) -> onnx.ModelProto:
    """Return a copy of an ONNX model after the passes, in their order, without unused constants.

    The passes look for constants among the initializers and for sizes that shape inference finds:
    `model` is what `to_onnx.simplified` returns. Anything else is copied as it is.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for change in passes:
        change(result)
    graph = result.graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    used |= {name for node in graph.node for name in captured(node)}
    made = {name for node in graph.node for name in node.output}
    for listed, kept in ((graph.initializer, used), (graph.value_info, made)):
        for item in [item for item in listed if item.name not in kept]:
            listed.remove(item)
    return result


def finish(content: bytes, passes: Sequence[FlatPass] = CONVERTED) -> bytes:
    """Return a .tflite file after the passes, in their order; the same bytes where none applies."""
    model = Flat(content)
    changed = [change(model) for change in passes]
    return bytes(model) if any(changed) else content
