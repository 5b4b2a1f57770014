from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from ghostedge.latency import results, runner
from ghostedge.runtime import Classifier
from tests.convert.test_audit import in_float
from tests.runtime_fixtures import free_size, write_onnx, write_tflite

ROOT = Path(__file__).parents[2]
BY_HAND = ROOT / "deploy" / "raspberry-pi" / "bench.py"


def test_the_file_for_a_board_is_the_runner() -> None:
    assert BY_HAND.read_bytes() == Path(runner.__file__).read_bytes()


def test_by_hand_without_ghostedge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied to a folder, beside files named like libraries."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = shutil.copy(BY_HAND, tmp_path / "bench.py")
    for name in ("profile.py", "numpy.py", "ghostedge.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of this folder was imported')")
    first, second = write_onnx(tmp_path / "first.onnx"), write_onnx(tmp_path / "second one.onnx")
    command = [sys.executable, script, first, second, "--against", second, "--runs", "6"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "out.json"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "10 interleaved rounds on" in done.stdout
    stored = json.loads((tmp_path / "out.json").read_text())
    jsonschema.validate(stored, results.schema())
    (result,) = results.read(tmp_path / "out.json")
    assert [row["model"] for row in result["rows"]] == [str(second), str(first)]
    assert result["rows"][0]["verdict"] == "base"
    for row in result["rows"]:
        assert 0 < row["min"] <= row["median"] <= row["p99"]
        assert row["low"] <= row["median"] <= row["high"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert 0 < row["model_mb"] < row["peak_mb"] < 1000
        assert row["bytes"] == first.stat().st_size

    said = subprocess.run([sys.executable, script, "no.onnx"], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (
        2,
        "bench: There is no file no.onnx: check its name and folder.\n",
    )
    said = subprocess.run([*command, "--threads", "0"], capture_output=True, text=True)
    assert said.returncode == 2 and "--threads numbers such as 1,2" in said.stderr
    for nowhere in (tmp_path / "nodir" / "out.json", tmp_path):
        said = subprocess.run([*command, "--output", nowhere], capture_output=True, text=True)
        assert (said.returncode, said.stdout) == (2, "")  # before anything is timed
        assert f"a folder that exists, which {nowhere} is not" in said.stderr


def test_tables_come_before_the_file(tmp_path: Path) -> None:
    model = write_onnx(tmp_path / "model.onnx")
    command = [sys.executable, BY_HAND, model, "--runs", "1", "--output", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "interleaved rounds on" in done.stdout
    assert done.returncode != 0 and "No space left" in done.stderr


def test_a_free_image_size_is_not_timed_as_one_pixel(tmp_path: Path) -> None:
    for model in (
        write_onnx(tmp_path / "model.onnx"),
        write_tflite(tmp_path / "model.tflite", "float32"),
    ):
        assert runner.load(str(model), 1).batch == 1
        free = free_size(model)
        with pytest.raises(runner.Problem) as said:
            runner.measure([str(free)], labels=["my net"])
        assert str(said.value) == runner.ANY_SIZE.format("my net")


def test_precision_of_a_tflite(tmp_path: Path) -> None:
    """As `Classifier` tells it."""
    kinds = ("float32", "float16", "uint8", "int8")
    files = [write_tflite(tmp_path / f"{kind}.tflite", kind) for kind in kinds]
    files.append(tmp_path / "mixed.tflite")
    files[-1].write_bytes(in_float(files[2].read_bytes(), "MEAN"))
    found = [runner.load(str(file), 1).precision for file in files]
    assert found == ["fp32", "fp16", "int8", "int8", "mixed"]
    assert found == [Classifier(file).precision for file in files]


def test_a_crash_of_the_runtime_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "crashing.py"
    crashing.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(runner, "__file__", str(crashing))
    with pytest.raises(runner.Problem, match="my model ends Python with code -11"):
        runner._in_own_process("model.onnx", "my model", 1)


def test_a_missing_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(runner.Problem, match="pip install ai-edge-litert"):
        runner.imported("litert")
    importlib.import_module("onnxruntime")
    assert runner.imported("onnxruntime") is sys.modules["onnxruntime"]


def test_interval_covers() -> None:
    """95% of intervals of five log-normal values hold the middle that they were drawn around."""
    random = np.random.default_rng(0)
    drawn = np.exp(random.normal(0.5, 0.1, (2000, runner.LOADS)))
    holds = [low <= np.exp(0.5) <= high for _, low, high in map(runner.interval, drawn)]
    assert 0.935 < np.mean(holds) < 0.965
    middle, low, high = runner.interval(np.full(runner.LOADS, 2.0))
    assert (middle, low, high) == pytest.approx((2, 2, 2))


def test_each_round_times_each_model_after_an_untimed_invoke() -> None:
    order: list[int] = []
    invokes = [lambda index=index: order.append(index) for index in range(3)]
    times = runner.rounds(invokes, 4)
    turns = [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert order == [turn for turn in turns for _ in ("untimed", "timed")]
    assert times.shape == (3, 4) and (times > 0).all()


def test_warm_up_waits_until_it_is_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now)

    def invokes(*milliseconds: float) -> tuple[bool, int]:
        left = list(milliseconds)

        def invoke() -> None:
            nonlocal now
            now += (left.pop(0) if len(left) > 1 else left[0]) / 1000

        return runner.warm_up(invoke), len(milliseconds) - len(left)

    assert invokes(*[9.0] * 5, *[3.0] * 100) == (True, 20)
    restless = [2.0 if i // 5 % 2 else 3.0 for i in range(2000)]
    steady, count = invokes(*restless)
    assert not steady and 300 < count < 500  # about a second


def row(model: str, precision: str, **more: object) -> dict[str, object]:
    return {"model": model, "precision": precision, "runtime": "litert", "threads": 1, **more}


def test_int8_that_gains_nothing_is_said() -> None:
    random = np.random.default_rng(0)

    def said(factor: float, folder: str = "a", precision: str = "int8") -> list[str]:
        medians = random.normal([[1.0], [factor]], 0.02, (2, runner.LOADS))
        rows = [row("a/float.tflite", "fp32"), row(f"{folder}/quantized.tflite", precision)]
        return runner._not_faster(rows, medians)

    assert said(0.8) == []
    (sentence,) = said(1.2)
    assert "int8 is not faster than fp32 here: a/quantized.tflite takes 1." in sentence
    (sentence,) = said(1.0)
    assert "a/quantized.tflite cannot be told apart (0.9" in sentence
    assert said(1.2, folder="b") == []  # another net
    assert said(1.2, precision="mixed") and not said(1.2, precision="fp16")


def board_tree(root: Path, **changes: str) -> str:
    """The files of a Raspberry Pi 4's /proc and /sys that are read."""
    cpu = "sys/devices/system/cpu/cpu{}/cpufreq/"
    files = {
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n\nModel\t\t: Raspberry Pi 4 Model B Rev 1.5\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
        "proc/meminfo": "MemTotal:        3884360 kB\n",
        cpu.format(0) + "scaling_cur_freq": "600000\n",
        cpu.format(1) + "scaling_cur_freq": "1800000\n",
        cpu.format(0) + "scaling_governor": "ondemand\n",
        cpu.format(0) + "scaling_driver": "cpufreq-dt\n",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    }
    for name, text in {**files, **changes}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def test_what_is_known_of_a_board(tmp_path: Path) -> None:
    root = board_tree(tmp_path)
    here = runner.machine(root)
    assert here["board"] == "Raspberry Pi 4 Model B Rev 1.5"
    assert (here["cpu"], here["features"]) == ("Cortex-A72", ["asimd"])
    assert here["memory_mb"] == 3977
    found = runner.state(root)
    assert found["throttled"] == 0x50005
    assert (found["governor"], found["frequency_mhz"]) == ("ondemand", 1800)
    assert found["temperature_c"] == pytest.approx(48.312)
    assert found["on_battery"] is None and found["profile"] is None
    nothing = runner.state(str(tmp_path / "empty"))
    assert {v for k, v in nothing.items() if k != "load_average"} == {None}


def test_the_firmware_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "vcgencmd"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, expected in (
        ("echo throttled=0x50000", 0x50000),
        ("echo VCHI initialization failed; exit 255", None),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert runner.state(str(tmp_path / "empty"))["throttled"] == expected


def test_a_laptop(tmp_path: Path) -> None:
    supply = "sys/class/power_supply/"
    root = board_tree(
        tmp_path,
        **{
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "intel_pstate\n",
            f"{supply}BAT0/type": "Battery\n",
            f"{supply}BAT0/status": "Discharging\n",
            f"{supply}mouse/type": "Battery\n",
            f"{supply}mouse/scope": "Device\n",
            f"{supply}mouse/status": "Charging\n",
            "sys/firmware/acpi/platform_profile": "low-power\n",
        },
    )
    found = runner.state(root)
    assert found["governor"] == "powersave of intel_pstate"  # which is no low clock
    assert found["on_battery"] is True
    said = " ".join(runner.state_warnings(found, found, 4))
    assert "plug it in" in said and "power profile is low-power" in said
    assert "governor" not in said


QUIET = {
    "load_average": 0.1,
    "governor": "ondemand",
    "frequency_mhz": 1800,
    "temperature_c": 50.0,
    "throttled": 0,
    "on_battery": False,
    "profile": "balanced",
}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"load_average": 3.0}, {}, "load average of 3.0 on 4 cores"),
        ({"throttled": 1, "load_average": None}, {"throttled": 1}, "own power supply"),
        ({"throttled": 0x40000}, {"throttled": 0x40004}, "throttled: cool the board"),
        ({}, {"throttled": 0x80000}, "soft temperature limit is reached: cool the board"),
        ({}, {"frequency_mhz": 1500}, "fell from 1800 to 1500 MHz"),
        ({}, {"temperature_c": 84.2}, "84 degrees hot"),
        ({"on_battery": True}, {}, "plug it in"),
        ({"governor": "powersave"}, {}, "scaling_governor"),
        ({"profile": "quiet"}, {}, "power profile is quiet"),
    ],
)
def test_what_disturbs_is_said(
    before: dict[str, object], after: dict[str, object], words: str
) -> None:
    assert runner.state_warnings(QUIET, QUIET, 4) == []
    (said,) = runner.state_warnings({**QUIET, **before}, {**QUIET, **after}, 4)
    assert words in said and said.endswith(".")


def test_throttling_of_long_ago_is_no_matter() -> None:
    past = {**QUIET, "throttled": 0x50000}
    assert runner.state_warnings(past, past, 4) == []
    unknown = dict.fromkeys(QUIET)
    assert runner.state_warnings(unknown, unknown, 4) == []
