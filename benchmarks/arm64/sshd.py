"""A real arm64 sshd on loopback, to try `ghostedge bench --on` with everything but the board.

    python benchmarks/arm64/sshd.py [cortex-a72]

Prints an ssh config to use and serves until Ctrl-C. Needs what emulator.py needs, Debian's
qemu-user-static, and binfmt_misc: it mounts that and registers arm64 there, where it is not yet.
All mounts of the board's own are in a namespace, and go with the process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import emulator

STATIC = "/usr/bin/qemu-aarch64-static"
PACKAGES = (
    *("bash", "coreutils", "dash", "openssh-server", "openssh-sftp-server", "procps"),
    *("python3-minimal", "python3-venv", *emulator.PACKAGES),
)
MERGED = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# The first 20 bytes of an arm64 ELF file, and which of their bits count; F: opened once, for chroots.
MAGIC = rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey /etc/ssh/host
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
Subsystem sftp /usr/lib/openssh/sftp-server
SetEnv QEMU_CPU={cpu}
"""
START = """
set -e
mount -t proc proc proc
mount --bind board/proc/cpuinfo proc/cpuinfo
mount --bind board/sys sys
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin QEMU_CPU={cpu} chroot . /usr/sbin/sshd -D -e -f /etc/ssh/board
"""


def unavailable() -> str | None:
    """Return why there is no arm64 sshd on this machine, None where there can be one."""
    if os.getuid() != 0:
        return "the arm64 sshd needs root"
    if not Path(STATIC).exists():
        return f"there is no {STATIC}: apt-get install qemu-user-static"
    return emulator.unavailable()


def register() -> None:
    """Let this machine's kernel run arm64 programs by qemu, in a chroot, too."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    if not any(BINFMT.glob("*aarch64*")):
        line = b":ghostedge-aarch64:M::" + MAGIC + b":" + MASK + b":" + STATIC.encode() + b":F"
        (BINFMT / "register").write_bytes(line)


def root_with_wheels() -> Path:
    """Return a root with an ssh server and the wheels, made where it is not there yet."""
    folder = emulator.set_up()
    root = folder.with_name(f"{folder.name}-sshd")
    if not root.exists():
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            made = emulator.debian_root(Path(scratch, "root"), PACKAGES, MERGED)
            packages = made / "usr/lib/python3/dist-packages"
            shutil.copytree(folder / "site", packages, dirs_exist_ok=True)
            made.replace(root)
    return root


@contextlib.contextmanager
def serving(cpu: str) -> Iterator[Path]:
    """Serve a board with `cpu`; yield the ssh config of a Host named board, whose user is pi."""
    register()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = folder / "root"
        # Each board writes into a copy of its own.
        subprocess.run(["cp", "-a", root_with_wheels(), root], check=True)
        emulator.board_files(root / "board", emulator.BOARDS[cpu])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        _people(root, folder, port, cpu)
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        log = (folder / "sshd.log").open("wb")
        with (
            log,
            subprocess.Popen(
                [*command, START.format(cpu=cpu)], cwd=root, stderr=log, start_new_session=True
            ) as process,
        ):
            try:
                for _ in range(100):
                    with (
                        contextlib.suppress(OSError),
                        socket.create_connection(("127.0.0.1", port)),
                    ):
                        break
                    if process.poll() is not None:
                        raise RuntimeError((folder / "sshd.log").read_text())
                    time.sleep(0.2)
                yield folder / "config"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)


def _people(root: Path, folder: Path, port: int, cpu: str) -> None:
    """Write who may log in, the keys, and what both ends of ssh read."""
    etc, home = root / "etc", root / "home/pi"
    for path, text in {
        etc / "passwd": "root:x:0:0:root:/root:/bin/bash\n"
        "sshd:x:100:65534::/run/sshd:/usr/sbin/nologin\npi:x:1000:1000:Pi:/home/pi:/bin/bash\n",
        etc / "group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\npi:x:1000:\n",
        etc / "shadow": "root:*:19000:0:99999:7:::\npi:*:19000:0:99999:7:::\n",
        etc / "ssh/board": CONFIG.format(port=port, cpu=cpu),
    }.items():
        path.write_text(text)
    for place in ("run/sshd", "proc", "sys", "dev", "tmp", "var/tmp", "home/pi/.ssh"):
        (root / place).mkdir(parents=True, exist_ok=True)
    for place in ("tmp", "var/tmp"):
        (root / place).chmod(0o1777)
    (home / ".ssh").chmod(0o700)
    for key in (etc / "ssh/host", folder / "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.copy(folder / "key.pub", home / ".ssh/authorized_keys")
    for path in (home, home / ".ssh", home / ".ssh/authorized_keys"):
        os.chown(path, 1000, 1000)
    kind, public, *_ = (etc / "ssh/host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {public}\n")
    (folder / "config").write_text(
        f"Host board\n HostName 127.0.0.1\n Port {port}\n User pi\n IdentityFile {folder}/key\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {folder}/known_hosts\n"
    )


if __name__ == "__main__":
    reason = unavailable()
    if reason is not None:
        sys.exit(f"sshd: {reason}.")
    start = time.perf_counter()
    with serving(sys.argv[1] if len(sys.argv) > 1 else "cortex-a72") as config:
        print(f"Serving after {time.perf_counter() - start:.0f} s; Ctrl-C ends it. Its ssh config:")
        print(f"\nInclude {shlex.quote(str(config))}\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
