"""A token for each cluster that is started here, and a word about clusters that ask for none."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cluster import token
from cluster.token import own_token
from elastic import doctor, drive
from elastic.settings import Settings


def test_a_token_is_made_for_one_cluster_and_gone_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {token.MODE: None, token.TOKEN: "of another cluster", token.TOKEN_PATH: "elsewhere"}
    for name, value in before.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )
    secrets = set()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        with own_token(tmp_path / name):
            assert os.environ[token.MODE] == "token"
            assert token.TOKEN not in os.environ, "it would come before the file"
            secrets.add(Path(os.environ[token.TOKEN_PATH]).read_text())
        assert {name: os.environ.get(name) for name in before} == before
    assert len(secrets) == 2


def test_whoever_has_switched_tokens_off_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(token.MODE, "disabled")
    with own_token(tmp_path):
        assert os.environ[token.MODE] == "disabled"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[True, False], ids=["asks", "asks nobody"])
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """What stands in for a head: it answers as one that asks for a token, or asks nobody."""

    def answer(asked: bytes, context: grpc.ServicerContext) -> bytes:
        if request.param:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    service = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService",
        {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)},
    )
    server = grpc.server(ThreadPoolExecutor(1), handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", request.param
    server.stop(None).wait()


def test_a_foreign_cluster_that_asks_nobody_is_warned_of(
    head: tuple[str, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address, asks = head
    found = {one.what: one for one in doctor.findings(tmp_path, address)}["Ray token"]
    assert found.level == ("ok" if asks else "warn")
    caplog.clear()
    monkeypatch.setattr(drive, "join", lambda address: None)
    with caplog.at_level(logging.WARNING):
        drive.connect(Settings(ray_address=address), None)
    assert [one for one in caplog.messages if "takes work from whoever" in one] == (
        [] if asks else [token.advice(address)]
    )


def test_a_head_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    found = {one.what: one for one in doctor.findings(tmp_path, "127.0.0.1:1")}["Ray cluster"]
    assert found.level == "error"
    assert "127.0.0.1:1" in found.value
