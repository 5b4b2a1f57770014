"""What noise in large photos costs the plain int8 model and the camera variant in MediaPipe.

`python benchmarks/noisy_photos.py BUNDLE DATA` prints a line a model. Photos are made of small test images,
enlarged with a bicubic filter, with normal noise of standard deviation 60 on every pixel. MediaPipe runs
in .venv-mediapipe, which `make test` makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ghostedge import Classifier
from ghostedge.data.images import fit
from ghostedge.data.sources import match_classes, open_data

ROOT = Path(__file__).parents[1]
COUNT, SIDE, NOISE = 1000, 640, 60


def main(bundle: Path, data: str) -> None:
    models = [bundle / "model_int8.tflite", bundle / "model_int8_camera.tflite"]
    plain = Classifier(models[0])
    source = open_data(data).test
    assert source is not None, f"{data} has no test part"
    random = np.random.default_rng(0)
    images = source.read(plain.size, np.sort(random.permutation(len(source))[:COUNT]))
    labels = match_classes(source.classes, plain.labels)[images.labels]
    photos = np.empty((len(labels), SIDE, SIDE, 3), np.uint8)
    for photo, pixels in zip(photos, images.pixels, strict=True):
        large = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        photo[:] = np.clip(large + random.normal(0, NOISE, large.shape), 0, 255)
    shrunk = np.stack([fit(Image.fromarray(photo), plain.size) for photo in photos])

    def share(pixels: np.ndarray) -> float:
        return float((plain(pixels).argmax(1) == labels).mean())

    print(f"{len(labels)} images of {source.name}, {SIDE}x{SIDE}, noise {NOISE}; top-1:")
    print(f"{share(images.pixels):.3f} without enlarging and noise")
    print(f"{share(shrunk):.3f} resized as the pixel contract says")
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "photos.npy"), photos)
        client = (ROOT / ".venv-mediapipe/bin/python", ROOT / "tests/mediapipe_client.py")
        command = [*client, Path(folder, "photos.npy"), *models]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    for path, found in json.loads(done.stdout).items():
        right = np.argmax(found["scores"], 1) == labels
        print(f"{right.mean():.3f} {Path(path).name} in MediaPipe")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
