"""What every registered network costs, on each target: ghostedge/costs.json.

    python benchmarks/targets/costs.py FOLDER [models] [instructions] [arena] [latency]

Without the last words all four are done, in this order; FOLDER keeps the models: name a new one after a
network or the export changed. What the table has of the same file is taken over, so that an interrupted
run goes on; 32 pixels and int8 come first. Weights are random: a cost hardly depends on them.

- models: each net, single-branch, folded, through the export's own way to TFLite: bytes of flash,
  XNNPACK partitions, largest sum of the activations alive at once, MACs.
- instructions: of the guest, of one inference on an emulated A53, A72 and A76 (benchmarks/arm64).
- arena: what TensorFlow Lite Micro (TFLM in a .venv-tflm) needs for the int8 model, with int8 ends.
- latency: of this x86 machine, as a ratio to ghostnetv3-small-1.0x int8 of the same image size, by one
  `ghostedge bench` of all, interleaved; on another CPU than the table's all of a size are timed anew.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ghostedge import markdown
from ghostedge.convert import to_int8_tflite, to_onnx, to_tflite
from ghostedge.convert.audit import audit
from ghostedge.convert.ranges import observe
from ghostedge.deploy.microcontroller import TESTED
from ghostedge.files import atomic_write
from ghostedge.latency.runner import DOT_PRODUCTS, machine
from ghostedge.latency.timing import bench
from ghostedge.models import create, fold, profile, sizes
from ghostedge.models.synthetic import noise
from ghostedge.pixels import PixelContract
from ghostedge.targets import BASE

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "arm64"))
emulator = importlib.import_module("emulator")

TABLE = HERE.parents[1] / "ghostedge" / "costs.json"
COMMAND = "python benchmarks/targets/costs.py FOLDER"
TFLM = HERE.parents[1] / ".venv-tflm" / "bin" / "python"
VERSIONS = {**emulator.versions(), "tflite-micro": TESTED}
COUNTED = ("ai-edge-litert", "tflite-micro")
"""Whose kernels are counted."""
SIZES = (32, 96)
PRECISIONS = ("int8", "fp32")
RUNS = 40
STEPS = ("models", "instructions", "arena", "latency")
ARENA = """
import importlib.metadata, sys
from tflite_micro import runtime
print(importlib.metadata.version("tflite-micro"), flush=True)
model = open(sys.argv[1], "rb").read()
runtime.Interpreter.from_bytes(model, arena_size=16_000_000).print_allocations()
"""


def networks() -> Iterator[tuple[str, str, float | None]]:
    """Return (name, architecture, width) of all but ImageNet's form, which is not for small images."""
    return (size for size in sizes() if not size[1].endswith("imagenet"))


def build(architecture: str, width: float | None) -> nn.Module:
    torch.manual_seed(0)
    return create(architecture, **({} if width is None else {"width": width, "branches": 1}))


def fixed_statistics(net: nn.Module) -> nn.Module:
    """Give a net BatchNorm statistics, without which random weights drive activations anywhere."""
    net.train()
    with torch.no_grad():
        for _ in range(10):
            net(torch.randn(32, 3, 32, 32))
    return net.eval()


def convert(net: nn.Module, size: int, folder: Path) -> None:
    """Write model_fp32.tflite, model_int8.tflite and model_int8_io.tflite (int8 ends)."""
    pixels = PixelContract(size)
    core = to_onnx.simplified(to_onnx.core(fold(net), pixels, to_onnx.TFLITE_OPSET), 1)
    model = to_tflite.convert(core)["fp32"]
    ranges = observe(model, noise(size)[:16])
    atomic_write(folder / "model_fp32.tflite", model)
    for name, io in (("int8_io", "int8"), ("int8", "uint8")):  # the last says that all are there
        content = to_int8_tflite.quantize(model, ranges, io)
        atomic_write(folder / f"model_{name}.tflite", content)


def describe(file: Path, net: nn.Module, size: int) -> dict[str, Any]:
    """Return what a model is made of. Weights differ a little from CPU to CPU, and cost nothing."""
    found = audit(file)
    return {
        "bytes": file.stat().st_size,
        "partitions": found["partitions"],
        "outside": found["outside"],
        "peak_activation_bytes": found["peak_activation_bytes"],
        "macs": profile(net, size).macs,  # of the net; rewrites may add some
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two rows are of the same model, as `describe` has it."""
    keys = ("bytes", "partitions", "outside", "peak_activation_bytes", "macs")
    return all(one.get(key) == other.get(key) for key in keys)


def instructions(file: Path, size: int) -> dict[str, int]:
    """Count one inference on every emulated CPU."""
    emulator.set_up()
    image = np.zeros((1, size, size, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda cpu: emulator.run(file, cpu, image), emulator.BOARDS)
    return {cpu: round(run.instructions) for cpu, run in zip(emulator.BOARDS, runs, strict=True)}


def arena(file: Path) -> int:
    """Return the bytes that TFLM needs beside the model."""
    done = subprocess.run([TFLM, "-c", ARENA, file], capture_output=True, text=True)
    version, _, said = (done.stdout + done.stderr).partition("\n")
    if version != VERSIONS["tflite-micro"]:
        sys.exit(
            f"{TFLM} has tflite-micro {version}, not {VERSIONS['tflite-micro']}: see README.md."
        )
    found = re.search(r"Arena allocation total (\d+) bytes", said)
    if found is None:
        sys.exit(f"TensorFlow Lite Micro cannot run {file}:\n{said}")
    return int(found[1])


class Table:
    """The rows of costs.json by network, image size and precision; several steps may run at once."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, str], dict[str, Any]] = {}
        self.machines: dict[str, Any] = {}
        self.load()

    def load(self) -> None:
        """Take over what the file has and we have not."""
        stored = json.loads(TABLE.read_text()) if TABLE.exists() else {"rows": []}
        if "versions" in stored:
            emulator.expect_versions(TABLE, stored["versions"], VERSIONS, COUNTED)
        self.machines = stored.get("machines", {}) | self.machines
        for row in stored["rows"]:
            own = self.rows.setdefault((row["network"], row["size"], row["precision"]), row)
            if same(own, row):
                own.update({key: value for key, value in row.items() if key not in own})

    def row(self, key: tuple[str, int, str], file: Path) -> dict[str, Any]:
        """Return the row of a file; it begins anew where the file is not what was measured."""
        architecture, width = next(net[1:] for net in networks() if net[0] == key[0])
        found = describe(file, build(architecture, width), key[1])
        row = self.rows.get(key, {})
        if not same(row, found):
            row = {**dict(zip(("network", "size", "precision"), key, strict=True)), **found}
            self.rows[key] = row
            self.save()
        return row

    def save(self) -> None:
        """Write all rows of networks that are registered."""
        self.load()
        head = {"command": COMMAND, "machines": self.machines, "base": BASE, "versions": VERSIONS}
        names = {net[0] for net in networks()}
        lines = [json.dumps(self.rows[key]) for key in sorted(self.rows) if key[0] in names]
        rows = ",\n".join(lines)
        atomic_write(TABLE, f'{json.dumps(head)[:-1]},\n"rows": [\n{rows}\n]}}\n')


def main(folder: Path, *steps: str) -> None:
    table = Table()
    for size, step in itertools.product(SIZES, steps or STEPS):
        if step == "latency":
            latency(table, folder, size)
            continue
        for precision in PRECISIONS if step != "models" else PRECISIONS[:1]:
            for name, architecture, width in networks():
                made = folder / f"{name}-{size}"
                file = made / f"model_{precision}.tflite"
                if step == "models" and not file.exists():
                    convert(fixed_statistics(build(architecture, width)), size, made)
                if not file.exists():
                    continue
                row = table.row((name, size, precision), file)
                if step == "instructions" and "instructions" not in row:
                    row["instructions"] = instructions(file, size)
                elif step == "arena" and precision == "int8" and "arena" not in row:
                    row["arena"] = arena(made / "model_int8_io.tflite")
                else:
                    continue
                table.save()
                print(step, json.dumps(row), flush=True)
    print(tables(table))


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def tables(table: Table) -> str:
    """Return the tables of README.md: int8 (fp32), for each image size."""
    heads = ["network", "MMACs", "x86", "A53", "A72", "A76", "TFLM kB", "flash kB", "peak kB"]
    parts = []
    for size in SIZES:
        rows = []
        for name, _, _ in networks():
            both = [table.rows.get((name, size, precision), {}) for precision in PRECISIONS]
            if not both[0]:
                continue

            def pair(key: str, unit: float = 1.0, both: list[dict[str, Any]] = both) -> str:
                values = [({**row, **row.get("instructions", {})}).get(key) for row in both]
                first, second = ("-" if v is None else shown(v / unit) for v in values)
                return f"{first} ({second})"

            cells = [name, f"{both[0]['macs'] / 1e6:.1f}", pair("x86")]
            cells += [pair(cpu, 1e6) for cpu in emulator.BOARDS]
            cells.append(shown(both[0]["arena"] / 1e3) if "arena" in both[0] else "-")
            cells += [pair("bytes", 1e3), pair("peak_activation_bytes", 1e3)]
            rows.append(cells)
        parts += [f"At {size}x{size}:", markdown.table(heads, rows)]
    return "\n\n".join(parts)


def latency(table: Table, folder: Path, size: int) -> None:
    """Time all nets of an image size in one interleaved bench, so that any two can be compared."""
    keys = [(name, size, precision) for name, *_ in networks() for precision in PRECISIONS]
    files = {key: folder / f"{key[0]}-{size}" / f"model_{key[2]}.tflite" for key in keys}
    files = {key: file for key, file in files.items() if file.exists()}
    if (BASE, size, "int8") not in files:
        sys.exit(f"{folder} has no model of {BASE} at {size} pixels: run the step models first.")
    here = {key: machine()[key] for key in ("cpu", "features")}
    rows = {key: table.row(key, file) for key, file in files.items()}
    if table.machines.get(str(size)) == here and all("x86" in row for row in rows.values()):
        return
    ratios = x86([*files.values()], files[BASE, size, "int8"])
    if ratios:
        for key, file in files.items():
            rows[key]["x86"] = ratios[file]
        table.machines[str(size)] = here
        table.save()


def x86(files: list[Path], base: Path) -> dict[Path, float]:
    """Time files in one interleaved bench, so that any two can be compared; {} on an unfit CPU."""
    if not DOT_PRODUCTS.intersection(machine()["features"]):
        print("latency is left as it is: this CPU has no int8 dot products, which `desktop` has")
        return {}
    rows = bench(list(dict.fromkeys([base, *files])), runs=RUNS)["rows"]
    medians = {Path(row["model"]): row["median"] for row in rows}
    return {file: round(medians[file] / medians[base], 4) for file in files}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
