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
from ghostedge.bundle import (
    CAMERA,
    FORMAT,
    GOLDEN,
    LABELS,
    MANIFEST,
    REPORTS,
    TIMINGS,
    is_bundle,
    read_manifest,
    write_manifest,
)
from ghostedge.convert.plan import Plan, make_plan
from ghostedge.errors import CheckFailed, GhostEdgeError, needing
from ghostedge.files import atomic_directory, sha256
from ghostedge.pixels import enlarged, frame_side

if TYPE_CHECKING:
    from torch import nn

    from ghostedge.convert.check import Parity, Stage
    from ghostedge.evaluate import Evaluation

Say = Callable[[str], None]

PACKAGES = ("torch", "onnx", "onnxsim", "onnxruntime", "onnx2tf", "tensorflow", "ai-edge-litert")

TOLERANCES = {
    # (runtime, precision, kernels): allowed difference when a bundle is verified, and its unit. Reference
    # kernels give the same bytes on every machine; XNNPACK's int8 kernels differ by one step
    # between CPUs, and ONNX Runtime's by more, as they saturate on CPUs without VNNI.
    ("litert", "int8", "reference"): (0, "step"),
    ("litert", "int8", "default"): (1, "step"),
    ("onnxruntime", "int8", "default"): (0.1, "probability"),
    # Float inside may be a rounding apart between CPUs, and a step of int8 then.
    ("litert", "mixed", "reference"): (1, "step"),
    ("litert", "mixed", "default"): (1, "step"),
    ("onnxruntime", "mixed", "default"): (0.1, "probability"),
    ("litert", "fp16", "default"): (1e-2, "probability"),
}
FLOAT_TOLERANCE = (1e-4, "probability")
NOISE_IMAGES, TIMED_RUNS = 64, 50


class Bundle(os.PathLike[str]):
    """A finished export: a path that knows what was measured. manifest: its manifest.json."""

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
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    int8: bool | None = None,
    half: bool | None = None,
    format: Sequence[str] | None = None,
    data: str | None = None,
    download: bool = False,
    io: str | None = None,
    imgsz: int | None = None,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch: int | None = None,
    opset: int | None = None,
    calib_samples: int | None = None,
    check_samples: int | None = None,
    max_drop: float | None = None,
    qat: int | None = None,
    seed: int | None = None,
    camera: int | None = None,
    author: str | None = None,
    say: Say = lambda line: None,
) -> Bundle:
    """Fold, convert, quantize and check a classifier; return the bundle that was written.

    Args:
        model: a .safetensors checkpoint, the name of shipped weights, a .onnx file, or any
            `torch.nn.Module` from (batch, 3, imgsz, imgsz) to logits or probabilities (batch, classes);
            a module is copied and stays as it is.
        output: folder of the bundle, "<name>-export" by default; an older bundle there is replaced.
        recipe: a named set of the options below ("app", "web", ...) or a .toml file.
        int8: add model_int8.tflite and model_int8.onnx.
        half: add model_fp16.tflite.
        format: "onnx", "tflite" or both (the default).
        data: labelled images to calibrate and check on (see `ghostedge.data.sources.open_data`).
        download: fetch the named set where it is not there.
        io: input and output type of model_int8.tflite: "uint8" (default), "int8" or "float32".
        imgsz: height and width of the input, the checkpoint's or the file's by default.
        labels: names of a foreign net's classes, in output order; by default those of `data`, else
            "class 0" and so on.
        mean, std: how a foreign net reads pixels: (pixel / 255 - mean) / std, one number or one a
            channel, as torchvision and timm write them.
        batch: batch of the TFLite models; ONNX leaves it free.
        opset: ONNX opset, 17 by default.
        calib_samples, check_samples: how many images of `data` to calibrate and to check on.
        max_drop: points of top-1 that a quantized model may lose on labelled data, 0.5 by default.
            Where it loses more, repairs are tried (see `ghostedge.convert.repair`).
        qat: epochs of quantization-aware training as the last of the repairs, 0 (none) by default.
        seed: of every choice of images.
        camera: add model_int8_camera.tflite, which takes a frame of this height and width, a
            multiple of the image size, and averages it to that size itself.
        author: recorded in the models' metadata.
        say: called with a line at each step.

    Raises CheckFailed when a stage is outside its limits and GhostEdgeError for bad input; in both
    cases nothing is written and what was at `output` stays.
    """
    given = {
        name: value for name, value in locals().items() if name not in ("model", "recipe", "say")
    }
    if isinstance(model, (str, os.PathLike)):
        return run(make_plan(os.fspath(model), recipe, given), say)
    return run(make_plan(type(model).__name__, recipe, given), say, model)


def run(plan: Plan, say: Say, module: nn.Module | None = None) -> Bundle:
    """Carry out a plan, for `module` where one is given; `say` is called with a line at each step."""
    with atomic_directory(plan.output, _replaceable) as folder:
        _Export(plan, folder, say, module).run()
        made = Bundle(folder)
    made.path = plan.output  # what it measured is its own, whatever another export puts there
    return made


def _replaceable(folder: Path) -> bool:
    """Return whether a folder is a bundle and nothing else: what people put into one is theirs."""
    if not is_bundle(folder):
        return False
    manifest = read_manifest(folder)
    made = {MANIFEST, TIMINGS, *REPORTS, *manifest["artefacts"], *manifest["files"]}
    return {entry.name for entry in folder.iterdir()} <= made


def _versions() -> dict[str, str]:
    """Return the versions of PACKAGES; a variant such as tensorflow-cpu goes by another name."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class _Export:
    """One export under way, in the folder that becomes the bundle."""

    def __init__(self, plan: Plan, folder: Path, say: Say, module: nn.Module | None) -> None:
        self.plan, self.folder, self.say, self.module = plan, folder, say, module
        self.seconds: dict[str, float] = {}
        self.stages: list[Stage] = []
        self.precisions: dict[str, str] = {}
        """Of the quantized files; of the others the name says it."""
        self.measured: dict[str, dict[str, Parity]] = {}
        """Of the quantized files, without the test images."""
        self.attempts: list[dict[str, Any]] = []
        self.timings: dict[str, Any] = {}
        self.warnings: list[str] = []

    def precision(self, name: str) -> str:
        return self.precisions.get(name, "fp16" if "fp16" in name else "fp32")

    def warn(self, line: str) -> None:
        self.warnings.append(line)
        self.say(f"WARNING: {line}")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.say(name)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)

    def run(self) -> None:
        plan = self.plan
        for caveat in plan.caveats:
            self.say(caveat)
        with self.step("load and fold"):
            self.load()
        with self.step("gather images"):
            from ghostedge.convert.evidence import gather

            self.evidence = gather(plan, self.subject)
            self.labels = self.subject.name_classes(None)
        with self.step(f"check {' and '.join((self.subject.kind, *self.subject.forms))}"):
            self.reference()
        with tempfile.TemporaryDirectory(prefix="ghostedge-") as scratch:
            self.scratch = Path(scratch)
            with self.step("convert to ONNX"):
                self.to_onnx()
            if "tflite" in plan.format:
                with self.step("convert to TFLite"):
                    self.to_tflite()
            if plan.int8:
                with self.step("quantize"):
                    self.quantize()
        with self.step("check every artefact"):
            for name in plan.artefacts:
                if name == CAMERA:
                    self.to_camera()
                else:
                    self.check_file(name, self.folder / name)
        with self.step("write metadata"):
            self.write_metadata()
            self.check_size()
        with self.step("write golden images"):
            manifest = self.publish()
        with self.step("time and profile"):
            self.timings |= self.measure()
        self.report(manifest)

    def load(self) -> None:
        with needing("export"):
            import onnx  # noqa: F401
            import onnxsim  # noqa: F401
            import torch  # noqa: F401

            from ghostedge.convert.subject import open_subject
        self.subject = open_subject(self.plan, self.module)
        self.pixels = self.subject.pixels
        if self.subject.caveat is not None:
            self.warn(self.subject.caveat)
        size = self.pixels.size
        if self.plan.camera is not None and self.plan.camera % size:
            raise GhostEdgeError(
                f"--camera {self.plan.camera} is no multiple of the image size, {size}: "
                f"{frame_side(size)} is one."
            )

    def reference(self) -> None:
        """Run the float reference on every set: all else is compared with it."""
        from ghostedge.convert.check import Stage, compare

        sets = self.evidence.sets
        self.expected = {n: self.subject.reference(images.pixels) for n, images in sets.items()}
        own = {n: compare(self.expected[n], self.expected[n], sets[n]) for n in sets}
        self.record(Stage(self.subject.kind, "fp32", own))
        if "validation" in sets:
            for line in self.subject.doubts(sets["validation"], self.expected["validation"]):
                self.warn(line)
        for name, form in self.subject.forms.items():
            self.check(name, "fp32", form)

    def record(self, stage: Stage) -> None:
        """Keep what was found of a stage; raise CheckFailed when it is off."""
        from ghostedge.convert.check import judge

        self.stages.append(stage)
        judge(stage, self.plan.limits)

    def check(self, name: str, precision: str, predict: Callable[[np.ndarray], np.ndarray]) -> None:
        """Compare a stage's outputs for every set that it was not compared for when it was chosen."""
        from ghostedge.convert.check import Stage, compare

        known = self.measured.get(name, {})
        parity = {
            key: known.get(key) or compare(self.expected[key], predict(images.pixels), images)
            for key, images in self.evidence.sets.items()
        }
        self.record(Stage(name, precision, parity))

    def check_file(self, name: str, path: Path) -> None:
        from ghostedge.runtime import BATCH, Classifier

        model = Classifier(path, threads=os.cpu_count() or 1)

        def run(images: np.ndarray) -> np.ndarray:
            parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
            return np.concatenate([model(enlarged(part, model.size)) for part in parts])

        self.check(name, self.precision(name), run)

    def to_onnx(self) -> None:
        import onnx

        from ghostedge.convert import to_onnx

        core = self.subject.core(self.plan.opset)
        exported = self.scratch / "exported.onnx"
        onnx.save(to_onnx.with_raw_pixels(core), exported)
        self.check_file("exported ONNX", exported)
        model = to_onnx.simplified(to_onnx.with_raw_pixels(core))
        self.model = self.scratch / "model.onnx"
        onnx.save(model, self.model)
        if "onnx" in self.plan.format:
            shutil.copy(self.model, self.folder)
        same = self.plan.opset == to_onnx.TFLITE_OPSET
        self.core = core if same else self.subject.core(to_onnx.TFLITE_OPSET)

    def to_tflite(self) -> None:
        from ghostedge.convert import to_onnx, to_tflite

        core = to_onnx.simplified(self.core, self.plan.batch)
        wanted = ["fp32"] + ["fp16"] * self.plan.half
        for precision, content in to_tflite.convert(core, wanted).items():
            (self.folder / f"model_{precision}.tflite").write_bytes(content)

    def quantize(self) -> None:
        """Write the int8 files, repaired where they lose too much."""
        from ghostedge.convert.audit import audit
        from ghostedge.convert.check import Stage, compare
        from ghostedge.convert.repair import (
            Files,
            few_images,
            ladder,
            repair,
            time_attempts,
        )
        from ghostedge.runtime import Classifier

        plan, evidence = self.plan, self.evidence
        files = Files(
            self.core,
            self.model,
            self.folder / "model_fp32.tflite",
            evidence.calibration,
            plan.batch,
            plan.io,
            self.scratch,
        )
        judged = {name: images for name, images in evidence.sets.items() if name != "test"}

        def measure(name: str, path: Path) -> Stage:
            model = Classifier(path, threads=os.cpu_count() or 1)
            parity = {
                key: compare(self.expected[key], model(images.pixels), images)
                for key, images in judged.items()
            }
            return Stage(name, audit(path)["precision"], parity)

        attempts = ladder(
            self.core,
            evidence.calibration,
            plan.data is not None,
            evidence.training,
            plan.qat,
            plan.seed,
            self.say,
        )
        names = [name for name in plan.artefacts if "int8" in name and name != CAMERA]
        done, self.attempts = repair(names, attempts, files.make, measure, plan.limits, self.say)
        for name, (path, stage) in done.items():
            shutil.copy(path, self.folder / name)
            self.precisions[name] = stage.precision
            self.measured[name] = stage.parity
        warning = few_images([stage for _, stage in done.values()])
        if warning:
            self.warn(warning)
        if len(self.attempts) > len(names):
            self.timings["attempts"] = time_attempts(files.made)

    def to_camera(self) -> None:
        """Make the camera variant of the int8 model, and check that it gives the same."""
        from ghostedge.convert.camera import camera

        assert self.plan.camera is not None
        plain, path = (self.folder / name for name in ("model_int8.tflite", CAMERA))
        path.write_bytes(camera(plain.read_bytes(), self.plan.camera))
        self.precisions[CAMERA] = self.precision(plain.name)
        self.check_file(CAMERA, path)
        parity = {stage.name: stage.parity for stage in self.stages}
        if parity[CAMERA] != parity[plain.name]:
            raise CheckFailed(
                f"The stage {CAMERA} fails its check: large images that average to the checked ones "
                f"give other outputs than those give {plain.name}."
            )

    def write_metadata(self) -> None:
        """Write what is known and what was measured into the models themselves."""
        from ghostedge.convert.metadata import Facts, accuracy, write

        source = self.subject.source
        facts = Facts(
            name=self.subject.name,
            version=source["sha256"][:12],
            author=self.plan.author or f"ghostedge {ghostedge.__version__}",
            licence=source.get("licence"),
            labels=self.labels,
            pixels=self.pixels,
        )
        stages = {stage.name: stage for stage in self.stages}
        data = self.evidence.calibration_card.get("data")
        for name in self.plan.artefacts:
            write(self.folder / name, facts, accuracy(stages[name], data, source))

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

    def publish(self) -> dict[str, Any]:
        """Write all that is the same twice; return the manifest."""
        from ghostedge.convert.audit import audit

        (self.folder / LABELS).write_text("".join(f"{x}\n" for x in self.labels), "utf-8")
        golden, expected = self.golden()
        # numpy's own savez stamps the time of writing on each member.
        _save_npz(self.folder / GOLDEN, golden)
        artefacts = {name: self.describe(name) for name in self.plan.artefacts}
        for name, entry in artefacts.items():
            entry["audit"] = audit(self.folder / name)
            entry["precision"] = entry["audit"]["precision"]
        manifest = {
            "format": FORMAT,
            "ghostedge": ghostedge.__version__,
            "name": self.subject.name,
            "source": self.subject.source,
            "labels": self.labels,
            "pixels": self.pixels.to_json(),
            "artefacts": artefacts,
            "files": {n: {"sha256": sha256(self.folder / n)} for n in (LABELS, GOLDEN)},
            "golden": {"images": len(golden["images"]), "expected": expected},
            "stages": [stage.to_json() for stage in self.stages],
            "signal_to_noise": self.noise(),
            "calibration": self.evidence.calibration_card if self.plan.int8 else None,
            "attempts": self.attempts,
            "warnings": self.warnings,
            "skipped_images": self.evidence.skipped,
            "opset": self.plan.opset,
            "limits": dataclasses.asdict(self.plan.limits),
            "versions": _versions(),
        }
        write_manifest(self.folder, manifest)
        return manifest

    def report(self, manifest: dict[str, Any]) -> None:
        from ghostedge.convert.report import write_reports

        timings = {"seconds": self.seconds, **self.timings}
        text = json.dumps(timings, indent=1, sort_keys=True)
        (self.folder / TIMINGS).write_text(f"{text}\n", "utf-8")
        write_reports(self.folder, manifest, timings, self.confusions())

    def preferred(self) -> str:
        """The artefact that the report looks into: TFLite before ONNX, int8 before the others."""
        return min(self.plan.artefacts, key=lambda n: (not n.endswith(".tflite"), "int8" not in n))

    def noise(self) -> list[dict[str, Any]]:
        """Compare the layers of the int8 and the fp32 .tflite, where there are both."""
        files = [self.folder / f"model_{precision}.tflite" for precision in ("fp32", "int8")]
        if not all(file.exists() for file in files):
            return []
        from ghostedge.convert.noise import signal_to_noise

        sets = self.evidence.sets
        images = sets.get("validation", sets["synthetic"]).pixels[:NOISE_IMAGES]
        return signal_to_noise(files[0], files[1], images)

    def confusions(self) -> dict[str, Evaluation]:
        """Return what was taken for what on labelled images: test where there are, else validation."""
        from ghostedge.evaluate import Evaluation
        from ghostedge.runtime import Classifier

        name = next((n for n in ("test", "validation") if n in self.evidence.sets), "synthetic")
        images = self.evidence.sets[name]
        if images.labels is None:
            return {}
        after = self.preferred()
        model = Classifier(self.folder / after, threads=os.cpu_count() or 1)
        predicted = {self.subject.kind: self.expected[name], after: model(images.pixels)}
        return {
            f"{stage}, {name} images": Evaluation(self.labels, images.labels, p.argmax(1), [])
            for stage, p in predicted.items()
        }

    def measure(self) -> dict[str, Any]:
        """Time all artefacts side by side and take one apart; of this machine at this moment."""
        from ghostedge.latency.profile import profile
        from ghostedge.latency.timing import bench

        latency = bench([self.folder / name for name in self.plan.artefacts], runs=TIMED_RUNS)
        here = f"{self.folder}{os.sep}"  # it goes when the bundle takes its place
        for row in latency["rows"]:
            row |= {key: row[key].replace(here, "") for key in ("model", "against")}
        latency["warnings"] = [line.replace(here, "") for line in latency["warnings"]]
        taken_apart = profile(self.folder / self.preferred()).to_json()
        return {"latency": latency, "profile": taken_apart}

    def golden(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Return the golden images with every artefact's outputs, and how exact each is expected."""
        from ghostedge.runtime import Classifier

        arrays = {"images": self.evidence.sets["synthetic"].pixels}
        expected = []
        for name in self.plan.artefacts:
            for kernels in ("default", "reference") if name.endswith(".tflite") else ("default",):
                model = Classifier(self.folder / name, kernels=kernels)
                kind = (model.runtime, self.precision(name), kernels)
                tolerance, unit = TOLERANCES.get(kind, FLOAT_TOLERANCE)
                if model.step is None and unit == "step":
                    tolerance, unit = tolerance / 256, "probability"
                key = f"{name}:{kernels}"
                arrays[key] = model.raw(enlarged(arrays["images"], model.size))
                entry = {"artefact": name, "kernels": kernels, "key": key}
                expected.append({**entry, "tolerance": tolerance, "unit": unit})
        return arrays, expected

    def describe(self, name: str) -> dict[str, Any]:
        from ghostedge.runtime import Classifier

        path = self.folder / name
        classes = len(self.labels)
        size = self.plan.camera if name == CAMERA else self.pixels.size
        onnx = name.endswith(".onnx")
        dtype = "float32" if onnx or "int8" not in name else self.plan.io
        output: dict[str, Any] = {"shape": [None if onnx else self.plan.batch, classes]}
        output["dtype"] = dtype
        if dtype != "float32":
            model = Classifier(path).backend
            output |= {"scale": model.step, "zero_point": model.zero_point}
        image = [3, size, size] if onnx else [size, size, 3]
        return {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "runtime": "onnxruntime" if onnx else "litert",
            "input": {
                "shape": [None if onnx else self.plan.batch, *image],
                "dtype": dtype,
                "layout": "NCHW" if onnx else "NHWC",
            },
            "output": output,
        }


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
