"""The pixel contract: what a model's input is, and how its first layer reads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ghostedge.errors import GhostEdgeError, expect

MIDDLE, STEP = 128.0, 64.0
"""The default reading of a pixel, (pixel - 128) / 64.

An int8 tensor with scale 1/64 and zero point 0 then holds exactly the pixel minus 128: quantized
models need no normalisation op, lose nothing at the input, and pad with mid-grey.
"""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and std, of pixels in 0-1."""


def span(images: np.ndarray) -> tuple[int, int]:
    """Return between which values 99% of the pixels of uint8 images lie, half a percent at either end."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(images), 1024):  # bincount makes an int64 of every pixel
        counts += np.bincount(images[start : start + 1024].ravel(), minlength=256)
    shares = np.cumsum(counts) / max(images.size, 1)
    low, high = np.searchsorted(shares, [0.005, 0.995])
    return int(low), int(min(high, 255))


@dataclasses.dataclass(frozen=True)
class PixelContract:
    """RGB, uint8 0-255, height x width x channel, `size` pixels square.

    An image of another shape is cropped at the centre to a square and resized with Pillow's
    anti-aliased bilinear filter. The network then reads `(pixel - mean) / std`, per channel, in
    pixel units (0-255).
    """

    size: int
    mean: tuple[float, float, float] = (MIDDLE, MIDDLE, MIDDLE)
    std: tuple[float, float, float] = (STEP, STEP, STEP)

    def __post_init__(self) -> None:
        if not 24 <= self.size <= 256:
            raise GhostEdgeError(
                f"An image size of {self.size} is outside 24 to 256, which these networks are for."
            )

    def from_default(self) -> tuple[np.ndarray, np.ndarray]:
        """Return weight and bias, float32 (3,), that make `(pixel - 128) / 64` into what this reads."""
        mean, std = np.array(self.mean), np.array(self.std)
        return (STEP / std).astype(np.float32), ((MIDDLE - mean) / std).astype(np.float32)

    @classmethod
    def of_unit(cls, size: int, mean: Sequence[float], std: Sequence[float]) -> PixelContract:
        """Return the contract of mean and std as torchvision and timm write them: for pixels in 0-1.

        One number stands for all three channels. Raises GhostEdgeError for values beyond 1, which are
        meant for pixels in 0-255, and for a std that is not above 0.
        """
        channels = []
        for name, values, low in (("mean", mean, -math.inf), ("std", std, 0.0)):
            if len(values) not in (1, 3) or not all(low < value <= 1 for value in values):
                raise GhostEdgeError(
                    f"A {name} of {list(values)} is not one or three numbers for pixels between 0 and 1: "
                    "divide numbers for 0-255 by 255."
                )
            channels.append(tuple(255 * value for value in values) * (3 // len(values)))
        return cls(size, *channels)  # type: ignore[arg-type]

    @property
    def is_default(self) -> bool:
        """Whether the reading is (pixel - 128) / 64, which costs nothing in int8."""
        return set(self.mean) == {MIDDLE} and set(self.std) == {STEP}

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Map uint8 or float pixels (..., 3) to the float32 values the network reads."""
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        return (pixels.astype(np.float32) - mean) / std

    def to_json(self) -> dict[str, Any]:
        return {
            "colour": "RGB",
            "range": [0, 255],
            "layout": "HWC",
            "crop": "centre square",
            "resize": "bilinear, anti-aliased",
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PixelContract:
        mean, std = (tuple(float(v) for v in stored[key]) for key in ("mean", "std"))
        expect(len(mean) == len(std) == 3 and min(std) > 0, "mean and std")
        expect(all(map(math.isfinite, mean + std)), "mean and std")
        return cls(int(stored["size"]), mean, std)  # type: ignore[arg-type]


def frame_side(size: int) -> int:
    """Return a side for camera frames that a model of `size` fits: twice its or more, up to 224."""
    return size * max(2, 224 // size)


def enlarged(images: np.ndarray, size: int) -> np.ndarray:
    """Return uint8 images (N, size, size, 3), each block of which averages to a pixel of `images`.

    The blocks are not flat: their pixels lie as far above and below the mean as 0 to 255 allows, so
    that a model which skips pixels instead of averaging them gives something else. `size` is a
    multiple of the side of `images`, uint8 (N, side, side, 3); that side itself changes nothing.
    """
    side = images.shape[1]
    factor = size // side
    if factor == 1:
        return images
    signs = np.where(np.arange(factor**2) % 2, -1, 1)
    if factor % 2:
        signs[-1] = 0
    pattern = np.tile(signs.reshape(factor, factor), (side, side))[:, :, None]
    large = images.repeat(factor, 1).repeat(factor, 2).astype(np.int16)
    return (large + pattern * np.minimum(large, 255 - large)).astype(np.uint8)
