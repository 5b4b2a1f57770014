"""GhostEdge: from a folder of small images to a verified int8 model on a device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ghostedge.errors import CheckFailed, GhostEdgeError

if TYPE_CHECKING:
    from ghostedge.bundle import verify
    from ghostedge.convert import export
    from ghostedge.runtime import Classifier
    from ghostedge.runtime import Classifier as load

__version__ = "0.1.0"
__all__ = ["CheckFailed", "Classifier", "GhostEdgeError", "export", "load", "verify"]

_HOMES = {
    "Classifier": ("ghostedge.runtime", "Classifier"),
    "load": ("ghostedge.runtime", "Classifier"),
    "export": ("ghostedge.convert", "export"),
    "verify": ("ghostedge.bundle", "verify"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import ghostedge` alone loads no heavy package."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
