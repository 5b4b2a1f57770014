"""The deployed page in a real Chromium, against LiteRT and Pillow in Python."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, expect

from ghostedge.convert import Bundle
from ghostedge.data.drawn import draw, drawn_set
from ghostedge.data.images import fit
from ghostedge.deploy import deploy, web
from ghostedge.errors import GhostEdgeError
from ghostedge.runtime import Classifier
from tests.deploy.web_fixtures import DESK, PHONE, chromium, needs_chromium, needs_npm, served
from tests.export_fixtures import furthest

pytestmark = [needs_npm, needs_chromium]

DEVICES = pytest.mark.parametrize("device", [PHONE, DESK], ids=["phone", "desk"])
FIGURE = "cross"
"""What the camera sees."""


@pytest.fixture(scope="module")
def site(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy("web", bundle, tmp_path_factory.mktemp("web") / "page")


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as found:
        yield found


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Classifier:
    return Classifier(bundle.path / web.MODEL)


@pytest.fixture(scope="module")
def frame(model: Classifier) -> Image.Image:
    """A drawn picture that the model is sure of, between grey margins, which the crop takes off."""
    size = 480
    figures = [draw(FIGURE, f"camera/{i}", size) for i in range(20)]
    scores = model(np.stack([fit(Image.fromarray(f), model.size) for f in figures]))
    surest = int(scores[:, model.labels.index(FIGURE)].argmax())
    frame = Image.new("RGB", (640, size), "grey")
    frame.paste(Image.fromarray(figures[surest]), (80, 0))
    return frame


@pytest.fixture(scope="module")
def browser(frame: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    film = tmp_path_factory.mktemp("camera") / "film.mjpeg"
    frame.save(film, "JPEG", quality=95)
    with chromium(
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-video-capture={film}",
    ) as found:
        yield found


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Any]:
    """A function that opens the page on a device; nothing fails there, and no other host is asked."""
    contexts, asked, wrong = [], [], []

    def open_page(device: dict[str, Any] = DESK) -> Page:
        contexts.append(browser.new_context(**device))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("filechooser", lambda chooser: None)  # from now on Chromium asks here
        page.on("console", lambda line: "Policy" in line.text and wrong.append(line.text))
        page.on("pageerror", lambda error: wrong.append(error.message))
        page.goto(address)
        page.get_by_role("button", name="Choose picture", disabled=False).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert all(url.startswith((address, "blob:")) for url in asked)
    assert wrong == []


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{"compress_level": 1, **options})
    return file.getvalue()


def upload(page: Page, content: bytes) -> None:
    file = {"name": "picture", "mimeType": "image/png", "buffer": content}
    page.set_input_files("#file", files=[file])


def shown(page: Page) -> list[tuple[str, str]]:
    rows = page.get_by_role("list", name="Most probable classes").get_by_role("listitem").all()
    return [
        (row.locator(".label").inner_text(), row.locator(".value").inner_text()) for row in rows
    ]


def as_shown(model: Classifier, pixels: np.ndarray) -> list[tuple[str, str]]:
    (row,) = model.predict([pixels])
    return [(label, f"{100 * score:.1f}%") for label, score in row]


def in_page(page: Page, body: str, given: list[bytes]) -> Any:
    """Run the body of a function of `given`, an array of byte arrays, in the page.

    All goes as text there and back, because Playwright wraps each number of an array.
    """
    function = f"""async (texts) => {{
      const given = texts.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
      const work = async () => {{ {body} }};
      return JSON.stringify(await work());
    }}"""
    return json.loads(page.evaluate(function, [base64.b64encode(part).decode() for part in given]))


def pixels_of(page: Page, files: list[bytes], size: int) -> np.ndarray:
    """Return what reaches the model of picture files, uint8 (N, size, size, 3)."""
    body = """
    const { decode, pixelsOf } = await import('./app.js');
    const found = [];
    for (const file of given) found.push([...pixelsOf(await decode(new Blob([file])))]);
    return found;
    """
    found = in_page(page, body, files)
    return np.array(found, np.uint8).reshape(-1, size, size, 3)


def test_the_scripts_parse(site: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    module = Path(shutil.copy(site / "app.js", tmp_path / "app.mjs"))
    for script in (module, site / "sw.js", site / "version.js"):
        subprocess.run([node, "--check", script], check=True)


def test_scores_are_the_interpreters(opened: Any, bundle: Bundle, model: Classifier) -> None:
    golden = np.load(bundle.path / "golden.npz")
    drawn = drawn_set(4, 15, seed=3).pixels
    images = np.concatenate([golden["images"], drawn])
    expected = np.concatenate([golden[f"{web.MODEL}:default"], model.raw(drawn)]).astype(int)
    body = """
    const { best, classify } = await import('./app.js');
    const found = [];
    for (const pixels of given) found.push((await classify(pixels)).scores);
    return [found, found.map((scores) => best(scores)[0])];
    """
    found, first = in_page(opened(), body, [pixels.tobytes() for pixels in images])
    steps = np.rint(np.array(found) / model.step).astype(int)
    top = np.sort(expected, 1) * model.step
    clear = top[:, -1] - top[:, -2] >= 0.1
    assert clear.sum() > 30
    assert (steps.argmax(1) == expected.argmax(1))[clear].all()
    assert np.array_equal(first, steps.argmax(1))
    bound = furthest(bundle.path / web.MODEL, steps=2)
    assert np.abs(steps - expected).max() * model.step <= bound
    exact = float((steps == expected).mean())
    print(f"LiteRT.js against LiteRT: {exact:.2%} of {expected.size} scores are exact")
    # With LiteRT.js 2.5.3, LiteRT 2.1.0 and x86 all are, or all but those of one image: the weights that
    # a CPU trains decide.
    assert exact > 0.9


def test_onnxruntime_web_finds_the_same_classes(
    browser: Browser, bundle: Bundle, tmp_path: Path
) -> None:
    with tarfile.open(fileobj=io.BytesIO(web.package("onnxruntime-web"))) as archive:
        for name in (
            "ort.wasm.bundle.min.mjs",
            "ort-wasm-simd-threaded.mjs",
            "ort-wasm-simd-threaded.wasm",
        ):
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None
            (tmp_path / name).write_bytes(member.read())
    shutil.copy(bundle.path / "model_int8.onnx", tmp_path)
    (tmp_path / "index.html").write_text("<!doctype html>")
    images = drawn_set(4, 15, seed=3).pixels
    model = Classifier(bundle.path / "model.onnx")  # int8's own sums may saturate on this CPU
    expected = model(images)
    body = f"""
    const ort = await import('./ort.wasm.bundle.min.mjs');
    ort.env.wasm.numThreads = 1;
    const session = await ort.InferenceSession.create('./model_int8.onnx');
    const shape = [{len(images)}, 3, {model.size}, {model.size}];
    const input = new ort.Tensor('float32', Float32Array.from(given[0]), shape);
    const output = (await session.run({{[session.inputNames[0]]: input}}))[session.outputNames[0]];
    return [...output.data];
    """
    with served(tmp_path) as address:
        page = browser.new_page()
        page.goto(address)
        found = in_page(page, body, [images.transpose(0, 3, 1, 2).tobytes()])
        page.close()
    found = np.array(found).reshape(expected.shape)
    top = np.sort(expected, 1)
    clear = top[:, -1] - top[:, -2] >= 0.1
    same = found.argmax(1) == expected.argmax(1)
    print(
        f"onnxruntime-web: {same.mean():.2%} same class, {np.abs(found - expected).max():.3g} apart"
    )
    assert clear.sum() > 30 and same[clear].all()


def test_pixels_are_pillows(opened: Any, model: Classifier) -> None:
    """Of lossless pictures every byte, at any size and shape."""
    random = np.random.default_rng(0)
    shapes = [(32, 32), (9, 20), (33, 47), (64, 64), (301, 200), (640, 480), (700, 1300)]
    pictures = [
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes
    ]
    found = pixels_of(opened(), [encoded(picture) for picture in pictures], model.size)
    for picture, pixels in zip(pictures, found, strict=True):
        np.testing.assert_array_equal(pixels, fit(picture, model.size))


def test_transparency_is_over_white(opened: Any, model: Classifier) -> None:
    clear = Image.new("RGBA", (50, 40), (255, 0, 0, 0))
    (pixels,) = pixels_of(opened(), [encoded(clear)], model.size)
    assert (pixels == 255).all()


def test_turned_photos(opened: Any, model: Classifier, frame: Image.Image) -> None:
    """All eight EXIF orientations, with the JPEG decoders' differences of a step or so."""
    files = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(encoded(frame, "JPEG", quality=90, exif=exif))
    found = pixels_of(opened(), files, model.size).astype(int)
    expected = np.stack(
        [fit(ImageOps.exif_transpose(Image.open(io.BytesIO(f))), model.size) for f in files]
    )
    assert len({pixels.tobytes() for pixels in expected}) == 8
    print(f"JPEG: {(found == expected).mean():.2%} of the bytes are Pillow's")
    assert np.abs(found - expected).max() <= 2


@DEVICES
def test_a_picture_from_a_file(
    opened: Any, model: Classifier, frame: Image.Image, device: dict[str, Any]
) -> None:
    page = opened(device)
    for size in ((40, 40), (640, 480), (2000, 1500)):
        picture = frame.resize(size)
        upload(page, encoded(picture))
        expected = as_shown(model, fit(picture, model.size))
        expect(page.get_by_role("status")).to_have_text(", ".join(expected[0]))
        assert shown(page) == expected
    assert float(page.locator("#model-time").inner_text().removesuffix(" ms")) > 0
    wide, high = page.evaluate("[document.body.scrollWidth, document.body.scrollHeight]")
    assert wide <= device["viewport"]["width"]
    assert high <= device["viewport"]["height"]  # nothing is below the fold
    box = page.locator("#stage").bounding_box()
    assert abs(box["width"] - box["height"]) < 1
    if "has_touch" in device:
        for button in page.get_by_role("button").all():
            assert button.bounding_box()["height"] >= 44
        with page.expect_file_chooser():
            page.get_by_role("button", name="Choose picture").tap()


def test_keyboard(opened: Any) -> None:
    page = opened()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Choose picture")).to_be_focused()
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Use camera")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Stop camera", pressed=True)).to_be_focused()


@DEVICES
def test_the_camera(opened: Any, device: dict[str, Any]) -> None:
    page = opened(device)
    page.get_by_role("button", name="Use camera").click()
    expect(page.get_by_role("status")).to_have_text(FIGURE)  # said after a second
    assert shown(page)[0][0] == FIGURE
    page.get_by_role("button", name="Stop camera").click()
    expect(page.get_by_role("button", name="Use camera", pressed=False)).to_be_visible()
    assert not page.evaluate("document.querySelector('video').srcObject.active")


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_paste_and_drop(opened: Any, model: Classifier, frame: Image.Image, event: str) -> None:
    page = opened()
    kind = {"paste": "ClipboardEvent", "drop": "DragEvent"}[event]
    body = f"""
    const data = new DataTransfer();
    data.items.add(new File([given[0]], 'picture.png', {{type: 'image/png'}}));
    const options = {{clipboardData: data, dataTransfer: data, bubbles: true, cancelable: true}};
    document.body.dispatchEvent(new {kind}('{event}', options));
    return true;
    """
    in_page(page, body, [encoded(frame)])
    expected = as_shown(model, fit(frame, model.size))
    expect(page.get_by_role("status")).to_have_text(", ".join(expected[0]))
    assert shown(page) == expected


def test_what_cannot_be_read_or_used_is_said(opened: Any) -> None:
    page = opened()
    upload(page, b"no picture")
    expect(page.get_by_role("status")).to_contain_text("cannot read that file")
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error()); }"
    )
    page.get_by_role("button", name="Use camera").click()
    expect(page.get_by_role("status")).to_contain_text("no camera")


def test_the_policy_allows_no_other_host(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    refused = page.evaluate("""() => new Promise((done) => {
      document.onsecuritypolicyviolation = (event) => done(event.effectiveDirective);
      fetch('http://127.0.0.1:9/').catch(() => null);
    })""")
    assert refused == "connect-src"
    page.close()


def test_offline_after_the_first_load(
    browser: Browser, site: Path, model: Classifier, frame: Image.Image, tmp_path: Path
) -> None:
    folder = shutil.copytree(site, tmp_path / "page")
    expected = as_shown(model, fit(frame, model.size))
    context = browser.new_context()
    page = context.new_page()
    with served(folder) as address:
        page.goto(address)
        expect(page.get_by_text("Works offline.")).to_be_visible()
        # Another deployment takes the place of the first, as a whole.
        for name, old, new in (("version.js", "= ", "= 2 + "), ("model.json", FIGURE, "plus")):
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace(old, new))
        page.reload()
        page.wait_for_function("async () => (await caches.keys()).join().includes(' 2')")
        page.wait_for_function("async () => (await caches.keys()).length === 1")
    for other in ("index.html", "?utm_source=x", ""):  # the server is gone
        page.goto(address + other)
    page.get_by_role("button", name="Choose picture", disabled=False).wait_for()
    upload(page, encoded(frame))
    share = expected[0][1]
    expect(page.get_by_role("status")).to_have_text(f"plus, {share}")
    assert shown(page) == [("plus", share), *expected[1:]]
    context.close()


def test_npm_packages_are_the_pinned_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "ghostedge/npm/litertjs-wasm-utils-2.5.3.tgz"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    npm = tmp_path / "npm"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GhostEdgeError, match=r"npm is not installed: install Node\.js"):
        web.package("@litertjs/wasm-utils")
    npm.write_text(f"#!/bin/sh\necho other > {kept.name}\n")
    npm.chmod(0o755)
    with pytest.raises(GhostEdgeError, match="not what was tried and pinned"):
        web.package("@litertjs/wasm-utils")
    assert not kept.exists()
    npm.write_text("#!/bin/sh\necho no route >&2\nexit 1\n")
    with pytest.raises(GhostEdgeError, match=r"npm cannot fetch .* \(no route\)"):
        web.package("@litertjs/wasm-utils")
