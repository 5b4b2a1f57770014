"""Candidates for a net of our own: what they cost on each target, and how good some of them get.

    python benchmarks/targets/search.py FOLDER [models] [instructions] [arena] [latency]
    python benchmarks/targets/search.py FOLDER train EPOCHS DATA CANDIDATE...

prints the table of README.md and keeps it as search.json; FOLDER keeps the models. Steps are those of
costs.py. candidates.csv has the candidates, a line each: stem (width, stride), ends and blocks, such as
`i3 96>32 /2 se` (kind, kernel, mid > out, stride, squeeze-excitation). What a cost cannot say is
accuracy: `train` gives the candidates that are named the recipe and seeds of benchmarks/studies/targets.toml
(whose epochs are 10), goes on where it was stopped, and keeps the best validation accuracy.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from costs import (
    BASE,
    arena,
    convert,
    describe,
    emulator,
    fixed_statistics,
    instructions,
    same,
    x86,
)
from torch import Tensor, nn

from ghostedge import checkpoint, markdown
from ghostedge.data.sources import open_data
from ghostedge.files import atomic_write
from ghostedge.models import TEACHERS, Architecture, create, profile
from ghostedge.models.ghostnetv3 import GhostModule
from ghostedge.models.layers import SqueezeExcite, channels, kaiming
from ghostedge.models.reparam import RepConv
from ghostedge.training.loop import train
from ghostedge.training.study import load

CANDIDATES = Path(__file__).with_name("candidates.csv")
RESULTS = Path(__file__).with_name("search.json")
IMAGES = "081fd32c"
"""The start of the hash of the training images of JPEG CIFAR-10."""
STEPS = ("models", "instructions", "arena", "latency")
STUDY = Path(__file__).parents[1] / "studies" / "targets.toml"


class Row(NamedTuple):
    """One block: c, one dense conv; b, two dense convs and a shortcut; f, a dense conv that expands
    and a 1x1 conv that projects; i, a 1x1 conv that expands, a depthwise conv and one that projects;
    s, the same with GhostNetV3's shortcut wherever shapes differ; g, ghost modules for the 1x1 convs;
    a, those with its gate too."""

    kind: str
    kernel: int
    mid: int
    out: int
    se: float
    stride: int


class Dense(nn.Module):
    def __init__(self, cin: int, row: Row) -> None:
        super().__init__()
        self.conv = RepConv(cin, row.out, (row.kernel, row.kernel), row.stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Basic(nn.Module):
    def __init__(self, cin: int, row: Row) -> None:
        super().__init__()
        self.first = RepConv(cin, row.mid, (row.kernel, row.kernel), row.stride)
        self.second = RepConv(row.mid, row.out, (row.kernel, row.kernel))
        same = cin == row.out and row.stride == 1
        self.shortcut = nn.Identity() if same else RepConv(cin, row.out, (1, 1), row.stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Inverted(nn.Module):
    def __init__(self, cin: int, row: Row) -> None:
        super().__init__()
        kernel, ghost = (row.kernel, row.kernel), row.kind in "ga"
        self.convs = nn.Sequential()
        if ghost:
            self.convs.append(GhostModule(cin, row.mid, relu=True, gate=row.kind == "a"))
        elif row.kind != "f":
            self.convs.extend([RepConv(cin, row.mid), nn.ReLU()])
        wide, groups = (cin, 1) if row.kind == "f" else (row.mid, row.mid)
        self.convs.extend([RepConv(wide, row.mid, kernel, row.stride, groups), nn.ReLU()])
        hidden = channels(row.mid * row.se)
        self.se = SqueezeExcite(row.mid, hidden) if row.se else nn.Identity()
        self.project = (
            GhostModule(row.mid, row.out, relu=False) if ghost else RepConv(row.mid, row.out)
        )
        self.shortcut: nn.Module | None = None
        if cin == row.out and row.stride == 1:
            self.shortcut = nn.Identity()
        elif row.kind == "s":
            depthwise = RepConv(cin, cin, kernel, row.stride, cin)
            self.shortcut = nn.Sequential(depthwise, RepConv(cin, row.out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.convs(x)))
        return y if self.shortcut is None else y + self.shortcut(x)


KINDS = {"c": Dense, "b": Basic, **dict.fromkeys("fisga", Inverted)}


class Candidate(nn.Module):
    """A net of `rows`; `last`: width of a 1x1 conv before pooling; `head`: of a layer after it."""

    def __init__(
        self,
        rows: str,
        stem: tuple[int, int] = (16, 1),
        last: int = 256,
        head: int = 0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        cin = stem[0]
        self.stem = RepConv(3, cin, (3, 3), stem[1])
        blocks = []
        for row in parsed(rows):
            blocks.append(KINDS[row.kind](cin, row))
            cin = row.out
        self.blocks = nn.Sequential(*blocks)
        self.last = RepConv(cin, last) if last else None
        cin = last or cin
        self.head = nn.Conv2d(cin, head, 1) if head else None
        self.classifier = nn.Linear(head or cin, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        if self.last is not None:
            x = F.relu(self.last(x))
        x = F.adaptive_avg_pool2d(x, 1)
        if self.head is not None:
            x = F.relu(self.head(x))
        return self.classifier(x.flatten(1))


def parsed(text: str) -> list[Row]:
    """Read the blocks of a candidate."""
    found = []
    for part in text.split(","):
        kind, widths, *rest = part.split()
        mid, out = widths.split(">")
        se, stride = 0.25 if "se" in rest else 0.0, 2 if "/2" in rest else 1
        found.append(Row(kind[0], int(kind[1:]), int(mid or 0), int(out), se, stride))
    return found


class Entry(NamedTuple):
    """A line of candidates.csv: what a `Candidate` is made of, and what it tries."""

    arguments: dict[str, Any]
    tries: str


@functools.cache
def entries() -> dict[str, Entry]:
    """Read candidates.csv: the stem's channels and stride, the ends, and blocks in full."""
    found = {}
    with CANDIDATES.open(newline="") as file:
        for line in csv.DictReader(file):
            width, *stride = line["stem"].split(" /")
            arguments = {
                "rows": line["blocks"],
                "stem": (int(width), int(*stride or [1])),
                "last": int(line["last"]),
                "head": int(line["head"] or 0),
            }
            found[line["candidate"]] = Entry(arguments, line["what it tries"])
    return found


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fixed_statistics(Candidate(**entries()[name].arguments))


def form(name: str) -> str:
    """Return a hash of what a candidate is made of."""
    return hashlib.sha256(repr(entries()[name].arguments).encode()).hexdigest()[:8]


def place(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_").replace(",", "").replace("/", "s")


def stored() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def note(name: str, **figures: Any) -> dict[str, Any]:
    """Add to a candidate's row of the table, and return it; other steps may run at once."""
    table = stored()
    row = table.get(name, {})
    if row.get("form") != form(name):  # another candidate had that name
        row = {"form": form(name)}
    elif "macs" in figures and not same(row, figures):  # what another model cost does not hold
        row = {key: row[key] for key in ("form", "validation") if key in row}
    table[name] = {**row, **figures}
    atomic_write(RESULTS, json.dumps(table, indent=1) + "\n")
    return table[name]


def train_some(folder: Path, epochs: str, data: str, *names: str) -> None:
    arm = load(STUDY)["densestride-1.0x"]
    if unknown := set(names) - entries().keys():
        raise SystemExit(f"No candidates: {', '.join(unknown)}")
    images = open_data(data).train
    if images is None or not images.fingerprint.startswith(IMAGES):
        raise SystemExit(f"{data} is not JPEG CIFAR-10, whose accuracies {RESULTS.name} has.")
    precision = "" if arm.recipe.precision == "auto" else f" {arm.recipe.precision}"
    for seed in range(arm.seeds):
        for name in names:
            # Beside the teachers, which need no calibration images at the end.
            made = functools.partial(Candidate, **entries()[name].arguments)
            TEACHERS["candidate"] = Architecture(made, name)
            run = place(folder, name) / f"{epochs}-epochs-{form(name)}" / f"seed-{seed}"
            going = (run / "state.pt").exists()
            recipe = dataclasses.replace(arm.recipe, seed=seed, epochs=int(epochs))
            best = train(data, run, model="candidate", recipe=recipe, resume=going)
            top1 = checkpoint.read(best)[0].accuracy["validation"]["top1"]
            known = note(name).get("validation", {})
            known.setdefault(f"{epochs}{precision}", {})[str(seed)] = top1
            note(name, validation=known)


def main(folder: Path, *steps: str) -> None:
    if steps[:1] == ("train",):
        train_some(folder, *steps[1:])
        return
    steps, files = steps or STEPS, {}
    for name in entries():
        file = place(folder, name) / form(name) / "model_int8.tflite"
        if "models" in steps and not file.exists():
            convert(build(name), 32, file.parent)
        if not file.exists():
            continue
        files[name] = file
        net = build(name)
        parameters = profile(net, 32).deployed_parameters
        row = note(name, **describe(file, net, 32), parameters=parameters)
        if "instructions" in steps and "instructions" not in row:
            note(name, instructions=instructions(file, 32))
        if "arena" in steps and "arena" not in row:
            note(name, arena=arena(file.with_name("model_int8_io.tflite")))
    if "latency" in steps:
        latency(folder, files)
    print(shown(stored()))


def latency(folder: Path, files: dict[str, Path]) -> None:
    """Time all candidates in one bench."""
    base = folder / BASE / "model_int8.tflite"
    if not base.exists():
        convert(fixed_statistics(create("ghostnetv3-small", branches=1)), 32, base.parent)
    names = {file: name for name, file in files.items()}
    for file, ratio in x86([*names], base).items():
        note(names[file], x86=ratio)


def shown(table: dict[str, Any]) -> str:
    heads = ["candidate", "parameters", "MMACs", "x86", "A53", "A72", "A76", "TFLM kB"]
    heads += ["10 epochs", "30 epochs", "what it tries"]
    rows = []
    for name, entry in entries().items():
        row = table.get(name, {})
        if "parameters" not in row:  # trained alone, so far
            continue
        counts = row.get("instructions", {})
        cells = [
            name,
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.1f}",
            f"{row['x86']:.2f}" if "x86" in row else "-",
            *(f"{counts[cpu] / 1e6:.2f}" if cpu in counts else "-" for cpu in emulator.BOARDS),
            f"{row['arena'] / 1e3:.0f}" if "arena" in row else "-",
        ]
        for epochs in ("10", "30"):
            known = row.get("validation", {})
            runs = [(known.get(epochs + kind, {}), kind) for kind in ("", " bf16")]
            cells.append(
                ", ".join(f"{top1:.1f}{k}" for seeds, k in runs for top1 in seeds.values())
            )
        rows.append([*cells, entry.tries])
    return markdown.table(heads, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
