"""What each rewrite of the way to TFLite gains: alone, left out, and all together, beside plain.

    taskset -c 0 python benchmarks/rewrites/compare.py CHECKPOINT DATA

DATA is a folder of labelled images with train/. Calibrates on 200 of the images that the checkpoint
was trained on and checks on 1,000 that it was not. Writes results.json beside this file.

A model runs up to 3% faster or slower from load to load, as its memory falls. So all are loaded
LOADS times, and timed side by side each time as `ghostedge bench` does (ghostedge/latency/runner.py);
a figure is the median over the loads, an interval goes from the lowest to the highest.
"""

from __future__ import annotations

import collections
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from ghostedge import checkpoint as checkpoints
from ghostedge.convert import to_int8_tflite, to_onnx, to_tflite
from ghostedge.convert.ranges import observe
from ghostedge.convert.rewrites import CONVERTED, TFLITE
from ghostedge.data.sources import open_data, recorded_split
from ghostedge.latency.runner import PROTOCOL, machine
from ghostedge.latency.timing import bench
from ghostedge.models import fold
from ghostedge.runtime import Classifier

HERE = Path(__file__).parent
PRECISIONS = ("fp32", "fp16", "int8")
LOADS, RUNS = 9, 60

Passes = tuple[Sequence[Any], Sequence[Any]]


def variants() -> dict[str, Passes]:
    """Return the passes before and after the converter, by the name of what they make."""
    made: dict[str, Passes] = {"all": (TFLITE, CONVERTED)}
    for one in (*TFLITE, *CONVERTED):
        before = [p for p in TFLITE if p is one], [p for p in CONVERTED if p is one]
        made[f"only {one.__name__}"] = before
        rest = [p for p in TFLITE if p is not one], [p for p in CONVERTED if p is not one]
        made[f"without {one.__name__}"] = rest
    return made


def images(card: checkpoints.Checkpoint, data: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return calibration images, and images with labels that the net was not trained on."""
    source = open_data(data).train
    assert source is not None
    train, rest = recorded_split(source, card.data)
    random = np.random.default_rng(0)
    calibration = source.read(card.pixels.size, np.sort(random.choice(train, 200, replace=False)))
    held_out = source.read(card.pixels.size, np.sort(random.choice(rest, 1000, replace=False)))
    return calibration.pixels, held_out.pixels, held_out.labels


def convert(core: onnx.ModelProto, passes: Passes, calibration: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    made = to_tflite.convert(core, ["fp32", "fp16"], *passes)
    ranges = observe(made["fp32"], calibration)
    made["int8"] = to_int8_tflite.quantize(made["fp32"], ranges, "uint8")
    for precision, content in made.items():
        (folder / f"model_{precision}.tflite").write_bytes(content)


def audit(file: Path) -> dict[str, Any]:
    """Return operators by type, and how many nodes XNNPACK runs."""
    bare = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    net = Interpreter(str(file), experimental_op_resolver_type=bare)
    names = [op["op_name"] for op in net._get_ops_details()]
    delegated = Interpreter(str(file), num_threads=1)
    delegated.allocate_tensors()
    nodes = [op["op_name"] for op in delegated._get_ops_details()].count("DELEGATE")
    inside = names[1:-1].count("QUANTIZE")
    return {
        "bytes": file.stat().st_size,
        "partitions": nodes,
        "quantize_inside": inside,
        "transpose": names.count("TRANSPOSE"),
        "operators": dict(sorted(collections.Counter(names).items())),
    }


def main(weights: str, data: str) -> None:
    here = machine()
    card, net = checkpoints.build(weights)
    core = to_onnx.simplified(to_onnx.core(fold(net), card.pixels, 17), 1)
    calibration, held_out, labels = images(card, data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.save(folder / "calibration.npy", calibration)
        script = [sys.executable, str(HERE / "plain.py"), weights]
        inputs = [str(folder / "calibration.npy"), str(folder / "plain")]
        subprocess.run([*script, *inputs], check=True, stdout=subprocess.DEVNULL)
        for name, passes in variants().items():
            convert(core, passes, calibration, folder / name)
        names = ["plain", *variants()]
        files = {(n, p): folder / n / f"model_{p}.tflite" for n in names for p in PRECISIONS}
        order = list(files.values())
        timed = []
        for load in range(LOADS):
            # The first one loaded is some 3% slower: it is another one each time.
            start = load * len(order) // LOADS
            rolled = bench(order[start:] + order[:start], runs=RUNS)["rows"]
            timed.append([rolled[i - start] for i in range(len(order))])
        medians = np.array([[row["median"] for row in rows] for rows in timed])
        least = np.array([[row["min"] for row in rows] for rows in timed]).min(0)
        expected = Classifier(files["plain", "fp32"])(held_out)
        rows = []
        for index, ((name, precision), file) in enumerate(files.items()):
            base = PRECISIONS.index(precision)
            ratios = medians[:, index] / medians[:, base]
            found = Classifier(file)(held_out)
            rows.append(
                {
                    "variant": name,
                    "precision": precision,
                    "median_ms": round(float(np.median(medians[:, index])), 4),
                    "min_ms": round(float(least[index]), 4),
                    "ratio_to_plain": [
                        round(float(np.percentile(ratios, q)), 3) for q in (0, 50, 100)
                    ],
                    "agreement": round(float((found.argmax(1) == expected.argmax(1)).mean()), 4),
                    "top1": round(float((found.argmax(1) == labels).mean()), 4),
                    "difference": float(np.abs(found - expected).max()),
                    **audit(file),
                }
            )
    by = {(row["variant"], row["precision"]): row for row in rows}
    faster = {
        "plain int8 / ours int8": by["plain", "int8"]["median_ms"] / by["all", "int8"]["median_ms"],
        "plain fp32 / ours fp32": by["plain", "fp32"]["median_ms"] / by["all", "fp32"]["median_ms"],
        "ours fp32 / ours int8": by["all", "fp32"]["median_ms"] / by["all", "int8"]["median_ms"],
    }
    result = {
        "command": shlex.join(["python", "benchmarks/rewrites/compare.py", *sys.argv[1:]]),
        "machine": here,
        "protocol": f"{PROTOCOL} {LOADS} loads of {RUNS} rounds; {__doc__.split(chr(10) * 2)[-1].strip()}",
        "network": card.name,
        "images": {"calibration": len(calibration), "held out": len(held_out)},
        "faster": {key: round(value, 3) for key, value in faster.items()},
        "rows": rows,
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':28}" + "".join(f"{p + ' ms':>10}{'ratio (range)':>22}" for p in PRECISIONS), end="")
    print("   partitions  QUANTIZE  agreement int8")
    for name in names:
        print(f"{name:28}", end="")
        for precision in PRECISIONS:
            row = by[name, precision]
            low, middle, high = row["ratio_to_plain"]
            print(f"{row['median_ms']:10.3f}{f'{middle:.3f} ({low:.3f}-{high:.3f})':>22}", end="")
        nodes = "/".join(str(by[name, precision]["partitions"]) for precision in PRECISIONS)
        row = by[name, "int8"]
        print(f"{nodes:>13}{row['quantize_inside']:>10}{row['agreement']:>16.1%}")
    print(result["faster"])


if __name__ == "__main__":
    main(*sys.argv[1:])
