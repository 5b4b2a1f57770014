"""Time and memory of the main job: export with its checks, start of the commands, evaluation.

    python benchmarks/main_job.py DATA

DATA is a folder of labelled images with train/ and test/. Run it on an idle machine. The result goes
to benchmarks/results/main_job.json; each figure is of one run, commands that take under a second are
the median of seven.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ghostedge.latency.runner import machine

WEIGHTS = "ghostnetv3-small-1.0x"
RESULT = Path(__file__).parent / "results" / "main_job.json"


def measure(*arguments: str) -> dict[str, float]:
    """Run a ghostedge command; return seconds and the peak memory of it and all its children, GB."""
    started = time.monotonic()
    child = psutil.Popen(
        [sys.executable, "-m", "ghostedge.cli", *arguments], stdout=subprocess.DEVNULL
    )
    peak = 0
    while child.poll() is None:
        total = 0
        try:
            for process in (child, *child.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak = max(peak, total)
        time.sleep(0.02)
    if child.returncode:
        sys.exit(f"{' '.join(arguments)} failed")
    return {"seconds": round(time.monotonic() - started, 2), "peak_gb": round(peak / 1e9, 2)}


def start(*arguments: str) -> dict[str, float]:
    return {
        "seconds": round(statistics.median(measure(*arguments)["seconds"] for _ in range(7)), 3)
    }


def main(data: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        flags = ["--int8", "--half", "--check-samples", "1000", "-o", str(bundle)]
        result = {
            "machine": machine(),
            "--help": start("--help"),
            "export --dry-run": start("export", WEIGHTS, "--int8", "--dry-run"),
            "export --int8 --half, no data": measure("export", WEIGHTS, *flags),
            "export --int8 --half, 1,000 images of each part": measure(
                "export", WEIGHTS, "--data", data, *flags
            ),
            "its steps, seconds": json.loads((bundle / "timings.json").read_text())["seconds"],
            "eval of int8 TFLite on the test part": measure(
                "eval", str(bundle / "model_int8.tflite"), data
            ),
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
