from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from ghostedge import checkpoint
from ghostedge.errors import GhostEdgeError
from ghostedge.latency.runner import machine, saturates
from ghostedge.runtime import BATCH, Classifier
from tests.runtime_fixtures import (
    LABELS,
    SIZE,
    expected,
    pictures,
    tflite,
    write_bundle,
    write_checkpoint,
    write_onnx,
    write_tflite,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("runtime") / "bundle")


def test_every_format_gives_the_probabilities_of_the_network(bundle: Path) -> None:
    images = pictures(2 * BATCH + 1)
    for name, kind, precision, tolerance in (
        ("model.onnx", "onnxruntime", "fp32", 1e-5),
        ("model_fp32.tflite", "litert", "fp32", 1e-5),
        ("model_int8.tflite", "litert", "int8", 0.02),
    ):
        classifier = Classifier(bundle / name)
        found = classifier(images)
        assert found.dtype == np.float32
        assert found.shape == (len(images), len(LABELS))
        assert np.abs(found - expected(images)).max() < tolerance
        assert (classifier.runtime, classifier.precision) == (kind, precision)
        assert (classifier.size, classifier.labels) == (SIZE, LABELS)
        assert classifier.path == bundle / name


def test_half_precision(tmp_path: Path) -> None:
    classifier = Classifier(write_tflite(tmp_path / "half.tflite", "float16"))
    images = pictures(5)
    assert classifier.precision == "fp16"
    np.testing.assert_allclose(classifier(images), expected(images), atol=2e-3)


def test_quantized_outputs(tmp_path: Path) -> None:
    images = pictures(20)
    unsigned = Classifier(write_tflite(tmp_path / "unsigned.tflite", "uint8"))
    signed = Classifier(write_tflite(tmp_path / "signed.tflite", "int8"))
    assert unsigned.raw(images).dtype == np.uint8
    assert signed.raw(images).dtype == np.int8
    assert unsigned.step == signed.step == 1 / 256
    np.testing.assert_array_equal(unsigned.raw(images), signed.raw(images).astype(int) + 128)
    np.testing.assert_array_equal(unsigned(images), signed(images))
    np.testing.assert_array_equal(unsigned(images), unsigned.raw(images) / np.float32(256))
    assert len(np.unique(unsigned.raw(images))) > 20


@pytest.mark.parametrize("batch", [None, 1, 5])
@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_fixed_batches(tmp_path: Path, kind: str, batch: int | None) -> None:
    path = tmp_path / f"model.{kind}"
    if kind == "onnx":
        write_onnx(path, batch=batch)
    else:
        write_tflite(path, "float32", batch=batch or 1)
    classifier, images = Classifier(path), pictures(7)
    np.testing.assert_allclose(classifier(images), expected(images), atol=1e-5)
    np.testing.assert_allclose(classifier(images[3]), expected(images[3:4]), atol=1e-5)
    assert classifier(images[:0]).shape == (0, len(LABELS))


def test_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "net.safetensors")
    (tmp_path / "labels.txt").write_text("of something else\n")
    before = torch.get_num_threads()  # of the test, not what the classifier uses
    classifier, images = Classifier(path), pictures(5, size=32)
    _, net = checkpoint.build(path)
    values = (images - np.array([120, 121, 122])) / np.array([60, 61, 62])
    with torch.inference_mode():
        logits = net(torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2))
    np.testing.assert_allclose(classifier(images), logits.softmax(1).numpy(), atol=1e-6)
    assert (classifier.runtime, classifier.step, classifier.labels) == ("torch", None, LABELS)
    assert torch.get_num_threads() == before


def test_threads_that_load_at_once_leave_stderr_as_it_was(bundle: Path) -> None:
    before = os.fstat(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(Classifier, [bundle / "model_int8.tflite"] * 12):
            pass
    assert os.path.samestat(os.fstat(2), before)


def test_reference_kernels(bundle: Path) -> None:
    images = pictures(10)
    reference = Classifier(bundle / "model_int8.tflite", kernels="reference").raw(images)
    default = Classifier(bundle / "model_int8.tflite").raw(images)
    assert np.abs(reference.astype(int) - default).max() <= 3
    with pytest.raises(GhostEdgeError, match=r"Only a \.tflite file has reference kernels"):
        Classifier(bundle / "model.onnx", kernels="reference")
    with pytest.raises(GhostEdgeError, match=r"Only a \.onnx file has exact kernels"):
        Classifier(bundle / "model_int8.tflite", kernels="exact")
    with pytest.raises(GhostEdgeError, match="choose one of default, reference"):
        Classifier(bundle, kernels="fast")


def test_exact_kernels_do_not_saturate(tmp_path: Path) -> None:
    """White pixels and the largest weights: two products exceed 16 bits."""
    make, array = onnx.helper, onnx.numpy_helper.from_array
    values = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "weights": np.full((4, 3, 3, 3), 127, np.int8),
        "step": np.float32(1 / 127),
        "middle": np.int8(0),
        "large": np.float32(100),
    }
    nodes = [
        make.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        make.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        make.make_node("DequantizeLinear", ["weights", "step", "middle"], ["w"]),
        make.make_node("Conv", ["d", "w"], ["c"]),
        make.make_node("QuantizeLinear", ["c", "large", "zero"], ["cq"]),
        make.make_node("DequantizeLinear", ["cq", "large", "zero"], ["cd"]),
        make.make_node("GlobalAveragePool", ["cd"], ["p"]),
        make.make_node("Flatten", ["p"], ["y"]),
    ]
    graph = make.make_graph(
        nodes,
        "saturating",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 24, 24])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [array(np.array(value), name) for name, value in values.items()],
    )
    file = tmp_path / "model.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), file)
    white = np.full((1, 24, 24, 3), 255, np.uint8)
    expected = np.full((1, 4), 27 * 255.0)
    np.testing.assert_allclose(Classifier(file, kernels="exact").raw(white), expected, atol=50)
    found = Classifier(file).raw(white)
    assert np.allclose(found, expected, atol=50) != saturates(machine()["features"])


def test_a_bundle_stands_for_its_best_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Classifier(bundle).path.name == "model_int8.tflite"
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    assert Classifier(bundle).path.name == "model.onnx"
    with pytest.raises(GhostEdgeError, match=r"needs LiteRT.*pip install ai-edge-litert"):
        Classifier(bundle / "model_int8.tflite")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GhostEdgeError, match="none of its runtimes is installed"):
        Classifier(bundle)


def test_labels(tmp_path: Path) -> None:
    named = write_onnx(tmp_path / "named.onnx", labels=["w", "x", "y", "z"])
    plain = write_tflite(tmp_path / "plain.tflite", "float32")
    assert Classifier(named).labels == ["w", "x", "y", "z"]
    assert Classifier(plain).labels == ["class 0", "class 1", "class 2", "class 3"]
    beside = tmp_path / "labels.txt"
    beside.write_bytes("\ufeffä\r\nb\r\nc\r\nd\r\n\r\n".encode())
    assert Classifier(plain).labels == Classifier(named).labels == ["ä", "b", "c", "d"]
    beside.write_text("a\u2028\n \nc\nd \n\n", "utf-8")
    assert Classifier(plain).labels == ["a\u2028", " ", "c", "d "]
    beside.write_text("a\nb\n")
    with pytest.raises(GhostEdgeError, match=r"has 4 classes and .*labels\.txt names 2 labels"):
        Classifier(plain)
    beside.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(GhostEdgeError, match="in UTF-8"):
        Classifier(plain)
    beside.unlink()
    with pytest.raises(GhostEdgeError, match="names 3 labels"):
        Classifier(write_onnx(tmp_path / "three.onnx", labels=["a", "b", "c"]))


def test_labels_of_a_bundle_win(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "labels.txt").write_text("1\n2\n3\n4\n")
    assert Classifier(copy / "model.onnx").labels == LABELS
    assert Classifier(write_onnx(copy / "other.onnx")).labels == ["1", "2", "3", "4"]
    (copy / "manifest.json").write_text('{"name": "a web app", "icons": []}')
    assert Classifier(copy / "model.onnx").labels == ["1", "2", "3", "4"]


def test_predict(bundle: Path, tmp_path: Path) -> None:
    classifier, images = Classifier(bundle / "model.onnx"), pictures(3)
    file = tmp_path / "picture.png"
    Image.fromarray(images[0]).save(file)
    found = classifier.predict([file, images[1], str(file)])
    probabilities = expected(images[:2])
    for row, ranking in zip((0, 1, 0), found, strict=True):
        wanted = sorted(zip(LABELS, probabilities[row], strict=True), key=lambda pair: -pair[1])
        assert [label for label, _ in ranking] == [label for label, _ in wanted]
        assert [p for _, p in ranking] == pytest.approx([p for _, p in wanted], abs=1e-5)
    assert [len(ranking) for ranking in classifier.predict(str(file), top=2)] == [2]
    assert classifier.predict([]) == []
    with pytest.raises(GhostEdgeError, match=r"nowhere\.png"):
        classifier.predict([tmp_path / "nowhere.png"])


def test_wrong_images(bundle: Path) -> None:
    classifier = Classifier(bundle / "model.onnx")
    with pytest.raises(GhostEdgeError, match=r"images of 24x24 RGB.*given \(2, 32, 32, 3\)"):
        classifier(pictures(2, size=32))
    with pytest.raises(GhostEdgeError, match=r"given \(24, 24\)"):
        classifier.predict([pictures(1)[0, :, :, 0]])
    with pytest.raises(GhostEdgeError, match="uint8 from 0 to 255, not float32"):
        classifier(pictures(2).astype(np.float32) / 255)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(path, format="PNG")


def truncated(path: Path) -> None:
    if path.suffix == ".tflite":
        path.write_bytes(tflite("float32")[:1500])
    elif path.suffix == ".onnx":
        path.write_bytes(write_onnx(path).read_bytes()[:700])
    else:
        path.write_bytes(write_checkpoint(path).read_bytes()[:20000])


@pytest.mark.parametrize("damage", [empty, foreign, truncated])
@pytest.mark.parametrize("suffix", [".tflite", ".onnx", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str, damage: Callable[[Path], None]) -> None:
    path = tmp_path / f"model{suffix}"
    damage(path)
    with pytest.raises(GhostEdgeError, match="model") as error:
        Classifier(path)
    message = str(error.value)
    assert "\n" not in message
    assert any(remedy in message for remedy in ("export", "ghostedge import"))


def test_a_cut_tflite_ends_nothing(tmp_path: Path) -> None:
    """LiteRT 2.1.0 dies of a large one that it opens by itself."""
    content = tflite("float32")
    for length in range(1, len(content), 97):
        path = tmp_path / "cut.tflite"
        path.write_bytes(content[:length])
        with pytest.raises(GhostEdgeError, match="cut"):
            Classifier(path)


def test_what_is_no_model(tmp_path: Path) -> None:
    for name in ("nowhere.tflite", "nowhere.onnx"):
        with pytest.raises(GhostEdgeError, match=f"There is no file .*{name}"):
            Classifier(tmp_path / name)
    with pytest.raises(GhostEdgeError, match="is a folder without manifest"):
        Classifier(tmp_path)
    with pytest.raises(GhostEdgeError, match="neither a file nor the name"):
        Classifier("ghostnetv9")
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    with pytest.raises(GhostEdgeError, match="`ghostedge import` turns a foreign checkpoint"):
        Classifier(weights)


def test_models_that_are_no_classifiers(tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match=r"tensor\(float\) \['batch', 1, 24, 24\] to"):
        Classifier(write_onnx(tmp_path / "grey.onnx", channels=1))
    with pytest.raises(GhostEdgeError, match=r"float32 \[1, 24, 24, 1\] to float32 \[1, 4\]"):
        Classifier(write_tflite(tmp_path / "grey.tflite", "float32", channels=1))
    model = onnx.load(write_onnx(tmp_path / "none.onnx"))
    constant = onnx.numpy_helper.from_array(np.zeros((1, 3, 24, 24), np.float32), "image")
    del model.graph.input[:]
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["image"], value=constant))
    onnx.save(model, tmp_path / "none.onnx")
    with pytest.raises(GhostEdgeError, match=r"none\.onnx maps nothing to"):
        Classifier(tmp_path / "none.onnx")
    logits = Classifier(write_onnx(tmp_path / "logits.onnx", softmax=False))
    with pytest.raises(GhostEdgeError, match="lacks the final softmax"):
        logits(pictures(9))


def test_a_batch_that_is_fixed_inside(tmp_path: Path) -> None:
    model = onnx.load(write_onnx(tmp_path / "model.onnx"))
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 4]), "one"))
    graph.node[-1].output[0] = "free"
    graph.node.append(onnx.helper.make_node("Reshape", ["free", "one"], ["probabilities"]))
    onnx.save(model, tmp_path / "fixed.onnx")
    found = Classifier(tmp_path / "fixed.onnx")
    assert found(pictures(1)).shape == (1, 4)
    with pytest.raises(GhostEdgeError, match=r"fixed\.onnx does not compute 2 images at once \("):
        found(pictures(2))


def test_loading_says_nothing(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("model.onnx", "model_int8.tflite"):
        Classifier(bundle / name)(pictures(1))
    assert capfd.readouterr() == ("", "")


def test_import_is_light() -> None:
    heavy = "torch tensorflow onnx onnxruntime ai_edge_litert PIL matplotlib typer rich safetensors"
    code = (
        "import sys, ghostedge.runtime, ghostedge.bundle, ghostedge.latency.timing\n"
        f"print(*(set('{heavy}'.split()) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
