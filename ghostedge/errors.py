"""The one exception hierarchy. A message says what was wrong, where, and what to do about it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class GhostEdgeError(Exception):
    """Input or surroundings that ghostedge cannot work with. The command line exits with 2."""

    exit_code = 2


class CheckFailed(GhostEdgeError):
    """A result that was produced, measured and found outside its limit. Exits with 1.

    table: what was measured, for a terminal, where it takes more than a sentence.
    """

    exit_code = 1

    def __init__(self, message: str, table: str = "") -> None:
        super().__init__(message)
        self.table = table

    def __str__(self) -> str:
        return "\n".join(filter(None, (self.args[0], self.table)))


class Paused(GhostEdgeError):
    """Work that stopped at its time budget and can go on. Exits with 3."""

    exit_code = 3


def in_a_line(error: BaseException) -> str:
    """Return the first 200 characters of what an exception says, its line breaks as spaces."""
    return " ".join(str(error).split())[:200].rstrip(". ") or type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` for the known names close to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def expect(holds: object, what: str) -> None:
    """Raise ValueError, which says `what` of a file is wrong, unless it `holds`."""
    if not holds:
        raise ValueError(what)


@contextlib.contextmanager
def needing(extra: str) -> Iterator[None]:
    """Raise GhostEdgeError, as `require` has it, for a package that an import inside does not find.

    For one that is there and broken, too, with its own words.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise require(error.name or str(error), extra) from error
    except ImportError as error:
        raise GhostEdgeError(
            f"A package that is installed cannot be imported ({error}). "
            f"Try versions that fit: pip install -U 'ghostedge[{extra}]'"
        ) from error


def require(module: str, extra: str) -> GhostEdgeError:
    """Return the error for a missing optional package, naming the extra that brings it."""
    return GhostEdgeError(
        f"This needs the package {module}, which is not installed. "
        f"Install it with: pip install 'ghostedge[{extra}]'"
    )
