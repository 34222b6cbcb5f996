"""The Aim view of a run: an Aim run for each stage and one for the plan, built from the journals.

Aim is imported late, because it is optional and costs seconds.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from elastic.files import write_atomic
from elastic.film import animated_webp, read_mp4
from elastic.goodput import Account, account
from elastic.journal import Event, Metric
from elastic.level_names import parted
from elastic.timeline import ACTIVITIES

AIM_RUNS = "aim_runs.json"
PLAN_RUN = ""  # no stage has an empty name
SAMPLES, RECONSTRUCTIONS = "samples", "reconstructions"  # names of images

# Aim shows them as warnings in its Messages; all other kinds as information.
_ALARMING = frozenset({"blocked", "crash", "fault_injected", "quarantine", "resize_requested"})
EVENTS = "events"  # name of texts
# Those that are seen in charts too: Aim has no marks for them, so each is a line that goes up and
# comes down again. How high says what it is, and the name, which is a chart's title, says how.
MARKED = {"crash": "crash", "hang": "crash", "resize_requested": "resize", "stage_start": "switch"}
HEIGHTS = {"switch": 1, "resize": 2, "crash": 3}
MARKS = "events: " + ", ".join(f"{height} {what}" for what, height in HEIGHTS.items())
_SHOWN_IN = frozenset({"sample", "preview"})  # events that name pictures
_UNTOLD = frozenset({"pids", "supervisors", "paths", "captions", "table", "clock", "phases"})


class AimRuns(TypedDict):
    """aim_runs.json: what a restart needs to continue the same Aim runs."""

    schema: int
    plan: str
    stages: dict[str, int]  # name to samples, in the order of the plan
    runs: dict[str, str]  # stage, or PLAN_RUN, to the hash of its Aim run


class AimView:
    """One Aim run for each stage and one for the plan, opened when first written to."""

    def __init__(
        self, run_dir: Path, plan: str, stages: Mapping[str, int], record: Path | None = None
    ) -> None:
        """`record` is the folder with run.json and the films, if it is another one."""
        self.run_dir = run_dir
        self._record = record or run_dir
        self._parameters = _parameters(self._record)
        self._aim = _import_aim()
        self._repo = self._aim.Repo.from_path(str(run_dir), init=True)
        self._index = read_index(run_dir)
        self._index["plan"] = plan
        self._index["stages"] = dict(stages)
        self._runs: dict[str, Any] = {}  # Any: aim has no types
        self._reached: dict[str, int] = {}  # by stage, the position of its last line

    def metric(self, metric: Metric) -> None:
        stage, attempt, about = metric["stage"], metric["attempt"], metric["context"]
        own = {"stage": stage}
        values = {name: value for name, value in metric["values"].items() if value is not None}
        shown = []
        for key, value in values.items():
            level = parted(key)  # of noise: one chart for all of them
            name, more = (key, {}) if level is None else (level.together, {"t": level.t})
            shown.append((name, value, {**own, **about, **more}))
        # The wall, because a rebuilt view has other times of its own.
        said = {"world_size": metric["world"], "attempt": attempt, "wall": metric["wall"]}
        if not about:
            self._reached[stage] = metric["position"]
            said[MARKS] = 0  # what the marks stand on, as long as the other charts
        shown += [(key, value, own) for key, value in said.items()]
        if not about and "loss" in values:  # what was lost and done again stays to be seen
            one = {**own, "attempt": str(attempt)}
            shown.append(("loss_by_attempt", values["loss"], one))
        for name, step in ((stage, metric["position"]), self._on_plan(stage, metric["position"])):
            run = self._run(name)
            for key, value, context in shown:
                run.track(value, name=key, step=step, context=context)

    def reached(self, metrics: list[Metric]) -> None:
        """Go on after these lines, which were shown before."""
        self._reached |= {one["stage"]: one["position"] for one in metrics if not one["context"]}

    def event(self, event: Event) -> None:
        stage, kind = event["stage"] or PLAN_RUN, event["kind"]
        position = self._position(event)
        text = sentence(event)
        targets = [self._on_plan(stage, position)]
        if stage != PLAN_RUN:
            targets.append((stage, position))
        for name, step in targets:
            run = self._run(name)
            write = run.log_warning if kind in _ALARMING else run.log_info
            write(text)
            context = {"stage": stage or "plan", "kind": kind}
            run.track(self._aim.Text(text), name=EVENTS, step=step, context=context)
            if kind in MARKED and step:  # nothing is switched from at the plan's beginning
                self._mark(run, stage, MARKED[kind], step)
        if kind in _SHOWN_IN and stage != PLAN_RUN:
            self._show(event, targets)

    def _position(self, event: Event) -> int:
        """Where it happened; who tells of a crash does not know, and the stage's last line does."""
        stage = event["stage"] or PLAN_RUN
        position = event["position"]
        if position is not None:
            # A save is told when it has been written, and the updates have gone on.
            goes_back = event["kind"] == "start"
            self._reached[stage] = max(position, 0 if goes_back else self._reached.get(stage, 0))
            return int(position)
        if event["kind"] == "stage_start":
            return 0  # told again by every driver
        return self._reached.get(stage, 0)

    def _mark(self, run: Any, stage: str, what: str, step: int) -> None:
        context = {"stage": stage, "event": what}
        for at, height in ((step - 1, 0), (step, HEIGHTS[what]), (step + 1, 0)):
            run.track(height, name=MARKS, step=at, context=context)

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

    def _show(self, event: Event, targets: list[tuple[str, int]]) -> None:
        """The films that an event names, a series for each caption; those that are gone are not."""
        stage = event["stage"]
        # Of an autoencoder: each is a clip beside what came back of it.
        is_pair = "model" not in self._parameters.get(stage or "", {"model": None})
        by_caption: dict[str, list[Any]] = {}
        for path, caption in zip(event.get("paths", []), event.get("captions", []), strict=False):
            if (self._record / path).exists():
                picture = self._picture(caption, self._record / path)
                by_caption.setdefault(caption, []).append(picture)
        for caption, pictures in by_caption.items():
            context = {"stage": stage, "caption": caption}
            for name, step in targets:
                what = RECONSTRUCTIONS if is_pair else SAMPLES
                self._run(name).track(pictures, name=what, step=step, context=context)

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


def _import_aim() -> Any:  # Any: aim has no types
    with warnings.catch_warnings():
        # SQLAlchemy's MovedIn20Warning: Aim calls a function that has moved.
        warnings.simplefilter("ignore", DeprecationWarning)
        import aim
    return aim


def read_index(run_dir: Path) -> AimRuns:
    """aim_runs.json, with no runs where the repository is gone."""
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


def sentence(event: Event) -> str:
    """What a person reads of an event."""
    known = {"wall", "kind", "stage", "position", "attempt", "world", "reason"} | _UNTOLD
    words = [event["kind"].replace("_", " ")]
    if event["position"] is not None:
        words.append(f"at {event['position']:,} samples")
    if event["world"] is not None:
        words.append(f"world {event['world']}")
    words += [f"{key}={value}" for key, value in event.items() if key not in known]
    text = ", ".join(words)
    return f"{text}: {event['reason']}" if event["reason"] else text
