"""A deployed page on a local server, and Debian's Chromium to open it with."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[2]
NPM = ROOT / ".cache/ghostedge/npm"
"""Where `make test` has npm put the pinned packages."""
CHROMIUM = shutil.which("chromium")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESK = {"viewport": {"width": 1280, "height": 800}}

needs_npm = pytest.mark.skipif(
    not NPM.is_dir(),
    reason="no npm packages in .cache: `make test` fetches them where npm is installed",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium (.ci/system-packages.sh lists the packages)"
)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # a page that was closed while it loaded
            super().handle_one_request()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as `python -m http.server` does, until the end; yield its address."""
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@contextlib.contextmanager
def chromium(*flags: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox, because CI is root in a container and opens its own pages only.
        yield playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *flags], chromium_sandbox=False
        )
