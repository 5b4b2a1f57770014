"""Which corrections serve int8: each one's TFLite and ONNX file against the float net.

    python benchmarks/int8/corrections.py CHECKPOINT DATA [--synthetic] [--test] [--qat EPOCHS]

DATA is a folder of labelled images with train/. Files are made as `ghostedge export` makes them, from
500 calibration images or the checkpoint's 64 synthetic ones, and run by XNNPACK and ONNX Runtime (with exact
sums) on the validation split that the checkpoint records; with --test, which is for the end, on that and
test/ together. Adds to corrections.json beside this file and prints the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from shipped import KERNELS, exported

from ghostedge import checkpoint as checkpoints
from ghostedge.convert import to_onnx, tune
from ghostedge.convert.evidence import QAT_IMAGES, sample
from ghostedge.convert.fake_quant import Graph
from ghostedge.convert.repair import Variant
from ghostedge.data.sources import open_data, recorded_split
from ghostedge.evaluate import paired
from ghostedge.models import fold
from ghostedge.runtime import Classifier

RESULTS = Path(__file__).with_suffix(".json")


def variants(
    core: onnx.ModelProto, calibration: np.ndarray, training: np.ndarray | None, epochs: int
) -> Iterator[Variant]:
    images = tune.core_input(torch.from_numpy(calibration))
    yield Variant("plain")
    graph = Graph(core)
    tune.correct_biases(graph, tune.observe(graph, images), images)
    yield Variant("biases", graph)
    graph = Graph(core)
    tune.equalize(graph, images)
    yield Variant("equalised", graph)
    tune.correct_biases(graph, tune.observe(graph, images), images)
    yield Variant("equalised, biases", graph)
    graph = Graph(core)
    ranges = tune.prepare(graph, images)
    yield Variant("equalised, narrower ranges, biases", graph, ranges)
    if training is not None:
        learned = tune.fine_tune(graph, ranges, training, epochs, 0, print)
        yield Variant(f"the same, and {epochs} epochs of training", graph, learned)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--qat", type=int, default=0)
    arguments = parser.parse_args()
    file = checkpoints.find(arguments.checkpoint)
    card, tensors = checkpoints.read(file)
    net = fold(checkpoints.network(card, tensors, str(file)))
    data = open_data(arguments.data)
    assert data.train is not None
    train, validation = recorded_split(data.train, card.data)
    parts = [data.train.read(card.pixels.size, validation)]
    if arguments.test:
        assert data.test is not None
        parts.append(data.test.read(card.pixels.size))
    pixels = np.concatenate([part.pixels for part in parts])
    classes = np.array([card.labels.index(name) for name in data.train.classes])
    labels = classes[np.concatenate([part.labels for part in parts])]
    calibration = tensors[checkpoints.CALIBRATION]
    if not arguments.synthetic:
        calibration = data.train.read(card.pixels.size, sample(data.train, train, 500, 0)).pixels
    training = None
    if arguments.qat:
        chosen = sample(data.train, train, QAT_IMAGES, 1)
        training = data.train.read(card.pixels.size, chosen).pixels
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = exported(net, card.pixels, calibration, Path(scratch))
        expected = Classifier(files.model)(pixels).argmax(1)
        simplified = to_onnx.simplified(files.core)
        for variant in variants(simplified, calibration, training, arguments.qat):
            for name, kernels in KERNELS:
                if kernels == "reference":
                    continue
                found = Classifier(files.make(name, variant), kernels=kernels)(pixels).argmax(1)
                drop, interval = paired(expected == labels, found == labels)
                row = {"tried": variant.name, "file": name, "drop": drop, "interval": interval}
                row["agreement"] = float((found == expected).mean())
                rows.append(row)
                lost = f"{drop:.2f} ± {interval:.2f}"
                print(f"| {variant.name} | {name} | {row['agreement']:.2%} | {lost} |", flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    origin = "synthetic" if arguments.synthetic else "real"
    results[f"{card.name}, {origin} calibration, {len(pixels)} images"] = {
        "command": "python benchmarks/int8/corrections.py " + shlex.join(sys.argv[1:]),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
