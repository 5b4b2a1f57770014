"""The checkpoint: one .safetensors file in training form that rebuilds itself.

Its header holds everything that is not a tensor, as JSON. Nothing in it is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostedge.errors import GhostEdgeError, expect, in_a_line, nearest
from ghostedge.files import atomic_write
from ghostedge.pixels import PixelContract

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"
CALIBRATION = "calibration_images"
"""Name of the tensor of synthetic images, uint8 (images, size, size, 3), beside the weights."""
MOST_BRANCHES = 64


@dataclasses.dataclass
class Checkpoint:
    """What is known of a trained network beside its weights."""

    architecture: str
    arguments: dict[str, Any]
    labels: list[str]
    pixels: PixelContract
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The recipe, as `ghostedge train` takes it, the device, the epoch that was best, the seconds; where
    there are any, the teachers and what it started from."""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Name, fingerprint and number of the training images, their lowest and highest pixel; how validation
    was split off, or the fingerprint of images of its own, and that of the test images."""
    accuracy: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Top-1 by split, with the number of images it was measured on; of shipped weights also what int8
    loses."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    licence: str | None = None
    source: str = "ghostedge train"

    @property
    def name(self) -> str:
        width = self.arguments.get("width")
        return self.architecture if width is None else f"{self.architecture}-{width}x"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "pixels": self.pixels.to_json()}


def shipped() -> dict[str, Path]:
    """Return the weights that travel with the package, by name."""
    return {file.stem: file for file in sorted(WEIGHTS.glob("*.safetensors"))}


def find(path_or_name: str | Path) -> Path:
    """Return the file of a checkpoint given by path or by the name of shipped weights."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    known = shipped()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    raise GhostEdgeError(
        f"{path_or_name} is neither a file nor the name of shipped weights "
        f"({', '.join(known) or 'none in this installation'}).{nearest(str(path_or_name), known)}"
    )


def save(path: Path, checkpoint: Checkpoint, tensors: dict[str, np.ndarray]) -> None:
    """Write a checkpoint atomically: the same content gives the same bytes."""
    from safetensors.numpy import save as serialized

    header = json.dumps({"format": 1, **checkpoint.to_json()}, sort_keys=True)
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    content = serialized(contiguous, metadata={"ghostedge": header})
    atomic_write(path, content)  # safetensors' own error of a full disk is no OSError


def read(path_or_name: str | Path) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    """Read a checkpoint and its tensors without torch.

    Raises GhostEdgeError for a file that is missing, truncated or foreign, or that holds a value
    that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    path = find(path_or_name)
    try:
        with safe_open(path, framework="numpy") as file:
            header = (file.metadata() or {}).get("ghostedge")
            # Only what ghostedge wrote: numpy cannot hold every type of a foreign tensor.
            names = [] if header is None else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise GhostEdgeError(
            f"{path} is not a readable .safetensors file ({error}). A foreign checkpoint (.pth) is turned "
            f"into one by: ghostedge import {path}. A .tflite file is not trained or exported again."
        ) from error
    if header is None:
        raise GhostEdgeError(
            f"{path} is a .safetensors file that ghostedge did not write. "
            f"Turn it into a checkpoint with: ghostedge import {path}"
        )
    try:
        stored = json.loads(header)
        version = stored.pop("format")
        if version != 1:
            raise GhostEdgeError(f"{path} has checkpoint format {version}; this ghostedge reads 1.")
        stored["pixels"] = PixelContract.from_json(stored["pixels"])
        checkpoint = Checkpoint(**stored)
        _check(checkpoint, tensors)
    except (
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise GhostEdgeError(f"The header of {path} is damaged ({error!r}).") from error
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise GhostEdgeError(
                f"{path}: the tensor {name} holds NaN or infinity. The training diverged; "
                "take an earlier checkpoint."
            )
    return checkpoint, tensors


def _check(card: Checkpoint, tensors: dict[str, np.ndarray]) -> None:
    """Touch everything that is used of a header, so that no use of it can fail later."""
    json.dumps(card.to_json(), ensure_ascii=False).encode()  # half a character, which JSON can hold
    texts = [card.architecture, *card.labels, card.licence or "", card.source]
    texts += [card.data.get(key) or "" for key in ("name", "fingerprint")]
    expect(all(isinstance(text, str) for text in texts), "a text")
    sizes = [card.arguments.get(key, 1) for key in ("width", "branches", "num_classes")]
    expect(all(isinstance(size, (int, float)) for size in sizes), "arguments")
    expect(sizes[1] <= MOST_BRANCHES, "branches")
    for part in ("validation", "test"):
        figures = card.accuracy.get(part, {})
        expect(isinstance(figures.get("top1", 0), (int, float)), f"top-1 of {part}")
        expect(isinstance(figures.get("images", 0), int), f"images of {part}")
    lost = card.accuracy.get("int8", {})
    expect(not lost or set(lost) == {"synthetic", "real"}, "int8")
    for figures in (figures for kind in lost.values() for figures in kind.values()):
        drop = figures["validation_drop"], figures["validation_interval"]
        expect(all(isinstance(figure, (int, float)) for figure in drop), "what int8 loses")
    held_out = card.data.get("validation")
    if held_out is not None:
        expect(0 < held_out["fraction"] < 1 and isinstance(held_out["seed"], int), "validation")
    low, high = card.data.get("pixels") or (0, 255)
    expect(0 <= low <= high <= 255, "pixels of the data")
    images = tensors.get(CALIBRATION)
    if images is not None:
        _, height, width, channels = images.shape
        expect(images.dtype == np.uint8 and images.size, CALIBRATION)
        expect(height == width and channels == 3, CALIBRATION)


def build(path_or_name: str | Path) -> tuple[Checkpoint, nn.Module]:
    """Return a checkpoint and its network, training form, eval mode, float32."""
    checkpoint, tensors = read(path_or_name)
    return checkpoint, network(checkpoint, tensors, str(path_or_name))


def network(checkpoint: Checkpoint, tensors: dict[str, np.ndarray], where: str) -> nn.Module:
    """Return the network of a checkpoint that was read; `where` names it in errors."""
    import torch

    from ghostedge.models import create

    if checkpoint.arguments.get("num_classes") != len(checkpoint.labels):
        raise GhostEdgeError(
            f"{where} names {len(checkpoint.labels)} labels for a network of "
            f"{checkpoint.arguments.get('num_classes')} classes."
        )
    net = create(checkpoint.architecture, **checkpoint.arguments)
    state = {k: torch.from_numpy(v) for k, v in tensors.items() if k != CALIBRATION}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise GhostEdgeError(
            f"The tensors of {where} do not fit {checkpoint.name}: {in_a_line(error)}."
        ) from error
    return net.eval()
