from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from ghostedge.data.sources import open_data
from ghostedge.errors import GhostEdgeError

datasets = pytest.importorskip("torchvision").datasets
savemat = pytest.importorskip("scipy.io").savemat


def test_fashion_mnist_is_grey_as_three_equal_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        for kind, header, content in (
            ("images-idx3", (0x803, 12, 28, 28), images.tobytes()),
            ("labels-idx1", (0x801, 12), bytes([*range(10), 0, 1])),
        ):
            packed = struct.pack(f">{len(header)}i", *header) + content
            (folder / f"{part}-{kind}-ubyte").write_bytes(packed)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(packed))
    monkeypatch.setenv("GHOSTEDGE_DATA", str(tmp_path))
    data = open_data("fashion-mnist")
    assert data.train is not None and data.test is not None
    assert data.classes[-1] == "Ankle boot"
    pixels = data.train.read(28).pixels
    assert pixels.shape == (12, 28, 28, 3)
    np.testing.assert_array_equal(pixels, np.repeat(images[..., None], 3, 3))
    assert data.test.labels.tolist() == [*range(10), 0, 1]
    file = folder / "train-images-idx3-ubyte"
    for content in (file.read_bytes()[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(GhostEdgeError, match=r"or damaged: .* after deleting"):
            open_data("fashion-mnist")


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / datasets.CIFAR100.base_folder
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    names = [f"class {index}" for index in range(100)]
    content: dict[str, object] = {
        "train": {"data": images.reshape(4, -1), "fine_labels": [99, 0, 50, 7]},
        "test": {"data": images.reshape(4, -1), "fine_labels": [1, 2, 3, 4]},
        "meta": {"fine_label_names": names},
    }
    hashes = {}
    for name, what in content.items():
        (folder / name).write_bytes(pickle.dumps(what, protocol=2))
        hashes[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", hashes["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", hashes["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": hashes["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    monkeypatch.setenv("GHOSTEDGE_DATA", str(tmp_path))
    data = open_data("cifar100")
    assert data.train is not None and data.test is not None
    assert data.classes == tuple(names)
    assert data.train.labels.tolist() == [99, 0, 50, 7]
    np.testing.assert_array_equal(data.train.read(32).pixels, images.transpose(0, 2, 3, 1))


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 11), np.uint8)
    lists = {}
    for part in ("train", "test"):
        file = tmp_path / f"{part}_32x32.mat"
        # 10 stands for the digit 0.
        savemat(file, {"X": images, "y": np.arange(11)[:, None] % 10 + 1})
        lists[part] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    monkeypatch.setenv("GHOSTEDGE_DATA", str(tmp_path))
    data = open_data("svhn")
    assert data.train is not None and data.test is not None
    assert data.classes == tuple("0123456789")
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    np.testing.assert_array_equal(data.train.read(32).pixels, images.transpose(3, 0, 1, 2))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(GhostEdgeError, match="SciPy"):
        open_data("svhn")
