"""From images to a checkpoint."""

from ghostedge.training.loop import Recipe, train

__all__ = ["Recipe", "train"]
