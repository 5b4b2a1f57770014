"""Images made from a network's own BatchNorm statistics, to calibrate int8 without a data set.

Zero-shot quantization in the way of ZeroQ (arXiv 2001.00281) and DeepInversion (1912.08795): pixels
are optimised until the activations have the means and variances that training left in the
BatchNorms, and the logits mixtures of two classes. No pixel of any data set is in them.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.errors import GhostEdgeError
from ghostedge.pixels import PixelContract

STEPS = 150


def synthesize(net: nn.Module, pixels: PixelContract, seed: int = 0) -> np.ndarray:
    """Return synthetic images, uint8 (images, size, size, 3), for a training-form network.

    There are 64 of up to 32 pixels and fewer of larger ones, at least 8, as both their making and
    their storage cost by the pixel.

    Raises GhostEdgeError for a network without BatchNorm.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    norms = [
        m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None
    ]
    if not norms:
        raise GhostEdgeError(
            "This network has no BatchNorm to make calibration images from. Give real ones: --data DIR"
        )
    distances: list[Tensor] = []

    def compare(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        scale = norm.running_var + norm.eps
        distances.append(
            ((mean - norm.running_mean).square() / scale).mean()
            + ((var + norm.eps).sqrt() / scale.sqrt() - 1).square().mean()
        )

    generator = torch.Generator().manual_seed(seed)
    device = next(net.parameters()).device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
    low, high = (0 - mean) / std, (255 - mean) / std
    start = _start(pixels.size, generator).to(device)
    images = len(start)
    canvas = (start * (high - low) / 4 + (high + low) / 2).clamp(low, high).requires_grad_()
    optimizer = torch.optim.Adam([canvas], lr=0.1)
    for norm in norms:
        norm.register_forward_pre_hook(compare)
    targets: Tensor | None = None
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / STEPS)
        distances.clear()
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        logits = net(torch.roll(canvas, shift, (2, 3)))
        if targets is None:
            targets = _mixtures(images, logits.shape[1]).to(device)
        loss = torch.stack(distances).mean() + 0.1 * F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            canvas.clamp_(low, high)
    raw = (canvas.detach() * std + mean).round().clamp(0, 255).to(torch.uint8).cpu()
    return raw.permute(0, 2, 3, 1).contiguous().numpy()


def noise(size: int, seed: int = 0) -> np.ndarray:
    """Return images of coloured noise, as many as `synthesize` does, for nets that it cannot do.

    uint8 (images, size, size, 3). They serve to compare models; to calibrate on they are too unlike
    real images.
    """
    start = _start(size, torch.Generator().manual_seed(seed))
    raw = ((start + 2) * (255 / 4)).round().clamp(0, 255).to(torch.uint8)
    return raw.permute(0, 2, 3, 1).contiguous().numpy()


def _start(side: int, generator: torch.Generator) -> Tensor:
    """Return noise of all scales at once, which is what natural images are made of, around 0."""
    images = min(64, max(8, 64 * 32**2 // side**2))
    start = torch.zeros(images, 3, side, side)
    for size in itertools.takewhile(lambda s: s <= side, (2**n for n in range(1, 9))):
        values = torch.randn(images, 3, size, size, generator=generator)
        start += 0.4 * F.interpolate(values, (side, side), mode="bilinear")
    return start


def _mixtures(images: int, classes: int) -> Tensor:
    """Return target probabilities (images, classes): mixtures of two classes, from even to pure.

    Images of one class alone would leave no close decisions, by which a check of int8 tells a
    good model from a bad one, and calibrate on logits that real images never reach.
    """
    index = torch.arange(images)
    share = torch.linspace(0.55, 1.0, images)[index * 29 % images]
    targets = torch.zeros(images, classes)
    targets[index, index % classes] = share
    targets[index, (index + 1 + index // classes % (classes - 1)) % classes] += 1 - share
    return targets
