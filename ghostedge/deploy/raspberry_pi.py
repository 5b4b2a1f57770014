"""A program for 64-bit Raspberry Pi OS: camera, pictures, a folder, a video."""

from __future__ import annotations

from ghostedge.bundle import GOLDEN, LABELS
from ghostedge.deploy.target import Filled, Handover, Need, Target

MODEL = "model_int8.tflite"


def _fill(handover: Handover) -> Filled:
    return {}, {name: (handover.bundle / name).read_bytes() for name in (LABELS, GOLDEN)}


TARGET = Target(
    summary="a program for 64-bit Raspberry Pi OS: camera, pictures, a folder, a video",
    needs=(
        Need(
            MODEL, MODEL, "--recipe raspberry-pi", "uint8", "its program gives it pixels as bytes"
        ),
    ),
    fill=_fill,
)
