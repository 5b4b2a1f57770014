"""The processes that torchrun started, or the one there is."""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghostedge.errors import GhostEdgeError, in_a_line

TORCHRUN = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""What processes find each other by; some job systems set the first one for any process."""


class Processes:
    """This process among `size`, number `rank`. Number 0 writes the files and decides.

    BatchNorm statistics are those of number 0's sub-batches, which DistributedDataParallel hands to
    the others; at 64 images or more in a sub-batch SyncBatchNorm's traffic buys nothing.
    """

    def __init__(self, device: str) -> None:
        self.size, self.rank = 1, 0
        if all(name in os.environ for name in TORCHRUN):
            self.size, self.rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        if self.size > 1 and device.startswith("cuda:"):
            raise GhostEdgeError("torchrun gives each process a GPU of its own: use --device cuda.")
        shared = self.size > 1 and device == "cuda"
        self.place = _place(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if shared else device)
        if self.size > 1:
            if shared:
                torch.cuda.set_device(self.place)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def parts(self, batch: int, accumulate: int) -> int:
        """Return how many sub-batches a step of `batch` images is made of, all processes together."""
        parts = max(accumulate, self.size)
        # BatchNorm needs two images: one may be a single value of each channel.
        if parts % self.size or batch % parts or batch // parts < 2:
            raise GhostEdgeError(
                f"A batch of {batch} images cannot be cut into {parts} equal parts of two images or "
                f"more for {self.size} processes: choose a --batch (and accumulate) that the "
                "processes divide."
            )
        return parts

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return a module that averages its gradients over the processes."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module)

    def alone(self, parallel: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which gradients are only added up, not yet averaged."""
        if wanted and isinstance(parallel, nn.parallel.DistributedDataParallel):
            return parallel.no_sync()
        return contextlib.nullcontext()

    def meet(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def summed(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def agreed(self, value: float) -> float:
        """Return the value of process 0."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.place)
        dist.broadcast(shared, 0)
        return float(shared)


def _place(name: str) -> torch.device:
    try:
        place = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=place).item()
    except (TypeError, ImportError, RuntimeError, AssertionError) as error:
        raise GhostEdgeError(
            f"The device {name!r} cannot be used here ({in_a_line(error)}). "
            "Use --device cpu, or cuda where there is a GPU."
        ) from error
    if place.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are static
        torch.set_float32_matmul_precision("high")
    return place
