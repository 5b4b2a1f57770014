"""Batches from images held on the device as uint8, augmented there, all at once.

What an epoch sees depends on the seed and the epoch's number alone, so that a resumed run sees
what an unbroken one would have seen, and a GPU what a CPU would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostedge.training.recipe import Recipe

GREY = 128
"""What cutout leaves: zero to a net with the default pixel contract."""


class Batch(NamedTuple):
    """Augmented images, uint8 (batch, 3, size, size) in channels_last, and their labels (batch,).

    Under mixup an image is `share` of the one with `labels` and the rest of the one with `others`.
    """

    views: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0
    seed: int = 0
    """For what a step draws: the same in all its sub-batches, whichever process has them."""

    def shared(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what `of` gives for the labels; under mixup for both, by their shares."""
        mine = of(self.labels)
        if self.others is None:
            return mine
        return self.share * mine + (1 - self.share) * of(self.others)

    def chunks(self, count: int) -> list[Batch]:
        """Cut into sub-batches of equal size."""
        others = [None] * count if self.others is None else self.others.chunk(count)
        parts = zip(self.views.chunk(count), self.labels.chunk(count), others, strict=True)
        return [Batch(*part, self.share, self.seed) for part in parts]


class Batches:
    """Images (N, size, size, 3) uint8 and labels (N,), served as views on `device`."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, batch: int, device: torch.device
    ) -> None:
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.batch = batch

    def in_order(self) -> Iterator[Batch]:
        """Every image once, as it is."""
        for images, labels in zip(
            self.images.split(self.batch), self.labels.split(self.batch), strict=True
        ):
            yield Batch(images.permute(0, 3, 1, 2), labels)

    @property
    def steps(self) -> int:
        """Batches in an epoch: all of the same size, the rest is left out."""
        return len(self.images) // self.batch

    def shuffled(self, recipe: Recipe, epoch: int, first: int = 0) -> Iterator[Batch]:
        """One epoch in random order, from its batch number `first` on, augmented by the recipe."""
        count, device = len(self.images), self.images.device
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        reach = int(recipe.shift * self.images.shape[1])
        order = torch.randperm(count, generator=random)
        shifts = torch.randint(-reach, reach + 1, (count, 2), generator=random)
        flips = torch.rand(count, generator=random) < 0.5
        holes = torch.rand((count, 2), generator=random)
        mixing = np.random.default_rng([recipe.seed, epoch])
        if recipe.flip == "alternating":
            once = torch.Generator().manual_seed(recipe.seed)
            flips = (torch.rand(count, generator=once) < 0.5) ^ bool(epoch % 2)
        elif recipe.flip == "none":
            flips[:] = False
        # A transfer an epoch, not a step. Shift, flip and hole belong to an image, not to its place.
        order, shifts, flips, holes = (t.to(device) for t in (order, shifts, flips, holes))
        shares = mixing.beta(recipe.mixup, recipe.mixup, self.steps) if recipe.mixup else None
        for step in range(first, self.steps):
            chosen = order[step * self.batch : (step + 1) * self.batch]
            views = self._shifted(chosen, shifts[chosen], flips[chosen], recipe.border)
            if recipe.cutout:
                views = _with_hole(views, holes[chosen], recipe.cutout)
            labels = self.labels[chosen]
            seed = (random.initial_seed() * self.steps + step) % 2**63
            if shares is None:
                yield Batch(views.permute(0, 3, 1, 2), labels, seed=seed)
                continue
            share = float(shares[step])
            # Rounded to whole pixels: a teacher behind a runtime takes nothing else.
            views = torch.lerp(views.roll(1, 0).float(), views.float(), share).round().byte()
            yield Batch(views.permute(0, 3, 1, 2), labels, labels.roll(1, 0), share, seed)

    def _shifted(self, chosen: Tensor, shift: Tensor, flip: Tensor, border: str) -> Tensor:
        """Return images (batch, size, size, 3): one gather, whose indices hold shift and mirror."""
        size = self.images.shape[1]
        along = torch.arange(size, device=chosen.device)
        columns = torch.where(flip[:, None], size - 1 - along, along) + shift[:, 1:]
        rows = along + shift[:, :1]
        # -1 is 1 again, and size is size - 2.
        inside = [size - 1 - (size - 1 - places.abs()).abs() for places in (rows, columns)]
        views = self.images[chosen[:, None, None], inside[0][:, :, None], inside[1][:, None, :]]
        if border == "black":
            kept = (inside[0] == rows)[:, :, None] & (inside[1] == columns)[:, None, :]
            views = views * kept[..., None]
        return views


def _with_hole(views: Tensor, where: Tensor, share: float) -> Tensor:
    """Put a grey square on each view; its middle, 0 to 1 in `where`, may lie on the border."""
    size = views.shape[1]
    side = max(1, round(share * size))
    along = torch.arange(size, device=views.device)
    start = (where * size).long()[:, :, None] - side // 2
    rows, columns = ((along >= start) & (along < start + side)).unbind(1)
    return views.masked_fill((rows[:, :, None] & columns[:, None, :])[..., None], GREY)
