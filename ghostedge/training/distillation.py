"""Distillation: what a student takes from its teachers. One small class a strategy, with its paper.

A strategy gets the student's logits (batch, classes), those of each teacher on the same views
(teachers, batch, classes), the batch, and the cross-entropy with its labels; it returns the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.errors import GhostEdgeError, nearest
from ghostedge.models.teachers import Teacher
from ghostedge.training.batches import Batch


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What `train` distils: teachers (checkpoints or .onnx files), strategy, and its two numbers.

    temperature, alpha (the share of the labels' cross-entropy): None for the strategy's own.
    """

    teachers: tuple[str, ...]
    strategy: str = "kd"
    temperature: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if not self.teachers:
            raise GhostEdgeError("Distillation needs a teacher: name one with --teacher.")
        if self.strategy not in STRATEGIES:
            raise GhostEdgeError(
                f"There is no strategy {self.strategy!r}.{nearest(self.strategy, STRATEGIES)} "
                f"Choose one of {', '.join(STRATEGIES)}."
            )
        if not (self.temperature is None or 0.01 <= self.temperature <= 1000):
            raise GhostEdgeError(f"A temperature is from 0.01 to 1000, not {self.temperature}.")
        if not (self.alpha is None or 0 <= self.alpha <= 1):
            raise GhostEdgeError(f"alpha is a share from 0 to 1, not {self.alpha}.")

    def build(self) -> Strategy:
        return STRATEGIES[self.strategy](self.temperature, self.alpha)


class Strategy(nn.Module):
    """The base: alpha times the cross-entropy plus (1 - alpha) times `guidance`.

    Attributes:
        dense: in a chain, learn from all nets before this one, not from the last alone.
        looks_inside: `guidance` is also given feature maps (see `AMTML`).
    """

    dense = False
    looks_inside = False
    settings: tuple[float, float]
    """Temperature and alpha where none are given."""

    def __init__(self, temperature: float | None = None, alpha: float | None = None) -> None:
        super().__init__()
        self.temperature = self.settings[0] if temperature is None else temperature
        self.alpha = self.settings[1] if alpha is None else alpha

    def prepare(self, student: nn.Module, teachers: Sequence[Teacher], views: Tensor) -> None:
        """Make what depends on the networks, before the optimizer is made."""

    def forward(self, entropy: Tensor, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        guidance = self.guidance(logits, targets, batch)
        return self.alpha * entropy + (1 - self.alpha) * guidance

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def kl(self, logits: Tensor, targets: Tensor) -> Tensor:
        """T^2 KL(teacher, student) of logits softened by the temperature, mean of the batch."""
        t = self.temperature
        soft, wanted = F.log_softmax(logits / t, 1), F.log_softmax(targets / t, 1)
        return t**2 * F.kl_div(soft, wanted, reduction="batchmean", log_target=True)


class KD(Strategy):
    """Hinton et al. (arXiv 1503.02531). Of several teachers the mean logits: an ensemble.

    With `via`, teacher assistants (1902.03393).
    """

    settings = (4.0, 0.1)

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        return self.kl(logits, targets.mean(0))


class Ensemble(KD):
    """As `KD`, but of the teachers' mean probabilities (Hinton's arithmetic mean)."""

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        t = self.temperature
        wanted = F.softmax(targets / t, 2).mean(0)
        return t**2 * F.kl_div(F.log_softmax(logits / t, 1), wanted, reduction="batchmean")


class StandardizedKD(Strategy):
    """Logit standardisation (arXiv 2403.01427): KL of z-scores, so that only relations count.

    The paper adds 9 times the divergence to 0.1 of the cross-entropy: here the divergence counts
    ten times, which alpha 0.1 makes these two weights. Raises GhostEdgeError for two classes.
    """

    settings = (2.0, 0.1)

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        if logits.shape[1] < 3:
            raise GhostEdgeError(
                "With two classes all z-scores are alike, and nothing is learnt from them: "
                "take another strategy, as kd."
            )
        return 10 * self.kl(_standardized(logits), _standardized(targets.mean(0)))


def _standardized(logits: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(logits, 1, keepdim=True)
    return (logits - mean) / (deviation + 1e-7)


class DIST(Strategy):
    """Correlation in place of KL (arXiv 2205.10536): between classes, and between images.

    The loss is `alpha` times the cross-entropy plus (1 - alpha) T^2 times the sum of both: with alpha
    1/3 a third of the paper's loss at beta = gamma = 2.
    """

    settings = (4.0, 1 / 3)

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        t = self.temperature
        found, wanted = F.softmax(logits / t, 1), F.softmax(targets.mean(0) / t, 1)
        inter = 1 - _correlation(found, wanted).mean()
        intra = 1 - _correlation(found.T, wanted.T).mean()
        return t**2 * (inter + intra)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), 1)


class DKD(Strategy):
    """Decoupled KD (arXiv 2203.08679): the label's probability and the other classes' apart.

    The second part weighs 8 times the first, the most that the paper's code has on CIFAR-100 (its
    least is 2: each pair of networks has its own). Both are added to the cross-entropy in the
    proportion of alpha. Their weight is the same from the first step on, where the reference
    implementation lets it grow over the first epochs.
    """

    settings = (4.0, 0.5)
    others = 8.0

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        return batch.shared(lambda labels: self._decoupled(logits, targets, labels))

    def _decoupled(self, logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        label = F.one_hot(labels, logits.shape[1]).bool()
        soft, wanted = logits / self.temperature, targets.mean(0) / self.temperature
        pairs = [torch.stack([z[label], z[~label].view(len(z), -1).logsumexp(1)], 1)
                 for z in (soft, wanted)]  # fmt: skip
        rest = [z[~label].view(len(z), -1) for z in (soft, wanted)]
        parts = [
            F.kl_div(
                F.log_softmax(found, 1), F.log_softmax(sought, 1),
                reduction="batchmean", log_target=True,
            )
            for found, sought in (pairs, rest)
        ]  # fmt: skip
        return self.temperature**2 * (parts[0] + self.others * parts[1])


class DGKD(Strategy):
    """Densely guided distillation (arXiv 2009.08825): the teacher and every assistant before.

    The KL terms of all guides are added, and the cross-entropy counts once for each guide (eq. 7).
    In each step one guide, drawn at random, teaches, and each other with probability 3/4; assistants,
    too, learn in this way.
    """

    dense = True
    settings = (4.0, 0.3)
    survival = 0.75

    def forward(self, entropy: Tensor, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        return super().forward(len(targets) * entropy, logits, targets, batch)

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        terms = torch.stack([self.kl(logits, target) for target in targets])
        random = torch.Generator().manual_seed(batch.seed)
        kept = torch.rand(len(targets), generator=random) < self.survival
        kept[torch.randint(len(targets), (), generator=random)] = True
        return (terms * kept.to(terms)).sum()


class AMTML(Strategy):
    """Adaptive multi-teacher multi-level KD (arXiv 2103.04062).

    Each teacher has a latent vector; with the student's pooled features it gives the teacher's
    weight for each image, and the weighted soft targets are what is learnt, with the angles between
    images (RKD, 1904.05068). Hints: the student's map of each resolution, through a 1x1 conv, follows
    that of one teacher, the teachers taking turns. Unlike in the paper, a hint is the cosine of the
    two maps, not the squared distance (of normalised ones, in its code), and the teachers' weights
    are learnt beside the student, from the cross-entropy of the weighted targets, not beforehand.

    Hints need torch teachers; an .onnx teacher gives soft targets alone.
    """

    looks_inside = True
    settings = (4.0, 0.3)
    hints = 1.0

    def prepare(self, student: nn.Module, teachers: Sequence[Teacher], views: Tensor) -> None:
        self._student = Maps(student, views)
        self._teachers = [
            None if t.net is None else Maps(t.net, t.resized(views)) for t in teachers
        ]
        shapes = [[] if maps is None else maps.shapes for maps in self._teachers]
        inside = [index for index, shape in enumerate(shapes) if shape]
        width = self._student.shapes[-1][1]
        self.latent = nn.Parameter(torch.randn(len(teachers), width))
        self.score = nn.Linear(width, 1)
        self.pairs: list[tuple[int, int, int]] = []
        bridges = []
        for level, (_, channels, height, _) in enumerate(self._student.shapes if inside else []):
            teacher = inside[level % len(inside)]
            sizes = [abs(shape[2] - height) for shape in shapes[teacher]]
            other = sizes.index(min(sizes))
            self.pairs.append((level, teacher, other))
            bridges.append(nn.Conv2d(channels, shapes[teacher][other][1], 1))
        self.bridges = nn.ModuleList(bridges)
        self.to(views.device)

    def guidance(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        t, maps = self.temperature, self._student.found
        features = maps[-1].float().amax((2, 3)).detach()
        weights = self.score(features[:, None] * self.latent)[..., 0].softmax(1)
        wanted = (weights.T[..., None] * F.softmax(targets / t, 2)).sum(0)
        found = wanted.clamp(min=1e-8).log()
        adapter = batch.shared(lambda labels: F.nll_loss(found, labels))
        soft = t**2 * F.kl_div(F.log_softmax(logits / t, 1), wanted.detach(), reduction="batchmean")
        # As their number is the cube of the images', of the first 128 alone.
        bent = F.smooth_l1_loss(_angles(logits[:128]), _angles(wanted[:128].detach()))
        return soft + adapter + bent + self.hints * self._hints()

    def _hints(self) -> Tensor:
        losses = [torch.zeros((), device=self.latent.device)]
        for bridge, (level, teacher, other) in zip(self.bridges, self.pairs, strict=True):
            theirs = self._teachers[teacher]
            assert theirs is not None
            sought = theirs.found[other].float()
            found = bridge(self._student.found[level].float())
            sought = F.adaptive_avg_pool2d(sought, found.shape[-1])
            # The angle: with the squared distance, activations of one scale drown all others.
            losses.append(1 - F.cosine_similarity(found.flatten(1), sought.flatten(1)).mean())
        return torch.stack(losses).sum() / max(1, len(self.pairs))


def _angles(points: Tensor) -> Tensor:
    """Return, of (N, C), the cosine of the angle at each point between any two others, (N, N, N)."""
    ways = F.normalize(points[None] - points[:, None], dim=2)
    return ways @ ways.transpose(1, 2)


class Maps:
    """A net's last feature map at each resolution: after a forward pass `found`, large to small.

    The smallest is the map that is pooled at the end; a gate inside may compute on smaller ones.
    """

    def __init__(self, net: nn.Module, views: Tensor) -> None:
        last: dict[int, tuple[nn.Module, torch.Size]] = {}
        end = 0

        def note(module: nn.Module, _: Any, output: Any) -> None:
            nonlocal end
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] > 1:
                end = output.shape[2]
                last[end] = (module, output.shape)

        handles = [module.register_forward_hook(note) for module in net.modules()]
        was = net.training
        with torch.no_grad():
            net.eval()(views)
        net.train(was)
        for handle in handles:
            handle.remove()
        if not last:
            raise GhostEdgeError("A network without feature maps gives and takes no hints.")
        sizes = sorted((size for size in last if size >= end), reverse=True)
        self.shapes = [last[size][1] for size in sizes]
        self.found: list[Tensor] = [torch.empty(0)] * len(sizes)
        for index, size in enumerate(sizes):
            last[size][0].register_forward_hook(self._keep(index))

    def _keep(self, index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, _: Any, output: Tensor) -> None:
            # Some nets call one activation at several resolutions.
            if output.shape[1:] == self.shapes[index][1:]:
                self.found[index] = output

        return keep


STRATEGIES: dict[str, type[Strategy]] = {
    "kd": KD,
    "ensemble": Ensemble,
    "standardized": StandardizedKD,
    "dist": DIST,
    "dkd": DKD,
    "dgkd": DGKD,
    "amtml": AMTML,
}
