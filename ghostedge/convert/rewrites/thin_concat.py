from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes

LANES = 16
"""Channels that XNNPACK's convolutions compute at once with AVX512: fewer cost as much as 16."""


class Module(NamedTuple):
    """A ghost module's parts: conv (-> Relu) -> depthwise (-> Relu), and what the first reads."""

    nodes: list[onnx.NodeProto]
    source: str
    primary: tuple[np.ndarray, np.ndarray]
    cheap: tuple[np.ndarray, np.ndarray]


def thin_concat(model: onnx.ModelProto, lanes: int = LANES) -> int:
    """Turn the concat of a thin ghost module into a depthwise convolution that passes its input on.

    Matches Concat [p, c] on the channels, where p = Conv(x) and c is a depthwise Conv of p, with Relu
    behind both or behind neither. The result is a Conv that makes [p, p], and one depthwise Conv that
    makes [p, c] of it: its first kernels are one in the middle and zero elsewhere.

    Proves: constant weights and biases; the depthwise Conv has odd kernel sides, stride 1, no
    dilation and padding that keeps the size; nothing else reads p, c or what is before their Relu;
    2 * channels fit into `lanes`, as above that the added arithmetic costs more than the copies.

    Exact because a value times one, plus zeros, is that value, and Relu of Relu is Relu; int8 then
    calibrates other scales, as after any change of the graph.

    A concat of thin tensors copies some 8 bytes at a time; the 16 lanes are computed anyway. On
    emulated arm64 it saves int8 instructions on A53 and A76 (1 to 2%), costs 1% on A72, and costs
    fp32 2 to 3%; with 20 or 32 lanes it costs everywhere.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("Concat"):
        module = _module(view, node)
        if module is None or 2 * len(module.primary[0]) > lanes:
            continue
        target = node.output[0]
        weight, bias = module.cheap
        same = np.zeros_like(weight)
        same[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] = 1
        parts = (
            ("primary", 0, module.primary, module.primary),
            ("cheap", len(module.nodes) // 2, (same, np.zeros_like(bias)), module.cheap),
        )
        made, name = [], module.source
        for part, index, *halves in parts:
            inputs = [name]
            for kind, values in zip(("weight", "bias"), zip(*halves, strict=True), strict=True):
                inputs.append(view.new_constant(f"{target}/{part}_{kind}", np.concatenate(values)))
            stated = attributes(module.nodes[index])
            if part == "cheap":
                stated["group"] = 2 * len(weight)
            # Names stay, so that a node or a tensor that a caller chose by name is found again.
            for old in module.nodes[index : index + len(module.nodes) // 2]:
                settings = stated if old.op_type == "Conv" else {}
                output = old.output[0]
                made.append(helper.make_node(old.op_type, inputs, [output], old.name, **settings))
                inputs = [output]
            name = output
        named = {node.output[0] for node in made}
        for value in [v for v in view.graph.value_info if v.name in named]:
            view.graph.value_info.remove(value)
        made[-1].output[0] = target
        view.replace(node, made)
        for old in module.nodes:
            view.graph.node.remove(old)
        changed += 1
    return changed


def _module(view: Graph, concat: onnx.NodeProto) -> Module | None:
    if attributes(concat)["axis"] != 1 or len(concat.input) != 2:
        return None
    first, second = concat.input
    behind = [_only(view, second, [concat])]
    relu = behind[0] is not None and behind[0].op_type == "Relu"
    if relu and behind[0] is not None:
        behind.insert(0, _only(view, behind[0].input[0], [behind[0]]))
    cheap = behind[0]
    if cheap is None or cheap.op_type != "Conv" or cheap.input[0] != first:
        return None
    before = [_only(view, first, [cheap, concat])]
    if relu:
        if before[0] is None or before[0].op_type != "Relu":
            return None
        before.insert(0, _only(view, before[0].input[0], [before[0]]))
    primary = before[0]
    if primary is None or primary.op_type != "Conv":
        return None
    weights = view.weights(primary), view.weights(cheap)
    if weights[0] is None or weights[1] is None or not _keeps_size(cheap, weights[1][0]):
        return None
    if attributes(primary).get("group", 1) != 1:
        return None
    nodes = [node for node in (*before, *behind) if node is not None]
    return Module(nodes, primary.input[0], weights[0], weights[1])


def _only(view: Graph, name: str, readers: list[onnx.NodeProto]) -> onnx.NodeProto | None:
    """Return what makes a tensor that exactly these nodes read, once each."""
    found = view.consumers(name)
    if found is None or len(found) != len(readers) or any(node not in found for node in readers):
        return None
    return view.producer(name)


def _keeps_size(conv: onnx.NodeProto, weight: np.ndarray) -> bool:
    """Return whether a Conv is depthwise, channel by channel, with its kernel around each pixel."""
    stated: dict[str, Any] = attributes(conv)
    if weight.ndim != 4:
        return False
    height, width = weight.shape[2:]
    return (
        stated.get("group", 1) == len(weight)
        and weight.shape[1] == 1
        and height % 2 == width % 2 == 1
        and stated.get("pads", [0] * 4) == [height // 2, width // 2] * 2
        and stated.get("auto_pad", "NOTSET") == "NOTSET"
        and stated.get("strides", [1, 1]) == stated.get("dilations", [1, 1]) == [1, 1]
    )
