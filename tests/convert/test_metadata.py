"""What the files say of themselves; tests/test_mediapipe.py has MediaPipe read the same."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

import ghostedge
from ghostedge.convert import Bundle
from ghostedge.convert.check import Parity, Stage
from ghostedge.convert.metadata import Facts, accuracy, into_tflite, write
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.deploy.app import declared_normalization
from ghostedge.errors import GhostEdgeError
from ghostedge.files import sha256
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier
from tests.runtime_fixtures import LABELS, SIZE, pictures, tflite, write_onnx

NAMES = ["Ähre", "bee, honey", "chat 猫", "dog"]
FACTS = Facts("pets", "v7", "Ada", "Apache-2.0", NAMES, PixelContract(SIZE))
MEASURED = "Top-1: 91.20% of 500 test images of pets."


def packed(content: bytes) -> bytes:
    """The metadata flatbuffer of a .tflite."""
    model = Flat(content).model
    (entry,) = (e for e in model.metadata if e.name in ("TFLITE_METADATA", b"TFLITE_METADATA"))
    return bytes(model.buffers[entry.buffer].data)


@pytest.mark.parametrize("kind", ["float32", "float16", "uint8", "int8"])
def test_a_tflite_file_computes_the_same_and_carries_its_labels(tmp_path: Path, kind: str) -> None:
    before, after = tmp_path / "before.tflite", tmp_path / "after.tflite"
    before.write_bytes(tflite(kind))
    shutil.copy(before, after)
    write(after, FACTS, MEASURED)
    plain, described = Classifier(before), Classifier(after)
    np.testing.assert_array_equal(plain.raw(pictures(9)), described.raw(pictures(9)))
    assert described.labels == NAMES
    assert plain.labels == [f"class {i}" for i in range(4)]
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    assert Classifier(after).labels == LABELS
    assert after.stat().st_size - before.stat().st_size < 1500


@pytest.mark.parametrize("kind", ["float32", "float16", "uint8", "int8"])
def test_the_tables_hold_the_facts(kind: str) -> None:
    content = into_tflite(tflite(kind), FACTS, MEASURED)
    table = packed(content)
    assert table[4:8] == b"M001"
    for text in ("pets", "v7", "Ada", "Apache-2.0", "1.0.0", "image", "probabilities"):
        assert text.encode() + b"\0" in table
    assert f"RGB images of {SIZE}x{SIZE} pixels into 4 classes".encode() in table
    assert MEASURED.encode() in table
    assert declared_normalization(content) == (([0.0], [1.0]) if "float" in kind else None)
    members = zipfile.ZipFile(io.BytesIO(content)).infolist()
    assert [(member.filename, member.date_time[0]) for member in members] == [("labels.txt", 1980)]


def test_the_same_facts_give_the_same_bytes() -> None:
    once, again = (into_tflite(tflite("uint8"), FACTS, MEASURED) for _ in range(2))
    assert once == again
    unlicensed = dataclasses.replace(FACTS, licence=None)
    assert b"Apache" not in packed(into_tflite(tflite("uint8"), unlicensed, MEASURED))


def test_an_onnx_file_says_the_same(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx", labels=LABELS)
    before = Classifier(path).raw(pictures(5))
    write(path, FACTS, MEASURED)
    np.testing.assert_array_equal(Classifier(path).raw(pictures(5)), before)
    assert Classifier(path).labels == NAMES
    model = onnx.load(path)
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert model.producer_name == "ghostedge"
    assert json.loads(props.pop("pixels"))["size"] == SIZE
    assert props.pop("description").endswith(f"normalisation and softmax are inside. {MEASURED}")
    assert props == {
        "name": "pets",
        "version": "v7",
        "author": "Ada",
        "license": "Apache-2.0",
        "labels": "\n".join(NAMES),
        "input_range": "0 255",
        "accuracy": MEASURED,
    }


def test_every_model_of_a_bundle_tells_its_own_accuracy(
    bundle: Bundle, trained: Path, tmp_path: Path
) -> None:
    for name in bundle.manifest["artefacts"]:
        top1 = bundle.accuracy[name]
        told = (
            f"Top-1: {top1['validation']:.2f}% of 200 validation images and {top1['test']:.2f}% of "
            "200 test images of drawn."
        )
        content = (bundle.path / name).read_bytes()
        assert told.encode() in content
        assert sha256(trained)[:12].encode() in content
        assert f"ghostedge {ghostedge.__version__}".encode() in content
        alone = shutil.copy(bundle.path / name, tmp_path)
        assert Classifier(alone).labels == bundle.manifest["labels"]
    frame = b"of 96x96 pixels (averaged to 32x32 inside) into 4 classes"
    assert frame in (bundle.path / "model_int8_camera.tflite").read_bytes()


def test_what_is_said_without_labelled_images() -> None:
    parity = Parity(64, 0.984375, 0.1, 0.01)
    stage = Stage("model.onnx", "fp32", {"synthetic": parity})
    bare = accuracy(stage, None, {})
    assert bare == (
        "It names the same class as the float net on 98.44% of 64 synthetic images; no "
        "labelled images were given."
    )
    source = {
        "accuracy": {"test": {"top1": 86.239, "images": 5000}, "int8": {}},
        "data": {"name": "pets"},
    }
    known = " That net's top-1, as its checkpoint records: 86.24% of 5000 test images of pets."
    assert accuracy(stage, None, source) == bare + known


def test_damaged_labels_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    content = into_tflite(tflite("uint8"), FACTS, MEASURED)
    start = content.rindex("Ähre\n".encode())
    path.write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with pytest.raises(GhostEdgeError, match=r"damaged or no \.tflite model"):
        Classifier(path)
    # Another archive behind the model is nobody's labels.
    other = io.BytesIO(tflite("uint8"))
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("notes.txt", "a\nb\nc\nd\n")
    path.write_bytes(other.getvalue())
    assert Classifier(path).labels[0] == "class 0"
