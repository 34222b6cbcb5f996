"""The tracker: the one writer of metrics.jsonl and of the Aim view that is built from it.

Ray is not imported here: another file wraps `Tracker` as an actor. Aim is imported late, because
it is optional and costs seconds.
"""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from elastic.files import write_atomic
from elastic.film import animated_webp, read_mp4
from elastic.goodput import Account, account
from elastic.journal import (
    METRICS,
    Event,
    Journal,
    Metric,
    read_events,
    read_metrics,
)
from elastic.timeline import ACTIVITIES

AIM_RUNS = "aim_runs.json"
PLAN_RUN = ""  # no stage has an empty name

# Aim shows them as warnings in its Messages; all other kinds as information.
_ALARMING = frozenset({"blocked", "crash", "fault_injected", "quarantine", "resize_requested"})

_ACCOUNTED = frozenset({"stage_end", "run_end"})  # after which the time's account is shown
# In between, after a save once so much of the run's time is new: an account reads both journals.
_NEW_SHARE, _LEAST_NEW_S = 0.02, 5.0
_UNTOLD = frozenset({"pids", "supervisors", "paths", "captions", "table", "clock", "phases"})
SAMPLES, RECONSTRUCTIONS = "samples", "reconstructions"  # names of images

log = logging.getLogger(__name__)


class AimRuns(TypedDict):
    """aim_runs.json: what a restart needs to continue the same Aim runs."""

    schema: int
    plan: str
    stages: dict[str, int]  # name to samples, in the order of the plan
    runs: dict[str, str]  # stage, or PLAN_RUN, to the hash of its Aim run


class Tracker:
    """Writes metrics first to metrics.jsonl, then to Aim; survives the death of Aim."""

    def __init__(
        self, run_dir: str | Path, plan: str, stages: Mapping[str, int], use_aim: bool = True
    ) -> None:
        """`stages` maps the names, in the plan's order, to their budgets in samples."""
        self.run_dir = Path(run_dir)
        self._journal = Journal(self.run_dir / METRICS)
        self._aim: _AimView | None = None
        self._aim_problem: str | None = None if use_aim else "switched off"
        self._accounts = _Accounts(read_events(run_dir))
        if use_aim:
            self._guard(lambda: self._open_aim(plan, stages))

    def log(self, metric: Metric) -> None:
        """Keep one line of metrics; OSError when the disk refuses metrics.jsonl."""
        self._journal.append(**metric)
        self._show(lambda aim: aim.metric(metric))

    def event(self, event: Event) -> None:
        """Show an event in Aim; the driver has already written it to events.jsonl."""
        self._show(lambda aim: aim.event(event))
        if self._aim is not None and self._accounts.is_due(event):
            self._show(lambda aim: aim.account(*_journals(self.run_dir), event))

    def images(self, stage: str, position: int, caption: str, path: str) -> None:
        """Show one sample in Aim, an mp4 as a moving WEBP; several may share a position."""
        self._show(lambda aim: aim.image(stage, position, caption, path))

    def flush(self) -> None:
        """Wait until metrics.jsonl has reached the disk."""
        self._journal.sync()

    def close(self) -> None:
        """End the files and the Aim runs; closing twice is allowed."""
        self._journal.close()
        self._show(lambda aim: aim.close())
        self._aim = None

    def aim_problem(self) -> str | None:
        """Why Aim shows nothing, or None while it does."""
        return self._aim_problem

    def _open_aim(self, plan: str, stages: Mapping[str, int]) -> None:
        self._aim = _AimView(self.run_dir, plan, stages)

    def _show(self, show: "Callable[[_AimView], None]") -> None:
        aim = self._aim
        if aim is not None:
            self._guard(lambda: show(aim))

    def _guard(self, show: Callable[[], None]) -> None:
        try:
            show()
        except ImportError as error:
            self._stop_aim(f"it cannot be imported ({error}); pip install aim")
        # The supervisor of a view: Aim raises RocksDB, SQLAlchemy and its own errors with no
        # common base, and a dashboard must not end a training that its journal has recorded.
        except Exception as error:
            self._stop_aim(f"{type(error).__name__}: {error}")

    def _stop_aim(self, reason: str) -> None:
        self._aim = None
        self._aim_problem = reason
        log.warning(
            "Aim is off for the rest of this run: %s. Metrics go on to %s; "
            "the Aim view can be rebuilt from there",
            reason,
            self._journal.path,
        )


class _Accounts:
    """When the account of a run's time is worth showing again: the fewer the longer it lasts."""

    def __init__(self, events: list[Event]) -> None:
        self._began = self._shown = events[0]["wall"] if events else None

    def is_due(self, event: Event) -> bool:
        """Whether to show it after this event, which counts as shown then."""
        wall = event["wall"]
        if self._began is None or self._shown is None:
            self._began = self._shown = wall
        wanted = max(_LEAST_NEW_S, _NEW_SHARE * (wall - self._began))
        is_new = event["kind"] == "publish" and wall - self._shown >= wanted
        if not is_new and event["kind"] not in _ACCOUNTED:
            return False
        self._shown = wall
        return True


class _AimView:
    """One Aim run for each stage and one for the plan, opened when first written to."""

    def __init__(
        self, run_dir: Path, plan: str, stages: Mapping[str, int], record: Path | None = None
    ) -> None:
        """`record` is the folder with run.json, if it is another one."""
        self.run_dir = run_dir
        self._parameters = _parameters(record or run_dir)
        self._aim = _import_aim()
        self._repo = self._aim.Repo.from_path(str(run_dir), init=True)
        self._index = _read_index(run_dir)
        self._index["plan"] = plan
        self._index["stages"] = dict(stages)
        self._runs: dict[str, Any] = {}  # Any: aim has no types
        self._pictures: tuple[str, int, list[Any]] = ("", -1, [])

    def metric(self, metric: Metric) -> None:
        stage, attempt, about = metric["stage"], metric["attempt"], metric["context"]
        own = {"stage": stage}
        values = {name: value for name, value in metric["values"].items() if value is not None}
        shown = [(key, value, {**own, **about}) for key, value in values.items()]
        # The wall, because a rebuilt view has other times of its own.
        said = {"world_size": metric["world"], "attempt": attempt, "wall": metric["wall"]}
        shown += [(key, value, own) for key, value in said.items()]
        if not about and "loss" in values:  # what was lost and done again stays to be seen
            one = {**own, "attempt": str(attempt)}
            shown.append(("loss_by_attempt", values["loss"], one))
        for name, step in ((stage, metric["position"]), self._on_plan(stage, metric["position"])):
            run = self._run(name)
            for key, value, context in shown:
                run.track(value, name=key, step=step, context=context)

    def event(self, event: Event) -> None:
        stage, kind = event["stage"] or PLAN_RUN, event["kind"]
        position = event["position"] or 0
        text = _sentence(event)
        targets = [self._on_plan(stage, position)]
        if stage != PLAN_RUN:
            targets.append((stage, position))
        for name, step in targets:
            run = self._run(name)
            write = run.log_warning if kind in _ALARMING else run.log_info
            write(text)
            context = {"stage": stage or "plan", "kind": kind}
            run.track(self._aim.Text(text), name="events", step=step, context=context)

    def account(self, events: list[Event], metrics: list[Metric], last: Event) -> None:
        """Show where the time went until the end of a stage, or of a driver."""
        one = account(events, metrics)
        stage, position = last["stage"] or PLAN_RUN, last["position"] or 0
        if not stage:  # the end of a driver: as far as the plan has come
            done = [event for event in events if event["stage"] and event["position"]]
            stage, position = (
                (done[-1]["stage"] or "", done[-1]["position"] or 0) if done else ("", 0)
            )
        step = self._on_plan(stage, position)[1]
        self._track_account(PLAN_RUN, step, one, None)
        if last["stage"]:
            self._track_account(stage, position, one, stage)

    def _track_account(self, name: str, step: int, one: Account, stage: str | None) -> None:
        run, about = self._run(name), {"stage": stage or "plan"}
        goodput = one.goodput(stage)
        if goodput is not None:
            run.track(goodput, name="goodput", step=step, context=about)
        for activity in ACTIVITIES:
            seconds = one.seconds(activity, stage)
            if seconds:
                context = {**about, "activity": activity}
                run.track(seconds, name="seconds", step=step, context=context)

    def image(self, stage: str, position: int, caption: str, path: str) -> None:
        if self._pictures[:2] != (stage, position):
            self._pictures = (stage, position, [])
        pictures = self._pictures[2]
        pictures.append(self._picture(caption, Path(path)))
        # Of an autoencoder: each is a clip beside what came back of it.
        is_pair = "model" not in self._parameters.get(stage, {"model": None})
        what = RECONSTRUCTIONS if is_pair else SAMPLES
        for name, step in ((stage, position), self._on_plan(stage, position)):
            # The growing list again each time: Aim keeps one value for a step, and a kill may come.
            self._run(name).track(list(pictures), name=what, step=step, context={"stage": stage})

    def close(self) -> None:
        while self._runs:
            self._runs.popitem()[1].close()
        self._repo.close()

    def _picture(self, caption: str, path: Path) -> Any:
        if path.suffix.lower() != ".mp4":
            return self._aim.Image(str(path), caption=caption)
        film = read_mp4(path)
        aside = self.run_dir / ".aim" / "frame.webp"
        aside.write_bytes(animated_webp(film.frames_THWC, film.rate or 8.0))
        picture = self._aim.Image(str(aside), caption=caption)
        aside.unlink()
        return picture

    def _on_plan(self, stage: str, position: int) -> tuple[str, int]:
        """The plan's run and its step: samples of the stages before, and of this one."""
        before = 0
        for name, budget in self._index["stages"].items():
            if name == stage:
                break
            before += budget if stage else 0
        return PLAN_RUN, before + position

    def _run(self, stage: str) -> Any:
        if stage in self._runs:
            return self._runs[stage]
        plan, run_hash = self._index["plan"], self._index["runs"].get(stage)
        run = self._aim.Run(
            run_hash=run_hash,
            repo=self._repo,
            experiment=plan,
            force_resume=run_hash is not None,  # a killed writer leaves its lock behind
            system_tracking_interval=None,
            capture_terminal_logs=False,
        )
        order = list(self._index["stages"])
        number = order.index(stage) + 1 if stage in order else len(order) + 1
        run.name = f"{plan} / {number}-{stage}" if stage else plan
        if run_hash is None:
            run.add_tag("kind:stage" if stage else "kind:plan")
            run["hparams"] = {"plan": plan, "stage": stage or "all", "stages": order}
            if stage in self._parameters:
                run["stage"] = self._parameters[stage]
            self._index["runs"][stage] = run.hash
            write_atomic(self.run_dir / AIM_RUNS, json.dumps(self._index, indent=1).encode())
        self._runs[stage] = run
        return run


def rebuild_aim(run_dir: str | Path) -> dict[str, str]:
    """Make the Aim view again from the journals, without redone values; the old view is deleted.

    No tracker may be running. Returns the hash of each run by stage; ImportError without Aim.
    """
    run_dir = Path(run_dir)
    old = _read_index(run_dir)
    metrics, events = read_metrics(run_dir), read_events(run_dir)
    stages = dict(old["stages"])
    for metric in metrics:
        if metric["stage"] not in old["stages"]:
            budget = stages.get(metric["stage"], 0)
            stages[metric["stage"]] = max(budget, metric["position"])
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".aim-rebuild-") as folder:
        # Aside: a rebuild that is killed leaves the old view as it was.
        aside = Path(folder)
        view = _AimView(aside, plan_of(run_dir), stages, run_dir)
        accounts = _Accounts(events)
        # In the order in which they happened: a redone position replaces the lost one.
        for metric in metrics:
            view.metric(metric)
        for number, event in enumerate(events):
            view.event(event)
            if accounts.is_due(event):
                view.account(*_until(events[: number + 1], metrics), event)
            _rebuild_images(view, run_dir, event)
        view.close()
        shutil.rmtree(run_dir / ".aim", ignore_errors=True)
        os.replace(aside / ".aim", run_dir / ".aim")
        if (aside / AIM_RUNS).exists():
            os.replace(aside / AIM_RUNS, run_dir / AIM_RUNS)
    return _read_index(run_dir)["runs"]


def plan_of(run_dir: Path) -> str:
    """The plan by whose name Aim's experiment goes."""
    return _read_index(run_dir)["plan"] or run_dir.resolve().name


def _journals(run_dir: Path) -> tuple[list[Event], list[Metric]]:
    return read_events(run_dir), read_metrics(run_dir)


def _until(events: list[Event], metrics: list[Metric]) -> tuple[list[Event], list[Metric]]:
    """The journals as they were when the last of these events was written."""
    end = events[-1]["wall"]
    return events, [metric for metric in metrics if metric["wall"] <= end]


def _rebuild_images(view: _AimView, run_dir: Path, event: Event) -> None:
    if event["kind"] != "sample" or event["stage"] is None:
        return
    pairs = zip(event.get("paths", []), event.get("captions", []), strict=False)
    for path, caption in pairs:
        if (run_dir / path).exists():
            view.image(event["stage"], event["position"] or 0, caption, str(run_dir / path))


def _import_aim() -> Any:  # Any: aim has no types
    with warnings.catch_warnings():
        # SQLAlchemy's MovedIn20Warning: Aim calls a function that has moved.
        warnings.simplefilter("ignore", DeprecationWarning)
        import aim
    return aim


def _read_index(run_dir: Path) -> AimRuns:
    path = run_dir / AIM_RUNS
    if not path.exists():
        return {"schema": 1, "plan": "", "stages": {}, "runs": {}}
    index: AimRuns = json.loads(path.read_text())
    if index["schema"] != 1:
        raise ValueError(f"{path}: schema {index['schema']}, this version reads schema 1")
    if not (run_dir / ".aim").exists():
        index["runs"] = {}
    return index


def _parameters(run_dir: Path) -> dict[str, Any]:
    """What run.json says of each stage, for Aim's table of parameters; parents by their names."""
    path = run_dir / "run.json"
    definition = json.loads(path.read_text()).get("definition", {}) if path.exists() else {}
    return {one["name"]: _named(one) for one in definition.get("stages", [])}


def _named(stage: dict[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in stage.items() if value is not None and key != "data"}
    for key in ("vae", "init"):
        one = told.get(key, {})
        parent = one if "schedule" in one else one.get("stage")
        if parent is not None:
            told[key] = {**({} if parent is one else one), "stage": parent["name"]}
    return told


def _sentence(event: Event) -> str:
    known = {"wall", "kind", "stage", "position", "attempt", "world", "reason"} | _UNTOLD
    words = [event["kind"].replace("_", " ")]
    if event["position"] is not None:
        words.append(f"at {event['position']:,} samples")
    if event["world"] is not None:
        words.append(f"world {event['world']}")
    words += [f"{key}={value}" for key, value in event.items() if key not in known]
    text = ", ".join(words)
    return f"{text}: {event['reason']}" if event["reason"] else text
