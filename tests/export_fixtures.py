"""A small network trained for seconds on drawn figures, and its exports, shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from ghostedge import checkpoint
from ghostedge.convert import Bundle, export
from ghostedge.convert.audit import kind_of
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.training import Recipe, train

WIDTH = 0.25
EVERYTHING: dict[str, Any] = {
    "int8": True,
    "half": True,
    "camera": 96,
    "data": "drawn",
    "max_drop": 5.0,
    "calib_samples": 100,
}
"""Options of `bundle`."""


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that the first of pytest-xdist's workers to come here makes for all of them."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the four drawn figures, 32 pixels, with its synthetic images."""
    recipe = Recipe(epochs=12, batch=20, lr=0.05, label_smoothing=0.0, flip="none", validation=0.25)
    model = f"ghostnetv3-small-{WIDTH}x"
    folder = once(tmp_path_factory, "run", lambda f: train("drawn", f, model=model, recipe=recipe))
    return folder / "best.safetensors"


@pytest.fixture(scope="session")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Everything that an export can hold, calibrated and checked on the drawn set."""
    return Bundle(once(tmp_path_factory, "bundle", lambda f: export(trained, f, **EVERYTHING)))


@pytest.fixture(scope="session")
def int8_bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The int8 model alone, int8 at its ends too, as the recipe microcontroller makes it."""
    made = once(
        tmp_path_factory, "int8_bundle", lambda f: export(trained, f, recipe="microcontroller")
    )
    return Bundle(made)


def furthest(file: Path, steps: int) -> float:
    """Return how far kernels may part in a score of a .tflite that differ by `steps` in its logits.

    XNNPACK's versions round near ties otherwise: one value of a layer, by one step. That is one step of
    the logits soon, and those are coarser than the scores'. Softmax's slope is a quarter at most.
    """
    model = Flat(file.read_bytes())
    (softmax,) = (op for op in model.graph.operators if kind_of(model, op) == "SOFTMAX")
    scales = model.tensors[softmax.inputs[0]].quantization.scale
    return (0.0 if scales is None else steps * float(scales[0]) / 4) + 1 / 256


def hostile(file: Path, output: Path) -> Path:
    """Write a checkpoint's equal in float that plain int8 cannot hold, and return its path.

    The channels before and after the head are scaled over three decades.
    """
    card, tensors = checkpoint.read(file)
    generator = np.random.default_rng(0)
    counts = tensors["head.weight"].shape[1::-1]
    last, head = ((10 ** generator.uniform(-1.5, 1.5, n)).astype(np.float32) for n in counts)
    tensors["last.bn.weight"] *= last
    tensors["last.bn.bias"] *= last
    tensors["head.weight"] *= head[:, None, None, None] / last[None, :, None, None]
    tensors["head.bias"] *= head
    tensors["classifier.weight"] /= head
    checkpoint.save(output, card, tensors)
    return output
