"""Exact rewrites of a simplified ONNX graph into forms that the target's kernels take.

Each pass is a module with one function that changes a model in place and returns how many sites it
changed; its docstring says what it matches, what it proves first, and why the result computes the
same. What a pass cannot prove it leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx

from ghostedge.convert.rewrites.average_pool import average_pool
from ghostedge.convert.rewrites.hard_sigmoid import hard_sigmoid
from ghostedge.convert.rewrites.nearest_upsample import nearest_upsample

Pass = Callable[[onnx.ModelProto], int]

TFLITE: tuple[Pass, ...] = (nearest_upsample, average_pool, hard_sigmoid)
"""What runs before onnx2tf, chosen by measurement (benchmarks/rewrites)."""


def rewrite(model: onnx.ModelProto, passes: Sequence[Pass] = TFLITE) -> onnx.ModelProto:
    """Return a copy after the passes, in their order, without what they left unused.

    `model` has constants as initializers and known sizes: what `to_onnx.simplified` gives.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for change in passes:
        change(result)
    graph = result.graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    made = {name for node in graph.node for name in node.output}
    for listed, kept in ((graph.initializer, used), (graph.value_info, made)):
        for item in [item for item in listed if item.name not in kept]:
            listed.remove(item)
    onnx.checker.check_model(result, full_check=True)
    return result
