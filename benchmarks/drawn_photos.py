"""Draw the photos of README's walk-through.

    python benchmarks/drawn_photos.py photos

writes 50 JPEGs of each of four figures to train on, and 50 to test.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from ghostedge.data.drawn import FIGURES, draw


def main(root: str) -> None:
    for number in range(100):
        for figure in list(FIGURES)[:4]:
            folder = Path(root, "train" if number < 50 else "test", figure)
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(draw(figure, f"photo {number}", 64))
            picture.save(folder / f"{number}.jpg", quality=85)


if __name__ == "__main__":
    main(*sys.argv[1:])
