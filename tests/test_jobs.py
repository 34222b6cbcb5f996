"""On a cluster of others: who may talk to it, and a plan that is submitted, stopped and goes on."""

import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ray_beside import (
    Beside,
    cluster,  # noqa: F401  # a fixture
    family_of,
    is_loopback,
    listening,
)
from test_ray import wait_until

from cluster import token
from cluster.local import processes_of
from cluster.token import asks_for_token
from elastic.data.moving_shapes import write_demo_videos
from elastic.folders import RunFolder
from elastic.journal import Event, read_events

pytestmark = pytest.mark.ray

TINY = Path(__file__).with_name("tiny_plan.py")
# A user's own file, outside of the repository, with a module beside it; it never ends by itself.
PLAN = """
import os
os.environ["TINY_VIDEOS"] = {table!r}
from own_parts import hunyuan_vae
from stages import Bucket, Phase, Plan

phase = Phase(until=40_000, buckets=[Bucket("32px", frames=5, batch=4, micro=2)])
plan = Plan("mine", [hunyuan_vae.replace(schedule=[phase], evaluate_every=400_000)])
"""


def status_of(url: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_cluster_listens_on_loopback_alone_and_wants_its_token(cluster: Beside) -> None:  # noqa: F811
    found = listening(family_of(cluster.temp_dir))
    assert len(found) >= 10, "a head, two raylets, their agents and the job API were not all seen"
    assert [address for address in found if not is_loopback(address)] == []
    assert asks_for_token(cluster.address) is True
    secret = cluster.token_path.read_text()
    url = f"{cluster.jobs}/api/jobs/"
    assert status_of(url, {}) == 401
    assert status_of(url, {"Authorization": f"Bearer {secret[::-1]}"}) == 403
    assert status_of(url, {"Authorization": f"Bearer {secret}"}) == 200


def test_the_token_of_a_cluster_is_in_its_file_alone(cluster: Beside) -> None:  # noqa: F811
    secret = cluster.token_path.read_text()
    assert len(secret) == 64
    assert stat.S_IMODE(cluster.token_path.stat().st_mode) == 0o600
    files = [path for path in cluster.temp_dir.rglob("*") if path.is_file()]
    assert [path for path in files if secret.encode() in path.read_bytes()] == [cluster.token_path]
    family = family_of(cluster.temp_dir)
    assert len(family) >= 9
    assert not [process for process in family if secret in " ".join(process.cmdline())]
    marked = processes_of(cluster.temp_dir)
    assert not [process for process in marked if secret in str(process.environ())]


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


def read(url: str, token_path: Path) -> str:
    headers = {"Authorization": f"Bearer {token_path.read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return str(answer.read().decode())


def test_a_submitted_plan_is_followed_stopped_after_a_save_and_goes_on_when_submitted_again(
    cluster: Beside,  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    own, storage = tmp_path / "own", tmp_path / "runs"
    own.mkdir()
    table = write_demo_videos(tmp_path / "videos", clips=12).table
    (own / "own_parts.py").write_text(TINY.read_text())
    (own / "my_plan.py").write_text(PLAN.format(table=str(table)))
    root = RunFolder(storage / "mine").root
    at = ["--address", cluster.jobs]
    submit = ["submit", "my_plan.py", *at, "--storage", str(storage), "--no-aim"]
    known = {**cluster.environment, "MY_API_KEY": "a canary of a key"}

    def verb(*words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "elastic", *words]
        out = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=own, env=known, stdout=out, stderr=subprocess.STDOUT, text=True
        )

    def told(kind: str, num: int = 1) -> list[Event]:
        found = [event for event in read_events(root) if event["kind"] == kind]
        return found if len(found) >= num else []

    followed = verb(*submit)
    request.addfinalizer(followed.kill)
    wait_until(lambda: bool(told("publish")) or followed.poll() is not None, "a checkpoint", 180)
    assert followed.poll() is None, followed.communicate()[0][-4000:]
    second = verb(*submit)
    assert "is trained by job restage-mine-" in second.communicate(timeout=60)[0]
    assert second.returncode == 2
    listed = read(f"{cluster.jobs}/api/jobs/", cluster.token_path)
    assert "restage_run" in listed
    assert "a canary of a key" not in listed
    assert cluster.token_path.read_text() not in listed

    stopped = verb("stop", "mine", "--save", *at)
    said = stopped.communicate(timeout=90)[0]
    assert stopped.returncode == 0, said
    assert "hunyuan-vae is published at " in said
    log = followed.communicate(timeout=60)[0]
    assert followed.returncode == 130, log
    assert "hunyuan-vae  " in log, "what the driver says is followed"
    assert "restage: stopped, as asked by " in log
    saved = told("publish")[-1]
    assert saved["reason"] == "stop"

    again = verb(*submit, "--detach")
    said = again.communicate(timeout=60)[0]
    assert again.returncode == 0, said
    assert "ray job logs -f restage-mine-" in said
    wait_until(lambda: bool(told("start", 2)), "a start", 120)
    assert told("start")[-1]["position"] == saved["position"]
    ended = verb("stop", str(root))
    assert ended.communicate(timeout=60)[0].count("without a save") == 1
    assert ended.returncode == 0
    secret = cluster.token_path.read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret in path.read_bytes()]
