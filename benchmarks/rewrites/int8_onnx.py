"""What each idea of the way to int8 in ONNX Runtime gains: alone, left out, and all together.

    taskset -c 0 python benchmarks/rewrites/int8_onnx.py CHECKPOINT DATA

DATA is a folder of labelled images with train/. Calibrates on 500 of the images that the checkpoint
was trained on and checks on all that it was not. Writes int8_onnx.json beside this file: times by the
protocol of `ghostedge bench` over LOADS loads as compare.py does, relative to model.onnx; sizes,
accuracy; and the microseconds of each kind of operator by ONNX Runtime's own profiler, which adds
about one to each node.
"""

from __future__ import annotations

import collections
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime

from ghostedge import checkpoint as checkpoints
from ghostedge.convert import to_int8_onnx, to_onnx
from ghostedge.convert.rewrites import ORT_INT8
from ghostedge.data.sources import open_data, recorded_split
from ghostedge.evaluate import paired
from ghostedge.latency.runner import PROTOCOL, machine
from ghostedge.latency.timing import bench
from ghostedge.models import fold
from ghostedge.runtime import Classifier

HERE = Path(__file__).parent
LOADS, RUNS, PROFILED = 3, 100, 300
IDEAS = (*(change.__name__ for change in ORT_INT8), "gather_upsample", "front")


def variants() -> dict[str, tuple[str, ...]]:
    made: dict[str, tuple[str, ...]] = {"plain": (), "all": IDEAS}
    for idea in IDEAS:
        made[f"only {idea}"] = (idea,)
        made[f"without {idea}"] = tuple(other for other in IDEAS if other != idea)
    return made


def quantize(model: Path, output: Path, images: np.ndarray, ideas: tuple[str, ...]) -> None:
    passes = tuple(change for change in ORT_INT8 if change.__name__ in ideas)
    left_out: dict[str, Callable[..., Any]] = {}
    if "gather_upsample" not in ideas:
        left_out["gather_upsample"] = lambda model, in_float: 0
    if "front" not in ideas:
        left_out["front"] = lambda model: ["centre", "normalize"]
    with mock.patch.multiple(to_int8_onnx, ORT_INT8=passes, **left_out):
        to_int8_onnx.quantize(model, output, images)


def profile(file: Path, folder: Path) -> dict[str, list[float]]:
    """Return (nodes, microseconds of one inference) by kind of operator, most first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    shape = [side if isinstance(side, int) else 1 for side in session.get_inputs()[0].shape]
    for _ in range(PROFILED):
        session.run(None, {"image": np.full(shape, 100, np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    times = collections.defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"]].append(event["dur"])
    kinds: dict[str, list[float]] = {}
    for (kind, _), node in times.items():
        nodes, total = kinds.get(kind, (0, 0.0))
        kinds[kind] = [
            nodes + 1,
            round(total + float(np.mean(np.sort(node)[: len(node) * 9 // 10])), 1),
        ]
    return dict(sorted(kinds.items(), key=lambda kind: -kind[1][1]))


def main(weights: str, data: str) -> None:
    here = machine()
    card, net = checkpoints.build(weights)
    source = open_data(data).train
    assert source is not None
    train, rest = recorded_split(source, card.data)
    chosen = np.sort(np.random.default_rng(0).choice(train, 500, replace=False))
    calibration = source.read(card.pixels.size, chosen).pixels
    held_out = source.read(card.pixels.size, np.sort(rest))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {"fp32": folder / "model.onnx"}
        core = to_onnx.core(fold(net), card.pixels, 17)
        onnx.save(to_onnx.simplified(to_onnx.with_raw_pixels(core)), files["fp32"])
        for name, ideas in variants().items():
            files[name] = folder / f"{name}.onnx"
            quantize(files["fp32"], files[name], calibration, ideas)
        order, timed = list(files.values()), []
        for load in range(LOADS):
            start = load * len(order) // LOADS
            rows = bench(order[start:] + order[:start], runs=RUNS)["rows"]
            timed.append([rows[i - start]["median"] for i in range(len(order))])
        medians = np.array(timed)
        right = {}
        expected = Classifier(files["fp32"])(held_out.pixels).argmax(1)
        rows = []
        for index, (name, file) in enumerate(files.items()):
            found = Classifier(file)(held_out.pixels).argmax(1)
            right[name] = found == held_out.labels
            drop, half = paired(right["fp32"], right[name])
            ratios = medians[:, index] / medians[:, 0]
            rows.append(
                {
                    "variant": name,
                    "median_ms": round(float(np.median(medians[:, index])), 4),
                    "ratio_to_fp32": [
                        round(float(np.percentile(ratios, q)), 3) for q in (0, 50, 100)
                    ],
                    "bytes": file.stat().st_size,
                    "top1": round(100 * float(right[name].mean()), 2),
                    "drop": [round(drop, 2), round(half, 2)],
                    "agreement": round(100 * float((found == expected).mean()), 2),
                }
            )
        profiles = {name: profile(files[name], folder) for name in ("fp32", "plain", "all")}
    result = {
        "command": shlex.join(["python", "benchmarks/rewrites/int8_onnx.py", *sys.argv[1:]]),
        "machine": here,
        "protocol": f"{PROTOCOL} {LOADS} loads of {RUNS} rounds.",
        "network": card.name,
        "images": {"calibration": len(calibration), "held out": len(held_out.pixels)},
        "rows": rows,
        "profiles": profiles,
    }
    (HERE / "int8_onnx.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        low, middle, high = row["ratio_to_fp32"]
        print(
            f"{row['variant']:28}{row['median_ms']:8.3f} ms  {middle:.3f} ({low:.3f}-{high:.3f})"
            f"{row['bytes'] / 1000:7.0f} kB  drop {row['drop'][0]} +- {row['drop'][1]}"
            f"  agreement {row['agreement']}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
