from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ghostedge import checkpoint, cli
from ghostedge.convert import Bundle
from ghostedge.errors import GhostEdgeError, Paused
from ghostedge.files import held
from ghostedge.models import ARCHITECTURES, parse_name, sizes, synthetic
from ghostedge.training import recipe
from ghostedge.training import study as studies
from ghostedge.training.state import Folder
from ghostedge.training.study import load, require_done, study, summarize

FILES = Path(__file__).parents[2] / "benchmarks" / "studies"
TINY = "data = 'drawn:2'\nmodel = 'airbench-0.1x'\nimgsz = 24\nepochs = 1\n"

TEACHERS_OF_THE_PAPER = (
    "resnet18 resnet50 efficientnetv2-s vgg13-bn densenet161 inception-v3".split()
)

Results = dict[tuple[str, int], dict[str, Any] | None]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run arms in this process, without what is tested elsewhere and takes longer than they do."""
    monkeypatch.setattr(studies, "_apart", studies._run)
    monkeypatch.setattr(synthetic, "STEPS", 0)
    monkeypatch.setattr(Folder, "draw_curves", lambda *_: True)


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory, drawn_folder: Path) -> Path:
    """Eight images of each class in train/, four in test/."""
    root = tmp_path_factory.mktemp("few")
    for part, count in (("train", 8), ("test", 4)):
        for folder in (drawn_folder / part).iterdir():
            (root / part / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / part / folder.name)
    return root


def toy(file: Path, data: Path, *more: str) -> list[str]:
    """Return settings that leave of a study's arms all but their size."""
    settings = [f"data={data}", "imgsz=24", "epochs=1", "batch=32", "seeds=1", "pretrained=false"]
    settings.append("latency=false")
    for name, arm in load(file, more).items():
        family, _ = parse_name(arm.model)
        small = f"{family}-0.1x" if family in ARCHITECTURES else "airbench-0.1x"
        settings.append(f"{name}.model={small}")
    return [*settings, *more]


def write(folder: Path, text: str) -> Path:
    file = folder / "study.toml"
    file.write_text(text)
    return file


def tops(results: Path) -> dict[str, Any]:
    rows = json.loads((results / "results.json").read_text())["arms"]
    return {row["arm"]: row for row in rows}


@pytest.mark.usefixtures("quick")
def test_the_papers_study_runs_whole(tmp_path: Path, few_images: Path) -> None:
    file, output = FILES / "paper.toml", tmp_path / "out"
    settings = toy(file, few_images)
    result = study(file, output, settings=settings)
    assert result.states == {} and result.runs == len(result.rows)
    rows = tops(output)
    assert all(row["seeds"] == 1 and row["test"] is not None for row in rows.values())
    chain = checkpoint.read(output / "runs/assistants-1.3x/seed-0/best.safetensors")[0]
    taught = chain.training["distillation"]
    assert (taught["temperature"], taught["alpha"]) == (1.0, 0.5) and len(taught["teachers"]) == 1
    seen = json.loads((output / "results.json").read_text())["runs"]
    assert taught["teachers"][0]["sha256"] == seen["assistant-resnet18, seed 0"]["sha256"]
    markdown = (output / "results.md").read_text()
    assert "| 91.37 |" in markdown and "Not the study as its file has it" in markdown
    assert (output / "accuracy.png").stat().st_size > 10_000
    with (output / "results.csv").open(newline="") as table:
        assert [row["arm"] for row in csv.DictReader(table)] == list(load(file))
    # All is done: nothing is repeated.
    before = {file: file.stat().st_mtime_ns for file in output.glob("runs/*/*/*")}
    assert study(file, output, settings=settings).states == {}
    assert before == {file: file.stat().st_mtime_ns for file in output.glob("runs/*/*/*")}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["future", pytest.param("campaign", marks=pytest.mark.slow)])
def test_the_studies_for_a_gpu_run_whole(name: str, tmp_path: Path, few_images: Path) -> None:
    file = FILES / f"{name}.toml"
    result = study(file, tmp_path / "out", settings=toy(file, few_images))
    assert result.states == {} and {row["seeds"] for row in result.rows} == {1}


@pytest.mark.usefixtures("quick")
def test_the_short_study_runs_whole(tmp_path: Path, few_images: Path) -> None:
    teacher = write(tmp_path, f"[defaults]\n{TINY}[arms.teacher]\ndata = '{few_images}'\n")
    study(teacher, tmp_path / "teacher")
    best = tmp_path / "teacher/runs/teacher/seed-0/best.safetensors"
    given = f"kd.teachers=['{best}']"
    settings = [*toy(FILES / "short.toml", few_images, given), "seeds=2"]
    result = study(FILES / "short.toml", tmp_path / "out", settings=settings)
    rows = {row["arm"]: row for row in result.rows}
    assert rows["paper"]["gain_95"] is not None and rows["kd"]["gain_95"] is not None
    assert {row["seeds"] for row in result.rows} == {2}


def test_the_papers_rows_are_all_there() -> None:
    arms = load(FILES / "paper.toml")
    published = sorted(arm.published for arm in arms.values() if arm.published is not None)
    assert published == sorted(
        [91.37, 92.35, 92.63, 93.23, 93.26, 93.94, 93.61, 91.23, 93.65, 97.90]  # nets
        + [91.10, 91.21, 91.19, 93.58, 92.16, 90.60, 91.85, 92.50, 90.83, 93.28]  # distilled
    )
    for arm in arms.values():
        assert arm.data == "cifar10" and arm.recipe.lr == 0.01
        assert arm.branches == (3 if arm.model.startswith("ghostnetv3") else 1)
    widths = {arm.model: parse_name(arm.model)[1] for arm in arms.values() if not arm.teachers}
    for width in ARCHITECTURES["ghostnetv3-small"].widths:
        assert widths.pop(f"ghostnetv3-small-{width}x") == width
    assert sorted(widths) == sorted(["ghostnetv3", *TEACHERS_OF_THE_PAPER])
    assert arms["kd-1.0x-resnet50"].alpha == 0.1 and arms["kd-1.0x-resnet50"].temperature == 4


def test_the_targets_study_has_every_network_that_is_no_width_of_ours() -> None:
    arms = load(FILES / "targets.toml")
    trained = {arm.model for arm in arms.values()}
    names = {name for name, *_ in sizes() if not name.startswith("ghostnetv3")}
    ours = {f"ghostnetv3-small-{width}x" for width in (0.5, 1.0, 2.8)}
    assert trained == names | ours
    same = {(arm.recipe.epochs, arm.recipe.lr, arm.seeds) for arm in arms.values()}
    assert same == {(10, None, 2)}


def test_the_future_has_all_that_the_paper_names() -> None:
    arms = load(FILES / "future.toml").values()
    assert {arm.strategy for arm in arms} == {"kd", "amtml", "dgkd"}
    assert {arm.data for arm in arms} == {"cifar10", "cifar100", "svhn"}
    assert all(arm.recipe.flip == "none" for arm in arms if arm.data == "svhn")
    assert all(len(arm.teachers) > 1 for arm in arms if arm.strategy == "amtml")


def test_the_campaign_runs_in_its_order(tmp_path: Path) -> None:
    """What it asks first it knows first: a GPU is lent for minutes."""
    order = list(studies._jobs(load(FILES / "campaign.toml"), tmp_path))
    assert order[:3] == [("teacher", 0), ("ours", 0), ("paper", 0)]
    seeds = range(6)
    assert order[3:15] == [*(("short", s) for s in seeds), *(("short-kd", s) for s in seeds)]
    assert order[15] == ("kd", 0)
    assert order.index(("second", 0)) == order.index(("ensemble", 0)) - 1


def test_students_share_their_teachers(tmp_path: Path) -> None:
    text = "[arms.a]\nteachers = ['t', 'once']\nseeds = 2\n[arms.t]\nseeds = 2\n[arms.once]\n"
    jobs = studies._jobs(load(write(tmp_path, f"[defaults]\n{TINY}{text}")), tmp_path)
    assert sorted(jobs) == [("a", 0), ("a", 1), ("once", 0), ("t", 0), ("t", 1)]
    order = list(jobs)
    for key, job in jobs.items():
        assert all(order.index(need) < order.index(key) for need in job.needs)
    assert jobs["a", 1].needs == (("t", 1), ("once", 0))
    assert jobs["a", 1].teachers == (
        str(tmp_path / "runs/t/seed-1/best.safetensors"),
        str(tmp_path / "runs/once/seed-0/best.safetensors"),
    )


@pytest.mark.usefixtures("quick")
def test_a_failed_run_takes_only_its_students_along(
    tmp_path: Path,
    few_images: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = f"[defaults]\n{TINY}data = '{few_images}'\n".replace("data = 'drawn:2'\n", "")
    text += "[arms.bad]\nlr = 1000\nclip = 0\nepochs = 9\n[arms.student]\nteachers = ['bad']\n"
    file = write(tmp_path, text + "[arms.good]\n")
    command = ["ghostedge", "study", str(file), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--set", "bad.weight_decay=1e30"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "1 of 3 runs failed, the first, bad, seed 0: The training diverged" in printed.err
    assert "Not run: bad, student." in printed.out and "good" in printed.out
    rows = tops(tmp_path / "out")
    assert rows["good"]["seeds"] == 1 and rows["bad"]["validation"] is None


@pytest.mark.usefixtures("quick")
def test_a_budget(tmp_path: Path, few_images: Path) -> None:
    file = write(tmp_path, f"[defaults]\n{TINY}[arms.a]\n[arms.b]\n")
    settings = [f"data={few_images}", "epochs=3", "batch=8"]
    output = tmp_path / "out"
    result = study(file, output, settings=settings, budget=1e-6)
    assert {state for state, _ in result.states.values()} == {"paused"}
    with pytest.raises(Paused, match="2 of 2 runs to go"):
        require_done(result, output)
    result = study(file, output, settings=settings)
    require_done(result, output)
    with pytest.raises(GhostEdgeError, match=r"a.seed-0 was run with epochs = 3, not 2"):
        study(file, output, settings=[*settings, "epochs=2"])
    study(file, output, settings=[*settings, "a.published=50", "a.against=b", "compile=off"])
    # A run of before there was a choice of precision.
    stored = output / "runs/a/seed-0/result.json"
    old = json.loads(stored.read_text())
    del old["arm"]["precision"]
    stored.write_text(json.dumps(old))
    require_done(study(file, output, settings=settings, budget=1e-6), output)
    with pytest.raises(
        GhostEdgeError, match=r"a.seed-0 was run with precision = 'auto', not 'bf16'"
    ):
        study(file, output, settings=[*settings, "precision=bf16"])


@pytest.mark.usefixtures("quick")
def test_a_run_with_another_teacher_or_other_images_is_not_done(
    tmp_path: Path, few_images: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(few_images, images)
    text = f"[defaults]\n{TINY}[arms.guide]\n[arms.pupil]\nteachers = ['guide']\n"
    file, output = write(tmp_path, text), tmp_path / "out"
    study(file, output, settings=[f"data={images}"])
    shutil.rmtree(output / "runs" / "guide")
    with pytest.raises(GhostEdgeError, match=r"pupil.seed-0 was run with teachers"):
        study(file, output, settings=[f"data={images}"])
    shutil.rmtree(output / "runs" / "pupil")
    require_done(study(file, output, settings=[f"data={images}"]), output)
    stored = output / "runs/pupil/seed-0/result.json"
    whole = stored.read_text()
    bare = json.dumps({key: json.loads(whole)[key] for key in ("arm", "inputs")})
    empty = ("", "[]", "{}", '{"arm": {}}', '{"arm": null, "inputs": {}}')
    values = {"accuracy": {"validation": {}}, "seconds": "x", "macs": None, "device": ["x"]}
    wrong = (json.dumps({**json.loads(whole), key: value}) for key, value in values.items())
    for text in (*empty, bare, whole[:99], "[" * 200_000, *wrong):  # as if it were not done
        stored.write_text(text)
        (output / "latency.json").write_text(text)
        require_done(study(file, output, settings=[f"data={images}"]), output)
        assert json.loads(stored.read_text()) == json.loads(whole)
    for part in ("test", "train"):
        kept = next(images.glob(f"{part}/*/*"))
        kept.rename(tmp_path / kept.name)
        with pytest.raises(GhostEdgeError, match=r"was run with (test_)?fingerprint"):
            study(file, output, settings=[f"data={images}"])


@pytest.mark.usefixtures("quick")
def test_a_result_from_before_an_arm_had_a_field(tmp_path: Path, few_images: Path) -> None:
    file, output = write(tmp_path, f"[defaults]\n{TINY}[arms.a]\n"), tmp_path / "out"
    study(file, output, settings=[f"data={few_images}"])
    stored = output / "runs/a/seed-0/result.json"
    result = json.loads(stored.read_text())
    del result["arm"]["post_norm"]
    stored.write_text(json.dumps(result))
    assert study(file, output, settings=[f"data={few_images}"]).states == {}
    assert json.loads(stored.read_text()) == result, "it was run anew"


@pytest.mark.usefixtures("quick")
def test_what_is_of_no_study_stays(tmp_path: Path) -> None:
    file, output = write(tmp_path, f"[defaults]\n{TINY}[arms.a]\n"), tmp_path / "out"
    output.mkdir()
    for name in ("results.json", "accuracy.png"):
        (output / name).write_text('{"my": "experiment"}')
        with pytest.raises(GhostEdgeError, match=f"{name} is of no study and would be lost"):
            study(file, output)
        assert [file.name for file in output.iterdir()] == [name]
        (output / name).unlink()
    with held(output), pytest.raises(GhostEdgeError, match="Another run writes to"):
        study(file, output)


@pytest.mark.usefixtures("quick")
def test_names_of_data(tmp_path: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set's name is no folder's, and in a picture no formula."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few_images, "drawn")
    shutil.copytree(few_images, "a$_$b")
    text = f"[defaults]\n{TINY}[arms.a]\n[arms.b]\ndata = 'a$_$b'\n[arms.c]\ndata = 'drawn'\n"
    result = study(write(tmp_path, text), tmp_path / "out")
    assert result.states == {}
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert runs["c, seed 0"]["inputs"]["fingerprint"] != runs["b, seed 0"]["inputs"]["fingerprint"]


@pytest.mark.usefixtures("quick")
def test_what_cannot_be_compared_or_taught_is_refused_at_once(
    tmp_path: Path, few_images: Path
) -> None:
    text = f"[defaults]\n{TINY}[arms.a]\ndata = '{few_images}'\n[arms.b]\n"
    with pytest.raises(
        GhostEdgeError, match=r"arm 'a': a teacher of it learns drawn:2\. .*does not know"
    ):
        study(write(tmp_path, text), tmp_path / "out", settings=["a.teachers=['b']"])
    study(write(tmp_path, text), tmp_path / "out", settings=["b.teachers=['a']"], budget=1e-6)
    assert not (tmp_path / "out" / "runs").exists()


def test_nets_train_without_branches_and_norms_that_they_cannot_have(tmp_path: Path) -> None:
    text = "branches = 3\npost_norm = true\n[arms.a]\nteachers = ['t']\n[arms.t]\n"
    settings = ["a.model=ghostnetv3-small-0.1x"]
    arms = load(write(tmp_path, f"[defaults]\n{TINY}{text}"), settings)
    assert arms["a"].post_norm and not arms["t"].post_norm
    assert [arms[name].branches for name in "at"] == [3, 1]


@pytest.mark.usefixtures("quick")
def test_a_failed_run_does_not_cost_the_latencies(
    tmp_path: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[arms.good]\nmodel = 'resnet8'\nlatency = true\n[arms.bad]\nlr = 1000\nclip = 0\n"
    file = write(tmp_path, f"[defaults]\n{TINY}{text}[arms.late]\n")
    settings, output = (
        [f"data={few_images}", "bad.weight_decay=1e30", "bad.epochs=9"],
        tmp_path / "o",
    )
    measured = []

    def latencies(*_: Any) -> dict[str, float]:
        measured.append(1)
        return {"resnet8-24px-4": 0.5}

    monkeypatch.setattr(studies, "_latencies", latencies)
    result = study(file, output, settings=settings)
    assert result.states.keys() == {"bad, seed 0"} and result.rows[0]["int8_ms"] == 0.5
    # While there is more to run, what is known stays in the table.
    (output / "latency.json").write_text('{"resnet8-24px-4": 0.25}')
    shutil.rmtree(output / "runs" / "late")
    result = study(file, output, settings=settings, budget=1e-6)
    assert len(measured) == 1 and result.rows[0]["int8_ms"] == 0.25
    seen = []
    write_ = studies._write
    monkeypatch.setattr(studies, "_write", lambda *_: seen.append(_[0][0]["int8_ms"]) or write_(*_))
    study(file, output, settings=settings)
    assert seen == [0.25, 0.25, 0.25, 0.5], "after each run, before the latencies and after them"
    # What they cannot measure costs neither table nor picture.
    (output / "accuracy.png").unlink()

    def failed(*_: Any) -> dict[str, float]:
        raise GhostEdgeError("no conversion")

    monkeypatch.setattr(studies, "_latencies", failed)
    with pytest.raises(GhostEdgeError, match="no conversion"):
        study(file, output, settings=settings)
    assert (output / "accuracy.png").exists()


@pytest.mark.usefixtures("quick")
def test_latencies_are_of_what_the_study_exports(tmp_path: Path, few_images: Path) -> None:
    text = f"{TINY}[arms.a]\nmodel = 'resnet8'\nlatency = true\n[arms.b]\nmodel = 'resnet8'\n"
    file, output = write(tmp_path, f"[defaults]\n{text}"), tmp_path / "out"
    rows = study(file, output, settings=[f"data={few_images}"]).rows
    assert 0 < rows[0]["int8_ms"] == rows[1]["int8_ms"] < 1000
    assert (output / "int8/resnet8-24px-4/model_int8.tflite").exists()


def test_a_killed_study_leaves_no_process_and_continues(
    tmp_path: Path, few_images: Path, quick: None
) -> None:
    file = write(tmp_path, f"[defaults]\n{TINY}[arms.first]\n[arms.second]\nepochs = 3000\n")
    output = tmp_path / "out"
    data = f"data={few_images}"
    command = [sys.executable, "-m", "ghostedge.cli", "study", str(file), "-o", str(output)]
    running = subprocess.Popen([*command, "--set", data], stderr=subprocess.DEVNULL)
    state = output / "runs/second/seed-0/state.pt"
    try:
        deadline = time.monotonic() + 120
        while not state.exists():
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (tasks,) = Path(f"/proc/{running.pid}/task").glob(f"{running.pid}/children")
        children = [int(pid) for pid in tasks.read_text().split()]
        assert children
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    while any(_runs(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first = output / "runs/first/seed-0/result.json"
    stamp, epochs = first.stat().st_mtime_ns, len(_log(state.parent))
    assert 0 < epochs < 3000
    result = study(file, output, settings=[data], budget=2)
    assert result.states.keys() == {"second, seed 0"}
    assert first.stat().st_mtime_ns == stamp
    assert len(_log(state.parent)) > epochs


def _runs(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _log(folder: Path) -> list[str]:
    return (folder / "log.csv").read_text().splitlines()[1:]


class Crash:
    """What ends the process that it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_a_crashed_process_is_a_failed_run() -> None:
    job: Any = Crash()
    assert studies._apart(job, None, "cpu") == ("failed", "as its process ended with code 7")


def results(**tops: list[float]) -> Results:
    def run(top1: float) -> dict[str, Any]:
        accuracy = {"validation": {"top1": top1 + 1}, "test": {"top1": top1}}
        return {"accuracy": accuracy, "seconds": 60, "deployed_parameters": 10, "macs": 2e6}

    return {
        (name, seed): None if top1 < 0 else run(top1) | {"network": name, "size": 32, "classes": 4}
        | {"arm": {"post_norm": False}}
        for name, values in tops.items()
        for seed, top1 in enumerate(values)
    }  # fmt: skip


def test_means_spreads_and_intervals(tmp_path: Path) -> None:
    text = f"[defaults]\n{TINY}seeds = 4\n[arms.a]\n[arms.b]\nagainst = 'a'\n[arms.c]\n"
    arms = load(write(tmp_path, text))
    found = results(a=[80, 82, 81, -1], b=[81, 84, 82.5, 90], c=[-1] * 4)
    a, b, c = summarize(arms, found, {"b-32px-4": 0.25})
    assert (a["test"], a["test_sd"], a["seeds"]) == (81, 1, 3)
    assert a["validation"] == 82 and a["gain"] is None and a["hours"] == 0.05
    assert b["test_sd"] == pytest.approx(statistics.stdev([81, 84, 82.5, 90]))
    # Only seeds that both have; 4.303 is Student's t for three values.
    assert b["gain"] == pytest.approx(1.5)
    assert b["gain_95"] == pytest.approx(4.303 * 0.5 / 3**0.5)
    assert (b["mmacs"], b["parameters"], b["int8_ms"]) == (2.0, 10, 0.25)
    assert c["seeds"] == 0 and c["test"] is None
    heading, cells = studies.table([a, b, c])
    assert "published" not in heading and "int8 ms" in heading
    lines = [dict(zip(heading, line, strict=True)) for line in cells]
    assert lines[0]["test"] == "81.00 ± 1.00" and lines[0]["seeds"] == "3 of 4"
    assert lines[1]["gain"] == "+1.50 ± 1.24 on a" and lines[2]["validation"] == "not run"
    assert "Not run: c." in studies.caption([a, b, c])
    assert studies.draw([a, b, c], tmp_path / "accuracy.png")


def test_latencies_are_measured_once(tmp_path: Path, bundle: Bundle) -> None:
    arm = load(write(tmp_path, f"[defaults]\n{TINY}[arms.a]\nmodel='ghostnetv3'\nlatency=true\n"))
    jobs = studies._jobs({"a": arm["a"], "b": arm["a"]}, tmp_path)
    found = results(a=[80], b=[81])
    for run in found.values():
        assert run is not None
        run["network"] = "net"  # the same in both
    shutil.copytree(bundle.path, tmp_path / "int8/net-32px-4")
    latencies = studies._latencies(jobs, found, tmp_path, None)
    assert latencies.keys() == {"net-32px-4"} and 0 < latencies["net-32px-4"] < 1000
    shutil.rmtree(tmp_path / "int8")
    assert studies._latencies(jobs, found, tmp_path, 0) == latencies
    (tmp_path / "latency.json").unlink()
    with pytest.raises(Paused, match="before net-32px-4 is timed"):
        studies._latencies(jobs, found, tmp_path, 0)


def test_a_teacher_that_is_a_link_keeps_its_name(tmp_path: Path) -> None:
    """As caches of downloads have them, whose files have no ending."""
    (tmp_path / "4f2a").write_bytes(b"")
    (tmp_path / "net.onnx").symlink_to(tmp_path / "4f2a")
    arms = load(write(tmp_path, f"[arms.a]\n{TINY}teachers = ['{tmp_path / 'net.onnx'}']\n"))
    assert studies._jobs(arms, tmp_path)["a", 0].teachers == (str(tmp_path / "net.onnx"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms = 3", "has no arms"),
        ("[arm.a]", r"no 'arm', only \[defaults\] and \[arms.NAME\]. Did you mean arms"),
        ("[arms]\na = 3", "'a' is no arm"),
        ("[arms.'']", "'' is no arm"),
        ("arms = {a = {}}\ndefaults = 3", "defaults is no table"),
        ("[arms.a]\npublished = inf", "published must be a finite number"),
        ("[arms.a]\nweight_decay = inf", "weight_decay must be a finite number"),
        (f"[arms.a]\nepochs = 1{'0' * 20}", "epochs must be from 1 to 1,000,000"),
        ("[arms.'../a']", "'../a' is no arm"),
        ("[arms.a]\nmodel = 'resnet50'", "arm 'a': data is missing"),
        ("[arms.a]\nteacher = 'b'", "arm 'a': it has a field 'teacher'.*Did you mean teachers"),
        ("[arms.a]\nseed = 3", "arm 'a': it has a field 'seed'.*Did you mean seeds"),
        ("[arms.a]\nepochs = 'many'", "arm 'a': epochs must be a whole number, which 'many' is not"),
        ("[arms.a]\nepochs = '3'", "arm 'a': epochs must be a whole number, which '3' is not"),
        ("[arms.a]\nlr = -1", "arm 'a': lr must be above 0"),
        pytest.param(f"[arms.a]\nalpha = {'9' * 400}", "alpha must be a number", id="400 digits"),
        ("[arms.a]\nseeds = 0", "arm 'a': seeds is the number of runs"),
        ("[arms.a]\nseeds = true", "arm 'a': seeds must be a whole number"),
        ("[arms.a]\nteachers = 'b'", "arm 'a': teachers must be a list of texts"),
        ("[arms.a]\nteachers = [3]", "arm 'a': teachers must be a list of texts"),
        ("[arms.a]\nalpha = 'x'", "arm 'a': alpha must be a number"),
        ("[arms.a]\nalpha = 3", "arm 'a': alpha is a share"),
        ("[arms.a]\nlatency = 1", "arm 'a': latency must be true or false"),
        ("[arms.a]\nmodel = 'resnet5'", "arm 'a': model: .*'resnet5'.*Did you mean resnet50"),
        ("[arms.a]\nmodel = 'resnet8-2x'", "arm 'a': model: resnet8 has one width only"),
        ("[arms.a]\nmodel = 'densestride-9x'", "arm 'a': model: .*outside 0.1 to 8"),
        ("[arms.a]\npost_norm = true", "arm 'a': model: post_norm is of a sum of branches"),
        ("[arms.a]\nstrategy = 'dgk'", "arm 'a': There is no strategy 'dgk'. Did you mean dgkd"),
        ("[arms.a]\nrecipe = 'papr'", "arm 'a': papr is no training recipe"),
        ("[arms.a]\nmodel = 'resnet18'\nlatency = true", "arm 'a': latency is of what is deployed"),
        ("[arms.a]\npretrained = true", "arm 'a': model: .*no ImageNet weights for ghostnetv3-small"),
        ("[arms.a]\nimgsz = 0", "size of 0 is outside"),
        ("[arms.b]\ndata='x'\n[arms.a]\nagainst='b'", "'a': against names 'b', whose data is x"),
        ("[arms.a]\nmixup = 0.2", "arm 'a': mixup is for distillation only"),
        ("[arms.net]\n[arms.a]\nteachers = ['nett']", "teachers names 'nett'.*Did you mean net"),
        ("[arms.net]\n[arms.a]\nagainst = 'nett'", "against names 'nett'.*Did you mean net"),
        ("[arms.a]\nagainst = 'a'", "arm 'a': against names itself"),
        ("[arms.a]\nalpha = 0.1", "arm 'a': alpha is of distillation: name its teachers"),
        ("[arms.a]\nteachers = ['b']\n[arms.b]\nteachers = ['a']", "come back to itself"),
        ("[arms.net]\nteachers=['a']\n[arms.a]\nteachers=['b']\n[arms.b]\nteachers=['a']",
         "arm 'a': its teachers come back to itself, a to b to a: take one"),
        ("[arms.a]\nteachers = ['a']", "arm 'a': its teachers come back to itself, a to a: take"),
        ("[arms.a", "is no study"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    defaults = "" if "missing" in said else "[defaults]\ndata = 'drawn'\n"
    with pytest.raises(GhostEdgeError, match=said) as caught:
        load(write(tmp_path, text if text.startswith("arms") else defaults + text))
    assert str(caught.value).startswith(str(tmp_path / "study.toml"))


def test_settings(tmp_path: Path) -> None:
    file = write(tmp_path, "[defaults]\ndata = 'drawn'\n[arms.'a-1.0x']\n[arms.b]\nepochs = 9\n")
    arms = load(file, ["epochs=2", "a-1.0x.lr=0.5", "b.teachers=['a-1.0x']", "data=cifar10"])
    assert [arm.recipe.epochs for arm in arms.values()] == [2, 2]
    assert [arm.recipe.lr for arm in arms.values()] == [0.5, None]
    assert arms["b"].teachers == ["a-1.0x"] and arms["b"].data == "cifar10"
    for text in ("epochs", "c.epochs=3", "=", "b.=3", f"epochs={'[' * 3000}", "data=d\udcff"):
        with pytest.raises(GhostEdgeError):
            load(file, [text])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("precision=bf16", "bf16"),
        ("flip='none'", "none"),
        ('flip = "none"', "none"),
        ("flip=none", "none"),
        ("lr=0.05", 0.05),
        ("lr=5e-4", 5e-4),
        ("lr=1", 1.0),
        ("epochs=3", 3),
        ("batch=64", 64),
        ("balance=true", True),
        ("balance=True", True),
        ("lr=.1", 0.1),
        ("lr=5.", 5.0),
        ("epochs=030", 30),
    ],
)
def test_train_and_study_take_the_same_settings(
    tmp_path: Path, setting: str, value: object
) -> None:
    arm = load(write(tmp_path, "[arms.a]\ndata = 'drawn'\n"), [setting])["a"]
    assert arm.recipe == recipe.load(None, [setting])
    found = getattr(arm.recipe, setting.partition("=")[0].strip())
    assert (type(found), found) == (type(value), value)


def test_data_are_looked_for_before_anything_runs(tmp_path: Path) -> None:
    file = write(tmp_path, f"[defaults]\n{TINY}[arms.a]\n[arms.b]\ndata = 'nowhere'\n")
    with pytest.raises(GhostEdgeError, match="no folder nowhere"):
        study(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cluster_needs_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GhostEdgeError, match=r"pip install 'ghostedge\[cluster\]'"):
        study(write(tmp_path, f"[arms.a]\n{TINY}"), tmp_path / "out", cluster=True)


def test_a_cluster_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(GhostEdgeError, match=r"Ray cannot be reached .* RAY_ADDRESS names"):
        study(write(tmp_path, f"[defaults]\n{TINY}[arms.a]\n"), tmp_path / "out", cluster=True)


def test_a_cluster_gives_the_same_runs(
    tmp_path: Path, few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps a token
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray has it for a task of one CPU
    text = f"[defaults]\n{TINY}[arms.student]\nteachers = ['teacher']\n[arms.teacher]\n"
    file = write(tmp_path, text.replace("drawn:2", str(few_images)))
    here, there = tmp_path / "here", tmp_path / "there"
    assert study(file, here).states == {}
    assert study(file, there, cluster=True).states == {}
    for run in ("teacher", "student"):
        one, other = (
            checkpoint.read(folder / f"runs/{run}/seed-0/best.safetensors")
            for folder in (here, there)
        )
        assert one[0].accuracy == other[0].accuracy
        assert all((value == other[1][name]).all() for name, value in one[1].items())
