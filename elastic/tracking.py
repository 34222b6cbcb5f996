"""The tracker: the one writer of metrics.jsonl and of the Aim view that is built from it.

Ray is not imported here: another file wraps `Tracker` as an actor.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from elastic.aim_view import AIM_RUNS, AimView, read_index
from elastic.journal import (
    METRICS,
    Event,
    Journal,
    Metric,
    read_events,
    read_metrics,
)

_ACCOUNTED = frozenset({"stage_end", "run_end"})  # after which the time's account is shown
# In between, after a save once so much of the run's time is new: an account reads both journals.
_NEW_SHARE, _LEAST_NEW_S = 0.02, 5.0

log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics first to metrics.jsonl, then to Aim; survives the death of Aim."""

    def __init__(
        self, run_dir: str | Path, plan: str, stages: Mapping[str, int], use_aim: bool = True
    ) -> None:
        """`stages` maps the names, in the plan's order, to their budgets in samples."""
        self.run_dir = Path(run_dir)
        self._journal = Journal(self.run_dir / METRICS)
        self._aim: AimView | None = None
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
        self._aim = AimView(self.run_dir, plan, stages)
        self._aim.reached(read_metrics(self.run_dir))

    def _show(self, show: "Callable[[AimView], None]") -> None:
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


def rebuild_aim(run_dir: str | Path) -> dict[str, str]:
    """Make the Aim view again from the journals, without redone values; the old view is deleted.

    No tracker may be running. Returns the hash of each run by stage; ImportError without Aim.
    """
    run_dir = Path(run_dir)
    old = read_index(run_dir)
    metrics, events = read_metrics(run_dir), read_events(run_dir)
    stages = dict(old["stages"])
    for metric in metrics:
        if metric["stage"] not in old["stages"]:
            budget = stages.get(metric["stage"], 0)
            stages[metric["stage"]] = max(budget, metric["position"])
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".aim-rebuild-") as folder:
        # Aside: a rebuild that is killed leaves the old view as it was.
        aside = Path(folder)
        view = AimView(aside, plan_of(run_dir), stages, run_dir)
        accounts = _Accounts(events)
        # In the order in which they happened: a redone position replaces the lost one, and an event
        # without a position has that of the line before it.
        num_shown = 0
        for number, event in enumerate(events, start=1):
            while num_shown < len(metrics) and metrics[num_shown]["wall"] <= event["wall"]:
                view.metric(metrics[num_shown])
                num_shown += 1
            view.event(event)
            if accounts.is_due(event):
                view.account(*_until(events[:number], metrics), event)
        for metric in metrics[num_shown:]:
            view.metric(metric)
        view.close()
        shutil.rmtree(run_dir / ".aim", ignore_errors=True)
        os.replace(aside / ".aim", run_dir / ".aim")
        if (aside / AIM_RUNS).exists():
            os.replace(aside / AIM_RUNS, run_dir / AIM_RUNS)
    return read_index(run_dir)["runs"]


def plan_of(run_dir: Path) -> str:
    """The plan by whose name Aim's experiment goes."""
    return read_index(run_dir)["plan"] or run_dir.resolve().name


def _journals(run_dir: Path) -> tuple[list[Event], list[Metric]]:
    return read_events(run_dir), read_metrics(run_dir)


def _until(events: list[Event], metrics: list[Metric]) -> tuple[list[Event], list[Metric]]:
    """The journals as they were when the last of these events was written."""
    end = events[-1]["wall"]
    return events, [metric for metric in metrics if metric["wall"] <= end]
