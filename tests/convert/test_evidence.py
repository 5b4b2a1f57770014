"""Calibration images are never evaluation images, and are on the scale that the net was trained on."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostedge import checkpoint
from ghostedge.convert.evidence import Evidence, ImageSet, check_pixels, gather
from ghostedge.convert.plan import make_plan
from ghostedge.convert.subject import open_subject
from ghostedge.data.drawn import drawn_source
from ghostedge.errors import GhostEdgeError
from ghostedge.pixels import span


def folder(root: Path, change: Callable[[np.ndarray], np.ndarray], per_class: int = 30) -> Path:
    """Write drawn images as PNGs into train/ and val/ of `root`, their pixels changed."""
    for seed, part in ((11, "train"), (12, "val")):
        source = drawn_source(4, per_class, seed)
        for name, pixels in zip(source.names, source.read(32).pixels, strict=True):
            file = root / part / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(pixels).astype(np.uint8)).save(file)
    return root


def gathered(net: Path, data: Path | str, **options: object) -> Evidence:
    plan = make_plan(str(net), None, {"int8": True, "data": str(data), **options})
    return gather(plan, open_subject(plan))


def test_span_is_of_all_but_the_outermost_pixels() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(100)
    assert span(values) == (1, 254)
    assert span(np.full((2, 4, 4, 3), 7, np.uint8)) == (7, 7)


def test_training_records_the_span(trained: Path) -> None:
    card, _ = checkpoint.read(trained)
    low, high = card.data["pixels"]
    assert low < 20 and high > 235


@pytest.mark.parametrize(
    ("change", "low", "high"),
    [
        (lambda x: np.rint(x / 255), 0, 1),
        (lambda x: x // 17, 0, 15),
        (lambda x: x // 8, 0, 31),
        (lambda x: 200 + x // 10, 200, 225),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_pixels_on_another_scale_are_refused(
    trained: Path,
    tmp_path: Path,
    recorded: bool,
    change: Callable[[np.ndarray], np.ndarray],
    low: int,
    high: int,
) -> None:
    """Both where the checkpoint records the span and where synthetic images stand for it."""
    net = trained
    if not recorded:
        card, tensors = checkpoint.read(trained)
        del card.data["pixels"]
        net = tmp_path / "old.safetensors"
        checkpoint.save(net, card, tensors)
    data = folder(tmp_path / "data", change)
    pattern = rf"images of data/train go from {low} to {high} .* trained on from \d+ to 2\d\d: save"
    with pytest.raises(GhostEdgeError, match=pattern):
        gathered(net, data)


def brightness(images: np.ndarray) -> np.ndarray:
    """Tell pictures brighter than mid-grey from darker ones."""
    mean = images.mean((1, 2, 3)) / 255
    return np.stack([1 - mean, mean], 1)


@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_negatives_are_refused(wrong: float) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 300)
    pictures = generator.integers(0, 128, (300, 24, 24, 3)) + 128 * labels[:, None, None, None]
    labels = np.where(generator.uniform(size=300) < wrong, 1 - labels, labels)
    for images, refused in ((pictures, False), (255 - pictures, True)):
        given = ImageSet(images.astype(np.uint8), labels)
        expected = pytest.raises(GhostEdgeError, match=r"of their negatives: they are inverted")
        with expected if refused else contextlib.nullcontext():
            check_pixels("data", given, [0, 255], brightness)


def test_video_levels_are_refused(trained: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda x: np.rint(16 + x * (219 / 255)))
    with pytest.raises(GhostEdgeError, match=r"go from 16 to 235 .* video levels"):
        gathered(trained, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x // 4,  # at night
        lambda x: 100 + x // 4,  # in fog
        lambda x: 255 - x // 4,  # paper
        lambda x: np.broadcast_to(x.mean(2, keepdims=True), x.shape),
        lambda x: np.rint(20 + x * (200 / 255)),
    ],
)
def test_dark_bright_and_grey_pictures_are_taken(
    trained: Path, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    found = gathered(trained, folder(tmp_path / "data", change))
    assert found.calibration_card["images"] == 120
    assert found.calibration_card["copies_left_out"] == 0


def test_a_net_trained_on_a_small_range_takes_it(trained: Path, tmp_path: Path) -> None:
    card, tensors = checkpoint.read(trained)
    card.data["pixels"] = [0, 15]
    checkpoint.save(tmp_path / "net.safetensors", card, tensors)
    data = folder(tmp_path / "data", lambda x: x // 17)
    assert len(gathered(tmp_path / "net.safetensors", data).calibration) == 120
    with pytest.raises(GhostEdgeError, match=r"go from 0 to 255 .* from 0 to 15: save"):
        gathered(tmp_path / "net.safetensors", folder(tmp_path / "full", lambda x: x))


def test_copied_parts_are_refused(trained: Path, drawn_folder: Path, tmp_path: Path) -> None:
    """Also where only some of the evaluation part is read to check on."""
    data = tmp_path / "data"
    shutil.copytree(drawn_folder / "train", data / "train")
    for part in ("val", "test"):
        shutil.rmtree(data / "test", ignore_errors=True)
        shutil.copytree(drawn_folder / "train", data / part)
        for file in (data / part).rglob("*.png"):
            file.rename(file.with_name(f"copy of {file.name}"))
        name = "validation" if part == "val" else part
        pattern = (
            rf"24 of 24 calibration images of data/train are {name} images too \(.* is .*copy of"
        )
        with pytest.raises(GhostEdgeError, match=pattern):
            gathered(trained, data, calib_samples=24, check_samples=4)
        shutil.rmtree(data / part)


def test_a_few_copies_are_left_out(trained: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda x: x)
    source = sorted((data / "train").rglob("*.png"))[0]
    shutil.copy(source, data / "val" / source.parent.name / "again.png")
    found = gathered(trained, data)
    assert found.calibration_card["copies_left_out"] == 1
    assert len(found.calibration) == 119
    again = np.asarray(Image.open(source).convert("RGB"))
    assert not (found.calibration == again).all((1, 2, 3)).any()


def test_a_class_of_one_image_leaves_none_to_check_on(trained: Path, tmp_path: Path) -> None:
    source = drawn_source(4, 1)
    for pixels, name in zip(source.read(32).pixels, source.names, strict=True):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir()
        Image.fromarray(pixels).save(file)
    with pytest.raises(GhostEdgeError, match="leaves no image for validation: give every class"):
        gathered(trained, str(tmp_path))


def test_a_validation_split_holds_no_calibration_image(trained: Path) -> None:
    found = gathered(trained, "drawn")
    assert found.calibration_card["copies_left_out"] == 0
    calibration = {image.tobytes() for image in found.calibration}
    for name in ("validation", "test"):
        assert not calibration & {image.tobytes() for image in found.sets[name].pixels}


def test_a_set_is_fetched_only_when_asked(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("GHOSTEDGE_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fetch)
    with pytest.raises(GhostEdgeError, match="add --download"):
        gathered(trained, "cifar10")
    with pytest.raises(GhostEdgeError, match=r"Cannot fetch cifar10 .* no network"):
        gathered(trained, "cifar10", download=True)
