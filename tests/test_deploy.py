from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from ghostedge.bundle import SEAL, write_manifest
from ghostedge.convert import Bundle
from ghostedge.deploy import RECORD, TARGETS, deploy, templates, verify_deployed
from ghostedge.errors import CheckFailed, GhostEdgeError
from tests.test_cli import contents, run
from tests.web_fixtures import needs_npm

MODEL = "models/classifier/1/model.onnx"


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def renamed(copy: Path) -> Path:
    """Make the bundle another one: all that names it changes."""
    manifest = json.loads((copy / "manifest.json").read_text())
    write_manifest(copy, {**manifest, "name": "another"})
    return copy


def test_every_target_has_templates_and_a_row_in_the_guide() -> None:
    guide = (Path(__file__).parents[1] / "deploy" / "README.md").read_text()
    for name in TARGETS:
        assert (templates(name) / "README.md.jinja").is_file()
        assert f"\n| `{name}` | " in guide


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", "--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in TARGETS)


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=needs_npm if name == "web" else ()) for name in TARGETS]
)
def test_the_same_bytes_twice_and_no_picture_of_the_users(
    bundle: Bundle, tmp_path: Path, target: str
) -> None:
    first, second = (deploy(target, bundle, tmp_path / name) for name in "ab")
    assert contents(first) == contents(second)
    record = json.loads((first / RECORD).read_text())
    assert record["bundle"]["sha256"] == bundle.manifest[SEAL]
    assert set(record["files"]) | {RECORD} == {
        file.relative_to(first).as_posix() for file in first.rglob("*") if file.is_file()
    }
    deploy(target, bundle, first)
    assert contents(first) == contents(second)
    assert verify_deployed(first).yours == []


def test_what_the_user_changed_stays(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert run("deploy", "server", copy, "-o", folder) == 0
    page, own = folder / "README.md", folder / "notes.txt"
    ours = page.read_text()
    page.write_text(f"{ours}mine\n")
    own.write_text("mine too\n")
    assert run("deploy", "server", copy, "-o", folder) == 0
    assert "Kept" in capsys.readouterr().out
    assert page.read_text() == f"{ours}mine\n"
    renamed(copy)
    before = contents(folder)
    assert run("deploy", "server", copy, "-o", folder) == 2
    printed = capsys.readouterr()
    assert "\n-mine\n" in printed.out and "+# another" in printed.out
    assert printed.err.startswith("ghostedge: You changed README.md in")
    assert contents(folder) == before
    assert run("deploy", "server", copy, "-o", folder, "--force") == 0
    assert page.read_text().startswith("# another")
    assert own.read_text() == "mine too\n"


def test_a_changed_model_is_not_overwritten_unasked(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = deploy("server", bundle, tmp_path / "out")
    (folder / MODEL).write_bytes(b"\xff another")
    with pytest.raises(CheckFailed, match=r"model\.onnx in .* is not the file that was deployed"):
        verify_deployed(folder)
    assert run("deploy", "server", bundle.path, "-o", folder) == 2
    assert "Binary file" in capsys.readouterr().out
    deploy("server", bundle, folder, force=True)
    assert verify_deployed(folder).bundle is not None


def test_what_is_no_longer_made_goes_unless_changed(bundle: Bundle, tmp_path: Path) -> None:
    folder = deploy("server", bundle, tmp_path / "out")
    record = json.loads((folder / RECORD).read_text())
    for name in ("old.txt", "mine.txt"):
        (folder / name).write_text(name)
        record["files"][name] = dict(record["files"]["README.md"])
    record["files"]["old.txt"]["sha256"] = hashlib.sha256(b"old.txt").hexdigest()
    (folder / RECORD).write_text(json.dumps(record))
    deploy("server", bundle, folder)
    assert not (folder / "old.txt").exists()
    assert (folder / "mine.txt").exists()


def test_verify_compares_with_the_bundle(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = deploy("server", copy, tmp_path / "out")
    assert run("verify", folder) == 0
    moved = copy.rename(tmp_path / "elsewhere")
    assert run("verify", folder) == 0
    assert "--bundle names its new place" in capsys.readouterr().out
    assert run("verify", folder, "--bundle", moved) == 0
    assert run("verify", folder, "--bundle", renamed(moved)) == 1
    assert "of another bundle than the one that is now at" in capsys.readouterr().err
    assert run("verify", moved, "--bundle", moved) == 2


def test_refused(bundle: Bundle, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match=r"no target 'servers'.* Did you mean server"):
        deploy("servers", bundle)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["artefacts"]["model.onnx"]
    manifest["golden"]["expected"] = [
        entry for entry in manifest["golden"]["expected"] if entry["artefact"] != "model.onnx"
    ]
    (copy / "model.onnx").unlink()
    write_manifest(copy, manifest)
    with pytest.raises(GhostEdgeError, match=r"server needs model\.onnx.* --recipe server"):
        deploy("server", copy, tmp_path / "out")
    (copy / "labels.txt").write_text("a\n")
    with pytest.raises(CheckFailed, match=r"labels\.txt"):
        deploy("server", copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(GhostEdgeError, match="`ghostedge deploy` did not make it"):
        deploy("server", bundle, tmp_path / "mine")
    folder = deploy("server", bundle, tmp_path / "out")
    (folder / RECORD).write_text("{}")
    for call in (lambda: deploy("server", bundle, folder), lambda: verify_deployed(folder)):
        with pytest.raises(GhostEdgeError, match=r"deploy\.json is damaged"):
            call()
