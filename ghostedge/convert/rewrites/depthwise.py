from __future__ import annotations

from typing import Any

import numpy as np

from ghostedge.convert.rewrites.flat import OPS, Flat, schema


def depthwise(model: Flat) -> int:
    """Name a convolution with one kernel a channel what it is: DEPTHWISE_CONV_2D.

    Matches CONV_2D with a constant filter (channels, height, width, 1) on a tensor of as many channels.
    onnx2tf 1.29 makes it of a depthwise Conv behind an Add, whose result it takes for channels first.

    Proves: the filter's only readers are such convolutions; where it is a DEQUANTIZE of half floats,
    that has no other readers either.

    Exact because the filter (1, height, width, channels) holds the same values, in another order.

    LiteRT runs both alike; runtimes for microcontrollers know only the second.
    """
    found: dict[int, list[Any]] = {}
    for op in model.operators(OPS.CONV_2D):
        image, kernel = (model.tensors[index] for index in op.inputs[:2])
        if kernel.shape[3] == 1 < kernel.shape[0] == image.shape[3]:
            found.setdefault(op.inputs[1], []).append(op)
    changed = 0
    for index, convs in found.items():
        if model.readers(index) != convs:
            continue
        chain, maker = [index], model.producer(index)
        if maker is not None and model.kind(maker) == OPS.DEQUANTIZE:
            chain.append(maker.inputs[0])
        stored = model.data(chain[-1])
        if stored is None or any(model.readers(tensor) != [maker] for tensor in chain[1:]):
            continue
        shape = model.tensors[index].shape
        items = stored.reshape(*shape, -1)  # the last axis is the bytes of a value
        for tensor in chain:
            model.tensors[tensor].shape = np.array([1, *shape[1:3], shape[0]], np.int32)
        moved = items.transpose(3, 1, 2, 0, 4)
        model.set_data(chain[-1], np.ascontiguousarray(moved))
        for op in convs:
            old, new = op.builtinOptions, schema.DepthwiseConv2DOptionsT()
            for name in (
                "padding",
                "strideW",
                "strideH",
                "dilationWFactor",
                "dilationHFactor",
                "fusedActivationFunction",
            ):
                setattr(new, name, getattr(old, name))
            new.depthMultiplier = 1
            op.builtinOptions = new
            op.builtinOptionsType = schema.BuiltinOptions.DepthwiseConv2DOptions
            model.set_kind(op, OPS.DEPTHWISE_CONV_2D, 2)
            changed += 1
    return changed
