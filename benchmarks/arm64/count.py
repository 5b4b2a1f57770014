"""The table of guest instructions: shipped weights, every precision, and peers, on three CPUs.

    python benchmarks/arm64/count.py

Writes results.json beside this file and prints the table. The peers have random weights (a count
hardly depends on them, an accuracy does) and go through the plain conversion of benchmarks/rewrites.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

import ghostedge
from ghostedge import checkpoint
from ghostedge.bundle import read_manifest
from ghostedge.models import profile
from ghostedge.runtime import Classifier

HERE = Path(__file__).parent
PLAIN = HERE.parent / "rewrites" / "plain.py"
IMAGES, REFERENCE_IMAGES = 64, 8
PARTS = {
    "convolution": ("gemm", "MlasConv", "Mlas"),
    "depthwise": ("dwconv",),
    "elementwise": ("_vmul", "_vadd", "_vsub", "_vprelu", "_vclamp", "_vlrelu", "lut", "_vhswish"),
}


class ResNet8(nn.Module):
    """MLPerf Tiny's image classification network (mlcommons/tiny, resnet_v1_eembc): 78 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.stages = nn.ModuleList()
        for before, width in ((16, 16), (16, 32), (32, 64)):
            stride = 1 if before == width else 2
            first = nn.Conv2d(before, width, 3, stride, 1)
            body = nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            short = nn.Identity() if stride == 1 else nn.Conv2d(before, width, 1, stride)
            self.stages.append(nn.ModuleList([body, short]))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for body, short in self.stages:
            x = torch.relu(body(x) + short(x))
        return self.head(x.mean((2, 3)))


class Pixels(nn.Module):
    """Raw pixels 0-255 to what a net was made for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - 128) / 64


def peers() -> dict[str, nn.Module]:
    import torchvision

    torch.manual_seed(0)
    return {
        "ResNet-8 (MLPerf Tiny)": ResNet8(),
        "MobileNetV3-Small (torchvision) at 32 px": torchvision.models.mobilenet_v3_small(
            num_classes=10
        ),
    }


def convert_plainly(source: str, calibration: Path, folder: Path) -> None:
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, PLAIN, source, calibration, folder]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def peer_models(net: nn.Module, calibration: Path, folder: Path) -> None:
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            nn.Sequential(Pixels(), net, nn.Softmax(1)).eval(),
            (torch.zeros(1, 3, 32, 32),),
            str(folder / "plain.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["probabilities"],
        )
    simple, ok = onnxsim.simplify(onnx.load(folder / "plain.onnx"))
    assert ok
    onnx.save(simple, folder / "plain.onnx")
    convert_plainly("-", calibration, folder)


def measure(name: str, file: Path, images: np.ndarray) -> list[dict[str, Any]]:
    """Count a model on every CPU and compare its outputs with those of this machine."""
    rows = []
    here = Classifier(file).raw(images).astype(np.float64)
    for cpu in emulator.BOARDS:
        try:
            there = emulator.run(file, cpu, images)
        except RuntimeError as error:
            rows.append({"network": name, "model": file.name, "cpu": cpu, "failed": str(error)})
            continue
        row = {
            "network": name,
            "model": file.name,
            "cpu": cpu,
            "instructions": there.instructions,
            "parts": parts(there.by_symbol),
            "symbols": {k: round(v, 4) for k, v in there.by_symbol.items() if v >= 0.005},
            "images": len(images),
            "same_top1": float((there.outputs.argmax(1) == here.argmax(1)).mean()),
            "exact": round(float((there.outputs == here).mean()), 4),
            "largest_difference": float(np.abs(there.outputs - here).max()),
        }
        if file.name == "model_int8.tflite":
            few = images[:REFERENCE_IMAGES]
            plain = emulator.run(file, cpu, few, kernels="reference", runs=0).outputs
            row["reference_exact"] = float(
                (plain == Classifier(file, kernels="reference").raw(few)).mean()
            )
        rows.append(row)
        print(f"{name:42} {file.name:18} {cpu} {there.instructions / 1e6:8.3f}", flush=True)
    return rows


def parts(by_symbol: dict[str, float]) -> dict[str, float]:
    """Return the share of each kind of arithmetic, by the names of the kernels."""
    found = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for symbol, share in by_symbol.items():
        kernel = symbol if "ukernel" in symbol or "Mlas" in symbol else ""
        names = (part for part, words in PARTS.items() if any(word in kernel for word in words))
        found[next(names, "the rest")] += share
    return {part: round(share, 4) for part, share in found.items()}


def main() -> None:
    emulator.set_up()
    rows, networks = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Path(scratch, "calibration.npy")
        for name, path in checkpoint.shipped().items():
            _, tensors = checkpoint.read(name)
            np.save(calibration, tensors["calibration_images"])
            bundle = ghostedge.export(name, Path(scratch, name), int8=True, half=True)
            with np.load(bundle.path / "golden.npz") as golden:
                images = golden["images"][:IMAGES]
            for artefact in read_manifest(bundle.path)["artefacts"]:
                rows += measure(name, bundle.path / artefact, images)
            plain = Path(scratch, "plain", name)
            convert_plainly(str(path), calibration, plain)
            for precision in ("fp32", "int8"):
                rows += measure(f"{name}, plain", plain / f"model_{precision}.tflite", images)
            networks[name] = bundle.manifest["source"]["profile"]["macs"]
        for number, (name, net) in enumerate(peers().items()):
            folder = Path(scratch, f"peer{number}")
            networks[name] = profile(net.eval(), 32).macs
            peer_models(net, calibration, folder)
            for precision in ("fp32", "int8"):
                rows += measure(name, folder / f"model_{precision}.tflite", images)
    result = {
        "command": "python benchmarks/arm64/count.py",
        "versions": emulator.versions(),
        "macs": networks,
        "rows": rows,
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of README.md: counts in millions, where they go on an A72, agreement."""
    counts = ["| network, model | MMACs | A53 | A72 | A76 |", "|---|---|---|---|---|"]
    shares = [f"| network, model | {' | '.join(PARTS)} | the rest |", "|---|---|---|---|---|"]
    same = ["| model | same top-1 | identical outputs | largest difference |", "|---|---|---|---|"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        found.setdefault((row["network"], row["model"]), {})[row["cpu"]] = row
    for (network, model), cpus in found.items():
        name = f"{network}, `{model}`"
        macs = result["macs"][network.removesuffix(", plain")] / 1e6
        cells = [f"{cpus[cpu].get('instructions', float('nan')) / 1e6:.2f}" for cpu in cpus]
        counts.append(f"| {name} | {macs:.1f} | {' | '.join(cells)} |")
        a72 = cpus["cortex-a72"]
        millions = [f"{v * a72['instructions'] / 1e6:.2f}" for v in a72["parts"].values()]
        shares.append(f"| {name} | {' | '.join(millions)} |")
        worst = [min(row["same_top1"] for row in cpus.values())]
        worst.append(min(row["exact"] for row in cpus.values()))
        furthest = max(row["largest_difference"] for row in cpus.values())
        same.append(f"| {name} | {worst[0]:.1%} | {worst[1]:.1%} | {furthest:.2g} |")
    return "\n\n".join("\n".join(lines) for lines in (counts, shares, same))


if __name__ == "__main__":
    main()
