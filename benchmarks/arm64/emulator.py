"""An arm64 CPU without one: models run by LiteRT and ONNX Runtime under qemu-user, instructions counted.

    python benchmarks/arm64/emulator.py

sets it up, in a folder of the user's cache: a Debian arm64 root, the arm64 wheels of the versions that
this environment has, the files that tell a program which board it is on, and the plugin that counts.
Needs Linux on x86-64, root, and Debian's qemu-user (7.2), mmdebstrap and gcc.

A count is of guest instructions and exact: it compares models on one CPU and shows regressions. It
is not a time: instructions differ in what they cost, and caches are not modelled.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PYTHON = "3.11"
"""Debian 12's."""
PACKAGES = ("python3.11", "libstdc++6")
WHEELS = ("ai-edge-litert", "onnxruntime", "numpy", "flatbuffers", "tqdm")
RUNS = 5


@dataclasses.dataclass(frozen=True)
class Board:
    """What /proc and /sys say of a board; sizes in KiB, clocks in kHz."""

    model: str
    part: str
    revision: str
    features: str
    clock: int
    level1: tuple[int, int]
    level2: int
    level2_shared: bool


BASIC = "fp asimd evtstrm crc32 cpuid"
BOARDS = {
    "cortex-a53": Board(
        "Raspberry Pi Zero 2 W Rev 1.0", "0xd03", "4", BASIC, 1_000_000, (32, 32), 512, True
    ),
    "cortex-a72": Board(
        "Raspberry Pi 4 Model B Rev 1.5", "0xd08", "3", BASIC, 1_800_000, (32, 48), 1024, True
    ),
    "cortex-a76": Board(
        "Raspberry Pi 5 Model B Rev 1.0",
        "0xd0b",
        "1",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        2_400_000,
        (64, 64),
        512,
        False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model on one CPU. instructions: of one invoke; by_symbol: their share, largest first.

    outputs, reference: raw, (images, classes), of the default and of LiteRT's reference kernels.
    """

    instructions: float
    by_symbol: dict[str, float]
    outputs: np.ndarray
    reference: np.ndarray


def unavailable() -> str | None:
    """Return why there is no emulation on this machine, None where there is one."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the arm64 emulation needs Linux on x86-64"
    if _folder().exists():
        return None if shutil.which("qemu-aarch64") else "qemu-aarch64 is gone: install qemu-user"
    if os.getuid() != 0:
        return "the arm64 emulation is set up by root"
    missing = [
        tool for tool in ("qemu-aarch64", "mmdebstrap", "gcc", "nm") if not shutil.which(tool)
    ]
    if missing:
        return f"there is no {missing[0]}: apt-get install qemu-user mmdebstrap gcc libc6-dev"
    said = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"version (\d+)", said)
    if version is None or not 6 <= int(version[1]) <= 8:
        return "the plugin is for QEMU 6 to 8, as in Debian 12"
    return None


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in WHEELS}


def expect_versions(
    file: Path, measured: dict[str, str], here: dict[str, str], names: Sequence[str]
) -> None:
    """Exit where a file's figures are of other versions: ours could not stand beside them."""
    for name in names:
        if measured[name] != here[name]:
            sys.exit(
                f"{file} was measured with {name} {measured[name]}, and here is {here[name]}: "
                "install that, or delete the file to measure all anew."
            )


@functools.cache
def _folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_of = json.dumps(versions()) + Path(__file__).read_text() + (HERE / "icount.c").read_text()
    return cache / "ghostedge" / f"arm64-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def set_up() -> Path:
    """Return the folder of the emulation, made where it is not there yet.

    Raises RuntimeError where this machine cannot, and where a step fails, with what it said.
    """
    folder = _folder()
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        root = debian_root(made / "root", PACKAGES)
        for cpu, board in BOARDS.items():
            _run("cp", "-al", root, made / cpu)
            board_files(made / cpu, board)
        shutil.rmtree(root)
        wheels(made / "site")
        plugin = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-o", made / "icount.so"]
        _run("gcc", *plugin, HERE / "icount.c")
        made.replace(folder)
    return folder


def debian_root(root: Path, packages: Sequence[str], *options: str) -> Path:
    """Unpack Debian 12's arm64 packages, and what they need, into `root`; nothing of it is run."""
    include = f"--include={','.join(packages)}"
    variant = ("--quiet", "--variant=extract", "--architectures=arm64")
    _run("mmdebstrap", *variant, include, *options, "bookworm", root)
    return root


def wheels(site: Path) -> None:
    """Install arm64 wheels of the versions that this environment has."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", site, "--no-deps"]
    tags = ["2014", "_2_17", "_2_27", "_2_28"]
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in tags]
    kind = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    pins = [f"{name}=={version}" for name, version in versions().items()]
    _run(*pip, *kind, *platforms, *pins)


def board_files(root: Path, board: Board, cores: int = 4) -> None:
    """Write /proc and /sys: without them LiteRT and ONNX Runtime read the host's, and crash."""
    files = {"proc/cpuinfo": "", "proc/device-tree/model": f"{board.model}\0"}
    cpus, every = "sys/devices/system/cpu", f"0-{cores - 1}"
    for name in ("possible", "present", "online"):
        files[f"{cpus}/{name}"] = every
    files[f"{cpus}/kernel_max"] = "255"
    for core in range(cores):
        files["proc/cpuinfo"] += (
            f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {board.features}\n"
            f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {board.part}\nCPU revision\t: {board.revision}\n\n"
        )
        own = f"{cpus}/cpu{core}"
        for name, value in {
            "cpufreq/cpuinfo_max_freq": board.clock,
            "cpufreq/cpuinfo_min_freq": 600_000,
            "cpufreq/scaling_cur_freq": board.clock,
            "cpufreq/scaling_governor": "ondemand",
            "topology/physical_package_id": 0,
            "topology/core_id": core,
            "topology/core_siblings_list": every,
            "topology/cluster_cpus_list": every,
            "topology/package_cpus_list": every,
        }.items():
            files[f"{own}/{name}"] = str(value)
        level2_of = every if board.level2_shared else str(core)
        caches = [
            (1, "Data", board.level1[0], str(core)),
            (1, "Instruction", board.level1[1], str(core)),
            (2, "Unified", board.level2, level2_of),
        ]
        if not board.level2_shared:
            caches.append((3, "Unified", 2048, every))
        for index, (level, kind, size, shared) in enumerate(caches):
            cache = f"{own}/cache/index{index}"
            files |= {
                f"{cache}/level": str(level),
                f"{cache}/type": kind,
                f"{cache}/size": f"{size}K",
                f"{cache}/shared_cpu_list": shared,
            }
    files["proc/cpuinfo"] += f"Model\t\t: {board.model}\n"
    files["sys/class/thermal/thermal_zone0/temp"] = "48312"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if not text.endswith(("\0", "\n")) else text)


def run(model: Path, cpu: str, images: np.ndarray, *, reference: int = 0) -> Measured:
    """Run a classifier on images under `cpu`, one of BOARDS, and count RUNS invokes.

    images: uint8 (N, size, size, 3); the first `reference` of them by the reference kernels, too.
    """
    folder = set_up()
    with tempfile.TemporaryDirectory() as scratch:
        pictures, output, counts = (Path(scratch, name) for name in ("in.npy", "out", "counts"))
        np.save(pictures, images)
        plugin = ["-plugin", f"{folder}/icount.so,out={counts}"]
        guest = [HERE / "guest.py", model, pictures, output, str(RUNS), str(reference)]
        python(cpu, *guest, options=plugin)
        said = json.loads(output.read_text())
        outputs, plain = np.array(said["outputs"]), np.array(said["reference"])
        blocks = [line.split() for line in counts.read_text().splitlines()]
    ran = [(int(address, 16), int(size) * int(times)) for address, size, times in blocks]
    symbols: dict[str, int] = collections.Counter()
    for address, count in ran:
        symbols[_symbol(address, said["loaded"])] += count
    total = sum(count for _, count in ran)
    ordered = sorted(symbols.items(), key=lambda item: -item[1])
    return Measured(total / RUNS, {name: n / total for name, n in ordered}, outputs, plain)


def python(cpu: str, *arguments: Any, options: Sequence[str] = ()) -> str:
    """Run the board's Python under `cpu`, one of BOARDS; return what it printed.

    options: qemu's own. Raises RuntimeError where it ends with another code than 0.
    """
    folder = set_up()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(folder / "site"),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "QEMU_LD_PREFIX": str(folder / cpu),
        "QEMU_CPU": cpu,
    }
    binary = folder / cpu / f"usr/bin/python{PYTHON}"
    return _run("qemu-aarch64", *options, binary, *arguments, environment=environment)


def _symbol(address: int, loaded: dict[str, int]) -> str:
    """Return the function that an address is in, or the library where that has no symbols."""
    base, path = max((start, path) for path, start in loaded.items() if start <= address)
    starts, names = _symbols(path)
    index = int(np.searchsorted(starts, address - base, "right")) - 1
    return names[index] if index >= 0 else Path(path).name


@functools.cache
def _symbols(path: str) -> tuple[np.ndarray, list[str]]:
    if not os.path.isfile(path):
        return np.array([], np.int64), []
    said = subprocess.run(
        ["nm", "--defined-only", "--demangle", path], capture_output=True, text=True
    )
    lines = [line.split(maxsplit=2) for line in said.stdout.splitlines()]
    found = sorted((int(at, 16), name) for at, kind, name in lines if kind in "tTwW")
    return np.array([at for at, _ in found], np.int64), [name for _, name in found]


def _run(*command: Any, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-5:]
        raise RuntimeError(f"{command[0]} ended with code {done.returncode}: {' '.join(last)}")
    return done.stdout


if __name__ == "__main__":
    start = time.perf_counter()
    try:
        place = set_up()
    except RuntimeError as error:
        sys.exit(f"emulator: {error}.")
    print(f"{place}: {time.perf_counter() - start:.1f} s")
