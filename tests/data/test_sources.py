from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ghostedge.data.images import read_image
from ghostedge.data.sources import (
    ArraySource,
    Source,
    match_classes,
    open_data,
    require_classes,
    split,
)
from ghostedge.errors import GhostEdgeError


def fill(root: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (shade, 0, 0)).save(path)
    return root


def listed(names: list[str]) -> Source:
    classes = tuple(sorted({name.split("/")[0] for name in names}))
    labels = [classes.index(name.split("/")[0]) for name in names]
    return Source("listed", classes, tuple(names), np.array(labels, np.int64))


# --- Folders ---------------------------------------------------------------------------------


def test_parts_and_order(tmp_path: Path) -> None:
    fill(tmp_path, "train/b/2.png", "train/b/1.png", "train/Z/1.png", "train/a/x/1.png")
    fill(tmp_path, "test/b/9.png", "val/a/7.png")
    data = open_data(str(tmp_path))
    assert data.train and data.val and data.test
    assert (data.name, data.classes) == (tmp_path.name, ("Z", "a", "b"))
    assert data.train.names == ("Z/1.png", "a/x/1.png", "b/1.png", "b/2.png")
    assert data.train.labels.tolist() == [0, 1, 2, 2]
    assert data.train.labels.dtype == np.int64
    images = data.train.read(24)
    assert images.pixels[:, 0, 0, 0].tolist() == [2, 3, 1, 0]
    assert data.test.classes == data.val.classes == data.classes
    assert (data.test.names, data.test.labels.tolist()) == (("b/9.png",), [2])
    assert (data.val.names, data.val.labels.tolist()) == (("a/7.png",), [1])


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
def test_names_of_parts(tmp_path: Path, val: str) -> None:
    data = open_data(fill(tmp_path, "Training/a/1.png", f"{val}/a/2.png", "TEST/a/3.png"))
    assert data.train and data.val and data.test
    assert [s.names for s in (data.train, data.val, data.test)] == [
        ("a/1.png",),
        ("a/2.png",),
        ("a/3.png",),
    ]


def test_two_folders_for_one_part(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "val/a/1.png", "valid/a/1.png")
    with pytest.raises(GhostEdgeError, match="both val/ and valid/"):
        open_data(tmp_path)


def test_folder_of_classes(tmp_path: Path) -> None:
    data = open_data(fill(tmp_path, "cat/1.png", "test/1.png"))
    assert data.train and data.train.names == ("cat/1.png", "test/1.png")
    assert data.val is data.test is None


def test_only_a_test_part(tmp_path: Path) -> None:
    data = open_data(fill(tmp_path, "test/cat/1.png", "test/ant/1.png"))
    assert data.train is data.val is None
    assert data.test and data.test.names == ("ant/1.png", "cat/1.png")
    with pytest.raises(GhostEdgeError, match="no images to train on"):
        require_classes(data)


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    for name in (".DS_Store", "Thumbs.db", "._1.png", "desktop.ini"):
        (tmp_path / "a" / name).write_bytes(b"\0")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        fill(tmp_path, f"{name}/1.png")
    (tmp_path / "README.md").write_text("About this set.")
    data = open_data(tmp_path)
    assert data.train and data.train.names == ("a/1.png", "b/1.png")
    assert data.skipped == ()


def test_notes_beside_pictures_are_none(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "photo").write_bytes((tmp_path / "a" / "1.png").read_bytes())
    (tmp_path / "a" / "1.json").write_text("{}")
    (tmp_path / "a" / "1.TXT").write_text("0 0.5 0.5 1 1")
    (tmp_path / "b" / "1.xml").write_text("<a/>")
    data = open_data(tmp_path)
    assert data.train and data.train.names == ("a/1.png", "a/photo", "b/1.png")
    assert data.skipped == ()


def test_pictures_outside_classes_and_broken_links_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/1.png", "stray.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    data = open_data(tmp_path)
    assert data.train and data.train.names == ("a/1.png", "b/1.png")
    assert sorted(name for name, _ in data.skipped) == [
        "a/gone.png",
        "a/loop",
        "a/up",
        "b/pipe.png",
        "stray.png",
    ]


@pytest.mark.parametrize("target", ["nowhere/cat", "cat"])
def test_a_link_to_nowhere_may_be_a_class(tmp_path: Path, target: str) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "cat").symlink_to(target)
    with pytest.raises(
        GhostEdgeError, match="cat is a link that leads nowhere, perhaps to a class"
    ):
        open_data(tmp_path)


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    fill(tmp_path, "store/1.png", "store/deep/2.png", "data/b/1.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "store")
    data = open_data(tmp_path / "data")
    assert data.train and data.train.names == ("a/1.png", "a/deep/2.png", "b/1.png")


def test_one_class_can_be_opened_but_not_trained_on(tmp_path: Path) -> None:
    data = open_data(fill(tmp_path, "test/cat/1.png", "train/cat/1.png"))
    assert data.classes == ("cat",)
    with pytest.raises(GhostEdgeError, match="at least two"):
        require_classes(data)
    fill(tmp_path, "train/dog/1.png")
    require_classes(open_data(tmp_path))


@pytest.mark.parametrize("name", ["cat\nx", "cat\r", "cat\x85", "cat\u2028x", " "])
def test_a_class_whose_name_is_no_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(GhostEdgeError, match="one name a line: rename its folder"):
        require_classes(open_data(fill(tmp_path, f"{name}/1.png", "dog/1.png")))


def test_class_that_train_does_not_have(tmp_path: Path) -> None:
    fill(tmp_path, "train/airplane/1.png", "train/truck/1.png", "test/aeroplane/1.png")
    with pytest.raises(GhostEdgeError, match=r"test/aeroplane .*Did you mean airplane\?"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("names", "spec", "message"),
    [
        ((), "missing", "There is no folder"),
        ((), "", "holds no images"),
        (("1.png",), "1.png", "is a file"),
        (("1.png", "2.png"), "", "has images but no class folders"),
        (("train/1.png", "test/a/1.png"), "", "has images but no class folders"),
    ],
)
def test_no_data(tmp_path: Path, names: tuple[str, ...], spec: str, message: str) -> None:
    fill(tmp_path, *names)
    with pytest.raises(GhostEdgeError, match=message) as caught:
        open_data(tmp_path / spec)
    assert str(tmp_path) in str(caught.value)


def test_empty_class(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "c").mkdir()
    with pytest.raises(GhostEdgeError, match=r"class folder .*c holds no images"):
        open_data(tmp_path)


def test_misspelt_set() -> None:
    with pytest.raises(GhostEdgeError, match=r"Did you mean cifar10"):
        open_data("cifar-10")


def test_names_compare_in_nfc(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    data = open_data(fill(tmp_path, f"train/{apart}/é.png", f"test/{composed}/1.png"))
    assert data.train and data.test
    assert data.train.classes == data.test.classes == (composed,)
    assert unicodedata.is_normalized("NFC", data.train.names[0])
    assert len(data.train.read(24)) == 1
    assert match_classes([apart], ["tea", composed]).tolist() == [1]


def test_name_that_is_no_utf8(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    os.rename(tmp_path / "a" / "1.png", os.fsencode(tmp_path / "a") + b"/\xff.png")
    source = open_data(tmp_path).train
    assert source and len(source.fingerprint) == 64
    assert len(split(source, 0.5, 0)[1]) == 1
    assert len(source.read(24)) == 3
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(GhostEdgeError, match=r"class folder 'caf.*no UTF-8: rename it"):
        open_data(tmp_path)


# --- Reading ---------------------------------------------------------------------------------


def test_broken_files_are_left_out_and_listed(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(100)))
    whole = (tmp_path / "a" / "7.png").read_bytes()
    (tmp_path / "a" / "7.png").write_bytes(b"")
    (tmp_path / "b" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "notes.doc").write_text("not a picture")
    source = open_data(tmp_path).train
    assert source
    images = source.read(24)
    assert len(source) == 201
    assert [name for name, _ in images.skipped] == ["a/7.png", "b/3.png", "b/notes.doc"]
    assert images.skipped[0][1] == "the file is empty"
    assert len(images) == len(images.labels) == len(images.indices) == 198
    assert images.pixels.flags.c_contiguous
    for row, index in enumerate(images.indices):
        assert images.labels[row] == source.labels[index]
        expected = read_image(tmp_path / source.names[index], 24)
        np.testing.assert_array_equal(images.pixels[row], expected)


def test_chosen_indices_in_their_order(tmp_path: Path) -> None:
    source = open_data(fill(tmp_path, "a/0.png", "a/1.png", "b/2.png")).train
    assert source
    images = source.read(24, indices=[2, 0])
    assert images.indices.tolist() == [2, 0]
    assert images.labels.tolist() == [1, 0]
    assert images.pixels[:, 0, 0, 0].tolist() == [2, 0]
    assert len(source.read(24, indices=[])) == 0


def test_nothing_readable(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png")
    for name in ("b/1.png", "b/2.png"):
        (tmp_path / name).write_bytes(b"")
    source = open_data(tmp_path).train
    assert source
    with pytest.raises(GhostEdgeError, match=r"class 'b' .*\(b/1.png: the file is empty\)"):
        source.read(24)
    with pytest.raises(GhostEdgeError, match="None of 2 images"):
        source.read(24, indices=[2, 3])
    (tmp_path / "b/2.png").write_bytes((tmp_path / "a/2.png").read_bytes())
    assert len(source.read(24, indices=[0, 2])) == 1  # the class has another image


def test_more_than_fits_into_memory() -> None:
    source = listed([f"a/{i}" for i in range(1000)])
    with pytest.raises(GhostEdgeError, match="GB of memory"):
        source.read(10**7)


def test_fingerprint(tmp_path: Path) -> None:
    def mark() -> str:
        source = open_data(tmp_path).train
        assert source
        return source.fingerprint

    fill(tmp_path, "a/1.png", "b/1.png")
    first = mark()
    assert first == mark()
    with (tmp_path / "a/1.png").open("ab") as file:
        file.write(b"\0")
    second = mark()
    (tmp_path / "a/1.png").rename(tmp_path / "a/2.png")
    assert len({first, second, mark()}) == 3


def test_array_source() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    names = ("a/0", "b/1", "a/2")
    source = ArraySource("arrays", ("a", "b"), names, np.array([0, 1, 0]), array)
    np.testing.assert_array_equal(source.read(32).pixels, array)
    assert source.read(48).pixels.shape == (3, 48, 48, 3)
    other = array.copy()
    other[0, 0, 0, 0] ^= 1
    changed = ArraySource("arrays", ("a", "b"), names, source.labels, other)
    assert source.fingerprint != changed.fingerprint


def test_only_numpy_and_pillow_are_imported() -> None:
    code = (
        "import sys, ghostedge.data.sources, ghostedge.data.drawn\n"
        "assert not {'torch', 'torchvision', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Split and classes -----------------------------------------------------------------------


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
    order=st.randoms(use_true_random=False),
)
def test_split(counts: list[int], fraction: float, seed: int, order: object) -> None:
    names = [f"class{label}/{i}.jpg" for label, n in enumerate(counts) for i in range(n)]
    source = listed(names)
    train, val = split(source, fraction, seed)
    assert train.dtype == val.dtype == np.int64
    assert sorted([*train, *val]) == list(range(len(names)))  # complete and disjoint
    assert sorted(train) == list(train)
    assert sorted(val) == list(val)
    for label, n in enumerate(counts):
        chosen = int((source.labels[val] == label).sum())
        assert chosen == 0 if n == 1 else 1 <= chosen <= n - 1
        assert n == 1 or abs(chosen - fraction * n) <= 0.5 or chosen in (1, n - 1)
    order.shuffle(names)  # type: ignore[attr-defined]
    again = listed(names)
    assert {again.names[i] for i in split(again, fraction, seed)[1]} == {
        source.names[i] for i in val
    }


def test_split_stays_what_it_was() -> None:
    # Checkpoints record fraction and seed only: another rule would leak training images.
    source = listed([f"{c}/{i:02d}.jpg" for c in "ab" for i in range(20)])
    assert split(source, 0.1, 0)[1].tolist() == [8, 14, 28, 35]
    assert split(source, 0.1, 1)[1].tolist() != [8, 14, 28, 35]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_split_of_nothing(fraction: float) -> None:
    with pytest.raises(GhostEdgeError, match="between 0 and 1"):
        split(listed(["a/1", "a/2"]), fraction, 0)


def test_match_classes() -> None:
    assert match_classes(["b", "a"], ["a", "x", "b"]).tolist() == [2, 0]
    assert match_classes([], ["a"]).dtype == np.int64
    with pytest.raises(GhostEdgeError, match=r"'automobil' .* Did you mean automobile\?"):
        match_classes(["automobil"], ["truck", "automobile"])
    with pytest.raises(GhostEdgeError, match="knows twice"):
        match_classes(["crane"], ["crane", "crane"])
