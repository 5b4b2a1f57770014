"""The export, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import ghostedge
from ghostedge.bundle import FORMAT, GOLDEN, LABELS, MANIFEST, is_bundle, read_manifest
from ghostedge.convert.plan import Plan, make_plan
from ghostedge.errors import CheckFailed, require
from ghostedge.files import atomic_directory, sha256

if TYPE_CHECKING:
    from ghostedge.convert.check import Stage

Say = Callable[[str], None]

PACKAGES = ("torch", "onnx", "onnxsim", "onnxruntime", "onnx2tf", "tensorflow", "ai-edge-litert")

TOLERANCES = {
    # (precision, kernels): allowed difference when a bundle is verified, and its unit. Reference
    # kernels give the same bytes on every machine; XNNPACK's int8 kernels differ by one step
    # between CPUs, and ONNX Runtime's by more, as they saturate on CPUs without VNNI.
    ("litert", "int8", "reference"): (0, "step"),
    ("litert", "int8", "default"): (1, "step"),
    ("onnxruntime", "int8", "default"): (0.1, "probability"),
    ("litert", "fp16", "default"): (1e-2, "probability"),
}
FLOAT_TOLERANCE = (1e-4, "probability")


class Bundle(os.PathLike[str]):
    """A finished export: a path that knows what was measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = read_manifest(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @property
    def parity(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Each stage's figures by set of images: `bundle.parity["model.onnx"]["synthetic"]`."""
        return {stage["name"]: stage["parity"] for stage in self.manifest["stages"]}

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """Top-1 in percent of each stage by set, where labelled images were given."""
        return {
            stage: {name: p["top1"] for name, p in sets.items() if p["top1"] is not None}
            for stage, sets in self.parity.items()
        }


def export(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    int8: bool | None = None,
    half: bool | None = None,
    format: Sequence[str] | None = None,
    data: str | None = None,
    io: str | None = None,
    imgsz: int | None = None,
    batch: int | None = None,
    opset: int | None = None,
    calib_samples: int | None = None,
    check_samples: int | None = None,
    max_drop: float | None = None,
    seed: int | None = None,
    say: Say = lambda line: None,
) -> Bundle:
    """Fold, convert, quantize and check a checkpoint; return the bundle that was written.

    Args:
        checkpoint: a .safetensors checkpoint, or the name of shipped weights.
        output: folder of the bundle, "<name>-export" by default; an older bundle there is replaced.
        recipe: a named set of the options below ("app", "web", ...) or a .toml file.
        int8: add model_int8.tflite and model_int8.onnx.
        half: add model_fp16.tflite.
        format: "onnx", "tflite" or both (the default).
        data: labelled images to calibrate and check on (see `ghostedge.data.sources.open_data`).
        io: input and output type of model_int8.tflite: "uint8" (default), "int8" or "float32".
        imgsz: height and width of the input, the checkpoint's by default.
        batch: batch of the TFLite models; ONNX leaves it free.
        opset: ONNX opset, 17 by default.
        calib_samples, check_samples: how many images of `data` to calibrate and to check on.
        max_drop: points of top-1 that a quantized model may lose on labelled data.
        seed: of every choice of images.
        say: called with a line at each step.

    Raises CheckFailed when a stage is outside its limits and GhostEdgeError for bad input; in both
    cases nothing is written and what was at `output` stays.
    """
    given = {
        "output": output,
        "int8": int8,
        "half": half,
        "format": format,
        "data": data,
        "io": io,
        "imgsz": imgsz,
        "batch": batch,
        "opset": opset,
        "calib_samples": calib_samples,
        "check_samples": check_samples,
        "max_drop": max_drop,
        "seed": seed,
    }
    return run(make_plan(os.fspath(checkpoint), recipe, given), say)


def run(plan: Plan, say: Say) -> Bundle:
    """Carry out a plan; `say` is called with a line at each step."""
    with atomic_directory(plan.output, is_bundle) as folder:
        _Export(plan, folder, say).run()
    return Bundle(plan.output)


class _Export:
    """One export under way, in the folder that becomes the bundle."""

    def __init__(self, plan: Plan, folder: Path, say: Say) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        self.seconds: dict[str, float] = {}
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.say(name)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)

    def run(self) -> None:
        plan = self.plan
        with self.step("load and fold"):
            self.load()
        with self.step("gather images"):
            from ghostedge.convert.evidence import gather

            self.evidence = gather(plan, self.card, self.tensors, self.net, self.pixels)
        with self.step("check unfolded and folded"):
            self.reference()
        with tempfile.TemporaryDirectory(prefix="ghostedge-") as scratch:
            self.scratch = Path(scratch)
            with self.step("convert to ONNX"):
                self.to_onnx()
            if "tflite" in plan.format:
                with self.step("convert to TFLite"):
                    self.to_tflite()
            if plan.int8 and "onnx" in plan.format:
                with self.step("quantize for ONNX Runtime"):
                    self.to_int8_onnx()
        with self.step("check every artefact"):
            for name in plan.artefacts:
                self.check_file(name, self.folder / name)
            self.check_size()
        with self.step("write golden images and report"):
            self.publish()

    def load(self) -> None:
        try:
            import onnx  # noqa: F401
            import onnxsim  # noqa: F401
            import torch  # noqa: F401

            from ghostedge import checkpoint
            from ghostedge.models import fold, profile
        except ImportError as error:
            raise require(error.name or "torch", "export") from error
        self.file = checkpoint.find(self.plan.checkpoint)
        self.card, self.tensors = checkpoint.read(self.file)
        self.net = checkpoint.network(self.card, self.tensors, str(self.file))
        size = self.plan.imgsz or self.card.pixels.size
        self.pixels = dataclasses.replace(self.card.pixels, size=size)
        self.profile = profile(self.net, size)
        self.folded = fold(self.net)

    def reference(self) -> None:
        """Run the unfolded net on every set: all else is compared with it."""
        self.expected = {}
        for name, images in self.evidence.sets.items():
            self.expected[name] = _probabilities(self.net, self.pixels, images.pixels)
        self.compare("unfolded", "fp32", lambda name, images: self.expected[name])
        self.compare(
            "folded", "fp32", lambda _, images: _probabilities(self.folded, self.pixels, images)
        )

    def compare(
        self, name: str, precision: str, run: Callable[[str, np.ndarray], np.ndarray]
    ) -> None:
        """Compare a stage on every set and record it; raise CheckFailed when it is off."""
        from ghostedge.convert.check import Stage, compare, judge

        parity = {
            key: compare(self.expected[key], run(key, images.pixels), images)
            for key, images in self.evidence.sets.items()
        }
        stage = Stage(name, precision, parity)
        self.stages.append(stage)
        judge(stage, self.plan.limits)

    def check_file(self, name: str, path: Path) -> None:
        from ghostedge.runtime import Classifier

        model = Classifier(path, threads=os.cpu_count() or 1)
        self.compare(name, _precision(name), lambda _, images: model(images))

    def to_onnx(self) -> None:
        import onnx

        from ghostedge.convert import to_onnx
        from ghostedge.convert.rewrites import rewrite

        core = to_onnx.core(self.folded, self.pixels, self.plan.opset)
        exported = self.scratch / "exported.onnx"
        onnx.save(to_onnx.with_raw_pixels(core), exported)
        self.check_file("exported ONNX", exported)
        model = to_onnx.simplified(to_onnx.with_raw_pixels(core))
        to_onnx.describe(model, self.card.labels, {"name": self.card.name})
        self.model = self.scratch / "model.onnx"
        onnx.save(model, self.model)
        if "onnx" in self.plan.format:
            shutil.copy(self.model, self.folder)
        if "tflite" in self.plan.format:
            core = to_onnx.core(self.folded, self.pixels, to_onnx.TFLITE_OPSET)
            rewritten = rewrite(to_onnx.simplified(core, self.plan.batch))
            onnx.save(rewritten, self.scratch / "core.onnx")

    def to_tflite(self) -> None:
        from ghostedge.convert import to_tflite
        from ghostedge.convert.rewrites import finish

        wanted = [_precision(name) for name in self.plan.artefacts if name.endswith(".tflite")]
        np.save(self.scratch / to_tflite.CALIBRATION, self.evidence.calibration)
        to_tflite.convert(self.scratch, wanted, self.plan.io)
        for precision in wanted:
            name = f"model_{precision}.tflite"
            (self.folder / name).write_bytes(finish((self.scratch / name).read_bytes()))

    def to_int8_onnx(self) -> None:
        from ghostedge.convert import to_int8_onnx

        to_int8_onnx.quantize(
            self.model, self.folder / "model_int8.onnx", self.evidence.calibration
        )

    def check_size(self) -> None:
        allowed = self.plan.limits.max_kilobytes
        if allowed is None:
            return
        files = [n for n in self.plan.artefacts if "int8" in n] or self.plan.artefacts
        for name in files:
            size = (self.folder / name).stat().st_size / 1000
            if size > allowed:
                raise CheckFailed(
                    f"{name} has {size:.0f} kB, where the limit is {allowed:g}. "
                    "Choose a smaller width, or raise the limit in the recipe."
                )

    def publish(self) -> None:
        from ghostedge.convert.report import write_reports

        (self.folder / LABELS).write_text("".join(f"{x}\n" for x in self.card.labels), "utf-8")
        golden, expected = self.golden()
        # numpy's own savez stamps the time of writing on each member.
        _save_npz(self.folder / GOLDEN, golden)
        manifest = {
            "format": FORMAT,
            "ghostedge": ghostedge.__version__,
            "name": self.card.name,
            "source": {
                "file": self.file.name,
                "sha256": sha256(self.file),
                "profile": self.profile._asdict(),
                **{k: v for k, v in self.card.to_json().items() if k not in ("labels", "pixels")},
            },
            "labels": self.card.labels,
            "pixels": self.pixels.to_json(),
            "artefacts": {name: self.describe(name) for name in self.plan.artefacts},
            "files": {n: {"sha256": sha256(self.folder / n)} for n in (LABELS, GOLDEN)},
            "golden": {"images": len(golden["images"]), "expected": expected},
            "stages": [stage.to_json() for stage in self.stages],
            "calibration": self.evidence.calibration_card if self.plan.int8 else None,
            "skipped_images": self.evidence.skipped,
            "opset": self.plan.opset,
            "limits": dataclasses.asdict(self.plan.limits),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        _write_json(self.folder / MANIFEST, manifest)
        from ghostedge.latency.runner import machine

        timings = {"seconds": self.seconds, "machine": machine()}
        _write_json(self.folder / "timings.json", timings)
        write_reports(self.folder, manifest)

    def golden(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Return the golden images with every artefact's outputs, and how exact each is expected."""
        from ghostedge.runtime import Classifier

        arrays = {"images": self.evidence.sets["synthetic"].pixels}
        expected = []
        for name in self.plan.artefacts:
            for kernels in ("default", "reference") if name.endswith(".tflite") else ("default",):
                model = Classifier(self.folder / name, kernels=kernels)
                kind = (model.runtime, _precision(name), kernels)
                tolerance, unit = TOLERANCES.get(kind, FLOAT_TOLERANCE)
                if model.step is None and unit == "step":
                    tolerance, unit = tolerance / 256, "probability"
                key = f"{name}:{kernels}"
                arrays[key] = model.raw(arrays["images"])
                entry = {"artefact": name, "kernels": kernels, "key": key}
                expected.append({**entry, "tolerance": tolerance, "unit": unit})
        return arrays, expected

    def describe(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        size, classes = self.pixels.size, len(self.card.labels)
        onnx = name.endswith(".onnx")
        dtype = self.plan.io if name == "model_int8.tflite" else "float32"
        output: dict[str, Any] = {"shape": [None if onnx else self.plan.batch, classes]}
        output["dtype"] = dtype
        if dtype != "float32":
            output |= {"scale": 1 / 256, "zero_point": 0 if dtype == "uint8" else -128}
        image = [3, size, size] if onnx else [size, size, 3]
        return {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "runtime": "onnxruntime" if onnx else "litert",
            "precision": _precision(name),
            "input": {
                "shape": [None if onnx else self.plan.batch, *image],
                "dtype": dtype,
                "layout": "NCHW" if onnx else "NHWC",
            },
            "output": output,
        }


def _precision(name: str) -> str:
    return next((p for p in ("int8", "fp16") if p in name), "fp32")


def _probabilities(net: Any, pixels: Any, images: np.ndarray) -> np.ndarray:
    import torch

    outputs = []
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            values = pixels.normalize(images[start : start + 100]).transpose(0, 3, 1, 2)
            batch = torch.from_numpy(values).contiguous(memory_format=torch.channels_last)
            outputs.append(net(batch).softmax(1).numpy())
    return np.concatenate(outputs)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
