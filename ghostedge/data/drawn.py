"""Drawn figures: a labelled set that needs no download, for tests and for trying commands out."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
from PIL import Image, ImageDraw

from ghostedge.data.sources import Data, Images, Source
from ghostedge.errors import GhostEdgeError


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon of radius 1; every second one at radius `inner`."""
    turn = 2 * math.pi / corners
    radius = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    return [(r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radius)]


def _box(width: float, height: float, x: float = 0.0) -> list[tuple[float, float]]:
    return [(x - width, -height), (x + width, -height), (x + width, height), (x - width, height)]


FIGURES: dict[str, list[list[tuple[float, float]]]] = {
    "circle": [_regular(48)],
    "square": [_box(0.75, 0.75)],
    "triangle": [_regular(3)],
    "cross": [_box(0.25, 0.95), _box(0.95, 0.25)],
    "star": [_regular(10, 0.4)],
    "bar": [_box(0.2, 1.0)],
    "stripes": [_box(0.15, 0.9, x) for x in (-0.6, 0.0, 0.6)],
    "hourglass": [[(-0.7, -0.9), (0.7, -0.9), (-0.7, 0.9), (0.7, 0.9)]],
    "arrow": [[(0, -1), (0.7, -0.1), (0.25, -0.1), (0.25, 0.9), (-0.25, 0.9), (-0.25, -0.1),
               (-0.7, -0.1)]],
    "angle": [[(-0.8, -0.9), (-0.3, -0.9), (-0.3, 0.4), (0.8, 0.4), (0.8, 0.9), (-0.8, 0.9)]],
}  # fmt: skip
"""Each figure as polygons in a square from -1 to 1."""

_FINER = 4


def draw(figure: str, seed: str, size: int) -> np.ndarray:
    """Draw one of `FIGURES`, uint8 (size, size, 3): place, turn, colours, noise from `seed`.

    The same seed gives the same picture at every size, except the noise.
    """
    random = np.random.default_rng(list(hashlib.sha256(f"{seed}/{figure}".encode()).digest()))
    paper, ink = random.integers(0, 256, (2, 3))
    if np.abs(paper - ink).sum() < 200:
        ink = (paper + 128) % 256
    side = size * _FINER
    radius = random.uniform(0.28, 0.42) * side
    x, y = random.uniform(0.42, 0.58, 2) * side
    angle = random.uniform(-0.3, 0.3)
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    picture = Image.new("RGB", (side, side), tuple(paper.tolist()))
    pen = ImageDraw.Draw(picture)
    for polygon in FIGURES[figure]:
        corners = [(x + c * px - s * py, y + s * px + c * py) for px, py in polygon]
        pen.polygon(corners, fill=tuple(ink.tolist()))
    pixels = np.asarray(picture.reduce(_FINER), np.float32)
    noise = random.normal(0, random.uniform(2, 14), pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class DrawnSource(Source):
    """Figures drawn when read, at the size asked for."""

    seed: int

    def _image(self, index: int, size: int) -> np.ndarray:
        figure, number = self.names[index].split("/")
        return draw(figure, f"{self.seed}/{number}", size)

    def _content(self, index: int) -> bytes:
        return str(self.seed).encode()


def drawn_source(classes: int = 4, per_class: int = 200, seed: int = 0) -> DrawnSource:
    """Return a source of `per_class` pictures of each of the first `classes` figures."""
    if not 2 <= classes <= len(FIGURES):
        raise GhostEdgeError(f"The drawn set has 2 to {len(FIGURES)} classes, not {classes}.")
    figures = sorted(list(FIGURES)[:classes])
    return DrawnSource(
        f"drawn/{seed}",
        tuple(figures),
        tuple(f"{figure}/{i:04d}" for figure in figures for i in range(per_class)),
        np.repeat(np.arange(classes), per_class).astype(np.int64),
        seed,
    )


def drawn_set(classes: int = 4, per_class: int = 200, seed: int = 0, size: int = 32) -> Images:
    """Return drawn pictures in memory; classes are in the order of `drawn_source`."""
    return drawn_source(classes, per_class, seed).read(size)


def drawn_data(classes: str = "4") -> Data:
    """Return the set that the data argument `drawn:CLASSES` names: 200 + 50 images a class."""
    if not classes.isdecimal() or len(classes) > 2:
        raise GhostEdgeError(
            f"'drawn:{classes}' names no set: write drawn:N, N from 2 to {len(FIGURES)}."
        )
    train = drawn_source(int(classes), 200, seed=0)
    return Data("drawn", train.classes, train, None, drawn_source(int(classes), 50, seed=1))
