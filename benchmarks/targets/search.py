"""Candidates for a net of our own: what they cost on each target, and how good some of them get.

    python benchmarks/targets/search.py FOLDER [models] [instructions] [latency]
    python benchmarks/targets/search.py FOLDER train EPOCHS DATA CANDIDATE...

prints the table of README.md and keeps it as search.json; FOLDER keeps the models. Steps are those of
costs.py. A candidate is its stem (width, stride), its blocks and its ends. What a cost cannot say is
accuracy: `train` gives the candidates that are named the recipe and seeds of benchmarks/studies/targets.toml
(whose epochs are 10), goes on where it was stopped, and keeps the best validation accuracy.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from costs import BASE, RUNS, convert, describe, fixed_statistics, instructions
from torch import Tensor, nn

from ghostedge import checkpoint
from ghostedge.files import atomic_file, sha256
from ghostedge.latency.timing import bench
from ghostedge.models import TEACHERS, Architecture, create, profile
from ghostedge.models.layers import SqueezeExcite, channels, kaiming
from ghostedge.models.reparam import RepConv
from ghostedge.training.loop import train
from ghostedge.training.study import load

RESULTS = Path(__file__).with_name("search.json")
STEPS = ("models", "instructions", "latency")
STUDY = Path(__file__).parents[1] / "studies" / "targets.toml"


class Row(NamedTuple):
    """One block: c, one dense conv; b, two dense convs and a shortcut; f, a dense conv that expands
    and a 1x1 conv that projects; i, a 1x1 conv that expands, a depthwise conv and one that projects;
    s, the same with GhostNetV3's shortcut wherever shapes differ."""

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
        kernel = (row.kernel, row.kernel)
        if row.kind == "f":
            convs = [RepConv(cin, row.mid, kernel, row.stride)]
        else:
            convs = [RepConv(cin, row.mid), RepConv(row.mid, row.mid, kernel, row.stride, row.mid)]
        self.convs = nn.ModuleList(convs)
        hidden = channels(row.mid * row.se)
        self.se = SqueezeExcite(row.mid, hidden) if row.se else nn.Identity()
        self.project = RepConv(row.mid, row.out)
        self.shortcut: nn.Module | None = None
        if cin == row.out and row.stride == 1:
            self.shortcut = nn.Identity()
        elif row.kind == "s":
            depthwise = RepConv(cin, cin, kernel, row.stride, cin)
            self.shortcut = nn.Sequential(depthwise, RepConv(cin, row.out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = F.relu(conv(y))
        y = self.project(self.se(y))
        return y if self.shortcut is None else y + self.shortcut(x)


KINDS = {"c": Dense, "b": Basic, "f": Inverted, "i": Inverted, "s": Inverted}


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
    """Read blocks such as `i3 96>32 /2 se`: kind, kernel, mid > out, stride, squeeze-excitation."""
    found = []
    for part in text.split(","):
        kind, widths, *rest = part.split()
        mid, out = widths.split(">")
        se, stride = 0.25 if "se" in rest else 0.0, 2 if "/2" in rest else 1
        found.append(Row(kind[0], int(kind[1:]), int(mid or 0), int(out), se, stride))
    return found


SKETCH = "s3 32>32 /2, s3 64>32, s3 96>48 /2 se, s3 144>48, s3 192>80 se, s3 160>80 se"
LATE = "i3 96>64 /2, i3 128>64, i3 128>64, i3 192>96 /2, i3 288>96"
LATE_SE = LATE.replace("192>96 /2", "192>96 /2 se").replace("288>96", "288>96 se")
STRIDES = "c3 >32 /2, i3 64>32, c3 >64 /2, i3 128>64, i3 128>64, c3 >96 /2, i3 288>96"
DENSE = "c3 >32 /2, i3 64>32, c3 >64 /2, b3 24>64, c3 >96 /2, b3 64>96, i3 288>96 se"


def wide(width: int, thinner: int = 1) -> str:
    """Return a dense stride and a dense residual block, so much thinner inside, at each of three sizes."""
    widths = (width, 2 * width, 4 * width)
    return ", ".join(f"c3 >{n} /2, b3 {n // thinner}>{n}" for n in widths)


CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "sketch": (
        "the first sketch, trained once",
        {"stem": (24, 1), "rows": SKETCH, "last": 160, "head": 1280},
    ),
    "sketch, no head": ("", {"stem": (24, 1), "rows": SKETCH}),
    "sketch, no SE": (
        "",
        {"stem": (24, 1), "rows": SKETCH.replace(" se", ""), "last": 160, "head": 1280},
    ),
    "sketch, plain": (
        "no projected shortcut, SE or head",
        {"stem": (24, 1), "rows": SKETCH.replace(" se", "").replace("s3", "i3")},
    ),
    "fused": (
        "the first stride in a fused block",
        {"rows": "f3 48>32 /2, i3 96>32, i3 96>48 /2, i3 144>48, i3 192>80, i3 240>80"},
    ),
    "dense": (
        "all of 16x16 dense",
        {"rows": "c3 >32 /2, b3 32>32, c3 >64 /2, i3 192>64, i3 192>64, i3 192>96"},
    ),
    "inverted": (
        "inverted throughout",
        {
            "stem": (24, 1),
            "rows": "i3 48>32 /2, i3 96>32, i3 96>32, i3 128>64 /2, i3 192>64, i3 192>64, i3 256>64",
        },
    ),
    "inverted, 5x5": (
        "5x5 at 8x8",
        {
            "stem": (24, 1),
            "rows": "i3 48>32 /2, i3 96>32, i3 96>32, i5 128>64 /2, i5 192>64, i5 192>64, i5 256>64",
        },
    ),
    "D": ("A, every stride a dense conv", {"rows": STRIDES}),
    "D, SE": (
        "SE at 4x4",
        {"rows": STRIDES.replace("288>96", "288>96 se")},
    ),
    "D, dense 16x16": (
        "a dense residual block at 16x16",
        {"rows": STRIDES.replace("i3 64>32", "b3 24>32")},
    ),
    "D, deep": (
        "more of 4x4, less of 8x8",
        {
            "rows": "c3 >32 /2, i3 64>32, c3 >64 /2, i3 128>64, c3 >96 /2, i3 288>96 se, i3 288>96 se"
        },
    ),
    "D, 5x5": (
        "5x5 at 8x8 and 4x4",
        {"rows": STRIDES.replace("i3 128", "i5 128").replace("i3 288", "i5 288")},
    ),
    "E": (
        "D, SE with two blocks at 4x4",
        {"rows": f"{STRIDES}, i3 288>96".replace("288>96", "288>96 se")},
    ),
    "E, wide": (
        "128 channels at 4x4",
        {"rows": f"{STRIDES}, i3 288>96".replace(">96", ">128").replace("288>128", "256>128 se")},
    ),
    "E, SE": (
        "SE at 8x8 too",
        {
            "rows": f"{STRIDES}, i3 288>96".replace("288>96", "288>96 se").replace(
                "128>64", "128>64 se"
            ),
        },
    ),
    "E, 16x16": (
        "two blocks at 16x16",
        {
            "rows": STRIDES.replace("i3 64>32", "i3 64>32, i3 64>32").replace(
                "288>96", "288>96 se"
            ),
        },
    ),
    "E, 8x8": (
        "three blocks at 8x8, one at 4x4",
        {"rows": STRIDES.replace("c3 >96", "i3 128>64, c3 >96").replace("288>96", "288>96 se")},
    ),
    "E, dense": (
        "dense residual blocks at 8x8 and 4x4",
        {"rows": DENSE},
    ),
    "E, half": (
        "the same, half as wide inside",
        {"rows": DENSE.replace("24>64", "32>64").replace("64>96", "48>96")},
    ),
    "F": (
        "E, dense with 128 channels at 4x4",
        {"rows": DENSE.replace(">96", ">128").replace("288>", "256>")},
    ),
    "F, SE": (
        "E, dense with an inverted block and SE at 8x8 too",
        {"rows": DENSE.replace("24>64", "24>64, i3 128>64 se")},
    ),
    "F, all dense": (
        "dense at 16x16 too",
        {"rows": DENSE.replace("i3 64>32", "b3 16>32")},
    ),
    "F, two SE": (
        "E, dense with a second inverted block at 4x4",
        {"rows": DENSE.replace("64>96,", "48>96, i3 288>96 se,")},
    ),
    "A": (
        "dense to 16x16, then thin inverted, three stages",
        {"rows": f"c3 >32 /2, i3 64>32, {LATE}", "last": 192},
    ),
    "A, stem 8": (
        "half the stem",
        {"stem": (8, 1), "rows": f"c3 >32 /2, i3 96>32, {LATE}", "last": 192},
    ),
    "A, stem /2": (
        "the first stride in the stem",
        {"stem": (32, 2), "rows": f"i3 96>32, i3 96>32, {LATE}", "last": 192},
    ),
    "A, 24": (
        "24 channels at 16x16",
        {"rows": f"c3 >24 /2, i3 96>24, {LATE}", "last": 192},
    ),
    "A, dense 24": (
        "a dense residual block at 16x16",
        {"rows": f"c3 >24 /2, b3 16>24, {LATE}", "last": 192},
    ),
    "A, SE": (
        "SE in the last two",
        {
            "rows": f"c3 >32 /2, i3 64>32, {LATE_SE}",
            "last": 192,
        },
    ),
    "A, wide": (
        "8x8 wide, no 4x4",
        {
            "rows": "c3 >32 /2, i3 64>32, i3 96>64 /2, i3 128>64, i3 128>64, i3 192>80, i3 160>80",
            "last": 192,
        },
    ),
    "A, two": (
        "8x8 dense stride",
        {
            "rows": "c3 >32 /2, i3 64>32, c3 >64 /2, i3 128>64, i3 128>64, i3 192>96 /2, i3 288>96",
            "last": 192,
        },
    ),
    "A, 5x5": (
        "5x5 at 4x4",
        {
            "rows": f"c3 >32 /2, i3 64>32, {LATE.replace('i3 192', 'i5 192').replace('i3 288', 'i5 288')}",
            "last": 192,
        },
    ),
    "W": (
        "a dense stride and a dense residual block at each size, 48 to 192 channels",
        {"stem": (24, 1), "rows": wide(48)},
    ),
    "W, 32": (
        "the same, 32 to 128 channels",
        {"rows": wide(32)},
    ),
    "W, 24": (
        "the same, 24 to 96 channels",
        {"rows": wide(24)},
    ),
    "W, half": (
        "W, its blocks half as wide inside",
        {"stem": (24, 1), "rows": wide(48, 2)},
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fixed_statistics(Candidate(**CANDIDATES[name][1]))


def place(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_").replace(",", "").replace("/", "s")


def note(name: str, **figures: Any) -> dict[str, Any]:
    """Add to a candidate's row of the table, and return it; other steps may run at once."""
    table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    row = table.get(name, {})
    if "sha256" in figures:  # of another file: what the old one cost does not hold for it
        row = {key: row[key] for key in ("validation",) if key in row}
    table[name] = {**row, **figures}
    with atomic_file(RESULTS) as file:
        file.write_text(json.dumps(table, indent=1) + "\n")
    return table[name]


def train_some(folder: Path, epochs: str, data: str, *names: str) -> None:
    arm = load(STUDY)["densestride-1.0x"]
    if unknown := set(names) - CANDIDATES.keys():
        raise SystemExit(f"No candidates: {', '.join(unknown)}")
    precision = "" if arm.recipe.precision == "auto" else f" {arm.recipe.precision}"
    for seed in range(arm.seeds):
        for name in names:
            # Beside the teachers, which need no calibration images at the end.
            TEACHERS["candidate"] = Architecture(partial(Candidate, **CANDIDATES[name][1]), name)
            run = place(folder, name) / f"{epochs}-epochs" / f"seed-{seed}"
            going = (run / "state.pt").exists()
            recipe = dataclasses.replace(arm.recipe, seed=seed, epochs=int(epochs))
            best = train(data, run, model="candidate", recipe=recipe, resume=going)
            top1 = checkpoint.read(best)[0].accuracy["validation"]["top1"]
            known = json.loads(RESULTS.read_text()).get(name, {}).get("validation", {})
            known.setdefault(f"{epochs}{precision}", {})[str(seed)] = top1
            note(name, validation=known)


def main(folder: Path, *steps: str) -> None:
    if steps[:1] == ("train",):
        train_some(folder, *steps[1:])
        return
    for step in steps or STEPS:
        for name in CANDIDATES:
            made = place(folder, name)
            file = made / "model_int8.tflite"
            if step == "models" and not file.exists():
                convert(build(name), 32, made)
            if not file.exists():
                continue
            table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            row = table.get(name, {})
            if row.get("sha256") != sha256(file):
                net = build(name)
                parameters = profile(net, 32).deployed_parameters
                row = note(name, **describe(file, net, 32), parameters=parameters)
            if step == "instructions" and "instructions" not in row:
                note(name, instructions=instructions(file, 32))
            elif step == "latency" and "x86" not in row:
                base = folder / BASE / "model_int8.tflite"
                if not base.exists():
                    convert(
                        fixed_statistics(create("ghostnetv3-small", branches=1)), 32, base.parent
                    )
                first, second = bench([file], against=[base], runs=RUNS)["rows"]
                note(name, x86=round(second["median"] / first["median"], 4))
    print(markdown(json.loads(RESULTS.read_text())))


def markdown(table: dict[str, Any]) -> str:
    lines = [
        "| candidate | parameters | MMACs | x86 | A53 | A72 | A76 | 10 epochs | 30 epochs | what it tries |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in CANDIDATES if name in table):
        row = table[name]
        cells = [
            name,
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.1f}",
            f"{row.get('x86', 0):.2f}",
            *(f"{n / 1e6:.2f}" for n in row.get("instructions", {}).values()),
        ]
        for epochs in ("10", "30"):
            known = row.get("validation", {})
            runs = [(known.get(epochs + kind, {}), kind) for kind in ("", " bf16")]
            cells.append(
                ", ".join(f"{top1:.1f}{k}" for seeds, k in runs for top1 in seeds.values())
            )
        lines.append(f"| {' | '.join([*cells, CANDIDATES[name][0]])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
