from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import ghostedge
from ghostedge import checkpoint
from ghostedge.bundle import read_manifest, verify
from ghostedge.convert import Bundle, export, repair, to_onnx
from ghostedge.convert.plan import recipes
from ghostedge.data.images import read_image
from ghostedge.errors import CheckFailed, GhostEdgeError
from ghostedge.models import create, synthetic
from ghostedge.pixels import PixelContract, enlarged
from ghostedge.runtime import Classifier
from tests.export_fixtures import EVERYTHING, WIDTH, hostile

MODELS = {
    "model.onnx",
    "model_int8.onnx",
    "model_fp32.tflite",
    "model_fp16.tflite",
    "model_int8.tflite",
    "model_int8_camera.tflite",
}
REST = {"labels.txt", "golden.npz", "manifest.json", "timings.json", "report.md", "report.html"}


def hashes(bundle: Bundle) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in bundle.manifest["artefacts"].items()}


def test_bundle_holds_everything_and_verifies(bundle: Bundle) -> None:
    assert {file.name for file in bundle.path.iterdir()} == MODELS | REST
    assert verify(bundle).ok
    assert Path(os.fspath(bundle)) == bundle.path


def test_every_stage_is_compared_on_every_set(bundle: Bundle) -> None:
    stages = list(bundle.parity)
    assert stages[:4] == ["unfolded", "folded", "exported ONNX", "model.onnx"]
    assert set(stages[3:]) == MODELS
    for stage in stages:
        assert set(bundle.parity[stage]) == {"synthetic", "validation", "test"}
    for stage in ("folded", "exported ONNX", "model.onnx", "model_fp32.tflite"):
        for parity in bundle.parity[stage].values():
            assert parity["agreement"] == 1
            assert parity["log_difference"] < 1e-4
    for stage in ("model_int8.tflite", "model_int8.onnx"):
        assert bundle.parity[stage]["test"]["agreement"] > 0.9
        assert bundle.parity[stage]["test"]["difference"] > 0
    assert bundle.accuracy["unfolded"]["test"] > 50, (
        "the fixture's net learned too little to test with"
    )


def test_figures_are_what_the_models_do(bundle: Bundle) -> None:
    from ghostedge.data.sources import open_data

    source = open_data("drawn").test
    assert source is not None
    images = source.read(32)
    for name in MODELS:
        model = Classifier(bundle.path / name)
        found = model(enlarged(images.pixels, model.size)).argmax(1)
        assert 100 * (found == images.labels).mean() == pytest.approx(bundle.accuracy[name]["test"])


def test_validation_is_the_split_that_the_checkpoint_records(bundle: Bundle, trained: Path) -> None:
    card, _ = checkpoint.read(trained)
    assert "the split the checkpoint was chosen on" in bundle.manifest["calibration"]["validation"]
    assert bundle.accuracy["unfolded"]["validation"] == pytest.approx(
        card.accuracy["validation"]["top1"]
    )


def test_uint8_input_is_the_raw_pixel_with_a_fixed_scale(bundle: Bundle) -> None:
    model = Classifier(bundle.path / "model_int8.tflite").backend
    details = model.net.get_input_details()[0]  # type: ignore[attr-defined]
    assert details["dtype"] == np.uint8
    assert details["quantization"] == (1 / 64, 128)
    assert (model.dtype, model.step, model.zero_point) == (np.uint8, 1 / 256, 0)


def test_model_onnx_is_portable(bundle: Bundle) -> None:
    model = onnx.load(bundle.path / "model.onnx")
    assert [o.version for o in model.opset_import if not o.domain] == [17]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    kinds = {node.op_type for node in model.graph.node}
    assert not {"BatchNormalization", "Shape", "Identity"} & kinds
    assert Classifier(bundle.path / "model.onnx").labels == bundle.manifest["labels"]


def test_int8_onnx_is_per_channel(bundle: Bundle) -> None:
    graph = onnx.load(bundle.path / "model_int8.onnx").graph
    sides = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    kernels = [
        (sides[node.input[0]], sides[node.input[1]])
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(sides.get(node.input[0], [])) == 4
    ]
    assert len(kernels) > 50
    assert all(scales == kernel[:1] for kernel, scales in kernels)


def test_golden_images_come_from_no_data_set(bundle: Bundle, trained: Path) -> None:
    golden = np.load(bundle.path / "golden.npz")["images"]
    np.testing.assert_array_equal(golden, checkpoint.read(trained)[1][checkpoint.CALIBRATION])


def test_same_input_gives_the_same_bytes(bundle: Bundle, trained: Path, tmp_path: Path) -> None:
    again = export(trained, tmp_path / "b", **EVERYTHING)
    assert hashes(again) == hashes(bundle)
    for name in ("labels.txt", "golden.npz", "manifest.json"):
        assert (again.path / name).read_bytes() == (bundle.path / name).read_bytes(), name


@pytest.mark.parametrize("io", ["int8", "float32"])
def test_io_types_name_the_same_class(
    bundle: Bundle, trained: Path, tmp_path: Path, io: str
) -> None:
    from ghostedge.data.sources import open_data

    other = export(
        trained,
        tmp_path / io,
        **EVERYTHING | {"format": ["tflite"], "io": io, "half": False, "camera": None},
    )
    source = open_data("drawn").test
    assert source is not None
    images = source.read(32).pixels
    uint8, found = (Classifier(b.path / "model_int8.tflite") for b in (bundle, other))
    assert other.manifest["artefacts"]["model_int8.tflite"]["input"]["dtype"] == io
    assert (uint8(images).argmax(1) == found(images).argmax(1)).all()
    if io == "int8":
        assert (uint8.raw(images) == found.raw(images).astype(int) + 128).all()
    else:
        np.testing.assert_allclose(found(images), uint8(images), atol=1 / 256 + 1e-6)


def test_foreign_pixel_contract_odd_size_and_batch(trained: Path, tmp_path: Path) -> None:
    card, tensors = checkpoint.read(trained)
    card.pixels = PixelContract(33, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    file = tmp_path / "foreign.safetensors"
    checkpoint.save(file, card, tensors)
    made = export(file, tmp_path / "out", int8=True, batch=2, opset=18)
    assert made.manifest["pixels"]["size"] == 33
    assert made.manifest["artefacts"]["model_fp32.tflite"]["input"]["shape"] == [2, 33, 33, 3]
    assert made.parity["model_fp32.tflite"]["synthetic"]["agreement"] == 1
    assert verify(made).ok


def test_another_size_than_that_of_the_training(trained: Path, tmp_path: Path) -> None:
    """What the checkpoint measured at its own size is not said of it."""
    card, _ = checkpoint.read(trained)
    assert card.accuracy["validation"]["top1"] > 0
    size = card.pixels.size + 8
    made = export(trained, tmp_path / "out", imgsz=size, format=["onnx"])
    assert "accuracy" not in made.manifest["source"]
    (warning,) = made.manifest["warnings"]
    assert f"trained on images of {card.pixels.size} pixels" in warning
    assert f"--imgsz {size}" in warning


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[] if name == "app" else pytest.mark.slow)
        for name in sorted(recipes())
    ],
)
def test_every_recipe_runs(trained: Path, tmp_path: Path, recipe: str) -> None:
    made = export(trained, tmp_path / "out", recipe=recipe)
    assert "model_int8" in " ".join(made.manifest["artefacts"])
    assert made.manifest["calibration"]["kind"] == "synthetic"
    assert verify(made).ok


def test_a_stage_outside_its_limit_publishes_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "ladder", lambda *_: iter([repair.Variant("plain")]))
    with pytest.raises(CheckFailed, match=r"The stage model_int8\.onnx fails") as failure:
        export(trained, tmp_path / "out", int8=True, format=["onnx"], data="drawn", max_drop=-100.0)
    assert failure.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_int8_that_cannot_hold_is_repaired_without_data(trained: Path, tmp_path: Path) -> None:
    """Channels scaled over three decades: the same function in float, hopeless for plain int8."""
    file = hostile(trained, tmp_path / "hostile.safetensors")
    made = export(file, tmp_path / "out", int8=True, format=["onnx"])
    found = [float(row["same class"].rstrip("%")) for row in made.manifest["attempts"]]
    assert len(found) > 1
    assert found[0] < 90 <= found[-1]


def test_a_size_limit_is_held(trained: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text("[export]\nformat = ['onnx']\n[limits]\nmax_kilobytes = 1.5\n")
    with pytest.raises(CheckFailed, match=r"model\.onnx has .* kB"):
        export(trained, tmp_path / "out", recipe=str(recipe))
    assert list(tmp_path.iterdir()) == [recipe]


def test_no_network_is_used(trained: Path, tmp_path: Path) -> None:
    """Every connection attempt of the export and of its subprocess is refused and noted."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, pathlib\n"
        "def refused(self, address):\n"
        f"    pathlib.Path({str(tmp_path / 'attempts')!r}).open('a').write(f'{{address}}\\n')\n"
        "    raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.socket.connect_ex = refused\n"
        "socket.getaddrinfo = lambda *address, **_: refused(None, address)\n"
    )
    command = [sys.executable, "-c", PROBE, str(trained), str(tmp_path / "out")]
    root = Path(ghostedge.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    subprocess.run(command, env=environment, check=True, cwd=tmp_path)
    assert not (tmp_path / "attempts").exists()
    assert (tmp_path / "out" / "model_fp32.tflite").exists()


PROBE = """
import socket, sys
assert socket.socket.connect.__name__ == "refused"
import ghostedge
ghostedge.export(sys.argv[1], sys.argv[2], format=["tflite"])
"""


def test_killed_export_leaves_the_old_bundle(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = hashes(export(trained, output, format=["onnx"]))
    code = f"import ghostedge; ghostedge.export({str(trained)!r}, {str(output)!r}, int8=True, say=print)"
    root = str(Path(ghostedge.__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("convert to TFLite"):
            time.sleep(0.5)
            os.killpg(child.pid, signal.SIGKILL)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    assert hashes(Bundle(output)) == before
    assert verify(output).ok


def test_two_exports_at_once_do_not_mix(trained: Path, tmp_path: Path) -> None:
    """Each returns what itself measured; the folder holds one of them, whole."""
    output = tmp_path / "out"
    code = (
        "import ghostedge, sys\n"
        f"made = ghostedge.export({str(trained)!r}, {str(output)!r}, format=['onnx'],"
        " opset=int(sys.argv[1]))\n"
        f"print(made.path == __import__('pathlib').Path({str(output)!r}), made.manifest['opset'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ghostedge.__file__).parents[1])}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, opset], stdout=subprocess.PIPE, text=True, env=environment
        )
        for opset in ("17", "18")
    ]
    said = [child.communicate()[0] for child in children]
    assert said == ["True 17\n", "True 18\n"]
    opset = onnx.load(output / "model.onnx").opset_import[0].version
    assert read_manifest(output)["opset"] == opset
    assert verify(output).ok
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_data_of_other_classes_is_refused(
    trained: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / "unheard of").mkdir(parents=True)
    source = next((drawn_folder / "train").rglob("*.png"))
    for folder in ("unheard of", source.parent.name):
        target = tmp_path / "data" / folder / "a.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    with pytest.raises(GhostEdgeError, match="unheard of"):
        export(trained, tmp_path / "out", int8=True, data=str(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


def test_other_data_than_the_checkpoint_records_is_said(
    trained: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    made = export(
        trained,
        tmp_path / "out",
        int8=True,
        format=["onnx"],
        data=str(drawn_folder),
        max_drop=50.0,
        calib_samples=20,
        check_samples=8,
    )
    card = made.manifest["calibration"]
    assert (card["images"], card["kind"]) == (20, "real")
    assert "not known to be the data that it was trained on" in card["validation"]
    assert made.parity["unfolded"]["validation"]["images"] == 8
    assert made.parity["unfolded"]["test"]["images"] == 8


def test_report_stands_alone_and_says_what_it_was_calibrated_on(bundle: Bundle) -> None:
    page = (bundle.path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page and "<script" not in page
    for text in (page, (bundle.path / "report.md").read_text()):
        assert "images of the training part of drawn" in text
        assert all(name in text for name in MODELS)
    assert (
        json.loads((bundle.path / "timings.json").read_text())["seconds"]["convert to TFLite"] > 0
    )


def test_an_export_that_computes_otherwise_stops_where_it_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = to_onnx.simplified

    def wrong(*arguments: Any) -> onnx.ModelProto:
        model = right(*arguments)
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
        values = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(1.05 * values, weight.name))
        return model

    monkeypatch.setattr(to_onnx, "simplified", wrong)
    with pytest.raises(CheckFailed, match=r"The stage model\.onnx fails"):
        export(trained, tmp_path / "out", format=["onnx"])
    assert list(tmp_path.iterdir()) == []


def test_fp32_is_held_to_less_than_fp16() -> None:
    from ghostedge.convert.check import Stage, compare, judge
    from ghostedge.convert.evidence import ImageSet
    from ghostedge.convert.plan import Limits

    images = ImageSet(np.zeros((8, 32, 32, 3), np.uint8))
    generator = np.random.default_rng(0)
    reference = generator.dirichlet(np.ones(4), 8).astype(np.float32)
    off = 1.01 * reference
    for precision, fails in (("fp32", True), ("fp16", False)):
        stage = Stage("model_x", precision, {"synthetic": compare(reference, off, images)})
        if fails:
            with pytest.raises(
                CheckFailed, match="The stage model_x fails its check on 8 synthetic"
            ):
                judge(stage, Limits())
        else:
            judge(stage, Limits())


def test_net_of_many_classes_and_width_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained three-branch net of 100 classes passes all float stages."""
    monkeypatch.setattr(synthetic, "STEPS", 1)
    arguments = {"num_classes": 100, "width": WIDTH, "branches": 3}
    net = create("ghostnetv3-small", **arguments)
    labels = [f"thing {i}" for i in range(100)]
    card = checkpoint.Checkpoint("ghostnetv3-small", arguments, labels, PixelContract(24))
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    checkpoint.save(tmp_path / "net.safetensors", card, tensors)
    made = export(tmp_path / "net.safetensors", tmp_path / "out", format=["onnx"])
    assert made.parity["model.onnx"]["synthetic"]["agreement"] == 1
    assert made.manifest["calibration"] is None


def test_the_guides_program_without_ghostedge(bundle: Bundle, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    guide = (root / "export" / "README.md").read_text("utf-8")
    (program,) = (
        code
        for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
        if "Interpreter" in code
    )
    (tmp_path / "mine").symlink_to(bundle.path)
    shutil.copy(root / "ghostedge" / "photos" / "cat.jpg", tmp_path)
    program += "print(scores.tolist())"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True
    )
    pixels = read_image(tmp_path / "cat.jpg", 32)
    expected = Classifier(bundle.path / "model_int8.tflite")(pixels[None])[0]
    np.testing.assert_allclose(json.loads(told.stdout), expected, atol=2 / 256)
