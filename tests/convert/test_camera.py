from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ghostedge.bundle import verify
from ghostedge.convert import Bundle, export
from ghostedge.convert import camera as module
from ghostedge.convert.camera import camera
from ghostedge.convert.rewrites.flat import OPS, Flat
from ghostedge.errors import CheckFailed, GhostEdgeError
from ghostedge.pixels import enlarged
from ghostedge.runtime import Classifier
from tests.convert.flat_fixtures import operators
from tests.runtime_fixtures import SIZE, expected, pictures, tflite

PLAIN, CAMERA = "model_int8.tflite", "model_int8_camera.tflite"


def frames(count: int, side: int) -> np.ndarray:
    """Noisy large photos: their blocks average to any value, halves too."""
    noise = np.random.default_rng(1).integers(-90, 91, (count, side, side, 3))
    return np.clip(enlarged(pictures(count), side) + noise, 0, 255).astype(np.uint8)


def blocks(images: np.ndarray) -> np.ndarray:
    """The exact mean of each block, float64 (N, SIZE, SIZE, 3)."""
    factor = images.shape[1] // SIZE
    return images.reshape(-1, SIZE, factor, SIZE, factor, 3).mean((2, 4))


def both(folder: Path, io: str, side: int, kernels: str) -> tuple[Classifier, Classifier]:
    made = []
    for name, content in (("plain", tflite(io)), ("large", camera(tflite(io), side))):
        (folder / f"{name}.tflite").write_bytes(content)
        made.append(Classifier(folder / f"{name}.tflite", kernels=kernels))
    return made[0], made[1]


@pytest.mark.parametrize("side", [2 * SIZE, 3 * SIZE, 20 * SIZE])
def test_enlarged_images_average_to_the_images_and_to_nothing_else(side: int) -> None:
    images = pictures(4)
    large = enlarged(images, side)
    assert (large.shape, large.dtype) == ((4, side, side, 3), np.uint8)
    np.testing.assert_array_equal(blocks(large), images)
    factor, inside = side // SIZE, (images > 9) & (images < 246)
    for row in range(factor):
        for column in range(factor):
            picked = large[:, row::factor, column::factor].astype(int)
            centre = factor % 2 and row == column == factor - 1
            assert bool(centre) == (np.abs(picked - images)[inside] < 9).all()
    assert enlarged(images, SIZE) is images


@pytest.mark.parametrize("kernels", ["default", "reference"])
@pytest.mark.parametrize("side", [2 * SIZE, 3 * SIZE, 20 * SIZE])
@pytest.mark.parametrize("io", ["uint8", "int8"])
def test_a_block_is_read_as_its_rounded_mean(
    tmp_path: Path, io: str, side: int, kernels: str
) -> None:
    plain, large = both(tmp_path, io, side, kernels)
    assert large.size == side
    images = frames(8, side)
    mean = blocks(images)
    if io == "uint8":
        rounded = np.floor(mean + 0.5)
    else:  # of what the input holds, half away from zero
        held = mean - 128
        rounded = np.copysign(np.floor(np.abs(held) + 0.5), held) + 128
    np.testing.assert_array_equal(large.raw(images), plain.raw(rounded.astype(np.uint8)))
    np.testing.assert_array_equal(large.raw(enlarged(pictures(8), side)), plain.raw(pictures(8)))


def test_a_float_input_is_averaged_without_rounding(tmp_path: Path) -> None:
    _, large = both(tmp_path, "float32", 5 * SIZE, "default")
    images = frames(8, 5 * SIZE)
    np.testing.assert_allclose(large(images), expected(blocks(images)), atol=1e-5)


def test_it_costs_one_operator_outside_the_delegate(bundle: Bundle) -> None:
    plain, large = ((bundle.path / name).read_bytes() for name in (PLAIN, CAMERA))
    assert len(large) - len(plain) < 400
    assert [Flat(large).kind(op) for op in Flat(large).graph.operators] == [
        OPS.AVERAGE_POOL_2D,
        *(Flat(plain).kind(op) for op in Flat(plain).graph.operators),
    ]
    assert operators(large)["DELEGATE"] == 1


def test_the_bundle_knows_its_camera_model(bundle: Bundle) -> None:
    listed = bundle.manifest["artefacts"]
    assert listed[CAMERA]["input"]["shape"] == [1, 96, 96, 3]
    assert listed[CAMERA]["output"] == listed[PLAIN]["output"]
    assert bundle.parity[CAMERA] == bundle.parity[PLAIN]
    with np.load(bundle.path / "golden.npz") as golden:
        for kernels in ("default", "reference"):
            found, same = (golden[f"{name}:{kernels}"] for name in (CAMERA, PLAIN))
            np.testing.assert_array_equal(found, same)
    rows = {(row.artefact, row.kernels): row for row in verify(bundle).rows}
    assert all(rows[CAMERA, kernels].exact == 1 for kernels in ("default", "reference"))
    model = Classifier(bundle.path / CAMERA)
    assert (model.size, model.labels) == (96, bundle.manifest["labels"])
    assert Classifier(bundle).path.name == PLAIN


def test_a_size_that_is_no_multiple_is_refused(trained: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(GhostEdgeError, match=r"--camera 100 is no multiple .* 32: 224 is one"):
        export(trained, tmp_path / "out", int8=True, camera=100, say=steps.append)
    assert steps == ["load and fold"]


def test_a_model_that_does_not_average_is_caught(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def highest(content: bytes, side: int) -> bytes:
        model = Flat(camera(content, side))
        model.set_kind(model.graph.operators[0], OPS.MAX_POOL_2D, 1)
        return bytes(model)

    monkeypatch.setattr(module, "camera", highest)
    # Nothing is judged but that the two give the same.
    recipe = tmp_path / "lax.toml"
    recipe.write_text("[limits]\nmin_agreement = 0.0\n")
    with pytest.raises(CheckFailed, match="large images that average to the checked ones"):
        export(
            trained,
            tmp_path / "out",
            recipe=str(recipe),
            int8=True,
            format=["tflite"],
            camera=64,
        )
    assert not (tmp_path / "out").exists()
