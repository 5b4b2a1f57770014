"""Turn a finished run into shipped weights, with what int8 costs them measured and recorded.

    python benchmarks/ship_weights.py runs/NAME/best.safetensors DATA

Exports the checkpoint twice, calibrated on its synthetic images and on real ones, evaluates each
int8 model on the validation split and on the test part of DATA, and writes the checkpoint with these
figures to ghostedge/weights/, named after its network.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ghostedge import checkpoint
from ghostedge.convert import export
from ghostedge.data.sources import open_data, split
from ghostedge.evaluate import evaluate, paired

MODELS = ("model_int8.tflite", "model_int8.onnx")


def main(file: str, data: str) -> None:
    card, tensors = checkpoint.read(file)
    sets = open_data(data)
    assert sets.train is not None and sets.test is not None
    recorded = card.data["validation"]
    _, held_out = split(sets.train, recorded["fraction"], recorded["seed"])
    size = card.pixels.size
    parts = {
        "validation": (sets.train.read(size, held_out), sets.train.classes),
        "test": (sets.test.read(size), sets.test.classes),
    }
    before = {name: evaluate(file, *images).correct for name, images in parts.items()}
    int8: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, source in (("synthetic", None), ("real", data)):
            bundle = export(file, Path(scratch) / kind, int8=True, data=source, max_drop=100.0)
            for model in MODELS:
                found = int8.setdefault(kind, {}).setdefault(model, {})
                for name, images in parts.items():
                    correct = evaluate(bundle.path / model, *images).correct
                    drop, interval = paired(before[name], correct)
                    found[f"{name}_drop"] = round(drop, 2)
                    found[f"{name}_interval"] = round(interval, 2)
                print(kind, model, found)
    card.accuracy["int8"] = int8
    target = checkpoint.WEIGHTS / f"{card.name}.safetensors"
    checkpoint.save(target, card, tensors)
    print(f"Wrote {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
