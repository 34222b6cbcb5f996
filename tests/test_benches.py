"""Benchmarks take part in every change: they load, and the one that feeds `plan` works."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import world_of_one

BENCHES = sorted((Path(__file__).parent / "bench").glob("*.py"))


def load(path: Path) -> ModuleType:
    """A script by its path: on sys.path its name may stand before one of Python's own."""
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # scripts put themselves there
    assert callable(load(path).main)


def test_a_benchmark_of_saves_measures_every_way_and_says_what_a_worker_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "sync", lambda: None)  # other work on this machine is none of ours
    bench = load(Path(__file__).parent / "bench" / "checkpoint.py")
    monkeypatch.setattr(bench, "WIDTH", 8)
    with world_of_one() as world:
        measured = bench.measure(world, tmp_path / "stage", 1, 1)
    figures = bench.figures_of([measured])
    assert {way: len(saves) for way, saves in measured["saves"].items()} == dict.fromkeys(
        bench.WAYS, 1
    )
    # Four blocks of 8 by 32 and back, each value with its average and two moments in fp32.
    assert figures["state_bytes"] == 4 * (2 * 8 * 32 + 32 + 8) * 4 * 4
    for name in ("stall_s", "background_s", "lost_s"):
        assert figures[name].keys() == {"median", "min", "max"}


def test_the_loops_that_are_timed_beside_ours_train_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    bench = load(Path(__file__).parent / "bench" / "overhead.py")
    with world_of_one() as world:
        ours, bare = (bench.turn_of(name, world, 4, True) for name in ("ours", "bare"))
    assert len(ours.losses) == len(ours.wall_s) == 4
    assert len(set(ours.losses)) == 4
    assert bare.losses == pytest.approx(ours.losses, rel=bench.LOSS_TOLERANCE)
