"""A headless Chromium with an empty profile, for tests and pictures of pages."""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--autoplay-policy=no-user-gesture-required",
)

_HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or not _HAS_PLAYWRIGHT,
    reason="no playwright (an extra: dev)" if CHROMIUM else "no chromium (Debian: chromium)",
)


class Told:
    """What a page has complained about, and what it has asked of other hosts."""

    def __init__(self, page: Any) -> None:
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:")):
            self.outside.append(request.url)


@contextmanager
def chromium_page(width: int, height: int = 900) -> Iterator[tuple[Any, Told]]:  # Any: playwright
    """A page of so many CSS pixels, and what it tells; the browser ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            Path(profile) / "empty",
            executable_path=CHROMIUM,
            args=list(_FLAGS),
            viewport={"width": width, "height": height},
        )
        try:
            page = context.pages[0]
            page.set_default_timeout(120_000)  # a busy machine is no fault of a page
            yield page, Told(page)
        finally:
            context.close()
