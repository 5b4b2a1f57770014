"""Which ranges serve int8 best: min-max, moving average, percentile, entropy and MSE, beside each other.

    python benchmarks/int8/ranges.py CHECKPOINT DATA [IMAGES...]

DATA is a folder of labelled images with train/. For each number of calibration IMAGES and each draw of
them from the images that the checkpoint was trained on, each method's ranges make an int8 .tflite, which
is run by XNNPACK on the validation split and compared with the fp32 .tflite. Adds to ranges.json beside
this file, under the checkpoint's name, and prints the table.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge import checkpoint as checkpoints
from ghostedge.convert import to_int8_tflite, to_onnx, to_tflite
from ghostedge.convert.evidence import sample
from ghostedge.convert.ranges import BINS, Histogram, Ranges, visit
from ghostedge.data.sources import open_data, recorded_split
from ghostedge.evaluate import paired
from ghostedge.models import fold
from ghostedge.runtime import Classifier

RESULTS = Path(__file__).with_suffix(".json")
DRAWS = 3
PARTS = np.linspace(1, 0.2, 33)
"""Of a range, for entropy and MSE to choose from."""


class Seen(Histogram):
    """What a calibration saw of one tensor: each image's range beside all values."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[float, float]] = []

    def widen(self, values: np.ndarray) -> None:
        super().widen(values)
        self.images.append((float(values.min()), float(values.max())))

    @property
    def middles(self) -> np.ndarray:
        return self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS


def min_max(seen: Seen) -> tuple[float, float]:
    return seen.low, seen.high


def moving_average(seen: Seen) -> tuple[float, float]:
    """As ai-edge-quantizer and TensorFlow's fake quantization do, one image at a time."""
    low, high = seen.images[0]
    for a, b in seen.images[1:]:
        low, high = 0.95 * low + 0.05 * a, 0.95 * high + 0.05 * b
    return low, high


def percentile(share: float) -> Callable[[Seen], tuple[float, float]]:
    return lambda seen: seen.within(share / 100)


def choose(seen: Seen, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """Draw both ends in together, then each alone, to the lowest cost."""
    low, high = min(((p * seen.low, p * seen.high) for p in PARTS), key=lambda ends: cost(*ends))
    low = min((p * low for p in PARTS), key=lambda end: cost(end, high))
    return low, min((p * high for p in PARTS), key=lambda end: cost(low, end))


def mse(seen: Seen) -> tuple[float, float]:
    """Least mean squared error of the int8 values."""
    values = seen.middles

    def cost(low: float, high: float) -> float:
        step = max(high - low, 1e-12) / 255
        rounded = np.clip(np.rint((values - low) / step), 0, 255) * step + low
        return float(seen.counts @ (values - rounded) ** 2)

    return choose(seen, cost)


def entropy(seen: Seen) -> tuple[float, float]:
    """Least Kullback-Leibler divergence of the clipped from the quantized distribution (TensorRT).

    As there, the exact zeros of a ReLU are not counted: they alone would decide.
    """
    values, counts = seen.middles, seen.counts.copy()
    zero = int(np.abs(values).argmin())
    counts[zero] = counts[zero + 1 if zero + 1 < BINS else zero - 1]

    def cost(low: float, high: float) -> float:
        inside = (values >= low) & (values <= high)
        if inside.sum() < 256:
            return float("inf")
        clipped = counts[inside].copy()
        clipped[0] += counts[values < low].sum()
        clipped[-1] += counts[values > high].sum()
        held = counts[inside]
        level = np.arange(len(held)) * 256 // len(held)
        filled = held > 0
        share = np.bincount(level, held) / np.maximum(np.bincount(level, filled), 1)
        quantized = np.where(filled, share[level], 0)
        p, q = clipped / clipped.sum(), quantized / max(quantized.sum(), 1e-12)
        known = p > 0
        return float((p[known] * np.log(p[known] / np.maximum(q[known], 1e-9))).sum())

    return choose(seen, cost)


METHODS: dict[str, Callable[[Seen], tuple[float, float]]] = {
    "min-max": min_max,
    "moving average 0.95": moving_average,
    "percentile 99.999": percentile(99.999),
    "percentile 99.99": percentile(99.99),
    "percentile 99.9": percentile(99.9),
    "entropy": entropy,
    "MSE": mse,
}


def observed(model: bytes, images: np.ndarray) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}
    visit(model, images, lambda name, values: seen.setdefault(name, Seen()).widen(values))
    visit(model, images, lambda name, values: seen[name].count(values))
    return seen


def main(weights: str, data: str, *images: str) -> None:
    counts = [int(count) for count in images] or [100, 500, 2000]
    card, net = checkpoints.build(weights)
    source = open_data(data).train
    assert source is not None
    train, rest = recorded_split(source, card.data)
    held_out = source.read(card.pixels.size, rest)
    core = to_onnx.simplified(to_onnx.core(fold(net), card.pixels, to_onnx.TFLITE_OPSET), 1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def run(content: bytes) -> np.ndarray:
            (folder / "model.tflite").write_bytes(content)
            return Classifier(folder / "model.tflite")(held_out.pixels)

        def judged(name: str, count: int, draw: int, content: bytes) -> None:
            found = run(content)
            drop, interval = paired(right, found.argmax(1) == held_out.labels)
            agreement = float((found.argmax(1) == expected.argmax(1)).mean())
            error = float(np.abs(found - expected).mean())
            row = {"method": name, "images": count, "draw": draw, "agreement": agreement}
            rows.append({**row, "drop": drop, "interval": interval, "difference": error})

        model = to_tflite.convert(core)["fp32"]
        expected = run(model)
        right = expected.argmax(1) == held_out.labels
        for count in counts:
            for draw in range(DRAWS):
                chosen = sample(source, train, count, draw)
                seen = observed(model, source.read(card.pixels.size, chosen).pixels)
                for name, method in METHODS.items():
                    ranges: Ranges = {tensor: method(s) for tensor, s in seen.items()}
                    judged(name, count, draw, to_int8_tflite.quantize(model, ranges, "uint8"))
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    result[Path(weights).stem if Path(weights).exists() else weights] = {
        "command": shlex.join(["python", "benchmarks/int8/ranges.py", *sys.argv[1:]]),
        "fp32 top-1": 100 * float(right.mean()),
        "validation images": len(held_out),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    report(rows, counts)


def report(rows: list[dict[str, Any]], counts: list[int]) -> None:
    """Print, for each method and number of images: agreement (lowest to highest) and points lost."""
    print(f"{'':22}" + "".join(f"{f'{n} images':>34}" for n in counts))
    for name in dict.fromkeys(row["method"] for row in rows):
        print(f"{name:22}", end="")
        for count in counts:
            of = [row for row in rows if (row["method"], row["images"]) == (name, count)]
            agreement = [100 * row["agreement"] for row in of]
            drop = np.mean([row["drop"] for row in of])
            spread = f"{min(agreement):.2f}-{max(agreement):.2f}"
            error = np.mean([row["difference"] for row in of])
            print(
                f"{f'{np.mean(agreement):.2f} ({spread}) {drop:+.2f} {1e3 * error:.2f}':>34}",
                end="",
            )
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
