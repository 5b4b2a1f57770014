from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from ghostedge.convert.rewrites.graph import Graph, attributes

LANES = 16
"""Channels that XNNPACK's convolutions compute at a time with AVX512; fewer cost as much."""


class Site(NamedTuple):
    primary: onnx.NodeProto
    cheap: onnx.NodeProto
    act: bool


def thin_concat(model: onnx.ModelProto) -> int:
    """Turn a thin ghost module's concat into a depthwise convolution that passes its input on.

    Matches Concat on the channels of p and c, where p = Conv(x), c = Conv(p) is depthwise with odd
    kernel, stride 1 and padding that keeps the size, and either both go through Relu or neither:
    x -> conv -> p -> depthwise -> c -> concat [p, c]. The result is a conv that makes [p, p] and one
    depthwise convolution that makes [p, c] of it, its first half with a kernel that is one in the
    middle and zero elsewhere.

    Proves: constant weights and biases; nothing else reads p, c or what is between; 2 * channels
    fit into 16 lanes. Above that the doubled arithmetic costs more than the copies of the concat.

    Exact because times one, plus zeros, is the same value, and Relu of Relu is Relu.

    A concat of thin tensors copies 8 bytes at a time, 2.8 ns each; the lanes were computed anyway.
    """
    view = Graph(model)
    changed = 0
    for node in view.nodes("Concat"):
        site = _site(view, node)
        if site is None:
            continue
        target = node.output[0]
        for conv in site[:2]:
            weight, bias = (view.constant(name) for name in conv.input[1:3])
            assert weight is not None and bias is not None
            if conv is site.cheap:
                other, nothing = np.zeros_like(weight), np.zeros_like(bias)
                other[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] = 1
                _set_group(conv, 2 * len(weight))
            else:
                other, nothing = weight, bias
            conv.input[1] = view.new_constant(f"{conv.input[1]}/wide", np.concatenate([other, weight]))
            conv.input[2] = view.new_constant(f"{conv.input[2]}/wide", np.concatenate([nothing, bias]))
        last = view.producer(node.input[1])
        assert last is not None
        # Wider tensors get new names: what was noted of the old ones does not hold for them.
        inner = {}
        for made in (site.primary, view.producer(node.input[0]), site.cheap):
            assert made is not None
            if made is not last:
                inner[made.output[0]] = view.new_name(f"{made.output[0]}/wide")
        for made in (site.primary, view.producer(node.input[0]), site.cheap, last):
            assert made is not None
            made.input[:] = [inner.get(name, name) for name in made.input]
            made.output[0] = inner.get(made.output[0], made.output[0])
        last.output[0] = target
        view.graph.node.remove(node)
        changed += 1
    return changed
