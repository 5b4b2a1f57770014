"""Large networks for small images, to learn from, and any trained model as a teacher.

torchvision's networks come with stems that keep a 32-pixel image from vanishing, as their CIFAR
versions have in the literature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge import checkpoint
from ghostedge.bundle import unnamed
from ghostedge.errors import GhostEdgeError, needing
from ghostedge.files import printable, sha256
from ghostedge.models.reparam import fold
from ghostedge.models.synthetic import noise
from ghostedge.pixels import PixelContract


class Group(nn.Module):
    """Conv, max-pool, BN, GELU, conv, BN, GELU: pooling early keeps the wide layers cheap."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x)))


class Airbench(nn.Module):
    """A teacher after airbench94 (arXiv 2404.00498): six wide convs, the cheapest way to 94%.

    The original's whitening layer is a learned 3x3 conv here, and BatchNorm gains are learned.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        widths = [round(w * width) for w in (64, 256, 256)]
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.groups = nn.Sequential(
            Group(24, widths[0]), Group(widths[0], widths[1]), Group(widths[1], widths[2])
        )
        self.classifier = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(F.gelu(self.bn(self.stem(x))))
        return self.classifier(x.amax((2, 3)))


class ViT(nn.Module):
    """A plain vision transformer with 2-D sine positions and mean pooling (arXiv 2205.01580).

    Positions are computed, so any image whose side is a multiple of `patch` fits; others are
    resized to the next multiple.
    """

    def __init__(
        self, num_classes: int = 10, dim: int = 256, depth: int = 8, heads: int = 8, patch: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False
        )
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        side = self.patches.kernel_size[0]
        size = [-(-int(length) // side) * side for length in x.shape[2:]]
        if size != list(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = self.patches(x)
        x = x.flatten(2).transpose(1, 2) + _positions(*x.shape[1:]).to(x)
        return self.head(self.encoder(x).mean(1))


def _positions(dim: int, height: int, width: int) -> Tensor:
    """Return (height * width, dim): sines and cosines of the row, then of the column."""
    quarter = dim // 4
    rates = 10_000 ** -(torch.arange(quarter) / (quarter - 1))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (rows, columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def _torchvision(name: str, **arguments: Any) -> Any:
    with needing("train"):
        from torchvision import models
    return models.get_model(name, weights=None, **arguments)


def _resnet(name: str, num_classes: int = 10) -> nn.Module:
    net = _torchvision(name, num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def _vgg(num_classes: int = 10) -> nn.Module:
    net = _torchvision("vgg13_bn", num_classes=num_classes)
    for pool in net.features:
        if isinstance(pool, nn.MaxPool2d):
            pool.ceil_mode = True  # five halvings of 24 pixels would leave nothing
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier[0] = nn.Linear(512, 4096)
    return net


def _densenet(num_classes: int = 10) -> nn.Module:
    net = _torchvision("densenet161", num_classes=num_classes)
    net.features.conv0 = nn.Conv2d(3, 96, 3, padding=1, bias=False)
    net.features.pool0 = nn.Identity()
    return net


def _inception(num_classes: int = 10) -> nn.Module:
    # Its own stem turns 75 pixels into 7.
    net = _torchvision(
        "inception_v3", num_classes=num_classes, aux_logits=False, init_weights=False
    )
    net.Conv2d_1a_3x3 = type(net.Conv2d_1a_3x3)(3, 192, kernel_size=3, padding=1)
    for layer in ("Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        setattr(net, layer, nn.Identity())
    net.maxpool2 = nn.Identity()
    return net


def _efficientnet(num_classes: int = 10) -> nn.Module:
    net = _torchvision("efficientnet_v2_s", num_classes=num_classes)
    net.features[0][0].stride = (1, 1)
    return net


NETS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    **{
        f"resnet{depth}": (partial(_resnet, f"resnet{depth}"), f"ResNet-{depth} (1512.03385)")
        for depth in (18, 34, 50)
    },
    "vgg13-bn": (_vgg, "VGG-13 with BatchNorm (1409.1556)"),
    "densenet161": (_densenet, "DenseNet-161 (1608.06993)"),
    "inception-v3": (_inception, "Inception-v3 (1512.00567)"),
    "efficientnetv2-s": (_efficientnet, "EfficientNetV2-S (2104.00298)"),
    "vit-small": (ViT, "a vision transformer of 6.3 M parameters (2205.01580)"),
}
"""Builder and summary by name. Each builder takes `num_classes`."""


def imagenet_name(name: str) -> str:
    """Return torchvision's name of one of `NETS`; raises GhostEdgeError where it has no weights."""
    with needing("train"):
        from torchvision import models
    theirs = {"efficientnetv2-s": "efficientnet_v2_s"}.get(name, name.replace("-", "_"))
    if name not in NETS or theirs not in models.list_models(models):
        raise GhostEdgeError(
            f"torchvision has no ImageNet weights for {name}: leave out pretrained."
        )
    return theirs


def imagenet_weights(name: str) -> dict[str, np.ndarray]:
    """Fetch torchvision's ImageNet weights for one of `NETS`.

    Raises GhostEdgeError for a network that torchvision has none for, and where it cannot fetch.
    """
    theirs = imagenet_name(name)
    from torchvision import models

    try:
        # In a net of theirs: DenseNet's file has older names than the net.
        state = models.get_model(theirs, weights="DEFAULT").state_dict()
    except (OSError, RuntimeError) as error:
        raise GhostEdgeError(f"The weights of {name} cannot be fetched: {error}.") from error
    return {key: tensor.numpy() for key, tensor in state.items()}


class OnPixels(nn.Module):
    """A network behind its pixel contract: raw uint8 images (batch, 3, h, w) to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, pixels: PixelContract) -> None:
        super().__init__()
        self.net = net
        for name, values in (("mean", pixels.mean), ("std", pixels.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        values = (views.float() - self.mean) / self.std
        return self.net(values.contiguous(memory_format=torch.channels_last))


class Teacher:
    """A trained model that gives logits (batch, classes) for the views a student sees.

    Views are uint8 (batch, 3, size, size); they are resized where the teacher reads another size,
    and each teacher reads them by its own pixel contract. Logits are in the order of `labels`.
    A network of ours computes folded: the same in less time.

    Args:
        source: a checkpoint, shipped weights, or an .onnx file that reads RGB pixels 0-255.
        labels: the student's classes, each of which the teacher must know.
        device: where to compute; an .onnx file runs on the CPU.
    """

    def __init__(self, source: str | Path, labels: Sequence[str], device: torch.device) -> None:
        from ghostedge.data.sources import match_classes

        self.device, self.net = device, None
        self.classifier: Any = None
        if Path(source).suffix == ".onnx":
            from ghostedge.runtime import Classifier

            self.classifier = Classifier(source, threads=torch.get_num_threads())
            self.softmaxed = _probable(self.classifier.raw(noise(self.classifier.size)[:16]))
            file, self.size, own = (
                self.classifier.path,
                self.classifier.size,
                self.classifier.labels,
            )
            if own == unnamed(len(labels)):
                own = list(labels)  # the file names none
        else:
            file = checkpoint.find(source)
            card, net = checkpoint.build(file)
            self.net = OnPixels(fold(net), card.pixels).to(memory_format=torch.channels_last)
            self.net.to(device).eval().requires_grad_(False)
            self.size, own = card.pixels.size, card.labels
        self.order = torch.from_numpy(match_classes(labels, own)).to(device)
        self.identity = {"file": printable(file.name), "sha256": sha256(file)}

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        views = self.resized(views)
        if self.net is not None:
            return self.net(views).float()[:, self.order]
        raw = self.classifier.raw(views.permute(0, 2, 3, 1).cpu().numpy())
        outputs = torch.from_numpy(raw).to(self.device)[:, self.order]
        return outputs.clamp(min=1e-12).log() if self.softmaxed else outputs

    def resized(self, views: Tensor) -> Tensor:
        """Return views at the size that the teacher reads."""
        if views.shape[-1] == self.size:
            return views
        size = (self.size, self.size)
        values = F.interpolate(views.float(), size, mode="bilinear", antialias=True)
        return values.round().clamp(0, 255).byte()


def _probable(outputs: np.ndarray) -> bool:
    """Whether outputs (batch, classes) are probabilities; those in 1/256 sum to a little more or less."""
    return bool(outputs.min() >= 0 and abs(outputs.sum(1) - 1).max() < 0.25)
