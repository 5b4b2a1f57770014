"""int8 for ONNX Runtime: static, per-channel, as QuantizeLinear / DequantizeLinear pairs (QDQ)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from ghostedge.convert.ranges import Ranges
from ghostedge.pixels import STEP

BATCH = 50


class _Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = (
            {"image": images[i : i + BATCH].transpose(0, 3, 1, 2).astype(np.float32)}
            for i in range(0, len(images), BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(
    model: Path,
    output: Path,
    images: np.ndarray,
    ranges: Ranges | None = None,
    in_float: Collection[str] = (),
) -> None:
    """Quantize model.onnx, calibrated by min-max on raw uint8 pixels (images, size, size, 3).

    The normalised input is fixed to scale 1/64 and zero point 128, which is exact; the final
    softmax stays in float. Activations are uint8: with int8 ones the 1.0x net takes twice as long
    on x86 with VNNI.
    """
    exact = {"scale": np.array(1 / STEP, np.float32), "zero_point": np.array(128, np.uint8)}
    nodes = onnx.load(model).graph.node
    floats = [
        n.name
        for n in nodes
        if n.op_type == "Softmax" or n.name in ("centre", "normalize") or n.name in in_float
    ]
    overrides: dict[str, list[dict[str, Any]]] = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
        for name, (low, high) in (ranges or {}).items()
    }
    overrides["normalized"] = [{**exact, "quant_type": QuantType.QUInt8}]
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends its own pre-processing
    try:
        quantize_static(
            model,
            output,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=floats,
            extra_options={"TensorQuantOverrides": overrides},
        )
    finally:
        logging.getLogger().setLevel(level)
