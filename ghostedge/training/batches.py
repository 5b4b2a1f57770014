"""Batches from images held on the device as uint8, augmented there, all at once.

What an epoch sees depends on the seed and the epoch's number alone, so that a resumed run sees
what an unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostedge.pixels import PixelContract


class Batches:
    """Images (N, size, size, 3) uint8 and labels (N,), served as normalised NCHW float32 batches."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        pixels: PixelContract,
        batch: int,
        device: torch.device,
    ) -> None:
        self.images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(labels).to(device)
        self.batch = batch
        self.mean = torch.tensor(pixels.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(pixels.std, device=device).view(1, 3, 1, 1)

    def normalized(self, images: Tensor) -> Tensor:
        images = (images.float() - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, as it is."""
        for start in range(0, len(self.images), self.batch):
            part = slice(start, start + self.batch)
            yield self.normalized(self.images[part]), self.labels[part]

    @property
    def steps(self) -> int:
        """Batches in an epoch: all of the same size, the rest is left out."""
        return len(self.images) // self.batch

    def shuffled(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, each image shifted by up to an eighth and half of them flipped."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for step in range(self.steps):
            chosen = order[step * self.batch : (step + 1) * self.batch].to(self.images.device)
            yield self.normalized(self._shifted(chosen, generator)), self.labels[chosen]

    def _shifted(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        images = self.images[chosen]
        count, _, height, width = images.shape
        reach = height // 8
        # Reflecting the border beats filling it on small images: no false edge to learn.
        padded = F.pad(images.float(), (reach,) * 4, mode="reflect").to(torch.uint8)
        shift = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
        flip = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.arange(width).expand(count, -1)
        rows = torch.arange(height) + shift[0]
        columns = torch.where(flip, width - 1 - columns, columns) + shift[1]
        rows, columns = rows.to(images.device), columns.to(images.device)
        index = torch.arange(count, device=images.device)[:, None, None]
        # Advanced indices on both sides of a slice: the result is (count, height, width, 3).
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
