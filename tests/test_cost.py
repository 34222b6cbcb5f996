from pathlib import Path

import pytest
from written_run import Machines, write_run

from elastic.cost import cost, unit
from elastic.summary import read_history


def test_machines_are_paid_for_while_a_group_holds_them_and_not_while_it_waits(
    tmp_path: Path,
) -> None:
    m = Machines(tmp_path)
    m.event("run_start", 0.0, gpus=True)
    m.event("stage_start", stage="a")
    m.event("encode_start", 1.0, stage="a")
    m.event("encode_end", 100.0, stage="a")
    m.event("launch", 5.0, stage="a", world=4)
    m.start("a", 0, 4, after=10.0)
    m.event("crash", 90.0, stage="a", reason="signal 9")
    m.event("waiting", 20.0, stage="a")
    m.event("launch", 1000.0, stage="a", world=2)
    m.start("a", 0, 2, after=10.0)
    m.event("publish", 30.0, stage="a", position=20, reason="finished")
    m.event("stage_end", 5.0, stage="a", position=20)
    m.event("sample", 8.0, stage="a", position=20, seconds=8.0)
    m.event("run_end", 50.0)
    history = read_history(tmp_path)
    one = cost(history)["a"]
    # Placing, what the crash took, noticing it; then half as many; then one that samples.
    assert one.held * 3600 == pytest.approx(4 * (10 + 90 + 20) + 2 * (10 + 30 + 5) + 8)
    assert one.kept * 3600 == pytest.approx(2 * 30)
    assert unit(history) == "GPU"


def test_a_resize_costs_what_each_group_held_and_a_dead_driver_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = cost(read_history(tmp_path))
    m = Machines(tmp_path)
    m.event("run_start", 86_400.0)
    m.event("run_end", 0.0)
    after = cost(read_history(tmp_path))
    assert after == before
    last = before["dit-dc-ae"]
    # A tenth was waiting for data; a second passed until the group was asked to stop.
    assert last.kept * 3600 == pytest.approx(0.9 * (2 * 100 / 8 + 3 * 300 / 12) + 2 * 1.0, 1e-6)
    assert last.held > last.kept
