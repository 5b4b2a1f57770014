"""Makes the pictures of the page, and its icon: `python -m tests.deploy.web_screenshots PAGE`.

PAGE is a folder that `ghostedge deploy web` wrote, of the shipped weights.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from tests.deploy.web_fixtures import DESK, PHONE, ROOT, chromium, served


def save(shot: bytes, file: Path) -> None:
    """Write a PNG of 256 colours, which is a third of the size."""
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, kmeans=8).save(file, optimize=True)


with served(Path(sys.argv[1])) as address, chromium() as browser:
    icon = browser.new_page(viewport={"width": 512, "height": 512})
    icon.goto(f"{address}icon.svg")
    save(icon.screenshot(), ROOT / "deploy/web/icon.png")
    for name, device, photo, scheme in (
        ("phone", PHONE, "cat", "light"),
        ("desk", DESK, "deer", "light"),
        ("phone-dark", PHONE, "deer", "dark"),
    ):
        page = browser.new_page(**device, color_scheme=scheme)
        page.goto(address)
        page.get_by_text("Works offline.").wait_for()
        page.set_input_files("#file", ROOT / f"ghostedge/photos/{photo}.jpg")
        page.locator("#scores").wait_for()
        page.wait_for_timeout(300)  # until the bars have moved
        save(page.screenshot(), ROOT / f"benchmarks/results/web-{name}.png")
