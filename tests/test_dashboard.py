"""Aim's pages behind our door: who may ask, what is said without Aim, and that they follow."""

import asyncio
import re
import socket
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from browser import chromium_page, needs_chromium
from served import dashboard, open_view
from written_run import write_run

from elastic.cli import BAD_INPUT, main
from elastic.dashboard import Guarded
from elastic.tracking import Tracker


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


@needs_chromium
def test_it_follows_a_run_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    tracker = Tracker(tmp_path, "demo", {"a": 100})

    def log(positions: range) -> None:
        for position in positions:
            tracker.log({"wall": 1.0, "stage": "a", "attempt": 1, "position": position, "world": 2,
                         "context": {}, "values": {"loss": 1 / (position + 1)}})  # fmt: skip

    def points(page: Any) -> int:
        open_view(page, "Training")
        line = page.locator("path.Line").first
        line.wait_for(state="attached")
        return len(re.findall("[,L]", line.get_attribute("d")))

    log(range(10))
    with dashboard(tmp_path) as (address, _), chromium_page(1400) as (page, _):
        page.goto(address)
        few = points(page)
        log(range(10, 60))
        deadline = time.monotonic() + 60  # its index looks every few seconds
        while points(page) < 3 * few:
            assert time.monotonic() < deadline, "the new points did not come"
    tracker.close()
    assert tracker.aim_problem() is None
