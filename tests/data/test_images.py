from __future__ import annotations

import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ghostedge.data.images import UnreadableImage, fit, read_image
from ghostedge.errors import GhostEdgeError

RNG = np.random.default_rng(0)
PHOTO = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
)


def png(path: Path, width: int, height: int, depth: int, colour: int, rows: bytes) -> Path:
    """Write a PNG of a kind that Pillow reads but does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "picture"


def saved(image: Image.Image, path: Path, kind: str, **options: Any) -> Path:
    path = path.with_suffix(f".{kind}")
    image.save(path, **options)
    return path


def test_rgb_is_kept_as_it_is(file: Path) -> None:
    pixels = read_image(saved(Image.fromarray(PHOTO), file, "png"), 32)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, PHOTO)


@pytest.mark.parametrize("kind", ["jpg", "webp", "bmp", "tif", "gif", "ppm", "jp2"])
def test_common_formats(file: Path, kind: str) -> None:
    pixels = read_image(saved(Image.fromarray(PHOTO), file, kind), 32)
    assert np.abs(pixels.astype(int) - PHOTO).mean() < 8


def test_grey_becomes_three_equal_channels(file: Path) -> None:
    pixels = read_image(saved(Image.fromarray(PHOTO[..., 0]), file, "png"), 32)
    np.testing.assert_array_equal(pixels, PHOTO[..., :1].repeat(3, 2))


def test_one_bit_becomes_black_and_white(file: Path) -> None:
    bits = PHOTO[..., 0] > 127
    pixels = read_image(saved(Image.fromarray(bits), file, "png"), 32)
    np.testing.assert_array_equal(pixels, np.where(bits, 255, 0)[..., None].repeat(3, 2))


def test_palette(file: Path) -> None:
    image = Image.fromarray(PHOTO).quantize(64)
    pixels = read_image(saved(image, file, "png"), 32)
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("kind", "transparency"), [("png", 0), ("png", b"\x00\xff"), ("gif", 0)])
def test_transparent_palette_colour_becomes_white(
    file: Path, kind: str, transparency: int | bytes
) -> None:
    image = Image.new("P", (24, 24))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (12, 0, 24, 24))
    pixels = read_image(saved(image, file, kind, transparency=transparency), 24)
    assert (pixels[:, :12] == 255).all()
    assert (pixels[:, 12:] == (0, 0, 200)).all()


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (200, 0, 0, 51)), ("LA", (100, 51))])
def test_alpha_is_laid_over_white(file: Path, mode: str, colour: tuple[int, ...]) -> None:
    pixels = read_image(saved(Image.new(mode, (24, 24), colour), file, "png"), 24)
    expected = (244, 204, 204) if mode == "RGBA" else (224, 224, 224)  # 255 + (c - 255) * 51 / 255
    assert (pixels == expected).all()


def test_transparent_colour_of_rgb_becomes_white(file: Path) -> None:
    image = Image.fromarray(PHOTO).copy()
    image.paste((1, 2, 3), (0, 0, 32, 16))
    pixels = read_image(saved(image, file, "png", transparency=(1, 2, 3)), 32)
    assert (pixels[:16] == 255).all()
    np.testing.assert_array_equal(pixels[16:], PHOTO[16:])


def test_cmyk(file: Path) -> None:
    ink = Image.new("CMYK", (24, 24), (0, 255, 255, 0))
    pixels = read_image(saved(ink, file, "jpg", quality=95), 24)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(file: Path, kind: str) -> None:
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    if kind == "pgm":  # not every Pillow writes it
        file.write_bytes(b"P5 32 32 65535\n" + deep.astype(">u2").tobytes())
    else:
        file = saved(Image.fromarray(deep), file, kind)
    np.testing.assert_array_equal(read_image(file, 32), (deep >> 8)[..., None].repeat(3, 2))


def test_12_bit_grey(file: Path) -> None:
    """As cameras for microscopes write it; Pillow writes none."""
    deep = np.arange(32 * 32).reshape(32, 32) * 4
    packed = b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in deep.reshape(-1, 2).tolist()
    )
    tags = {256: 32, 257: 32, 258: 12, 259: 1, 262: 1, 273: 134, 277: 1, 278: 32, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    file.write_bytes(head.ljust(134, b"\0") + packed)
    np.testing.assert_array_equal(read_image(file, 32)[:, :, 0], deep >> 4)


def test_16_bit_rgb(file: Path) -> None:
    deep = RNG.integers(0, 65536, (24, 24, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    np.testing.assert_array_equal(read_image(png(file, 24, 24, 16, 2, rows), 24), deep >> 8)


def test_16_bit_rgba_is_laid_over_white(file: Path) -> None:
    pixel = np.array([200 << 8, 0, 0, 51 << 8], ">u2").tobytes()
    rows = (b"\0" + pixel * 24) * 24
    assert (read_image(png(file, 24, 24, 16, 6, rows), 24) == (244, 204, 204)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(file: Path, orientation: int) -> None:
    image = Image.fromarray(PHOTO[:, :25])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, file, "png", exif=exif)
    with Image.open(path) as stored:
        expected = fit(ImageOps.exif_transpose(stored), 24)
    np.testing.assert_array_equal(read_image(path, 24), expected)


def test_broken_exif_is_no_broken_picture(file: Path) -> None:
    path = saved(
        Image.fromarray(PHOTO), file, "jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(file: Path, kind: str) -> None:
    frames = [Image.new("RGB", (24, 24), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    pixels = read_image(saved(frames[0], file, kind, save_all=True, append_images=frames[1:]), 24)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


def test_a_large_photo_is_reduced_while_decoding_and_looks_the_same(file: Path) -> None:
    image = Image.fromarray(PHOTO).resize((2000, 1500), Image.Resampling.BICUBIC)
    path = saved(image, file, "jpg", quality=95)
    with Image.open(path) as stored:
        expected = fit(stored.convert("RGB"), 48)
    assert np.abs(read_image(path, 48).astype(int) - expected).max() <= 4


def test_large_is_read_without_a_warning_and_a_bomb_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # Pillow warns above it, raises above 2x
    large = saved(Image.new("RGB", (30, 30)), file, "png")
    bomb = saved(Image.new("RGB", (40, 40)), file, "bmp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(large, 24).shape == (24, 24, 3)
        with pytest.raises(UnreadableImage) as caught:
            read_image(bomb, 24)
    assert caught.value.reason == "more pixels than is safe to decode"


def test_a_file_that_claims_to_be_enormous(file: Path) -> None:
    with pytest.raises(UnreadableImage, match="more pixels than is safe"):
        read_image(png(file, 60000, 60000, 8, 2, b"\0"), 32)


def test_threads_leave_the_warning_filters_as_they_were(file: Path) -> None:
    path = saved(Image.fromarray(PHOTO), file, "jpg")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda _: read_image(path, 32), range(200)))
    assert warnings.filters == before
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated(file: Path, kind: str) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(noise, file, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImage) as caught:
        read_image(path, 32)
    assert str(path) in str(caught.value)
    assert str(path) not in caught.value.reason
    assert caught.value.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"class,file\n", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
    ],
)
def test_no_picture(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        read_image(file, 32)
    assert caught.value.reason.startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "reason"), [("float32", "floats"), ("int32", "32-bit numbers")])
def test_pixels_of_unknown_range(file: Path, dtype: str, reason: str) -> None:
    path = saved(Image.fromarray(np.zeros((24, 24), dtype)), file, "tif")
    with pytest.raises(UnreadableImage, match=reason):
        read_image(path, 24)


@pytest.mark.parametrize("name", ["missing.jpg", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(GhostEdgeError, match=r"Cannot read .*: (No such file|Is a directory)"):
        read_image(tmp_path / name, 32)


def test_fit_crops_at_the_centre_and_smooths() -> None:
    wide = np.zeros((50, 151, 3), np.uint8)
    wide[:, 50:100] = 255
    assert (fit(Image.fromarray(wide), 25) == 255).all()
    checks = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(fit(Image.fromarray(checks), 32).astype(int) - 127).max() < 20
    assert fit(Image.fromarray(PHOTO[:5]), 24).shape == (24, 24, 3)
