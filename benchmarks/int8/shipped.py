"""What int8 costs the shipped weights, on their validation split and test/ together: 10,000 images, paired.

    python benchmarks/int8/shipped.py DATA [WEIGHTS...]

Files are made as `ghostedge export --data` makes them at first, from 500 of the training images, and
compared with the fp32 .tflite: the int8 .tflite by XNNPACK and by the reference kernels, the int8 .onnx by
ONNX Runtime with exact sums.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from ghostedge import checkpoint as checkpoints
from ghostedge.convert import to_onnx, to_tflite
from ghostedge.convert.evidence import sample
from ghostedge.convert.repair import Files, ladder
from ghostedge.data.sources import Data, open_data, recorded_split
from ghostedge.evaluate import paired
from ghostedge.models import fold
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier

KERNELS = (
    ("model_int8.tflite", "default"),
    ("model_int8.tflite", "reference"),
    ("model_int8.onnx", "exact"),
)


def exported(net: nn.Module, pixels: PixelContract, calibration: np.ndarray, folder: Path) -> Files:
    """Write the float files of a folded net as an export does; return what makes int8 files of them."""
    core = to_onnx.core(net, pixels, to_onnx.TFLITE_OPSET)
    model, fp32 = folder / "model.onnx", folder / "model_fp32.tflite"
    onnx.save(to_onnx.simplified(to_onnx.with_raw_pixels(core)), model)
    fp32.write_bytes(to_tflite.convert(to_onnx.simplified(core, 1))["fp32"])
    return Files(core, model, fp32, calibration, 1, "uint8", folder)


def row(weights: str, sets: Data, folder: Path) -> str:
    """Return a line of the table: agreement and points lost, by file and kernels."""
    card, net = checkpoints.build(weights)
    assert sets.train is not None and sets.test is not None
    train, rest = recorded_split(sets.train, card.data)
    size = card.pixels.size
    calibration = sets.train.read(size, sample(sets.train, train, 500, 0)).pixels
    parts = [sets.train.read(size, rest), sets.test.read(size)]
    pixels, labels = (
        np.concatenate([getattr(part, of) for part in parts]) for of in ("pixels", "labels")
    )
    files = exported(fold(net), card.pixels, calibration, folder)
    expected = Classifier(files.fp32)(pixels).argmax(1)
    first = next(ladder(files.core, calibration, True, None, 0, 0, print))
    cells = [weights, f"{len(pixels):,}"]
    for name, kernels in KERNELS:
        found = Classifier(files.make(name, first), kernels=kernels)(pixels).argmax(1)
        drop, interval = paired(expected == labels, found == labels)
        cells.append(f"{(found == expected).mean():.2%}, {drop:.2f} ± {interval:.2f}")
    return f"| {' | '.join(cells)} |"


def main(data: str, *weights: str) -> None:
    sets = open_data(data)
    for name in weights or sorted(checkpoints.shipped()):
        with tempfile.TemporaryDirectory() as scratch:
            print(row(name, sets, Path(scratch)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
