"""Writing so that a reader finds the old content or the new, never a half of either; TOML files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghostedge.errors import GhostEdgeError

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:
    import tomli as tomllib


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a sentence that names `path`, or what else it is of."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        own = Path(os.path.realpath(path))
        named = Path(os.path.realpath(error.filename)) if isinstance(error.filename, str) else own
        if not (own.is_relative_to(named) or named.is_relative_to(own.parent)):
            raise GhostEdgeError(f"{named} cannot be used: {reason}.") from error
        raise GhostEdgeError(
            f"Cannot write {path}: {reason}. Choose another place with --output, or free it."
        ) from error


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those that were not there go again on a failure."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it replaces `path` in one step.

    A link is followed. Raises GhostEdgeError when the folder cannot be written, the disk is full,
    or `path` is a folder or a device.
    """
    path = Path(os.path.realpath(path))
    with reported(path), _parents(path):
        if path.exists() and not path.is_file():
            raise GhostEdgeError(f"{path} is a folder or a device: name a file to write to.")
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


def atomic_write(path: Path, content: str | bytes | memoryview) -> None:
    """Give a file its content, text in UTF-8, in one step; raises as `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_directory(path: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on a clean exit it takes the place of `path`.

    A process killed at any moment leaves the old folder or none at `path`; of two at once the last to
    end wins, whole. A link is followed. A non-empty folder that `replaceable` does not recognise is
    somebody's own and raises GhostEdgeError.
    """
    path = Path(os.path.realpath(path))
    with reported(path), _parents(path):
        with _locked(path.parent):
            _refuse_foreign(path, replaceable)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        retired = temporary.with_name(f"{temporary.name}.old")
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            with _locked(path.parent):
                _refuse_foreign(path, replaceable)  # what came into it meanwhile
                try:
                    if path.exists():
                        path.replace(retired)
                    temporary.replace(path)
                finally:
                    if retired.exists() and not path.exists():
                        retired.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


def _refuse_foreign(path: Path, replaceable: Callable[[Path], bool]) -> None:
    if Path.cwd().is_relative_to(path):
        raise GhostEdgeError(
            f"{path} is or holds the folder you are in, and would be replaced: name another with --output."
        )
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or replaceable(path))):
        raise GhostEdgeError(
            f"{path} exists, and it or something in it was not made by this command: it would be lost. "
            "Name another folder with --output."
        )


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes of ours out of it; a killed one lets go of it.

    Raises GhostEdgeError where one is at work in it. On a failure it goes again, if it is empty.
    """
    with contextlib.ExitStack() as stack:
        with reported(folder):
            stack.enter_context(_parents(folder / "any"))
            try:
                stack.enter_context(_locked(folder, wait=False))
            except BlockingIOError as error:
                raise GhostEdgeError(
                    f"Another run writes to {folder}: wait for its end, or name another --output."
                ) from error
        yield


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes of ours from swapping folders in `folder`; a killed one lets go of it.

    Two exports to one place then replace it one after the other; without `wait` the second raises
    BlockingIOError. Where the system has no such lock (Windows, some network drives), the slower one
    may fail, and says so.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # a drive without locks
            pass
        yield
    finally:
        os.close(handle)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def printable(name: str) -> str:
    r"""Return a file's name as text that can be stored: bytes that are no UTF-8 as \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def cache() -> Path:
    """Return the folder of what can be made again: ghostedge in $XDG_CACHE_HOME, ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ghostedge"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Return the content of a TOML file; raises GhostEdgeError where it cannot be `what`."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GhostEdgeError(f"{path} is no {what} ({error}): name a .toml file.") from error
