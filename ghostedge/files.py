"""Writing so that a reader finds the old content or the new, never a half of either."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ghostedge.errors import GhostEdgeError


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise GhostEdgeError(
            f"Cannot write {path}: {reason}. Choose another place with --output, or free it."
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it replaces `path` in one step.

    Raises GhostEdgeError when the folder cannot be written or the disk is full.
    """
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit it takes the place of `path`.

    A process killed at any moment leaves the old folder or none at `path`. A non-empty folder
    that `replaceable` does not recognise is somebody's own and raises GhostEdgeError.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or replaceable(path))):
        raise GhostEdgeError(
            f"{path} exists and was not made by this command: it would be lost. "
            "Name another folder with --output."
        )
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.replace(retired)
                temporary.replace(path)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
