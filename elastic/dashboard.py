"""Aim's pages on this machine alone: one process, behind a key, with the standard views saved.

Aim 3.29.1 has no login, answers pages of any origin and evaluates the queries that it is sent, and
its holes are not mended (pypa/advisory-database, PYSEC-2026-1080 to 1095). So every request needs
the key of the printed address, as a cookie that other sites cannot send, and none may come from a
page of another origin.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import subprocess
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from elastic.dashboard_views import View, standard_views
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.stop import driven
from elastic.tracking import plan_of, rebuild_aim

HOST = "127.0.0.1"
KEY = "key"  # of the address that is printed
# Aim's pages ask for fonts, news and a Python interpreter elsewhere, and need none of them here.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"

Message = MutableMapping[str, Any]  # ASGI's own
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Guarded:
    """An ASGI application that answers nobody without the key."""

    def __init__(self, inner: Application, key: str, cookie: str) -> None:
        self._inner, self._key, self._cookie = inner, key, cookie

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what may pass; a right key in the query becomes the cookie."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._inner(scope, receive, send)
            return  # Aim's pages open no websocket
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin"):
            return await _answer(send, 403, b"asked by a page of another origin")
        if self._is_key(_cookie(headers.get(b"cookie", ""), self._cookie)):
            return await self._inner(scope, receive, _alone(send))
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if not self._is_key(query.pop(KEY, [""])[0]):
            return await _answer(send, 403, b"open the whole address that restage printed")
        rest = urlencode(query, doseq=True)
        own = f"{self._cookie}={self._key}; HttpOnly; SameSite=Strict; Path=/"
        place = f"{scope['path']}?{rest}" if rest else scope["path"]
        await _answer(send, 303, b"", {"set-cookie": own, "location": place})

    def _is_key(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._key.encode())


def show(folder: RunFolder, port: int, anew: bool) -> None:
    """The verb: make the repository if it is missing or asked for `anew`, then serve it."""
    if not folder.record.is_file():
        raise InputError(f"{str(folder.root)!r} is no run folder: run.json is missing")
    if anew or not (folder.root / ".aim").is_dir():
        with driven(folder.root):  # a driver that runs would write to the repository
            try:
                rebuild_aim(folder.root)
            except ImportError as error:
                raise no_aim(error) from None

    def ready(address: str) -> None:
        print(
            f"dashboard: {address}\n"
            "Only this machine can reach it, and only with that key. From elsewhere: "
            "an ssh tunnel to the same port (ssh -L PORT:127.0.0.1:PORT). Ctrl-C ends it.",
            flush=True,
        )

    with contextlib.suppress(KeyboardInterrupt):  # how it is ended
        serve(folder.root, port, ready)


def serve(run_dir: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve a run's Aim repository until an interrupt; `ready` gets the address once it answers.

    Port 0 is any free one. InputError without Aim, or for a port that is taken.
    """
    with _listening(port) as listener:
        number = listener.getsockname()[1]
        key = secrets.token_urlsafe(24)
        application = _aim_application(run_dir)
        _save(standard_views(plan_of(run_dir)))
        guarded = Guarded(application, key, f"restage-{number}")
        with _indexed(run_dir):
            _serve(guarded, listener, lambda: ready(f"http://{HOST}:{number}/?{KEY}={key}"))


def no_aim(error: ImportError) -> InputError:
    """What to say where Aim is missing."""
    return InputError(
        f"the dashboard needs Aim, which cannot be imported ({error}): pip install aim. All else "
        "works without it; python -m elastic report RUN shows a run as one page"
    )


def _serve(application: Application, listener: socket.socket, ready: Callable[[], None]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(
        application, log_level="warning", timeout_graceful_shutdown=2, server_header=False
    )
    Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--port {port}: {error}; give another one, or leave it out for any that is free"
            ) from None
        listener.listen()
        yield listener


def _aim_application(run_dir: Path) -> Application:
    """Aim's pages and API, told by the environment where the repository lies."""
    try:
        with warnings.catch_warnings():
            # SQLAlchemy's MovedIn20Warning and others: Aim calls what has moved.
            warnings.simplefilter("ignore")
            from aim.cli.utils import build_db_upgrade_command
            from aim.web.configs import AIM_ENV_MODE_KEY, AIM_UI_MOUNTED_REPO_PATH

            os.environ |= {AIM_ENV_MODE_KEY: "prod", AIM_UI_MOUNTED_REPO_PATH: str(run_dir)}
            told = subprocess.run(build_db_upgrade_command(), capture_output=True, text=True)
            if told.returncode:
                raise RuntimeError(f"Aim could not make its tables: {told.stderr.strip()[-500:]}")
            from aim.web.api import create_app

            application: Application = create_app()
    except ImportError as error:
        raise no_aim(error) from None
    return application


@contextlib.contextmanager
def _indexed(run_dir: Path) -> Iterator[None]:
    """Aim's index follows the runs meanwhile: its searches find nothing else."""
    from aim.sdk.index_manager import RepoIndexManager
    from aim.sdk.repo import Repo

    manager = RepoIndexManager.get_index_manager(Repo.from_path(str(run_dir)))
    for chunk in sorted(manager.chunks_dir.iterdir()):
        manager.index(chunk.name)
    manager.repo.container_pool.clear()
    manager.start()
    try:
        yield
    finally:
        # Its threads are daemons; to wait for them would take until the next run changes.
        manager.new_chunk_observer.stop()
        manager.chunk_change_observer.stop()


def _save(views: list[View]) -> None:
    """Keep the views as Aim's bookmarks; those that are there are brought up to date."""
    from aim.web.api.dashboard_apps.models import ExploreState
    from aim.web.api.dashboards.models import Dashboard
    from aim.web.api.db import get_contexted_session

    with get_contexted_session() as session:
        for view in views:
            known = session.query(Dashboard).filter_by(name=view.name, is_archived=False).first()
            page = known or Dashboard(view.name, view.description)
            state = session.query(ExploreState).filter_by(dashboard_id=page.uuid).first()
            state = state or ExploreState()
            state.type, state.state, state.dashboard_id = (
                view.kind,
                json.dumps(view.state),
                page.uuid,
            )
            session.add_all([page, state])
        session.commit()


def _alone(send: Send) -> Send:
    """Sends what it is given with the word that the page may ask nobody else."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            policy = (b"content-security-policy", _POLICY.encode())
            message = {**message, "headers": [*message.get("headers", []), policy]}
        await send(message)

    return sent


def _cookie(text: str, name: str) -> str:
    try:
        found = SimpleCookie(text).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


async def _answer(
    send: Send, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    pairs = {"content-type": "text/plain", "cache-control": "no-store", **(headers or {})}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
