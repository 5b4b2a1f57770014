"""One export on another Python, with the other set of pinned versions."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

GHOSTEDGE = Path(__file__).parents[1] / ".venv-other/bin/ghostedge"


@pytest.mark.skipif(
    not GHOSTEDGE.exists(),
    reason="no .venv-other: `make test` makes it where a Python for the other pin set runs",
)
def test_exports_and_verifies_on_another_python(tmp_path: Path) -> None:
    for arguments in ("export ghostnetv3-small-1.0x --int8 -o out", "verify out"):
        command = [GHOSTEDGE, *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    versions = json.loads((tmp_path / "out/manifest.json").read_text())["versions"]
    assert versions["onnx2tf"] != version("onnx2tf")
