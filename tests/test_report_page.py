"""The report in a real browser, on a desk, on a phone and on paper."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Told, chromium_page, needs_chromium
from written_run import HOSTILE, write_run

from elastic.report import write_report

pytestmark = needs_chromium

# A plot without points has axes all the same; these are what is drawn of the points.
_MARKS = "(p) => p.querySelectorAll('.trace path.js-line, .trace .point, .barlayer .point').length"
_WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir)
    return write_report(run_dir)


@pytest.fixture(params=[1280, 375], ids=["desk", "phone"])
def opened(request: pytest.FixtureRequest, report: Path) -> Iterator[tuple[Any, Told]]:
    with chromium_page(request.param) as (page, told):
        page.goto(report.as_uri())
        yield page, told


def test_the_page_shows_plots_words_and_films_and_never_scrolls_sideways(
    opened: tuple[Any, Told],
) -> None:
    page, told = opened
    plots = page.locator(".plot").all()
    assert len(plots) == 14
    for plot in plots:
        name = plot.get_attribute("id")
        assert plot.evaluate(_MARKS) > 0, f"{name} is empty"
        box, screen = plot.bounding_box(), page.viewport_size["width"]
        assert 0 <= box["x"] < box["x"] + box["width"] <= screen, name
    wide, screen = page.evaluate(_WIDTHS)
    assert wide == screen
    text = page.locator("main").inner_text()
    for words in ("4 of 4", "KeepTrunk", "GPU hours", "worker 1 died: signal 9", "lost work",
                  "right what the codec gives back", "c0dec", "torch"):  # fmt: skip
        assert words in text, words
    film = page.locator("video").first
    film.scroll_into_view_if_needed()
    page.wait_for_function("(v) => v.currentTime > 0.2", arg=film.element_handle())
    assert film.evaluate("(v) => [v.error, v.videoWidth]") == [None, 128]
    assert told.errors == []
    assert told.outside == []


def test_events_and_the_record_unfold(opened: tuple[Any, Told]) -> None:
    page, _ = opened
    row = page.locator("tr", has_text="fault injected")
    assert not row.is_visible()
    page.get_by_text("All 34 events").click()
    assert row.is_visible()
    page.get_by_text("run.json", exact=True).click()
    assert page.get_by_text("definition.stages.3.init.stage.name").is_visible()
    wide, screen = page.evaluate(_WIDTHS)
    assert wide == screen


def test_on_paper_plots_are_as_wide_as_the_page_and_light(report: Path) -> None:
    with chromium_page(1280) as (page, told):
        page.emulate_media(color_scheme="dark")
        page.goto(report.as_uri())
        assert len(page.pdf(format="A4", print_background=True)) > 100_000
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        for plot in page.locator(".plot").all():
            assert plot.locator(".main-svg").first.bounding_box()["width"] <= 703
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(251, 251, 250)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("#timeline .main-svg").first.bounding_box()["width"] > 900
        assert told.errors == []


def test_names_that_are_programs_are_shown_and_not_run(tmp_path: Path) -> None:
    attack = "\"><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    write_run(tmp_path, second=HOSTILE, captions=[attack, HOSTILE])
    with chromium_page(1280) as (page, told):
        page.on("dialog", lambda dialog: told.errors.append(f"dialog: {dialog.message}"))
        page.goto(write_report(tmp_path).as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        assert page.title() == "demo - Restage"
        assert page.locator("figcaption").first.inner_text() == attack
        assert page.locator("h3", has_text=HOSTILE).count() == 4, "of its samples and of its losses"
        pictures = page.locator("img").all()
        assert len(pictures) == 4, "first frames, and none of a name"
        assert all(one.get_attribute("src").startswith("data:image/webp") for one in pictures)
        assert told.errors == []
        assert told.outside == []
