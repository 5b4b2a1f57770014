from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes


def padded_max_pool(model: onnx.ModelProto) -> int:
    """Give a padded max pool a padding of its own, with zeros or with the nearest pixel.

    Matches MaxPool of a (batch, channels, height, width) tensor with explicit pads. The result is Pad
    with zeros where the tensor comes from Relu, or from Clip to at least 0, and Pad in mode edge where
    its sign is unknown and no pad is above 1; then MaxPool without pads.

    Proves: pads given as such (auto_pad NOTSET), no negative one, each below its side of the kernel;
    no dilations, no ceil_mode, no second result (indices would change); a float32 tensor of rank 4.

    Exact because every window holds a pixel of the image: a zero never exceeds a value that is at
    least zero, and the nearest pixel of a padded place is in the window itself.

    onnx2tf pads with the lowest float; int8 calibration then sees a range of 1e38, and no scale left
    for the values.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("MaxPool"):
        stated, source = attributes(node), node.input[0]
        pads, shape = stated.get("pads", [0] * 4), view.shape(source)
        if view.opset < 11 or not any(pads) or shape is None or len(shape) != 4:
            continue
        if not _is_plain(node, stated, pads) or not view.is_float(source):
            continue
        positive = _is_positive(view, source)
        if not positive and max(pads) > 1:
            continue
        target, name = node.output[0], view.new_name(f"{node.output[0]}/padded")
        top, left, bottom, right = pads
        sizes = view.new_constant(f"{name}/pads", np.array([0, 0, top, left, 0, 0, bottom, right]))
        mode = "constant" if positive else "edge"
        kept = {k: v for k, v in stated.items() if k not in ("pads", "auto_pad")}
        view.replace(
            node,
            [
                helper.make_node("Pad", [source, sizes], [name], name, mode=mode),
                helper.make_node("MaxPool", [name], [target], node.name, **kept),
            ],
        )
        changed += 1
    return changed


def _is_plain(node: onnx.NodeProto, stated: dict[str, object], pads: list[int]) -> bool:
    kernel = stated.get("kernel_shape")
    return (
        isinstance(kernel, list)
        and all(0 <= pad < side for pad, side in zip(pads, kernel * 2, strict=True))
        and stated.get("auto_pad", "NOTSET") == "NOTSET"
        and stated.get("dilations", [1, 1]) == [1, 1]
        and not stated.get("ceil_mode", 0)
        and len([name for name in node.output if name]) == 1
    )


def _is_positive(view: Graph, name: str) -> bool:
    maker = view.producer(name)
    if maker is None or maker.op_type != "Clip":
        return maker is not None and maker.op_type == "Relu"
    lowest = view.constant(maker.input[1]) if len(maker.input) > 1 else None
    return lowest is not None and bool(lowest >= 0)
