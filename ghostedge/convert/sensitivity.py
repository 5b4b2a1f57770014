"""Which ops of a network int8 hurts: each is quantized alone, all others stay in float."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ghostedge.convert import to_int8_tflite
from ghostedge.convert.ranges import Ranges
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.files import atomic_file
from ghostedge.runtime import Classifier

FLOOR = 1e-6
"""Probabilities below it count as it, so that a divergence stays finite."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What one op in int8, all others in float, does to the outputs."""

    tensor: str
    """The op, by its output's name, as `to_int8_tflite.quantize` takes it in `in_float`."""
    divergence: float
    """Mean Kullback-Leibler divergence of the probabilities from those in float, in nats."""
    agreement: float
    """Share of images with the same top-1."""


def sensitivity(
    model: bytes, ranges: Ranges, images: np.ndarray, cache: Path | None = None
) -> list[Sensitivity]:
    """Measure every op that computes in int8, the most sensitive first.

    An op alone in int8 shows the loss of its weights and of the tensors that it reads and writes. So
    where one tensor is the cause, the op that makes it and the ops that read it all stand out, and
    leaving them all in float repairs it. Ops that only copy are left out, as they lose nothing of their
    own, and so is the last one, whose 256 steps are the output's type.

    `model` is the fp32 .tflite, `images` are raw pixels, uint8 (images, size, size, 3); 200 are enough
    to tell the worst ops. The 1.0x net takes about half a minute with them. With `cache`, a folder,
    the result is kept there under a hash of all arguments.
    """
    stored = cache and cache / f"sensitivity-{_key(model, ranges, images)}.json"
    if stored and stored.is_file():
        return [Sensitivity(**entry) for entry in json.loads(stored.read_text())]
    flat = Flat(model)
    made = {flat.name(op.outputs[0]): flat.kind(op) for op in flat.graph.operators}
    computing = [
        name
        for name, kind in made.items()
        if kind in to_int8_tflite.VERSIONS.keys() - to_int8_tflite.COPYING
        and name != flat.name(flat.graph.outputs[0])
    ]
    with tempfile.TemporaryDirectory(prefix="ghostedge-") as scratch:
        file = Path(scratch) / "model.tflite"

        def run(in_float: Iterable[str]) -> np.ndarray:
            file.write_bytes(to_int8_tflite.quantize(model, ranges, "float32", set(in_float)))
            return np.maximum(Classifier(file)(images), FLOOR)

        expected = run(made)
        measured = []
        for name in computing:
            found = run(made.keys() - {name})
            divergence = (expected * np.log(expected / found)).sum(1).mean()
            agreement = (expected.argmax(1) == found.argmax(1)).mean()
            measured.append(Sensitivity(name, float(divergence), float(agreement)))
    measured.sort(key=lambda entry: -entry.divergence)
    if stored:
        with atomic_file(stored) as temporary:
            temporary.write_text(json.dumps([dataclasses.asdict(entry) for entry in measured]))
    return measured


def _key(model: bytes, ranges: Ranges, images: np.ndarray) -> str:
    digest = hashlib.sha256(model + json.dumps(ranges, sort_keys=True).encode())
    digest.update(str(images.shape).encode() + np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
