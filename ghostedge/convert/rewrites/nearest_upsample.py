from __future__ import annotations

import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes

EXACT = {
    ("asymmetric", "floor"),
    ("asymmetric", "round_prefer_floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
    ("pytorch_half_pixel", "round_prefer_ceil"),
}
"""The readings of coordinates under which output i of twice the size is input i // 2."""


def nearest_upsample(model: onnx.ModelProto) -> int:
    """Turn a nearest upsample by two into four copies on the channels and DepthToSpace.

    Matches Resize (mode nearest) of a (batch, channels, height, width) tensor to exactly twice its
    height and width, by constant scales or by constant sizes.

    Proves: opset 11 or later (before, Resize had no coordinate modes); scales are [1, 1, 2, 2], or
    the input's shape is known and sizes are exactly that; the coordinate and rounding modes give
    output i the input i // 2; no axes and no keep_aspect_ratio_policy. All else stays as it is.

    Exact because DepthToSpace in DCR order with blocks of 2 writes channel group 2 * (y % 2) + x % 2
    to pixel (y, x), and here all four groups are the same: only values are copied.

    XNNPACK takes CONCATENATION and DEPTH_TO_SPACE, and no RESIZE_NEAREST_NEIGHBOR.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("Resize"):
        if view.opset < 11 or not is_double(view, node):
            continue
        source, target = node.input[0], node.output[0]
        copies = view.new_name(f"{target}/copies")
        view.replace(
            node,
            [
                helper.make_node("Concat", [source] * 4, [copies], copies, axis=1),
                helper.make_node(
                    "DepthToSpace", [copies], [target], node.name, blocksize=2, mode="DCR"
                ),
            ],
        )
        changed += 1
    return changed


def is_double(view: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a Resize writes pixel (y // 2, x // 2) to (y, x), for twice the size."""
    stated = attributes(node)
    mode = stated.get("coordinate_transformation_mode", "half_pixel")
    reading = (mode, stated.get("nearest_mode", "round_prefer_floor"))
    if stated.get("mode", "nearest") != "nearest" or reading not in EXACT:
        return False
    if "axes" in stated or stated.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return False
    scales, sizes = [*node.input, "", "", ""][2:4]
    shape = view.shape(node.input[0])
    if sizes:
        wanted = view.constant(sizes)
        if wanted is None or shape is None or len(shape) != 4 or None in shape:
            return False
        batch, channels, height, width = (side or 0 for side in shape)
        return wanted.tolist() == [batch, channels, 2 * height, 2 * width]
    factors = view.constant(scales)
    return factors is not None and factors.tolist() == [1, 1, 2, 2]
