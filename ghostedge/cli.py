"""The commands. Each checks its flags, calls one function of the package and shows what it gave."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghostedge import __version__
from ghostedge.errors import CheckFailed, GhostEdgeError, needing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghostedge.data.sources import Data, Source

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="A .safetensors, .onnx or .tflite file, a bundle, or shipped weights.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where the result goes.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a torchvision set if needed.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"ghostedge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """From a folder of small images to a verified int8 model on a device."""


def main() -> None:
    """Run the command line. Bad input ends in one sentence and exit code 2, a failed check in 1."""
    table = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written remains
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no valid UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(app(prog_name="ghostedge", standalone_mode=False))
    except CheckFailed as error:
        message, table, code = error.args[0], error.table, error.exit_code
    except GhostEdgeError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        if error.strerror is None:
            raise
        what = "The output" if error.filename is None else error.filename
        message, code = f"{what} cannot be used: {error.strerror}.", 2
    except Exception as error:
        # A wrong flag: the class of the error is Click's, which newer versions of Typer hide.
        if not hasattr(error, "format_message"):
            raise
        message, code = error.format_message(), 2
        if not message:  # the help was shown instead
            sys.exit(code)
        message += f"{'' if message.endswith(('.', '?')) else '.'} Add --help to see what fits."
    print(f"ghostedge: {' '.join(message.split())}", file=sys.stderr)
    if table:
        print(table, file=sys.stderr)
    sys.exit(code)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, the name of shipped weights, or a .onnx file.")
    ],
    int8: Annotated[bool | None, typer.Option("--int8/--no-int8", help="Add int8 models.")] = None,
    half: Annotated[bool | None, typer.Option("--half/--no-half", help="Add fp16 TFLite.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images, a folder or a set, to calibrate and check on."),
    ] = None,
    download: Download = False,
    output: Output = None,
    recipe: Annotated[
        str | None, typer.Option(help="app, web, raspberry-pi, microcontroller, server, or a file.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="onnx or tflite; both by default.")] = None,
    io: Annotated[
        str | None, typer.Option(help="Ends of int8 TFLite: uint8 (default), int8 or float32.")
    ] = None,
    imgsz: Annotated[int | None, typer.Option(help="Height and width of the input.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Of an .onnx file: a text file, one label a line.")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="How an .onnx file reads pixels in 0-1, as in 0.485,0.456,0.406."),
    ] = None,
    std: Annotated[str | None, typer.Option(help="The same, as in 0.229,0.224,0.225.")] = None,
    batch: Annotated[int | None, typer.Option(help="Batch of the TFLite models; 1.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 13 to 20; 17.")] = None,
    calib_samples: Annotated[int | None, typer.Option(help="Images to calibrate on; 500.")] = None,
    check_samples: Annotated[
        int | None, typer.Option(help="Images of each part to check on; 5000.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of top-1 int8 may lose; 0.5.")
    ] = None,
    qat: Annotated[
        int | None, typer.Option(help="Epochs of quantization-aware training, if all else fails.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every choice of images; 0.")] = None,
    camera: Annotated[
        int | None, typer.Option(help="Add an int8 TFLite model of this frame size, as in 224.")
    ] = None,
    author: Annotated[str | None, typer.Option(help="Recorded in the models.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print the plan; data and sizes are not looked at."),
    ] = False,
) -> None:
    """Fold, convert, quantize and check a checkpoint or an .onnx file; write a bundle."""
    given: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "recipe", "dry_run")
    }
    from ghostedge.bundle import TIMINGS, read_labels
    from ghostedge.checkpoint import find
    from ghostedge.convert.plan import make_plan

    given |= {
        "labels": None if labels is None else read_labels(labels),
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
    }
    plan = make_plan(model, recipe, given)
    find(model)
    if dry_run:
        for line in plan.describe():
            print(line)
        return
    from ghostedge.convert.pipeline import run
    from ghostedge.convert.report import attempts_table, calibration_line, stage_tables

    bundle = run(plan, lambda line: print(f"- {line}", file=sys.stderr))
    for table in stage_tables(bundle.manifest):
        _table(*table)
    timings = json.loads((bundle.path / TIMINGS).read_text("utf-8"))
    tried = attempts_table(bundle.manifest, timings)
    if tried:
        _table("What was tried", *tried)
    print(calibration_line(bundle.manifest))
    print(f"Wrote {bundle.path}: {', '.join(bundle.manifest['artefacts'])}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that export or deploy wrote.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Of a deployed folder: its bundle, where that has moved.")
    ] = None,
) -> None:
    """Prove that a bundle is unchanged and computes here what it did where it was made.

    Of a folder that deploy wrote: that its models and contract are unchanged, and its bundle's.
    """
    from ghostedge.bundle import verify as prove
    from ghostedge.deploy import is_deployed, verify_deployed

    if is_deployed(folder):
        found = verify_deployed(folder, bundle)
        print(f"{folder}: models and contract are as `deploy {found.target}` wrote them.")
        if found.yours:
            print(f"Changed by you: {', '.join(found.yours)}")
        if found.bundle is None:
            print(f"The bundle {found.name} is not where it was; --bundle names its new place.")
        else:
            print(f"They are those of {found.bundle}.")
        return
    if bundle is not None:
        raise GhostEdgeError(f"--bundle is for a deployed folder, and {folder} is none.")
    result = prove(folder)
    rows = [
        [
            row.artefact,
            row.kernels,
            f"{row.exact:.2%}",
            f"{row.difference:.2g} {row.unit}",
            f"{row.tolerance:g}",
            "ok" if row.ok else "DIFFERS",
        ]
        for row in result.rows
    ]
    title = f"{folder}: {result.rows[0].images} golden images"
    _table(title, ["model", "kernels", "exact", "largest difference", "allowed", ""], rows)
    for name, reason in result.skipped:
        print(f"{name} was not run: {reason}")
    if result.failure:
        raise CheckFailed(result.failure)


@app.command()
def deploy(
    target: Annotated[str | None, typer.Argument(help="Where to; --list shows all.")] = None,
    bundle: Annotated[Path | None, typer.Argument(help="A folder that export wrote.")] = None,
    output: Output = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files you changed.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show the targets.")] = False,
) -> None:
    """Put a bundle into a working starting point for a phone, a board or a server."""
    from ghostedge.deploy import TARGETS
    from ghostedge.deploy import deploy as write

    if list_:
        rows = [
            [name, found.summary, ", ".join(need.artefact for need in found.needs)]
            for name, found in TARGETS.items()
        ]
        _table("Targets; deploy/README.md is the guide", ["target", "what it is", "needs"], rows)
        return
    if target is None or bundle is None:
        raise GhostEdgeError(
            "Name a target and a bundle, as in: ghostedge deploy server BUNDLE; --list shows the targets."
        )
    made = write(target, bundle, output, force=force, say=print)
    print(f"Wrote {made}: begin with {made / 'README.md'}")


@app.command()
def predict(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    top: Annotated[int, typer.Option(min=1, help="Labels to show.")] = 5,
) -> None:
    """Name what is in pictures."""
    from ghostedge.runtime import Classifier

    classifier = Classifier(model)
    for image, found in zip(images, classifier.predict(images, top=top), strict=True):
        print(f"{image}: " + ", ".join(f"{label} {share:.1%}" for label, share in found))


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="A folder of labelled images, or a set by name.")],
    part: Annotated[
        str | None, typer.Option(help="test, val or train; by default the first there is.")
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Picture of the confusion matrix, a .png file.")
    ] = None,
    threads: Threads = 1,
    download: Download = False,
) -> None:
    """Measure top-1 accuracy, also by class."""
    from ghostedge.data.sources import open_data
    from ghostedge.evaluate import evaluate as measure
    from ghostedge.evaluate import save_confusion
    from ghostedge.runtime import Classifier

    source = _choose_part(open_data(data, download=download), part)
    classifier = Classifier(model, threads=threads)
    result = measure(classifier, source.read(classifier.size), source.classes)
    low, high = result.interval
    rows = [[label, f"{share:.2%}"] for label, share in result.per_class.items()]
    _table(f"{source.name}, {len(result)} images", ["class", "top-1"], rows)
    if result.skipped:
        name, reason = result.skipped[0]
        print(f"Skipped {len(result.skipped)} files, the first: {name}: {reason}")
    print(f"top-1 {result.top1:.2%} (95%: {low:.2%} to {high:.2%})")
    if confusion is not None:
        save_confusion(result, confusion)
        print(f"Wrote {confusion}")


def _choose_part(data: Data, part: str | None) -> Source:
    parts = {"test": data.test, "val": data.val, "train": data.train}
    if part is not None and part not in parts:
        raise GhostEdgeError(f"--part {part!r} is unknown: choose test, val or train.")
    for name, source in parts.items():
        if source is not None and part in (None, name):
            if part is None and name == "train":
                print("These are training images: put others into test/ for an honest figure.")
            return source
    raise GhostEdgeError(f"{data.name} has no {part} part.")


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models, bundles or shipped weights.")],
    on: Annotated[
        list[str] | None, typer.Option(help="A board's ssh name; repeat it for several.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="What to compare with; by default the first model.")
    ] = None,
    threads: Annotated[str, typer.Option(help="Numbers of CPU threads, as in 1,2.")] = "1",
    runtime: Annotated[
        str | None, typer.Option(help="Only these, of litert,onnxruntime,torch.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Rounds; each times every model once.")] = 200,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also where the time goes, of files on this CPU.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .json, .csv, .md or .html file.")
    ] = None,
) -> None:
    """Time models side by side, on this CPU or on boards over ssh."""
    from ghostedge.latency import results
    from ghostedge.latency.profile import add_profiles
    from ghostedge.latency.timing import bench as measure

    try:
        counts = [int(count) for count in threads.split(",")]
    except ValueError as error:
        raise GhostEdgeError(f"--threads {threads!r} is no list of numbers such as 1,2.") from error
    if output is not None:
        results.writer(output)
    if profile and on:
        raise GhostEdgeError("--profile is of files on this CPU: leave out --on or --profile.")
    found, failures, stopped = [], [], False
    hosts: list[str | None] = [*on] if on else [None]
    for host in hosts:
        try:
            result = measure(
                models,
                on=host,
                against=against or (),
                runtimes=None if runtime is None else runtime.split(","),
                threads=counts,
                runs=runs,
                say=lambda line: print(f"- {line}", file=sys.stderr),
            )
        except GhostEdgeError as error:
            failures.append(error)
            continue
        except KeyboardInterrupt:
            print(f"\nStopped; nothing is left on {host or 'this machine'}.", file=sys.stderr)
            stopped = True
            break
        found.append(result)
    if profile and found and not stopped:
        try:
            add_profiles(found[0])
        except GhostEdgeError as error:
            failures.append(error)
    if found:
        for table in results.tables(found):
            _table(*table)
        for warning in (line for result in found for line in result["warnings"]):
            print(warning)
        if output is not None:
            results.write(found, output)
            print(f"Wrote {output}")
    if stopped:
        sys.exit(130)
    if failures:
        raise GhostEdgeError(" ".join(map(str, failures)))


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="JSON files of `ghostedge bench`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .json, .csv, .md or .html file.")
    ] = None,
) -> None:
    """Put results of several models and machines side by side."""
    from ghostedge.latency import results

    found = [result for file in files for result in results.read(file)]
    for table in results.tables(found):
        _table(*table)
    if output is not None:
        results.write(found, output)
        print(f"Wrote {output}")


Dataset = Annotated[
    str, typer.Argument(help="A folder of labelled images, or a set such as cifar10.")
]
Imgsz = Annotated[
    int | None, typer.Option(help="Height and width of the images; 32, or that of --from.")
]
Branches = Annotated[
    int, typer.Option(min=1, help="Parallel branches while training: 1, or the papers' 3.")
]
PostNorm = Annotated[
    bool, typer.Option("--post-norm", help="One BatchNorm after the branches' sum (QARepVGG).")
]
TrainingRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="A .toml file, or paper: GhostNetV3-Small's, whose form is --branches 3."
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="More of the recipe, as in cutout=0.25.")
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the images; 30.")]
BatchSize = Annotated[int | None, typer.Option(help="Images in a step; 128, fewer of small sets.")]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate; 0.1 (AdamW: 0.001).")]
Seed = Annotated[int | None, typer.Option(help="Of weights, order and augmentation; 0.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Compile = Annotated[
    str | None,
    typer.Option(help="off, default, reduce-overhead or max-autotune; off on CPUs by default."),
]
Budget = Annotated[
    str | None, typer.Option(help="Stop after this time, as in 9m; --resume goes on from there.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")]
Licence = Annotated[str | None, typer.Option(help="Recorded with the weights, as in Apache-2.0.")]
From = Annotated[
    str | None, typer.Option("--from", help="Start from a checkpoint or shipped weights.")
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="desktop, pi5, pi4, zero2w, microcontroller, or a .json file of bench --output.",
    ),
]
Within = Annotated[
    float | None, typer.Option(help="Highest cost there, in the unit that `list --for` shows.")
]


@app.command()
def train(
    data: Dataset,
    model: Annotated[
        str | None, typer.Option(help="The network; `ghostedge list` shows all.")
    ] = None,
    width: Annotated[float | None, typer.Option(help="Width multiplier.")] = None,
    branches: Branches = 1,
    post_norm: PostNorm = False,
    from_: From = None,
    for_: For = None,
    within: Within = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from ImageNet weights (a download).")
    ] = False,
    imgsz: Imgsz = None,
    recipe: TrainingRecipe = None,
    settings: Settings = None,
    epochs: Epochs = None,
    batch: BatchSize = None,
    lr: Rate = None,
    seed: Seed = None,
    device: Device = "cpu",
    compile: Compile = None,
    budget: Budget = None,
    output: Output = None,
    resume: Resume = False,
    download: Download = False,
    licence: Licence = None,
) -> None:
    """Train a network on images; Ctrl-C loses at most the epoch under way."""
    if for_ is not None:
        from ghostedge.targets import choose

        if model or width is not None or from_:
            raise GhostEdgeError("--for chooses the weights to start from: leave out the others.")
        chosen, why = choose(for_, within, imgsz or 32)
        from_ = chosen.name
        if _speaks():
            print(why)
    else:
        _refuse_within(within)
    name, started = _student(model, width, from_)
    output = output or Path("runs") / started
    options = {
        "model": name,
        "branches": branches,
        "post_norm": post_norm,
        "from_": from_,
        "pretrained": pretrained,
        "imgsz": imgsz,
        "device": device,
        "compile": compile,
        "budget": _seconds(budget),
        "resume": resume,
        "download": download,
        "licence": licence,
    }
    given = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    _run_training("train", data, output, recipe, settings or [], given, options)


@app.command()
def distill(
    data: Dataset,
    teacher: Annotated[
        list[str],
        typer.Option(
            help="A checkpoint, shipped weights or .onnx file; several: their mean. An .onnx file gets raw "
            "pixels, 0-255: give another one its normalisation by ghostedge export x.onnx --mean ... "
            "--std ... --format onnx."
        ),
    ],
    via: Annotated[
        list[str] | None, typer.Option(help="A network as assistant in between; may be repeated.")
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="kd, ensemble, standardized, dist, dkd, dgkd or amtml.")
    ] = "kd",
    temperature: Annotated[
        float | None, typer.Option(help="Softens logits; the strategy's own.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the labels; the strategy's own.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The student; `ghostedge list` shows all.")
    ] = None,
    width: Annotated[float | None, typer.Option(help="Width multiplier.")] = None,
    branches: Branches = 1,
    post_norm: PostNorm = False,
    from_: From = None,
    imgsz: Imgsz = None,
    recipe: TrainingRecipe = None,
    settings: Settings = None,
    epochs: Epochs = None,
    batch: BatchSize = None,
    lr: Rate = None,
    seed: Seed = None,
    device: Device = "cpu",
    compile: Compile = None,
    budget: Budget = None,
    output: Output = None,
    resume: Resume = False,
    download: Download = False,
    licence: Licence = None,
) -> None:
    """Train a network to follow teachers, directly or through assistants."""
    name, started = _student(model, width, from_)
    output = output or Path("runs") / f"{started}-{strategy}"
    options = {
        "teachers": teacher,
        "via": via or [],
        "strategy": strategy,
        "temperature": temperature,
        "alpha": alpha,
        "model": name,
        "branches": branches,
        "post_norm": post_norm,
        "from_": from_,
        "imgsz": imgsz,
        "device": device,
        "compile": compile,
        "budget": _seconds(budget),
        "resume": resume,
        "download": download,
        "licence": licence,
    }
    given = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    _run_training("distill", data, output, recipe, settings or [], given, options)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A .toml file, as in benchmarks/studies.")],
    output: Output = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change every arm, as in epochs=2, or one: ARM.epochs=2."),
    ] = None,
    device: Device = "cpu",
    budget: Annotated[
        str | None, typer.Option(help="Stop after this time, as in 9h; the same command goes on.")
    ] = None,
    download: Download = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Run the arms through Ray, at RAY_ADDRESS.")
    ] = False,
) -> None:
    """Train every arm of a study with every seed; one table. Started again, it continues."""
    with needing("train"):
        from ghostedge.training import study as studies
    output = output or Path("runs") / file.stem
    try:
        result = studies.study(
            file,
            output,
            settings=settings or [],
            device=device,
            budget=_seconds(budget),
            download=download,
            cluster=cluster,
            say=lambda line: print(f"- {line}", file=sys.stderr),
        )
    except KeyboardInterrupt:
        print(f"\nStopped. The same command continues {output}.", file=sys.stderr)
        sys.exit(130)
    _table(str(file), *studies.table(result.rows))
    for line in studies.caption(result.rows, settings or []):
        print(line)
    print(f"Wrote {output / 'results.md'}")
    studies.require_done(result, output)


def _student(model: str | None, width: float | None, from_: str | None) -> tuple[str | None, str]:
    """Return the network to make, None for that of `from_`, and what to name the run after."""
    if from_ and width is not None:
        raise GhostEdgeError("--from has its width: leave out --width.")
    if from_ and not model:
        return None, Path(from_).name.removesuffix(".safetensors")
    name = model or "ghostnetv3-small"
    name = name if width is None else f"{name}-{width}x"
    return name, name


def _seconds(text: str | None) -> float | None:
    """Return the seconds that 90, 90s, 9m or 2h stand for."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise GhostEdgeError(f"--budget {text!r} is no time: write 90s, 9m or 2h.")
    return seconds


def _run_training(
    kind: str,
    data: str,
    output: Path,
    recipe: str | None,
    settings: list[str],
    given: dict[str, Any],
    options: dict[str, Any],
) -> None:
    with needing("train"):
        from ghostedge import training
        from ghostedge.training.recipe import load
    try:
        best = getattr(training, kind)(
            data, output, recipe=load(recipe, settings, **given), **options
        )
    except KeyboardInterrupt:
        hint = "Stopped before the end of the first epoch."
        if any([*output.glob("state.pt"), *output.glob("assistants/*/state.pt")]):
            hint = f"Stopped. The same command with --resume continues {output}."
        print(f"\n{hint}", file=sys.stderr)
        sys.exit(130)
    if _speaks():
        print(f"Wrote {best}")


def _speaks() -> bool:
    """Whether this is the one of torchrun's processes that prints."""
    return os.environ.get("RANK", "0") == "0"


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help="A state_dict: .pth, .pt or .safetensors.")],
    output: Output = None,
    source: Annotated[
        str | None, typer.Option(help="reference, official or timm; found out by default.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of pixels in 0-1, as in 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Of pixels in 0-1, as in 0.25,0.24,0.26.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file, one label a line.")] = None,
    imgsz: Annotated[int | None, typer.Option(help="Height and width of its images.")] = None,
) -> None:
    """Turn a checkpoint of the reference code, the official code or timm into one of ours."""
    from ghostedge.bundle import read_labels
    from ghostedge.checkpoint import save

    with needing("export"):
        from ghostedge.models.foreign import import_checkpoint
    checkpoint, tensors = import_checkpoint(
        file,
        source=source,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        labels=None if labels is None else read_labels(labels),
        size=imgsz,
    )
    output = output or Path(f"{file.stem}.ghostedge.safetensors")
    save(output, checkpoint, tensors)
    print(f"Wrote {output}: {checkpoint.name}, {len(checkpoint.labels)} classes")


def _numbers(flag: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise GhostEdgeError(
            f"{flag} {text!r} is no list of numbers such as 0.5,0.5,0.5."
        ) from error


@app.command()
def info(model: Model) -> None:
    """Show what a checkpoint, a model file or a bundle holds."""
    path = Path(model)
    if path.is_dir():
        from ghostedge.bundle import read_manifest

        facts = read_manifest(path)
    elif path.suffix in (".tflite", ".onnx"):
        from ghostedge.runtime import Classifier

        found = Classifier(path)
        facts = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "runtime": found.runtime,
            "precision": found.precision,
            "size": found.size,
            "labels": found.labels,
            "output_step": found.step,
        }
        # What is inside is told where the export extra is installed; a board lacks it.
        with contextlib.suppress(GhostEdgeError):
            from ghostedge.convert.audit import audit

            inside = audit(path)
            del inside["weights"]["layers"]
            facts |= {"precision": inside.pop("precision"), "audit": inside}
    else:
        from ghostedge.checkpoint import read

        checkpoint, tensors = read(model)
        facts = checkpoint.to_json()
        facts["tensors"] = len(tensors)
        facts["values"] = sum(t.size for t in tensors.values())
    print(json.dumps(facts, indent=1))


@app.command(name="list")
def list_(
    imgsz: Annotated[int, typer.Option(help="Image size of MACs and costs.")] = 32,
    for_: For = None,
    within: Within = None,
) -> None:
    """List the networks, their sizes, and which weights are shipped; --for ranks these on a target."""
    if for_ is not None:
        _list_for(for_, within, imgsz)
        return
    _refuse_within(within)
    from ghostedge.checkpoint import read, shipped
    from ghostedge.pixels import PixelContract

    with needing("export"):
        from ghostedge.models import NETWORKS, create, profile, sizes
    PixelContract(imgsz)
    weights = shipped()
    rows = []
    for full, name, width in sizes():
        arguments = {} if width is None else {"width": width}
        classes = 1000 if name.endswith("imagenet") else 10
        counts = profile(create(name, num_classes=classes, **arguments), imgsz)
        card = _accuracy_line(read(weights[full])[0].accuracy) if full in weights else ""
        rows.append(
            [
                full,
                f"{counts.training_parameters:,}",
                f"{counts.deployed_parameters:,}",
                f"{counts.macs / 1e6:.1f}",
                card,
            ]
        )
    heading = [
        "network",
        "parameters, all branches",
        "deployed",
        f"MMACs at {imgsz}",
        "shipped weights",
    ]
    _table("Networks; where there is a width, any other can be named too", heading, rows)
    print("What each is, and the teachers:")
    for name, entry in NETWORKS.items():
        print(f"  {name}: {entry.summary}")


def _refuse_within(within: float | None) -> None:
    if within is not None:
        raise GhostEdgeError("--within is a cost on a target: name it with --for.")


def _list_for(target: str, within: float | None, imgsz: int) -> None:
    from ghostedge.targets import rank

    found = rank(target, within=within, imgsz=imgsz)
    rows = [
        [
            choice.name,
            f"{choice.top1:.2f}",
            f"{choice.cost:.3g}",
            f"{choice.size:.0f}",
            "*" if choice.best else "",
        ]
        for choice in found.choices
    ]
    heading = ["weights", "top-1 %", f"cost, {found.unit}", "int8 kB", "none better for less"]
    _table(f"For {target}", heading, rows)
    for line in found.sources:
        print(line)


def _accuracy_line(accuracy: dict[str, Any]) -> str:
    parts = {part: figures["top1"] for part, figures in accuracy.items() if "top1" in figures}
    return ", ".join(f"{part} {top1:.2f}%" for part, top1 in parts.items()) or "yes"


@app.command()
def doctor() -> None:
    """Show what is installed, what is missing, and how to get it."""
    from ghostedge.doctor import examine

    heading, rows, advice = examine()
    _table("What is here", heading, rows)
    for line in advice:
        print(line)


def _table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Piped into a file, a table is not folded to 80 columns.
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)


if __name__ == "__main__":
    main()
