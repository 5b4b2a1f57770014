"""Any picture a person has in a folder, as the square of RGB pixels a network reads."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ghostedge.errors import GhostEdgeError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read, by Pillow's names; formats that run another program (EPS) or that have no
signature, so that any junk passes for them (TGA), stay out."""

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
    + (".pgm", ".pbm", ".heic")
)
"""Endings by which a file is taken for a picture without opening it, in messages only."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(GhostEdgeError):
    """A file that gives no picture; `reason` says why without naming the file."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"Cannot read {path}: {reason}. Leave it out or replace it.")
        self.reason = reason


def read_image(path: str | os.PathLike[str], size: int) -> np.ndarray:
    """Read a picture file as uint8 RGB pixels, shape (size, size, 3).

    The first frame of an animation; turned as its EXIF orientation says; transparency over white;
    grey, palette, CMYK and 1-bit converted; 16 bits a channel scaled to 8. Colour profiles are
    ignored. Then `fit`. A large JPEG is decoded at a fraction of its size, never below twice
    `size`. Safe to call from several threads.

    Raises UnreadableImage (a GhostEdgeError) for what is no picture or is damaged, has float or
    32-bit pixels (whose range nothing states), or has more pixels than Pillow's guard against
    decompression bombs allows.
    """
    try:
        with _quiet(), Image.open(path, formats=_formats()) as image:
            image.draft(None, (2 * size, 2 * size))
            image.load()
            return fit(_turned(_to_rgb(image), _orientation(image)), size)
    except UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
        known = ", ".join(_formats())
        raise UnreadableImage(
            path, "the file is empty" if empty else f"not a picture in a known format ({known})"
        ) from None
    except Image.DecompressionBombError:
        raise UnreadableImage(path, "more pixels than is safe to decode") from None
    # Pillow's decoders meet damage with nearly any exception, from struct.error to IndexError.
    except Exception as error:  # noqa: BLE001
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UnreadableImage(path, reason.rstrip(".") or type(error).__name__) from None


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre square of an RGB image, resized: uint8 (size, size, 3).

    Pillow's bilinear filter, anti-aliased when it shrinks, as the pixel contract states.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:  # not resize's `box`: its filter reaches beyond the box
        image = image.crop((left, top, left + side, top + side))
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # The high byte, as Pillow itself reduces 16-bit RGB; its conversion to grey would clip.
        (bits, *_) = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        kind = "floats" if image.mode == "F" else "32-bit numbers"
        raise ValueError(f"its pixels are {kind}, of no stated range")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  broken metadata beside an intact picture
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF is younger than the rest


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_state = contextlib.ExitStack()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings (odd EXIF, a large picture) off the screen.

    `warnings.catch_warnings` restores what it found, which goes wrong when threads overlap; so the
    first one in sets the filter and the last one out restores it.
    """
    global _quiet_depth
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_state.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_state.close()
