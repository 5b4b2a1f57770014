from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes


def channel_shuffle(model: onnx.ModelProto) -> int:
    """Turn a channel shuffle into a 1x1 convolution whose weights move channels.

    Matches Reshape (batch, channels, height, width) -> (batch, groups, channels / groups, height,
    width) -> Transpose that swaps the second and the third axis -> Reshape back, as ShuffleNet has it
    (arXiv 1707.01083).

    Proves: a float32 tensor of known channels, height and width; both shapes are constants that say
    exactly that, with the batch as it is; nothing else reads what is between, or it is no graph output.

    Exact because every result is one value times one, plus zeros; in int8 the weight 127 * (1 / 127)
    is exact too, and both sides have the same range.

    onnx2tf 1.29 makes of it transposes of five axes, whose int8 LiteRT 2.1.0's XNNPACK fails to prepare.
    """
    view = Graph(model)
    changed = 0
    for first in view.nodes("Reshape"):
        swap = _next(view, first, "Transpose")
        last = None if swap is None else _next(view, swap, "Reshape")
        shape = view.shape(first.input[0])
        if swap is None or last is None or shape is None or len(shape) != 4:
            continue
        if None in shape[1:] or not view.is_float(first.input[0]):
            continue
        channels, height, width = (side or 0 for side in shape[1:])
        split, joined = view.constant(first.input[1]), view.constant(last.input[1])
        if split is None or joined is None or len(split) != 5 or split[1] < 1:
            continue
        groups = int(split[1])
        inner = [shape[0], groups, channels // groups, height, width]
        if channels % groups or not _says(split.tolist(), inner):
            continue
        if not _says(joined.tolist(), list(shape)):
            continue
        if attributes(swap).get("perm") != [0, 2, 1, 3, 4]:
            continue
        order = np.arange(channels).reshape(groups, -1).T.ravel()
        weight = np.eye(channels, dtype=np.float32)[order][:, :, None, None]
        name = view.new_constant(f"{last.output[0]}/order", weight)
        conv = helper.make_node(
            "Conv", [first.input[0], name], [last.output[0]], last.name, kernel_shape=[1, 1]
        )
        view.replace(last, [conv])
        view.graph.node.remove(swap)
        view.graph.node.remove(first)
        changed += 1
    return changed


def _next(view: Graph, node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
    """Return the node of a kind that alone reads another's result, as its data."""
    readers = view.consumers(node.output[0])
    if readers is None or len(readers) != 1 or readers[0].op_type != kind:
        return None
    return readers[0] if readers[0].input[0] == node.output[0] else None


def _says(stated: list[int], shape: list[int | None]) -> bool:
    """Return whether a Reshape's target means a shape: equal sides, one -1, 0 for the same batch."""
    if len(stated) != len(shape) or stated.count(-1) > 1 or shape[0] is None:
        return False
    same = [s in (-1, side) for s, side in zip(stated, shape, strict=True)]
    return all(same[1:]) and (same[0] or stated[0] == 0)
