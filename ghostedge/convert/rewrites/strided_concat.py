from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes


def strided_concat(model: onnx.ModelProto) -> int:
    """Move a concat behind the strided depthwise convolution that alone reads it.

    Matches Concat on the channels -> depthwise Conv with a stride above 1. The result is a depthwise
    Conv with the same attributes on each part, and the Concat of their results.

    Proves: the concat is no graph output and read only by that Conv, as its data; the Conv has one
    kernel a channel, constant weights and a constant bias or none; the channels of every part are
    known, and add up to the Conv's.

    Exact because a depthwise convolution treats each channel by itself.

    The concat then copies a quarter of the pixels.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("Conv"):
        stated = attributes(node)
        weight = view.constant(node.input[1])
        concat = view.producer(node.input[0])
        if weight is None or concat is None or concat.op_type != "Concat":
            continue
        if attributes(concat)["axis"] != 1 or max(stated.get("strides", [1])) == 1:
            continue
        if view.consumers(concat.output[0]) != [node]:
            continue
        if weight.shape[1] != 1 or stated.get("group", 1) != len(weight):
            continue
        constants = [view.constant(name) for name in node.input[1:]]
        shapes = [view.shape(name) for name in concat.input]
        widths = [shape[1] if shape is not None and len(shape) == 4 else None for shape in shapes]
        if any(value is None for value in (*constants, *widths)):
            continue
        ends = np.cumsum([width or 0 for width in widths])
        if ends[-1] != len(weight):
            continue
        target, made = node.output[0], []
        for index, (name, end) in enumerate(zip(concat.input, ends, strict=True)):
            part = slice(end - (widths[index] or 0), end)
            inputs = [name]
            for old, value in zip(node.input[1:], constants, strict=True):
                assert value is not None
                inputs.append(view.new_constant(f"{old}/{index}", value[part].copy()))
            output = view.new_name(f"{target}/{index}")
            settings = {**stated, "group": widths[index]}
            made.append(helper.make_node("Conv", inputs, [output], output, **settings))
        joined = helper.make_node(
            "Concat", [n.output[0] for n in made], [target], node.name, axis=1
        )
        view.replace(node, [*made, joined])
        view.graph.node.remove(concat)
        changed += 1
    return changed
