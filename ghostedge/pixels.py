"""The pixel contract: what a model's input is, and how its first layer reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ghostedge.errors import GhostEdgeError

MIDDLE, STEP = 128.0, 64.0
"""The default reading of a pixel, (pixel - 128) / 64.

An int8 tensor with scale 1/64 and zero point 0 then holds exactly the pixel minus 128: quantized
models need no normalisation op, lose nothing at the input, and pad with mid-grey.
"""


def span(images: np.ndarray) -> tuple[int, int]:
    """Return between which values 99% of the pixels of uint8 images lie, half a percent at either end."""
    shares = np.cumsum(np.bincount(images.ravel(), minlength=256)) / max(images.size, 1)
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
        return cls(int(stored["size"]), mean, std)  # type: ignore[arg-type]
