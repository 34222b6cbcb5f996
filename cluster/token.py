"""Ray's token authentication: one token for each cluster that is started here, and who asks none.

Without it whoever reaches a port of a cluster runs what he likes on it.
"""

import http
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_FILE = "token"
_ANSWER_S = 5.0
# Answered by the head to whoever may talk to it; it carries nothing.
_ASK = "/ray.rpc.NodeInfoGcsService/CheckAlive"


@contextmanager
def own_token(folder: Path) -> Iterator[None]:
    """Inside, this process and those that it starts use a token made for the cluster of `folder`.

    A user who has set RAY_AUTH_MODE to something else has decided for himself. The processes are
    given the path, for an environment is shown by more tools than a file of mode 0600.
    """
    if os.environ.get(MODE, "token") != "token":
        yield
        return
    path = folder / _FILE
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    before = {name: os.environ.pop(name, None) for name in (MODE, TOKEN, TOKEN_PATH)}
    os.environ.update({MODE: "token", TOKEN_PATH: str(path)})
    read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        read_again()


def read_again() -> None:
    """Have Ray in this process read mode and token again: it has kept what it found first."""
    from ray._raylet import (  # type: ignore[attr-defined]  # made by Cython
        AuthenticationTokenLoader,
        Config,
    )

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def asks_for_token(address: str) -> bool | None:
    """Whether the head at HOST:PORT sends away who has no token; None if it does not say."""
    import grpc

    # As Ray does itself: what an environment says of proxies is about the web.
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        ask = channel.unary_unary(_ASK)  # bytes as they are: an empty message, and any answer
        try:
            ask(b"", timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return True if error.code() is grpc.StatusCode.UNAUTHENTICATED else None
    return False


def advice(address: str) -> str:
    """What to do about a cluster that asks nobody for a token."""
    return (
        f"the Ray cluster at {address} takes work from whoever reaches it: start it with "
        f"{MODE}=token and a token (ray get-auth-token --generate), or let nobody else reach it"
    )


def takes_jobs_from_anyone(url: str) -> bool:
    """Whether the job API at a URL answers who has no token; OSError if nothing is there."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=_ANSWER_S) as answer:
            return bool(answer.status == http.HTTPStatus.OK)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            return False
    except http.client.HTTPException as error:
        raise OSError(f"what answers there is no job API ({error!r})") from None
