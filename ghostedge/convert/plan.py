"""What an export will do: its options, checked, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghostedge.bundle import CAMERA, GOLDEN, LABELS, MANIFEST, REPORTS, TIMINGS
from ghostedge.errors import GhostEdgeError, nearest
from ghostedge.files import read_toml

FORMATS = ("onnx", "tflite")
IO = ("uint8", "int8", "float32")
OPSETS = (13, 20)
"""Lowest and highest: per-channel QDQ needs 13; torch's exporter and onnx2tf end at 20."""
LARGEST_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a bundle must meet to be published."""

    max_drop: float = 0.5
    """Points of top-1 that a quantized model may lose against the unfolded net, labelled data."""
    min_agreement: float = 0.9
    """Share of synthetic images on which a quantized model must name the same class, without. Many of
    them are close decisions: int8 models of the shipped weights keep 97 to 100%, and 72% where the
    channels of two layers are scaled over three decades, which plain int8 cannot hold."""
    max_kilobytes: float | None = None
    """Size of the largest quantized model, or of the largest model where none is quantized."""

    def __post_init__(self) -> None:
        _within("max_drop", self.max_drop, -100, 100)
        _within("min_agreement", self.min_agreement, 0, 1)
        _within("max_kilobytes", self.max_kilobytes or 0, 0, 1e9)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options of one export; the names are those of the command line's flags."""

    model: str
    """A checkpoint, a .onnx file, the name of shipped weights, or the class of a torch module."""
    output: Path
    int8: bool = False
    half: bool = False
    format: tuple[str, ...] = FORMATS
    data: str | None = None
    download: bool = False
    """Fetch the named set where it is not there; never from a recipe."""
    io: str = "uint8"
    imgsz: int | None = None
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    """With std: how a foreign net reads pixels in 0-1; a checkpoint has its own."""
    std: tuple[float, ...] | None = None
    batch: int = 1
    opset: int = 17
    calib_samples: int = 500
    check_samples: int = 5000
    qat: int = 0
    seed: int = 0
    camera: int | None = None
    author: str | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        for value in self.format:
            _one_of("--format", value, FORMATS)
        if not self.format:
            raise GhostEdgeError(f"--format is empty: give one or both of {', '.join(FORMATS)}.")
        _one_of("--io", self.io, IO)
        _within("--opset", self.opset, *OPSETS)
        if self.imgsz is not None:
            _within("--imgsz", self.imgsz, 24, 256)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if any(not isinstance(value, (int, float)) for value in values or ()):
                raise GhostEdgeError(
                    f"--{name} {list(values or ())} is no list of numbers such as 0.5,0.5,0.5."
                )
        if any(not isinstance(label, str) for label in self.labels or ()):
            raise GhostEdgeError(
                f'labels {list(self.labels or ())} are not all texts: write numbers as "0", "1".'
            )
        _within("--batch", self.batch, 1, LARGEST_BATCH)
        _within("--calib-samples", self.calib_samples, 1, 100_000)
        _within("--check-samples", self.check_samples, 1, 10_000_000)
        _within("--qat", self.qat, 0, 1000)
        if self.qat and not self.int8:
            raise GhostEdgeError("--qat repairs int8 models: add --int8.")
        if self.qat and self.data is None:
            raise GhostEdgeError("--qat trains on images of yours: name them with --data.")
        _within("--seed", self.seed, 0, 2**32 - 1)
        if self.camera is not None:
            _within("--camera", self.camera, 48, 2048)
            if not (self.int8 and "tflite" in self.format):
                raise GhostEdgeError(
                    "--camera makes an int8 TFLite model: add --int8, and tflite to --format."
                )
        if self.half and "tflite" not in self.format:
            raise GhostEdgeError("--half makes a TFLite model: add tflite to --format.")

    @property
    def artefacts(self) -> list[str]:
        """The model files that the bundle will hold."""
        files = []
        if "onnx" in self.format:
            files += ["model.onnx"] + ["model_int8.onnx"] * self.int8
        if "tflite" in self.format:
            files += ["model_fp32.tflite"]
            files += ["model_fp16.tflite"] * self.half + ["model_int8.tflite"] * self.int8
        # After the plain model, which stands for the bundle.
        return files + [CAMERA] * (self.camera is not None)

    @property
    def caveats(self) -> list[str]:
        """What a person may not expect of the models, as sentences."""
        said = []
        if "tflite" in self.format and self.int8 and self.io == "int8":
            said.append(
                "MediaPipe and LiteRT.js refuse an int8 input: --io int8 is for microcontrollers."
            )
        if "tflite" in self.format and self.batch > 1:
            said.append(
                f"MediaPipe refuses a batch of {self.batch}, and so does `ghostedge deploy`: they take "
                "one image at a time."
            )
        return said

    def describe(self) -> list[str]:
        """Return the plan as lines for a person."""
        lines = [
            f"export {self.model} to {self.output}",
            "fold the branches and BatchNorms (float64)"
            if not self.model.endswith(".onnx")
            else "read the graph and fold the normalisation at its start",
            f"convert to ONNX, opset {self.opset}, batch axis free, simplified by onnxsim",
        ]
        if "tflite" in self.format:
            lines.append(f"convert to TFLite with onnx2tf and TensorFlow, batch {self.batch}")
        if self.int8:
            real = (
                f"{self.calib_samples} images of the training part of {self.data}, channels equalised and "
                "biases corrected"
            )
            lines.append(
                f"quantize to int8, calibrated on {real if self.data else 'synthetic images'}"
            )
        if self.int8 and self.data:
            last = f", or {self.qat} epochs of quantization-aware training" if self.qat else ""
            lines.append(
                f"where that loses more than {self.limits.max_drop:g} points of top-1, try plain int8, "
                f"the most sensitive operations in float{last}"
            )
        if self.camera is not None:
            lines.append(f"average a camera's {self.camera}x{self.camera} pixels inside {CAMERA}")
        labelled = f" and at most {self.check_samples} labelled images of each part of {self.data}"
        lines.append(f"check every stage on synthetic images{labelled if self.data else ''}")
        lines.append(f"write {', '.join(self.artefacts)}")
        lines.append(f"write {', '.join((LABELS, GOLDEN, MANIFEST, TIMINGS, *REPORTS))}")
        return lines + self.caveats


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise GhostEdgeError(
            f"{flag} {value!r} is unknown: choose from {', '.join(known)}."
            f"{nearest(str(value), known)}"
        )


def _within(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise GhostEdgeError(f"{flag} {value} is outside {low} to {high}.")


_TOML = {
    "Path": ("text", (str,)),
    "str": ("text", (str,)),
    "bool": ("true or false", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "tuple[str, ...]": ("a list", (list,)),
    "tuple[float, ...]": ("a list", (list,)),
}
"""For each type of an option: what a recipe calls its values, and as what they are read."""


def recipes() -> dict[str, Path]:
    """Return the recipes that travel with the package, by name (`export/` in the source tree)."""
    here = Path(__file__).parent.parent
    folder = next((f for f in (here / "recipes", here.parent / "export") if f.is_dir()), here)
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def make_plan(model: str, recipe: str | None, given: Mapping[str, Any]) -> Plan:
    """Return the plan of an export: the recipe's options, overruled by those `given`.

    None among the `given` means not given; their format may be text, "onnx,tflite". Raises
    GhostEdgeError for an unknown recipe, key or value.
    """
    options: dict[str, Any] = {}
    if recipe is not None:
        options = _read_recipe(recipe)
    options.update({key: value for key, value in given.items() if value is not None})
    limit_names = {field.name for field in dataclasses.fields(Limits)}
    limits = {key: options.pop(key) for key in list(options) if key in limit_names}
    if "format" in options:
        formats = options["format"]
        if isinstance(formats, str):
            formats = [name.strip() for name in formats.split(",")]
        options["format"] = tuple(formats)
    for key in ("labels", "mean", "std"):
        if key in options:
            options[key] = tuple(options[key])
    # Not the stem, which would cut ghostnetv3-small-1.0x.
    name = Path(model).name.removesuffix(".safetensors").removesuffix(".onnx")
    options.setdefault("output", f"{name}-export")
    options["output"] = Path(options["output"])
    return Plan(model, limits=Limits(**limits), **options)


def _read_recipe(name: str) -> dict[str, Any]:
    known = recipes()
    path = Path(name) if Path(name).is_file() else known.get(name)
    if path is None:
        raise GhostEdgeError(
            f"There is no recipe {name!r}: choose from {', '.join(known)}, or name a .toml file."
            f"{nearest(name, known)}"
        )
    content = read_toml(path, "export recipe")
    types = {
        section: {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(options)}
        for section, options in (("export", Plan), ("limits", Limits))
    }
    for key in ("model", "limits", "download"):
        del types["export"][key]
    found: dict[str, Any] = {}
    for section, keys in types.items():
        table = content.pop(section, {})
        if not isinstance(table, dict):
            raise GhostEdgeError(f"The recipe {path} gives {section} a value: write [{section}].")
        for key, value in table.items():
            if key not in keys:
                raise GhostEdgeError(
                    f"The recipe {path} has an unknown key {key!r} in [{section}].{nearest(key, keys)}"
                )
            needed, fitting = _TOML[keys[key]]
            if type(value) not in fitting:
                raise GhostEdgeError(
                    f"The recipe {path} gives {key} = {value!r}, where {needed} is needed."
                )
            found[key] = value
    content.pop("summary", None)
    if content:
        raise GhostEdgeError(f"The recipe {path} has an unknown section or key {min(content)!r}.")
    return found
