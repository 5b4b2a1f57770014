"""Time models on this machine, with nothing but numpy and the runtime that they need.

    python3 bench.py MODEL... [--threads 1,2] [--runs 200] [--against MODEL] [--output FILE.json]

MODEL is a .tflite file (needs ai-edge-litert) or an .onnx file (needs onnxruntime). Copy this one file
to a board and run it, or let `ghostedge bench MODEL --on HOST` do so: it runs this same file. It
imports nothing of ghostedge, except for a .safetensors checkpoint. Needs Python 3.10 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts the script's folder first: a file beside it must not stand for a library.
    sys.path.pop(0)

import numpy as np

PROTOCOL = (
    "Wall time of one bare invoke, its input already in place (no decoding, resizing or copying "
    "in): LiteRT's invoke, ONNX Runtime's run, PyTorch's forward. All models are loaded in one "
    "process and warmed up until three blocks of invokes agree; every round times each once, right "
    "after an untimed invoke of it, the order moving on by one. The rounds are spread over five "
    "loads, because a model runs some percent faster or slower from load to load, as its memory "
    "falls. The median is the geometric mean of the five loads' medians, its interval and that of "
    "the ratio are 95% t-intervals over the loads, percentiles are over all rounds. A ratio whose "
    "interval holds 1 is noise. Load time, first inference and peak memory are of one run in a "
    "process of its own, the file read before."
)
FORMAT = 2
SAYS = "bench: "
"""Begins the sentence that main ends with where a model cannot be timed."""
LOADS = 5
T_95 = 2.776
"""Student's t for a two-sided 95% interval from five values."""
QUANTIZED = ("int8", "mixed")
"""Precisions of quantized models: all in integers, or with some float inside."""
ANY_SIZE = "{} takes images of any size: export it with a fixed height and width."

RUNTIME_OF = {".tflite": "litert", ".onnx": "onnxruntime", ".safetensors": "torch"}
PACKAGES = {
    "litert": ("ai_edge_litert.interpreter", "ai-edge-litert"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "torch": ("torch", "torch"),
}
DELEGATES = {
    "litert": "XNNPACK with its default flags",
    "onnxruntime": "CPUExecutionProvider",
    "torch": "none",
}
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
# The arm64 kernel gives numbers where x86 gives a name: implementer 0x41, and these parts.
ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}
# Bits of `vcgencmd get_throttled`; the same 16 higher for "since boot".
THROTTLED = {
    0: "the supply voltage is too low",
    1: "the clock is capped",
    2: "the CPU is throttled",
    3: "the soft temperature limit is reached",
}


class Problem(Exception):
    """What keeps a model from being timed, as a sentence for the person."""


class Loaded:
    """A model in its runtime with its input set: `invoke()` is what is timed.

    imgsz: side of its square input image; None where the input is none.
    partitions: in how many pieces XNNPACK runs a .tflite; None for the others.
    """

    precision: str
    batch: int
    imgsz: int | None
    partitions: int | None = None
    invoke: Callable[[], Any]


def kind(path: str) -> str:
    """Return the runtime of a model file; raises Problem for what is none."""
    runtime = RUNTIME_OF.get(Path(path).suffix)
    if runtime is None:
        raise Problem(f"{path} cannot be timed: name a .tflite, .onnx or .safetensors file.")
    if not Path(path).is_file():
        raise Problem(f"There is no file {path}: check its name and folder.")
    if os.path.getsize(path) == 0:
        raise Problem(f"{path} is empty: export or copy it again.")
    return runtime


def imported(runtime: str) -> Any:
    """Return the module of a runtime, one of `PACKAGES`; raises Problem where it is missing."""
    module, package = PACKAGES[runtime]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Problem(f"{package} is missing ({error}): pip install {package}") from error


def load(path: str, threads: int) -> Loaded:
    """Load a model file and set random pixels as its input."""
    loaders = {"litert": _litert, "onnxruntime": _onnxruntime, "torch": _torch}
    return loaders[kind(path)](path, threads)


def _random(path: str, shape: Sequence[Any], dtype: Any) -> np.ndarray:
    """Return pixels for an input of a model; only the batch may be free (a name or -1): one image."""
    sizes = [size if isinstance(size, int) and size > 0 else 1 for size in shape]
    if sizes[1:] != list(shape[1:]):
        raise Problem(ANY_SIZE.format(path))
    low = -128 if dtype == np.int8 else 0
    return np.random.default_rng(0).integers(low, low + 256, sizes).astype(dtype)


def _litert(path: str, threads: int) -> Loaded:
    from ai_edge_litert.interpreter import Interpreter

    # Only content is verified before use: LiteRT 2.1.0 crashes on a truncated file by path.
    net = Interpreter(model_content=Path(path).read_bytes(), num_threads=threads)
    net.allocate_tensors()
    inputs = net.get_input_details()
    for tensor in inputs:
        shape = tensor["shape_signature"].tolist()
        net.set_tensor(tensor["index"], _random(path, shape, tensor["dtype"]))
    outer = {tensor["index"] for tensor in (*inputs, *net.get_output_details())}
    held = {t["dtype"] for t in net.get_tensor_details() if t["index"] not in outer}
    found = Loaded()
    found.precision = "fp16" if np.float16 in held else "fp32"
    if held & {np.int8, np.uint8}:
        found.precision = "mixed" if np.float32 in held else "int8"
    found.batch, found.imgsz = int(inputs[0]["shape"][0]), _side(inputs[0]["shape"])
    found.partitions = [op["op_name"] for op in net._get_ops_details()].count("DELEGATE")
    found.invoke = net.invoke
    return found


def _onnxruntime(path: str, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    net = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {}
    for tensor in net.get_inputs():
        kind = tensor.type[len("tensor(") : -1]
        feed[tensor.name] = _random(path, tensor.shape, "float32" if kind == "float" else kind)
    found = Loaded()
    # The op's name stands in the file as plain bytes; reading it properly would take onnx.
    found.precision = "int8" if b"QuantizeLinear" in Path(path).read_bytes() else "fp32"
    shape = next(iter(feed.values())).shape
    found.batch, found.imgsz = shape[0], _side(shape)
    found.invoke = lambda: net.run(None, feed)
    return found


def _torch(path: str, threads: int) -> Loaded:
    from ghostedge.runtime import Torch

    net = Torch(Path(path), threads)
    values = net.normalized(_random(path, (1, net.size, net.size, 3), np.uint8))
    found = Loaded()
    found.precision, found.batch, found.imgsz = net.precision, 1, net.size
    found.invoke = lambda: net.logits(values)
    return found


def _side(shape: Sequence[int]) -> int | None:
    """Return the side of a batch of square images, channels first or last."""
    return int(shape[2]) if len(shape) == 4 and shape[2] in (shape[1], shape[3]) else None


def first_use(path: str, threads: int) -> dict[str, float | None]:
    """Measure what the first use of a model costs, in a process that has done nothing before.

    load_ms and first_ms (the runtime imported and the file in the page cache), peak_mb of the whole
    process, and model_mb, its rise from before loading (None outside Linux).
    """
    imported(kind(path))
    Path(path).read_bytes()
    before = _memory("VmRSS")
    try:
        start = time.perf_counter_ns()
        model = load(path, threads)
        loaded = time.perf_counter_ns()
        model.invoke()
        end = time.perf_counter_ns()
    except Problem:
        raise
    except Exception as error:  # each runtime has its own
        reason = " ".join(str(error).split()).rstrip(".")
        raise Problem(
            f"{path} cannot be run ({reason}): it is damaged or made for another version of "
            f"{PACKAGES[kind(path)][1]}; export or copy it again."
        ) from error
    peak = _memory("VmHWM")
    return {
        "load_ms": (loaded - start) / 1e6,
        "first_ms": (end - loaded) / 1e6,
        "peak_mb": peak,
        "model_mb": None if peak is None or before is None else peak - before,
    }


def _memory(field: str) -> float | None:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def _in_own_process(path: str, label: str, threads: int) -> dict[str, Any]:
    """Run `first_use` in a fresh Python: a crash of the runtime ends there, too."""
    command = [sys.executable, __file__, path, "--threads", str(threads), "--first-use"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    said = done.stderr.strip().splitlines() or [""]
    if done.returncode == 2 and said[-1].startswith(SAYS):
        raise Problem(said[-1][len(SAYS) :].replace(path, label))
    raise Problem(
        f"{label} ends Python with code {done.returncode} ({said[-1][:200]}): the runtime crashes "
        "on it; try another version of the runtime or export the model again."
    )


def warm_up(invoke: Callable[[], Any]) -> bool:
    """Invoke until the medians of three blocks lie within 3%; return False where 1 s does not do."""
    medians: list[float] = []
    start = time.perf_counter()
    while True:
        times: list[float] = []
        while len(times) < 5 or sum(times) < 0.01:
            began = time.perf_counter()
            invoke()
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
        if len(medians) >= 3 and max(medians[-3:]) <= 1.03 * min(medians[-3:]):
            return True
        if len(medians) >= 3 and time.perf_counter() - start > 1:
            return False


def rounds(invokes: Sequence[Callable[[], Any]], count: int) -> np.ndarray:
    """Time each in each of `count` rounds; return milliseconds, float64 (invokes, count)."""
    times = np.empty((len(invokes), count))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(count):
            for step in range(len(invokes)):
                index = (turn + step) % len(invokes)
                invoke = invokes[index]
                # Without it a small model pays for the caches that the one before it filled: a
                # 0.48 ms one beside two of 1.3 and 2.2 ms took 0.60 ms, with it 0.50.
                invoke()
                start = time.perf_counter_ns()
                invoke()
                times[index, turn] = (time.perf_counter_ns() - start) / 1e6
    finally:
        if collecting:
            gc.enable()
    return times


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the geometric mean of one positive value a load, and its 95% interval."""
    logs = np.log(values)
    half = T_95 * logs.std(ddof=1) / math.sqrt(len(logs))
    low, middle, high = np.exp(logs.mean() + half * np.array([-1, 0, 1])).tolist()
    return middle, low, high


def measure(
    models: Sequence[str],
    *,
    labels: Sequence[str],
    against: int = 1,
    threads: Sequence[int] = (1,),
    runs: int = 200,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time model files against each other as `PROTOCOL` says and return the result as JSON has it.

    labels: what to call them. against: how many of the first ones are what each of the others is
    compared with, the one of the same file name among them, else the first. runs: rounds, made up
    to a multiple of LOADS. Raises Problem.
    """
    runtimes = sorted({kind(path) for path in models})
    for runtime in runtimes:
        imported(runtime)
    names = [os.path.basename(label) for label in labels]
    bases = [names.index(name) if name in names[:against] else 0 for name in names]
    before, here = state(), machine()
    before["frequency_mhz"] = None  # idle, it tells nothing
    rows: list[dict[str, Any]] = []
    warnings = []
    for count in threads:
        firsts = []
        for path, label in zip(models, labels, strict=True):
            say(f"first use of {label}, threads={count}")
            firsts.append(_in_own_process(path, label, count))
        times = np.empty((len(models), LOADS, -(-runs // LOADS)))
        restless = set()
        for number in range(LOADS):
            say(f"load {number + 1} of {LOADS}, threads={count}")
            # The first one loaded is some 3% slower: it is another one each time.
            shift = number * len(models) // LOADS
            order = [(shift + i) % len(models) for i in range(len(models))]
            loaded = {index: load(models[index], count) for index in order}
            restless |= {labels[index] for index in order if not warm_up(loaded[index].invoke)}
            before["frequency_mhz"] = before["frequency_mhz"] or state()["frequency_mhz"]
            invokes = [loaded[index].invoke for index in order]
            times[order, number] = rounds(invokes, times.shape[2])
        warnings += [
            f"{label} did not become steady within 1 s of warming up at threads={count}: something "
            "disturbs it; pause other work, let the board cool down and repeat."
            for label in sorted(restless)
        ]
        medians = np.median(times, axis=2)
        made = [
            {
                "model": labels[index],
                **_file(path, loaded[index]),
                "threads": count,
                **_latency(times[index], medians[index]),
                **_ratio(medians[index], medians[base], index == base),
                "against": labels[base],
                **firsts[index],
            }
            for index, (path, base) in enumerate(zip(models, bases, strict=True))
        ]
        warnings += _not_faster(made, medians)
        rows += made
    after = state()
    for runtime in runtimes:
        module, package = PACKAGES[runtime]
        here["versions"][package] = sys.modules[module.partition(".")[0]].__version__
        here["delegates"][runtime] = DELEGATES[runtime]
    rounded = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    return {
        "name": here["board"] or here["cpu"],
        "rounds": times.shape[1] * times.shape[2],
        "machine": here,
        "before": before,
        "after": after,
        "rows": rounded,
        "warnings": state_warnings(before, after, here["cores"]) + warnings,
    }


def _file(path: str, model: Loaded) -> dict[str, Any]:
    content = Path(path).read_bytes()
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "runtime": kind(path),
        "precision": model.precision,
        "partitions": model.partitions,
        "accuracy": None,
        "batch": model.batch,
        "imgsz": model.imgsz,
    }


def _latency(times: np.ndarray, medians: np.ndarray) -> dict[str, float]:
    """Return the figures of one model: times (LOADS, rounds), medians (LOADS,)."""
    median, low, high = interval(medians)
    p90, p99, least = (float(np.percentile(times, q)) for q in (90, 99, 0))
    figures = {"median": median, "low": low, "high": high, "p90": p90, "p99": p99}
    return {**figures, "min": least, "mean": float(times.mean())}


def _ratio(medians: np.ndarray, base: np.ndarray, is_base: bool) -> dict[str, Any]:
    ratio, low, high = interval(medians / base)
    verdict = "base" if is_base else "faster" if high < 1 else "slower" if low > 1 else "noise"
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "verdict": verdict}


def document(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the file that results are kept in; bench.schema.json describes it."""
    return {"format": FORMAT, "protocol": PROTOCOL, "unit": "ms", "results": list(results)}


def _not_faster(rows: Sequence[dict[str, Any]], medians: np.ndarray) -> list[str]:
    """Compare each quantized model with the fp32 ones beside it in the same folder and runtime."""
    found = []
    for i, quantized in enumerate(rows):
        for j, other in enumerate(rows):
            kin = quantized["runtime"] == other["runtime"] and (
                os.path.dirname(quantized["model"]) == os.path.dirname(other["model"])
            )
            if kin and quantized["precision"] in QUANTIZED and other["precision"] == "fp32":
                _, low, high = interval(medians[i] / medians[j])
                if high >= 1:
                    how = (
                        f"takes {low:.2f} to {high:.2f} times as long as"
                        if low > 1
                        else f"cannot be told apart ({low:.2f} to {high:.2f} times) from"
                    )
                    found.append(
                        f"int8 is not faster than fp32 here: {quantized['model']} {how} "
                        f"{other['model']} at threads={quantized['threads']}."
                    )
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""


def machine(root: str = "/") -> dict[str, Any]:
    """Return what of this machine a latency depends on and stays as it is: CPU, versions.

    root: where /proc and /sys are.
    """
    entries = [line.partition(":") for line in _read(f"{root}/proc/cpuinfo").splitlines()]
    info = {key.strip().lower(): value.strip() for key, _, value in entries}
    flags = set((info.get("flags") or info.get("features") or "").split())
    names = (
        info.get("model name"),
        ARM_PARTS.get(info.get("cpu part", "")),
        platform.processor(),
        platform.machine(),
    )
    memory = re.search(r"MemTotal:\s+(\d+)", _read(f"{root}/proc/meminfo"))
    return {
        "board": _read(f"{root}/proc/device-tree/model") or None,
        "cpu": next((name for name in names if name), "unknown"),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "features": [feature for feature in FEATURES if feature in flags],
        "memory_mb": int(memory[1]) * 1024 // 1_000_000 if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "delegates": {},
    }


def saturates(features: Collection[str]) -> bool:
    """Return whether ONNX Runtime sums int8 products in 16 bits: on x86 without dot products."""
    return "avx2" in features and not DOT_PRODUCTS & set(features)


def state(root: str = "/") -> dict[str, Any]:
    """Return what of this machine changes and decides a latency.

    load_average of a minute; governor and frequency_mhz, the highest of the cores; temperature_c,
    the hottest zone; throttled, the bits of a Pi's firmware (`THROTTLED`); on_battery; profile, the
    system's power profile. None where it is not known.
    """
    policies = sorted(Path(root, "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    clocks = [int(c) for p in policies if (c := _read(p / "scaling_cur_freq")).isdigit()]
    driver = _read(policies[0] / "scaling_driver") if policies else ""
    governor = _read(policies[0] / "scaling_governor") if policies else ""
    # These choose the clock themselves: their powersave is no fixed low clock.
    if driver in ("intel_pstate", "amd-pstate-epp"):
        governor += f" of {driver}"
    zones = Path(root, "sys/class/thermal").glob("thermal_zone*/temp")
    degrees = [int(t) / 1000 for zone in zones if (t := _read(zone)).lstrip("-").isdigit()]
    supplies = list(Path(root, "sys/class/power_supply").glob("*"))
    discharging = [
        _read(s / "status") == "Discharging"
        for s in supplies
        if _read(s / "type") == "Battery" and _read(s / "scope") != "Device"
    ]
    return {
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "governor": governor or None,
        "frequency_mhz": max(clocks) // 1000 if clocks else None,
        "temperature_c": max(degrees) if degrees else None,
        "throttled": _throttled(root),
        "on_battery": any(discharging) if discharging else None,
        "profile": _read(f"{root}/sys/firmware/acpi/platform_profile") or None,
    }


def _throttled(root: str) -> int | None:
    """Ask a Pi's firmware: by its file, else by the tool."""
    for file in Path(root, "sys/devices/platform/soc").glob("soc:firmware/get_throttled"):
        with contextlib.suppress(ValueError):
            return int(_read(file), 16)
    tool = shutil.which("vcgencmd")
    if tool is None:
        return None
    try:
        said = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=5)
        return int(said.stdout.partition("=")[2], 16)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def state_warnings(before: dict[str, Any], after: dict[str, Any], cores: int) -> list[str]:
    """Return what made these timings worse than the machine can do, each with its remedy."""
    found = []
    load_average = before["load_average"]
    if load_average is not None and load_average > 0.5 * cores:
        found.append(
            f"Other work was running: a load average of {load_average} on {cores} cores before the "
            "start. Trust the ratios, not the milliseconds, or pause it and repeat."
        )
    for bit, what in THROTTLED.items():
        now = (before["throttled"] or 0) | (after["throttled"] or 0)
        newly = (after["throttled"] or 0) & ~(before["throttled"] or 0)
        if now >> bit & 1 or newly >> (bit + 16) & 1:
            remedy = "use the board's own power supply" if bit == 0 else "cool the board"
            found.append(f"The firmware reports that {what}: {remedy} and repeat.")
    clocks = before["frequency_mhz"], after["frequency_mhz"]
    if None not in clocks and clocks[1] < 0.9 * clocks[0]:
        found.append(
            f"The clock fell from {clocks[0]} to {clocks[1]} MHz during the run: let the machine "
            "cool down, or fan it, and repeat."
        )
    if after["temperature_c"] is not None and after["temperature_c"] >= 80:
        found.append(
            f"It is {after['temperature_c']:.0f} degrees hot, where boards slow down: add a heat "
            "sink or a fan and repeat."
        )
    if before["on_battery"]:
        found.append("It runs on battery, which saves power: plug it in and repeat.")
    if before["governor"] == "powersave":
        found.append(
            "The governor is powersave, which keeps the clock at its lowest: set another one (echo "
            "ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor) and repeat."
        )
    if before["profile"] in ("low-power", "quiet"):
        found.append(
            f"The power profile is {before['profile']}: choose balanced or performance and repeat."
        )
    return found


def called(row: dict[str, Any]) -> str:
    """Return what a row's model is called, with the images of one invoke where they are several."""
    return f"{row['model']} ({row['batch']} images)" if row["batch"] > 1 else str(row["model"])


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, heading, rows) of the latencies, and of what else a model costs, as text."""
    latency, cost = [], []
    for row in result["rows"]:
        spread = 50 * (row["high"] - row["low"]) / row["median"]
        name = [called(row), str(row["threads"])]
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        times = [f"{row[key]:.3f}" for key in ("p90", "p99", "min")]
        latency.append(
            [*name, f"{row['median']:.3f} ± {spread:.1f}%", *times, ratio, row["verdict"]]
        )
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']['top1']:.2f}%"
        cost.append(
            [
                *name,
                row["runtime"],
                row["precision"],
                f"{row['bytes'] / 1000:.0f}",
                f"{row['load_ms']:.1f}",
                f"{row['first_ms']:.2f}",
                *("" if row[key] is None else f"{row[key]:.1f}" for key in ("peak_mb", "model_mb")),
                "" if row["partitions"] is None else str(row["partitions"]),
                accuracy,
            ]
        )
    where = " with ".join(dict.fromkeys([result["name"], result["machine"]["cpu"]]))
    heading = "model,threads,median ms,p90,p99,min,ratio (95%),verdict".split(",")
    costs = (
        "model,threads,runtime,precision,kB,load ms,first ms,peak MB,of the model,partitions,top-1"
    )
    return [
        (f"{result['rounds']} interleaved rounds on {where}", heading, latency),
        ("First use and size", costs.split(","), cost),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--threads", default="1", help="numbers of CPU threads, as in 1,2")
    parser.add_argument("--runs", type=int, default=200, help="rounds")
    parser.add_argument("--against", action="append", default=[], help="compare with this model")
    parser.add_argument("--output", type=Path, help="a .json file for `ghostedge compare`")
    parser.add_argument("--labels", type=Path, help="a .json list of what to call the models")
    parser.add_argument("--first-use", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        threads = [int(count) for count in given.threads.split(",")]
        if given.runs < 1 or min(threads) < 1:
            raise ValueError
    except ValueError:
        parser.error("--runs takes a number from 1, --threads numbers such as 1,2")
    if given.output and (given.output.is_dir() or not given.output.parent.is_dir()):
        parser.error(f"--output takes a file in a folder that exists, which {given.output} is not")
    try:
        if given.first_use:
            print(json.dumps(first_use(given.models[0], threads[0])))
            return
        models = [*given.against, *(m for m in given.models if m not in given.against)]
        result = measure(
            models,
            labels=json.loads(given.labels.read_text("utf-8")) if given.labels else models,
            against=len(given.against) or 1,
            threads=threads,
            runs=given.runs,
            say=lambda line: print(f"- {line}", flush=True),
        )
    except Problem as problem:
        print(f"{SAYS}{problem}", file=sys.stderr)
        sys.exit(2)
    for title, heading, rows in tables(result):
        columns = list(zip(heading, *rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        print(f"\n{title}")
        for cells in (heading, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))
    print("", *result["warnings"], sep="\n")
    if given.output:  # last, so that a full disk does not cost the figures
        given.output.write_text(json.dumps(document([result]), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
