"""The camera variant: a finished .tflite that takes a larger frame and averages it itself."""

from __future__ import annotations

import copy

import numpy as np

from ghostedge.convert.rewrites.flat import OPS, Flat, schema


def camera(content: bytes, side: int) -> bytes:
    """Return a .tflite model that takes (batch, side, side, 3) and averages blocks of pixels first.

    `content` takes the same pixels at its own size, of which `side` is a multiple. What the network
    reads is the mean of a block, rounded to a whole pixel: half up for a uint8 input, half away from
    zero for int8 (of pixel - 128), not at all for float32. An area average is the anti-aliasing that
    MediaPipe and a browser's canvas leave out when they shrink a photo.

    AVERAGE_POOL_2D on the input: XNNPACK leaves it to LiteRT's own kernel, whose whole numbers are the
    same in every kernel. A depthwise convolution would be in the delegate, but it takes longer (the 1.0x
    net at 224 pixels on x86: 1.74 times the plain model's time, where this takes 1.41) and its kernels
    round halves differently.
    """
    model = Flat(content)
    (image,) = model.graph.inputs
    frame = model.tensors[image]
    averaged = copy.copy(frame)
    averaged.name = "averaged"
    average = model.add(averaged)
    for op in model.readers(image) or []:
        op.inputs = [average if tensor == image else tensor for tensor in op.inputs]
    pool, options = schema.OperatorT(), schema.Pool2DOptionsT()
    options.padding = schema.Padding.VALID
    options.filterHeight = options.filterWidth = side // int(frame.shape[1])
    options.strideH = options.strideW = options.filterHeight
    pool.inputs, pool.outputs = [image], [average]
    pool.builtinOptionsType, pool.builtinOptions = schema.BuiltinOptions.Pool2DOptions, options
    version = 2 if frame.type == schema.TensorType.INT8 else 1
    model.set_kind(pool, OPS.AVERAGE_POOL_2D, version)
    # The input keeps its place and name, which the file's signature records.
    frame.shape = np.array([frame.shape[0], side, side, 3], np.int32)
    frame.shapeSignature = None
    model.graph.operators.insert(0, pool)
    return bytes(model)
