"""Aim's pages behind our door: who may ask, what is kept for them, and what a browser shows."""

import asyncio
import re
import socket
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import Told, chromium_page, needs_chromium
from served import dashboard
from written_run import write_run

from elastic.cli import BAD_INPUT, main
from elastic.dashboard import Guarded

ATTACK = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


def answer(
    query: str = "", headers: dict[str, str] | None = None, kind: str = "http"
) -> tuple[int, dict[str, str]]:
    """Status and headers of an application behind the door; 0 if nobody answers."""
    sent: list[MutableMapping[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    raw = [(k.encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
    scope = {"type": kind, "path": "/metrics", "query_string": query.encode(), "headers": raw}
    asyncio.run(Guarded(inner, "secret", "restage-1")(scope, receive, send))
    if not sent:
        return 0, {}
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


def test_nobody_comes_in_without_the_key() -> None:
    assert answer()[0] == 403
    assert answer("key=")[0] == 403
    assert answer("key=secre")[0] == 403
    assert answer(headers={"cookie": "restage-1=wrong"})[0] == 403
    assert answer(headers={"cookie": "restage-2=secret"})[0] == 403, "another dashboard's"
    assert answer(headers={"cookie": "\xff;=;restage-1"})[0] == 403
    assert answer("key=secret", kind="websocket")[0] == 0


def test_the_key_becomes_a_cookie_that_other_sites_cannot_send() -> None:
    status, headers = answer("key=secret&select=O-1")
    assert (status, headers["location"]) == (303, "/metrics?select=O-1")
    assert headers["set-cookie"] == "restage-1=secret; HttpOnly; SameSite=Strict; Path=/"
    status, headers = answer(headers={"cookie": "restage-1=secret"})
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_origin_is_refused_even_with_the_cookie(site: str) -> None:
    cookie = {"cookie": "restage-1=secret"}
    assert answer(headers={**cookie, "sec-fetch-site": site})[0] == 403
    assert answer(headers={**cookie, "sec-fetch-site": "same-origin"})[0] == 200


def test_without_aim_the_verb_says_so_and_what_to_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    (tmp_path / ".aim").mkdir()
    monkeypatch.setitem(sys.modules, "aim", None)
    assert main(["dashboard", str(tmp_path)]) == BAD_INPUT
    told = capsys.readouterr().err
    assert "pip install aim" in told
    assert "elastic report" in told
    assert main(["dashboard", str(tmp_path / "samples")]) == BAD_INPUT
    assert "no run folder" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / ".aim").mkdir()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["dashboard", str(tmp_path), "--port", str(port)]) == BAD_INPUT
    assert f"--port {port}: " in capsys.readouterr().err


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


def open_view(page: Any, name: str) -> None:
    page.goto(re.sub(r"(?<=\d)/.*", "/bookmarks", page.url))
    card = page.locator(".BookmarkCard", has=page.get_by_text(name, exact=True))
    card.get_by_text("View Bookmark").click()


@needs_chromium
def test_runs_are_listed_by_plan_and_stage(opened: tuple[Any, Told]) -> None:
    page, _ = opened
    page.goto(re.sub(r"(?<=\d)/.*", "/runs", page.url))
    for number, stage in enumerate(("hunyuan-vae", "dit-hunyuan", "dc-ae", "dit-dc-ae"), 1):
        page.get_by_text(re.compile(f"/ {number}-{stage}$")).first.wait_for()


@needs_chromium
@pytest.mark.parametrize(
    ("view", "charts", "words"),
    [
        ("Training", ("loss", "grad_norm", "lr"), ("hunyuan-vae", "dit-dc-ae")),
        ("Held-out clips", ("loss", "psnr", "ssim"), ("hunyuan-vae", "dc-ae")),
        ("Speed", ("samples_per_s", "tokens_per_s", "data_wait"), ("dit-hunyuan",)),
        ("Machines", ("world_size", "attempt", "loss_by_attempt"), ("dit-dc-ae",)),
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


@needs_chromium
def test_samples_and_reconstructions_are_shown_by_stage_and_caption(
    opened: tuple[Any, Told],
) -> None:
    page, told = opened
    for view, stages in (
        ("Samples", ("dit-hunyuan", "dit-dc-ae")),
        ("Reconstructions", ("hunyuan-vae", "dc-ae")),
    ):
        open_view(page, view)
        for stage in stages:
            page.get_by_text(f'"{stage}"').first.wait_for()
        pictures = page.locator("img[src^='data:image']")
        pictures.nth(3).wait_for()
        page.wait_for_function("() => [...document.images].every(i => i.naturalWidth > 0)")
        assert page.get_by_text("a red circle").count() >= 2
        assert page.get_by_text(ATTACK).count() >= 2, "a caption that is a program stays text"
        assert page.title() != "run"
    assert not [error for error in told.errors if "onerror" in error]


@needs_chromium
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
