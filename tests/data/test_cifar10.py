from __future__ import annotations

import hashlib
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from ghostedge.data.sources import open_data
from ghostedge.errors import GhostEdgeError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_cifar10_jpeg.py"


LABEL_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture
def tiny_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's own files with 4 images in each batch, where `open_data("cifar10")` looks.

    torchvision compares MD5 sums: it is told those of these files, so that its check still runs.
    """
    datasets = pytest.importorskip("torchvision").datasets
    root = tmp_path / "data"
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def written(name: str, content: dict[str, object]) -> list[str]:
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    batches = []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        # Smooth pictures: JPEG keeps them nearly as they are.
        corners = random.integers(0, 256, (4, 3, 2, 2))
        pixels = corners.repeat(16, axis=2).repeat(16, axis=3).astype(np.uint8)
        labels = [(number * 4 + i) % 10 for i in range(4)]
        batches.append(written(name, {"data": pixels.reshape(4, 3072), "labels": labels}))
    meta = written("batches.meta", {"label_names": LABEL_NAMES})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", batches[5:])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    monkeypatch.setenv("GHOSTEDGE_DATA", str(root))
    return root


def test_cifar10(tiny_cifar10: Path) -> None:
    data = open_data("cifar10")
    assert data.train and data.test and data.val is None
    assert data.classes[:2] == ("airplane", "automobile")
    assert (len(data.train), len(data.test)) == (20, 4)
    assert data.train.names[10:12] == ("airplane/00010", "automobile/00011")
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert data.train.read(32).pixels.shape == (20, 32, 32, 3)
    assert data.train.read(24).pixels.shape == (20, 24, 24, 3)


def test_damaged_cifar10_names_the_remedy(tiny_cifar10: Path) -> None:
    with next(tiny_cifar10.rglob("data_batch_3")).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(GhostEdgeError, match="damaged: add --download"):
        open_data("cifar10")


@pytest.mark.parametrize("spec", ["cifar10", "cifar100", "svhn", "fashion-mnist"])
def test_a_set_is_not_fetched_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("GHOSTEDGE_DATA", str(tmp_path))
    with pytest.raises(GhostEdgeError, match="add --download"):
        open_data(spec)
    assert not list(tmp_path.iterdir())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_folder_is_the_data_set_again(
    tiny_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jpeg"
    run(monkeypatch, str(folder))
    made, original = open_data(folder), open_data("cifar10")
    assert made.train and made.test and original.train and original.test
    assert made.classes == original.classes
    assert made.train.names == tuple(f"{c}/{i:04d}.jpg" for c in made.classes for i in range(2))
    assert made.test.names == tuple(f"{c}/0000.jpg" for c in made.classes[:4])
    order = np.argsort(original.train.labels, kind="stable")
    difference = made.train.read(32).pixels - original.train.read(32, order).pixels.astype(int)
    assert np.abs(difference).mean() < 12


def test_quality_75_and_chroma_at_half_size(
    tiny_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, str(tmp_path / "jpeg"))
    with Image.open(tmp_path / "jpeg/train/cat/0000.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        # The JPEG standard's luminance table (16 11 10 16 24 40 51 61), halved as quality 75 is.
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        assert image.quantization[0][:8] == [8, 6, 5, 8, 12, 20, 26, 31]


def test_nothing_is_overwritten_or_fetched_unasked(
    tiny_cifar10: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, str(tmp_path / "mine"))
    assert "exists" in capsys.readouterr().err
    monkeypatch.setenv("GHOSTEDGE_DATA", str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, str(tmp_path / "jpeg"))
    assert "--download" in capsys.readouterr().err
    assert not (tmp_path / "jpeg").exists()
