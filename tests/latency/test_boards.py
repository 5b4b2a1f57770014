"""Benches over a real ssh: an sshd of our own on loopback, with a key made for the test."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jsonschema
import numpy as np
import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ghostedge.cli import main
from ghostedge.errors import GhostEdgeError
from ghostedge.latency import boards, remote, results
from ghostedge.latency.timing import bench
from tests.runtime_fixtures import write_tflite

SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
pytestmark = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="there is no sshd and ssh: apt-get install openssh-server openssh-client",
)
HOST = "board"  # a Host of the person's ssh config


class Board:
    """An sshd on loopback. What a session there may use is set by `setup`, a line of shell."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.temporary = folder, folder / "tmp with 'quotes'; and more"
        self.binaries = folder / "bin"
        self.temporary.mkdir()
        self.binaries.mkdir()
        self.python = self.binaries / "python3"
        self.say_python(f'exec {shlex.quote(sys.executable)} "$@"')
        for key in ("host", "user", "other"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True
            )
        public = (folder / "user.pub").read_text()
        (folder / "authorized_keys").write_text(public)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.know("host")
        client = self.binaries.with_name("client")
        client.mkdir()
        (folder / "config").write_text(
            f"Host {HOST}\n HostName 127.0.0.1\n Port {self.port}\n User {getpass.getuser()}\n"
            f" IdentityFile {folder}/user\n IdentitiesOnly yes\n StrictHostKeyChecking yes\n"
            f" UserKnownHostsFile {folder}/known_hosts\n GlobalKnownHostsFile none\n"
            " RemoteCommand echo this is for people\n RequestTTY no\n"
        )
        real = shutil.which("ssh")
        wrapper = client / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {real} -F {folder}/config "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", str(client), prepend=os.pathsep)
        self.setup()

    def say_python(self, line: str) -> None:
        self.python.write_text(f"#!/bin/sh\n{line}\n")
        self.python.chmod(0o755)

    def know(self, key: str) -> None:
        kind, public, *_ = (self.folder / f"{key}.pub").read_text().split()
        known = f"[127.0.0.1]:{self.port} {kind} {public}\n"
        (self.folder / "known_hosts").write_text(known)

    def setup(self, *lines: str) -> None:
        """Every session runs these lines of sh first; `$SSH_ORIGINAL_COMMAND` is what was asked."""
        file = self.folder / "session.sh"
        start = (
            f"export PATH={shlex.quote(str(self.binaries))}:/usr/bin:/bin",
            f"export TMPDIR={shlex.quote(str(self.temporary))}",
            f"export HOME={shlex.quote(str(self.folder))}",
            'cd "$HOME"',
        )
        file.write_text("\n".join([*start, *lines, 'exec sh -c "$SSH_ORIGINAL_COMMAND"\n']))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPidFile none\n"
            f"ForceCommand sh {self.folder}/session.sh\n"
        )
        if os.getuid() == 0:  # Debian's service makes it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = (self.folder / "sshd.log").open("w")
        assert SSHD is not None
        with log, subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log) as self.process:
            try:
                for _ in range(100):
                    with contextlib.suppress(OSError), socket.socket() as probe:
                        probe.connect(("127.0.0.1", self.port))
                        break
                    time.sleep(0.05)
                yield
            finally:
                self.process.terminate()

    def left(self) -> list[Path]:
        """What of our folders is still there, after at most some seconds of cleaning up."""
        for _ in range(100):
            found = list(self.temporary.iterdir())
            if not found:
                break
            time.sleep(0.1)
        return found


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    folder = tmp_path / "board"
    folder.mkdir()
    made = Board(folder, monkeypatch)
    with made.running():
        yield made
    assert made.left() == []


def write_model(path: Path, invokes_ms: float = 0) -> Path:
    """A small .onnx, which takes longer the larger `invokes_ms` is (very roughly)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    size = 8 + int(600 * invokes_ms**0.5)
    square = numpy_helper.from_array(np.eye(size, dtype=np.float32), "square")
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, [size, size])
    made = helper.make_tensor_value_info("made", TensorProto.FLOAT, [size, size])
    node = helper.make_node("MatMul", ["image", "square"], ["made"])
    graph = helper.make_graph([node], "net", [given], [made], [square])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / 'it\'s $(touch hurt); "mine" & yours'
    folder.mkdir()
    return write_model(folder / "a model;`touch hurt`.onnx")


def refused(model: Path, host: str = HOST) -> str:
    with pytest.raises(GhostEdgeError) as caught:
        bench([model], on=host, runs=5)
    assert caught.value.exit_code == 2
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said
    return said


def test_a_bench_over_ssh(board: Board, model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "model.onnx", 1)
    said: list[str] = []
    board.setup("echo a login script that talks")
    result = bench([model], on=HOST, against=[other], threads=(1, 2), runs=5, say=said.append)
    assert result["name"] == HOST
    assert [row["model"] for row in result["rows"]] == 2 * [str(other), str(model)]
    assert [row["against"] for row in result["rows"]] == 4 * [str(other)]
    assert [row["threads"] for row in result["rows"]] == [1, 1, 2, 2]
    assert result["machine"]["architecture"] == platform.machine()
    assert result["machine"]["versions"]["onnxruntime"] == metadata.version("onnxruntime")
    assert any("load 5 of 5" in line for line in said)
    jsonschema.validate(json.loads(results.writer(Path("x.json"))([result])), results.schema())
    assert not Path("hurt").exists() and not list(tmp_path.glob("**/hurt"))


def test_one_board_of_two(
    board: Board, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = board.folder / "out.json"
    words = ["bench", model, "--on", "a.invalid", "--on", HOST, "--runs", 5, "--output", output]
    monkeypatch.setattr(sys, "argv", ["ghostedge", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.err.splitlines()[-1].startswith("ghostedge: a.invalid cannot be reached (")
    (found,) = results.read(output)
    assert found["name"] == HOST and "interleaved rounds on board" in said.out


def test_host_names_are_no_options(model: Path) -> None:
    for host in ("-oProxyCommand=touch hurt", "", "a\nb"):
        assert "is no ssh name" in refused(model, host)
    assert "cannot be reached" in refused(model, "a b;touch hurt")
    assert not Path("hurt").exists()


def test_keys(board: Board, model: Path) -> None:
    (board.folder / "known_hosts").write_text("")
    assert "host key of board is not known here: connect once by hand" in refused(model)
    board.know("other")
    assert "host key of board is another one than before" in refused(model)
    board.know("host")
    (board.folder / "authorized_keys").write_text("")
    assert "lets none of your keys in" in refused(model)


def test_nobody_there(board: Board, model: Path) -> None:
    board.process.terminate()
    board.process.wait()
    # Refused, or reset where another test's server has the port by now.
    assert re.search(r"board cannot be reached \(.*127\.0\.0\.1 port", refused(model))


def test_no_python(board: Board, model: Path) -> None:
    board.setup(f"export PATH={shlex.quote(str(board.folder))}")
    assert "board has no python3: install it there" in refused(model)


def test_32_bits(board: Board, model: Path) -> None:
    board.setup('exec setarch linux32 sh -c "$SSH_ORIGINAL_COMMAND"')
    assert "its system is i686" in refused(model)
    for machine, bits in (("armv7l", 32), ("aarch64", 32), ("armv6l", 32)):
        with pytest.raises(remote.Stop, match=f"its system is {machine}.*64-bit Raspberry Pi OS"):
            remote.check_system(machine, bits, (3, 11))
    with pytest.raises(remote.Stop, match=r"python3 is 3\.9: 3\.10 or newer"):
        remote.check_system("aarch64", 64, (3, 9))
    remote.check_system("aarch64", 64, (3, 10))


def test_file_size_limit(board: Board, tmp_path: Path) -> None:
    board.setup("ulimit -f 100")
    said = refused(write_model(tmp_path / "large.onnx", 1))
    assert f"there is no room in {board.temporary}" in said


def test_full_disk(board: Board, tmp_path: Path) -> None:
    """A card of 300 kB: a mount in a namespace of the session's own."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    place = shlex.quote(str(board.temporary))
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none"]
    tried = subprocess.run([*unshare, *mount, board.temporary], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine mounts nothing for its users: {tried.stderr.strip()}")
    board.setup(
        f"exec {shlex.join(unshare)} sh -c {shlex.quote(shlex.join(mount))}' '{shlex.quote(place)}"
        '\' && eval "$SSH_ORIGINAL_COMMAND"; ls -A "$TMPDIR" >&2\''
    )
    said = refused(write_model(tmp_path / "large.onnx", 1))
    assert f"there is no room in {board.temporary}" in said


def test_a_broken_link(board: Board, model: Path) -> None:
    def cut(line: str) -> None:
        if "load 1 of 5" in line:
            for child in psutil.Process(board.process.pid).children():
                child.kill()

    with pytest.raises(GhostEdgeError, match=r"link to board broke in mid-run \(.*\)"):
        bench([model], on=HOST, say=cut)


def test_a_line_cut_short() -> None:
    said: list[str] = []
    text = 'Welcome\nTOKEN {"say": "load 1"}\nTOKEN {"result": {"ro'
    process = subprocess.Popen(["printf", "%s", text], stdout=subprocess.PIPE)
    assert boards._listen(process, "TOKEN ", said.append) == {"say": "load 1"}
    assert said == ["load 1"]
    process.wait()


def test_ctrl_c(board: Board, model: Path) -> None:
    def interrupt(line: str) -> None:
        if "load 1 of 5" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench([model], on=HOST, say=interrupt)
    assert list(board.temporary.iterdir()) == []  # at once: the far end was waited for


def test_a_silent_link(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is heard from here any more, but the connection stays open."""
    source = Path(remote.__file__).read_text()
    monkeypatch.setattr(boards, "BEAT", 100)
    monkeypatch.setattr(boards, "FAREWELL", 1)
    impatient = board.folder / "remote.py"
    impatient.write_text(source.replace("SILENCE = 60", "SILENCE = 1"))
    monkeypatch.setattr(boards, "FAR_END", impatient)
    with pytest.raises(
        GhostEdgeError, match=r"board ended before there was a result \(exit code 1\)"
    ):
        bench([write_model(tmp_path / "slow.onnx", 4)], on=HOST, runs=10_000)


def test_a_model_that_cannot_run(board: Board, tmp_path: Path) -> None:
    model = tmp_path / "damaged.onnx"
    model.write_bytes(write_model(tmp_path / "whole.onnx", 1).read_bytes()[:5000])
    assert f"board could not run it: {model} cannot be run (" in refused(model)


def test_a_python_without_venv(board: Board, model: Path) -> None:
    board.say_python(BARE)
    (board.folder / "venv.py").write_text("raise SystemExit('no ensurepip')")
    board.setup(f"export PYTHONPATH={shlex.quote(str(board.folder))}")
    assert "no venv could be made (no ensurepip): sudo apt install python3-venv" in refused(model)


# The Python that this environment is made of, without its packages.
BARE = f'exec {shlex.quote(os.path.realpath(sys.executable))} "$@"'


def test_a_venv_is_made(board: Board, tmp_path: Path) -> None:
    """Real pip and a real venv; the wheels are zipped from what is installed here."""
    model = write_tflite(tmp_path / "model.tflite", "uint8")
    wheels = tmp_path / "wheels"
    board.say_python(BARE)
    board.setup("export PIP_NO_INDEX=1")
    assert "could not be installed (ERROR: No matching distribution" in refused(model)
    pending = ["ai-edge-litert", "numpy"]
    seen: set[str] = set()
    while pending:
        name = canonicalize_name(pending.pop())
        if name not in seen:
            seen.add(name)
            found = zip_wheel(metadata.distribution(name), wheels)
            pending += [r.name for r in found if not r.marker or r.marker.evaluate({"extra": ""})]
    board.setup(f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={shlex.quote(str(wheels))}")
    said: list[str] = []
    result = bench([model], on=HOST, runs=5, say=said.append)
    assert said[0].startswith("making a venv with numpy, ai-edge-litert")
    assert result["rows"][0]["partitions"] == 1
    assert result["machine"]["versions"]["ai-edge-litert"] == metadata.version("ai-edge-litert")


def zip_wheel(distribution: metadata.Distribution, folder: Path) -> list[Requirement]:
    """Put an installed package back into a wheel; return what it requires."""
    folder.mkdir(exist_ok=True)
    name = distribution.name.replace("-", "_")
    (*_, tag) = re.findall(r"^Tag: (\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    path = folder / f"{name}-{distribution.version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for file in distribution.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(str(distribution.locate_file(file)), str(file))
    return [Requirement(line) for line in distribution.requires or []]
