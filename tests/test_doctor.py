"""`doctor` on a machine with something wrong: each finding names its rule and what to do.

The faults are real (a small tmpfs, a limit on files, a listening socket, an endpoint that nobody
serves); what a test cannot have, other versions and a broken GPU, is given as values.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from packaging.requirements import Requirement
from s3_server import BUCKET, asked_once, s3_server  # noqa: F401  # fixtures

from elastic import doctor, doctor_network, doctor_storage
from elastic.cli import main
from elastic.doctor_gpu import gpu_health
from elastic.doctor_network import given_port, gloo, loopback, ray_ports
from elastic.doctor_storage import place
from elastic.finding import Finding, as_json, exit_code, render
from elastic.ray_doctor import check_clocks, check_shared, check_versions, check_ways
from elastic.ray_peer import NodeFacts, Peer

ROOT = Path(__file__).resolve().parent.parent
# Mounts of the test's own, gone with the process that made them.
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    ).returncode
    == 0
)
needs_mounts = pytest.mark.skipif(not CAN_MOUNT, reason="no user namespaces with mounts here")
SHOW = "import json; print(json.dumps([one._asdict() for one in found]))"


def elsewhere(code: str, before: str, *prefix: str) -> list[Finding]:
    """The findings `found` of some code, in a process that a shell has prepared."""
    command = f"{before}; exec {shlex.join([sys.executable, '-c', f'{code}; {SHOW}'])}"
    done = subprocess.run(
        [*prefix, "sh", "-ec", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Finding(**one) for one in json.loads(done.stdout)]


def require_complete(one: Finding) -> None:
    """What is wrong says what, which value, which rule, and what to do."""
    assert one.level in ("warn", "error")
    assert one.value
    assert one.rule
    assert one.remedy


def test_what_is_wrong_has_a_rule_and_a_remedy_and_nothing_is_left(tmp_path: Path) -> None:
    found = doctor.findings(tmp_path / "not" / "there", checkpoints=str(tmp_path / "c"))
    names = [one.what for one in found]
    assert len(names) == len(set(names))
    looked_at = {"python", "packages", "torch", "ray", "storage", "storage room", "checkpoints"}
    looked_at |= {"H.264", "decoders", "Aim", "loopback", "gloo", "open ports", "open files"}
    assert looked_at <= {*names}
    for one in found:
        if one.level != "ok":
            require_complete(one)
    by_name = {one.what: one for one in found}
    assert by_name["gloo"].level == by_name["loopback"].level == "ok", by_name
    assert list(tmp_path.iterdir()) == [], "the probes are removed, and no folder is made"


@needs_mounts
def test_a_disk_without_room_is_an_error(tmp_path: Path) -> None:
    code = f"from elastic.doctor_storage import place; found = place('storage', {str(tmp_path)!r})"
    room, storage = elsewhere(code, f"mount -t tmpfs -o size=1m tmpfs {tmp_path}", *UNSHARE)
    for one in (room, storage):
        assert one.level == "error"
        require_complete(one)
    assert room.value.startswith("0.0 GiB free")
    assert "No space left on device" in storage.value
    assert "--storage" in room.remedy


@needs_mounts
def test_a_disk_that_is_read_only_is_an_error(tmp_path: Path) -> None:
    code = f"from elastic.doctor_storage import place; found = place('latents', {str(tmp_path)!r})"
    *_, latents = elsewhere(code, f"mount -t tmpfs -o ro tmpfs {tmp_path}", *UNSHARE)
    assert latents.level == "error"
    assert "Read-only file system" in latents.value
    assert "--latents" in latents.remedy


def test_files_that_may_not_grow_are_an_error(tmp_path: Path) -> None:
    code = f"from elastic.doctor_storage import place; found = place('storage', {str(tmp_path)!r})"
    storage = elsewhere(code, "ulimit -f 1024")[-1]
    assert storage.level == "error"
    assert "File too large" in storage.value
    require_complete(storage)


@needs_mounts
def test_small_shared_memory_is_found() -> None:
    code = "from elastic.doctor_machine import shared_memory; found = [shared_memory()]"
    (one,) = elsewhere(code, "mount -t tmpfs -o size=64m tmpfs /dev/shm", *UNSHARE)
    require_complete(one)
    assert one.value == "0.06 of 0.06 GiB free in /dev/shm"
    assert "--shm-size" in one.remedy


def test_few_open_files_are_found() -> None:
    code = "from elastic.doctor_machine import open_files; found = [open_files()]"
    (one,) = elsewhere(code, "ulimit -n 256")
    require_complete(one)
    assert one.value == "256 a process"


def test_a_storage_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (one,) = place("storage", str(tmp_path / "file" / "below"))
    assert str(tmp_path / "file") in one.value
    require_complete(one)


def test_a_bucket_that_answers_is_written_and_read_and_left_empty(server: str) -> None:
    (one,) = place("checkpoints", f"s3://{BUCKET}/below")
    assert one.level != "error", one  # on a machine that is busy it may be slow
    assert one.value.startswith("writes ")
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="below")


def test_a_bucket_that_is_not_there_is_an_error(server: str) -> None:
    (one,) = place("latents", "s3://restage-there-is-none/below")
    assert one.level == "error"
    assert "bucket does not exist" in one.value
    require_complete(one)


@pytest.fixture
def no_clients() -> Iterator[None]:
    """The clients of earlier tests, which go to other servers, are forgotten, and those after."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.usefixtures("asked_once")
def test_an_endpoint_that_nobody_serves_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody")
    (one,) = place("checkpoints", "s3://restage-unserved/below")
    assert one.level == "error"
    assert address in one.value
    assert "AWS_ENDPOINT_URL" in one.remedy


@pytest.mark.usefixtures("no_clients")
def test_an_endpoint_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_storage, "_ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "silent")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "silent")
        (one,) = place("checkpoints", "s3://restage-silent/below")
    assert "no answer in 1 s" in one.value
    require_complete(one)


def test_a_url_with_a_key_in_it_is_refused_and_not_repeated() -> None:
    (one,) = place("latents", "s3://user:hunter2@bucket/folder")
    require_complete(one)
    assert "hunter2" not in render([one])


def test_a_port_that_is_taken_is_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        one = given_port(port)
    assert one.level == "error"
    assert one.what == f"port {port}"
    assert f"({os.getpid()})" in one.value
    require_complete(one)
    assert given_port(port).level == "ok", "it is free again"


@pytest.mark.parametrize(("address", "level"), [("127.0.0.1", "ok"), ("0.0.0.0", "warn")])
def test_a_port_of_ray_is_told_if_other_machines_reach_it(
    address: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor_network, "PORTS", {port: "Ray's head"})
        one = ray_ports()
    assert one.level == level
    if level == "warn":
        assert f"Ray's head on 0.0.0.0:{port} by " in one.value
        require_complete(one)


def test_a_card_that_gloo_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nocard0")
    one = gloo()
    assert one.level == "error"
    assert "'nocard0'" in one.remedy
    require_complete(one)


def test_a_network_without_loopback_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    require_complete(loopback())


@pytest.mark.parametrize(
    ("wanted", "level"),
    [
        ("pytest>=1", "ok"),
        ("pytest==0.0.1", "error"),
        ("no-such-distribution-is-installed>=1", "error"),
        ("aim>=1000", "warn"),
    ],
)
def test_a_version_outside_its_bounds_is_found(wanted: str, level: str) -> None:
    finding = doctor.check_version(Requirement(wanted))
    assert finding.level == level
    if level != "ok":
        require_complete(finding)
        assert finding.remedy == f"pip install '{wanted}'"


def test_the_requirements_of_the_project_are_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [str(one) for one in doctor.requirements()] == [
        str(Requirement(line)) for line in project["dependencies"]
    ]
    wanted = {one.name: str(one.specifier) for one in doctor.requirements()}
    assert wanted["ray"].startswith("==")
    assert "torch" in wanted
    assert "pytest" not in wanted, "extras are not asked for"


HEALTHY = "0, GPU-a, 0, 0x0000000000000001"  # an idle GPU
SICK = {
    "0, GPU-a, 3, 0x0000000000000000": ("error", "3 uncorrected memory errors"),
    "0, GPU-a, 0, 0x0000000000000048": ("warn", "slowed by the hardware, too hot for the hardware"),
    "0, GPU-b, 0, 0x0000000000000004": ("warn", "used by process 77 (1024 MiB)"),
}


@pytest.mark.parametrize("line", SICK)
def test_a_gpu_that_is_not_well_is_found(line: str) -> None:
    (one,) = gpu_health(line + "\n", "GPU-b, 77, 1024\n")
    assert (one.level, one.value) == SICK[line]
    require_complete(one)


@pytest.mark.parametrize("line", [HEALTHY, "0, GPU-a, [N/A], [N/A]", "0, GPU-a, 0, 0x4"])
def test_a_gpu_that_is_well_or_cannot_say_is_left_alone(line: str) -> None:
    (one,) = gpu_health(line, "GPU-b, 77, 1024\n")
    assert one.level == "ok"


HERE = {"python": "3.11", "ray": "2.60.0", "torch": "2.13.0"}


def test_what_is_wrong_with_nodes_is_told_with_their_names() -> None:
    facts = {"a": NodeFacts(HERE, 2 << 30), "b": NodeFacts({**HERE, "ray": "2.59.0"}, 64 << 20)}
    found = [
        check_versions(facts, HERE),
        check_clocks({"a": (0.4, 0.1), "b": (-7.0, 0.2)}),
        check_shared(facts),
        check_ways({"a to b": "timed out"}),
    ]
    for one in found:
        require_complete(one)
    versions, clocks, shared, ways = (one.value for one in found)
    assert versions == "b has ray 2.59.0, here it is 2.60.0"
    assert clocks == "b is -7.0 s off (within 0.2 s)"
    assert shared == "b has 0.06 GiB free"
    assert ways == "a to b: timed out"


def test_a_peer_reaches_another_and_says_why_it_does_not() -> None:
    peer = Peer("127.0.0.1")
    with peer._server:
        assert peer.reach("127.0.0.1", peer.port()) == ""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert "refused" in peer.reach("127.0.0.1", closed)


def test_a_clock_that_may_be_right_is_not_called_wrong() -> None:
    assert check_clocks({"a": (1.5, 0.6)}).level == "ok"


def test_findings_are_shown_with_their_rule_and_remedy() -> None:
    text = render([Finding("ok", "a", "1"), Finding("error", "longer", "2", "do this", "3")])
    assert text.splitlines() == [
        "ok     a       1",
        "error  longer  2",
        "               -> do this (needed: 3)",
        "1 errors, 0 warnings, 1 ok",
    ]
    assert exit_code([Finding("warn", "a", "1", "x")]) == 0


def test_the_verb_prints_one_object_and_fails_on_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def found(*what: object) -> list[Finding]:
        asked.extend(what)
        return [Finding("error", "disk", "none", "buy one", "a disk")]

    monkeypatch.setattr(doctor, "findings", found)
    flags = ["--storage", str(tmp_path), "--latents", "s3://b/l", "--port", "7", "--json"]
    assert main(["doctor", *flags]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown == as_json([Finding("error", "disk", "none", "buy one", "a disk")])
    assert shown["findings"][0]["remedy"] == "buy one"
    assert asked == [tmp_path, None, None, "s3://b/l", [7]]
