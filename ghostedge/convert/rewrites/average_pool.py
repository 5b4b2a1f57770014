from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes


def average_pool(model: onnx.ModelProto) -> int:
    """Turn a 2x2 average pool of stride 2 into a depthwise convolution with weights 1/4.

    Matches AveragePool with kernel 2x2, stride 2x2 and no padding; sizes may be odd, as both then
    leave out the last row or column.

    Proves: no pads (auto_pad NOTSET or VALID), no dilations, no ceil_mode (which would average fewer
    than four pixels at an odd border), and a known number of channels of a float32 tensor.

    Exact because 1/4 is a power of two: only the order in which four values are added may differ.
    In int8 the weight 127 * (1/4 / 127) is exact too.

    XNNPACK takes an int8 DEPTHWISE_CONV_2D, and no int8 AVERAGE_POOL_2D.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("AveragePool"):
        source, target = node.input[0], node.output[0]
        shape = view.shape(source)
        channels = shape[1] if shape is not None and len(shape) == 4 else None
        if channels is None or not view.is_float(source) or not _is_plain(attributes(node)):
            continue
        quarters = np.full((channels, 1, 2, 2), 0.25, np.float32)
        weight = view.new_constant(f"{target}/quarters", quarters)
        conv = helper.make_node(
            "Conv",
            [source, weight],
            [target],
            node.name,
            group=channels,
            kernel_shape=[2, 2],
            strides=[2, 2],
        )
        view.replace(node, [conv])
        changed += 1
    return changed


def _is_plain(stated: dict[str, object]) -> bool:
    return (
        stated.get("kernel_shape") == [2, 2]
        and stated.get("strides") == [2, 2]
        and stated.get("pads", [0, 0, 0, 0]) == [0, 0, 0, 0]
        and stated.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and stated.get("dilations", [1, 1]) == [1, 1]
        and not stated.get("ceil_mode", 0)
    )
