from __future__ import annotations

import numpy as np
import pytest
import torch

from ghostedge.training.batches import GREY, Batch, Batches
from ghostedge.training.recipe import Recipe


def numbered(count: int, size: int = 24) -> np.ndarray:
    """Images that tell which they are, wherever one looks: number in red, place in green, blue."""
    images = np.empty((count, size, size, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = np.arange(size)[:, None]
    images[..., 2] = np.arange(size)
    return images


def batches(count: int, batch: int = 8, size: int = 24) -> Batches:
    labels = 100 + np.arange(count)
    return Batches(numbered(count, size), labels, batch, torch.device("cpu"))


def pixels(batch: Batch) -> np.ndarray:
    assert batch.views.dtype == torch.uint8
    assert batch.views.is_contiguous(memory_format=torch.channels_last)
    return batch.views.permute(0, 2, 3, 1).numpy()


def epoch(served: Batches, number: int = 0, **recipe: object) -> tuple[np.ndarray, np.ndarray]:
    """Return an epoch's images, uint8 NHWC, and labels."""
    found = list(served.shuffled(Recipe(**recipe), number))  # type: ignore[arg-type]
    labels = torch.cat([batch.labels for batch in found]).numpy()
    return np.concatenate([pixels(batch) for batch in found]), labels


def cut_out(image: np.ndarray, down: int, right: int, mirror: bool, border: str) -> np.ndarray:
    """Mirror, then move up and left, out of the picture continued at its borders, pixel by pixel."""
    size = len(image)
    if mirror:
        image = image[:, ::-1]
    result = np.zeros_like(image)
    for row in range(size):
        for column in range(size):
            y, x = row + down, column + right
            if border == "reflect":
                y, x = (size - 1 - abs(size - 1 - abs(v)) for v in (y, x))
            if 0 <= y < size and 0 <= x < size:
                result[row, column] = image[y, x]
    return result


def test_every_image_once_in_order() -> None:
    found = list(batches(20).in_order())
    assert [len(batch.labels) for batch in found] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate([pixels(b) for b in found]), numbered(20))
    np.testing.assert_array_equal(torch.cat([b.labels for b in found]), 100 + np.arange(20))


def test_an_epoch_holds_no_image_twice_and_leaves_out_less_than_a_batch() -> None:
    served = batches(20)
    assert served.steps == 2
    left_out = set()
    for number in range(30):
        _, labels = epoch(served, number=number)
        assert len(labels) == len(set(labels)) == 16
        left_out |= set(range(100, 120)) - set(labels)
    assert left_out == set(range(100, 120)), "always the same images are left out"


def test_seed_and_epoch_decide_everything() -> None:
    everything = {"cutout": 0.3, "mixup": 1.0}
    first = epoch(batches(20), 7, seed=3, **everything)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    again = epoch(batches(20), 7, seed=3, **everything)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    for seed, number in ((3, 8), (4, 7)):
        other = epoch(batches(20), number, seed=seed, **everything)
        assert (first[1] != other[1]).any()
        assert (first[0] != other[0]).any()


def test_labels_stay_with_their_images() -> None:
    images, labels = epoch(batches(50))
    assert (images[..., 0] == (labels - 100)[:, None, None]).all()


def test_an_epoch_can_be_entered_in_its_middle() -> None:
    recipe = Recipe(cutout=0.3, mixup=1.0)
    whole, rest = list(batches(40).shuffled(recipe, 2)), list(batches(40).shuffled(recipe, 2, 3))
    assert len(whole) == 5 and len(rest) == 2
    for batch, again in zip(whole[3:], rest, strict=True):
        torch.testing.assert_close(tuple(batch), tuple(again), rtol=0, atol=0)


@pytest.mark.parametrize("border", ["reflect", "black"])
@pytest.mark.parametrize("size", [24, 33])
def test_every_image_is_shifted_by_up_to_an_eighth_and_half_are_mirrored(
    size: int, border: str
) -> None:
    reach = size // 8
    images, labels = epoch(batches(200, 50, size), border=border, flip="random")
    originals = numbered(200, size)
    shifts, mirrored = [], 0
    for image, label in zip(images, labels, strict=True):
        # Where the picture's middle is now tells its shift, which way the columns run its mirror.
        middle = image[size // 2, size // 2].astype(int)
        columns = image[size // 2, :, 2].astype(int)
        mirror = bool(columns[size // 2 + 1] < columns[size // 2])
        down = middle[1] - size // 2
        right = ((size - 1 - middle[2]) if mirror else middle[2]) - size // 2
        assert {down, right} <= set(range(-reach, reach + 1))
        naive = cut_out(originals[label - 100], down, right, mirror, border)
        np.testing.assert_array_equal(image, naive)
        shifts.append((down, right))
        mirrored += mirror
    assert {down for down, _ in shifts} == set(range(-reach, reach + 1))
    assert {right for _, right in shifts} == set(range(-reach, reach + 1))
    assert len(set(shifts)) > reach**2, "rows and columns move together"
    assert 70 <= mirrored <= 130


def mirrored(served: Batches, number: int, **recipe: object) -> dict[int, bool]:
    """Return by label whether an epoch showed the image mirrored."""
    images, labels = epoch(served, number, shift=0.0, **recipe)
    return {int(k): bool(i[0, 0, 2] > i[0, 1, 2]) for i, k in zip(images, labels, strict=True)}


def test_flips_alternate_between_epochs() -> None:
    served = batches(200, 200)
    first, second, third = (mirrored(served, n, flip="alternating") for n in range(3))
    assert 70 <= sum(first.values()) <= 130
    assert second == {label: not flip for label, flip in first.items()}
    assert third == first
    assert mirrored(served, 0, flip="alternating", seed=1) != first
    assert mirrored(served, 0, flip="random") != mirrored(served, 2, flip="random")
    assert not any(mirrored(served, 1, flip="none").values())


def test_cutout_greys_one_square_anywhere() -> None:
    images = np.zeros((200, 24, 24, 3), np.uint8)
    served = Batches(images, np.arange(200), 200, torch.device("cpu"))
    [batch] = served.shuffled(Recipe(cutout=0.25), 0)
    places = set()
    for view in pixels(batch):
        hole = (view == GREY).all(2)
        assert (view[~hole] == 0).all()
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        # Six pixels a side, less at a border, where the middle may lie.
        assert 3 <= len(rows) <= 6 and 3 <= len(columns) <= 6
        places.add((rows[0], columns[0]))
    assert len(places) > 100


def test_mixup_is_of_the_views_and_names_both_labels() -> None:
    served = batches(8, 8)
    [plain] = served.shuffled(Recipe(), 0)
    [mixed] = served.shuffled(Recipe(mixup=1.0), 0)
    assert mixed.others is not None
    np.testing.assert_array_equal(mixed.labels, plain.labels)
    views = {int(k): v for k, v in zip(plain.labels, pixels(plain).astype(float), strict=True)}
    for view, one, other in zip(pixels(mixed), mixed.labels, mixed.others, strict=True):
        expected = mixed.share * views[int(one)] + (1 - mixed.share) * views[int(other)]
        assert np.abs(view - expected).max() <= 0.501
    shares = [b.share for b in batches(400).shuffled(Recipe(mixup=1.0), 0)]
    assert min(shares) < 0.2 and max(shares) > 0.8 and len(set(shares)) == 50


def test_sub_batches_are_the_batch() -> None:
    [batch] = batches(8, 8).shuffled(Recipe(mixup=1.0), 0)
    parts = batch.chunks(4)
    assert [len(part.labels) for part in parts] == [2] * 4
    assert {part.share for part in parts} == {batch.share}
    for field in ("views", "labels", "others"):
        joined = torch.cat([getattr(part, field) for part in parts])
        torch.testing.assert_close(joined, getattr(batch, field), rtol=0, atol=0)


def test_the_originals_stay_as_they_are() -> None:
    images = numbered(20)
    served = Batches(images, np.arange(20), 8, torch.device("cpu"))
    epoch(served, cutout=0.5, mixup=0.3)
    np.testing.assert_array_equal(images, numbered(20))
