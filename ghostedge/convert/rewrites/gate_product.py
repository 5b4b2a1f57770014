from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ghostedge.convert.rewrites.flat import OPS, Flat, schema


def gate_product(model: Flat) -> int:
    """Multiply by a nearest upsample without making it: a broadcast over pairs of rows.

    Matches MUL of y (batch, 2h, 2w, channels) and DEPTH_TO_SPACE (blocks of 2) of CONCATENATION of g
    (batch, h, w, channels) four times with itself, which is what `nearest_upsample` leaves of
    y * upsample(g). The result is MUL of y as (batch, h, 2, 2w * channels) and of [g, g] on the
    channels as (batch, h, 1, 2w * channels), and a RESHAPE back.

    Proves: all sizes are fixed; y has the upsample's shape, so that nothing else is broadcast; the
    CONCATENATION and the DEPTH_TO_SPACE are no model outputs and have no other reader.

    Exact because the same values are multiplied, in rows of the same order: pixel x of a row of [g, g]
    is g at x // 2.

    The copies are a quarter, RESHAPE is free in XNNPACK, and the int8 model has no DEPTH_TO_SPACE.
    """
    changed = 0
    for space in model.operators(OPS.DEPTH_TO_SPACE):
        concat = model.producer(space.inputs[0])
        readers = model.readers(space.outputs[0])
        if concat is None or model.kind(concat) != OPS.CONCATENATION or not readers:
            continue
        product, upsample, copies = readers[0], space.outputs[0], concat.outputs[0]
        others = [tensor for tensor in product.inputs if tensor != upsample]
        if len(readers) != 1 or model.kind(product) != OPS.MUL or len(others) != 1:
            continue
        if len(concat.inputs) != 4 or len(set(concat.inputs)) != 1:
            continue
        if model.readers(copies) != [space] or space.builtinOptions.blockSize != 2:
            continue
        shapes = [model.fixed_shape(tensor) for tensor in (concat.inputs[0], others[0], upsample)]
        if shapes[0] is None or len(shapes[0]) != 4 or shapes[1] is None or shapes[1] != shapes[2]:
            continue
        batch, height, width, channels = shapes[0]
        row = 2 * width * channels
        concat.inputs = concat.inputs[:2]
        model.tensors[copies].shape = np.array([batch, height, width, 2 * channels], np.int32)
        operators, result = model.graph.operators, product.outputs[0]
        rows = _like(model, others[0], [batch, height, 2, row])
        gates = _like(model, copies, [batch, height, 1, row])
        products = _like(model, result, [batch, height, 2, row])
        operators[operators.index(space)] = _reshape(model, copies, gates)
        at = operators.index(product)
        operators[at : at + 1] = [
            _reshape(model, others[0], rows),
            product,
            _reshape(model, products, result),
        ]
        product.inputs, product.outputs = [rows, gates], [products]
        changed += 1
    return changed


def _like(model: Flat, tensor: int, shape: list[int]) -> int:
    """Add a tensor of another shape and the same type and scale."""
    entry = copy.copy(model.tensors[tensor])
    entry.shape, entry.shapeSignature = np.array(shape, np.int32), None
    entry.name = f"rewritten_{len(model.tensors)}"
    return model.add(entry)


def _reshape(model: Flat, source: int, target: int) -> Any:
    shape = np.array(model.tensors[target].shape, np.int32)
    sizes = schema.TensorT()
    sizes.type, sizes.shape = schema.TensorType.INT32, np.array([len(shape)], np.int32)
    sizes.name = f"shape_{len(model.tensors)}"
    op, options = schema.OperatorT(), schema.ReshapeOptionsT()
    options.newShape = shape
    op.inputs, op.outputs = [source, model.add(sizes)], [target]
    model.set_data(op.inputs[1], shape)
    op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.ReshapeOptions, options
    model.set_kind(op, OPS.RESHAPE, 1)
    return op
