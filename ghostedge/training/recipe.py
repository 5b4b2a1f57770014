"""How a network is trained: every knob in one frozen dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from ghostedge.errors import GhostEdgeError, nearest
from ghostedge.files import printable, read_toml, tomllib

LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda value: 1 <= value <= 1_000_000, "from 1 to 1,000,000"),
    "batch": (lambda value: value >= 2, "at least 2"),
    "lr": (lambda value: 0 < value <= 1000, "above 0 and at most 1000"),
    "validation": (lambda value: 0 < value < 1, "between 0 and 1"),
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2^32 - 1"),
    "accumulate": (lambda value: value >= 1, "at least 1"),
    **dict.fromkeys(
        ("momentum", "warmup", "label_smoothing", "ema", "shift", "cutout"),
        (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ),
    **dict.fromkeys(("weight_decay", "clip", "patience"), (lambda value: value >= 0, "at least 0")),
    "mixup": (lambda value: 0 <= value <= 1000, "from 0 to 1000"),
}


def fitting(name: str, value: Any, hint: Any) -> Any:
    """Return a value of TOML as a field of that type hint has it, where a whole number can be a float.

    Raises GhostEdgeError where it is of another kind, or none of a Literal's choices.
    """
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in choices:
            raise GhostEdgeError(f"{name} must be {' or '.join(choices)}, not {value!r}.")
        return value
    kind = list if hint == list[str] else [*choices, hint][0]  # X of X | None
    if kind is float and type(value) is int and abs(value) < 1e308:  # a float's end
        value = float(value)
    if type(value) is not kind or (kind is list and not all(isinstance(v, str) for v in value)):
        words = {list: "a list of texts", str: "a text", int: "a whole number", float: "a number"}
        needed = words.get(kind, "true or false")
        raise GhostEdgeError(f"{name} must be {needed}, which {value!r} is not.")
    if isinstance(value, float) and not math.isfinite(value):
        raise GhostEdgeError(f"{name} must be a finite number, which {value} is not.")
    if isinstance(value, str) and value != printable(value):
        raise GhostEdgeError(f"{name} must be UTF-8 text, which {printable(value)} is not.")
    return value


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained. `PAPER` is the recipe of arXiv 2509.12380, to compare with."""

    epochs: int = 30
    batch: int | None = None
    """Images in a step. None: 128, and fewer below 1,024 images, so that an epoch has eight steps; a
    multiple of eight, which processes can share. At least 8, or all images."""
    lr: float | None = None
    """Highest rate. None: 0.1 for SGD and 0.001 for AdamW at a batch of 128, less in proportion to
    smaller batches. (The paper's 0.01 is too low for a short schedule.)"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    """Of SGD, Nesterov's."""
    weight_decay: float = 5e-4
    decay: Literal["weights", "all"] = "weights"
    """What decays: weights of convolutions and linear layers, or (the paper) biases and norms too."""
    warmup: float = 0.15
    """Share of the steps in which the rate rises linearly."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate then falls to zero."""
    label_smoothing: float = 0.1
    """0 for teachers: smoothed ones distil worse (arXiv 1906.02629)."""
    ema: float = 0.0
    """Decay of the weights' moving average, 0 for none. The average is what is validated and kept."""
    clip: float = 0.0
    """Largest norm of a step's gradient, 0 for no limit."""
    balance: bool = False
    """Weigh the classes of uneven folders, in the loss, against their number of images."""
    patience: int = 0
    """Stop after that many epochs without a better validation, 0 for never."""
    shift: float = 0.125
    """Furthest shift of an image, as a share of its side (4 of 32 pixels)."""
    border: Literal["reflect", "black"] = "reflect"
    """What a shift brings in. On small images a black edge is one more thing to learn."""
    flip: Literal["alternating", "random", "none"] = "alternating"
    """Alternating: every other epoch mirrors exactly the images that the last one did not
    (airbench, arXiv 2404.00498)."""
    cutout: float = 0.0
    """Side of a grey square put anywhere on an image, as a share of the image's side."""
    mixup: float = 0.0
    """Alpha of mixup's beta distribution; for distillation only, as it hurts compact nets without."""
    freeze: Literal["none", "norms", "backbone"] = "none"
    """norms: keep BatchNorm statistics as they are. backbone: train the last layer alone."""
    accumulate: int = 1
    """Sub-batches that a step adds up; the processes of torchrun share them."""
    validation: float = 0.1
    """Share of the training images, by class, that chooses the best epoch; the paper used the test set."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What convs and linear layers compute in (torch.autocast); weights stay in fp32. auto: bf16 on GPUs,
    fp32 on CPUs. There bf16 is 1.4 to 1.7 times as fast for dense convs if the CPU has it (AVX512-BF16,
    AMX), else slower, as it is for depthwise convs."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (holds, limits) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise GhostEdgeError(f"{name} must be {limits}, not {value}.")
        for name, hint in typing.get_type_hints(Recipe).items():
            if typing.get_origin(hint) is Literal:
                fitting(name, getattr(self, name), hint)

    def resolved(self, images: int) -> Recipe:
        """Fill in what depends on the number of training images."""
        batch = min(self.batch or max(8, min(128, images // 64 * 8)), images)
        peak = {"sgd": 0.1, "adamw": 0.001}[self.optimizer]
        return dataclasses.replace(self, batch=batch, lr=self.lr or peak * min(1.0, batch / 128))


PAPER = Recipe(
    epochs=200,
    batch=256,
    lr=0.01,
    weight_decay=0.01,
    decay="all",
    warmup=0.3,
    label_smoothing=0.0,
    border="black",
    flip="random",
)
"""GhostNetV3-Small (arXiv 2509.12380), which however chose its best epoch on the test set."""


def load(name: str | None, settings: Iterable[str] = (), **given: Any) -> Recipe:
    """Return a recipe: the default one, "paper", or that of a .toml file; then changed.

    `settings` are texts as `setting` reads them; `given` values that are None change nothing.
    Raises GhostEdgeError for an unknown recipe, name or kind of value.
    """
    base, values = PAPER if name == "paper" else Recipe(), {}
    if name is not None and name != "paper":
        values = read_toml(Path(name), "training recipe, nor is it paper")
    values |= dict(map(setting, settings))
    values |= {key: value for key, value in given.items() if value is not None}
    hints = typing.get_type_hints(Recipe)
    for key, value in values.items():
        if key not in hints:
            raise GhostEdgeError(
                f"A recipe has no {key!r}.{nearest(key, hints)} It has {', '.join(hints)}."
            )
        values[key] = fitting(key, value, hints[key])
    return dataclasses.replace(base, **values)


def setting(text: str) -> tuple[str, Any]:
    """Return name and value of "cutout=0.25": as TOML has it, as people write numbers, or a word."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise GhostEdgeError(f"{text!r} sets nothing: write it as in cutout=0.25.")
    kinds: tuple[Callable[[str], Any], ...] = (_toml, int, float)  # 030, .1 and 5. are not TOML
    for kind in kinds:
        with contextlib.suppress(ValueError, RecursionError):
            return name, kind(value)
    return name, {"true": True, "false": False}.get(value.lower(), value)


def _toml(value: str) -> Any:
    return tomllib.loads(f"value = {value}")["value"]
