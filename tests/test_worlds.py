"""Ranks that wait for the next world."""

import os

import pytest
from worlds import run_world

from elastic.world import World


def _told(world: World, name: str) -> tuple[int, int, str | None]:
    """Rank, process, and a variable."""
    found = world.rank, os.getpid(), os.environ.get(name)
    os.environ[name] = "left behind"
    return found


def _fails(world: World) -> None:
    assert world.rank == 0, "the second rank fails"
    world.barrier()


def test_a_rank_that_is_used_again_keeps_its_number_and_not_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RESTAGE_TEST", "first")
    first = run_world(_told, 2, "RESTAGE_TEST")
    monkeypatch.setenv("RESTAGE_TEST", "second")
    again = run_world(_told, 2, "RESTAGE_TEST")
    assert [told[:2] for told in again] == [told[:2] for told in first]
    assert {told[2] for told in again} == {"second"}
    (alone,) = run_world(_told, 1, "RESTAGE_TEST", is_fresh=True)
    assert alone[0] == 0
    assert alone[1] not in {told[1] for told in first}


def test_after_a_failure_the_next_world_has_other_processes() -> None:
    before = {told[1] for told in run_world(_told, 2, "RESTAGE_TEST")}
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*the second rank fails"):
        run_world(_fails, 2)
    after = {told[1] for told in run_world(_told, 2, "RESTAGE_TEST")}
    assert not before & after
