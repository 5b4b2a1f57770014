from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghostedge.errors import GhostEdgeError
from ghostedge.files import atomic_directory, atomic_file, reported, sha256


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def anything(path: Path) -> bool:
    return True


def nothing(path: Path) -> bool:
    return False


def refused(path: Path, *, directory: bool) -> str:
    """Return the sentence with which `path` is refused, before any content is made."""
    writer = atomic_directory(path, nothing) if directory else atomic_file(path)
    with pytest.raises(GhostEdgeError) as caught, writer:
        pytest.fail("the content was asked for")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_new_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "a.txt"
    for text in ("first", "second"):
        with atomic_file(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
    assert listing(tmp_path) == ["new", "new/folders", "new/folders/a.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_has_the_usual_permissions(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


ERRORS = [
    (ValueError(), ValueError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(28, "No space left on device"), GhostEdgeError),
]


@pytest.mark.parametrize(("error", "seen"), ERRORS)
def test_a_failure_keeps_the_old_file(
    tmp_path: Path, error: BaseException, seen: type[BaseException]
) -> None:
    def fail(path: Path) -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error

    old = tmp_path / "old.txt"
    old.write_text("old")
    for path in (old, tmp_path / "new" / "folders" / "a.txt"):
        with pytest.raises(seen):
            fail(path)
    assert listing(tmp_path) == ["old.txt"]
    assert old.read_text() == "old"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a.txt")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a.txt").read_text() == "text"


def test_a_device_and_a_folder_are_no_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "folder").mkdir()
    for path in (pipe, tmp_path / "folder", Path(os.devnull)):
        assert "is a folder or a device" in refused(path, directory=False)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert listing(tmp_path) == ["folder", "pipe"]


# What root may not write either: below a file, where the kernel makes the folders, a name too long.
UNWRITABLE = ["file/out", "/proc/ghostedge/out", "/sys/out", "a" * 300, "new/" + "a" * 300]


@pytest.mark.parametrize("directory", [False, True])
def test_a_file_elsewhere_that_fails_is_named(tmp_path: Path, directory: bool) -> None:
    photo = tmp_path / "photos" / "gone.jpg"
    out = tmp_path / "new" / "out"
    writer = atomic_directory(out, anything) if directory else atomic_file(out)
    said = r"photos.gone\.jpg cannot be used: No such file"
    with pytest.raises(GhostEdgeError, match=said), writer:
        photo.stat()
    assert listing(tmp_path) == []


@pytest.mark.parametrize("named", ["out", "out/part", None, 7, b"bytes"])
def test_an_error_of_the_output_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(GhostEdgeError, match=r"Cannot write out: .* --output"),
        reported(Path("out")),
    ):
        raise OSError(errno.EACCES, "Permission denied", named)


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("place", UNWRITABLE)
def test_an_unwritable_place(tmp_path: Path, place: str, directory: bool) -> None:
    (tmp_path / "file").write_text("text")
    message = refused(tmp_path / place, directory=directory)
    assert f"Cannot write {tmp_path / place}: " in message
    assert "--output" in message
    assert listing(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
@pytest.mark.parametrize("directory", [False, True])
def test_a_folder_without_permission(tmp_path: Path, directory: bool) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refused(tmp_path / "out", directory=directory)
        assert listing(tmp_path) == []
    finally:
        tmp_path.chmod(0o700)


FULL = """
import resource, sys
from pathlib import Path
from ghostedge.errors import GhostEdgeError
from ghostedge.files import atomic_directory, atomic_file

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
out = Path(sys.argv[1])
try:
    if sys.argv[2] == "file":
        with atomic_file(out) as temporary:
            temporary.write_bytes(bytes(2000))
    else:
        with atomic_directory(out, lambda path: True) as temporary:
            (temporary / "a").write_bytes(bytes(500))
            (temporary / "b").write_bytes(bytes(2000))
except GhostEdgeError as error:
    sys.exit(f"{error.exit_code} {error}")
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    old = tmp_path / "old"
    if kind == "file":
        old.write_text("old")
    else:
        old.mkdir()
        (old / "content").write_text("old")
    before = listing(tmp_path)
    for out in (old, tmp_path / "new" / "out"):
        run = subprocess.run(
            [sys.executable, "-c", FULL, str(out), kind], capture_output=True, text=True
        )
        assert run.stderr.startswith(f"2 Cannot write {out}: File too large. ")
        assert listing(tmp_path) == before


def test_a_folder_is_new_or_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out"
    for name in ("first", "second"):
        with atomic_directory(path, anything) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / name).write_text(name)
            assert temporary.parent == path.parent
            assert name == "first" or (path / "below" / "first").exists()
        assert listing(path) == ["below", f"below/{name}"]
    assert listing(tmp_path / "new") == ["out", "out/below", "out/below/second"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_an_empty_folder_is_nobodys(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out", nothing) as temporary:
        (temporary / "a").touch()
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty", nothing) as temporary:
        (temporary / "b").touch()
    assert listing(tmp_path) == ["empty", "empty/b", "out", "out/a"]


@pytest.mark.parametrize(("error", "seen"), ERRORS)
def test_a_failure_keeps_the_old_folder(
    tmp_path: Path, error: BaseException, seen: type[BaseException]
) -> None:
    def fail(path: Path) -> None:
        with atomic_directory(path, anything) as temporary:
            (temporary / "half").touch()
            raise error

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "content").write_text("old")
    for path in (tmp_path / "old", tmp_path / "new" / "folders" / "out"):
        with pytest.raises(seen):
            fail(path)
    assert listing(tmp_path) == ["old", "old/content"]


def test_the_folder_one_is_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for path in (Path(), Path(".."), tmp_path / "here"):
        assert "holds the folder you are in" in refused(path, directory=True)
    assert listing(tmp_path) == ["here", "here/deep"]


def test_what_came_into_a_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def writes() -> None:
        with atomic_directory(out, lambda path: listing(path) == ["old"]) as temporary:
            (temporary / "new").touch()
            out.mkdir(exist_ok=True)
            (out / "notes.txt").write_text("mine")

    for before in ([], ["out/old"]):
        with pytest.raises(GhostEdgeError, match="was not made by this command"):
            writes()
        assert listing(tmp_path) == ["out", "out/notes.txt", *before]
        (out / "notes.txt").rename(out / "old")


def test_what_is_somebodys_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("folder")
    before = listing(tmp_path)
    for name in ("folder", "file", "link"):
        assert "was not made by this command" in refused(tmp_path / name, directory=True)
    assert listing(tmp_path) == before
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with atomic_directory(tmp_path / "link", anything) as temporary:
        (temporary / "a").touch()
    assert listing(tmp_path) == ["link", "there", "there/a"]
    assert (tmp_path / "link").is_symlink()


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "content").write_text("old")
    rename, calls = Path.replace, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    writer = atomic_directory(path, anything)
    with pytest.raises(GhostEdgeError, match="Device or resource busy"), writer as temporary:
        (temporary / "content").write_text("new")
    assert len(calls) == 3
    assert listing(tmp_path) == ["out", "out/content"]
    assert (path / "content").read_text() == "old"


WRITER = """
import os, sys, time
from pathlib import Path
from ghostedge.files import atomic_directory

os.fsync = lambda handle: None  # so that one swap comes close behind the other
out, name = Path(sys.argv[1]), sys.argv[2]
print("started", flush=True)
for count in range(int(sys.argv[3])):
    with atomic_directory(out, lambda path: (path / "0").exists()) as temporary:
        for part in range(8):
            (temporary / str(part)).write_text(f"{name} {count}")
"""


def writer(out: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(out), name, str(count)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    return child


def versions(folder: Path) -> set[str]:
    """Read a folder that others may be replacing: through a handle, which stays with one of them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        files = [os.open(name, os.O_RDONLY, dir_fd=handle) for name in os.listdir(handle)]
        found = {os.read(file, 100).decode() for file in files}
        for file in files:
            os.close(file)
        return found if len(files) == 8 else {*found, f"{len(files)} files"}
    finally:
        os.close(handle)


def test_processes_at_once_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    children = [writer(out, name, 80) for name in ("a", "b", "c")]
    while any(child.poll() is None for child in children):
        # Between two renames there may be none, and a folder may be cleared while it is read.
        with contextlib.suppress(FileNotFoundError):
            found = {version for version in versions(out) if not version.endswith("files")}
            assert len(found) <= 1
    for child in children:
        assert child.communicate()[1] == ""
        assert child.returncode == 0
    assert len(versions(out)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_killed_process_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    left = []
    for run in range(12):
        child = writer(tmp_path / "out", str(run), 100_000)
        time.sleep(random.uniform(0, 0.1))
        child.kill()
        child.communicate()
        if (tmp_path / "out").exists():
            (version,) = versions(tmp_path / "out")
            left.append(version.split()[0])
    assert len(set(left)) > 1, "no process lived long enough to write anything"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 1_000_000)
    assert sha256(tmp_path / "a") == (
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"  # FIPS 180's example
    )
