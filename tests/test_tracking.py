import itertools
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from elastic.aim_view import AIM_RUNS, HEIGHTS, MARKS, PLAN_RUN, RECONSTRUCTIONS, sentence
from elastic.clock import boot_clock
from elastic.data.moving_shapes import render
from elastic.film import write_mp4
from elastic.journal import EVENTS, METRICS, Event, Journal, Metric, read_journal
from elastic.tracking import Tracker, _Accounts, rebuild_aim

STAGES = {"vae": 100, "dit <i>": 200}


def metric(stage: str, position: int, loss: float, attempt: int = 1, **context: str) -> Metric:
    return {
        "wall": 1000.0 + position,
        "stage": stage,
        "attempt": attempt,
        "position": position,
        "world": 2,
        "context": context,
        "values": {"loss": loss, "psnr": None},
        "order_digest": "00",
    }


def event(kind: str, stage: str | None, position: int | None, reason: str = "") -> Event:
    return {
        "wall": 1.0,
        "kind": kind,
        "stage": stage,
        "position": position,
        "attempt": 1,
        "world": 2,
        "reason": reason,
    }


def pictured(kind: str, stage: str, position: int, paths: list[str], captions: list[str]) -> Event:
    return {**event(kind, stage, position), "paths": paths, "captions": captions}


class Reader:
    """Reads an Aim repository back as its web page would."""

    def __init__(self, run_dir: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import aim
            from aim.sdk.index_manager import RepoIndexManager
        self.repo = aim.Repo(str(run_dir))
        for run_hash in json.loads((run_dir / AIM_RUNS).read_text())["runs"].values():
            RepoIndexManager(self.repo).index(run_hash)
        self.repo.container_pool.clear()

    def series(self, name: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """(run name, context as sorted JSON) to (step, value)."""
        from aim.sdk.types import QueryReportMode

        found = {}
        query = self.repo.query_metrics(
            f"metric.name == {name!r}", report_mode=QueryReportMode.DISABLED
        )
        for runs in query.iter_runs():
            for one in runs:
                steps, (values, *_) = one.data.numpy()
                context = json.dumps(one.context.to_dict(), sort_keys=True)
                pairs = sorted(zip(steps.tolist(), values.tolist(), strict=True))
                found[one.run.name, context] = [(int(step), value) for step, value in pairs]
        return found

    def objects(self, name: str, query: Any) -> dict[tuple[str, str, int], list[Any]]:
        """(run name, stage of the context, step) to the texts or images of that step."""
        from aim.sdk.types import QueryReportMode

        found: dict[tuple[str, str, int], list[Any]] = {}
        for runs in query(self.repo)("", report_mode=QueryReportMode.DISABLED).iter_runs():
            for one in runs:
                if one.name != name:
                    continue
                for step, (value, *_) in one.data.items():
                    key = (one.run.name, one.context.to_dict()["stage"], step)
                    found.setdefault(key, []).extend(value if isinstance(value, list) else [value])
        return found


def context(**fields: str) -> str:
    return json.dumps(fields, sort_keys=True)


def test_values_reach_the_journal_and_the_runs_of_stage_and_plan(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "demo", STAGES)
    tracker.log(metric("vae", 50, 3.0, bucket="64px-17f"))
    tracker.log(metric("vae", 100, 2.0, bucket="64px-17f"))
    tracker.log(metric("dit <i>", 10, 1.5, subset="held_out"))
    tracker.event(event("crash", "dit <i>", 10, "signal 9 <b>"))
    tracker.flush()
    tracker.close()
    tracker.close()
    assert tracker.aim_problem() is None
    assert [one["position"] for one in read_journal(tmp_path / METRICS)] == [50, 100, 10]
    reader = Reader(tmp_path)
    bucket = context(stage="vae", bucket="64px-17f")
    held_out = context(stage="dit <i>", subset="held_out")
    assert reader.series("loss") == {
        ("demo / 1-vae", bucket): [(50, 3.0), (100, 2.0)],
        ("demo", bucket): [(50, 3.0), (100, 2.0)],
        ("demo / 2-dit <i>", held_out): [(10, 1.5)],
        ("demo", held_out): [(110, 1.5)],
    }
    assert reader.series("psnr") == {}, "a value that is no number is not shown"
    assert reader.series("world_size")["demo", context(stage="dit <i>")] == [(110, 2.0)]
    assert set(reader.series("attempt")["demo", context(stage="vae")]) == {(50, 1.0), (100, 1.0)}
    texts = reader.objects("events", lambda repo: repo.query_texts)
    assert [t.data for t in texts["demo / 2-dit <i>", "dit <i>", 10]] == [
        "crash, at 10 samples, world 2: signal 9 <b>"
    ]
    assert ("demo", "dit <i>", 110) in texts


def test_a_restart_continues_the_same_runs_and_overwrites_redone_positions(tmp_path: Path) -> None:
    for attempt, positions in ((1, (10, 20, 30)), (2, (20, 30, 40))):
        tracker = Tracker(tmp_path, "demo", STAGES)
        for position in positions:
            tracker.log(metric("vae", position, attempt * 100.0 + position, attempt))
        tracker.close()
        assert tracker.aim_problem() is None
    runs = json.loads((tmp_path / AIM_RUNS).read_text())["runs"]
    assert set(runs) == {"vae", PLAN_RUN}
    losses = Reader(tmp_path).series("loss")
    assert losses["demo / 1-vae", context(stage="vae")] == [
        (10, 110.0),
        (20, 220.0),
        (30, 230.0),
        (40, 240.0),
    ]
    assert len(losses) == 2
    lost = Reader(tmp_path).series("loss_by_attempt")
    assert lost["demo / 1-vae", context(stage="vae", attempt="1")] == [
        (10, 110.0),
        (20, 120.0),
        (30, 130.0),
    ]
    assert len(lost["demo / 1-vae", context(stage="vae", attempt="2")]) == 3
    assert len(read_journal(tmp_path / METRICS)) == 6


def test_whatever_a_line_carries_reaches_aim(tmp_path: Path) -> None:
    carried = {"loss": 1.0, "grad_norm": 2.0, "lr": 3.0, "tokens_per_s": 4.0, "data_wait": 5.0,
               "mfu": 6.0, "something_new": 7.0}  # fmt: skip
    tracker = Tracker(tmp_path, "demo", STAGES)
    tracker.log({**metric("vae", 50, 1.0), "values": dict(carried)})
    tracker.close()
    reader = Reader(tmp_path)
    for name, value in carried.items():
        assert reader.series(name)["demo", context(stage="vae")] == [(50, value)], name


def test_losses_by_level_of_noise_are_one_chart_with_the_time_as_context(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "demo", STAGES)
    about = {"subset": "held_out"}
    for place in ({}, about):
        line = {**metric("vae", 50, 1.0, **place), "values": {"loss_t0": 4.0, "loss_t7": 2.0}}
        tracker.log(line)
    tracker.close()
    series = Reader(tmp_path).series("loss_by_t")
    for t, value in (("0.0625", 4.0), ("0.9375", 2.0)):
        for place in ({}, about):
            assert series["demo / 1-vae", context(stage="vae", t=t, **place)] == [(50, value)]


def test_a_run_has_the_parameters_of_its_stage_and_names_its_parents(tmp_path: Path) -> None:
    vae = {"name": "vae", "schedule": [], "seed": 3, "rate": None}
    dit = {"name": "dit <i>", "schedule": [{"until": 9}], "vae": vae, "data": {"table": "x"},
           "init": {"stage": vae, "clips": 4}}  # fmt: skip
    record = {"definition": {"stages": [vae, dit]}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    tracker = Tracker(tmp_path, "demo", STAGES)
    tracker.log(metric("dit <i>", 50, 3.0))
    tracker.close()
    assert tracker.aim_problem() is None
    (run,) = [r for r in Reader(tmp_path).repo.iter_runs() if r.name == "demo / 2-dit <i>"]
    assert run["stage"] == {
        "name": "dit <i>",
        "schedule": [{"until": 9}],
        "vae": {"stage": "vae"},
        "init": {"stage": "vae", "clips": 4},
    }


def test_goodput_is_shown_after_saves_the_less_often_the_longer_a_run_lasts() -> None:
    events = [{**event("run_start", None, None), "wall": 0.0}]
    accounts = _Accounts([events[0]])
    walls = [*range(1, 20), *range(20, 90_000, 20)]
    shown = [w for w in walls if accounts.is_due({**event("publish", "vae", 1), "wall": float(w)})]
    assert shown[:3] == [5, 10, 15]
    assert all(b - a >= 0.02 * b for a, b in itertools.pairwise(shown))
    assert 200 < len(shown) < 400
    assert not accounts.is_due({**event("sample", "vae", 1), "wall": 1e6})
    assert accounts.is_due({**event("run_end", None, None), "wall": 90_001.0})


def test_what_no_person_reads_is_left_out_of_an_event() -> None:
    line: Event = {**event("sample", "vae", 50, "averaged weights"), "captions": ["a", "b"]}
    line["pids"] = [1, 2]
    line["seconds"] = 3.5
    assert sentence(line) == "sample, at 50 samples, world 2, seconds=3.5: averaged weights"


def test_samples_of_one_position_are_shown_together_and_move(tmp_path: Path) -> None:
    stages = [{"name": "vae"}, {"name": "dit <i>", "model": {"patch": 2}}]
    (tmp_path / "run.json").write_text(json.dumps({"definition": {"stages": stages}}))
    tracker = Tracker(tmp_path, "demo", STAGES)
    captions = ["a red circle", "a blue square"]
    for caption in captions:
        path = tmp_path / f"{caption}.mp4"
        write_mp4(path, render("circle", "red", "up", "slowly", (64, 64), 5, 8, 0), 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    films, stills = [f"{caption}.mp4" for caption in captions], ["still.png", "still.png"]
    tracker.event(pictured("preview", "dit <i>", 40, films, captions))
    tracker.event(pictured("sample", "dit <i>", 80, stills[:1], captions[:1]))
    tracker.event(pictured("sample", "vae", 100, stills, ["a pair", "a pair"]))
    tracker.close()
    assert tracker.aim_problem() is None
    images = Reader(tmp_path).objects("samples", lambda repo: repo.query_images)
    name, stage = "demo / 2-dit <i>", "dit <i>"
    assert sorted(one.caption for one in images[name, stage, 40]) == sorted(captions)
    assert [one.caption for one in images[name, stage, 80]] == ["a red circle"]
    assert sorted(one.caption for one in images["demo", stage, 140]) == sorted(captions)
    pairs = Reader(tmp_path).objects(RECONSTRUCTIONS, lambda repo: repo.query_images)
    assert [one.caption for one in pairs["demo / 1-vae", "vae", 100]] == ["a pair", "a pair"]
    picture = images[name, stage, 40][0].to_pil_image()
    assert (picture.format, picture.n_frames, picture.size) == ("WEBP", 5, (64, 64))


def test_without_aim_the_journal_goes_on_and_the_reason_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "aim", None)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tmp_path, "demo", STAGES)
        tracker.log(metric("vae", 50, 3.0))
        tracker.event(event("crash", "vae", 50))
        tracker.event(pictured("sample", "vae", 50, ["nowhere.mp4"], ["caption"]))
        tracker.close()
    assert len(caplog.records) == 1
    assert "pip install aim" in caplog.text
    assert "pip install aim" in str(tracker.aim_problem())
    assert not (tmp_path / ".aim").exists()
    assert len(read_journal(tmp_path / METRICS)) == 1


def test_an_aim_that_fails_is_switched_off_and_training_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(tmp_path, "demo", STAGES)
    tracker.log(metric("vae", 50, 3.0))
    with caplog.at_level(logging.WARNING):
        (tmp_path / "torn.mp4").write_bytes(b"no film")
        tracker.event(pictured("sample", "vae", 50, ["torn.mp4"], ["caption"]))
        tracker.log(metric("vae", 60, 3.0))
        tracker.event(event("crash", "vae", 60))
    tracker.close()
    assert [r.name for r in caplog.records] == ["elastic.tracking"]
    assert "torn.mp4" in str(tracker.aim_problem())
    assert [one["position"] for one in read_journal(tmp_path / METRICS)] == [50, 60]


def test_a_damaged_index_of_runs_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / AIM_RUNS).write_text("{torn")
    tracker = Tracker(tmp_path, "demo", STAGES)
    tracker.log(metric("vae", 50, 3.0))
    tracker.close()
    assert "JSONDecodeError" in str(tracker.aim_problem())
    assert len(read_journal(tmp_path / METRICS)) == 1


def test_the_view_is_rebuilt_from_the_journals_alone(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "demo", STAGES)
    tracker.log(metric("vae", 50, 3.0))
    tracker.log(metric("vae", 50, 2.0, attempt=2))
    tracker.close()
    events = Journal(tmp_path / EVENTS)
    (tmp_path / "samples").mkdir()
    write_mp4(
        tmp_path / "samples" / "a.mp4",
        render("circle", "red", "up", "slowly", (64, 64), 3, 8, 0),
        8,
    )
    events.append(
        **event("sample", "vae", 50),
        paths=["samples/a.mp4", "samples/gone.mp4"],
        captions=["kept", "gone"],
    )
    events.close()
    before = Reader(tmp_path).series("loss")
    # Under another path: Aim keeps what it knows of a path as long as the process lives.
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns(".aim", "moved"))
    (moved / ".aim").mkdir()
    (moved / ".aim" / "damaged").touch()
    assert set(rebuild_aim(moved)) == {"vae", PLAN_RUN}
    reader = Reader(moved)
    assert reader.series("loss") == before
    assert not list(moved.glob(".aim-rebuild-*"))
    assert not (moved / ".aim" / "damaged").exists()
    assert before["demo / 1-vae", context(stage="vae")] == [(50, 2.0)]
    images = reader.objects("samples", lambda repo: repo.query_images)
    assert [one.caption for one in images["demo / 1-vae", "vae", 50]] == ["kept"]


def test_each_caption_is_a_series_of_its_own_over_the_positions(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    tracker = Tracker(tmp_path, "demo", STAGES)
    for kind, position in (("preview", 40), ("preview", 80), ("sample", 200)):
        captions = ["a red circle", "blue", "green"][: 2 + (kind == "sample")]
        stills = ["still.png"] * len(captions)
        tracker.event(pictured(kind, "dit <i>", position, stills, captions))
    tracker.close()
    assert tracker.aim_problem() is None
    reader, found = Reader(tmp_path), {}
    from aim.sdk.types import QueryReportMode

    query = reader.repo.query_images("", report_mode=QueryReportMode.DISABLED)
    for runs in query.iter_runs():
        for one in runs:
            steps = [int(step) for step, _ in one.data.items()]
            found[one.run.name, one.context.to_dict()["caption"]] = steps
    assert found["demo / 2-dit <i>", "a red circle"] == [40, 80, 200]
    assert found["demo", "a red circle"] == [140, 180, 300]
    assert found["demo", "green"] == [300]


def _journals(run_dir: Path) -> None:
    """Two stages; the first crashes between its lines at 20 and 30, the second is resized at 50."""
    events, metrics = Journal(run_dir / EVENTS), Journal(run_dir / METRICS)
    walls = itertools.count(1000)

    def tell(kind: str, stage: str | None = None, position: int | None = None) -> None:
        events.append(**{**event(kind, stage, position), "wall": float(next(walls))})

    def log(stage: str, position: int) -> None:
        metrics.append(**{**metric(stage, position, 1.0), "wall": float(next(walls))})

    tell("run_start")
    tell("stage_start", "vae")
    for position in (10, 20):
        log("vae", position)
    tell("crash", "vae")
    for position in (20, 30, 100):
        log("vae", position)
    tell("stage_start", "dit <i>")
    tell("start", "dit <i>", 0)
    log("dit <i>", 50)
    tell("resize_requested", "dit <i>")
    tell("hang", "dit <i>")
    log("dit <i>", 60)
    tell("run_end")
    events.close()
    metrics.close()


def up_and_down(step: int, what: str) -> list[tuple[int, float]]:
    return [(step - 1, 0), (step, HEIGHTS[what]), (step + 1, 0)]


@pytest.mark.parametrize("way", ["rebuilt", "live", "by two drivers"])
def test_crashes_resizes_and_switches_stand_in_a_chart_where_they_happened(
    tmp_path: Path, way: str
) -> None:
    _journals(tmp_path)
    if way == "rebuilt":
        index = {"schema": 1, "plan": "demo", "stages": STAGES, "runs": {}}
        (tmp_path / AIM_RUNS).write_text(json.dumps(index))
        rebuild_aim(tmp_path)
    else:
        played = tmp_path / "played"
        played.mkdir()
        lines = [(one["wall"], one) for name in (METRICS, EVENTS)
                 for one in read_journal(tmp_path / name)]  # fmt: skip
        tracker = Tracker(played, "demo", STAGES)
        for number, (_, line) in enumerate(sorted(lines, key=lambda pair: pair[0])):
            if way == "by two drivers" and number == 4:  # the crash
                tracker.close()
                tracker = Tracker(played, "demo", STAGES)
            (tracker.event if "kind" in line else tracker.log)(line)  # type: ignore[operator]  # of JSON
        tracker.close()
        assert tracker.aim_problem() is None
        tmp_path = played
    series = Reader(tmp_path).series(MARKS)
    for number, stage, position, what in (
        (1, "vae", 20, "crash"),
        (2, "dit <i>", 50, "resize"),
        (2, "dit <i>", 50, "crash"),
    ):
        about, before = context(stage=stage, event=what), 100 * (number - 1)
        assert series[f"demo / {number}-{stage}", about] == up_and_down(position, what)
        assert series["demo", about] == up_and_down(before + position, what)
    assert series["demo", context(stage="dit <i>", event="switch")] == up_and_down(100, "switch")
    # What they stand on reaches as far as the other charts do.
    assert series["demo", context(stage="vae")] == [(10, 0), (20, 0), (30, 0), (100, 0)]
    assert series["demo", context(stage="dit <i>")] == [(150, 0), (160, 0)]


def test_goodput_is_shown_at_the_end_of_a_stage_and_again_by_a_rebuild(tmp_path: Path) -> None:
    journal = Journal(tmp_path / EVENTS)
    tracker = Tracker(tmp_path, "demo", STAGES)
    for wall, kind in ((0, "run_start"), (10, "start"), (110, "stage_end"), (120, "run_end")):
        about = (None, None) if kind.startswith("run") else ("vae", 100)
        line: Event = {**event(kind, *about), "wall": 1000.0 + wall}
        journal.append(**line)
        tracker.event(line)
    tracker.close()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns(".aim", "moved"))
    rebuild_aim(moved)
    for folder in (tmp_path, moved):
        series = Reader(folder).series("goodput")
        assert series == {
            ("demo / 1-vae", context(stage="vae")): [(100, 1.0)],
            ("demo", context(stage="plan")): [(100, 100 / 120)],
        }, folder
        seconds = Reader(folder).series("seconds")
        assert seconds["demo", context(stage="plan", activity="starting")] == [(100, 10.0)]


def test_every_line_carries_a_clock_that_nobody_sets(tmp_path: Path) -> None:
    from elastic.ray_tracker import TrackerService  # Ray: seconds that no other test here needs

    service = TrackerService(str(tmp_path), "demo", STAGES, use_aim=False)
    service.event(event("run_start", None, None))
    service.metric(metric("vae", 50, 3.0))
    service.close()
    lines = read_journal(tmp_path / EVENTS) + read_journal(tmp_path / METRICS)
    assert 0 < lines[0]["clock"] <= lines[1]["clock"] <= boot_clock()


def test_a_rebuild_without_aim_says_so_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".aim").mkdir()
    monkeypatch.setitem(sys.modules, "aim", None)
    with pytest.raises(ImportError):
        rebuild_aim(tmp_path)
    assert (tmp_path / ".aim").exists()
