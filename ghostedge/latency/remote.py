"""The far end of a bench: takes the runner and the models on stdin, runs them, answers on stdout.

`boards.py` sends this file to the python3 of a board, or to a Python here. It needs the standard
library only, and parses from Python 3.7 on, so that an old one can say that it is too old.

On stdin come a line of JSON (what to do, the name and size of each file), the files, and a line every
few seconds as long as the other side lives. Answers are lines of a token and JSON: "say" is
progress; "result" or "error" comes last. All is in one temporary folder, which goes however this
ends: done, a signal, a closed or silent link, a full disk.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from typing import Any

SILENCE = 60
"""Seconds without a line from the other side, after which it is gone."""
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Stop(Exception):
    """What keeps this machine from running it, as a sentence without its full stop."""


class FarEnd:
    """One order, the folder that it is carried out in, and the processes that it started."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.folder = ""
        self.children: list[subprocess.Popen[bytes]] = []

    def carry_out(self) -> None:
        try:
            check_system(platform.machine(), 8 * struct.calcsize("P"), sys.version_info[:2])
            self.folder = tempfile.mkdtemp(prefix="ghostedge-bench-", dir=roomiest())
            for name, size in self.order["files"]:
                receive(os.path.join(self.folder, name), size)
            threading.Thread(target=watch, daemon=True).start()
            self.tell("result", self.run(self.find_python()))
        except Stop as stop:
            self.tell("error", str(stop))
        except OSError as error:
            if error.errno in FULL:
                where = self.folder or "its temporary folders"
                self.tell("error", f"there is no room in {where}: free some and repeat")
            else:
                self.tell("error", f"{error.strerror} ({error.filename})")
        finally:
            for child in self.children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
            if self.folder:
                shutil.rmtree(self.folder, ignore_errors=True)

    def tell(self, kind: str, what: Any) -> None:
        try:
            print(self.order["token"] + json.dumps({kind: what}), flush=True)
        except OSError:  # nobody listens any more
            sys.exit(1)

    def find_python(self) -> str:
        """Return a Python that has what the models need: one that is here, else a venv's."""
        modules, packages = zip(*self.order["needs"])  # noqa: B905  older than strict=
        test = "import " + ", ".join(modules)
        pythons = [sys.executable]
        pythons += [os.path.expanduser(f"~/{name}/bin/python") for name in (".venv", "venv", "env")]
        for python in pythons:
            if os.path.exists(python) and self.call(python, "-c", test)[0] == 0:
                return python
        if not self.order["install"]:
            raise Stop(f"{', '.join(packages)}: {self.call(sys.executable, '-c', test)[1]}")
        self.tell("say", f"making a venv with {', '.join(packages)}; it goes when this is done")
        code, said = self.call(sys.executable, "-m", "venv", "venv")
        if code:
            raise Stop(f"no venv could be made ({said}): sudo apt install python3-venv")
        python = os.path.join(self.folder, "venv", "bin", "python")
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        code, said = self.call(*pip, "--no-cache-dir", "--only-binary", ":all:", *packages)
        if code:
            raise Stop(
                f"{', '.join(packages)} could not be installed ({said}): see whether it has a "
                "network and room, or install them there in ~/.venv"
            )
        return python

    def run(self, python: str) -> Any:
        """Run the runner on the files; return its result."""
        with open(os.path.join(self.folder, "errors"), "w+b") as errors:
            child = self.start([python, *self.order["arguments"]], errors.fileno())
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(b"- "):
                    self.tell("say", line[2:].decode("utf-8", "replace").rstrip())
            if child.wait() == 0:
                with open(os.path.join(self.folder, self.order["output"]), "rb") as file:
                    return json.load(file)["results"][0]
            errors.seek(0)
            said = last_line(errors.read())
        prefix = self.order["says"]
        if said.startswith(prefix):
            raise Stop(said[len(prefix) :])
        raise Stop(f"the runner ended with code {child.returncode} ({said})")

    def call(self, *command: str) -> tuple[int, str]:
        """Run a command to its end; return its exit code and the last line that it said."""
        child = self.start(command, subprocess.STDOUT)
        said, _ = child.communicate()
        return child.returncode, last_line(said)

    def start(self, command: Any, stderr: int) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "TMPDIR": self.folder, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        self.children.append(child)
        return child


def check_system(machine: str, bits: int, version: tuple[int, ...]) -> None:
    """Raise Stop where neither LiteRT nor ONNX Runtime is made for this system."""
    if bits != 64 or machine not in ("aarch64", "arm64", "x86_64", "AMD64"):
        raise Stop(
            f"its system is {machine} with a {bits}-bit Python, and LiteRT and ONNX Runtime are made "
            "for 64-bit ARM and x86 only: install the 64-bit Raspberry Pi OS"
        )
    if version < (3, 10):
        raise Stop(f"its python3 is {version[0]}.{version[1]}: 3.10 or newer is needed")


def roomiest() -> str:
    """Return the temporary folder with the most room: /tmp may be a small piece of memory."""
    places = [tempfile.gettempdir(), "/var/tmp", os.path.expanduser("~")]
    if "TMPDIR" in os.environ:  # somebody chose
        places = places[:1]
    usable = [place for place in places if os.access(place, os.W_OK)]
    return max(usable, key=lambda place: shutil.disk_usage(place).free, default=places[0])


def receive(path: str, size: int) -> None:
    with open(path, "wb") as file:
        while size:
            block = sys.stdin.buffer.read(min(size, 1 << 20))
            if not block:
                sys.exit(1)
            size -= file.write(block)


def watch() -> None:
    """Wait until the other side closes or falls silent, and end this process then."""
    while select.select([0], [], [], SILENCE)[0] and os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def last_line(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300].strip() if lines else "it said nothing"


def main() -> None:
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    FarEnd(json.loads(sys.stdin.buffer.readline().decode())).carry_out()


if __name__ == "__main__":
    main()
