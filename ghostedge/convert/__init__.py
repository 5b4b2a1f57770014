"""From a checkpoint to a checked bundle of deployable models."""

from ghostedge.convert.pipeline import Bundle, export

__all__ = ["Bundle", "export"]
