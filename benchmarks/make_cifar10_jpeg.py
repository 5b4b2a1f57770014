"""Make CIFAR-10 as quality-75 4:2:0 JPEG files, the form of the data behind our figures.

    python benchmarks/make_cifar10_jpeg.py data/cifar10-jpeg --download

The images come from torchvision's CIFAR-10 (below ./data or $GHOSTEDGE_DATA). A file's number is
its place within its class, in the order of the data set: train/cat/0000.jpg to 4999.jpg and
test/cat/0000.jpg to 0999.jpg. Our test/ is 500 of those 1,000 a class.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from ghostedge.data.sources import Data, open_data
from ghostedge.errors import GhostEdgeError
from ghostedge.files import atomic_directory


def write_jpegs(data: Data, folder: Path) -> int:
    """Write the 32-pixel images of `data` to `folder`/<part>/<class>/NNNN.jpg; return how many."""
    count = 0
    with atomic_directory(folder, replaceable=lambda _: False) as temporary:
        for part, source in (("train", data.train), ("test", data.test)):
            if source is None:
                continue
            images = source.read(32)
            numbers = [0] * len(source.classes)
            for label, pixels in zip(images.labels, images.pixels, strict=True):
                path = temporary / part / source.classes[label] / f"{numbers[label]:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, quality=75, subsampling="4:2:0")
                numbers[label] += 1
            count += len(images)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 if it is missing")
    arguments = parser.parse_args()
    try:
        count = write_jpegs(open_data("cifar10", arguments.download), arguments.folder)
    except GhostEdgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{count} images in {arguments.folder}")


if __name__ == "__main__":
    main()
