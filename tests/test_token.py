"""Who has not its token can do nothing with a cluster of ours, and nobody far can even ask."""

import logging
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from ray_beside import Beside, cluster, is_loopback, listening  # noqa: F401  # a fixture

from cluster import token
from cluster.local import processes_of
from cluster.token import asks_for_token, own_token
from elastic import doctor, drive
from elastic.settings import Settings


def status_of(url: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.ray
def test_a_cluster_listens_on_loopback_alone_and_wants_its_token(cluster: Beside) -> None:  # noqa: F811
    found = listening(processes_of(cluster.temp_dir))
    assert len(found) >= 6, "a head, two raylets and the job API were not all seen"
    assert [address for address in found if not is_loopback(address)] == []
    assert asks_for_token(cluster.address) is True
    secret = cluster.token_path.read_text()
    url = f"{cluster.jobs}/api/jobs/"
    assert status_of(url, {}) == 401
    assert status_of(url, {"Authorization": f"Bearer {secret[::-1]}"}) == 403
    assert status_of(url, {"Authorization": f"Bearer {secret}"}) == 200


@pytest.mark.ray
def test_the_token_of_a_cluster_is_in_its_file_alone(cluster: Beside) -> None:  # noqa: F811
    secret = cluster.token_path.read_text()
    assert len(secret) == 64
    assert stat.S_IMODE(cluster.token_path.stat().st_mode) == 0o600
    files = [path for path in cluster.temp_dir.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == [cluster.token_path]
    processes = processes_of(cluster.temp_dir)
    assert len(processes) >= 5
    for process in processes:
        told = [*process.cmdline(), *process.environ().values()]
        assert not [text for text in told if secret in text]


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
    found = {one.what: one for one in doctor.findings(tmp_path, address)}["Ray cluster"]
    assert found.level == ("ok" if asks else "warn")
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


@pytest.mark.ray
def test_a_driver_needs_the_token_and_nothing_else(cluster: Beside) -> None:  # noqa: F811
    """Also where a job's entrypoint does: at the loopback address, which Ray would replace."""
    code = (
        "import sys; from elastic.drive import connect, ray\n"
        "from elastic.settings import Settings\n"
        "connect(Settings(ray_address=sys.argv[1]), None); print(len(ray.nodes()))"
    )

    def run(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", code, cluster.address]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    of_token = (token.MODE, token.TOKEN_PATH)
    without = {n: v for n, v in cluster.environment.items() if n not in of_token}
    refused = run(without)
    assert refused.stderr.splitlines()[-1].endswith(
        "the cluster asks for its token; give RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE "
        "with it"
    )
    taken = run(cluster.environment)
    assert taken.returncode == 0, taken.stderr[-2000:]
    assert taken.stdout.split() == ["2"]
