"""What int8 costs a checkpoint, on its validation split, on test/ and on both: paired, two sets of kernels.

    python benchmarks/int8/shipped.py CHECKPOINT DATA

Quantized as an export does, calibrated on 500 images that the checkpoint was trained on; compared with
the fp32 .tflite on all images of the validation split and of test/.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from ghostedge import checkpoint as checkpoints
from ghostedge.convert import ranges, to_int8_tflite, to_onnx, to_tflite
from ghostedge.convert.evidence import sample
from ghostedge.data.sources import open_data, split
from ghostedge.evaluate import paired
from ghostedge.models import fold
from ghostedge.runtime import Classifier


def main(weights: str, data: str) -> None:
    card, net = checkpoints.build(weights)
    sets, recorded = open_data(data), card.data["validation"]
    assert sets.train is not None and sets.test is not None
    train, rest = split(sets.train, recorded["fraction"], recorded["seed"])
    size = card.pixels.size
    calibration = sets.train.read(size, sample(sets.train, train, 500, 0)).pixels
    parts = {"validation": sets.train.read(size, rest), "test": sets.test.read(size)}
    core = to_onnx.simplified(to_onnx.core(fold(net), card.pixels, to_onnx.TFLITE_OPSET), 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "model_fp32.tflite"
        file.write_bytes(model := to_tflite.convert(core)["fp32"])
        quantized = folder / "model_int8.tflite"
        observed = ranges.observe(model, calibration)
        quantized.write_bytes(to_int8_tflite.quantize(model, observed, "uint8"))
        for kernels in ("default", "reference"):
            found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
            for name, images in parts.items():
                tops = [
                    Classifier(path, kernels=run)(images.pixels).argmax(1)
                    for path, run in ((file, "default"), (quantized, kernels))
                ]
                found[name] = (*(top == images.labels for top in tops), tops[0] == tops[1])
            found["both"] = tuple(
                np.concatenate(both) for both in zip(*found.values(), strict=True)
            )  # type: ignore[assignment]
            for name, (before, after, same) in found.items():
                drop, interval = paired(before, after)
                print(
                    f"{kernels:10}{name:11}{len(same):6} images: agreement {same.mean():.2%}, "
                    f"points lost {drop:.2f} ± {interval:.2f}"
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
