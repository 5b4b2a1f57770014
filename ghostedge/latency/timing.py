"""The timing protocol: models side by side in one process, each timed once in every round."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge.bundle import read_manifest
from ghostedge.errors import GhostEdgeError
from ghostedge.runtime import RUNTIMES, Classifier, installed

PROTOCOL = (
    "Wall time of one bare invoke, its input already in place (no decoding, resizing or copying "
    "in): LiteRT's invoke, ONNX Runtime's run, PyTorch's forward. All models are loaded in one "
    "process and warmed up; every round times each once, right after an untimed invoke of it, the "
    "order moving on by one. The ratio is that of medians to the first model's with the same "
    "threads, with the 95% bootstrap interval over whole rounds."
)
WARM_UP = 20
RESAMPLES = 1000
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


@dataclasses.dataclass(frozen=True)
class Timing:
    """One model with one number of threads; times in milliseconds of one invoke of `batch` images.

    ratio: median by the first model's median, with its 95% interval; below 1 is faster.
    """

    model: str
    runtime: str
    precision: str
    threads: int
    batch: int
    median: float
    p90: float
    p99: float
    min: float
    mean: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What `bench` measured: a row for each model and number of threads, and on what machine."""

    rows: list[Timing]
    runs: int
    machine: dict[str, Any]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(row).items()}
            for row in self.rows
        ]
        return {"protocol": PROTOCOL, "unit": "ms", **vars(self), "rows": rows}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heading and the rows, as text."""
        heading = ["model", "runtime", "threads", "median ms", "p90", "p99", "min", "ratio (95%)"]
        rows = []
        for row in self.rows:
            times = [f"{value:.3f}" for value in (row.median, row.p90, row.p99, row.min)]
            ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
            rows.append([row.model, row.runtime, str(row.threads), *times, ratio])
        return heading, rows


def bench(
    models: Sequence[str | os.PathLike[str]], *, threads: Sequence[int] = (1,), runs: int = 200
) -> BenchResult:
    """Time models against each other as `PROTOCOL` says, `runs` rounds for each number of threads.

    models: files, names of shipped weights, or bundles, of which every artefact is timed whose
    runtime is installed. Raises GhostEdgeError as `Classifier` does.
    """
    if runs < 1 or not threads or min(threads) < 1:
        raise GhostEdgeError("A bench needs at least one run and one thread.")
    here = machine()  # first, so that the load average is of what else runs here
    names = [name for model in models for name in _artefacts(model)]
    if not names:
        raise GhostEdgeError("There is no model to time: name one whose runtime is installed.")
    rows, warnings = [], _load_warning(here)
    used: set[str] = set()
    for count in threads:
        classifiers = [Classifier(name, threads=count) for name in names]
        times = _rounds(classifiers, runs)
        medians = _resampled_medians(times)
        for index, (name, classifier) in enumerate(zip(names, classifiers, strict=True)):
            median, p90, p99, least = (
                float(np.percentile(times[index], q)) for q in (50, 90, 99, 0)
            )
            low, high = _interval(medians, index, 0)
            rows.append(
                Timing(
                    model=name,
                    runtime=classifier.runtime,
                    precision=classifier.precision,
                    threads=count,
                    batch=classifier.backend.batch if classifier.backend.fixed else 1,
                    median=median,
                    p90=p90,
                    p99=p99,
                    min=least,
                    mean=float(times[index].mean()),
                    ratio=median / float(np.median(times[0])),
                    ratio_low=low,
                    ratio_high=high,
                )
            )
            used.add(classifier.runtime)
        warnings += _not_faster(names, classifiers, medians, count)
    for runtime in sorted(used):
        module = importlib.import_module(RUNTIMES[runtime].module)
        here["versions"][RUNTIMES[runtime].package] = module.__version__
    return BenchResult(rows, runs, here, warnings)


def _artefacts(model: str | os.PathLike[str]) -> list[str]:
    if not Path(model).is_dir():
        return [os.fspath(model)]
    listed = read_manifest(model)["artefacts"].items()
    return [str(Path(model, name)) for name, entry in listed if installed(entry["runtime"])]


def _rounds(classifiers: list[Classifier], runs: int) -> np.ndarray:
    """Return milliseconds, float64 (models, runs)."""
    random = np.random.default_rng(0)
    invokes = []
    for classifier in classifiers:
        backend, size = classifier.backend, classifier.size
        shape = (backend.batch if backend.fixed else 1, size, size, 3)
        backend.prepare(random.integers(0, 256, shape, np.uint8))
        invokes.append(backend.invoke)
        for _ in range(WARM_UP):
            backend.invoke()
    return rounds(invokes, runs)


def rounds(invokes: Sequence[Callable[[], object]], runs: int) -> np.ndarray:
    """Time each in every round, as `PROTOCOL` says; milliseconds, float64 (invokes, runs)."""
    times = np.empty((len(invokes), runs))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for run in range(runs):
            for turn in range(len(invokes)):
                index = (run + turn) % len(invokes)
                invoke = invokes[index]
                # Without it a small model pays for the caches that the one before it filled: a
                # 0.48 ms one beside two of 1.3 and 2.2 ms took 0.60 ms, with it 0.50.
                invoke()
                start = time.perf_counter_ns()
                invoke()
                times[index, run] = (time.perf_counter_ns() - start) / 1e6
    finally:
        if collecting:
            gc.enable()
    return times


def _resampled_medians(times: np.ndarray) -> np.ndarray:
    """Return (models, resamples): rounds are drawn whole, so that what slowed all cancels out."""
    runs = times.shape[1]
    drawn = np.random.default_rng(0).integers(0, runs, (RESAMPLES, runs), np.int32)
    return np.stack([np.median(row[drawn], axis=1) for row in times])


def _interval(medians: np.ndarray, index: int, other: int) -> tuple[float, float]:
    low, high = np.percentile(medians[index] / medians[other], (2.5, 97.5))
    return float(low), float(high)


def _not_faster(
    names: list[str], classifiers: list[Classifier], medians: np.ndarray, threads: int
) -> list[str]:
    """Compare each int8 model with the fp32 ones beside it in the same folder and runtime."""
    found = []
    for i, quantized in enumerate(classifiers):
        for j, other in enumerate(classifiers):
            kin = (quantized.runtime, quantized.path.parent) == (other.runtime, other.path.parent)
            if kin and (quantized.precision, other.precision) == ("int8", "fp32"):
                low, high = _interval(medians, i, j)
                if low >= 1:
                    found.append(
                        f"int8 is not faster than fp32 here: {names[i]} takes {low:.2f} to "
                        f"{high:.2f} times as long as {names[j]} at threads={threads}."
                    )
    return found


def machine() -> dict[str, Any]:
    """Return what of this machine a latency depends on: CPU, int8 features, load, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    pairs = [line.partition(":") for line in lines]
    info = {key.strip().lower(): value.strip() for key, _, value in pairs}
    flags = set((info.get("flags") or info.get("features") or "").split())
    names = (info.get("model name"), info.get("model"), platform.processor(), platform.machine())
    return {
        "cpu": next((name for name in names if name), "unknown"),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in flags],
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def _load_warning(here: dict[str, Any]) -> list[str]:
    load, cores = here["load_average"], here["cores"]
    if load is None or load <= 0.5 * cores:
        return []
    return [
        f"Other work was running: a load average of {load} on {cores} cores before the start. "
        "Trust the ratios, not the milliseconds, or pause it and repeat."
    ]
