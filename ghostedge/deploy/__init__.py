"""The hand-over: a bundle, put into a working starting point for a phone, a board or a server."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import ghostedge
from ghostedge.bundle import SEAL, is_bundle, open_bundle, read_manifest
from ghostedge.deploy import app, microcontroller, raspberry_pi, server, web
from ghostedge.deploy.target import Handover, Need, Target, templates
from ghostedge.errors import CheckFailed, GhostEdgeError, expect, nearest, needing
from ghostedge.files import atomic_directory, atomic_write, sha256
from ghostedge.pixels import frame_side

TARGETS: dict[str, Target] = {
    "app": app.TARGET,
    "microcontroller": microcontroller.TARGET,
    "raspberry-pi": raspberry_pi.TARGET,
    "server": server.TARGET,
    "web": web.TARGET,
}
RECORD = "deploy.json"
"""What was written into a folder, from which bundle."""
FORMAT = 1
UNUSED = ("__pycache__", "node_modules", "package.json", "package-lock.json")
"""What working on a template leaves in it, and what pins its npm packages."""


def deploy(
    target: str,
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a starting point for `target`, one of TARGETS, with a bundle's model in it; return its folder.

    Args:
        output: its folder, "<bundle>-<target>" by default. One that an earlier call wrote is brought up to
            date; files of the user's own in it stay.
        force: overwrite files that the user changed, too.
        say: called with a unified diff for each file that the user and this call would change both, and
            with a line for each changed one that stays.

    The same bundle gives the same bytes. Raises CheckFailed for a bundle that was changed, and
    GhostEdgeError for an unknown target, a bundle that lacks what the target needs, a folder of another
    origin, and a file that the user and this call would change both, unless forced: then nothing is
    written.
    """
    if target not in TARGETS:
        raise GhostEdgeError(
            f"There is no target {target!r}: choose from {', '.join(TARGETS)}.{nearest(target, TARGETS)}"
        )
    source = Path(bundle)
    folder = Path(output or f"{source.resolve().name}-{target}")
    earlier = _earlier(folder, target)
    manifest, golden = open_bundle(source)
    own, contract = _content(target, Handover(source, manifest, golden))
    files = {**own, **contract}
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    before = earlier or {}
    changed = [
        path for path in files if _hash(folder / path) not in (None, before.get(path), hashes[path])
    ]
    # A starting point that is today what it was then has nothing new for the user.
    kept = [path for path in changed if path in own and before.get(path) == hashes[path]]
    clashes = sorted(set(changed) - set(kept))
    if clashes and not force:
        for path in clashes:
            say(_difference(folder / path, files[path]))
        raise GhostEdgeError(
            f"You changed {', '.join(clashes)} in {folder}, so nothing is written: take over what you "
            "want of the new content and move your file away, or lose yours with --force."
        )
    record = {
        "format": FORMAT,
        "ghostedge": ghostedge.__version__,
        "target": target,
        "bundle": {
            "name": manifest["name"],
            "sha256": manifest[SEAL],
            "path": Path(os.path.relpath(source, folder)).as_posix(),
        },
        "files": {
            path: {"sha256": hashes[path], "contract": path in contract} for path in sorted(files)
        },
    }
    if not force:
        for path in kept:
            say(f"Kept {folder / path}, which you changed and which has nothing new.")
            del files[path]
    files[RECORD] = f"{json.dumps(record, indent=1)}\n".encode()
    if earlier is None:
        with atomic_directory(folder, lambda path: False) as fresh:
            _write(fresh, files)
        return folder
    for path, digest in earlier.items():
        if path not in hashes and _hash(folder / path) == digest:
            (folder / path).unlink()
    _write(folder, files)
    return folder


def _content(target: str, handover: Handover) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the files made of templates, and those that are the bundle's or computed of it."""
    for need in TARGETS[target].needs:
        _check_need(target, need, handover)
    more, contract = TARGETS[target].fill(handover)
    for need in TARGETS[target].needs:
        contract[need.path] = (handover.bundle / need.artefact).read_bytes()
    with needing("export"):
        import jinja2
    folder = templates(target)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(("html.jinja", "svg.jinja"), default=False),
    )
    context = {
        "name": handover.manifest["name"],
        "bundle": handover.manifest[SEAL],
        "ghostedge": ghostedge.__version__,
        "labels": handover.labels,
        "size": handover.size,
        "manifest": handover.manifest,
        **more,
    }
    made = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if not file.is_file() or set(path.parts) & set(UNUSED):
            continue
        if path.suffix == ".jinja":
            text = environment.get_template(path.as_posix()).render(context)
            made[path.with_suffix("").as_posix()] = text.encode()
        else:
            made[path.as_posix()] = file.read_bytes()
    return made, contract


def _check_need(target: str, need: Need, handover: Handover) -> None:
    made_by = need.made_by.format(camera=frame_side(handover.size))
    again = f"export it again with {made_by}."
    found = handover.manifest["artefacts"].get(need.artefact)
    if found is None:
        raise GhostEdgeError(
            f"{target} needs {need.artefact}, which {handover.bundle} lacks: {again}"
        )
    dtype = found["input"]["dtype"]
    if need.dtype not in (None, dtype):
        raise GhostEdgeError(
            f"{target} needs {need.artefact} with {need.dtype} input, as {need.because}; that of "
            f"{handover.bundle} takes {dtype}: {again}"
        )
    batch = found["input"]["shape"][0]
    if batch not in (None, 1):  # None: free
        raise GhostEdgeError(
            f"{target} needs {need.artefact} for one image at a time; that of {handover.bundle} "
            f"takes {batch}: export it again with --batch 1."
        )


def _earlier(folder: Path, target: str) -> dict[str, str] | None:
    """Return the hashes of what an earlier call wrote, None for a new or empty folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        raise GhostEdgeError(
            f"{folder} exists and `ghostedge deploy` did not make it: name another folder with --output."
        )
    record = _read_record(folder)
    if record["target"] != target:
        raise GhostEdgeError(
            f"{folder} holds the target {record['target']}: name another folder with --output."
        )
    return {path: entry["sha256"] for path, entry in record["files"].items()}


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        expect(record["format"] == FORMAT, f"its format is {record['format']}")
        expect(isinstance(record["target"], str), "target")
        expect({"name", "sha256", "path"} == set(record["bundle"]), "bundle")
        expect(all(isinstance(value, str) for value in record["bundle"].values()), "bundle")
        for path, entry in record["files"].items():
            inside = PurePosixPath(path)
            expect(not inside.is_absolute() and ".." not in inside.parts, f"{path} lies outside")
            expect({"sha256", "contract"} == set(entry), path)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise GhostEdgeError(
            f"{file} is damaged ({error!r}): deploy into another folder."
        ) from error
    return record


def _hash(file: Path) -> str | None:
    return sha256(file) if file.is_file() else None


def _difference(file: Path, content: bytes) -> str:
    """Return a unified diff from the user's file to ours."""
    try:
        old, new = (data.decode().splitlines() for data in (file.read_bytes(), content))
    except UnicodeDecodeError:
        return f"Binary file {file} was changed."
    return "\n".join(difflib.unified_diff(old, new, str(file), "new", lineterm=""))


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write each file in one step, the record last: the same call again mends a killed one."""
    for path, content in files.items():
        atomic_write(folder / path, content)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What `verify_deployed` found. yours: template files that the user changed or took away.

    bundle: the one that was compared with, None where it is not at its old place.
    """

    target: str
    name: str
    yours: list[str]
    bundle: Path | None


def is_deployed(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `deploy` wrote."""
    return (Path(path) / RECORD).is_file()


def verify_deployed(
    path: str | os.PathLike[str], bundle: str | os.PathLike[str] | None = None
) -> Deployed:
    """Check that a folder that `deploy` wrote still holds the models and contract of its bundle.

    bundle: by default the one at the place where it was, if there still is one.

    Raises CheckFailed for a model or contract file that was changed, and for a bundle that is
    another one by now; GhostEdgeError for a damaged record and where `bundle` is none.
    """
    folder = Path(path)
    record = _read_record(folder)
    yours = []
    for name, entry in record["files"].items():
        if _hash(folder / name) == entry["sha256"]:
            continue
        if entry["contract"]:
            raise CheckFailed(
                f"{name} in {folder} is not the file that was deployed (its SHA-256 differs): restore "
                f"it, or run `ghostedge deploy {record['target']}` again with --force."
            )
        yours.append(name)
    made_from = record["bundle"]
    place = Path(os.path.normpath(folder / made_from["path"])) if bundle is None else Path(bundle)
    found = place if bundle is not None or is_bundle(place) else None
    if found is not None and read_manifest(found).get(SEAL) != made_from["sha256"]:
        raise CheckFailed(
            f"{folder} was made of another bundle than the one that is now at {found}: run "
            f"`ghostedge deploy {record['target']} {found} -o {folder}` to bring it up to date."
        )
    return Deployed(record["target"], made_from["name"], yours, found)
