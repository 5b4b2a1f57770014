"""What is exported: a checkpoint, a torch.nn.Module or an ONNX file, behind one interface."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ghostedge import checkpoint
from ghostedge.bundle import is_label, unnamed
from ghostedge.convert import foreign_onnx, to_onnx
from ghostedge.convert.evidence import ImageSet
from ghostedge.convert.plan import Plan
from ghostedge.errors import GhostEdgeError
from ghostedge.evaluate import Z, accuracy
from ghostedge.files import sha256
from ghostedge.models import fold, profile
from ghostedge.models.reparam import RepConv
from ghostedge.models.synthetic import noise, synthesize
from ghostedge.pixels import IMAGENET, PixelContract
from ghostedge.runtime import probabilities

Predict = Callable[[np.ndarray], np.ndarray]

PROBES = 4
"""Images that tell logits from probabilities."""

READINGS = {
    "ImageNet's mean and std": IMAGENET,
    "mean 0.5, std 0.5": ((0.5,) * 3, (0.5,) * 3),
    "mean 0, std 1": ((0.0,) * 3, (1.0,) * 3),
    "raw pixels (mean 0, std 0.00392157)": ((0.0,) * 3, (1 / 255,) * 3),
}
"""The usual readings of a pixel, tried where labelled images can tell."""


@dataclasses.dataclass
class Subject:
    """A classifier to export.

    `reference` maps raw pixels, uint8 (images, size, size, 3), to probabilities, float32 (images,
    classes): all else is compared with it. `forms` are what the net passes through before ONNX, as
    such functions. `core(opset)` is the graph from `(pixel - 128) / 64` to probabilities, batch axis
    free.
    """

    name: str
    kind: str
    """What the reference is, as the first stage is called."""
    labels: list[str] | None
    """None where nothing names the classes: see `name_classes`."""
    classes: int
    pixels: PixelContract
    reference: Predict
    core: Callable[[int], onnx.ModelProto]
    source: dict[str, Any]
    """Where it comes from, for the manifest."""
    synthesize: Callable[[int], np.ndarray] | None
    """Calibration images by seed, where there is something to make them from."""
    forms: dict[str, Predict] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a checkpoint records of the data it was trained on."""
    caveat: str | None = None
    """What to be wary of, whatever is measured."""
    reread: Callable[[np.ndarray, PixelContract], np.ndarray] | None = None
    """The reference under another pixel contract, where the contract is only what the caller says."""

    def images(self, seed: int) -> np.ndarray:
        """Return images to check on without data: synthetic ones, or noise of all scales."""
        if self.synthesize is not None:
            return self.synthesize(seed)
        return noise(self.pixels.size, seed)

    def name_classes(self, classes: Sequence[str] | None) -> list[str]:
        """Return the labels; where the net has none, the data's classes or "class 0" and so on."""
        if self.labels is None:
            if classes is not None and len(classes) != self.classes:
                raise GhostEdgeError(
                    f"The data has {len(classes)} classes and {self.name} has {self.classes}, which "
                    "nothing names: give their names in the order of its outputs, --labels FILE."
                )
            self.labels = list(classes or unnamed(self.classes))
        for label in self.labels:
            if not is_label(label):
                raise GhostEdgeError(
                    f"{self.name} has a class named {label!r}, and labels.txt holds one name a line: give "
                    "it another."
                )
        return self.labels

    def doubts(self, images: ImageSet, found: np.ndarray) -> list[str]:
        """Return warnings where the reference's answers to labelled images say that it is misread.

        `found` are its probabilities. A wrong normalisation or order of labels makes no error: it
        only costs accuracy.
        """
        assert images.labels is not None
        right, count = accuracy(found, images.labels), len(images.labels)
        chance = float(np.bincount(images.labels).max() / count)
        margin = Z * math.sqrt(chance * (1 - chance) / count)
        lines = []
        if right <= chance + margin:
            lines.append(
                f"{self.name} is right on {right:.1%} of {count} labelled images before any conversion, "
                f"where the same answer to all of them is on {chance:.1%}: the normalisation (--mean, "
                "--std) or the order of the labels (--labels) is wrong, or it is not trained."
            )
        if self.reread is not None:
            others = {}
            for name, (mean, std) in READINGS.items():
                reading = PixelContract.of_unit(self.pixels.size, mean, std)
                others[name] = accuracy(self.reread(images.pixels, reading), images.labels)
            best = max(others, key=lambda name: others[name])
            if others[best] > max(right, chance) + 2 * margin:
                lines.append(
                    f"With {best} {self.name} is right on {others[best]:.1%} of {count} labelled images "
                    f"instead of {right:.1%}: check --mean and --std."
                )
        return lines


def open_subject(plan: Plan, module: nn.Module | None = None) -> Subject:
    """Return what a plan exports: `module`, or the checkpoint or .onnx file that it names.

    Raises GhostEdgeError for a file that is missing, damaged or no image classifier, and where the
    pixel contract or the image size is not known.
    """
    if module is not None:
        return _from_module(plan, module)
    if Path(plan.model).suffix == ".onnx":
        return _from_onnx(plan)
    return _from_checkpoint(plan)


def _from_checkpoint(plan: Plan) -> Subject:
    for flag in ("labels", "mean", "std"):
        if getattr(plan, flag) is not None:
            raise GhostEdgeError(
                f"The checkpoint {plan.model} has its own {flag}: leave out --{flag}."
            )
    file = checkpoint.find(plan.model)
    card, tensors = checkpoint.read(file)
    net = checkpoint.network(card, tensors, str(file))
    pixels = dataclasses.replace(card.pixels, size=plan.imgsz or card.pixels.size)
    stored = tensors.get(checkpoint.CALIBRATION)
    folded = fold(net)

    def images(seed: int) -> np.ndarray:
        if stored is not None and stored.shape[1] == pixels.size:
            return stored
        return synthesize(net, pixels, seed=seed)

    left_out = {"labels", "pixels"}
    caveat = None
    if pixels.size != card.pixels.size:
        left_out.add("accuracy")
        caveat = (
            f"{card.name} was trained on images of {card.pixels.size} pixels and is less accurate on others: "
            f"train it on (ghostedge train DATA --from {plan.model} --imgsz {pixels.size})."
        )
    facts = {k: v for k, v in card.to_json().items() if k not in left_out}
    counts = profile(net, pixels.size)._asdict()
    return Subject(
        name=card.name,
        kind="unfolded",
        labels=card.labels,
        classes=len(card.labels),
        pixels=pixels,
        reference=lambda images: _probabilities(net, pixels, images),
        core=lambda opset: to_onnx.core(folded, pixels, opset),
        source={"file": file.name, "sha256": sha256(file), "profile": counts, **facts},
        synthesize=images,
        forms={"folded": lambda images: _probabilities(folded, pixels, images)},
        data=card.data,
        caveat=caveat,
    )


def _from_module(plan: Plan, module: nn.Module) -> Subject:
    if plan.imgsz is None:
        raise GhostEdgeError(
            f"A {plan.model} does not say what images it takes: give their size, imgsz=32."
        )
    pixels = _reading(plan, plan.imgsz)
    try:
        # A copy: eval mode, device and the fold must not reach the caller's net.
        net = copy.deepcopy(module).cpu().float().eval()
    except Exception as error:  # of the caller's code, and of torch's older weight_norm
        raise GhostEdgeError(
            f"{plan.model} cannot be copied ({type(error).__name__}: {_first_line(error)}): take out what "
            "it names, such as torch.nn.utils.weight_norm (remove_weight_norm does)."
        ) from error
    folded = fold(net)
    probes = pixels.normalize(noise(pixels.size)[:PROBES]).transpose(0, 3, 1, 2)
    try:
        with torch.inference_mode():
            found = net(torch.from_numpy(np.ascontiguousarray(probes)))
    except Exception as error:  # whatever the caller's code raises
        raise GhostEdgeError(
            f"{plan.model} cannot take {pixels.size}x{pixels.size} RGB images as float32 "
            f"(batch, 3, height, width): {type(error).__name__}: {_first_line(error)}."
        ) from error
    if not isinstance(found, torch.Tensor):
        raise GhostEdgeError(
            f"{plan.model} gives a {type(found).__name__} and no tensor (batch, classes): wrap it in a "
            "module that returns the scores alone."
        )
    if found.dtype != torch.float32:
        kind = str(found.dtype).removeprefix("torch.")
        raise GhostEdgeError(
            f"{plan.model} gives {kind} scores, where float32 are needed: end it in .float()."
        )
    softmax = _is_softmax(plan.model, found.numpy())
    labels = _labels(plan, found.shape[1])

    def core(opset: int) -> onnx.ModelProto:
        try:
            return to_onnx.core(folded, pixels, opset, softmax=not softmax)
        except Exception as error:  # of torch's exporter and of the caller's code
            raise GhostEdgeError(
                f"PyTorch cannot export {plan.model} to ONNX opset {opset} "
                f"({type(error).__name__}: {_first_line(error)}): try another --opset, or replace "
                "what it names."
            ) from error

    digest = hashlib.sha256()
    for key, tensor in net.state_dict().items():
        digest.update(key.encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
    # It takes minutes where the net is large: only what is calibrated on is worth it.
    wanted = plan.int8 and plan.data is None
    norms = any(isinstance(m, nn.BatchNorm2d) and m.track_running_stats for m in net.modules())
    counts = foreign_onnx.count(to_onnx.simplified(core(plan.opset), 1))
    return Subject(
        name=plan.model,
        kind="PyTorch module",
        labels=labels,
        classes=found.shape[1],
        pixels=pixels,
        reference=lambda images: _probabilities(net, pixels, images, softmax),
        core=core,
        source={
            "source": "torch.nn.Module",
            "sha256": digest.hexdigest(),
            "ends": "softmax" if softmax else "logits",
            "profile": {
                "training_parameters": sum(p.numel() for p in module.parameters()),
                **counts,
            },
        },
        synthesize=(lambda seed: synthesize(net, pixels, seed=seed)) if wanted and norms else None,
        forms={"folded": lambda images: _probabilities(folded, pixels, images, softmax)}
        if any(isinstance(m, RepConv) for m in net.modules())
        else {},
        reread=lambda images, reading: _probabilities(net, reading, images, softmax),
    )


def _from_onnx(plan: Plan) -> Subject:
    file = Path(plan.model)
    net = foreign_onnx.read(file, plan.imgsz)
    if net.is_ours:
        for flag in ("mean", "std"):
            if getattr(plan, flag) is not None:
                raise GhostEdgeError(
                    f"{file} was exported by ghostedge and takes raw pixels: leave out --{flag}."
                )
        # It takes pixels as they are; what it does with them itself is found below.
        pixels = PixelContract(net.size, (0.0,) * 3, (1.0,) * 3)
    else:
        pixels = _reading(plan, net.size)
    scores = net.run(pixels.normalize(noise(net.size)[:PROBES]))
    softmax = _is_softmax(str(file), scores)
    labels = _labels(plan, scores.shape[1], net.labels)
    graph, mean, std = foreign_onnx.peeled(net, pixels)
    inner = PixelContract(net.size, mean, std)  # type: ignore[arg-type]

    def core(opset: int) -> onnx.ModelProto:
        return foreign_onnx.core(graph, net, inner, scores.shape[1], opset, not softmax)

    def run(images: np.ndarray, reading: PixelContract) -> np.ndarray:
        found = net.run(reading.normalize(images))
        return found if softmax else probabilities(found)

    counts = foreign_onnx.count(to_onnx.simplified(core(plan.opset), 1))
    return Subject(
        name=file.stem,
        kind="ONNX file",
        labels=labels,
        classes=scores.shape[1],
        pixels=inner,
        reference=lambda images: run(images, pixels),
        core=core,
        source={
            "file": file.name,
            "source": f"ONNX opset {net.opset}, {net.producer or 'producer unknown'}",
            "sha256": sha256(file),
            "ends": "softmax" if softmax else "logits",
            "profile": {"training_parameters": net.parameters, **counts},
        },
        synthesize=None,
        reread=None if net.is_ours else run,
    )


def _reading(plan: Plan, size: int) -> PixelContract:
    if plan.mean is None or plan.std is None:
        raise GhostEdgeError(
            f"{plan.model} does not say how it reads pixels: give the mean and std of its training, for "
            "pixels in 0-1 (--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 are ImageNet's; --mean 0 "
            "--std 1 where it takes 0-1 as it is). A wrong one costs accuracy without a sign."
        )
    return PixelContract.of_unit(size, plan.mean, plan.std)


def _labels(plan: Plan, classes: int, stored: list[str] | None = None) -> list[str] | None:
    if plan.labels is not None and stored is not None:
        raise GhostEdgeError(f"{plan.model} has labels of its own: leave out --labels.")
    labels = stored if plan.labels is None else plan.labels
    if labels is not None and len(labels) != classes:
        raise GhostEdgeError(
            f"{plan.model} has {classes} classes and {len(labels)} labels were given: give one for each, "
            "in the order of its outputs."
        )
    return None if labels is None else list(labels)


def _is_softmax(name: str, scores: np.ndarray) -> bool:
    """Return whether outputs are probabilities, by what they are on the probes."""
    if scores.ndim != 2 or scores.shape[1] < 2 or scores.shape[0] != PROBES:
        raise GhostEdgeError(
            f"{name} gives {list(scores.shape)} for {PROBES} images and is no classifier, which gives "
            "[batch, classes] of at least two classes."
        )
    if not np.isfinite(scores).all():
        raise GhostEdgeError(f"{name} gives NaN or infinity: its weights are damaged or diverged.")
    return bool(scores.min() >= 0 and np.abs(scores.sum(1) - 1).max() < 1e-3)


def _probabilities(
    net: nn.Module, pixels: PixelContract, images: np.ndarray, softmax: bool = False
) -> np.ndarray:
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            values = pixels.normalize(images[start : start + 100]).transpose(0, 3, 1, 2)
            batch = torch.from_numpy(values).contiguous(memory_format=torch.channels_last)
            scores = net(batch)
            outputs.append((scores if softmax else scores.softmax(1)).numpy())
    return np.concatenate(outputs)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").strip().rstrip(".:")
