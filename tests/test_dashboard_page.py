"""Aim's pages in a real browser: what each saved view shows of a run."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

import psutil
import pytest
from browser import Told, chromium_page, needs_chromium
from served import dashboard, open_view
from written_run import write_run

from elastic.aim_view import HEIGHTS, MARKS

pytestmark = needs_chromium

ATTACK = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of a run whose repository has to be made from its journals."""
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, captions=["a red circle", ATTACK])
    with dashboard(run_dir) as (address, process):
        ports = psutil.Process(process.pid).net_connections("inet")
        assert [port.laddr.ip for port in ports if port.status == "LISTEN"] == ["127.0.0.1"]
        assert psutil.Process(process.pid).children() == []
        yield address
    assert process.returncode == 0
    assert not psutil.pid_exists(process.pid)


@pytest.fixture(scope="module")
def opened(address: str) -> Iterator[tuple[Any, Told]]:
    with chromium_page(1400) as (page, told):
        page.goto(address)
        assert "key=" not in page.url
        yield page, told


def test_runs_are_listed_by_plan_and_stage(opened: tuple[Any, Told]) -> None:
    page, _ = opened
    page.goto(re.sub(r"(?<=\d)/.*", "/runs", page.url))
    for number, stage in enumerate(("hunyuan-vae", "dit-hunyuan", "dc-ae", "dit-dc-ae"), 1):
        page.get_by_text(re.compile(f"/ {number}-{stage}$")).first.wait_for()


@pytest.mark.parametrize(
    ("view", "charts", "words"),
    [
        ("Training", ("loss", "grad_norm", "lr", MARKS), ("hunyuan-vae", "dit-dc-ae")),
        ("Held-out clips", ("loss", "psnr", "ssim"), ("hunyuan-vae", "dc-ae")),
        ("Loss by noise", ("loss_by_t",), ("0.0625", "0.9375")),
        ("Speed", ("samples_per_s", "tokens_per_s", "data_wait"), ("dit-hunyuan",)),
        ("Machines", (MARKS, "world_size", "attempt", "loss_by_attempt"), ("dit-dc-ae",)),
        ("Where the time went", ("seconds",), ("training", "lost work", "starting")),
        ("Goodput", ("goodput",), ()),
    ],
)
def test_a_saved_view_shows_its_charts_with_lines(
    opened: tuple[Any, Told], view: str, charts: tuple[str, ...], words: tuple[str, ...]
) -> None:
    page, _ = opened
    open_view(page, view)
    for chart in charts:
        page.get_by_text(f'metric.name="{chart}"').first.wait_for(state="attached")
    drawn = page.locator("path.Line")
    drawn.first.wait_for(state="attached")
    assert all(len(line.get_attribute("d")) > 20 for line in drawn.all())
    assert drawn.count() >= len(charts)
    for word in words:
        assert page.get_by_text(f'"{word}"').count() > 0, word


class Mark(NamedTuple):
    """A line of a chart of events that goes up and comes down again."""

    x: float
    height: float
    what: str
    stage: str


def _marks(page: Any) -> list[Mark]:
    """Those that are drawn, from left to right; Aim writes into a line's name whose it is."""
    marks = []
    for line in page.locator("path.Line").all():
        name = line.get_attribute("id").removeprefix("Line-O-")
        whose = json.loads(unquote(base64.b64decode(name + "==").decode()))
        about = whose["traceContext"]
        if whose["metricName"] == MARKS and "event" in about:
            path = re.split("[ML]", line.get_attribute("d"))[1:]
            low, (x, high), end = (tuple(map(float, point.split(","))) for point in path)
            assert low[1] == end[1]
            marks.append(Mark(x, low[1] - high, about["event"], about["stage"]))
    return sorted(marks)


@pytest.mark.parametrize("view", ["Training", "Machines"])
def test_crashes_resizes_and_switches_stand_in_a_chart_where_they_happened(
    opened: tuple[Any, Told], view: str
) -> None:
    page, _ = opened
    open_view(page, view)
    # Of four stages in four charts, and those of the events.
    page.wait_for_function("() => document.querySelectorAll('path.Line').length >= 4 * 4 + 5")
    page.get_by_text(f'metric.name="{MARKS}"').first.wait_for(state="attached")
    marks = _marks(page)
    assert [(mark.what, mark.stage) for mark in marks] == [
        ("switch", "dit-hunyuan"),
        ("crash", "dit-hunyuan"),
        ("switch", "dc-ae"),
        ("switch", "dit-dc-ae"),
        ("resize", "dit-dc-ae"),
    ]
    for mark, position in zip(marks, (400, 660, 800, 1000, 1100), strict=True):
        share = (mark.x - marks[0].x) / (marks[-1].x - marks[0].x)
        assert 400 + 700 * share == pytest.approx(position, abs=1), mark
        assert mark.height == pytest.approx(marks[0].height * HEIGHTS[mark.what]), mark
    assert marks[0].height > 30, "pixels"


def test_samples_and_reconstructions_are_shown_by_stage_and_caption(
    opened: tuple[Any, Told],
) -> None:
    page, told = opened
    for view, rows in (
        # Those of a caption in a row of its own, over the positions.
        ("Samples", ("dit-hunyuan", "dit-dc-ae", "a red circle")),
        ("Reconstructions", ("hunyuan-vae", "dc-ae")),
    ):
        open_view(page, view)
        for row in rows:
            page.get_by_text(f'"{row}"').first.wait_for(state="attached")
        pictures = page.locator("img[src^='data:image']")
        pictures.nth(3).wait_for()
        page.wait_for_function("() => [...document.images].every(i => i.naturalWidth > 0)")
        assert page.get_by_text("a red circle").count() >= 2
        assert page.get_by_text(ATTACK).count() >= 2, "a caption that is a program stays text"
        assert page.title() != "run"
    assert not [error for error in told.errors if "onerror" in error]


def test_crashes_and_resizes_are_told_on_the_page_of_the_plan(opened: tuple[Any, Told]) -> None:
    page, _ = opened
    page.goto(re.sub(r"(?<=\d)/.*", "/runs", page.url))
    page.locator("a", has_text=re.compile("^[^/]*$")).get_by_text(
        re.compile(r"^run\d*$")
    ).first.click()
    page.get_by_text("Messages").click()
    page.get_by_text("worker 1 died: signal 9").first.wait_for()
    page.get_by_text(re.compile("resize requested.*2 -> 3")).first.wait_for()
    page.get_by_text(re.compile("stage start")).first.wait_for()
