from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes


def hard_sigmoid(model: onnx.ModelProto) -> int:
    """Turn a hard sigmoid into RELU6, its "+ 3" and "/ 6" folded into convolutions where they can be.

    Matches HardSigmoid with alpha 1/6 and beta 1/2, that is clip(x + 3, 0, 6) / 6 (torch's; ONNX's
    default alpha of 0.2 stays), of a float32 tensor.

    The "+ 3" goes into the bias of the Conv that makes x, when nothing else reads x and the weights
    are constant; else it becomes an Add. The "/ 6" goes into the weights of the Convs behind the
    product, when the hard sigmoid is read once, by a Mul with another tensor, and the product is no
    graph output and read only by Convs, as their data, with constant weights; else it becomes a Mul.
    Opset 11 or later, where Clip has its bounds as inputs.

    Proves that by the lists of consumers, in which a graph output or a body of an If or a Loop counts
    as a reader. A changed weight or bias is a new tensor, so that one shared with another layer keeps
    its value there.

    Exact because a convolution is linear in its data and zero padding is zero at any scale. Rounding
    differs by that of a weight divided by 6.

    TFLite fuses RELU6 into the convolution before it; XNNPACK takes no RELU_0_TO_1.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("HardSigmoid"):
        stated = attributes(node)
        alpha, beta = stated.get("alpha", 0.2), stated.get("beta", 0.5)
        source, target = node.input[0], node.output[0]
        torchs = np.float32(alpha) == np.float32(1 / 6) and beta == 0.5
        if view.opset < 11 or not torchs or not view.is_float(source):
            continue
        others = []
        if not _add_to_bias(view, source):
            three = view.new_constant(f"{target}/three", np.array(3, np.float32))
            shifted = view.new_name(f"{target}/shifted")
            others.append(helper.make_node("Add", [source, three], [shifted], shifted))
            source = shifted
        divided = _divide_weights(view, target)
        clipped = target if divided else view.new_name(f"{target}/clipped")
        bounds = [
            view.new_constant(f"{target}/{name}", np.array(value, np.float32))
            for name, value in (("zero", 0), ("six", 6))
        ]
        others.append(helper.make_node("Clip", [source, *bounds], [clipped], clipped))
        if not divided:
            sixth = view.new_constant(f"{target}/sixth", np.array(1 / 6, np.float32))
            others.append(helper.make_node("Mul", [clipped, sixth], [target], node.name))
        view.replace(node, others)
        changed += 1
    return changed


def _add_to_bias(view: Graph, name: str) -> bool:
    conv, readers = view.producer(name), view.consumers(name)
    if conv is None or conv.op_type != "Conv" or readers is None or len(readers) != 1:
        return False
    found = view.weights(conv)
    if found is None:
        return False
    new = view.new_constant(f"{name}/bias_plus_3", found[1] + np.float32(3))
    conv.input[:] = [*conv.input[:2], new]
    return True


def _divide_weights(view: Graph, name: str) -> bool:
    readers = view.consumers(name)
    if readers is None or len(readers) != 1 or readers[0].op_type != "Mul":
        return False
    product = readers[0].output[0]
    convs = view.consumers(product)
    if not convs or any(conv.op_type != "Conv" or conv.input[0] != product for conv in convs):
        return False
    weights = [view.constant(conv.input[1]) for conv in convs]
    if any(weight is None for weight in weights):
        return False
    for conv, weight in zip(convs, weights, strict=True):
        assert weight is not None
        conv.input[1] = view.new_constant(f"{conv.input[1]}/6", weight / np.float32(6))
    return True
