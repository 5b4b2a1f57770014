from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghostedge.data.drawn import FIGURES, draw, drawn_set, drawn_source
from ghostedge.data.sources import open_data
from ghostedge.errors import GhostEdgeError


def test_the_same_every_time_and_different_by_seed_and_number() -> None:
    first, again, other = (
        drawn_set(per_class=8),
        drawn_set(per_class=8),
        drawn_set(per_class=8, seed=1),
    )
    assert first.pixels.shape == (32, 32, 32, 3)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert (
        len(np.unique(np.concatenate([first.pixels, other.pixels]).reshape(64, -1), axis=0)) == 64
    )
    assert np.bincount(first.labels).tolist() == [8] * 4


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("size", [24, 33, 256])
def test_a_picture_is_the_same_at_every_size(figure: str, size: int) -> None:
    pixels = draw(figure, "0/0001", size)
    assert (pixels.shape, pixels.dtype) == ((size, size, 3), np.uint8)
    small, large = (
        np.asarray(Image.fromarray(p).resize((24, 24), Image.Resampling.BOX), float)
        for p in (pixels, draw(figure, "0/0001", 96))
    )
    assert np.abs(small - large).mean() < 15


def test_figure_stands_out() -> None:
    for figure in FIGURES:
        for number in range(20):
            assert draw(figure, str(number), 32).std((0, 1)).max() > 15, (figure, number)


def test_named_set() -> None:
    data = open_data("drawn")
    assert data.train and data.test
    assert data.classes == ("circle", "cross", "square", "triangle") == data.test.classes
    assert (len(data.train), len(data.test), data.val) == (800, 200, None)
    assert data.train.fingerprint != data.test.fingerprint == open_data("drawn").test.fingerprint  # type: ignore[union-attr]
    assert len(open_data("drawn:10").classes) == 10
    assert drawn_source(2, 3).names == tuple(
        f"{c}/000{i}" for c in ("circle", "square") for i in range(3)
    )


@pytest.mark.parametrize("spec", ["drawn:1", "drawn:11", "drawn:", "drawn:many", "drawn:-2"])
def test_no_such_set(spec: str) -> None:
    with pytest.raises(GhostEdgeError, match="2 to 10"):
        open_data(spec)


def test_the_folder_fixture(drawn_folder: Path) -> None:
    data = open_data(drawn_folder)
    assert data.train and data.test
    assert (len(data.classes), len(data.train), len(data.test)) == (4, 96, 48)
    np.testing.assert_array_equal(data.train.read(32).pixels, drawn_source(4, 24).read(32).pixels)
