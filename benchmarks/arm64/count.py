"""The table of guest instructions: shipped weights, every precision, and peers, on three CPUs.

    python benchmarks/arm64/count.py [FOLDER]

Writes results.json beside this file and prints the tables; what stands there for the same file already,
of the same runtimes, is taken over, so that an interrupted run goes on. FOLDER keeps the models for
another run. The peers have random weights (a count hardly depends on them, an accuracy does) and go
through the plain conversion of benchmarks/rewrites.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

import ghostedge
from ghostedge import checkpoint, markdown
from ghostedge.bundle import read_manifest
from ghostedge.files import atomic_write, sha256
from ghostedge.models import create, fold, profile
from ghostedge.runtime import Classifier
from ghostedge.targets import BASE

HERE = Path(__file__).parent
PLAIN = HERE.parent / "rewrites" / "plain.py"
COMMAND = "python benchmarks/arm64/count.py"
IMAGES, REFERENCE_IMAGES = 16, 4
PARTS = {
    "convolution": ("gemm", "MlasConv", "Mlas"),
    "depthwise": ("dwconv",),
    "elementwise": ("_vmul", "_vadd", "_vsub", "_vprelu", "_vclamp", "_vlrelu", "lut", "_vhswish"),
}


class Pixels(nn.Module):
    """Raw pixels 0-255 to what a net was made for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - 128) / 64


def peers() -> dict[str, nn.Module]:
    import torchvision

    torch.manual_seed(0)
    return {
        "ResNet-8 (MLPerf Tiny)": fold(create("resnet8")),
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


def measure(name: str, file: Path, cpu: str, images: np.ndarray) -> dict[str, Any]:
    """Count a model on a CPU and compare its outputs with those of this machine."""
    # Of ours; on MobileNetV3's random weights the reference kernels abort, on x86 as well.
    ours = file.with_name("golden.npz").exists() and file.name == "model_int8.tflite"
    reference = REFERENCE_IMAGES if ours else 0
    there = emulator.run(file, cpu, images, reference=reference)
    here = Classifier(file).raw(images).astype(np.float64)
    row = {
        "network": name,
        "model": file.name,
        "sha256": sha256(file),
        "cpu": cpu,
        "instructions": there.instructions,
        "parts": parts(there.by_symbol),
        "symbols": {k: round(v, 4) for k, v in there.by_symbol.items() if v >= 0.005},
        "images": len(images),
        "same_top1": float((there.outputs.argmax(1) == here.argmax(1)).mean()),
        "exact": round(float((there.outputs == here).mean()), 4),
        "largest_difference": float(np.abs(there.outputs - here).max()),
    }
    if reference:
        plain = Classifier(file, kernels="reference").raw(images[:reference])
        row["reference_exact"] = float((there.reference == plain).mean())
    return row


def parts(by_symbol: dict[str, float]) -> dict[str, float]:
    """Return the share of each kind of arithmetic, by the names of the kernels."""
    found = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for symbol, share in by_symbol.items():
        kernel = symbol if "ukernel" in symbol or "Mlas" in symbol else ""
        names = (part for part, words in PARTS.items() if any(word in kernel for word in words))
        found[next(names, "the rest")] += share
    return {part: round(share, 4) for part, share in found.items()}


def models(folder: Path) -> Iterator[tuple[str, Path, float]]:
    """Yield (network, file, MACs) of ours and of the peers, each made in `folder` if not there yet."""
    calibration = folder / "calibration.npy"
    np.save(calibration, checkpoint.read(BASE)[1]["calibration_images"])
    bundle, plain = folder / BASE, folder / f"{BASE}-plain"
    if not bundle.exists():
        ghostedge.export(BASE, bundle, int8=True, half=True)
    macs = read_manifest(bundle)["source"]["profile"]["macs"]
    if not plain.exists():
        convert_plainly(str(checkpoint.find(BASE)), calibration, plain)
    for precision in ("int8", "fp32"):
        yield BASE, bundle / f"model_{precision}.tflite", macs
        yield f"{BASE}, plain", plain / f"model_{precision}.tflite", macs
    for artefact in ("model.onnx", "model_int8.onnx", "model_fp16.tflite"):
        yield BASE, bundle / artefact, macs
    for number, (name, net) in enumerate(peers().items()):
        made = folder / f"peer{number}"
        if not made.exists():
            peer_models(net, calibration, made)
        for precision in ("int8", "fp32"):
            yield name, made / f"model_{precision}.tflite", profile(net.eval(), 32).macs


def main(folder: Path) -> None:
    emulator.set_up()
    results = HERE / "results.json"
    old = json.loads(results.read_text()) if results.exists() else {}
    if old:
        counted = ("ai-edge-litert", "onnxruntime")
        emulator.expect_versions(results, old["versions"], emulator.versions(), counted)
    known = {(row["sha256"], row["cpu"]): row for row in old.get("rows", ())}
    result: dict[str, Any] = {
        "command": COMMAND,
        "versions": emulator.versions(),
        "macs": {},
        "rows": [],
    }
    images = None
    for name, file, macs in models(folder):
        if images is None:
            with np.load(file.with_name("golden.npz")) as golden:
                images = golden["images"][:IMAGES]
        result["macs"][name] = macs
        for cpu in emulator.BOARDS:
            row = known.pop((sha256(file), cpu), None) or measure(name, file, cpu, images)
            result["rows"].append(row)
            # Those that were not come to yet are kept, should this be interrupted.
            so_far = {**result, "rows": [*result["rows"], *known.values()]}
            atomic_write(results, json.dumps(so_far, indent=1) + "\n")
            print(f"{name:42} {file.name:18} {cpu} {row['instructions'] / 1e6:8.3f}", flush=True)
    atomic_write(results, json.dumps(result, indent=1) + "\n")
    print(shown(result))


def shown(result: dict[str, Any]) -> str:
    """Return the tables of README.md: counts in millions, where they go on an A72, agreement."""
    counts, shares, same = [], [], []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in result["rows"]:
        found.setdefault((row["network"], row["model"]), {})[row["cpu"]] = row
    for (network, model), cpus in found.items():
        name = f"{network}, `{model}`"
        macs = result["macs"][network] / 1e6
        cells = [f"{cpus[cpu]['instructions'] / 1e6:.2f}" for cpu in cpus]
        counts.append([name, f"{macs:.1f}", *cells])
        a72 = cpus["cortex-a72"]
        millions = [f"{v * a72['instructions'] / 1e6:.2f}" for v in a72["parts"].values()]
        shares.append([name, *millions])
        worst = [min(row["same_top1"] for row in cpus.values())]
        worst.append(min(row["exact"] for row in cpus.values()))
        furthest = max(row["largest_difference"] for row in cpus.values())
        same.append([name, *(f"{share:.1%}" for share in worst), f"{furthest:.2g}"])
    tables = [
        (["network, model", "MMACs", "A53", "A72", "A76"], counts),
        (["network, model", *PARTS, "the rest"], shares),
        (["model", "same top-1", "identical outputs", "largest difference"], same),
    ]
    return "\n\n".join(markdown.table(heading, rows) for heading, rows in tables)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
