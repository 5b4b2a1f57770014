from __future__ import annotations

import numpy as np
import pytest
import torch

from ghostedge.pixels import PixelContract
from ghostedge.training.batches import Batches

PLAIN = PixelContract(24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Under which a batch holds the pixels themselves."""


def numbered(count: int, size: int = 24) -> np.ndarray:
    """Images that tell which they are, wherever one looks: number in red, place in green, blue."""
    images = np.empty((count, size, size, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = np.arange(size)[:, None]
    images[..., 2] = np.arange(size)
    return images


def batches(count: int, batch: int = 8, pixels: PixelContract = PLAIN) -> Batches:
    labels = 100 + np.arange(count)
    return Batches(numbered(count, pixels.size), labels, pixels, batch, torch.device("cpu"))


def epoch(served: Batches, seed: int = 0, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return an epoch's images, uint8 NHWC, and labels."""
    images, labels = zip(*served.shuffled(seed, number), strict=True)
    return torch.cat(images).permute(0, 2, 3, 1).numpy().astype(np.uint8), torch.cat(labels).numpy()


def reflected(image: np.ndarray, reach: int, down: int, right: int, mirror: bool) -> np.ndarray:
    """Mirror, then cut at (down, right) out of the picture continued at its borders, pixel by pixel."""
    size = len(image)
    if mirror:
        image = image[:, ::-1]
    result = np.empty_like(image)
    for row in range(size):
        for column in range(size):
            y, x = row + down - reach, column + right - reach
            y, x = (size - 1 - abs(size - 1 - abs(v)) for v in (y, x))
            result[row, column] = image[y, x]
    return result


def test_every_image_once_in_order() -> None:
    found = list(batches(20).in_order())
    assert [len(labels) for _, labels in found] == [8, 8, 4]
    images = torch.cat([images for images, _ in found])
    assert images.dtype == torch.float32
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), numbered(20))
    np.testing.assert_array_equal(torch.cat([labels for _, labels in found]), 100 + np.arange(20))


def test_batches_are_normalized_as_the_pixel_contract_says() -> None:
    pixels = PixelContract(33, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    [(images, _)] = batches(5, pixels=pixels).in_order()
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = pixels.normalize(numbered(5, 33)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(images.numpy(), expected, rtol=1e-6, atol=1e-6)


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
    first = epoch(batches(20), seed=3, number=7)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    again = epoch(batches(20), seed=3, number=7)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    for seed, number in ((3, 8), (4, 7)):
        other = epoch(batches(20), seed, number)
        assert (first[1] != other[1]).any()
        assert (first[0] != other[0]).any()


def test_labels_stay_with_their_images() -> None:
    images, labels = epoch(batches(50))
    assert (images[..., 0] == (labels - 100)[:, None, None]).all()


@pytest.mark.parametrize("size", [24, 33])
def test_every_image_is_shifted_by_up_to_an_eighth_and_half_are_mirrored(size: int) -> None:
    pixels, reach = PixelContract(size, PLAIN.mean, PLAIN.std), size // 8
    served = batches(200, 50, pixels)
    images, labels = epoch(served)
    originals = numbered(200, size)
    shifts, mirrored = [], 0
    for image, label in zip(images, labels, strict=True):
        # Where the picture's middle is now tells its shift, which way the columns run its mirror.
        middle = image[size // 2, size // 2].astype(int)
        columns = image[size // 2, :, 2].astype(int)
        mirror = bool(columns[size // 2 + 1] < columns[size // 2])
        down = reach + middle[1] - size // 2
        right = reach + ((size - 1 - middle[2]) if mirror else middle[2]) - size // 2
        assert {down, right} <= set(range(2 * reach + 1))
        naive = reflected(originals[label - 100], reach, down, right, mirror)
        np.testing.assert_array_equal(image, naive)
        shifts.append((down, right))
        mirrored += mirror
    assert {down for down, _ in shifts} == set(range(2 * reach + 1))
    assert {right for _, right in shifts} == set(range(2 * reach + 1))
    assert len(set(shifts)) > reach**2, "rows and columns move together"
    assert 70 <= mirrored <= 130


def test_the_originals_stay_as_they_are() -> None:
    images = numbered(20)
    served = Batches(images, np.arange(20), PLAIN, 8, torch.device("cpu"))
    epoch(served)
    np.testing.assert_array_equal(images, numbered(20))
