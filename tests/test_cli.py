from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import ghostedge
from ghostedge import checkpoint, doctor
from ghostedge.bundle import is_bundle
from ghostedge.checkpoint import Checkpoint
from ghostedge.cli import app, main
from ghostedge.data.drawn import drawn_source
from ghostedge.errors import CheckFailed, GhostEdgeError
from ghostedge.files import atomic_file, sha256
from ghostedge.models import create
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier
from tests.models import reference_forward as reference
from tests.runtime_fixtures import Malicious, write_onnx, write_tflite

SIZE = 24
ARGUMENTS = {"num_classes": 4, "width": 0.1, "branches": 1}
COMMANDS = [
    *("export", "verify", "deploy", "predict", "eval", "bench", "compare"),
    *("train", "distill", "study", "import", "info", "list", "doctor"),
]

Refuse = Callable[..., str]


def run(*arguments: object) -> int:
    """Run a command in this process, as its installed script does; return the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ghostedge", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0)


@pytest.fixture
def refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """A function that runs a command in tmp_path and returns the one sentence that it refuses with.

    Exit code 2, no traceback, and everything in the folder as it was before.
    """
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: object, code: int = 2) -> str:
        before = contents(tmp_path)
        assert run(*arguments) == code
        printed = capsys.readouterr()
        *progress, last = printed.err.splitlines()
        assert all(line.startswith("- ") for line in progress), printed.err
        assert re.fullmatch(r"ghostedge: .*\S", last), printed.err
        assert contents(tmp_path) == before
        return last

    return refuse


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def write(path: Path, **tensors: np.ndarray) -> Path:
    """An untrained net of the four drawn classes with synthetic images; `tensors` are replaced."""
    torch.manual_seed(0)
    net = create("ghostnetv3-small", **ARGUMENTS)
    source = drawn_source(4, 1)
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    state[checkpoint.CALIBRATION] = np.repeat(source.read(SIZE).pixels, 4, axis=0)
    card = Checkpoint("ghostnetv3-small", ARGUMENTS, list(source.classes), PixelContract(SIZE))
    checkpoint.save(path, card, {**state, **tensors})
    return path


def write_foreign(path: Path) -> Path:
    """What the paper's reference code would have saved."""
    torch.save(reference.random_state(reference.shapes(reference.SMALL, 0.5, 10)), path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return write(tmp_path / "net.safetensors")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def folder_of(path: Path, *classes: str) -> Path:
    """Two pictures of each class."""
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (SIZE, SIZE), (40 * i, 0, 0)).save(path / name / f"{i}.png")
    return path


def write_old_bundle(folder: Path) -> Path:
    """What an earlier export may have left: its manifest alone tells that it is a bundle."""
    folder.mkdir()
    manifest = {
        "format": 1,
        "name": "tiny",
        "ghostedge": "0.1.0",
        "labels": ["a", "b"],
        "pixels": PixelContract(SIZE).to_json(),
        "source": {},
        "artefacts": {},
        "files": {name: {"sha256": ""} for name in ("labels.txt", "golden.npz")},
        "golden": {"images": 1, "expected": []},
        "stages": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "labels.txt").write_text("a\nb\n")
    assert is_bundle(folder)
    return folder


def test_missing_file(refuse: Refuse, picture: Path) -> None:
    said = refuse("export", "none.safetensors")
    assert "none.safetensors is neither a file nor the name of shipped weights" in said
    for name in ("none.safetensors", "none.onnx", "none.tflite"):
        for command in (("predict", name, picture), ("info", name), ("bench", name)):
            assert name in refuse(*command)
    assert "none.pth" in refuse("import", "none.pth")
    assert "none" in refuse("verify", "none")
    assert "none.png" in refuse("predict", write(Path("net.safetensors")), "none.png")
    assert "There is no folder none" in refuse("eval", "net.safetensors", "none")
    assert "There is no folder cifar" in refuse("train", "cifar")


def test_empty_file(refuse: Refuse, tmp_path: Path, picture: Path) -> None:
    for name in ("net.safetensors", "net.onnx", "net.tflite", "net.pth"):
        (tmp_path / name).touch()
    assert "net.safetensors is not a readable" in refuse("export", "net.safetensors")
    for name in ("net.safetensors", "net.onnx", "net.tflite"):
        assert f"{name} is empty" in refuse("predict", name, picture)
    assert "net.pth" in refuse("import", "net.pth")
    (tmp_path / "empty.png").touch()
    assert "empty.png" in refuse("predict", write(tmp_path / "whole.safetensors"), "empty.png")


def test_truncated_file(refuse: Refuse, tmp_path: Path, net: Path, picture: Path) -> None:
    whole = net.read_bytes()
    net.write_bytes(whole[: len(whole) // 2])
    for command in (("export", net), ("predict", net, picture), ("info", net)):
        assert f"{net} is not a readable .safetensors file" in refuse(*command)
    write_onnx(tmp_path / "net.onnx")
    onnx = (tmp_path / "net.onnx").read_bytes()
    (tmp_path / "net.onnx").write_bytes(onnx[: len(onnx) // 2])
    assert "ONNX Runtime cannot load net.onnx" in refuse("predict", "net.onnx", picture)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes((tmp_path / "net.pth").read_bytes()[:2000])
    assert "net.pth" in refuse("import", "net.pth")


def test_foreign_file(refuse: Refuse, tmp_path: Path, net: Path, picture: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    said = refuse("export", "other.safetensors")
    assert "ghostedge did not write" in said and "ghostedge import other.safetensors" in said
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    assert "not a GhostNetV3 state_dict" in refuse("import", "other.pth")
    assert "ghostedge import other.pth" in refuse("export", "other.pth")
    (tmp_path / "other.onnx").write_text("a letter")
    assert "other.onnx" in refuse("predict", "other.onnx", picture)
    assert "other.pth" in refuse("predict", net, "other.pth")
    (tmp_path / "folder").mkdir()
    assert "is a folder without manifest.json" in refuse("verify", "folder")
    assert "is a folder without manifest.json" in refuse("info", "folder")


def test_checkpoint_with_nan(refuse: Refuse, tmp_path: Path, picture: Path) -> None:
    broken = write(tmp_path / "net.safetensors", **{"head.bias": np.full(1280, np.nan, np.float32)})
    for command in (("export", broken, "--int8"), ("predict", broken, picture), ("info", broken)):
        assert "the tensor head.bias holds NaN or infinity" in refuse(*command)


def test_pickle_that_would_run_code(refuse: Refuse, tmp_path: Path, picture: Path) -> None:
    victim = tmp_path / "victim"
    torch.save({"a": torch.zeros(3), "b": Malicious(victim)}, tmp_path / "net.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(victim)))
    (tmp_path / "net.safetensors").write_bytes(pickle.dumps(Malicious(victim)))
    assert "would run code (posix.mkdir)" in refuse("import", "net.pth")
    for name in ("bare.pth", "net.safetensors"):
        for command in (("import", name), ("export", name), ("info", name)):
            assert name in refuse(*command)
    assert not victim.exists()


def test_wrong_class_count(refuse: Refuse, tmp_path: Path, net: Path, picture: Path) -> None:
    data = folder_of(tmp_path / "data", "circle", "crosss")
    said = refuse("eval", net, data)
    assert "a class 'crosss' that the model does not know" in said
    assert "Did you mean cross?" in said
    assert "'crosss'" in refuse("export", net, "--data", data)
    write_onnx(tmp_path / "net.onnx")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    said = refuse("predict", "net.onnx", picture)
    assert "net.onnx has 4 classes and labels.txt names 3 labels" in said
    card, tensors = checkpoint.read(net)
    card.labels = card.labels[:3]
    checkpoint.save(net, card, tensors)
    assert "names 3 labels for a network of 4 classes" in refuse("export", net)


def test_data_folder_of_one_class(refuse: Refuse, tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", "circle")
    assert "data holds one class only ('circle')" in refuse("train", data)
    data = folder_of(tmp_path / "parts" / "train", "circle").parent
    assert "parts holds one class only ('circle')" in refuse("train", data)


def test_image_size_mismatch(refuse: Refuse, tmp_path: Path, net: Path, picture: Path) -> None:
    import onnx

    model = onnx.load(write_onnx(tmp_path / "net.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = SIZE + 1
    onnx.save(model, tmp_path / "net.onnx")
    assert "no classifier of square RGB images" in refuse("predict", "net.onnx", picture)
    for command in (("export", net), ("train", "drawn"), ("list",)):
        assert "outside 24 to 256" in refuse(*command, "--imgsz", 300)
    with pytest.raises(GhostEdgeError, match=r"24x24 RGB pixels.*30, 40, 3\): resize"):
        Classifier(net)(np.zeros((2, 30, 40, 3), np.uint8))


# Below a file, and where only the kernel makes folders: root cannot write there either.
@pytest.mark.parametrize("place", ["picture.png/out.json", "/proc/ghostedge/out.json"])
def test_unwritable_output(
    refuse: Refuse, tmp_path: Path, net: Path, picture: Path, place: str
) -> None:
    path = tmp_path / place
    for command in (
        ("import", write_foreign(tmp_path / "foreign.pth"), "--output", place),
        ("export", net, "--output", place),
        ("bench", net, "--runs", 1, "--output", place),
        ("eval", net, folder_of(tmp_path / "data", "circle"), "--confusion", place),
    ):
        said = refuse(*command)
        assert f"Cannot write {path}: " in said
        assert "--output" in said


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from ghostedge.cli import main
sys.argv[0] = "ghostedge"
main()
"""


def in_subprocess(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(ghostedge.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )


def test_full_disk(tmp_path: Path, net: Path) -> None:
    """No file may grow beyond 20 kB, which no model here is below."""
    write_old_bundle(tmp_path / "out")
    before = contents(tmp_path)
    done = in_subprocess(FULL, "export", net, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert f"ghostedge: Cannot write {tmp_path / 'out'}: File too large." in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before


def test_full_disk_of_a_training(tmp_path: Path) -> None:
    flags = "--model ghostnetv3-small-0.1x --imgsz 24 --epochs 1".split()
    data = folder_of(tmp_path / "data", "a", "b")
    done = in_subprocess(FULL, "train", data, *flags, "--output", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(
        r"ghostedge: Cannot write .*run.*: File too large\. .*", done.stderr.splitlines()[-1]
    )
    assert "Traceback" not in done.stderr
    assert {file.name for file in (tmp_path / "run").iterdir()} <= {"tensorboard"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("export {net} --io uint16", "--io 'uint16' is unknown: choose from uint8, int8, float32."),
        ("export {net} --io unit8", "Did you mean uint8"),
        ("export {net} --format onnx,tflight", "--format 'tflight' is unknown: choose from onnx, "),
        ("export {net} --format onnx,tflight", "Did you mean tflite?"),
        ("export {net} --opset 12", "--opset 12 is outside 13 to 20"),
        ("export {net} --opset new", "Invalid value for '--opset'"),
        ("export {net} --imgsz 8", "--imgsz 8 is outside 24 to 256"),
        ("export {net} --imgsz 0", "--imgsz 0 is outside 24 to 256"),
        ("export {net} --batch 0", "--batch 0 is outside"),
        ("export {net} --seed -1", "--seed -1 is outside"),
        ("export {net} --calib-samples 0", "--calib-samples 0 is outside"),
        ("export {net} --max-drop nan", "max_drop nan is outside"),
        ("export {net} --recipe ap", "There is no recipe 'ap': choose from app, "),
        ("export {net} --recipe ap", "Did you mean app?"),
        ("export {net} --half --format onnx", "--half makes a TFLite model"),
        ("export {net} --in8", "No such option: --in8"),
        ("export ghostnetv3-small-1.0", "is neither a file nor the name of shipped"),
        ("export {net} --int8 --data cifar11", "Did you mean cifar10"),
        ("export", "Missing argument"),
        ("exprt {net}", "Did you mean 'export'? Add --help"),
        ("train drawn --model ghostnet-small", "There is no network called 'ghostnet-small'"),
        ("train drawn --model ghostnetv3-smal", "Did you mean ghostnetv3-small"),
        ("train drawn --width -1", "There is no network called 'ghostnetv3-small--1.0x'"),
        ("train drawn --width 0.05", "A width multiplier of 0.05 is outside 0.1 to 8"),
        ("train drawn --branches 0", "Invalid value for '--branches'"),
        ("train drawn --epochs 0", "epochs must be from 1 to 1,000,000"),
        ("train drawn --batch 1", "batch must be at least 2"),
        ("train drawn --lr 0", "lr must be above 0"),
        ("train drawn --seed -1", "seed must be from 0"),
        ("train drawn --imgsz 8", "An image size of 8 is outside 24 to 256"),
        ("train drawn:1", "2 to 10"),
        ("train drawn --resume --output none", "none holds no run to resume"),
        ("train drawn --device tpu", "Use --device cpu"),
        ("eval {net} drawn --part tst", "--part 'tst' is unknown: choose test, val or train"),
        ("eval {net} drawn --part val", "drawn has no val part"),
        ("eval {net} drawn --threads 0", "Invalid value for '--threads'"),
        ("predict {net} {net} --top 0", "Invalid value for '--top'"),
        ("bench {net} --on board", "no model to time: a board runs .tflite and .onnx"),
        ("bench {net} --output times.pdf", "times.pdf should end in one of .json"),
        ("bench {net} --runtime tvm", "There is no runtime 'tvm'"),
        ("compare {net}", "is no result of a bench"),
        ("bench {net} --runs 0", "Invalid value for '--runs'"),
        ("bench {net} --threads one", "--threads 'one' is no list of numbers such as 1,2"),
        ("bench {net} --threads 0", "at least one run and one thread"),
        ("list --imgsz 8", "An image size of 8 is outside 24 to 256"),
        ("import {net} --mean a,b", "--mean 'a,b' is no list of numbers"),
        ("import {net} --std 0.5;0.5", "--std '0.5;0.5' is no list of numbers"),
        ("import {net} --labels none.txt", "none.txt cannot be read"),
    ],
)
def test_unknown_flag_values(refuse: Refuse, net: Path, flags: str, message: str) -> None:
    assert message in refuse(*flags.format(net=net).split())


def test_existing_folder_that_is_not_a_bundle(refuse: Refuse, tmp_path: Path, net: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("mine")
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "manifest.json").write_text('{"name": "somebody else\'s"}')
    (write_old_bundle(tmp_path / "bundle") / "notes.txt").write_text("mine")
    for name in ("thesis", "manifests", "net.safetensors", "bundle"):
        assert "was not made by this command" in refuse("export", net, "--output", name)


def test_failing_export_leaves_the_old_bundle(refuse: Refuse, tmp_path: Path, net: Path) -> None:
    out = write_old_bundle(tmp_path / "out")
    broken = write(tmp_path / "nan.safetensors", **{"head.bias": np.full(1280, np.nan, np.float32)})
    refuse("export", broken, "--output", out)
    (tmp_path / "tiny.toml").write_text("[limits]\nmax_kilobytes = 1\n")
    said = refuse(
        "export", net, "--format", "onnx", "--recipe", "tiny.toml", "--output", out, code=1
    )
    assert "model.onnx has" in said and "the limit is 1" in said
    refuse(
        "export", net, "--format", "onnx", "--recipe", "tiny.toml", "-o", "new/folders/out", code=1
    )


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, net: Path) -> None:
    def broken(path: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "read", broken)
    monkeypatch.setattr(sys, "argv", ["ghostedge", "info", str(net)])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_terminated_command_cleans_up(
    monkeypatch: pytest.MonkeyPatch, net: Path, tmp_path: Path
) -> None:
    def ended(path: object) -> None:
        with atomic_file(tmp_path / "half"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "read", ended)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run("info", net) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.glob("*half*"))


def test_an_output_that_takes_no_more() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ghostedge.cli", "list", "--for", "desktop"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert "ghostedge: The output cannot be used: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_of_what_failed_keeps_its_lines(
    monkeypatch: pytest.MonkeyPatch, net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(path: object) -> None:
        raise CheckFailed("It loses\n3 points:", "file  lost\na        3")

    monkeypatch.setattr(checkpoint, "read", failing)
    assert run("info", net) == 1
    assert capsys.readouterr().err == "ghostedge: It loses 3 points:\nfile  lost\na        3\n"


def test_names_that_are_no_utf8_are_printed(tmp_path: Path, net: Path, picture: Path) -> None:
    named = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(picture, named)
    done = subprocess.run(
        [sys.executable, "-m", "ghostedge.cli", "predict", net, named],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/caf\\udce9.png: " in done.stdout


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^\W+{command} +[A-Z]", said, re.M) for command in COMMANDS)
    assert len(app.registered_commands) == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    printed = capsys.readouterr()
    assert f"Usage: ghostedge {command} " in printed.out
    assert printed.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ghostedge {ghostedge.__version__}\n"


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    printed = capsys.readouterr()
    assert "Usage: ghostedge" in printed.out + printed.err


LIGHT = """
import sys

HEAVY = {"torch", "torchvision", "tensorflow", "onnx", "onnxruntime", "ai_edge_litert", "matplotlib",
         "PIL", "tensorboard"}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError("No module named " + name, name=name)


sys.meta_path.insert(0, Refuse())
from ghostedge.cli import main

sys.argv = ["ghostedge", *sys.argv[1:]]
try:
    main()
finally:
    assert not HEAVY & set(sys.modules), HEAVY & set(sys.modules)
"""


def test_help_and_dry_run_import_nothing_heavy(tmp_path: Path, net: Path) -> None:
    done = in_subprocess(LIGHT, "export", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    before = contents(tmp_path)
    flags = "--int8 --half --data pets --recipe web --opset 18 --dry-run".split()
    done = in_subprocess(LIGHT, "export", net, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"export {net} to net-export" in done.stdout
    assert "opset 18" in done.stdout
    assert "calibrated on 500 images of the training part of pets" in done.stdout
    for name in ("model.onnx", "model_int8.onnx", "model_fp16.tflite", "model_int8.tflite"):
        assert name in done.stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "extra"),
    [("export net.safetensors", "export"), ("train drawn", "train"), ("list", "export")],
)
def test_a_missing_package_is_named(tmp_path: Path, net: Path, command: str, extra: str) -> None:
    done = in_subprocess(LIGHT, *command.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(
        rf"^ghostedge: This needs the package \w+, .* pip install 'ghostedge\[{extra}\]'$",
        done.stderr,
        re.M,
    )
    assert "Traceback" not in done.stderr


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    said = capsys.readouterr().out
    # Figures of the paper's table, and those of FACTS.
    assert re.search(r"ghostnetv3-small-1\.0x\W+483,554\W+374,174\W+9\.0.*test \d\d\.\d\d%", said)
    assert re.search(r"ghostnetv3-small-3\.4x\W+3,380,066\W+2,331,712", said)
    assert re.search(r"ghostnetv3-1\.0x\W+6,860,838\W+4,857,526", said)
    assert re.search(r"resnet20\W+272,474\W+271,690\W+40\.8", said)


def test_list_for_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--for", "desktop", "--within", "2") == 0
    said = capsys.readouterr().out
    assert re.search(r"ghostnetv3-small-1\.0x\W+\d\d\.\d\d\W+1\W", said)
    assert "benchmarks/targets/costs.py" in said
    assert "test images of cifar10" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--within", "2"), "--for"),
        (("list", "--for", "pi6"), "Did you mean pi5"),
        (("train", "drawn", "--within", "2"), "--for"),
        (("train", "drawn", "--for", "pi4", "--model", "resnet8"), "leave out"),
        (("train", "drawn", "--for", "desktop", "--within", "0.01"), "the cheapest"),
        (("train", "drawn", "--from", "densestride-1.0x", "--width", "2"), "leave out --width"),
        (("train", "drawn", "--from", "densestride-1.0x", "--width", "0"), "leave out --width"),
        (("train", "drawn", "-o", "x" * 300), "cannot be used: File name too long"),
        (("train", "x" * 300), "cannot be used: File name too long"),
    ],
)
def test_unusable_targets(refuse: Refuse, arguments: tuple[str, ...], message: str) -> None:
    assert message in refuse(*arguments)


@pytest.mark.parametrize(("size", "limit"), [(32, 2.0), (96, 17.0)])
def test_training_for_a_target(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: int,
    limit: float,
) -> None:
    """Starts from the weights that the costs of its image size allow: here, the cheapest alone."""
    from ghostedge.models import synthetic

    monkeypatch.setattr(synthetic, "STEPS", 2)
    data = folder_of(tmp_path / "data", "ant", "bee")
    flags = ["--within", limit, "--imgsz", size, "--epochs", 1]
    assert run("train", data, "--for", "pi4", *flags, "-o", tmp_path / "run") == 0
    assert "From densestride-0.5x: of the weights that cost at most" in capsys.readouterr().out
    card, _ = checkpoint.read(tmp_path / "run" / "best.safetensors")
    assert (card.name, card.pixels.size) == ("densestride-0.5x", size)
    assert card.training["from"]["file"] == "densestride-0.5x.safetensors"


def test_info(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], picture: Path) -> None:
    assert run("info", net) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "ghostnetv3-small"
    assert facts["arguments"] == ARGUMENTS
    assert facts["pixels"]["size"] == SIZE
    state = create("ghostnetv3-small", **ARGUMENTS).state_dict()
    assert facts["tensors"] == len(state) + 1
    write_onnx(tmp_path / "net.onnx", labels=["a", "b", "c", "d"])
    assert run("info", tmp_path / "net.onnx") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runtime"], facts["precision"], facts["size"]) == ("onnxruntime", "fp32", SIZE)
    assert facts["labels"] == ["a", "b", "c", "d"]
    write_tflite(tmp_path / "net.tflite", "uint8")
    capsys.readouterr()
    assert run("info", tmp_path / "net.tflite") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runtime"], facts["precision"], facts["size"]) == ("litert", "int8", SIZE)
    assert run("info", write_old_bundle(tmp_path / "out")) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["a", "b"]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "numpy>=1.26",
        'torch>=2; extra == "train"',
        'unheard-of[more]==1.2; python_version < "3.99" and extra == "bench"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    assert run("doctor") == 0
    said = capsys.readouterr().out
    assert re.search(rf"Python\W+{re.escape(sys.version.split()[0])}", said)
    assert re.search(rf"torch\W+{re.escape(importlib.metadata.version('torch'))}\W+train", said)
    assert re.search(r"unheard-of\W+missing\W+bench", said)
    assert "unheard-of. pip install 'ghostedge[bench]'" in said

    warnings = {"no int8 dot products", "sums saturate"}
    for features, warned in (
        (["avx2"], warnings),
        (["avx2", "avx512_vnni"], set()),
        (["asimd"], {"no int8 dot products"}),
        ([], set()),
    ):
        here = {**doctor.machine(), "features": features}
        monkeypatch.setattr(doctor, "machine", lambda here=here: here)
        assert run("doctor") == 0
        said = capsys.readouterr().out
        assert {warning for warning in warnings if warning in said} == warned

    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert run("doctor") == 0
    said = capsys.readouterr().out
    assert "pip install -e ." in said and "Nothing is missing" not in said


def test_predict_eval_and_bench(
    net: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", net, picture, picture, "--top", 2) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    found = Classifier(net).predict([picture], top=2)[0]
    assert first == f"{picture}: " + ", ".join(f"{name} {share:.1%}" for name, share in found)

    data = folder_of(tmp_path / "data", "circle", "star")
    card, tensors = checkpoint.read(net)
    card.labels[-1] = "star"
    checkpoint.save(net, card, tensors)
    assert run("eval", net, data, "--confusion", tmp_path / "matrix.png") == 0
    said = capsys.readouterr().out
    assert "data, 4 images" in said and "These are training images" in said
    assert re.search(r"top-1 \d+\.\d\d% \(95%: ", said)
    with Image.open(tmp_path / "matrix.png") as matrix:
        assert matrix.format == "PNG"

    plain, other = (write_onnx(tmp_path / f"{name}.onnx") for name in ("plain", "other"))
    flags = ("--runs", 5, "--profile", "--output", tmp_path / "times.json")
    assert run("bench", plain, "--against", other, *flags) == 0
    said = capsys.readouterr().out
    assert "5 interleaved rounds" in said and "Conv" in said
    (times,) = json.loads((tmp_path / "times.json").read_text())["results"]
    assert [row["model"] for row in times["rows"]] == [str(other), str(plain)]
    assert {row["against"] for row in times["rows"]} == {str(other)}
    file, page = tmp_path / "times.json", tmp_path / "times.html"
    assert run("compare", file, file, "--output", page) == 0
    assert "side by side" in capsys.readouterr().out and page.read_text().startswith("<!doctype")


def test_what_cannot_be_profiled_was_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, times = write_onnx(tmp_path / "model.onnx"), tmp_path / "times.json"
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    for node in model.graph.node:
        node.input[:] = ["floats" if name == "image" else name for name in node.input]
    cast = onnx.helper.make_node("Cast", ["image"], ["floats"], to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    onnx.save(model, file)
    assert run("bench", file, "--runs", 5, "--profile", "--output", times) == 2
    said = capsys.readouterr()
    assert "5 interleaved rounds" in said.out and "than one float image" in said.err
    (found,) = json.loads(times.read_text())["results"]
    assert len(found["rows"]) == 1 and "profiles" not in found


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str], picture: Path) -> None:
    foreign, output = write_foreign(tmp_path / "net.pth"), tmp_path / "ours.safetensors"
    labels = [f"thing {i}" for i in range(10)]
    (tmp_path / "things.txt").write_text("\n".join(labels))
    flags = ("--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2", "--labels", tmp_path / "things.txt")
    assert run("import", foreign, *flags, "--imgsz", 24, "--output", output) == 0
    said = capsys.readouterr().out
    assert said == f"Wrote {output}: ghostnetv3-small-0.5x, 10 classes\n"
    card, _ = checkpoint.read(output)
    assert card.labels == labels
    assert card.pixels == PixelContract(24, (127.5, 102.0, 76.5), (51.0, 51.0, 51.0))
    assert run("predict", output, picture) == 0
    assert "thing" in capsys.readouterr().out


def test_export_of_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_onnx(tmp_path / "net.onnx", softmax=False)
    (tmp_path / "things.txt").write_text("ant\nbee\ncat\ndog\n")
    flags = ("--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2", "--labels", tmp_path / "things.txt")
    assert run("export", file, *flags, "--format", "onnx", "-o", tmp_path / "out") == 0
    assert "Wrote" in capsys.readouterr().out
    made = Classifier(tmp_path / "out")
    assert made.labels == ["ant", "bee", "cat", "dog"]
    images = drawn_source(4, 1, 0).read(SIZE).pixels
    values = ((images / 255 - (0.5, 0.4, 0.3)) / 0.2).astype(np.float32).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(file)
    logits = torch.from_numpy(session.run(None, {"image": values[:1]})[0])
    np.testing.assert_allclose(made(images[:1]), logits.softmax(1), atol=1e-5)


def test_distill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ghostedge.models import synthetic

    monkeypatch.setattr(synthetic, "STEPS", 1)
    monkeypatch.chdir(tmp_path)
    data = folder_of(tmp_path / "data", "ant", "bee")
    flags = "--width 0.1 --imgsz 24 --epochs 1".split()
    assert run("train", data, *flags, "-o", "teacher") == 0
    given = {"strategy": "dkd", "temperature": 2.0, "alpha": 0.3}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    words += ["--teacher", "teacher/best.safetensors", "--via", "resnet8", *flags]
    assert run("distill", data, *words, "--budget", "0.001s") == 3
    assert "--resume continues" in capsys.readouterr().err
    assert run("distill", data, *words, "--resume") == 0
    folder = Path("runs/ghostnetv3-small-0.1x-dkd")
    assert capsys.readouterr().out.endswith(f"Wrote {folder}/best.safetensors\n")
    assistant = folder / "assistants/1-resnet8/best.safetensors"
    for file, teacher in (
        (assistant, "teacher/best.safetensors"),
        (folder / "best.safetensors", assistant),
    ):
        stated = checkpoint.read(file)[0].training["distillation"]
        assert [t["sha256"] for t in stated.pop("teachers")] == [sha256(Path(teacher))]
        assert stated == given


def test_train_export_verify_and_predict(
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The main job on the command line, with the ONNX half of an export."""
    from ghostedge.models import synthetic

    monkeypatch.setattr(synthetic, "STEPS", 2)
    monkeypatch.chdir(tmp_path)
    data = folder_of(tmp_path / "data", "ant", "bee")
    flags = "--width 0.1 --imgsz 24 --epochs 1 --licence Apache-2.0".split()
    assert run("train", data, *flags) == 0
    best = Path("runs/ghostnetv3-small-0.1x/best.safetensors")
    assert capsys.readouterr().out == f"Wrote {best}\n"
    assert checkpoint.read(best)[0].licence == "Apache-2.0"
    assert run("export", best, "--format", "onnx") == 0
    assert "Wrote best-export: model.onnx" in capsys.readouterr().out
    assert run("verify", "best-export") == 0
    assert "ok" in capsys.readouterr().out
    assert run("predict", "best-export", picture) == 0
    assert re.fullmatch(rf"{picture}: (ant|bee) .*%, (ant|bee) .*%\n", capsys.readouterr().out)
    golden = tmp_path / "best-export" / "golden.npz"
    golden.write_bytes(golden.read_bytes() + b" ")
    assert run("verify", "best-export") == 1
    assert "golden.npz" in capsys.readouterr().err
