"""How far each layer of a quantized .tflite is from the same layer in float."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge.convert.audit import kind_of, short
from ghostedge.convert.rewrites.flat import Flat, schema
from ghostedge.runtime import interpreter

MOVES = ("PAD", "RESHAPE", "TRANSPOSE", "QUANTIZE", "DEQUANTIZE")
"""These make no new values."""


def signal_to_noise(floating: Path, quantized: Path, images: np.ndarray) -> list[dict[str, Any]]:
    """Compare the layers of two .tflite files of one network on raw uint8 pixels (N, size, size, 3).

    Both run on XNNPACK with every layer as an output of the model. Returns, in the order of the
    quantized file, {name, operator, decibels} of each int8 tensor that has the name and shape of a
    float one: 10 log10 of the mean square of the float values by that of the difference, where each
    channel is scaled to fit, as equalisation may have scaled it. Layers without any difference are left
    out.
    """
    exact, rough = Flat(floating.read_bytes()), Flat(quantized.read_bytes())
    known = {_key(exact, op): op.outputs[0] for op in exact.graph.operators}
    pairs = [
        (op, known[_key(rough, op)])
        for op in rough.graph.operators
        if _key(rough, op) in known
        and kind_of(rough, op) not in MOVES
        and rough.tensors[op.outputs[0]].type == schema.TensorType.INT8
        and op.outputs[0] not in rough.graph.outputs
    ]
    if not pairs:
        return []
    sums: list[Any] = [0.0] * len(pairs)
    for wanted, found in zip(
        _layers(exact, [number for _, number in pairs], images),
        _layers(rough, [op.outputs[0] for op, _ in pairs], images),
        strict=True,
    ):
        for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
            a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
            sums[index] += np.stack([(a * a).sum(0), (a * b).sum(0), (b * b).sum(0)])
    ratios = []
    for squares, products, others in sums:
        fitted = np.divide(products**2, others, out=np.zeros_like(squares), where=others > 0)
        ratios.append((squares.sum(), (squares - fitted).sum()))
    return [
        {
            "name": short(rough.tensors[op.outputs[0]].name.decode(errors="replace")),
            "operator": kind_of(rough, op),
            "decibels": round(10 * math.log10(s / n), 1),
        }
        for (op, _), (s, n) in zip(pairs, ratios, strict=True)
        if n > 1e-12 * s
    ]


def _key(model: Flat, op: Any) -> tuple[Any, ...]:
    tensor = model.tensors[op.outputs[0]]
    return tensor.name, *(() if tensor.shape is None else tensor.shape)


def _layers(model: Flat, tensors: list[int], images: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield the values of some tensors, float32, for one batch of images after the other."""
    model.graph.outputs = [*model.graph.outputs, *tensors]
    model.model.signatureDefs = None  # they would name the old outputs alone
    net = interpreter(bytes(model))
    given = net.get_input_details()[0]
    made = net.get_output_details()[-len(tensors) :]
    batch = given["shape"][0]
    pixels = images.astype(np.int16) - (128 if given["dtype"] == np.int8 else 0)
    for start in range(0, len(images), batch):
        chunk = np.resize(pixels[start : start + batch], given["shape"])
        net.set_tensor(given["index"], chunk.astype(given["dtype"]))
        net.invoke()
        values = []
        for tensor in made:
            scale, zero = tensor["quantization"]
            value = net.get_tensor(tensor["index"]).astype(np.float32)
            values.append((value - zero) * np.float32(scale) if scale else value)
        yield values
