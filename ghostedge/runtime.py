"""One callable for every model: a .tflite, .onnx or .safetensors file, shipped weights, a bundle.

This module needs numpy only; each runtime is imported when a model for it is loaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghostedge import checkpoint
from ghostedge.bundle import LABELS, is_bundle, label_lines, read_labels, read_manifest, unnamed
from ghostedge.errors import GhostEdgeError, in_a_line


class Runtime(NamedTuple):
    """What runs a model: how people call it, the module it is imported as, the package it is in."""

    title: str
    module: str
    package: str


RUNTIMES = {
    "litert": Runtime("LiteRT", "ai_edge_litert", "ai-edge-litert"),
    "onnxruntime": Runtime("ONNX Runtime", "onnxruntime", "onnxruntime"),
    "torch": Runtime("PyTorch", "torch", "torch"),
}
KERNELS = {"default": "", "reference": ".tflite", "exact": ".onnx"}
"""Whose kernels there are, and of which files."""
BATCH = 64
"""Images in one run where the model leaves the batch free."""

# The first one whose runtime is installed stands for a bundle. ONNX Runtime's int8 never does: on x86
# without VNNI its sums saturate, and an fp32 file is always beside it.
PREFERENCE = (
    ("litert", "int8"),
    ("litert", "mixed"),
    ("litert", "fp32"),
    ("onnxruntime", "fp32"),
)


def installed(runtime: str) -> bool:
    """Return whether the package of a runtime, one of `RUNTIMES`, is there."""
    return importlib.util.find_spec(RUNTIMES[runtime].module) is not None


class Backend:
    """A model loaded in its runtime."""

    runtime: str
    precision: str
    size: int
    classes: int
    batch = BATCH
    fixed = False
    """Whether `run` takes exactly `batch` images, or up to that many."""
    dtype: np.dtype[Any] = np.dtype(np.float32)
    """Of the result, (images, classes): probabilities, or steps of `step` from `zero_point`."""
    step: float | None = None
    zero_point = 0
    labels: list[str] | None = None

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the result of uint8 pixels (images, size, size, 3)."""
        raise NotImplementedError


def interpreter(content: bytes, threads: int = 1, kernels: str = "default") -> Any:
    """Return LiteRT's interpreter of the content of a .tflite file, its tensors allocated.

    Raises ValueError or RuntimeError for content that LiteRT cannot run.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_REF if kernels == "reference" else OpResolverType.AUTO
    with _silent():
        # Only content is verified before use: LiteRT 2.1.0 crashes on a truncated file by path.
        net = Interpreter(
            model_content=content, num_threads=threads, experimental_op_resolver_type=resolver
        )
        net.allocate_tensors()
    return net


class LiteRT(Backend):
    runtime = "litert"

    def __init__(self, path: Path, threads: int, kernels: str) -> None:
        try:
            content = path.read_bytes()
            self.net = interpreter(content, threads, kernels)
            self.labels = _packed_labels(content)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise _unreadable(path, "LiteRT", error) from error
        inputs, outputs = self.net.get_input_details(), self.net.get_output_details()
        ends = [
            [(np.dtype(t["dtype"]).name, t["shape_signature"].tolist()) for t in tensors]
            for tensors in (inputs, outputs)
        ]
        wrong = _no_classifier(path, ends, "uint8, int8 or float32 [batch, size, size, 3]")
        if not len(inputs) == len(outputs) == 1:
            raise wrong
        self.input, self.output = inputs[0], outputs[0]
        shape, scores = self.input["shape"].tolist(), self.output["shape"].tolist()
        kinds = (np.uint8, np.int8, np.float32)
        sides = self.input["shape_signature"].tolist()[1:]  # -1 where the size is free
        if not (
            self.input["dtype"] in kinds
            and self.output["dtype"] in kinds
            and _is_image(sides[:2], sides[2:])
            and len(scores) == 2
        ):
            raise wrong
        self.batch, self.size, self.classes = shape[0], shape[1], scores[1]
        self.fixed = True
        self.dtype = np.dtype(self.output["dtype"])
        if self.dtype != np.float32:
            self.step, self.zero_point = self.output["quantization"]
        outer = {self.input["index"], self.output["index"]}
        details = [t for t in self.net.get_tensor_details() if t["index"] not in outer]
        held = {tensor["dtype"] for tensor in details}
        self.precision = "fp16" if np.float16 in held else "fp32"
        if held & {np.int8, np.uint8}:
            self.precision = "mixed" if np.float32 in held else "int8"

    def run(self, images: np.ndarray) -> np.ndarray:
        kind = self.input["dtype"]
        values = (images.astype(np.int16) - 128) if kind == np.int8 else images
        self.net.set_tensor(self.input["index"], values.astype(kind))
        self.net.invoke()
        return self.net.get_tensor(self.output["index"])


class OnnxRuntime(Backend):
    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int, exact: bool) -> None:
        import onnxruntime

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            content = path.read_bytes()
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its error classes share no other base
            raise _unreadable(path, "ONNX Runtime", error) from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        ends = [[(tensor.type, tensor.shape) for tensor in ts] for ts in (inputs, outputs)]
        wrong = _no_classifier(path, ends, "tensor(float) [batch, 3, size, size]")
        if not len(inputs) == len(outputs) == 1:
            raise wrong
        shape, scores = inputs[0].shape, outputs[0].shape
        if not (
            inputs[0].type == outputs[0].type == "tensor(float)"
            and _is_image(shape[2:], shape[1:2])
            and len(scores) == 2
            and isinstance(scores[1], int)
        ):
            raise wrong
        self.size, self.classes = shape[2], scores[1]
        if isinstance(shape[0], int):
            self.batch, self.fixed = shape[0], True
        # The op's name stands in the file as plain bytes; reading it properly would take onnx.
        self.precision = "int8" if b"QuantizeLinear" in content else "fp32"
        named = self.session.get_modelmeta().custom_metadata_map.get("labels")
        self.labels = label_lines(named) if named else None
        self.name = inputs[0].name

    def run(self, images: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)
        try:
            return self.session.run(None, {self.name: values})[0]
        except Exception as error:
            raise uncomputed(str(self.path), len(images), error) from error


class Torch(Backend):
    runtime = "torch"
    precision = "fp32"

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        self.torch, self.threads = torch, threads
        stored, self.net = checkpoint.build(path)
        self.pixels = stored.pixels
        self.size, self.labels = stored.pixels.size, stored.labels
        self.classes = len(stored.labels)

    def normalized(self, images: np.ndarray) -> Any:
        """Return what the net itself takes, a tensor (images, 3, size, size), for uint8 pixels."""
        values = self.pixels.normalize(images).transpose(0, 3, 1, 2)
        return self.torch.from_numpy(np.ascontiguousarray(values))

    def logits(self, values: Any) -> Any:
        """Return what the net itself gives for `normalized` pixels."""
        before = self.torch.get_num_threads()
        self.torch.set_num_threads(self.threads)
        try:
            with self.torch.inference_mode():
                return self.net(values)
        finally:
            self.torch.set_num_threads(before)

    def run(self, images: np.ndarray) -> np.ndarray:
        return probabilities(self.logits(self.normalized(images)).numpy())


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits (N, classes)."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


class Classifier:
    """A trained or exported model as a function of raw pixels. Not for several threads at once.

    Args:
        model: a .tflite, .onnx or .safetensors file, the name of shipped weights, or a bundle
            (then its int8 .tflite; without LiteRT its fp32 .onnx).
        threads: CPU threads of one run.
        kernels: "default"; "reference" for LiteRT's plain kernels, in which a quantized .tflite
            gives the same bytes on x86 and arm64; "exact" for those of ONNX Runtime whose int8 sums do
            not saturate on x86 CPUs without dot products, which takes longer there.

    Attributes:
        path: the file that was loaded.
        runtime: "litert", "onnxruntime" or "torch"; precision: "fp32", "fp16", "int8", or "mixed"
            where a quantized .tflite also computes in float.
        size: height and width of its images; labels: names of its classes, in output order.
        step: one step of a quantized output in probability, None where outputs are floats.
        backend: the model in its runtime.

    Labels come from the bundle that the file is in, else from labels.txt beside it, else from the
    file itself; a file without any has "class 0", "class 1", and so on.

    Raises GhostEdgeError for a file that is missing, damaged or no image classifier, for a wrong
    number of labels, and for a runtime that is not installed.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, threads: int = 1, kernels: str = "default"
    ) -> None:
        if kernels not in KERNELS:
            raise GhostEdgeError(
                f"There are no kernels {kernels!r}: choose one of {', '.join(KERNELS)}."
            )
        self.path = _find(model)
        self.backend = _load(self.path, threads, kernels)
        self.runtime, self.precision = self.backend.runtime, self.backend.precision
        self.size, self.step = self.backend.size, self.backend.step
        self.labels = _labels(self.path, self.backend)

    def raw(self, images: np.ndarray) -> np.ndarray:
        """Return what the model itself gives for uint8 RGB images (N, size, size, 3) or one image.

        (N, classes): quantized steps as uint8 or int8, or float32 probabilities.
        Raises GhostEdgeError for images of another type or size.
        """
        images = self._checked(np.asarray(images))
        backend = self.backend
        outputs = [np.empty((0, backend.classes), backend.dtype)]
        for start in range(0, len(images), backend.batch):
            chunk = images[start : start + backend.batch]
            count = len(chunk)
            if backend.fixed and count < backend.batch:
                chunk = np.resize(chunk, (backend.batch, *chunk.shape[1:]))
            outputs.append(backend.run(chunk)[:count])
        return np.concatenate(outputs)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 (N, classes), of uint8 RGB images as `raw` takes them.

        Raises GhostEdgeError too for a model whose outputs are no probabilities.
        """
        raw = self.raw(images)
        if self.step is not None:
            return (raw.astype(np.float32) - self.backend.zero_point) * np.float32(self.step)
        if len(raw) and not (raw.min() >= -0.01 and raw.max() <= 1.01):
            raise GhostEdgeError(
                f"{self.path} gives values from {raw.min():.3g} to {raw.max():.3g} instead of "
                "probabilities: it lacks the final softmax. Export it with: ghostedge export"
            )
        return raw

    def predict(
        self, images: Sequence[str | os.PathLike[str] | np.ndarray], top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Return the `top` labels with their probabilities, best first, for each image.

        Images are picture files, read as the pixel contract says, or arrays as `raw` takes them, in which
        each of (N, size, size, 3) counts. Raises GhostEdgeError for what cannot be read as an image, and
        for arrays that `raw` refuses.
        """
        if isinstance(images, (str, os.PathLike)):
            images = [images]
        pixels = [self._checked(self._read(image)) for image in images]
        results = []
        for row in self(np.concatenate(pixels)) if pixels else []:
            best = np.argsort(-row, kind="stable")[:top]
            results.append([(self.labels[i], float(row[i])) for i in best])
        return results

    def _read(self, image: str | os.PathLike[str] | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return image
        from ghostedge.data.images import read_image

        return read_image(image, self.size)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8:
            raise GhostEdgeError(
                f"{self.path.name} takes raw pixels, uint8 from 0 to 255, not {images.dtype}: "
                "give them as they are in the picture, not normalised."
            )
        expected = (self.size, self.size, 3)
        if images.shape[-3:] != expected or images.ndim > 4:
            raise GhostEdgeError(
                f"{self.path.name} takes images of {self.size}x{self.size} RGB pixels, shape "
                f"(N, {self.size}, {self.size}, 3), and was given {images.shape}: resize them."
            )
        return images.reshape(-1, *expected)


def _find(model: str | os.PathLike[str]) -> Path:
    path = Path(model)
    if path.is_dir():
        artefacts = read_manifest(path)["artefacts"]
        # Of two of a kind the first: the camera variant follows the plain model.
        listed = reversed(list(artefacts.items()))
        kinds = {(a["runtime"], a["precision"]): name for name, a in listed}
        for kind in PREFERENCE:
            if kind in kinds and installed(kind[0]):
                return path / kinds[kind]
        raise GhostEdgeError(
            f"No model in {path} can run: none of its runtimes is installed. "
            "Install one with: pip install ai-edge-litert"
        )
    if path.suffix in (".tflite", ".onnx") and not path.exists():
        raise GhostEdgeError(f"There is no file {path}: check its name and folder.")
    if path.suffix not in (".tflite", ".onnx", ".safetensors") and path.is_file():
        raise GhostEdgeError(
            f"{path} is no model that runs here: name a .tflite, .onnx or .safetensors file, a "
            "bundle or shipped weights; `ghostedge import` turns a foreign checkpoint into one."
        )
    return path if path.exists() else checkpoint.find(os.fspath(model))


def _load(path: Path, threads: int, kernels: str) -> Backend:
    if not path.suffix.endswith(KERNELS[kernels]):
        raise GhostEdgeError(
            f"Only a {KERNELS[kernels]} file has {kernels} kernels, {path} has not."
        )
    runtime = {".tflite": "litert", ".onnx": "onnxruntime"}.get(path.suffix, "torch")
    if not installed(runtime):
        title, _, package = RUNTIMES[runtime]
        raise GhostEdgeError(
            f"{path} needs {title}, which is not installed. Install it with: pip install {package}"
        )
    if path.stat().st_size == 0:
        raise GhostEdgeError(f"{path} is empty: export or copy it again.")
    if runtime == "litert":
        return LiteRT(path, threads, kernels)
    if runtime == "onnxruntime":
        return OnnxRuntime(path, threads, kernels == "exact")
    return Torch(path, threads)


def _labels(path: Path, backend: Backend) -> list[str]:
    beside = path.with_name(LABELS)
    where, labels = path, backend.labels
    if backend.runtime != "torch":  # a checkpoint always has its own
        manifest = read_manifest(path.parent) if is_bundle(path.parent) else {"artefacts": {}}
        if path.name in manifest["artefacts"]:
            where, labels = path.with_name("manifest.json"), manifest["labels"]
        elif beside.is_file():
            where, labels = beside, read_labels(beside)
    if labels is None:
        return unnamed(backend.classes)
    if len(labels) != backend.classes:
        raise GhostEdgeError(
            f"{path} has {backend.classes} classes and {where} names {len(labels)} labels: "
            "put the right labels.txt beside the model."
        )
    return labels


def _packed_labels(content: bytes) -> list[str] | None:
    """Return the labels that are packed behind a .tflite model, None where there are none."""
    file = io.BytesIO(content)
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        if LABELS not in archive.namelist():
            return None
        return label_lines(archive.read(LABELS).decode("utf-8-sig"))


def _is_image(sides: Sequence[Any], channels: Sequence[Any]) -> bool:
    square = len(sides) == 2 and sides[0] == sides[1]
    return square and isinstance(sides[0], int) and sides[0] > 0 and list(channels) == [3]


def _no_classifier(path: Path, ends: list[list[tuple[str, Any]]], image: str) -> GhostEdgeError:
    given, gives = (
        " and ".join(f"{kind} {shape}" for kind, shape in end) or "nothing" for end in ends
    )
    return GhostEdgeError(
        f"{path} maps {given} to {gives} and is no classifier of square RGB images, which maps one "
        f"{image} to one [batch, classes]: name another model."
    )


def _unreadable(path: Path, runtime: str, error: Exception) -> GhostEdgeError:
    return GhostEdgeError(
        f"{runtime} cannot load {path} ({in_a_line(error)}): it is damaged or no {path.suffix} model; "
        "export or copy it again."
    )


def uncomputed(model: str, images: int, error: Exception) -> GhostEdgeError:
    """Return the error for an ONNX model that loads but does not run."""
    return GhostEdgeError(
        f"{model} does not compute {images} images at once ({in_a_line(error)}): where it has a fixed batch "
        "inside, export it again with a free batch axis."
    )


_silence = threading.Lock()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Close the process's stderr: LiteRT announces its delegate there, and has no switch for it.

    One thread at a time: the second would keep the first one's closed stderr as the one to restore.
    """
    if sys.stderr is None:
        yield
        return
    with _silence:
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(nowhere)
