"""The README's pictures of a run's pages, taken by a headless Chromium.

`.venv/bin/python tests/show_dashboard.py runs/demo` writes docs/report.png and docs/aim-*.png.
"""

import io
import sys
from pathlib import Path
from typing import Any

from browser import chromium_page
from PIL import Image
from served import dashboard, open_view

from elastic.report import write_report

DOCS = Path(__file__).parents[1] / "docs"
HEIGHT = 860
VIEWS = {"Training": "aim-training", "Reconstructions": "aim-pairs"}
CHARTS = {"x": 76, "y": 0, "width": 1204, "height": 500}  # of an explorer, without the table


def report_picture(report: Path) -> Image.Image:
    """The report on a desk, and beside it on a phone."""
    parts = []
    for width, heading in ((1180, "World size"), (375, "")):
        with chromium_page(width, HEIGHT) as (page, _):
            page.goto(report.as_uri())
            page.locator("#timeline .main-svg").first.wait_for(state="attached")
            if heading:
                title = page.locator("h2", has_text=heading)
                title.evaluate("(e) => scrollTo(0, e.getBoundingClientRect().top - 14)")
            parts.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    whole = Image.new("RGB", (sum(part.width for part in parts) + 24, HEIGHT), "#888888")
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (parts[0].width + 24, 0))
    return whole


def view_picture(page: Any, name: str) -> Image.Image:
    """What an explorer shows of a saved view, without the table below."""
    open_view(page, name)
    page.locator("path.Line, img[src^='data:image']").first.wait_for(state="attached")
    page.wait_for_function("() => [...document.images].every(i => i.naturalWidth > 0)")
    if page.get_by_text("Skip").count():
        page.get_by_text("Skip").first.click()  # Aim's invitation
    page.wait_for_timeout(2000)  # Aim moves what it draws, and polls for ever
    return Image.open(io.BytesIO(page.screenshot(clip=CHARTS))).convert("RGB")


def keep(picture: Image.Image, name: str) -> None:
    """Write a picture, and say how large it is."""
    path = DOCS / f"{name}.png"
    picture.save(path, optimize=True)
    print(f"{path.relative_to(DOCS.parent)}: {path.stat().st_size:,} bytes")


def main(run_dir: Path) -> None:
    """Write the pictures of one run."""
    keep(report_picture(write_report(run_dir)), "report")
    with dashboard(run_dir) as (address, _), chromium_page(1280, HEIGHT) as (page, _):
        page.goto(address)
        for view, name in VIEWS.items():
            keep(view_picture(page, view), name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
