"""The wheel, in environments that hold nothing but what its metadata asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip")


def run(*command: str | Path, cwd: Path) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def closure(own: metadata.Distribution, wanted: list[str]) -> list[metadata.Distribution]:
    """Return the distributions that `wanted` and all that they require come from.

    They are pip's alone: Ray puts a folder of its own packages, psutil's among them, on `sys.path`.
    """
    place = [sysconfig.get_path("purelib")]
    pending, found, seen = [Requirement(text) for text in wanted], {}, set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        (found[name],) = (
            (own,) if name == own.name else metadata.distributions(name=name, path=place)
        )
        assert requirement.specifier.contains(found[name].version), requirement
        for extra in {"", *requirement.extras} - {extra for key, extra in seen if key == name}:
            seen.add((name, extra))
            required = map(Requirement, found[name].requires or [])
            pending += [r for r in required if not r.marker or r.marker.evaluate({"extra": extra})]
    return list(found.values())


def install(wheel: Path, wanted: list[str], folder: Path) -> Path:
    """Make an environment of the wheel and all that `wanted` requires; return its bin folder.

    What pip would download again, gigabytes of it, is linked file by file from the environment at
    hand, where pip chose and put it. What nobody requires stays out.
    """
    venv.create(folder)
    binaries = folder / "bin"
    options = ("--python", binaries / "python", "install", "--no-deps", "--no-index")
    run(*PIP, *options, wheel, cwd=folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (own,) = metadata.distributions(name="ghostedge", path=[str(packages)])
    for distribution in closure(own, wanted):
        for file in distribution.files or []:
            link = packages / file
            if ".." not in file.parts and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(distribution.locate_file(file))
    return binaries


@pytest.fixture(scope="module")
def bundle(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    binaries = install(wheel, ["ghostedge[export]"], tmp_path_factory.mktemp("export"))
    command = (binaries / "ghostedge", "export", "ghostnetv3-small-1.0x", "--int8", "-o", "out")
    run(*command, cwd=folder)
    run(binaries / "ghostedge", "deploy", "server", "out", "-o", "served", cwd=folder)
    return folder / "out"


def test_the_wheel_carries_everything_it_reads(wheel: Path) -> None:
    package = ROOT / "ghostedge"
    expected = {
        f"ghostedge/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    } | {f"ghostedge/recipes/{file.name}" for file in (ROOT / "export").glob("*.toml")}
    expected |= {
        f"ghostedge/deploy/templates/{file.relative_to(ROOT / 'deploy').as_posix()}"
        for file in (ROOT / "deploy").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    assert expected <= names
    assert {f"ghostedge/photos/{n}" for n in ("cat.jpg", "deer.jpg", "LICENCE.md")} <= names
    assert any(name.startswith("ghostedge/weights/ghostnetv3-small-1.0x") for name in names)
    assert any(name.startswith("ghostedge/recipes/") for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "ghostedge/py.typed" in names
    assert "License-Expression: Apache-2.0" in about


def test_the_export_extra_exports_from_another_folder(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["name"] == "ghostnetv3-small-1.0x"
    assert {"model.onnx", "model_fp32.tflite", "model_int8.tflite", "model_int8.onnx"} <= set(
        manifest["artefacts"]
    )


def test_the_base_and_one_runtime_verify_and_predict(
    wheel: Path, bundle: Path, tmp_path: Path
) -> None:
    binaries = install(wheel, ["ghostedge", "ai-edge-litert"], tmp_path / "environment")
    for absent in ("torch", "tensorflow", "onnx", "onnxruntime"):
        find = f"import importlib.util; assert not importlib.util.find_spec({absent!r})"
        run(binaries / "python", "-c", find, cwd=tmp_path)
    run(binaries / "ghostedge", "verify", bundle, cwd=tmp_path)
    # With the templates of the wheel, where nothing of the source tree is at hand.
    run(binaries / "ghostedge", "verify", bundle.with_name("served"), cwd=tmp_path)
    photo = ROOT / "ghostedge/photos/cat.jpg"
    answer = run(
        binaries / "ghostedge", "predict", bundle / "model_int8.tflite", photo, cwd=tmp_path
    )
    assert "cat" in answer.replace("cat.jpg", "")
