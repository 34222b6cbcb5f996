"""`doctor` asks every node of a real cluster."""

import psutil
import pytest
import ray

from cluster.local import LocalCluster, processes_of
from elastic.doctor_network import is_loopback
from elastic.ray_doctor import cluster_findings, node_findings

pytestmark = pytest.mark.ray


def test_every_node_of_a_cluster_is_asked_and_reaches_the_next() -> None:
    cluster = LocalCluster(cpus=1)
    try:
        cluster.add_node()
        cluster.connect()
        try:
            found = {one.what: one for one in node_findings()}
            listening = {
                one.laddr.ip
                for process in processes_of(cluster.temp_dir)
                for one in process.net_connections("tcp")
                if one.status == psutil.CONN_LISTEN
            }
        finally:
            ray.shutdown()
    finally:
        cluster.stop()
    assert listening, "whose ports are looked at is known"
    assert all(is_loopback(ip) for ip in listening), listening
    assert found["nodes"].value == "2 answer"
    for what in ("node versions", "node clocks", "node to node"):
        assert found[what].level == "ok", found[what]


def test_a_cluster_that_is_not_there_is_an_error() -> None:
    (one,) = cluster_findings("127.0.0.1:1")
    assert one.level == "error"
    assert "127.0.0.1:1" in one.value
    assert one.rule
    assert "--ray-address" in one.remedy
