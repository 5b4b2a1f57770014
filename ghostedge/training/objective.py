"""What a step minimises: a network on raw views, its labels, and its teachers if it has any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.teachers import OnPixels, Teacher
from ghostedge.training.batches import Batch
from ghostedge.training.distillation import Strategy


class Objective(nn.Module):
    """Loss and logits of a batch. Its parameters are the student's and the strategy's."""

    def __init__(
        self,
        student: OnPixels,
        smoothing: float,
        weights: Tensor | None = None,
        strategy: Strategy | None = None,
        teachers: Sequence[Teacher] = (),
    ) -> None:
        super().__init__()
        self.student, self.strategy = student, strategy
        self.smoothing, self.weights = smoothing, weights
        self.teachers = teachers  # a sequence, so that their weights are none of ours

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.student(batch.views).float()
        entropy = batch.shared(lambda labels: self._entropy(logits, labels))
        if self.strategy is None:
            return entropy, logits
        targets = torch.stack([teacher(batch.views) for teacher in self.teachers])
        return self.strategy(entropy, logits, targets, batch), logits

    def _entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        # Not cross_entropy's own mean, which divides by a batch's weights: small batches would lose them.
        return F.cross_entropy(
            logits, labels, self.weights, label_smoothing=self.smoothing, reduction="none"
        ).mean()


def balanced(labels: Tensor, classes: int) -> Tensor:
    """Return a weight for each class, (classes,): the inverse of its share, 1 for an even set."""
    counts = torch.bincount(labels, minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1)).float()


def head(net: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and the module of a network's last linear layer, which names the classes."""
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    return layers[-1]


def freeze(net: nn.Module, what: str) -> None:
    """Keep BatchNorm statistics ("norms"), or all except the head ("backbone"), as they are.

    To be called after each `net.train()`.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    if what == "backbone":
        net.eval()
        net.requires_grad_(False)
        head(net)[1].requires_grad_(True)
