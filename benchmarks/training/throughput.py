"""Images per second of the training loop against a plain one, on this CPU.

    python benchmarks/training/throughput.py DATA           # loop.json
    python benchmarks/training/throughput.py DATA --bf16    # bf16.json: on a CPU with AVX512-BF16
    python benchmarks/training/throughput.py DATA --device cuda    # cuda.json: not yet run

Both train the three-branch 1.0x net on the same images with batches of 128. The plain loop is what a
tutorial writes: a DataLoader with two workers and PIL transforms, NCHW, every branch a convolution
and a BatchNorm of its own. A third, our loop with the single-branch net, says how fast ours were if branches
cost nothing. `--bf16` is our loop in bf16 and in fp32, for some networks, single-branch. The loops
take turns, a few steps each, so that other work slows both. `--device` takes the seconds of an epoch
there, at 1.0x and 2.8x with three branches, and the share of them in which the GPU computes.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ghostedge.data.sources import Data, open_data
from ghostedge.latency.runner import machine
from ghostedge.models import create
from ghostedge.models.reparam import RepConv
from ghostedge.models.teachers import OnPixels
from ghostedge.targets import BASE
from ghostedge.training import Recipe
from ghostedge.training.batches import Batches
from ghostedge.training.loop import _Run
from ghostedge.training.processes import Processes
from ghostedge.training.start import subject
from ghostedge.training.state import Folder

BATCH, IMAGES = 128, 5120
HALVED = ("densestride-1.0x", "resnet20", "airbench-1.0x", BASE)


class Separate(nn.Module):
    """A RepConv as papers draw it: every branch on its own."""

    def __init__(self, conv: RepConv) -> None:
        super().__init__()
        one, count = conv.conv, conv.branches
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(one.in_channels, one.out_channels // count, one.kernel_size, one.stride,
                          one.padding, groups=one.groups, bias=False),
                nn.BatchNorm2d(one.out_channels // count),
            )
            for _ in range(count)
        )  # fmt: skip
        if conv.scale_conv is not None:
            self.branches.append(nn.Sequential(conv.scale_conv, conv.scale_bn))
        if conv.skip_bn is not None:
            self.branches.append(conv.skip_bn)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class Pictures(Dataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.25,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def plain(images: np.ndarray, labels: np.ndarray, classes: int) -> Iterator[None]:
    """Train one step at each `next`."""
    net = create("ghostnetv3-small", num_classes=classes, branches=3)
    for name, module in list(net.named_modules()):
        if isinstance(module, RepConv):
            net.set_submodule(name, Separate(module))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loader = DataLoader(
        Pictures(images, labels), BATCH, shuffle=True, num_workers=2, drop_last=True
    )
    while True:
        for views, wanted in loader:
            loss = F.cross_entropy(net(views), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            yield


def ours(images: np.ndarray, labels: np.ndarray, sets: Data, network: str, recipe: Recipe,
         branches: int, device: str = "cpu") -> Iterator[None]:  # fmt: skip
    """Train one step of our loop at each `next`."""
    card, net = subject(sets.classes, network, branches=branches)
    processes = Processes(device)
    student = OnPixels(net, card.pixels).to(processes.place)
    student.to(memory_format=torch.channels_last)
    batches = Batches(images, labels, BATCH, processes.place)
    run = _Run(student, batches, batches, recipe, card, Folder(Path()), processes,
               Console(file=io.StringIO()))  # fmt: skip
    run.prepare(None, [], "default" if device == "cuda" else "off")
    student.train()
    epoch = 0
    while True:
        for batch in batches.shuffled(recipe, epoch):
            run.learn(batch, 0.01)
            yield
        epoch += 1


def epochs(device: str, images: np.ndarray, labels: np.ndarray, sets: Data, rounds: int) -> Any:
    """Return the median seconds of an epoch, and the share of the time that a GPU computes, by network."""
    found = {}
    module = torch.get_device_module(device)
    for name in (BASE, "ghostnetv3-small-2.8x"):
        run = ours(images, labels, sets, name, Recipe(batch=BATCH, lr=0.01), 3, device)
        steps, seconds = len(images) // BATCH, []
        for _ in range(rounds + 1):
            module.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                next(run)
            module.synchronize()
            seconds.append(time.perf_counter() - started)
        with profile() as profiled:
            started = time.perf_counter()
            for _ in range(min(50, steps)):
                next(run)
            module.synchronize()
            wall = time.perf_counter() - started
        # The host's events have the time of the kernels that they launch, too.
        kernels = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA]
        busy = sum(e.self_device_time_total for e in kernels if not e.is_user_annotation) / 1e6
        found[name] = {
            "seconds an epoch": round(statistics.median(seconds[1:]), 3),  # the first one compiles
            "computing": round(busy / wall, 3),
        }
    return {"epoch": found, "images": len(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 against fp32, our loop both times"
    )
    parser.add_argument("--device", default="cpu", help="seconds of an epoch of our loop there")
    options = parser.parse_args()
    sets = open_data(options.data)
    assert sets.train is not None
    most = IMAGES if options.device == "cpu" else len(sets.train)
    chosen = np.random.default_rng(0).permutation(len(sets.train))[:most]
    read = sets.train.read(32, chosen)
    pixels, labels = read.pixels, read.labels
    torch.manual_seed(0)
    fp32, bf16 = (Recipe(batch=BATCH, lr=0.01, precision=kind) for kind in ("fp32", "bf16"))
    if options.device != "cpu":
        figures = epochs(options.device, pixels, labels, sets, options.rounds)
    elif options.bf16:
        figures = {"bf16 / fp32, single-branch": {}}
        for name in HALVED:
            pair = [ours(pixels, labels, sets, name, recipe, 1) for recipe in (fp32, bf16)]
            _, (ratios,) = compare(pair, options.rounds)
            figures["bf16 / fp32, single-branch"][name] = ratios[1]
    else:
        loops = {
            "plain": plain(pixels, labels, len(sets.classes)),
            "ours": ours(pixels, labels, sets, BASE, fp32, 3),
            "ours, single-branch": ours(pixels, labels, sets, BASE, fp32, 1),
        }
        rates, ratios = compare(list(loops.values()), options.rounds)
        names = list(loops)
        figures = {
            "images_per_second": dict(zip(names, rates, strict=True)),
            "over plain: least, median, most": dict(zip(names[1:], ratios, strict=True)),
            "net": f"{BASE}, 3 branches, 32 pixels",
        }
    here = machine()
    result = figures | {
        "data": sets.name,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": here["cpu"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "features": here["features"],
        "cores": here["cores"],
        "command": shlex.join(["python", "benchmarks/training/throughput.py", *sys.argv[1:]]),
    }
    text = json.dumps(result, indent=1)
    name = "bf16" if options.bf16 else "loop" if options.device == "cpu" else options.device
    Path(__file__).with_name(f"{name}.json").write_text(text + "\n")
    print(text)


def compare(loops: list[Iterator[None]], rounds: int) -> tuple[list[float], list[list[float]]]:
    """Return the median images per second of each; the least, median and most by which it beats the first."""
    rates: list[list[float]] = [[] for _ in loops]
    for number in range(rounds + 1):
        for kept, steps in zip(rates, loops, strict=True):
            started = time.perf_counter()
            for _ in range(2):
                next(steps)
            if number:  # the first round warms up
                kept.append(2 * BATCH / (time.perf_counter() - started))
    ratios = [[b / a for a, b in zip(rates[0], kept, strict=True)] for kept in rates[1:]]
    return (
        [round(statistics.median(kept), 1) for kept in rates],
        [[round(of(each), 2) for of in (min, statistics.median, max)] for each in ratios],
    )


if __name__ == "__main__":
    main()
