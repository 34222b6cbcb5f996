"""`doctor` asks every node of a real cluster."""

from pathlib import Path

import pytest
import ray
from ray_beside import listening

from cluster.local import LocalCluster, processes_of
from elastic import agreement
from elastic.doctor_network import is_loopback
from elastic.ray_doctor import check_sum, cluster_findings, node_findings

pytestmark = pytest.mark.ray


def test_every_node_of_a_cluster_is_asked_and_reaches_the_next() -> None:
    cluster = LocalCluster(cpus=1)
    try:
        cluster.add_node()
        cluster.connect()
        try:
            found = {one.what: one for one in node_findings()}
            addresses = listening(processes_of(cluster.temp_dir))
        finally:
            ray.shutdown()
    finally:
        cluster.stop()
    assert addresses, "whose ports are looked at is known"
    assert all(is_loopback(ip) for ip in addresses), addresses
    assert found["nodes"].value == "2 answer"
    assert found["gloo of all nodes"].value == "2 processes agree"
    for what in ("node versions", "node clocks", "node to node"):
        assert found[what].level == "ok", found[what]


def test_a_process_that_cannot_take_part_in_a_sum_says_why_and_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    why = agreement.why_not(agreement.begin("gloo", f"file://{tmp_path / 'store'}", 0, 1))
    assert "absent0" in why
    found = check_sum("gloo", {"here": why, "there": ""})
    assert found.level == "error"
    assert found.value == f"here: {why}"
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_a_cluster_that_is_not_there_is_an_error() -> None:
    (one,) = cluster_findings("127.0.0.1:1")
    assert one.level == "error"
    assert "127.0.0.1:1" in one.value
    assert one.rule
    assert "--ray-address" in one.remedy
