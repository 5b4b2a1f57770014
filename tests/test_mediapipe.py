"""The real MediaPipe on our files, in an environment of its own (`make test` makes it)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghostedge.convert import Bundle, export
from ghostedge.data.drawn import drawn_set
from ghostedge.pixels import enlarged
from ghostedge.runtime import Classifier
from tests.export_fixtures import EVERYTHING

PYTHON = Path(__file__).parents[1] / ".venv-mediapipe/bin/python"
CLIENT = Path(__file__).with_name("mediapipe_client.py")
PLAIN, CAMERA = "model_int8.tflite", "model_int8_camera.tflite"

pytestmark = [
    pytest.mark.skipif(
        not PYTHON.exists(), reason="no .venv-mediapipe: `make test` makes it, with mediapipe in it"
    ),
]


def ask(folder: Path, images: np.ndarray, models: list[Path]) -> list[dict[str, Any]]:
    """Return what the client found of each model; skip where MediaPipe's libraries are missing."""
    np.save(folder / "images.npy", images)
    command = [PYTHON, CLIENT, folder / "images.npy", *models]
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot open shared object file" in done.stderr:
        pytest.skip(f"{done.stderr.splitlines()[-1]} (.ci/system-packages.sh lists the packages)")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


@pytest.fixture(scope="module")
def floating(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle with float input and output around the int8 model."""
    options = {**EVERYTHING, "io": "float32", "half": False, "format": ["tflite"]}
    return export(trained, tmp_path_factory.mktemp("floating") / "out", **options)


def test_labels_top1_and_scores_are_the_interpreters(
    bundle: Bundle, floating: Bundle, tmp_path: Path
) -> None:
    images = drawn_set(4, 25, seed=3).pixels
    models = [bundle.path / name for name in (PLAIN, "model_fp32.tflite", "model_fp16.tflite")]
    models.append(floating.path / PLAIN)
    for path, found in zip(models, ask(tmp_path, images, models), strict=True):
        model = Classifier(path)
        own, scores = model(images), np.array(found["scores"], np.float32)
        assert found["labels"] == model.labels == bundle.manifest["labels"]
        assert (scores.argmax(1) == own.argmax(1)).all()
        assert np.abs(scores - own).max() <= 1 / 256
        exact = float((scores == own).mean())
        print(f"{path.name}: {exact:.2%} of the scores are exact")
        # All are, of every model, with MediaPipe 1.2.2 and LiteRT 2.1.0; other kernels may round apart.
        assert exact > 0.9 or path.name != PLAIN


def test_metadata_is_what_mediapipes_own_schema_reads(
    bundle: Bundle, floating: Bundle, tmp_path: Path
) -> None:
    models = [bundle.path / PLAIN, floating.path / PLAIN]
    uint8, float32 = ask(tmp_path, drawn_set(4, 1).pixels, models)
    for found, folder in ((uint8, bundle), (float32, floating)):
        said = found["metadata"]
        assert said["name"] == bundle.manifest["name"]
        assert said["version"] == bundle.manifest["source"]["sha256"][:12]
        assert said["author"].startswith("ghostedge")
        assert said["license"] is None
        assert said["minParserVersion"] == "1.0.0"
        top1 = folder.accuracy[PLAIN]["test"]
        assert f"{top1:.2f}% of 200 test images of drawn" in said["description"]
        (graph,) = said["subgraphMetadata"]
        (image,), (scores,) = graph["inputTensorMetadata"], graph["outputTensorMetadata"]
        assert (image["name"], scores["name"]) == ("image", "probabilities")
        assert image["content"]["contentPropertiesType"] == 2
        assert image["content"]["contentProperties"]["colorSpace"] == 1
        assert image["stats"] == {"max": [255.0], "min": [0.0]}
        assert scores["stats"] == {"max": [1.0], "min": [0.0]}
        (labels,) = scores["associatedFiles"]
        assert (labels["name"], labels["type"]) == ("labels.txt", 2)
    uint8, float32 = (
        found["metadata"]["subgraphMetadata"][0]["inputTensorMetadata"][0]["processUnits"]
        for found in (uint8, float32)
    )
    assert uint8 is None
    assert float32 == [{"optionsType": 1, "options": {"mean": [0.0], "std": [1.0]}}]


def test_what_it_refuses(trained: Path, tmp_path: Path) -> None:
    made = export(trained, tmp_path / "out", int8=True, io="int8", batch=2, format=["tflite"])
    models = [made.path / PLAIN, made.path / "model_fp32.tflite"]
    signed, pair = ask(tmp_path, drawn_set(4, 1).pixels, models)
    assert "uint8/float32, got INT8" in signed["error"]
    assert "1 x height x width x depth" in pair["error"]


def test_a_frame_of_the_cameras_size(bundle: Bundle, floating: Bundle, tmp_path: Path) -> None:
    """Without a resize by MediaPipe its scores are those of the plain model on block averages."""
    images = drawn_set(4, 10, seed=3).pixels
    models = [made.path / CAMERA for made in (bundle, floating)]
    for path, found in zip(models, ask(tmp_path, enlarged(images, 96), models), strict=True):
        own = Classifier(path.with_name(PLAIN))(images)
        np.testing.assert_allclose(found["scores"], own, atol=1 / 256 + 1e-6)


def test_noisy_large_photos(bundle: Bundle, tmp_path: Path) -> None:
    """MediaPipe shrinks photos without averaging: noise reaches the plain model, less the camera's."""
    photos = drawn_set(4, 25, seed=5, size=448)
    noise = np.random.default_rng(0).normal(0, 60, photos.pixels.shape)
    noisy = np.clip(photos.pixels + noise, 0, 255).astype(np.uint8)
    averaged = noisy.reshape(-1, 32, 14, 32, 14, 3).mean((2, 4))
    wanted = Classifier(bundle.path / PLAIN)(np.floor(averaged + 0.5).astype(np.uint8))
    models = [bundle.path / name for name in (PLAIN, CAMERA)]
    apart, same = [], []
    for found in ask(tmp_path, noisy, models):
        scores = np.array(found["scores"])
        apart.append(float(np.abs(scores - wanted).mean()))
        same.append(float((scores.argmax(1) == wanted.argmax(1)).mean()))
    print(f"mean difference of probability {apart}, same class {same}: plain, camera")
    assert apart[1] < 0.06 < apart[0] / 2
    assert same[1] > 0.7 > same[0]
