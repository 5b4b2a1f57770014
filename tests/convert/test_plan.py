from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from ghostedge.convert.plan import FORMATS, IO, OPSETS, Limits, Plan, make_plan, recipes
from ghostedge.errors import GhostEdgeError

TARGETS = ["app", "microcontroller", "raspberry-pi", "server", "web"]


def refused(recipe: str | None, **given: Any) -> str:
    with pytest.raises(GhostEdgeError) as caught:
        make_plan("net.safetensors", recipe, given)
    assert caught.value.exit_code == 2
    assert re.fullmatch(r"[^\n]+[.?]", str(caught.value))
    return str(caught.value)


def written(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text, "utf-8")
    return str(folder / "mine.toml")


def test_the_defaults() -> None:
    plan = make_plan("net.safetensors", None, {})
    assert plan == Plan("net.safetensors", Path("net-export"))
    assert plan.artefacts == ["model.onnx", "model_fp32.tflite"]


@pytest.mark.parametrize(
    ("checkpoint", "output"),
    [
        ("runs/cats/best.safetensors", "best-export"),
        ("ghostnetv3-small-1.0x", "ghostnetv3-small-1.0x-export"),
        ("ghostnetv3-small-1.0x.safetensors", "ghostnetv3-small-1.0x-export"),
    ],
)
def test_the_bundle_is_named_after_the_checkpoint(checkpoint: str, output: str) -> None:
    assert make_plan(checkpoint, None, {}).output == Path(output)


@pytest.mark.parametrize(
    ("given", "artefacts"),
    [
        ({"int8": True}, "model.onnx model_int8.onnx model_fp32.tflite model_int8.tflite"),
        ({"half": True}, "model.onnx model_fp32.tflite model_fp16.tflite"),
        ({"format": ("onnx",)}, "model.onnx"),
        ({"format": ("onnx",), "int8": True}, "model.onnx model_int8.onnx"),
        ({"format": ("tflite",)}, "model_fp32.tflite"),
        (
            {"format": ("tflite",), "int8": True, "camera": 224},
            "model_fp32.tflite model_int8.tflite model_int8_camera.tflite",
        ),
        (
            {"format": ("tflite", "onnx"), "int8": True, "half": True},
            "model.onnx model_int8.onnx model_fp32.tflite model_fp16.tflite model_int8.tflite",
        ),
    ],
)
def test_artefacts(given: dict[str, Any], artefacts: str) -> None:
    plan = make_plan("net.safetensors", None, given)
    assert plan.artefacts == artefacts.split()
    said = "\n".join(plan.describe())
    assert all(name in said for name in plan.artefacts)
    assert ("onnx2tf" in said) == ("tflite" in plan.format)


def test_the_plan_says_what_it_calibrates_and_checks_on() -> None:
    synthetic = "\n".join(make_plan("net", None, {"int8": True}).describe())
    assert "calibrated on synthetic images" in synthetic
    assert "labelled" not in synthetic
    given = {"int8": True, "data": "pets", "calib_samples": 33, "check_samples": 44}
    real = "\n".join(make_plan("net", None, given).describe())
    assert "calibrated on 33 images of the training part of pets" in real
    assert "at most 44 labelled images of each part of pets" in real


def test_what_mediapipe_refuses_is_said() -> None:
    def said(**given: Any) -> str:
        return " ".join(make_plan("net", None, given).describe())

    assert "refuse" not in said(int8=True, io="uint8") + said(io="int8")
    assert "MediaPipe and LiteRT.js refuse an int8 input" in said(int8=True, io="int8")
    assert "MediaPipe refuses a batch of 2" in said(batch=2)
    assert "refuse" not in said(int8=True, io="int8", batch=2, format="onnx")


@pytest.mark.parametrize("text", ["onnx,tflite", " onnx , tflite ", ["onnx", "tflite"]])
def test_formats_may_be_text_or_a_list(text: object) -> None:
    assert make_plan("net", None, {"format": text}).format == ("onnx", "tflite")


def test_the_recipes_that_travel_with_the_package() -> None:
    assert list(recipes()) == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_every_recipe_gives_a_plan(name: str) -> None:
    plan = make_plan("net.safetensors", name, {})
    assert plan.int8
    assert plan.limits.max_drop == 0.5
    assert plan == make_plan("net.safetensors", str(recipes()[name]), {})


def test_what_the_recipes_promise() -> None:
    plans = {name: make_plan("net", name, {}) for name in TARGETS}
    assert {name: plan.format for name, plan in plans.items()} == {
        "app": ("tflite",),
        "microcontroller": ("tflite",),
        "raspberry-pi": ("tflite",),
        "server": ("onnx",),
        "web": ("onnx", "tflite"),
    }
    assert {name for name, plan in plans.items() if plan.io == "int8"} == {"microcontroller"}
    assert plans["microcontroller"].limits.max_kilobytes == 1000


def test_what_is_given_wins_over_the_recipe() -> None:
    given = {"int8": False, "format": "onnx", "io": "float32", "max_drop": 3.5, "output": "there"}
    plan = make_plan("net", "microcontroller", given)
    assert plan.artefacts == ["model.onnx"]
    assert (plan.io, plan.output) == ("float32", Path("there"))
    assert plan.limits == Limits(max_drop=3.5, max_kilobytes=1000)


def test_a_recipe_may_set_everything(tmp_path: Path) -> None:
    plan = Plan(
        "net",
        Path("there"),
        int8=True,
        half=True,
        format=("tflite",),
        data="bilder/für mich",
        io="int8",
        imgsz=64,
        labels=("ant", "bee"),
        mean=(0.5,),
        std=(0.2, 0.2, 0.3),
        batch=2,
        opset=18,
        calib_samples=10,
        check_samples=20,
        qat=3,
        seed=5,
        camera=128,
        author="Ada",
        limits=Limits(max_drop=2, min_agreement=0.5, max_kilobytes=10),
    )
    text = """
        summary = "All of it"
        [export]
        output = "there"
        int8 = true
        half = true
        format = ["tflite"]
        data = "bilder/für mich"
        io = "int8"
        imgsz = 64
        labels = ["ant", "bee"]
        mean = [0.5]
        std = [0.2, 0.2, 0.3]
        batch = 2
        opset = 18
        calib_samples = 10
        check_samples = 20
        qat = 3
        seed = 5
        camera = 128
        author = "Ada"
        [limits]
        max_drop = 2
        min_agreement = 0.5
        max_kilobytes = 10
    """
    assert make_plan("net", written(tmp_path, text), {}) == plan
    defaults = {f.name: f.default for f in dataclasses.fields(Plan)}
    same = [name for name, value in dataclasses.asdict(plan).items() if value == defaults[name]]
    assert same == ["download"], "the test leaves an option at its default"


def test_numbers_of_a_recipe_are_numbers(tmp_path: Path) -> None:
    message = refused(written(tmp_path, "[export]\nmean = ['0.5']"))
    assert "mean ['0.5'] is no list of numbers such as 0.5,0.5,0.5" in message


def test_labels_of_a_recipe_are_texts(tmp_path: Path) -> None:
    message = refused(written(tmp_path, "[export]\nlabels = [0, 'one']"))
    assert "labels [0, 'one'] are not all texts" in message


def test_an_unknown_recipe(tmp_path: Path) -> None:
    message = refused("raspberrypi")
    assert "There is no recipe 'raspberrypi': choose from app, microcontroller" in message
    assert "Did you mean raspberry-pi?" in message
    assert "There is no recipe" in refused(str(tmp_path))
    assert "There is no recipe" in refused(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[export]\nint = true", "unknown key 'int' in [export]. Did you mean int8"),
        ("[export]\ncheckpoint = 'net'", "unknown key 'checkpoint' in [export]"),
        ("[export]\ndownload = true", "unknown key 'download' in [export]"),
        ("[export]\nlimits = 3", "unknown key 'limits' in [export]"),
        ("[export]\nmax_drop = 3", "unknown key 'max_drop' in [export]"),
        ("[limits]\nmax_drops = 3", "unknown key 'max_drops' in [limits]. Did you mean max_drop"),
        ("[limit]\nmax_drop = 3", "unknown section or key 'limit'"),
        ("int8 = true", "unknown section or key 'int8'"),
        ("export = 3", "gives export a value: write [export]"),
        ("limits = []", "gives limits a value: write [limits]"),
        ("[export]\nint8 = 1", "int8 = 1, where true or false is needed"),
        ("[export]\nint8 = 'yes'", "int8 = 'yes', where true or false is needed"),
        ("[export]\nformat = 'onnx'", "format = 'onnx', where a list is needed"),
        ("[export]\nformat = ['onx']", "--format 'onx' is unknown: choose from onnx, tflite. Did"),
        ("[export]\nformat = [1]", "--format 1 is unknown"),
        ("[export]\nformat = []", "--format is empty"),
        ("[export]\nimgsz = '32'", "imgsz = '32', where a whole number is needed"),
        ("[export]\nimgsz = true", "imgsz = True, where a whole number is needed"),
        ("[export]\nimgsz = 31.5", "imgsz = 31.5, where a whole number is needed"),
        ("[export]\ndata = 5", "data = 5, where text is needed"),
        ("[export]\noutput = 5", "output = 5, where text is needed"),
        ("[export]\nio = 'unit8'", "--io 'unit8' is unknown: choose from uint8, int8, float32."),
        ("[limits]\nmax_drop = '1'", "max_drop = '1', where a number is needed"),
        ("[limits]\nmax_drop = nan", "max_drop nan is outside"),
        ("[limits]\nmin_agreement = 85", "min_agreement 85 is outside 0 to 1"),
        ("[limits]\nmax_kilobytes = -1", "max_kilobytes -1 is outside"),
        ("[export\nint8 = true", "is no export recipe"),
    ],
)
def test_a_recipe_with_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(written(tmp_path, text))


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    assert "is no export recipe" in refused(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"format": "onnx,tflight"},
            "--format 'tflight' is unknown: choose from onnx, tflite. Did",
        ),
        ({"format": ""}, "--format '' is unknown"),
        ({"format": ()}, "--format is empty: give one or both of onnx, tflite"),
        ({"io": "uint16"}, "--io 'uint16' is unknown: choose from uint8, int8, float32. Did you"),
        ({"opset": 12}, "--opset 12 is outside 13 to 20"),
        ({"opset": 21}, "--opset 21 is outside 13 to 20"),
        ({"imgsz": 0}, "--imgsz 0 is outside 24 to 256"),
        ({"imgsz": 257}, "--imgsz 257 is outside 24 to 256"),
        ({"batch": 0}, "--batch 0 is outside 1 to 1024"),
        ({"calib_samples": 0}, "--calib-samples 0 is outside"),
        ({"check_samples": 0}, "--check-samples 0 is outside"),
        ({"seed": -1}, "--seed -1 is outside 0 to"),
        ({"max_drop": float("nan")}, "max_drop nan is outside"),
        ({"camera": 47, "int8": True}, "--camera 47 is outside 48 to 2048"),
        ({"camera": 224}, "--camera makes an int8 TFLite model: add --int8"),
        ({"camera": 224, "int8": True, "format": "onnx"}, "add --int8, and tflite to --format"),
        ({"qat": 3, "data": "drawn"}, "--qat repairs int8 models: add --int8"),
        ({"half": True, "format": "onnx"}, "--half makes a TFLite model: add tflite to --format"),
    ],
)
def test_a_wrong_value(given: dict[str, Any], message: str) -> None:
    assert message in refused(None, **given)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("format", FORMATS)
def test_every_value_that_is_offered_is_taken(opset: int, io: str, format: str) -> None:
    plan = make_plan("net", None, {"opset": opset, "io": io, "format": format, "imgsz": 24})
    assert (plan.opset, plan.io, plan.format, plan.imgsz) == (opset, io, (format,), 24)
