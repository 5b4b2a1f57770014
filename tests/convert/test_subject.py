"""A module or an ONNX file of any origin exports like a checkpoint of ours."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

import ghostedge
from ghostedge.bundle import verify
from ghostedge.convert import to_onnx
from ghostedge.convert.evidence import ImageSet
from ghostedge.convert.plan import make_plan
from ghostedge.convert.subject import Subject, open_subject
from ghostedge.errors import GhostEdgeError
from ghostedge.models.synthetic import noise
from ghostedge.runtime import Classifier

SIZE, LABELS = 24, ["ant", "bee", "cat", "dog"]
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
READING = {"mean": MEAN, "std": STD}


class Tiny(nn.Module):
    """Normalised values, NCHW, to logits or probabilities."""

    def __init__(self, softmax: bool = False, norm: bool = True, pool: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.linear = nn.Linear(8, len(LABELS))
        self.last = nn.Softmax(1) if softmax else nn.Identity()
        with torch.no_grad():
            self.linear.weight *= 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.last(self.linear(x))


def expected(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """What the net gives for raw pixels, computed without ghostedge."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    values = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        found = net.eval()(values)
    return (
        found if getattr(net, "last", None).__class__ is nn.Softmax else found.softmax(1)
    ).numpy()


def write(path: Path, net: nn.Module | None = None, batch: int | None = None, **given: Any) -> Path:
    """Export as timm does: its names, and a free batch axis where none is given."""
    axes = None if batch else {"input0": {0: "batch"}, "output0": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            (net or Tiny()).eval(),
            (torch.zeros(batch or 2, 3, SIZE, SIZE),),
            str(path),
            **{
                "dynamo": False,
                "opset_version": 17,
                "input_names": ["input0"],
                "output_names": ["output0"],
                "dynamic_axes": axes,
                **given,
            },
        )
    return path


def change(path: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)
    return path


def opened(path: Path, **given: Any) -> Subject:
    return open_subject(make_plan(str(path), None, {**READING, **given}))


def computed(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"image": images.transpose(0, 3, 1, 2).astype(np.float32)})[0]


# --- modules


def test_a_module_exports_and_stays_as_it_is(tmp_path: Path) -> None:
    net = Tiny().train()
    net.conv.register_forward_hook(lambda *_: None)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made = ghostedge.export(
        net, tmp_path / "out", format=["onnx"], int8=True, imgsz=SIZE, labels=LABELS, **READING
    )
    assert net.training and net.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert list(made.parity) == ["PyTorch module", "exported ONNX", "model.onnx", "model_int8.onnx"]
    images = noise(SIZE, seed=5)[:16]
    found = Classifier(made.path / "model.onnx")
    assert found.labels == made.manifest["labels"] == LABELS
    np.testing.assert_allclose(found(images), expected(net, images), atol=1e-5)
    assert verify(made).ok
    source = made.manifest["source"]
    counted = sum(p.numel() for p in net.parameters())
    assert source["profile"]["training_parameters"] == counted
    # The BatchNorm is folded; the reading of pixels is a depthwise convolution of 3 channels.
    assert source["profile"]["deployed_parameters"] == counted - 2 * 8 + 6
    assert source["profile"]["macs"] == 12 * 12 * 8 * 27 + 8 * 4 + SIZE * SIZE * 3
    assert made.manifest["calibration"]["kind"] == "synthetic"


def test_the_same_module_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        ghostedge.export(Tiny(), tmp_path / name, format=["onnx"], imgsz=SIZE, **READING)
    for name in ("model.onnx", "manifest.json", "golden.npz", "labels.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "labels.txt").read_text().split("\n")[:2] == ["class 0", "class 1"]


@pytest.mark.parametrize("softmax", [False, True])
def test_a_net_may_end_in_logits_or_probabilities(softmax: bool, tmp_path: Path) -> None:
    net = Tiny(softmax)
    images = noise(SIZE, seed=5)[:8]
    plan = make_plan("Tiny", None, {"imgsz": SIZE, **READING})
    for subject in (open_subject(plan, net), opened(write(tmp_path / "a.onnx", net))):
        assert subject.source["ends"] == ("softmax" if softmax else "logits")
        np.testing.assert_allclose(subject.reference(images), expected(net, images), atol=1e-5)
        core = to_onnx.with_raw_pixels(subject.core(17))
        np.testing.assert_allclose(computed(core, images), expected(net, images), atol=1e-5)


class Mean(Tiny):
    """Probabilities that no softmax ends in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return (y.softmax(1) + (2 * y).softmax(1)) / 2


@pytest.mark.parametrize(("io", "lowest"), [("uint8", 0), ("int8", -128)])
def test_a_step_is_1_256_whatever_ends_in_probabilities(
    io: str, lowest: int, tmp_path: Path
) -> None:
    images = noise(SIZE, seed=5)[:8]
    made = ghostedge.export(Mean(), tmp_path / "out", int8=True, io=io, imgsz=SIZE, **READING)
    output = made.manifest["artefacts"]["model_int8.tflite"]["output"]
    model = Classifier(made.path / "model_int8.tflite")
    assert (output["scale"], output["zero_point"]) == (1 / 256, lowest)
    assert (model.step, model.backend.zero_point) == (1 / 256, lowest)
    wanted = Classifier(made.path / "model.onnx")(images)
    assert np.abs(model(images) - wanted).max() < 0.02


class Pair(Tiny):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y


class Hooked(Tiny):
    """What torch cannot copy once it has run: a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(self.conv)
        self(torch.zeros(1, 3, SIZE, SIZE))


class Halved(Tiny):
    """Scores in bfloat16, which numpy does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).bfloat16()


class Map(Tiny):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("net", "given", "message"),
    [
        (Tiny(), {"imgsz": None}, "does not say what images it takes: give their size, imgsz=32"),
        (Tiny(), {"mean": None}, "does not say how it reads pixels: .*--mean 0.485,0.456,0.406"),
        (Tiny(), {"std": [0.2, 0.2]}, "one or three numbers for pixels between 0 and 1"),
        (Tiny(), {"mean": [123.0, 116.0, 103.0]}, "divide numbers for 0-255 by 255"),
        (Tiny(), {"labels": ["a", "b"]}, "has 4 classes and 2 labels were given"),
        (Tiny(norm=False), {"int8": True}, r"no BatchNorm .* Give real ones: --data DIR"),
        (Pair(), {}, "gives a tuple and no tensor"),
        (Halved(), {}, "gives bfloat16 scores, where float32 are needed"),
        (Hooked(), {}, "Hooked cannot be copied .*remove_weight_norm"),
        (Map(), {}, "is no classifier, which gives .batch, classes. of at least two"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), {}, "cannot take 24x24 RGB images"),
    ],
)
def test_a_module_that_cannot_be_exported(
    net: nn.Module, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(GhostEdgeError, match=message) as caught:
        ghostedge.export(net, tmp_path / "out", **{"imgsz": SIZE, **READING, **given})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- ONNX files


def normalised_inside(model: onnx.ModelProto, *after: int) -> None:
    """Put (x / 255 - mean) / std in front, so that it takes raw pixels."""
    graph = model.graph
    first = graph.input[0].name
    for node in graph.node:
        node.input[:] = ["read" if name == first else name for name in node.input]
    values = {
        "scale": np.float32(255),
        "mean": np.array(MEAN, np.float32).reshape(3, *after),
        "gain": 1 / np.array(STD, np.float32).reshape(1, 3, *after),
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    steps = [("Div", first, "scale"), ("Sub", "s0", "mean"), ("Mul", "gain", "s1")]
    for index, (op, *inputs) in enumerate(steps):
        node = helper.make_node(op, inputs, [f"s{index}" if index < 2 else "read"], f"n{index}")
        graph.node.insert(index, node)


def channels_last(model: onnx.ModelProto) -> None:
    graph = model.graph
    first = graph.input[0].name
    graph.node.insert(0, helper.make_node("Transpose", ["x"], [first], "t", perm=[0, 3, 1, 2]))
    del graph.input[:]
    shape = ["n", SIZE, SIZE, 3]
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))


def old_inputs(model: onnx.ModelProto) -> None:
    model.ir_version = 3
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)


def clashing_names(model: onnx.ModelProto) -> None:
    """Inner tensors called like ours."""
    names = {model.graph.node[0].output[0]: "probabilities", model.graph.node[1].output[0]: "image"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


RAW = {"mean": [0.0], "std": [1 / 255]}
FORMS: dict[str, tuple[dict[str, Any], Callable[[onnx.ModelProto], None] | None, dict[str, Any]]]
FORMS = {
    "free batch": ({}, None, {}),
    "batch of one": ({"batch": 1}, None, {}),
    "batch of three": ({"batch": 3}, None, {}),
    "free size": (
        {"dynamic_axes": {"input0": {0: "n", 2: "h", 3: "w"}, "output0": {0: "n"}}},
        None,
        {"imgsz": SIZE},
    ),
    "opset 11": ({"opset_version": 11}, None, {}),
    "opset 20": ({"opset_version": 20}, None, {}),
    "constants as inputs": ({}, old_inputs, {}),
    "clashing names": ({}, clashing_names, {}),
    "NHWC": ({}, channels_last, {}),
    "raw pixels": ({}, lambda m: normalised_inside(m, 1, 1), RAW),
    "raw pixels, NHWC": ({}, lambda m: (channels_last(m), normalised_inside(m))[0], RAW),
}


@pytest.mark.parametrize("form", FORMS)
def test_onnx_of_every_form(form: str, tmp_path: Path) -> None:
    made, edit, given = FORMS[form]
    path = write(tmp_path / "net.onnx", **made)
    if edit is not None:
        change(path, edit)
    subject = opened(path, **given)
    images = noise(SIZE, seed=5)[:7]
    wanted = expected(Tiny(), images)
    np.testing.assert_allclose(subject.reference(images), wanted, atol=1e-5)
    np.testing.assert_allclose(subject.pixels.mean, 255 * np.array(MEAN), atol=1e-4)
    for opset in (17, 20):
        core = subject.core(opset)
        assert core.opset_import[0].version == opset
        for model in (core, to_onnx.simplified(core), to_onnx.simplified(core, 7)):
            found = computed(to_onnx.with_raw_pixels(model), images)
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    # The normalisation that was inside is peeled off and the BatchNorm folded.
    folded = sum(p.numel() for p in Tiny().parameters()) - 2 * 8 + 6
    assert subject.source["profile"]["deployed_parameters"] == folded


def test_reducing_over_shared_axes_survives_an_older_opset(tmp_path: Path) -> None:
    """onnx's converter takes the axes of opset 18, where they are raw bytes, for an empty list."""

    class Gated(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.conv(x))
            x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
            return self.linear(x.mean((2, 3), keepdim=True).flatten(1))

    subject = opened(write(tmp_path / "net.onnx", Gated(), opset_version=18))
    images = noise(SIZE, seed=5)[:4]
    found = computed(to_onnx.with_raw_pixels(subject.core(17)), images)
    np.testing.assert_allclose(found, expected(Gated(), images), atol=1e-5)


def test_our_own_onnx_exports_again(tmp_path: Path) -> None:
    first = ghostedge.export(
        Tiny(), tmp_path / "a", format=["onnx"], imgsz=SIZE, labels=LABELS, **READING
    )
    again = ghostedge.export(first.path / "model.onnx", tmp_path / "b", format=["onnx"])
    assert again.manifest["labels"] == LABELS
    assert again.manifest["pixels"]["mean"] == [128.0] * 3
    assert again.manifest["pixels"]["std"] == [64.0] * 3
    images = noise(SIZE, seed=5)[:9]
    found = [Classifier(folder / "model.onnx")(images) for folder in (first.path, again.path)]
    np.testing.assert_allclose(*found, atol=1e-6)
    for flag, value in (("mean", [0.5]), ("labels", LABELS)):
        with pytest.raises(GhostEdgeError, match=f"leave out --{flag}"):
            ghostedge.export(first.path / "model.onnx", tmp_path / "c", **{flag: value})


def inputs_of(kind: int, *shapes: list[Any]) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        del model.graph.input[:]
        names = ["input0", "second"]
        model.graph.input.extend(
            helper.make_tensor_value_info(n, kind, s) for n, s in zip(names, shapes, strict=False)
        )

    return edit


def output_of(kind: int) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        end = model.graph.output[0]
        model.graph.node.append(helper.make_node("Cast", [end.name], ["cast"], to=kind))
        end.name, end.type.tensor_type.elem_type = "cast", kind

    return edit


def custom(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def quantized(model: onnx.ModelProto) -> None:
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    model.graph.initializer.append(scale)
    made = model.graph.node[0].output[0]
    for node in model.graph.node:
        node.input[:] = ["dq" if name == made else name for name in node.input]
    model.graph.node.insert(1, helper.make_node("QuantizeLinear", [made, "scale"], ["q"]))
    model.graph.node.insert(2, helper.make_node("DequantizeLinear", ["q", "scale"], ["dq"]))


def second_output(model: onnx.ModelProto) -> None:
    name = model.graph.node[0].output[0]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))


def image_output(model: onnx.ModelProto) -> None:
    name = model.graph.node[0].output[0]
    del model.graph.output[:]
    shape = ["n", 8, "h", "w"]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def scalar_output(model: onnx.ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node.append(helper.make_node("ReduceSum", [name], ["sum"], keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, []))


def damaged_weight(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(values, np.nan), tensor.name))


FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (custom, "uses the op Conv of com.example, which is not in the ONNX standard"),
        (quantized, r"is quantized already \(QuantizeLinear\)"),
        (second_output, "to output0, .*, where one image is to be mapped to one tensor"),
        (image_output, r"gives \[4, 8, 12, 12\] for 4 images and is no classifier"),
        (scalar_output, r"gives \[\] for 4 images and is no classifier"),
        (damaged_weight, "gives NaN or infinity"),
        (inputs_of(FLOAT, ["n", 3, 24, 32]), "takes images of 24x32 pixels"),
        (inputs_of(FLOAT, ["n", 1, 24, 24]), r"float \[n, 1, 24, 24\], which is no batch of RGB"),
        (inputs_of(FLOAT, ["n", 72]), "which is no batch of RGB images"),
        (inputs_of(HALF, ["n", 3, 24, 24]), r"float16 \[n, 3, 24, 24\], which is no batch"),
        (inputs_of(FLOAT, ["n", 3, 24, 24], [1]), "where one image is to be mapped"),
        (inputs_of(FLOAT, ["n", 3, "h", "w"]), "takes images of any size: say which one with --im"),
        (inputs_of(FLOAT, ["n", 3, 300, 300]), "outside 24 to 256"),
        (inputs_of(FLOAT, [10**7, 3, 24, 24]), "batches of more than 1024 are not for devices"),
        (output_of(TensorProto.DOUBLE), "gives double .*, where float32 scores are needed"),
        (output_of(TensorProto.STRING), "gives string .*, where float32 scores are needed"),
        (lambda m: m.opset_import[0].__setattr__("version", 99), "not a whole ONNX model"),
        (lambda m: m.graph.initializer.pop(), "not a whole ONNX model"),
        (lambda m: m.graph.ClearField("node"), "not a whole ONNX model"),
    ],
)
def test_onnx_that_cannot_be_exported(
    edit: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    path = change(write(tmp_path / "net.onnx"), edit)
    with pytest.raises(GhostEdgeError, match=message) as caught:
        ghostedge.export(path, tmp_path / "out", **READING)
    assert caught.value.exit_code == 2
    assert re.fullmatch(r"[^\n]+", str(caught.value))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_a_damaged_file(content: bytes | None, tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    with pytest.raises(GhostEdgeError, match="is not a whole ONNX model"):
        opened(path)
    with pytest.raises(GhostEdgeError, match="There is no file"):
        opened(tmp_path / "other.onnx")


def test_a_graph_that_onnxsim_refuses(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "net.onnx"))
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(GhostEdgeError, match=r"onnxsim cannot read the graph \("):
        to_onnx.simplified(model)


@pytest.mark.parametrize("batch", [-1, 0])
def test_a_free_batch_by_a_number(batch: int, tmp_path: Path) -> None:
    path = change(write(tmp_path / "net.onnx"), inputs_of(FLOAT, [batch, 3, 24, 24]))
    subject = open_subject(make_plan(str(path), None, READING))
    assert subject.reference(noise(24)[:3]).shape == (3, subject.classes)


def test_a_size_that_the_file_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match="takes images of 24x24 pixels, not 32"):
        opened(write(tmp_path / "net.onnx"), imgsz=32)


def test_an_opset_that_onnx_cannot_reach(tmp_path: Path) -> None:
    with pytest.raises(
        GhostEdgeError, match=r"from ONNX opset 17 to 13 .* export it again with op"
    ):
        opened(write(tmp_path / "net.onnx"), opset=13)


def test_int8_of_a_file_needs_data(tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match=r"net has no BatchNorm .* --data DIR"):
        ghostedge.export(write(tmp_path / "net.onnx"), tmp_path / "out", int8=True, **READING)


def test_external_data_stays_in_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = write(inside / "net.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    images = noise(SIZE, seed=5)[:3]
    np.testing.assert_allclose(opened(path).reference(images), expected(Tiny(), images), atol=1e-5)
    (inside / "net.data").rename(tmp_path / "net.data")
    with pytest.raises(GhostEdgeError, match="or its data is not beside it"):
        opened(path)
    (inside / "net.data").symlink_to(tmp_path / "net.data")
    with pytest.raises(GhostEdgeError, match="or its data is not beside it"):
        opened(path)
    stored = onnx.load(path, load_external_data=False)
    for place in ("../net.data", str(tmp_path / "net.data")):
        for tensor in stored.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        path.write_bytes(stored.SerializeToString())
        with pytest.raises(GhostEdgeError, match="or its data is not beside it"):
            opened(path)


# --- labels and normalisation


class Bright(nn.Module):
    """Names an image light or dark by the sign of its mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((1, 2, 3)) * 4
        return torch.stack([-mean, mean], 1)


@pytest.fixture(scope="module")
def brightness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light images, 100 of each."""
    root, random = tmp_path_factory.mktemp("brightness"), np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        for index in range(100):
            pixels = random.integers(low, low + 100, (SIZE, SIZE, 3)).astype(np.uint8)
            file = root / "train" / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return root


def test_classes_of_the_data_name_an_unnamed_net(brightness: Path, tmp_path: Path) -> None:
    given = {"data": str(brightness), "mean": [0.5], "std": [0.5]}
    made = ghostedge.export(Bright(), tmp_path / "out", format=["onnx"], imgsz=SIZE, **given)
    assert made.manifest["labels"] == ["dark", "light"]
    assert made.accuracy["model.onnx"]["validation"] == 100
    assert not made.manifest["warnings"]
    with pytest.raises(GhostEdgeError, match=r"2 classes and Tiny has 4, which nothing names"):
        ghostedge.export(Tiny(), tmp_path / "out", imgsz=SIZE, **given)


def test_a_wrong_normalisation_is_said(brightness: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    path = write(tmp_path / "bright.onnx", Bright())
    given: dict[str, Any] = {"format": ["onnx"], "data": str(brightness), "say": lines.append}
    made = ghostedge.export(path, tmp_path / "out", mean=[0.0], std=[1.0], **given)
    low, better = made.manifest["warnings"]
    assert "bright is right on 50.0% of 20 labelled images before any conversion" in low
    assert "--mean, --std" in low and "--labels" in low
    assert re.match(r"With .* bright is right on 100.0% .* check --mean and --std", better)
    assert f"WARNING: {low}" in lines
    for report in ("report.md", "report.html"):
        assert "check --mean and --std" in (made.path / report).read_text()


def test_wrong_labels_are_said() -> None:
    given = {"labels": ["light", "dark"], "mean": [0.5], "std": [0.5], "imgsz": SIZE}
    subject = open_subject(make_plan("Bright", None, given), Bright())
    pixels = np.repeat(np.uint8([20, 230] * 20), SIZE * SIZE * 3).reshape(-1, SIZE, SIZE, 3)
    images = ImageSet(pixels, np.array([1, 0] * 20))
    (line,) = subject.doubts(images, subject.reference(pixels))
    assert "is right on 0.0%" in line and "the order of the labels" in line


def test_a_checkpoint_has_its_own_contract(tmp_path: Path) -> None:
    for flag, value in (("mean", [0.5]), ("labels", LABELS)):
        with pytest.raises(GhostEdgeError, match=f"leave out --{flag}"):
            ghostedge.export("ghostnetv3-small-1.0x", tmp_path / "out", **{flag: value})
