from __future__ import annotations

import configparser
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import ExifTags, Image

from ghostedge.bundle import SEAL, read_labels, write_manifest
from ghostedge.convert import Bundle, metadata
from ghostedge.data.drawn import drawn_set
from ghostedge.data.images import fit, read_image
from ghostedge.deploy import RECORD, TARGETS, deploy, templates, verify_deployed
from ghostedge.deploy.target import Need
from ghostedge.errors import CheckFailed, GhostEdgeError
from ghostedge.files import sha256
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier
from tests.deploy.web_fixtures import needs_npm
from tests.runtime_fixtures import tflite
from tests.test_cli import contents, run

TRITON = Path(__file__).parents[2] / ".venv-triton/bin/python"
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
    guide = (Path(__file__).parents[2] / "deploy" / "README.md").read_text()
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
    request: pytest.FixtureRequest, tmp_path: Path, target: str
) -> None:
    bundle = request.getfixturevalue("int8_bundle" if target == "microcontroller" else "bundle")
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


@pytest.mark.parametrize(("target", "need"), [(t, n) for t in TARGETS for n in TARGETS[t].needs])
def test_the_flags_that_make_what_is_missing_do_so(
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    need: Need,
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["artefacts"][need.artefact]
    expected = manifest["golden"]["expected"]
    manifest["golden"]["expected"] = [e for e in expected if e["artefact"] != need.artefact]
    (copy / need.artefact).unlink()
    write_manifest(copy, manifest)
    assert run("deploy", target, copy, "-o", tmp_path / "out") == 2
    said = re.search(
        rf"{target} needs {need.artefact}, which .* lacks: export it again with (.*)\.\n",
        capsys.readouterr().err,
    )
    assert said and not (tmp_path / "out").exists()
    assert run("export", "ghostnetv3-small-1.0x", *said[1].split(), "--dry-run") == 0
    assert re.search(rf"^write .*\b{need.artefact}\b", capsys.readouterr().out, re.MULTILINE)


def test_refused(bundle: Bundle, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match=r"no target 'servers'.* Did you mean server"):
        deploy("servers", bundle)
    (copy / "labels.txt").write_text("a\n")
    with pytest.raises(CheckFailed, match=r"labels\.txt"):
        deploy("server", copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(GhostEdgeError, match="`ghostedge deploy` did not make it"):
        deploy("server", bundle, tmp_path / "mine")
    folder = deploy("server", bundle, tmp_path / "out")
    record = json.loads((folder / RECORD).read_text())
    for damaged in ({}, {**record, "bundle": {**record["bundle"], "path": 5}}):
        (folder / RECORD).write_text(json.dumps(damaged))
        for call in (lambda: deploy("server", bundle, folder), lambda: verify_deployed(folder)):
            with pytest.raises(GhostEdgeError, match=r"deploy\.json is damaged"):
                call()


@pytest.fixture(scope="session")
def app(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy("app", bundle, tmp_path_factory.mktemp("deployed") / "app")


class Golden:
    """The golden pictures of a deployed app, and what its models must say of them."""

    def __init__(self, app: Path) -> None:
        said = json.loads((app / "golden" / "golden.json").read_text())
        self.tolerance = said["tolerance"]
        self.pictures, self.scores = {}, {}
        for kind in ("images", "frames"):
            files = [Image.open(app / "golden" / entry["file"]) for entry in said[kind]]
            self.pictures[kind] = np.stack([np.array(file) for file in files])
            self.scores[kind] = np.array([entry["scores"] for entry in said[kind]])
        self.plain = Classifier(app / "assets" / "model_int8.tflite")
        self.camera = Classifier(app / "assets" / "model_int8_camera.tflite")

    def wrong(self, kind: str, found: np.ndarray) -> float:
        """The share of pictures of which any score is off."""
        apart = np.abs(found - self.scores[kind])
        return float((apart.max(1) > self.tolerance).mean())


@pytest.fixture(scope="session")
def golden(app: Path) -> Golden:
    return Golden(app)


def test_the_models_give_the_golden_scores(bundle: Bundle, app: Path, golden: Golden) -> None:
    images, frames = golden.pictures["images"], golden.pictures["frames"]
    assert golden.wrong("images", golden.plain(images)) == 0
    assert golden.wrong("images", golden.camera(images.repeat(3, 1).repeat(3, 2))) == 0
    side = golden.camera.size
    start = (frames.shape[2] - side) // 2
    assert frames.shape[1] == side < frames.shape[2]
    assert golden.wrong("frames", golden.camera(frames[:, :, start : start + side])) == 0
    said = json.loads((app / "golden" / "golden.json").read_text())
    for entry in said["images"] + said["frames"]:
        assert entry["label"] == bundle.manifest["labels"][entry["top1"]]
        assert entry["top1"] == int(np.argmax(entry["scores"]))
    contract = json.loads((app / "assets" / "contract.json").read_text())
    assert contract["labels"] == read_labels(app / "assets" / "labels.txt")
    assert contract["models"]["model_int8_camera.tflite"]["size"] == side
    with np.load(bundle.path / "golden.npz") as file:
        own = {picture.tobytes() for picture in file["images"]}
    assert {picture.tobytes() for picture in images} <= own


# As the table in the app's README has them.
MISTAKES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "BGR": lambda x: x[..., ::-1],
    "divided by 255": lambda x: x / 255,
    "a mean subtracted": lambda x: (x - 127.5) / 127.5,
    "minus 128": lambda x: x ^ 128,
    "planes": lambda x: x.transpose(0, 3, 1, 2).reshape(x.shape),
    "on its side": lambda x: np.rot90(x, 1, (1, 2)),
    "upside down": lambda x: x[:, ::-1, ::-1],
    "mirrored": lambda x: x[:, :, ::-1],
    "video levels": lambda x: 16 + x * (219 / 255),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_images_find_each_mistake(golden: Golden, mistake: str) -> None:
    changed = MISTAKES[mistake](golden.pictures["images"])
    found = golden.plain(np.ascontiguousarray(np.clip(changed, 0, 255).astype(np.uint8)))
    assert golden.wrong("images", found) >= 0.5


def test_golden_frames_find_wrong_cuts_and_resizes(golden: Golden) -> None:
    frames, side = golden.pictures["frames"], golden.camera.size
    squeezed = [np.array(Image.fromarray(frame).resize((side, side))) for frame in frames]
    assert golden.wrong("frames", golden.camera(np.stack(squeezed))) == 1
    # Scores near one hide that a sixth of the picture is another's.
    unsure = golden.scores["frames"].max(1) < 0.95
    apart = np.abs(golden.camera(frames[:, :, :side]) - golden.scores["frames"]).max(1)
    assert unsure.mean() > 0.5 and (apart > golden.tolerance)[unsure].all()
    start, step = (frames.shape[2] - side) // 2, side // golden.plain.size
    skipped = frames[:, step // 2 :: step, start + step // 2 : start + side : step]
    assert golden.wrong("frames", golden.plain(np.ascontiguousarray(skipped))) == 1


def test_the_pages_pixel_arithmetic_gives_the_golden_scores(app: Path, golden: Golden) -> None:
    """Each page's own numbers, on the platform's pixel format made of the golden images."""
    images = golden.pictures["images"]
    red, green, blue = (images[..., i].astype(np.int64) for i in range(3))
    # Android's Bitmap.getPixels: one integer a pixel, alpha first.
    (kotlin,) = (b for b in code(app / "android.md", "kotlin") if "getPixels" in b)
    shifts = [int(n) for n in re.findall(r"input\.put\(\(pixel shr (\d+)\)\.toByte\(\)\)", kotlin)]
    packed = (255 << 24) | (red << 16) | (green << 8) | blue
    read = np.stack([packed >> shift & 255 for shift in shifts], -1).astype(np.uint8)
    assert golden.wrong("images", golden.plain(read)) == 0
    assert "and 0xFF) / 256f" in kotlin
    # iOS: bytes in the order B, G, R, A.
    (swift,) = (b for b in code(app / "ios.md", "swift") if "vImageScale" in b)
    offsets = [int(n) for n in re.findall(r"input\.append\(small\[i \+ (\d)\]\)", swift)]
    bgra = np.stack([blue, green, red, np.full_like(red, 255)], -1).astype(np.uint8)
    assert golden.wrong("images", golden.plain(bgra[..., offsets])) == 0
    assert "Float($0) / 256" in swift
    # Flutter on Android: YCbCr as JFIF defines it; rounding it costs a step or two of a pixel.
    (dart,) = (b for b in code(app / "flutter.md", "dart") if "setPixelRgb" in b)
    formulas = dict(re.findall(r"final ([rgb]) = (y .*);", dart))
    y = np.round(0.299 * red + 0.587 * green + 0.114 * blue)
    cb = np.round(-0.168736 * red - 0.331264 * green + 0.5 * blue)
    cr = np.round(0.5 * red - 0.418688 * green - 0.081312 * blue)
    values = [eval(formulas[name], {"y": y, "cb": cb, "cr": cr}) for name in "rgb"]
    read = np.clip(np.round(np.stack(values, -1)), 0, 255).astype(np.uint8)
    assert np.abs(read.astype(int) - images).max() <= 2
    found, wanted = golden.plain(read), golden.scores["images"]
    best = np.sort(wanted, 1)
    clear = best[:, -1] - best[:, -2] > 0.5  # of a net of few epochs, which a step of a pixel moves
    assert clear.mean() > 0.3 and (found.argmax(1) == wanted.argmax(1))[clear].all()
    assert "step / 256" in dart
    # React Native: the golden test's own bytes, as its page writes them.
    (python,) = code(app / "react-native.md", "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(app)
        exec(python, {})
    pixels = app / "golden" / "pixels.json"
    entries = json.loads(pixels.read_text())["images"]
    pixels.unlink()
    read = np.array([entry["pixels"] for entry in entries], np.uint8).reshape(images.shape)
    np.testing.assert_array_equal(read, images)


GRAMMARS = {
    "kotlin": ("tree_sitter_kotlin", "language"),
    "swift": ("tree_sitter_swift", "language"),
    "dart": ("tree_sitter_dart", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "ts": ("tree_sitter_typescript", "language_typescript"),
    "js": ("tree_sitter_typescript", "language_tsx"),
}


@pytest.mark.parametrize("language", GRAMMARS)
def test_a_real_parser_reads_the_pages(app: Path, language: str) -> None:
    module, function = GRAMMARS[language]
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = tree_sitter.Language(getattr(pytest.importorskip(module), function)())
    parser = tree_sitter.Parser(grammar)
    blocks = [block for page in sorted(app.glob("*.md")) for block in code(page, language)]
    assert blocks
    for block in blocks:
        assert not parser.parse(block.encode()).root_node.has_error, block
        # And it would have noticed: without the last bracket it is no program.
        cut = block.rstrip().rstrip(")}") if block.rstrip()[-1] in ")}" else f"{block}("
        assert parser.parse(cut.encode()).root_node.has_error, cut


def test_every_file_that_the_pages_name_is_there(app: Path) -> None:
    files = {file.name for file in app.rglob("*")} | {"pixels.json"}  # the page says how to make it
    named = set()
    for page in app.glob("*.md"):
        text = page.read_text().replace("import org.json", "")
        named |= set(re.findall(r"[\w-]+\.(?:tflite|txt|json|png|md)\b", text))
        named |= {f"{name}.tflite" for name in re.findall(r"model: String = \"(\w+)\"\)", text)}
        named |= {".".join(n) for n in re.findall(r"Resource: \"(\w+)\", with\w+: \"(\w+)\"", text)}
    assert {"model_int8.tflite", "model_int8_camera.tflite", "labels.txt", "golden.json"} <= named
    assert named <= files, named - files


def changed_manifest(copy: Path, name: str, **entry: Any) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["artefacts"][name] |= entry
    write_manifest(copy, manifest)


def test_app_refuses_what_a_phone_would_get_wrong(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model_int8.tflite"
    entry = json.loads((copy / "manifest.json").read_text())["artefacts"][name]["input"]
    changed_manifest(copy, name, input={**entry, "dtype": "int8"})
    with pytest.raises(GhostEdgeError, match=r"refuse int8.*takes int8: export it again with"):
        deploy("app", copy, tmp_path / "out")
    changed_manifest(copy, name, input={**entry, "shape": [4, *entry["shape"][1:]]})
    for target in ("app", "web", "raspberry-pi"):
        with pytest.raises(GhostEdgeError, match=r"one image at a time.*--batch 1"):
            deploy(target, copy, tmp_path / "out")
    changed_manifest(copy, name, input=entry)
    deploy("app", copy, tmp_path / "right")
    # A model whose metadata ask for a normalisation: MediaPipe would apply it to a float model.
    options = metadata._table("NormalizationOptions", mean=[127.5], std=[127.5])
    unit = metadata._table("ProcessUnit", options_type=1, options=options)
    monkeypatch.setattr(metadata, "_unchanged", lambda: [unit])
    facts = metadata.Facts("n", "v", "a", None, ["a", "b", "c", "d"], PixelContract(32))
    (copy / name).write_bytes(metadata.into_tflite(tflite("float32"), facts, "Measured."))
    changed_manifest(copy, name, sha256=sha256(copy / name))
    with pytest.raises(GhostEdgeError, match=r"mean \[127\.5\] and std \[127\.5\].*raw pixels"):
        deploy("app", copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="session")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy("server", bundle, tmp_path_factory.mktemp("deployed") / "server")


def code(page: Path, language: str) -> list[str]:
    """The blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def odd_pictures(folder: Path) -> list[Path]:
    """Pictures that a bare convert("RGB"), or a resize that sees beyond the square, gets wrong."""
    folder.mkdir()
    noise = np.random.default_rng(1).integers(0, 65536, (70, 95, 4), np.uint16)
    image = Image.fromarray((noise >> 8).astype(np.uint8))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    image.save(folder / "clear.png")
    image.convert("LA").save(folder / "clear_grey.png")
    image.convert("P").save(folder / "clear_palette.png", transparency=7)
    image.convert("RGB").save(folder / "wide.png", exif=turned)
    image.paste((1, 2, 3, 255), (0, 0, 40, 40))
    image.convert("RGB").save(folder / "clear_colour.png", transparency=(1, 2, 3))
    image.convert("CMYK").save(folder / "print.tif")
    image.convert("1").save(folder / "bits.png")
    image.convert("RGB").resize((900, 700)).save(folder / "large.jpg", exif=turned)
    Image.fromarray(noise[..., 0]).save(folder / "deep.png", exif=turned)
    Image.fromarray(noise[..., 0]).save(folder / "deep.tif")
    return sorted(folder.iterdir())


def test_the_servers_page_classifies(
    bundle: Bundle, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = drawn_set(4, 1, seed=3, size=80).pixels[2]
    Image.fromarray(picture).save(tmp_path / "photo.png")
    monkeypatch.chdir(server)
    page: dict[str, Any] = {}
    snippet, _ = code(server / "README.md", "python")
    exec(snippet, page)
    found = page["classify"](page["pixels"](tmp_path / "photo.png")[None])[0]
    model = Classifier(bundle.path / "model.onnx")
    (((label, share),),) = model.predict([tmp_path / "photo.png"], top=1)
    assert page["labels"][found.argmax()] == label
    assert found.max() == pytest.approx(share, abs=1e-5)
    for file in odd_pictures(tmp_path / "odd"):
        pixels = page["pixels"](file)
        np.testing.assert_array_equal(pixels, read_image(file, len(pixels)), file.name)
    # What the page warns of fails its own check.
    wrong = snippet.replace("np.float32)", "np.float32) / 255")
    assert wrong != snippet
    with pytest.raises(AssertionError):
        exec(wrong, {})


@pytest.mark.skipif(not TRITON.exists(), reason="no .venv-triton: `make test` makes it")
def test_tritons_schema_reads_what_onnx_runtime_loads(server: Path) -> None:
    folder = server / "models" / "classifier"
    command = [TRITON, Path(__file__).with_name("triton_client.py"), folder / "config.pbtxt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["name"] == folder.name and config["backend"] == "onnxruntime"
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    for said, found in (
        (config["input"], session.get_inputs()),
        (config["output"], session.get_outputs()),
    ):
        ((said,), (found,)) = said, found
        assert said["name"] == found.name
        assert (said["data_type"], found.type) == ("TYPE_FP32", "tensor(float)")
        assert [int(size) for size in said["dims"]] == found.shape[1:]
        assert isinstance(found.shape[0], str), "the batch axis is free"
    assert config["output"][0]["label_filename"] == "labels.txt"
    labels = read_labels(folder / "labels.txt")
    for batch in (1, int(config["max_batch_size"])):
        given = np.zeros((batch, *map(int, config["input"][0]["dims"])), np.float32)
        (scores,) = session.run(None, {config["input"][0]["name"]: given})
        assert scores.shape == (batch, len(labels))
    wrong = (folder / "config.pbtxt").read_text().replace("TYPE_FP32", "TYPE_FLOAT", 1)
    (server / "wrong.pbtxt").write_text(wrong)
    done = subprocess.run([*command[:2], server / "wrong.pbtxt"], capture_output=True, text=True)
    assert "TYPE_FLOAT" in done.stderr


@pytest.fixture(scope="session")
def board(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy("raspberry-pi", bundle, tmp_path_factory.mktemp("deployed") / "pi")


@pytest.fixture(scope="session")
def program(board: Path) -> ModuleType:
    """The deployed classify.py as a module."""
    spec = importlib.util.spec_from_file_location("classify", board / "classify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def classify(board: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, board / "classify.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=board.parent)


def test_the_boards_program_passes_its_check_and_fails_another(
    bundle: Bundle, board: Path, tmp_path: Path
) -> None:
    done = classify(board, "--check")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] == result["same_class"] == bundle.manifest["golden"]["images"]
    assert result["largest_step"] <= 1
    other = Path(shutil.copytree(board, tmp_path / "other"))
    with np.load(other / "golden.npz") as file:
        golden = dict(file)
    golden["images"] = golden["images"][..., ::-1]
    np.savez(other / "golden.npz", **golden)
    done = classify(other, "--check")
    assert done.returncode == 1 and json.loads(done.stdout)["largest_step"] > 1
    for name, kept in (("golden.npz", 2000), ("golden.npz", 0), ("model_int8.tflite", 2000)):
        (other / name).write_bytes((other / name).read_bytes()[:kept])
        done = classify(other, "--check")
        assert done.returncode == 2 and "copy it again" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_boards_program_names_what_ghostedge_names(
    bundle: Bundle, board: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, pixels in enumerate(drawn_set(4, 1, seed=7, size=80).pixels):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    done = classify(board, folder, folder / "0.png", "--json")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    files = [*sorted(folder.iterdir()), folder / "0.png"]
    assert [line["source"] for line in found] == [str(file) for file in files]
    wanted = Classifier(bundle.path / "model_int8.tflite").predict(files, top=1)
    assert [line["label"] for line in found] == [best[0][0] for best in wanted]
    assert found[0]["fps"] is None and all(line["fps"] > 0 for line in found[1:])
    said = classify(board, folder, "--frames", "2").stdout.splitlines()
    assert len(said) == 2 and said[1].endswith(" fps")
    assert "there is no file none.png" in classify(board, "none.png").stderr


@pytest.mark.parametrize("shape", [(480, 640), (32, 32), (100, 33), (20, 24), (448, 448)])
def test_the_boards_program_resizes_as_the_contract_says(
    program: ModuleType, shape: tuple[int, int]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found, wanted = program.fit(picture, 32), fit(Image.fromarray(picture), 32)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_the_boards_program_reads_pictures_as_the_contract_says(
    program: ModuleType, tmp_path: Path
) -> None:
    for file in odd_pictures(tmp_path / "odd"):
        ((name, pixels),) = program.frames(str(file), 32)
        assert name == str(file)
        apart = np.abs(program.fit(pixels, 32).astype(int) - read_image(file, 32))
        assert apart.max() <= 1, file.name


def test_the_boards_program_skips_what_it_cannot_read_in_a_folder(
    board: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    cut, floats = folder / "cut.jpg", folder / "floats.tif"
    cut.write_bytes((folder / "whole.jpg").read_bytes()[:1000])
    Image.fromarray(noise[..., 0].astype(np.float32)).save(floats)
    (folder / "text.png").write_text("no picture")
    done = classify(board, folder, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["source"] == str(folder / "whole.jpg")
    said = done.stderr.splitlines()
    skipped = [line for line in said if line.startswith("classify: ")]
    names = ["cut.jpg", "floats.tif", "text.png"]
    starts = [f"classify: skipped {folder / name}: " for name in names]
    assert len(skipped) == 3 and all(map(str.startswith, skipped, starts)), said
    assert "of no stated range" in skipped[1] and "Traceback" not in done.stderr


def test_the_boards_program_says_in_a_sentence_what_it_cannot_use(
    board: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for arguments, sentence in (
        ([tmp_path / "text.png"], "classify: cannot read "),
        (["camera:x"], "classify: camera:x is no camera; write camera or a number, "),
        (["camera", "--model", "none.tflite"], "classify: there is no file none.tflite."),
    ):
        done = classify(board, *arguments)
        assert done.returncode == 2
        assert "\n" + sentence in "\n" + done.stderr and "Traceback" not in done.stderr


def test_the_boards_program_reads_a_video_as_rgb(program: ModuleType, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    colours = [(200, 40, 20), (30, 180, 60), (20, 50, 220)]
    file = tmp_path / "colours.avi"
    video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    assert video.isOpened()
    for colour in colours:
        video.write(np.full((48, 64, 3), colour[::-1], np.uint8))  # blue first, as OpenCV has it
    video.release()
    found = [pixels.mean((0, 1)) for _, pixels in program.frames(str(file), 32)]
    np.testing.assert_allclose(found, colours, atol=6)


def test_the_boards_unit_starts_what_is_there(board: Path) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(board / "classifier.service")
    start = unit["Service"]["ExecStart"].split()
    assert start[0].endswith("/.venv/bin/python") and (board / start[1]).is_file()
    # The flags are ones that the program has.
    assert classify(board, *start[2:], "--help").returncode == 0
    assert unit["Install"]["WantedBy"] == "default.target"
