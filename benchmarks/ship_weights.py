"""Turn a finished run into shipped weights, with what int8 costs them measured and recorded.

    python benchmarks/ship_weights.py runs/NAME/best.safetensors DATA

Exports the checkpoint twice, calibrated on its synthetic images and on real ones, evaluates each
int8 model on the validation split and on the test part of DATA, and writes the checkpoint with these
figures to ghostedge/weights/, named after its network, and its card beside it. Nothing is chosen by
the test part. ONNX Runtime's int8 sums are exact, as on CPUs with dot products: without them it
saturates on x86, and a net loses what depends on the CPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from ghostedge import checkpoint, markdown
from ghostedge.convert import export
from ghostedge.data.sources import open_data, recorded_split
from ghostedge.evaluate import evaluate, paired
from ghostedge.files import atomic_write
from ghostedge.runtime import Classifier

MODELS = {"model_int8.tflite": "default", "model_int8.onnx": "exact"}
"""And the kernels that compute them."""


def main(file: str, data: str) -> None:
    card, tensors = checkpoint.read(file)
    if "test" not in card.accuracy or checkpoint.CALIBRATION not in tensors:
        raise SystemExit(f"{file} is of a run that is not finished: --resume it.")
    sets = open_data(data)
    assert sets.train is not None and sets.test is not None
    _, held_out = recorded_split(sets.train, card.data)
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
                    classifier = Classifier(bundle.path / model, kernels=MODELS[model])
                    correct = evaluate(classifier, *images).correct
                    drop, interval = paired(before[name], correct)
                    found[f"{name}_drop"] = round(drop, 2)
                    found[f"{name}_interval"] = round(interval, 2)
                print(kind, model, found)
    card.accuracy["int8"] = int8
    target = checkpoint.WEIGHTS / f"{card.name}.safetensors"
    page = describe(card)
    checkpoint.save(target, card, tensors)
    atomic_write(target.with_suffix(".md"), page)
    print(f"Wrote {target} and its card")


def describe(card: checkpoint.Checkpoint) -> str:
    """Return the card of shipped weights as Markdown."""
    recipe = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in card.training["recipe"].items())
    hours = card.training["seconds"] / 3600  # of the epochs up to the best one
    single = (
        " One branch means that it was trained as a single conv+BN each; its deployed form is that of "
        "the net with more branches."
        if "branches" in card.arguments
        else ""
    )
    taught, start = card.training.get("distillation"), card.training.get("from")
    lines = [
        f"# {card.name}",
        "",
        f"- Network: {card.architecture}, {card.arguments}.{single}",
        "- Data: CIFAR-10 as JPEG (quality 75, 4:2:0 chroma), lossy: figures on it are not comparable "
        f"with published ones. Trained on {card.data['images']:,} images, "
        f"validated on {card.accuracy['validation']['images']:,} split off the training part "
        f"(seed {card.data['validation']['seed']}).",
        f"- Recipe: {recipe}. The epoch with the best validation accuracy, {card.training['epoch']} "
        f"of {card.training['recipe']['epochs']}. One run, one seed; {hours:.1f} hours "
        f"to that epoch on {card.training['device']}.",
        *(
            []
            if start is None
            else [f"- Started from {start['file']} (sha256 {start['sha256'][:8]})."]
        ),
        *([] if taught is None else [f"- Distilled: {_taught(taught)}."]),
        *(
            f"- Top-1, {part}: {card.accuracy[part]['top1']:.2f}% of "
            f"{card.accuracy[part]['images']:,} images."
            for part in ("validation", "test")
        ),
        f"- Licence: {card.licence}. The data set's images are not in this file; its calibration images "
        "are synthetic.",
        "",
        "Points of top-1 that int8 loses, with the paired 95% interval:",
        "",
    ]
    rows = []
    for kind, models in card.accuracy["int8"].items():
        for model, figures in models.items():
            drops = [
                f"{figures[f'{part}_drop']:.2f} ± {figures[f'{part}_interval']:.2f}"
                for part in ("validation", "test")
            ]
            rows.append([f"{kind} images", model, *drops])
    lines.append(markdown.table(["calibrated on", "model", "validation", "test"], rows))
    return "\n".join(lines) + "\n"


def _taught(distillation: dict[str, Any]) -> str:
    stated = {k: v for k, v in distillation.items() if k != "teachers" and v is not None}
    settings = ", ".join(f"{k} {v}" for k, v in stated.items())
    teachers = (f"{t['file']} (sha256 {t['sha256'][:8]})" for t in distillation["teachers"])
    return f"{settings}; taught by {', '.join(teachers)}"


if __name__ == "__main__":
    main(*sys.argv[1:])
