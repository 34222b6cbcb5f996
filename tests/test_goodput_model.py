"""The model of goodput against closed forms, against a replayed run, and in `plan`."""

import itertools
import json
import math
import random
import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replayed_run import UPDATE_S, Replay
from tiny import STAGE

from cluster import constants
from cluster.constants import MEASURED, MEASURED_ON, RESULTS, Measured
from cluster.goodput import (
    DAY_S,
    Costs,
    Expected,
    Fault,
    Fleet,
    Kind,
    Times,
    best_interval,
    draw_faults,
    expected,
    run,
)
from elastic.checkpoint_store import DEFAULT_KEEP
from elastic.cli import main
from elastic.forecast import forecast
from elastic.forecast_json import forecast_json
from elastic.goodput import account
from elastic.outlook import Faults, outlook, scale_lines
from stages.layout import rounded
from stages.plan import Plan

ROOT = Path(__file__).parent.parent
FREE = Costs(interval_s=100, save_s=0, background_s=0, planned_s=0, process_s=0, machine_s=0)


def fleet(**changed: Any) -> Fleet:
    return Fleet(**{"machines": 1, "least": 1, "faults_per_day": 0.0, **changed})


def costs(**changed: Any) -> Costs:
    return Costs(**{field.name: getattr(FREE, field.name) for field in fields(FREE)} | changed)


def daly(interval_s: float, save_s: float, restart_s: float, mean_s: float) -> float:
    """Goodput by Daly's complete model: faults may strike during saves and restarts too."""
    wall = mean_s * math.exp(restart_s / mean_s) * math.expm1((interval_s + save_s) / mean_s)
    return interval_s / wall


@pytest.mark.parametrize(
    ("interval_s", "save_s", "restart_s", "mean_s"),
    [(300, 5, 60, 20_000), (300, 5, 60, 1_000), (1_000, 100, 500, 2_000), (50, 0, 0, 100)],
)
def test_the_model_is_dalys_where_machines_never_change(
    interval_s: float, save_s: float, restart_s: float, mean_s: float
) -> None:
    one = expected(
        fleet(machines=4, least=4, faults_per_day=DAY_S / mean_s / 4, machine_share=0.0),
        costs(interval_s=interval_s, save_s=save_s, process_s=restart_s),
        run_s=500 * mean_s,
    )
    exact = daly(interval_s, save_s, restart_s, mean_s)
    assert abs(one.goodput - exact) < 4 * one.standard_error + 1e-4
    assert one.standard_error < 0.01
    assert one.low <= one.goodput <= one.high


def test_without_faults_only_saves_take_time() -> None:
    saving = costs(interval_s=90, save_s=10, process_s=1e6, machine_s=1e6)
    assert expected(fleet(machines=1000), saving, 1e5).goodput == pytest.approx(0.9)
    assert expected(fleet(), costs(interval_s=math.inf), 1e5).goodput == 1
    assert expected(fleet(), FREE, 1e5).shares.work == 1


def test_without_costs_only_work_since_the_last_save_is_lost() -> None:
    faults = [Fault(at, Kind.PROCESS, 0.0, 0.0) for at in (250.0, 299.0, 1_000.0)]
    assert run(fleet(), FREE, faults, 2_000) == Times(
        training=2_000 - 50 - 49 - 1, lost=50 + 49 + 1, work=1_900
    )


def test_a_save_that_is_still_being_written_cannot_be_restored() -> None:
    slow = costs(interval_s=100, save_s=10, background_s=30)
    for at, lost in ((139, 129), (141, 31), (109, 100), (249, 129), (251, 31)):
        times = run(fleet(), slow, [Fault(at, Kind.PROCESS, 0.0, 0.0)], at)
        assert times.lost == 0, "a fault at the end is none"
        times = run(fleet(), slow, [Fault(at, Kind.PROCESS, 0.0, 0.0)], at + 1e-6)
        assert times.lost == pytest.approx(lost, abs=1e-3), at
    late = costs(interval_s=10, save_s=10, background_s=90)
    assert run(fleet(), late, [], 1_000).saving == 100, "a save waits for the one before"


def test_an_announced_loss_loses_nothing_and_a_spare_takes_its_place() -> None:
    paid = costs(planned_s=7, machine_s=20)
    announced, at_once = (Fault(150, kind, 0.0, 500) for kind in (Kind.ANNOUNCED, Kind.MACHINE))
    pair = fleet(machines=2, spares=1)
    assert run(pair, paid, [announced], 1_000) == Times(training=993, starting=7, work=993)
    assert run(pair, paid, [at_once], 1_000) == Times(training=930, lost=50, starting=20, work=930)


def test_without_a_spare_it_trains_on_what_is_left_and_grows_again() -> None:
    paid = costs(interval_s=1e9, planned_s=10, machine_s=20)
    lost = [Fault(100, Kind.ANNOUNCED, 0.9, 300), Fault(200, Kind.MACHINE, 0.9, 300)]
    # The second falls on the place that is empty.
    times = run(fleet(machines=2), paid, lost, 1_000)
    assert times.starting == 10 + 10
    assert times.work == 100 + (300 - 10) / 2 + 600 - 10


def test_a_fault_during_a_restart_does_not_shorten_it() -> None:
    paid = costs(process_s=60, machine_s=120)
    lost = [Fault(100, Kind.MACHINE, 0.9, 1e6), Fault(110, Kind.PROCESS, 0.0, 0.0)]
    assert run(fleet(machines=2), paid, lost, 1_000).starting == 120
    late = [lost[0], Fault(200, Kind.PROCESS, 0.0, 0.0)]
    assert run(fleet(machines=2), paid, late, 1_000).starting == 100 + 60


def test_too_few_machines_wait() -> None:
    lost = [Fault(100, Kind.ANNOUNCED, 0.0, 300)]
    times = run(fleet(machines=2, least=2), costs(machine_s=20), lost, 1_000)
    assert times == Times(training=100 + 580, waiting=300, starting=20, work=680)
    # A machine that is up for a mean of 1000 s, and then away for a mean of 500 s.
    one = expected(fleet(faults_per_day=DAY_S / 1_000, return_s=500), FREE, 1e6)
    assert one.shares.waiting == pytest.approx(1 / 3, abs=0.01)


def test_a_group_is_cut_to_whole_multiples_and_what_stands_idle_is_not_missed() -> None:
    """Four machines of 2 GPUs, of which multiples of 4 can train: of three, one stands idle."""
    paid = costs(interval_s=1e9, planned_s=10)
    eight = fleet(machines=4, least=2, gpus=2.0, multiple=4)
    assert [eight.used(machines) for machines in range(5)] == [0, 0, 2, 2, 4]
    one = Fault(100, Kind.ANNOUNCED, 0.0, 400)
    # On half from 110 on, and on all again from 510 on.
    assert run(eight, paid, [one], 1_000).work == 100 + 390 / 2 + 490
    idle = Fault(200, Kind.MACHINE, 0.6, 100)  # is back before the other one, and of no use yet
    assert run(eight, paid, [one, idle], 1_000) == run(eight, paid, [one], 1_000)
    long = idle._replace(away_s=600)  # then nothing changes before it is back
    assert run(eight, paid, [one, long], 1_000).work == 100 + 690 / 2 + 190


def test_a_machine_by_which_no_update_is_shorter_is_not_grown_onto() -> None:
    """Three machines are as fast as two."""
    paid = costs(interval_s=1e9, planned_s=10)
    four = fleet(machines=4, speed={1: 1.0, 2: 2.0, 3: 2.0, 4: 4.0}.__getitem__)
    assert [four.rate(machines) for machines in (1, 2, 3, 4)] == [0.25, 0.5, 0.5, 1]
    one = Fault(100, Kind.ANNOUNCED, 0.0, 400)
    assert run(four, paid, [one], 1_000).work == 100 + 390 / 2 + 490
    other = Fault(200, Kind.ANNOUNCED, 0.6, 100)  # at 300 there are three again
    assert run(four, paid, [one, other], 1_000).work == 100 + 90 / 2 + 290 / 2 + 490


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 12)),
    multiple=st.integers(1, 12),
    data=st.data(),
)
def test_a_run_is_never_modelled_on_a_world_that_the_stage_cannot_have(
    sizes: tuple[int, int], multiple: int, data: st.DataObject
) -> None:
    machines, each = sizes
    one = fleet(machines=machines, gpus=float(each), multiple=multiple)
    there = data.draw(st.integers(0, machines))
    workers = one.used(there) * each
    assert workers == pytest.approx(rounded(there * each, multiple))


def test_the_best_interval_is_where_dalys_formula_has_its_maximum() -> None:
    for stall, mean in ((1, 100_000), (30, 20_000), (60, 3_000)):
        best = best_interval(stall, mean)
        candidates = [best * factor for factor in (0.8, 0.95, 1.0, 1.05, 1.25)]
        values = [daly(interval, stall, 0, mean) for interval in candidates]
        assert max(values) == values[2], (stall, mean)
    assert best_interval(5, math.inf) == math.inf
    assert best_interval(300, 100) == 100


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(
        st.builds(
            Fault,
            st.floats(0, 900),
            st.sampled_from(Kind),
            st.floats(0, 0.999),
            st.floats(0, 400),
        ),
        max_size=20,
    ),
    st.integers(0, 3),
    st.floats(0.1, 300),
)
def test_every_second_of_a_modelled_run_is_counted_once(
    machines: int, faults: list[Fault], spares: int, interval_s: float
) -> None:
    some = costs(
        interval_s=interval_s, save_s=3, background_s=20, planned_s=7, process_s=11, machine_s=31
    )
    least = (machines + 1) // 2
    times = run(
        fleet(machines=machines, least=least, spares=spares),
        some,
        sorted(faults, key=lambda fault: fault.at_s),
        1_000,
    )
    assert times.total == pytest.approx(1_000)
    assert all(getattr(times, field.name) >= 0 for field in fields(times))
    assert times.work <= times.training + 1e-9


def test_a_seed_is_one_answer_and_ten_thousand_gpus_take_seconds() -> None:
    began = time.process_time()
    one, two = (outlook(10_000, 1, Faults(3e-3), 2e11) for _ in range(2))
    assert time.process_time() - began < 20
    assert one == two
    assert (
        0.5 < one.expected.goodput < outlook(10_000, 1, Faults(4.7e-4), 2e11).expected.goodput < 1
    )
    assert one.fleet.crash_mean_s == pytest.approx(DAY_S / 30)
    # Far beyond what can work: an answer all the same, and soon, and of how short a run it is.
    dire = outlook(10_000, 1, Faults(1e4), 2e11).expected
    assert dire.goodput < 0.01
    # 20 runs share what can be modelled; a GPU has 10,000 faults a day.
    assert dire.run_s == pytest.approx(100_000 / 20 / 1e8 * DAY_S)
    assert one.expected.run_s == 30 * DAY_S
    assert time.process_time() - began < 40


def test_the_published_time_to_failure_follows_from_the_rate() -> None:
    rsc = fleet(machines=128, faults_per_day=8 * constants.RATE_RSC.value)
    assert rsc.crash_mean_s / 3600 == pytest.approx(7.9, abs=0.1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"machines": 0}, "least"),
        ({"least": 2}, "least=2"),
        ({"faults_per_day": -1.0}, "faults_per_day=-1.0"),
        ({"faults_per_day": math.nan}, "nan"),
        ({"return_s": math.inf}, "return_s"),
        ({"machine_share": 1.5}, "a share"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fleet(**changed)
    with pytest.raises(ValueError, match="interval_s=0"):
        costs(interval_s=0)


@pytest.mark.parametrize("seed", range(6))
def test_fed_with_a_runs_faults_the_model_gives_its_account(seed: int) -> None:
    """Processes, machines and notices, waits and restarts that are struck; the model to the second.

    The run does whole updates, so it may be one behind at each resize, and a crash ends one amid
    it. Of a save that no crash let be written the journal says nothing: its stall is lost work
    there, and saving in the model. (A crash within an update of the moment at which a save can be
    restored would tip a whole interval; in these runs none does.)
    """
    paid = costs(
        interval_s=200, save_s=6, background_s=20, planned_s=40, process_s=60, machine_s=90
    )
    some = fleet(
        machines=4,
        least=3,
        faults_per_day=60.0,
        announced_share=0.3,
        machine_share=0.5,
        return_s=400,
    )
    end_s = 20_000.0
    drawn = draw_faults(some, random.Random(seed))
    faults = list(itertools.takewhile(lambda fault: fault.at_s < end_s, drawn))
    replayed = Replay(faults, paid, some.machines, some.least, end_s)
    told = account(replayed.events, replayed.metrics)
    modelled = run(some, paid, faults, told.seconds())
    assert {fault.kind for fault in faults} == set(Kind)
    assert min(modelled.waiting, modelled.lost, modelled.starting) > 500
    longest_s = UPDATE_S * some.machines / some.least
    amiss = replayed.num_resyncs * longest_s + replayed.num_unwritten * paid.save_s
    assert amiss < 0.005 * end_s, "what is allowed is little"
    for activity, seconds in (
        ("training", modelled.training),
        ("saving", modelled.saving),
        ("lost work", modelled.lost),
        ("starting", modelled.starting),
        ("waiting for machines", modelled.waiting),
    ):
        assert told.seconds(activity) == pytest.approx(seconds, rel=0, abs=amiss), activity
    assert told.seconds("down") == told.seconds("other") == 0


def test_constants_are_what_the_benchmarks_measured() -> None:
    for name, constant in MEASURED.items():
        path = ROOT / RESULTS / f"{constant.bench}.json"
        if not path.exists():
            assert constant.is_provisional, f"{name}: no {path}, so it is provisional"
            continue
        kept: Any = json.loads(path.read_text())
        for key in constant.path.split("."):
            assert key in kept, f"{name}: {path} has no {constant.path}"
            kept = kept[key]
        kept = kept["median"] if isinstance(kept, dict) else kept
        device = json.loads(path.read_text())["device"]
        assert device in MEASURED_ON[constant.bench], f"{path}: measured on {device}"
        assert (constant.value, constant.is_provisional) == (kept, False), (
            f"{name}: {path} says {kept}; bring cluster/constants.py along"
        )


def test_every_measured_constant_is_in_the_table() -> None:
    named = {n: c for n, c in vars(constants).items() if isinstance(c, Measured)}
    assert named == MEASURED
    assert {constant.bench for constant in MEASURED.values()} == MEASURED_ON.keys()


def test_plan_says_what_to_expect_and_what_that_rests_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, storage = str(Path(__file__).with_name("tiny_plan.py")), str(tmp_path / "runs")
    arguments = ["plan", plan, "--storage", storage, "--gpus", "3"]
    assert main([*arguments, "--failure-rate", "0.003"]) == 0
    out = capsys.readouterr().out
    for words in ("% expected", "standard error", "best saved every", "10,000", "lost work"):
        assert words in out
    for constant in MEASURED.values():
        bench = f"tests/bench/{constant.bench}.py"
        kind = "provisional: " if constant.is_provisional else "measured: "
        assert any(line.startswith(kind) and bench in line for line in out.splitlines())
    assert main([*arguments, "--failure-rate", "0"]) == 0
    assert "the fewer saves the better" in capsys.readouterr().out


def test_plan_says_on_what_machine_costs_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: constant._replace(is_provisional=False) for name, constant in MEASURED.items()}
    monkeypatch.setattr("elastic.outlook.MEASURED", known)
    said = "\n".join(scale_lines(Faults(0.0), 1e9, None))
    assert all(machine in said for machine in MEASURED_ON.values())
    assert "provisional" not in said


def test_plan_models_no_world_that_a_stage_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modelled: list[tuple[int, int]] = []

    def kept(fleet: Fleet, costs: Costs, run_s: float) -> Expected:
        modelled.append((round(fleet.machines * fleet.gpus), fleet.multiple))
        return expected(fleet, costs, 1.0)

    monkeypatch.setattr("elastic.outlook.expected", kept)
    model = STAGE.model.replace(heads=6, width=48)
    stage = STAGE.replace(model=model, context=3, shard_within=2, workers=(6, 60))
    text = forecast(Plan("shared", [stage]), tmp_path, 20, Faults(0.01))
    assert "on 18 GPUs" in text
    assert {size for size, _ in modelled} == {6, 18, 96, 996, 9_996}
    assert {multiple for _, multiple in modelled} == {6}
    assert re.findall(r"^ +([\d,]+)  \d.* % expected", text, re.M) == [
        "6", "18", "96", "996", "9,996",
    ]  # fmt: skip
    modelled.clear()
    forecast_json(Plan("shared", [stage]), tmp_path, 20, Faults(0.01), DEFAULT_KEEP)
    assert modelled == [(18, 6)]


def test_plan_takes_notice_and_spares_into_account(capsys: pytest.CaptureFixture[str]) -> None:
    def shares(announced: float, spares: int) -> Times:
        faults = Faults(0.003, announced, spares)
        return outlook(1_000, 1_000, faults, 1e9, interval_s=600).expected.shares

    assert 0 < shares(0.9, 0).lost < 0.2 * shares(0.0, 0).lost
    assert shares(0.0, 10).waiting < 0.2 * shares(0.0, 0).waiting
    arguments = ["plan", str(Path(__file__).with_name("tiny_plan.py")), "--announced", "0.9"]
    assert main([*arguments, "--spares", "2"]) == 2
    assert "--announced was given without --failure-rate" in capsys.readouterr().err
    assert main([*arguments, "--spares", "2", "--failure-rate", "10000"]) == 0
    out = capsys.readouterr().out
    assert "faults a GPU-day (90 % announced), 2 spare machines, runs of 30 days" in out
    assert "90 % of runs of only " in out, "as many faults as there are cannot be modelled"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--announced", "1.1"),
        ("--announced", "nan"),
        ("--spares", "0"),
        ("--gpus", "0"),
        ("--gpus", "-1"),
        ("--gpus", "nan"),
        ("--failure-rate", "-0.1"),
    ]
    + [("--failure-rate", text) for text in ("nan", "inf", "often", "")],
)
def test_plan_refuses_what_is_no_number(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["plan", "any.py", f"{flag}={value}"])
    assert refused.value.code == 2
    assert f"argument {flag}: {value!r}: must be" in capsys.readouterr().err
