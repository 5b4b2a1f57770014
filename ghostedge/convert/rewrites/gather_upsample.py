from __future__ import annotations

import itertools
from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph
from ghostedge.convert.rewrites.nearest_upsample import is_double


def gather_upsample(model: onnx.ModelProto, in_float: Collection[str] = ()) -> int:
    """Turn a nearest upsample by two into a Gather of columns and one of rows, channels last.

    Matches Resize (mode nearest) of a (batch, channels, height, width) tensor to exactly twice its
    height and width, as `nearest_upsample` does.

    Proves what that pass proves, that the height and the width are known, and that the node is none
    of those that stay in float, where the channels come first and a Resize is fast.

    Exact because only values are copied: index i // 2 of an axis to index i.

    ONNX Runtime keeps int8 tensors with the channels last, where its Resize computes each byte's
    place by itself; a Gather copies all channels of a pixel, then whole rows, at once. The two
    Transposes cancel those that ONNX Runtime puts around int8 convolutions: none is left to run.
    GhostNetV3-Small 1.0x takes 10% less time with this pass alone.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("Resize"):
        source, target = node.input[0], node.output[0]
        shape = view.shape(source)
        if node.name in in_float or view.opset < 11 or not is_double(view, node) or shape is None:
            continue
        height, width = shape[2:]
        if height is None or width is None:
            continue
        made = [helper.make_node("Transpose", [source], [""], perm=[0, 2, 3, 1])]
        for axis, side in ((2, width), (1, height)):
            index = view.new_constant(f"{target}/index_{side}", np.arange(2 * side) // 2)
            made.append(helper.make_node("Gather", ["", index], [""], axis=axis))
        made.append(helper.make_node("Transpose", [""], [target], node.name, perm=[0, 3, 1, 2]))
        for before, after in itertools.pairwise(made):
            before.name = before.output[0] = after.input[0] = view.new_name(f"{target}/doubled")
        view.replace(node, made)
        changed += 1
    return changed
