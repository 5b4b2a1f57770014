from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ghostedge.convert import Bundle, foreign_onnx, to_onnx
from ghostedge.convert.audit import Operator, arena, audit, kind_of, precision_of
from ghostedge.convert.noise import signal_to_noise
from ghostedge.convert.rewrites.flat import OPS, Flat, schema
from ghostedge.runtime import Classifier, interpreter
from tests.runtime_fixtures import LABELS, SIZE, pictures, write_onnx, write_tflite

CONV = (3 * 3 * 3 * 8, 8)
OUTPUT = (SIZE - 3) // 2 + 1
MACS = OUTPUT**2 * CONV[0] + 8 * len(LABELS)


@pytest.mark.parametrize(
    ("io", "precision", "width"),
    [("float32", "fp32", 4), ("float16", "fp16", 2), ("uint8", "int8", 1), ("int8", "int8", 1)],
)
def test_a_small_tflite(tmp_path: Path, io: str, precision: str, width: int) -> None:
    file = write_tflite(tmp_path / "model.tflite", io)
    found = audit(file)
    assert found == audit(file)
    assert found["precision"] == precision_of(found) == precision
    assert found["macs"] == MACS
    assert found["float_islands"] == []
    kernels = found["operators"]["int8" if precision == "int8" else "float32"]
    assert (kernels["CONV_2D"], kernels["FULLY_CONNECTED"], kernels["SOFTMAX"]) == (1, 1, 1)
    layers = {layer["operator"]: layer["bytes"] for layer in found["weights"]["layers"]}
    bias = 4 if precision == "int8" else width
    assert layers["CONV_2D"] == width * CONV[0] + bias * CONV[1]
    assert found["weights"]["bytes"] == sum(layers.values())
    # The convolution's input and output are the two largest that live together.
    image, features = SIZE**2 * 3, OUTPUT**2 * 8
    assert found["peak_activation_bytes"] >= (image + features) * (1 if width == 1 else 4)
    assert found["partitions"] >= 1


def test_a_small_onnx(tmp_path: Path) -> None:
    found = audit(write_onnx(tmp_path / "model.onnx"))
    assert (found["precision"], found["partitions"], found["macs"]) == ("fp32", None, MACS)
    kinds = found["operators"]["float32"]
    assert kinds.get("Conv", 0) + kinds.get("FusedConv", 0) == 1
    assert found["peak_activation_bytes"] == 4 * (2 * SIZE**2 * 3)  # pixels, and less 128


def test_attention_in_float(tmp_path: Path) -> None:
    """Two computed tensors multiplied count by the side they share."""
    side, features = 16, 24
    node = helper.make_node
    shapes = {
        "heads": np.array([0, 8, side, features]),
        "w": np.ones((8 * side * side, len(LABELS)), np.float32),
    }
    nodes = [
        node("Reshape", ["image", "heads"], ["q"]),
        node("Transpose", ["q"], ["k"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "k"], ["scores"]),
        node("Flatten", ["scores"], ["flat"]),
        node("MatMul", ["flat", "w"], ["logits"]),
        node("Softmax", ["logits"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in shapes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "attention.onnx")
    found = audit(tmp_path / "attention.onnx")
    macs = 8 * side * side * (features + len(LABELS))
    assert found["macs"] == foreign_onnx.count(to_onnx.simplified(model, 1))["macs"] == macs


def quantized(path: Path, middle: str | None) -> Path:
    """Pixels to probabilities by two quantized products, with a float operator between or none."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.integers(-9, 9, (3, len(LABELS)), np.int8),
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
        "v": random.integers(-9, 9, (len(LABELS), len(LABELS)), np.int8),
    }
    node = helper.make_node
    nodes = [node("GlobalAveragePool", ["image"], ["mean"]), node("Flatten", ["mean"], ["x"])]

    def pair(name: str) -> str:
        nodes.append(node("QuantizeLinear", [name, "s", "z"], [f"{name}q"]))
        nodes.append(node("DequantizeLinear", [f"{name}q", "s", "z"], [f"{name}d"]))
        return f"{name}d"

    for weight, given, made in (("w", "x", "y"), ("v", "m" if middle else "y", "logits")):
        nodes.append(node("DequantizeLinear", [weight, "s", "z"], [f"{weight}d"]))
        nodes.append(node("MatMul", [pair(given), f"{weight}d"], [made]))
        if made == "y" and middle:
            nodes.append(node(middle, [pair("y")], ["m"]))
    nodes.append(node("Softmax", [pair("logits")], ["probabilities"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(LABELS)])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def test_float_inside_a_quantized_file_is_not_called_int8(tmp_path: Path) -> None:
    whole = audit(quantized(tmp_path / "whole.onnx", None))
    mixed = audit(quantized(tmp_path / "mixed.onnx", "HardSigmoid"))
    (inside,) = [island for island in mixed["float_islands"] if island["inside"]]
    assert inside["operators"] == {"HardSigmoid": 1}
    assert not any(island["inside"] for island in whole["float_islands"])
    assert mixed["precision"] == "mixed"


def test_shapes_are_computed_in_integers_in_float_files_too() -> None:
    counts = {"float32": {"Conv": 3}, "int32": {"Gather": 1, "Concat": 1}}
    found = {"operators": counts, "float_islands": [], "half_weights": False}
    assert precision_of(found) == "fp32"


def test_float_at_an_end_is_more_than_the_softmax() -> None:
    def called(kinds: list[str], inside: bool = False) -> str:
        island = {"operators": dict.fromkeys(kinds, 1), "macs": 0, "first": "x", "inside": inside}
        counts = {"int8": {"CONV_2D": 3}, "float32": island["operators"]}
        return precision_of({"operators": counts, "float_islands": [island], "half_weights": False})

    assert called(["SOFTMAX"]) == called(["Sub", "Mul"]) == "int8"
    assert called(["SOFTMAX"], inside=True) == called(["FULLY_CONNECTED", "SOFTMAX"]) == "mixed"


def in_float(content: bytes, kind: str) -> bytes:
    """Put DEQUANTIZE and QUANTIZE around an operator of an int8 file, as a repaired export has them."""
    model = Flat(content)
    operators = model.graph.operators
    op = next(op for op in operators if kind_of(model, op) == kind)
    ends = (op.inputs[0], op.outputs[0])
    floats = []
    for tensor in ends:
        twin = copy.copy(model.tensors[tensor])
        twin.type, twin.quantization = schema.TensorType.FLOAT32, None
        floats.append(model.add(twin))
    op.inputs, op.outputs = [floats[0], *op.inputs[1:]], [floats[1]]
    before, behind = schema.OperatorT(), schema.OperatorT()
    before.inputs, before.outputs = [ends[0]], [floats[0]]
    behind.inputs, behind.outputs = [floats[1]], [ends[1]]
    model.set_kind(before, OPS.DEQUANTIZE, 2)
    model.set_kind(behind, OPS.QUANTIZE, 1)
    place = operators.index(op)
    model.graph.operators = [*operators[:place], before, op, behind, *operators[place + 1 :]]
    return bytes(model)


def test_a_mixed_tflite_is_called_so(tmp_path: Path) -> None:
    whole = write_tflite(tmp_path / "int8.tflite", "uint8")
    images = pictures(4)
    for kind, precision in (("MEAN", "mixed"), ("SOFTMAX", "int8")):
        file = tmp_path / f"{kind}.tflite"
        file.write_bytes(in_float(whole.read_bytes(), kind))
        found = audit(file)
        assert found["operators"]["float32"] == {kind: 1}
        (island,) = found["float_islands"]
        assert island["inside"] == (kind == "MEAN")
        assert found["precision"] == precision
        np.testing.assert_allclose(Classifier(file)(images), Classifier(whole)(images), atol=0.1)
    assert Classifier(tmp_path / "MEAN.tflite").precision == "mixed"


def test_arena_reuses_what_is_no_longer_read() -> None:
    def step(reads: list[str], makes: list[str]) -> Operator:
        return Operator("ADD", "float32", reads, makes, 0, 0)

    sizes = {"a": 64, "b": 64, "c": 64, "d": 16}
    chain = [step(["a"], ["b"]), step(["b"], ["c"]), step(["c"], ["d"])]
    assert arena(chain, sizes, ["d"]) == 128
    skip = [step(["a"], ["b"]), step(["b"], ["c"]), step(["c", "a"], ["d"])]
    assert arena(skip, sizes, ["d"]) == 192
    assert arena(chain, {**sizes, "d": 1}, ["d"]) == 128
    # A residual block and a padding: 256 where the first of equal tensors are placed first.
    block = [*chain[:2], step(["a", "c"], ["x"]), step(["x"], ["pad"]), step(["pad"], ["d"])]
    assert arena(block, {"a": 64, "b": 64, "c": 64, "x": 64, "pad": 80, "d": 16}, ["d"]) == 208


def test_every_artefact_of_an_export_is_audited(bundle: Bundle) -> None:
    for name, artefact in bundle.manifest["artefacts"].items():
        found = audit(bundle.path / name)
        assert found == artefact["audit"], name
        assert found["precision"] == artefact["precision"]
        assert found["partitions"] == (1 if name.endswith(".tflite") else None)
        nominal = bundle.manifest["source"]["profile"]["macs"]
        assert nominal <= 1.01 * found["macs"], name
        if name != "model_int8.onnx":  # its channels are filled up to whole lanes
            assert found["macs"] <= 1.6 * nominal, name
    fp32, int8 = (
        bundle.manifest["artefacts"][f"model_{kind}.tflite"]["audit"] for kind in ("fp32", "int8")
    )
    assert int8["precision"] == "int8"
    assert 3.5 < fp32["peak_activation_bytes"] / int8["peak_activation_bytes"] < 4.5


def test_a_part_of_a_model_computes_what_the_model_does(tmp_path: Path) -> None:
    file = write_tflite(tmp_path / "model.tflite", "uint8")
    model = Flat(file.read_bytes())
    operators = list(model.graph.operators)
    middle = len(operators) // 2
    (passed,) = {t for op in operators[:middle] for t in op.outputs} & {
        t for op in operators[middle:] for t in op.inputs
    }
    image = pictures(1)
    values = image
    for part in (
        model.part(operators[:middle], [passed]),
        model.part(operators[middle:], list(model.graph.outputs)),
    ):
        net = interpreter(part)
        (given,), (made,) = net.get_input_details(), net.get_output_details()
        net.set_tensor(given["index"], values.astype(given["dtype"]))
        net.invoke()
        values = net.get_tensor(made["index"])
    np.testing.assert_array_equal(values, Classifier(file).raw(image))


def test_noise_of_layers(bundle: Bundle) -> None:
    layers = bundle.manifest["signal_to_noise"]
    assert len(layers) > 80
    assert all(0 < layer["decibels"] < 80 for layer in layers)
    files = [bundle.path / f"model_{kind}.tflite" for kind in ("fp32", "int8")]
    golden = np.load(bundle.path / "golden.npz")["images"][:4]
    assert len(signal_to_noise(*files, golden)) == len(layers)
    assert signal_to_noise(files[0], files[0], golden) == []
