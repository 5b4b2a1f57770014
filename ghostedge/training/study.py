"""Studies: arms times seeds from a TOML file, each run in a process of its own, and one table of all.

An arm is a network and how it is trained; one can name others as its teachers, which are then trained
once for all their students. Whatever was done stays in the output folder, from which the same call
goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ghostedge import checkpoint, markdown
from ghostedge.data.sources import Data, match_classes, named, open_data, require_classes
from ghostedge.errors import GhostEdgeError, Paused, nearest, needing, require
from ghostedge.files import atomic_file, atomic_write, held, read_toml, sha256
from ghostedge.models import ARCHITECTURES, profile
from ghostedge.pixels import PixelContract
from ghostedge.training import recipe as recipes
from ghostedge.training.distillation import Distillation
from ghostedge.training.loop import train
from ghostedge.training.recipe import Recipe
from ghostedge.training.start import DEFAULT, possible_form, require_buildable

State = tuple[Literal["done", "paused", "failed", "waiting"], str]
"""Of a run, with the reason where it is not done."""
Row = dict[str, Any]
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for two-sided 95% intervals of 2 to 11 values; the last one is too wide for more."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a study. In the file, fields of `Recipe` stand beside these, in place of `recipe`."""

    data: str
    """As `ghostedge train` takes it."""
    recipe: Recipe
    """In the file the name of one, as for `--recipe`."""
    model: str = DEFAULT
    imgsz: int | None = None
    branches: int = 1
    post_norm: bool = False
    """Both of networks that can have them; others do without, so that [defaults] may ask for them."""
    pretrained: bool = False
    teachers: list[str] = dataclasses.field(default_factory=list)
    """Other arms, checkpoints, or .onnx files. Of an arm, a student takes the run of its own seed, or
    the first where there is none."""
    strategy: str = "kd"
    temperature: float | None = None
    alpha: float | None = None
    seeds: int = 1
    """How many runs, with seeds from 0."""
    published: float | None = None
    """Somebody else's top-1 in percent, to print beside ours."""
    against: str | None = None
    """The arm that this one is compared with, seed by seed."""
    latency: bool = False
    """Export the network to int8 TFLite at the end, and time it on this CPU."""
    compile: str | None = None
    """As `train` takes it."""

    def identity(self) -> dict[str, Any]:
        """Return what makes a run of this arm another one, as JSON has it."""
        apart = ("seeds", "published", "against", "latency", "compile")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in apart}
        return dict(json.loads(json.dumps({**fields.pop("recipe"), **fields})))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: an arm with a seed. Paths are absolute, as a cluster's processes start elsewhere."""

    name: str
    arm: Arm
    seed: int
    folder: Path
    data: str
    teachers: tuple[str, ...]
    needs: tuple[tuple[str, int], ...]
    """The runs, by name and seed, that have to be done before."""

    def result(self, sets: Data) -> Row | None:
        """Return what a finished run left, or None where there is none, or it is damaged.

        Raises GhostEdgeError where it is of another definition, other images or teachers.
        """
        result = _stored(self.folder / "result.json")
        if not _whole(result):
            return None
        inputs = {
            **sets.fingerprints,
            "teachers": [sha256(Path(t)) if Path(t).exists() else None for t in self.teachers],
        }
        # What an arm did not have then is as it is by default.
        arm = {**Arm(self.data, Recipe()).identity(), **result["arm"]}
        for then, now in ((arm, self.arm.identity()), (result["inputs"], inputs)):
            for key, mine in now.items():
                if key not in then or mine != then[key]:
                    raise GhostEdgeError(
                        f"{self.folder} was run with {key} = {then.get(key)!r}, not {mine!r}: "
                        "name another --output, or delete that folder to run it anew."
                    )
        return result


class Result(NamedTuple):
    """What a study gave: a row for each arm, as in results.json, and how many runs it has."""

    rows: list[Row]
    runs: int
    states: dict[str, State]
    """Of every run that is not done."""


def study(
    file: Path,
    output: Path,
    *,
    settings: Sequence[str] = (),
    device: str = "cpu",
    budget: float | None = None,
    download: bool = False,
    cluster: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Run every arm of a study file with every seed, except what `output` holds already.

    `output` receives a folder for each run (see `train`), and after each of them results.json,
    results.csv and results.md; at the end accuracy.png. A run that fails takes only its students
    along. The epoch is chosen on the validation split; test images are read once, at the end of a run.
    A script that calls this does so below `if __name__ == "__main__":`, as runs import it anew.

    Args:
        settings: texts such as "epochs=2", for every arm, or "ARM.epochs=2", for one.
        budget: seconds after which to stop; the same call goes on from there.
        cluster: run through Ray, which takes its address from RAY_ADDRESS and starts on this machine
            alone where that is not set. All machines need this environment and these folders.

    Raises GhostEdgeError for a bad file, data that are missing, or runs there of another definition.
    """
    # By the clock, which a cluster's machines share.
    deadline = None if budget is None else time.time() + budget
    arms = load(file, settings)
    if any(arm.latency for arm in arms.values()) and not importlib.util.find_spec("onnx2tf"):
        raise require("onnx2tf", "export")
    sets: dict[str, Data] = {}
    for data in {arm.data: None for arm in arms.values()}:
        sets[data] = open_data(data, download=download)
        require_classes(sets[data])
    for name, arm in arms.items():
        for teacher in (arms[t] for t in arm.teachers if t in arms):
            try:
                match_classes(sets[arm.data].classes, sets[teacher.data].classes)
            except GhostEdgeError as error:
                raise GhostEdgeError(
                    f"{file}, arm {name!r}: a teacher of it learns {teacher.data}. {error}"
                ) from error
    output = output.resolve()
    with held(output):
        _require_own(output)
        jobs = _jobs(arms, output)
        results = {key: job.result(sets[job.arm.data]) for key, job in jobs.items()}
        open_ = {key: job for key, job in jobs.items() if results[key] is None}
        say(f"{len(jobs) - len(open_)} of {len(jobs)} runs are done already")

        def note(key: tuple[str, int], state: State) -> None:
            if state[0] not in ("done", "failed"):
                return
            results[key] = jobs[key].result(sets[jobs[key].arm.data])
            say(f"{key[0]}, seed {key[1]}: {' '.join(filter(None, state))}")
            known = _known(output / "latency.json")
            _write(summarize(arms, results, known), results, settings, output)

        run = _on_ray if cluster else _here
        states = {key: s for key, s in run(open_, deadline, device, note).items() if s[0] != "done"}

        def show(latencies: dict[str, float]) -> list[Row]:
            rows = summarize(arms, results, latencies)
            _write(rows, results, settings, output)
            if any(row["seeds"] for row in rows) and not draw(rows, output / "accuracy.png"):
                say("matplotlib is not installed: accuracy.png is not drawn")
            return rows

        known = _known(output / "latency.json")
        rows = show(known)
        if not any(state == "paused" for state, _ in states.values()):
            # Last, as its failure shall cost no accuracy.
            latencies = _latencies(jobs, results, output, deadline)
            if latencies != known:
                rows = show(latencies)
        return Result(rows, len(jobs), {f"{key[0]}, seed {key[1]}": s for key, s in states.items()})


def _require_own(output: Path) -> None:
    """Raise GhostEdgeError where a study would write over what is not its own."""
    stored = _stored(output / "results.json")
    if stored.keys() >= {"changed", "arms", "runs"}:
        return
    for name in (*(f"results.{kind}" for kind in ("json", "csv", "md")), "accuracy.png"):
        if (output / name).exists():
            raise GhostEdgeError(
                f"{output / name} is of no study and would be lost: name another --output."
            )


def require_done(result: Result, output: Path) -> None:
    """Raise GhostEdgeError where runs failed, Paused where only time was missing."""
    failed = {key: why for key, (state, why) in result.states.items() if state == "failed"}
    if failed:
        key, why = next(iter(failed.items()))
        raise GhostEdgeError(
            f"{len(failed)} of {result.runs} runs failed, the first, {key}: {why} "
            "The same command tries them again."
        )
    if result.states:
        raise Paused(
            f"The time is up with {len(result.states)} of {result.runs} runs to go: the same command "
            f"continues {output}."
        )


def load(file: Path, settings: Iterable[str] = ()) -> dict[str, Arm]:
    """Read the arms of a study file, by name, and change them by `settings` (see `study`).

    Raises GhostEdgeError, naming arm and field, for what no arm can have.
    """
    stored = read_toml(file, "study")
    for key in stored:
        if key not in ("defaults", "arms"):
            raise GhostEdgeError(
                f"{file}: a study has no {key!r}, only [defaults] and [arms.NAME]."
                f"{nearest(key, ('defaults', 'arms'))}"
            )
    defaults, tables = stored.get("defaults", {}), stored.get("arms", {})
    if not isinstance(tables, dict) or not tables:
        raise GhostEdgeError(f"{file} has no arms: write at least one, as [arms.NAME].")
    if not isinstance(defaults, dict):
        raise GhostEdgeError(f"{file}: defaults is no table: write [defaults].")
    for name, table in tables.items():
        if not isinstance(table, dict) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise GhostEdgeError(
                f"{file}: {name!r} is no arm: an arm is a table, [arms.NAME], whose "
                "name has letters, digits and . + - _ alone."
            )
    plain, tables = tables, {name: {**defaults, **table} for name, table in tables.items()}
    for text in settings:
        key, value = recipes.setting(text)
        name, _, field = key.rpartition(".")
        if name and name not in tables:
            raise GhostEdgeError(
                f"--set {text} changes nothing: write it as in epochs=2, or ARM.epochs=2 for one of "
                f"the arms of {file}.{nearest(name, tables)}"
            )
        for table in [tables[name]] if name else tables.values():
            table[field] = value
    arms = {}
    for name, table in tables.items():
        try:
            arms[name] = _arm(table, tables)
        except GhostEdgeError as error:
            raise GhostEdgeError(f"{file}, arm {name!r}: {error}") from error
    try:
        _teachers_first(arms)
    except GhostEdgeError as error:
        raise GhostEdgeError(f"{file}, {error}") from error
    for name, arm in arms.items():
        idle = [key for key in ("strategy", "temperature", "alpha") if key in plain[name]]
        if idle and not arm.teachers:
            raise GhostEdgeError(
                f"{file}, arm {name!r}: {idle[0]} is of distillation: name its teachers."
            )
        if arm.against == name:
            raise GhostEdgeError(f"{file}, arm {name!r}: against names itself: name another arm.")
        if arm.against is not None and arms[arm.against].data != arm.data:
            raise GhostEdgeError(
                f"{file}, arm {name!r}: against names {arm.against!r}, whose data is "
                f"{arms[arm.against].data} and not {arm.data}: accuracies compare on the same images."
            )
    return arms


def _arm(table: dict[str, Any], names: Iterable[str]) -> Arm:
    hints = {**typing.get_type_hints(Arm), "recipe": str}
    training = [field.name for field in dataclasses.fields(Recipe) if field.name != "seed"]
    for key in table:
        if key not in hints and key not in training:
            raise GhostEdgeError(
                f"it has a field {key!r}, which no arm has.{nearest(key, [*hints, *training])} "
                f"Fields are {', '.join(hints)}, and those of a recipe: {', '.join(training)}."
            )
    given = {k: recipes.fitting(k, v, hints[k]) for k, v in table.items() if k in hints}
    changes = {k: v for k, v in table.items() if k in training}
    if "data" not in given:
        raise GhostEdgeError("data is missing: name a folder or a set, for it or in [defaults].")
    arm = Arm(**{**given, "recipe": recipes.load(given.get("recipe"), **changes)})
    try:
        arm = dataclasses.replace(arm, **possible_form(arm.model, arm.branches, arm.post_norm))
        family = require_buildable(arm.model, arm.branches, arm.post_norm, arm.pretrained)
    except GhostEdgeError as error:
        raise GhostEdgeError(f"model: {error}") from error
    if arm.imgsz is not None:
        PixelContract(arm.imgsz)
    if arm.seeds < 1:
        raise GhostEdgeError(f"seeds is the number of runs, which {arm.seeds} is not.")
    if arm.latency and family not in ARCHITECTURES:
        raise GhostEdgeError(f"latency is of what is deployed, and {family} is a teacher.")
    if arm.against is not None and arm.against not in names:
        raise GhostEdgeError(
            f"against names {arm.against!r}, which is no arm.{nearest(arm.against, names)}"
        )
    if arm.recipe.mixup and not arm.teachers:
        raise GhostEdgeError("mixup is for distillation only: it hurts compact nets without.")
    for teacher in arm.teachers:
        if teacher not in names and not Path(teacher).is_file():
            known = [*names, *checkpoint.shipped()]
            if teacher not in known:
                raise GhostEdgeError(
                    f"teachers names {teacher!r}, which is neither an arm nor a file."
                    f"{nearest(teacher, known)}"
                )
    Distillation(tuple(arm.teachers) or ("any",), arm.strategy, arm.temperature, arm.alpha)
    return arm


def _teachers_first(arms: dict[str, Arm]) -> dict[str, list[str]]:
    """Return which arms teach each arm, in the order of the file except for teachers before students.

    Raises GhostEdgeError where an arm teaches itself through others.
    """
    order: dict[str, list[str]] = {}

    def append(name: str, *students: str) -> None:
        if name in students:
            circle = " to ".join((*students[students.index(name) :], name))
            raise GhostEdgeError(
                f"arm {name!r}: its teachers come back to itself, {circle}: take one of them out."
            )
        if name not in order:
            teachers = [teacher for teacher in arms[name].teachers if teacher in arms]
            for teacher in teachers:
                append(teacher, *students, name)
            order[name] = teachers

    for name in arms:
        append(name)
    return order


def _jobs(arms: dict[str, Arm], output: Path) -> dict[tuple[str, int], Job]:
    """Return all runs in the order of the file, all seeds of an arm together, teachers before students."""

    def folder(name: str, seed: int) -> Path:
        return output / "runs" / name / f"seed-{seed}"

    jobs = {}
    for name, guides in _teachers_first(arms).items():
        arm = arms[name]
        for seed in range(arm.seeds):
            needs = {t: (t, seed if seed < arms[t].seeds else 0) for t in guides}
            taught = {t: folder(*need) / "best.safetensors" for t, need in needs.items()}
            teachers = [
                str(taught.get(t) or os.path.abspath(checkpoint.find(t))) for t in arm.teachers
            ]
            data = arm.data
            if not named(arm.data):
                data = os.path.abspath(data)
            jobs[name, seed] = Job(
                name, arm, seed, folder(name, seed), data, tuple(teachers), tuple(needs.values())
            )
    return jobs


Note = Callable[[tuple[str, int], State], None]


def _here(
    jobs: dict[tuple[str, int], Job], deadline: float | None, device: str, note: Note
) -> dict[tuple[str, int], State]:
    states: dict[tuple[str, int], State] = {}
    for key, job in jobs.items():
        before = [states[need] for need in job.needs if need in states]
        states[key] = _carry_out(_apart, job, deadline, device, *before)
        note(key, states[key])
    return states


def _on_ray(
    jobs: dict[tuple[str, int], Job], deadline: float | None, device: str, note: Note
) -> dict[tuple[str, int], State]:
    with needing("cluster"):
        import ray
    home = os.path.abspath(os.environ.get("GHOSTEDGE_DATA", "data"))
    try:
        ray.init(runtime_env={"env_vars": {"GHOSTEDGE_DATA": home}})
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GhostEdgeError(
            f"Ray cannot be reached ({error}): start the cluster that RAY_ADDRESS names, or unset "
            "it to run on this machine alone."
        ) from error
    try:
        # max_calls: a worker ends with its run, as here each has a process of its own.
        remote = ray.remote(num_gpus=int(device != "cpu"), max_calls=1)(_carry_out)
        running: dict[tuple[str, int], Any] = {}
        for key, job in jobs.items():
            before = [running[need] for need in job.needs if need in running]
            running[key] = remote.remote(_run, job, deadline, device, *before)
        states: dict[tuple[str, int], State] = {}
        keys, pending = {ref: key for key, ref in running.items()}, list(running.values())
        while pending:
            (ref,), pending = ray.wait(pending)
            try:
                states[keys[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:  # its machine or process is gone
                states[keys[ref]] = "failed", str(error)
            note(keys[ref], states[keys[ref]])
        return states
    finally:
        ray.shutdown()


def _carry_out(
    run: Callable[[Job, float | None, str], State],
    job: Job,
    deadline: float | None,
    device: str,
    *before: State,
) -> State:
    """Run a job unless one of its teachers, whose states are `before`, or the time is missing."""
    if any(state != "done" for state, _ in before):
        return "waiting", "for its teacher"
    if deadline is not None and time.time() >= deadline:
        return "paused", "before its start"
    return run(job, deadline, device)


def _apart(job: Job, deadline: float | None, device: str) -> State:
    """Do as `_run` in a process of its own: what crashes or leaks there ends there."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, job, deadline, device), daemon=True)
    process.start()
    sender.close()
    try:
        state: State = receiver.recv()
        return state
    except EOFError:
        process.join()
        return "failed", f"as its process ended with code {process.exitcode}"
    finally:
        process.terminate()
        process.join()


def _child(sender: connection.Connection, job: Job, deadline: float | None, device: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sender.send(_run(job, deadline, device))
    except KeyboardInterrupt:  # which the study reports
        os._exit(130)


def _end_with_parent() -> None:
    """A killed study leaves no run behind that would write beside the one that continues it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(job: Job, deadline: float | None, device: str) -> State:
    arm = job.arm
    distillation = (
        Distillation(job.teachers, arm.strategy, arm.temperature, arm.alpha)
        if job.teachers
        else None
    )
    try:
        best = train(
            job.data,
            job.folder,
            model=arm.model,
            imgsz=arm.imgsz,
            branches=arm.branches,
            post_norm=arm.post_norm,
            pretrained=arm.pretrained,
            recipe=dataclasses.replace(arm.recipe, seed=job.seed),
            distillation=distillation,
            device=device,
            compile=arm.compile,
            budget=None if deadline is None else max(0.0, deadline - time.time()),
            resume=(job.folder / "state.pt").exists(),
        )
        card, net = checkpoint.build(best)
        taught = card.training.get("distillation", {"teachers": []})
        result = {
            "arm": arm.identity(),
            "inputs": {
                **{key: value for key, value in card.data.items() if "fingerprint" in key},
                "teachers": [teacher["sha256"] for teacher in taught["teachers"]],
            },
            "seed": job.seed,
            "network": card.name,
            "size": card.pixels.size,
            "classes": len(card.labels),
            "data": card.data["name"],
            "accuracy": card.accuracy,
            "epoch": card.training["epoch"],
            "seconds": round(_seconds(job.folder)),
            "device": card.training["device"],
            "versions": card.versions,
            "sha256": sha256(best),
            **profile(net, card.pixels.size)._asdict(),
        }
        atomic_write(job.folder / "result.json", json.dumps(result, indent=1))
    except Paused as error:
        return "paused", str(error)
    except GhostEdgeError as error:
        return "failed", str(error)
    # Out of memory, say: that run's end, not the others'.
    except Exception as error:  # noqa: BLE001
        return "failed", f"{type(error).__name__}: {error}"
    return "done", ""


def _seconds(folder: Path) -> float:
    """Return how long all epochs took; the checkpoint counts up to the best one."""
    with (folder / "log.csv").open(newline="") as log:
        return sum(float(row["seconds"]) for row in csv.DictReader(log))


def summarize(
    arms: dict[str, Arm],
    results: dict[tuple[str, int], Row | None],
    latencies: dict[str, float],
) -> list[Row]:
    """Return a row for each arm: means and sample standard deviations over the seeds that are done.

    Accuracies are top-1 in percent; `gain` is the mean difference to the arm of `against` over the
    seeds that both have, of test where there is one, and `gain_95` half its paired 95% t-interval.
    What is not known is None.
    """
    rows = []
    for name, arm in arms.items():
        runs = [run for seed in range(arm.seeds) if (run := results[name, seed]) is not None]
        row: Row = {"arm": name, "model": arm.model, "data": arm.data, "teachers": arm.teachers}
        row |= {"strategy": arm.strategy if arm.teachers else None, "epochs": arm.recipe.epochs}
        row |= {"seeds": len(runs), "seeds_wanted": arm.seeds}
        for part in ("validation", "test"):
            top1 = [run["accuracy"][part]["top1"] for run in runs if part in run["accuracy"]]
            row[part] = float(np.mean(top1)) if top1 else None
            row[f"{part}_sd"] = float(np.std(top1, ddof=1)) if len(top1) > 1 else None
        row |= {"published": arm.published, "against": arm.against, "gain": None, "gain_95": None}
        pairs = [
            (_score(results[name, seed]), _score(results[arm.against, seed]))
            for seed in range(arm.seeds)
            if arm.against is not None and results[name, seed] and results.get((arm.against, seed))
        ]
        if pairs:
            gains = [mine - theirs for mine, theirs in pairs]
            row["gain"] = float(np.mean(gains))
            if len(gains) > 1:
                t = T_95[min(len(gains) - 1, len(T_95)) - 1]
                row["gain_95"] = float(t * np.std(gains, ddof=1) / np.sqrt(len(gains)))
        first = runs[0] if runs else {}
        row["parameters"], macs = first.get("deployed_parameters"), first.get("macs")
        row["mmacs"] = macs and macs / 1e6
        row["int8_ms"] = latencies.get(_network(first)) if first else None
        row["hours"] = sum(run["seconds"] for run in runs) / 3600
        rows.append(row)
    return rows


def _score(run: Row | None) -> float:
    assert run is not None
    return float(run["accuracy"].get("test", run["accuracy"]["validation"])["top1"])


def _network(run: Row) -> str:
    """Name what decides a run's latency."""
    form = "-post-norm" if run["arm"].get("post_norm") else ""
    return f"{run['network']}{form}-{run['size']}px-{run['classes']}"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return heading and cells for people; columns in which nothing stands are left out."""
    cells = []
    for row in rows:
        guides = f"{row['strategy']}: {', '.join(row['teachers'])}" if row["teachers"] else ""
        cells.append(
            {
                "arm": row["arm"],
                "network": row["model"],
                "data": row["data"],
                "teachers": guides,
                "epochs": str(row["epochs"]),
                "validation": _spread(row["validation"], row["validation_sd"]) or "not run",
                "test": _spread(row["test"], row["test_sd"]),
                "published": _spread(row["published"], None),
                "seeds": f"{row['seeds']} of {row['seeds_wanted']}",
                "gain": ""
                if row["gain"] is None
                else f"{_spread(row['gain'], row['gain_95'], '+')} on {row['against']}",
                "parameters": "" if row["parameters"] is None else f"{row['parameters']:,}",
                "MMACs": "" if row["mmacs"] is None else f"{row['mmacs']:.1f}",
                "int8 ms": "" if row["int8_ms"] is None else f"{row['int8_ms']:.3f}",
            }
        )
    heading = [name for name in cells[0] if any(line[name] for line in cells)]
    return heading, [[line[name] for name in heading] for line in cells]


def _spread(value: float | None, spread: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def caption(rows: Sequence[Row], settings: Sequence[str] = ()) -> list[str]:
    """Return the sentences that the table needs beside it."""
    lines = [
        "Top-1 in percent, mean ± standard deviation over the seeds that are done; the epoch is chosen "
        "on validation images, and test images are read once, at the end of each run."
    ]
    if any(row["gain"] is not None for row in rows):
        lines.append("gain: mean difference of equal seeds ± half its 95% t-interval.")
    missing = [row["arm"] for row in rows if not row["seeds"]]
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    if settings:
        lines.append(f"Not the study as its file has it: changed by --set {', '.join(settings)}.")
    return lines


def _write(
    rows: list[Row],
    results: dict[tuple[str, int], Row | None],
    settings: Sequence[str],
    output: Path,
) -> None:
    runs = {f"{name}, seed {seed}": run for (name, seed), run in results.items() if run}
    stored = {"changed": list(settings), "arms": rows, "runs": runs}
    atomic_write(output / "results.json", json.dumps(stored, indent=1))
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows({**row, "teachers": " ".join(row["teachers"])} for row in rows)
    atomic_write(output / "results.csv", text.getvalue())
    devices = sorted({run["device"] for run in runs.values()})
    spent = f"{sum(row['hours'] for row in rows):.3g} hours of training on {', '.join(devices)}."
    atomic_write(
        output / "results.md",
        f"{markdown.table(*table(rows))}\n"
        + "".join(f"\n{line}\n" for line in (*caption(rows, settings), spent if runs else "")),
    )


def _stored(file: Path) -> Row:
    """Return what a .json file of a study holds; nothing where it is missing or damaged."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw accuracy against what a net costs, a line of pictures for each data set.

    Returns False where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    costs = {"parameters": "deployed parameters", "mmacs": "MMACs", "int8_ms": "int8 latency, ms"}
    costs = {key: text for key, text in costs.items() if any(row[key] for row in rows)}
    done = [row for row in rows if row["seeds"]]
    sets = list(dict.fromkeys(row["data"] for row in done))
    figure = Figure((5 * len(costs) + 3, 5 * len(sets)), dpi=120, layout="constrained")
    grid = figure.subplots(len(sets), len(costs), squeeze=False)
    for line, data in zip(grid, sets, strict=True):
        shown = [row for row in done if row["data"] == data]
        for axes, (key, text) in zip(line, costs.items(), strict=True):
            for index, row in enumerate(shown):
                part = "validation" if row["test"] is None else "test"
                if row[key]:
                    axes.errorbar(
                        row[key],
                        row[part],
                        yerr=row[f"{part}_sd"],
                        fmt="osD^vPX*"[index // 10 % 8],
                        color=f"C{index % 10}",
                        label=row["arm"],
                        capsize=3,
                    )
            axes.set_xscale("log")
            axes.set_xlabel(text)
            axes.set_ylabel("top-1 on {}, %".format(data.replace("$", r"\$")))
            axes.grid(alpha=0.3)
        line[0].legend(fontsize=7, loc="center right", bbox_to_anchor=(-0.2, 0.5))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return True


def _whole(result: Row) -> bool:
    """Return whether a run's result.json has everything that is read of it."""
    try:
        tops = [
            part["top1"]
            for part in (result["accuracy"]["validation"], *result["accuracy"].values())
        ]
        figures = [*tops, *(result[key] for key in ("seconds", "deployed_parameters", "macs"))]
        tables = [result[key] for key in ("arm", "inputs", "versions")]
        return (
            all(isinstance(figure, (int, float)) for figure in figures)
            and all(isinstance(table, dict) for table in tables)
            and all(isinstance(result[key], str) for key in ("network", "device"))
            and all(isinstance(result[key], int) for key in ("size", "classes"))
        )
    except (AttributeError, LookupError, TypeError):
        return False


def _known(file: Path) -> dict[str, float]:
    """Return the latencies that a study measured; those that are damaged are measured again."""
    return {name: ms for name, ms in _stored(file).items() if isinstance(ms, (int, float))}


def _latencies(
    jobs: dict[tuple[str, int], Job],
    results: dict[tuple[str, int], Row | None],
    output: Path,
    deadline: float | None,
) -> dict[str, float]:
    """Return the median int8 latency in ms of each network that an arm wants to know it of.

    Weights do not matter to it, so arms with the same network share one export. Raises Paused before
    an export that the deadline has passed.
    """
    wanted: dict[str, Job] = {}
    for key, run in results.items():
        if run is not None and jobs[key].arm.latency:
            wanted.setdefault(_network(run), jobs[key])
    file = output / "latency.json"
    known = _known(file)
    if wanted.keys() <= known.keys():
        return known
    from ghostedge.bundle import is_bundle
    from ghostedge.convert import export
    from ghostedge.latency.timing import bench

    bundles = {network: output / "int8" / network for network in wanted}
    for network, job in wanted.items():
        if not is_bundle(bundles[network]):
            if deadline is not None and time.time() >= deadline:
                raise Paused(
                    f"The time is up before {network} is timed: the same command continues {output}."
                )
            best = job.folder / "best.safetensors"
            # Any drop will do: the net is only timed.
            options: dict[str, Any] = {"int8": True, "format": "tflite", "max_drop": 100.0}
            export(str(best), bundles[network], data=job.data, **options)
    measured = bench([path / "model_int8.tflite" for path in bundles.values()])
    known = {n: row["median"] for n, row in zip(bundles, measured["rows"], strict=True)}
    atomic_write(file, json.dumps(known, indent=1))
    return known
