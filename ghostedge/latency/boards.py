"""A bench on another machine, by the person's own OpenSSH, or on this one, in the same way.

One connection: the far end (`remote.py`) goes first, then the runner and the models, then signs of
life; answers come back on the same link. No file name or label is ever part of a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghostedge.errors import GhostEdgeError
from ghostedge.latency import runner

# Nothing is ever asked, and a dead link is noticed after 15 s; the rest is the person's own config.
SSH = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    *("-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none", "--"),
)
FAR_END = Path(__file__).with_name("remote.py")
BEAT = 5
FAREWELL = 30
"""Seconds that the far end gets to clean up."""

Say = Callable[[str], None]


def run(
    host: str | None,
    files: Sequence[tuple[Path, str]],
    against: int,
    threads: Sequence[int],
    runs: int,
    say: Say,
) -> dict[str, Any]:
    """Run the runner on `host` (None: here) and return its result.

    files: paths and what to call them, the `against` ones to compare with first. Raises
    GhostEdgeError where the host cannot be reached, cannot run it, or goes away.
    """
    if host is not None and (not host or host.startswith("-") or not host.isprintable()):
        raise GhostEdgeError(f"--on {host!r} is no ssh name such as pi@raspberrypi.local.")
    if host is not None and shutil.which("ssh") is None:
        raise GhostEdgeError("There is no ssh command here: install OpenSSH's client.")
    program = FAR_END.read_bytes()
    start = f"import sys;exec(sys.stdin.buffer.read({len(program)}))"
    token = f"ghostedge-{secrets.token_hex(8)} "
    order, contents = _order(files, against, threads, runs)
    order |= {"token": token, "install": host is not None}
    parcel = [program, json.dumps(order).encode() + b"\n", *contents]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # For ssh one string, which means the same to every shell.
            [sys.executable, "-c", start]
            if host is None
            else [*SSH, host, f"python3 -c '{start}'"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_with_this_ghostedge() if host is None else None,
            start_new_session=True,  # Ctrl-C is for us alone: the far end has to clean up first
        )
        ended = threading.Event()
        sender = threading.Thread(target=_send, args=(process, parcel, ended), daemon=True)
        sender.start()
        try:
            final = _listen(process, token, say)
        finally:  # closing stdin tells the far end to stop, if it has not
            ended.set()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(FAREWELL)
            process.kill()
            process.wait()
            sender.join()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip()
    if "result" in final:
        return final["result"] | ({} if host is None else {"name": host})
    where = "" if host is None else f"{host} could not run it: "
    why = final.get("error") or _broken(host, process.returncode, said, bool(final))
    raise GhostEdgeError(f"{where if 'error' in final else ''}{why.rstrip('.')}.")


def _order(
    files: Sequence[tuple[Path, str]], against: int, threads: Sequence[int], runs: int
) -> tuple[dict[str, Any], list[bytes]]:
    """Return what `remote.py` is to do, and the contents of the files that it needs for that."""
    names = [f"{index}{path.suffix}" for index, (path, _) in enumerate(files)]
    labels = json.dumps([label for _, label in files]).encode()
    contents = [Path(runner.__file__).read_bytes(), labels, *(p.read_bytes() for p, _ in files)]
    sizes = [len(content) for content in contents]
    arguments = ["bench.py", *names[against:], "--labels", "labels.json"]
    arguments += [f"--against={name}" for name in names[:against]]
    arguments += ["--threads", ",".join(map(str, threads)), "--runs", str(runs)]
    needs = {runner.PACKAGES[runner.RUNTIME_OF[path.suffix]] for path, _ in files}
    order = {
        "files": list(zip(["bench.py", "labels.json", *names], sizes, strict=True)),
        "needs": [("numpy", "numpy"), *sorted(needs)],
        "arguments": [*arguments, "--output", "result.json"],
        "output": "result.json",
        "says": runner.SAYS,
    }
    return order, contents


def _with_this_ghostedge() -> dict[str, str]:
    """Return an environment in which the runner finds what a checkpoint needs."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _send(process: subprocess.Popen[bytes], parcel: list[bytes], ended: threading.Event) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:  # a far end that is gone is no news here
        for part in parcel:
            process.stdin.write(part)
            process.stdin.flush()
        while not ended.wait(BEAT):
            process.stdin.write(b"\n")
            process.stdin.flush()


def _listen(process: subprocess.Popen[bytes], token: str, say: Say) -> dict[str, Any]:
    """Pass on what the far end says; return its last answer, of whatever kind, or {}."""
    assert process.stdout is not None
    answer: dict[str, Any] = {}
    with process.stdout:
        for line in process.stdout:  # a login script may write here as well
            text = line.decode("utf-8", "replace")
            if text.startswith(token):
                with contextlib.suppress(ValueError):  # where the link broke in the middle of it
                    answer = json.loads(text[len(token) :])
                    if "say" in answer:
                        say(answer["say"])
    return answer


def _broken(host: str | None, code: int, said: str, started: bool) -> str:
    """Return why no result came, from what ssh said."""
    last = said.splitlines()[-1].strip() if said else f"exit code {code}"
    if host is None or code not in (127, 255):
        return f"{host or 'The runner'} ended before there was a result ({last}): repeat it"
    if started:
        return f"The link to {host} broke in mid-run ({last}): see that it stays on and repeat"
    if code == 127:
        return f"{host} has no python3: install it there (sudo apt install python3-venv)"
    if "IDENTIFICATION HAS CHANGED" in said:
        return (
            f"The host key of {host} is another one than before, so this may be another machine: "
            f"if that is meant, remove the old key (ssh-keygen -R) and connect once with: ssh {host}"
        )
    if "Host key verification failed" in said:
        return f"The host key of {host} is not known here: connect once by hand with: ssh {host}"
    if "Permission denied" in said:
        return f"{host} lets none of your keys in ({last}): put one there with: ssh-copy-id {host}"
    return f"{host} cannot be reached ({last}): try ssh {host} by hand"
