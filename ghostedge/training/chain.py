"""Distillation through teacher assistants: a sequence of runs, each of which teaches the next."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghostedge import checkpoint
from ghostedge.errors import GhostEdgeError
from ghostedge.training.distillation import STRATEGIES, Distillation
from ghostedge.training.loop import train
from ghostedge.training.recipe import Recipe
from ghostedge.training.start import DEFAULT, possible_form, require_buildable
from ghostedge.training.state import Folder


def distill(
    data: str,
    output: str | os.PathLike[str],
    *,
    teachers: Sequence[str],
    via: Sequence[str] = (),
    strategy: str = "kd",
    temperature: float | None = None,
    alpha: float | None = None,
    model: str | None = None,
    from_: str | None = None,
    recipe: Recipe | None = None,
    budget: float | None = None,
    resume: bool = False,
    **options: Any,
) -> Path:
    """Train a student to follow `teachers`; return the best checkpoint's path.

    Each network of `via` is an assistant (arXiv 1902.03393): trained first, in
    `output`/assistants/, by the net before it, without label smoothing or frozen parts, on images of
    the student's size, and then a teacher of the next. A dense strategy (dgkd) learns from all before.
    Several teachers are an ensemble. The student is a new `model`, or starts `from_` a checkpoint.
    `options` are those of `train`; of `branches` and `post_norm` an assistant takes what it can have.

    Raises GhostEdgeError as `train` does.
    """
    output = Path(output)
    deadline = None if budget is None else time.monotonic() + budget
    recipe = recipe or Recipe()
    assistants = dataclasses.replace(recipe, label_smoothing=0.0, freeze="none")
    wanted = options.get("branches", 1), options.get("post_norm", False)
    if from_ is None:
        student = model or DEFAULT, options
    elif model is not None or wanted != (1, False) or options.get("pretrained"):
        raise GhostEdgeError(
            f"{from_} has its network: leave out model, branches, post_norm and pretrained."
        )
    else:
        card = checkpoint.read(from_)[0]
        if options.get("imgsz") is None:
            options = {**options, "imgsz": card.pixels.size}
        student = card.name, {**options, "from_": from_}
    stages = [(name, {**options, **possible_form(name, *wanted)}) for name in via]
    stages.append(student)
    for name, given in stages:  # found wrong after the assistants it would cost hours
        form = ("branches", "post_norm", "pretrained")
        require_buildable(name, **{key: given[key] for key in form if key in given})
    if not resume:
        Folder(output).require_unused()
    guides = tuple(teachers)
    for number, (name, given) in enumerate(stages, 1):
        assists = number <= len(via)
        place = output / "assistants" / f"{number}-{name}" if assists else output
        best = train(
            data,
            place,
            model=name,
            recipe=assistants if assists else recipe,
            distillation=Distillation(guides, strategy, temperature, alpha),
            budget=None if deadline is None else max(0.0, deadline - time.monotonic()),
            # A chain goes on with the stage that was interrupted; those after it are new.
            resume=resume and (number == 1 or Folder(place).state.exists()),
            **given,
        )
        guides = (*guides, str(best)) if STRATEGIES[strategy].dense else (str(best),)
    return best
