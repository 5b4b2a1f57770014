"""Runs the model in TensorFlow Lite Micro on this computer: python check.py prints JSON.

Needs Linux on x86 and tflite-micro (README.md names the version). In an arena of model.h's size it runs the
golden images and compares the outputs with those of LiteRT's reference kernels. Exit code 1: an output
that is more than two steps apart, or another class where the best one is more than four steps ahead.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tflite_micro import runtime

MODEL = "model_int8.tflite"
STEPS = 2


def run(model: bytes, images: np.ndarray, arena: int) -> tuple[np.ndarray, int]:
    """Return the outputs, int8 (N, classes), for int8 images (N, size, size, 3), and how much of the arena
    was used, in bytes."""
    net = runtime.Interpreter.from_bytes(model, arena_size=arena)
    outputs = []
    for image in images:
        net.set_input(image[None], 0)
        net.invoke()
        outputs.append(net.get_output(0)[0])
    # It is printed to the process's stderr and nowhere else.
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        net.print_allocations()
        os.dup2(saved, 2)
        os.close(saved)
        file.seek(0)
        found = re.search(rb"Arena allocation total (\d+) bytes", file.read())
    assert found is not None, "tflite-micro prints its allocations in another way"
    return np.stack(outputs), int(found[1])


def check(folder: Path) -> dict[str, Any]:
    with np.load(folder / "golden.npz") as golden:
        images, wanted = golden["images"], golden[f"{MODEL}:reference"]
    size = re.search(r"kArenaBytes = (\d+);", (folder / "model.h").read_text("utf-8"))
    assert size is not None, "model.h names no kArenaBytes"
    pixels = (images.astype(np.int16) - 128).astype(np.int8)
    outputs, used = run((folder / MODEL).read_bytes(), pixels, int(size[1]))
    apart = np.abs(outputs.astype(int) - wanted)
    same = outputs.argmax(1) == wanted.argmax(1)
    best, second = np.sort(wanted.astype(int), axis=1)[:, :-3:-1].T
    return {
        "images": len(images),
        "same_class": int(same.sum()),
        "same_where_clear": bool(same[best - second > 2 * STEPS].all()),
        "exact": round(float((apart == 0).mean()), 4),
        "largest_step": int(apart.max()),
        "arena_bytes": int(size[1]),
        "arena_used": used,
    }


if __name__ == "__main__":
    result = check(Path(__file__).parent)
    print(json.dumps(result))
    sys.exit(not result["same_where_clear"] or result["largest_step"] > STEPS)
