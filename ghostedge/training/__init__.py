"""From images to a checkpoint."""

from ghostedge.training.chain import distill
from ghostedge.training.distillation import Distillation
from ghostedge.training.loop import train
from ghostedge.training.recipe import PAPER, Recipe

__all__ = ["PAPER", "Distillation", "Recipe", "distill", "train"]
