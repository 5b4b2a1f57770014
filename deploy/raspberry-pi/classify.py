"""Name what a camera, pictures or a video show, with numpy and ai-edge-litert.

    python3 classify.py camera             # a Pi camera through picamera2, else USB camera 0 through OpenCV
    python3 classify.py camera:1 --json    # USB camera 1; one JSON object a frame
    python3 classify.py photo.jpg folder video.mp4
    python3 classify.py --check            # the golden images: does this board give what the export gave?

Pictures need Pillow, videos and USB cameras OpenCV (cv2). Runs with Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

HERE = Path(__file__).parent
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".h264")
FRAME = (640, 480)
"""Asked of a camera. More pixels cost time and add nothing: the network sees few of them."""
WINDOW = 30
"""Frames that the frame rate is taken over."""


def stop(reason: str) -> NoReturn:
    print(f"classify: {reason}", file=sys.stderr)
    sys.exit(2)


class Model:
    """A uint8 .tflite classifier: `scores = model(pixels)`, for RGB uint8 pixels (size, size, 3)."""

    def __init__(self, path: Path, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.net = Interpreter(model_content=path.read_bytes(), num_threads=threads)
        self.net.allocate_tensors()
        self.input, self.output = self.net.get_input_details()[0], self.net.get_output_details()[0]
        self.size = int(self.input["shape"][1])
        self.step, self.zero_point = self.output["quantization"]
        labels = path.with_name("labels.txt")
        try:
            self.labels = labels.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            stop(f"{labels} is damaged, copy it again: {error}")

    def raw(self, pixels: np.ndarray) -> np.ndarray:
        self.net.set_tensor(self.input["index"], pixels[None])
        self.net.invoke()
        return self.net.get_tensor(self.output["index"])[0]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return (self.raw(pixels).astype(np.float32) - self.zero_point) * self.step


def fit(picture: np.ndarray, size: int) -> np.ndarray:
    """Return the centre square of uint8 RGB pixels, resized to (size, size, 3) as in training.

    An anti-aliased bilinear filter: each new pixel is a weighted mean of all old ones that it covers.
    """
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side].astype(np.float32)
    if side == size:
        return square.astype(np.uint8)
    weights = _weights(side, size)
    rows = np.tensordot(weights, square, axes=(1, 0))
    both = np.tensordot(rows, weights, axes=(1, 1)).transpose(0, 2, 1)
    return np.clip(both + 0.5, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)  # pictures of many sizes would fill a small board's memory
def _weights(side: int, size: int) -> np.ndarray:
    """The share of each of `side` old pixels in each of `size` new ones, (size, side)."""
    scale = side / size
    centres = (np.arange(size)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(side) + 0.5 - centres) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


Frames = Iterator[tuple[str, np.ndarray]]
"""A name and uint8 RGB pixels (height, width, 3)."""


def frames(source: str, size: int) -> Frames:
    """Yield what a source shows: `camera`, `camera:N`, a picture, a video, or a folder of pictures.

    Large JPEGs may come smaller, never below twice `size`.
    """
    path = Path(source)
    if source == "camera" or source.startswith("camera:"):
        yield from camera(source)
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in PICTURES:
                try:
                    picture = read(file, size)
                except ValueError as error:
                    print(f"classify: skipped {file}: {error}", file=sys.stderr)
                    continue
                yield str(file), picture
    elif not path.is_file():
        stop(f"there is no file {source}.")
    elif path.suffix.lower() in VIDEOS:
        yield from opencv(source)
    else:
        try:
            picture = read(path, size)
        except ValueError as error:
            stop(f"cannot read {path}: {error}")
        yield str(path), picture


def read(file: Path, size: int) -> np.ndarray:
    """Return a picture's uint8 RGB pixels as in training, all of them but for large JPEGs.

    Turned as its EXIF says, transparency over white, 16-bit grey scaled to 8 bits. Raises
    ValueError, which says why, for what is no picture or is damaged.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        stop("a picture takes Pillow: sudo apt install python3-pil")
    try:
        with Image.open(file) as stored:
            stored.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(stored)
            if stored.mode.startswith("I;16") or (
                stored.mode == "I" and stored.format in ("PNG", "PPM")
            ):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif stored.mode in ("F", "I"):
                raise ValueError("its pixels are floats or 32-bit numbers, of no stated range")
            if image.mode != "RGB" or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    # Pillow's decoders meet damage with nearly any exception, from struct.error to IndexError.
    except Exception as error:  # noqa: BLE001
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason) from None


def camera(source: str) -> Frames:
    try:
        from picamera2 import Picamera2
    except ImportError:
        Picamera2 = None
    if source != "camera" or Picamera2 is None:
        number = source.partition(":")[2] or "0"
        if not number.isdecimal():
            stop(f"{source} is no camera; write camera or a number, as in camera:1.")
        yield from opencv(int(number))
        return
    with Picamera2() as device:
        # Its names are those of the bytes in a word: "BGR888" is the array with red first.
        main = {"size": FRAME, "format": "BGR888"}
        device.configure(device.create_video_configuration(main=main))
        device.start()
        while True:
            yield source, device.capture_array("main")


def opencv(source: str | int) -> Frames:
    try:
        import cv2
    except ImportError:
        stop("a video or a USB camera takes OpenCV: sudo apt install python3-opencv")
    video = cv2.VideoCapture(source)
    if isinstance(source, int):
        video.set(cv2.CAP_PROP_FRAME_WIDTH, FRAME[0])
        video.set(cv2.CAP_PROP_FRAME_HEIGHT, FRAME[1])
    if not video.isOpened():
        stop(f"OpenCV cannot open {source!r}.")
    try:
        while True:
            found, picture = video.read()
            if not found:
                if isinstance(source, int):
                    stop(f"camera {source} gives no more pictures.")
                return
            yield str(source), picture[..., ::-1]  # OpenCV's frames have blue first
    finally:
        video.release()


def check(model: Model, golden: Path, key: str) -> int:
    """Compare with the outputs that the export wrote down; return the exit code."""
    try:
        with np.load(golden) as stored:
            images, expected = stored["images"], stored[key].astype(int)
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        stop(f"{golden} has no golden images for {key}, copy it again: {error}")
    found = np.array([model.raw(image) for image in images]).astype(int)
    apart = np.abs(found - expected)
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    result = {"images": len(images), "same_class": same, "largest_step": int(apart.max())}
    print(json.dumps({**result, "exact": float((apart == 0).mean())}))
    # Kernels of different CPUs round apart by one step of 256.
    return 0 if apart.max() <= 1 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="*", help="camera, camera:N, pictures, folders, videos")
    parser.add_argument("--model", type=Path, default=HERE / "model_int8.tflite")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a picture or frame")
    parser.add_argument("--frames", type=int, help="stop after so many")
    parser.add_argument(
        "--check", action="store_true", help="run the golden images, and nothing else"
    )
    given = parser.parse_args()
    if not (given.sources or given.check):
        parser.error("name a source, or --check")
    if given.threads < 1:
        parser.error("--threads is 1 or more")
    for needed in (given.model, given.model.with_name("labels.txt")):
        if not needed.is_file():
            stop(f"there is no file {needed}.")
    try:
        model = Model(given.model, given.threads)
    except (ValueError, RuntimeError) as error:  # of LiteRT
        stop(f"{given.model} is damaged, export or copy it again: {error}")
    if given.check:
        return check(model, HERE / "golden.npz", f"{given.model.name}:default")
    ends: collections.deque[float] = collections.deque(maxlen=WINDOW)
    seen = 0
    for source in given.sources:
        for name, picture in frames(source, model.size):
            begin = time.perf_counter()
            scores = model(fit(picture, model.size))
            ends.append(time.perf_counter())
            fps = (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else None
            best = int(scores.argmax())
            show(
                given.json,
                {
                    "source": name,
                    "label": model.labels[best],
                    "score": round(float(scores[best]), 4),
                    "ms": round(1000 * (ends[-1] - begin), 2),
                    "fps": None if fps is None else round(fps, 1),
                },
            )
            seen += 1
            if seen == given.frames:
                return 0
    return 0


def show(as_json: bool, found: dict[str, object]) -> None:
    if as_json:
        print(json.dumps(found, ensure_ascii=False), flush=True)
        return
    fps = "" if found["fps"] is None else f"  {found['fps']} fps"
    line = f"{found['source']}: {found['label']} {found['score']:.1%}  {found['ms']} ms{fps}"
    live = sys.stdout.isatty() and str(found["source"]).startswith("camera")
    print(f"\r{line:<78}" if live else line, end="" if live else "\n", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
