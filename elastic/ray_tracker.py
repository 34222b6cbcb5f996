"""The tracker as a Ray actor on the head: workers and driver tell it, and never wait for it."""

import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.clock import boot_clock
from elastic.encode_progress import ENCODING, EncodeMeter
from elastic.files import write_atomic
from elastic.journal import EVENTS, Event, Journal, Metric
from elastic.tracking import Tracker

log = logging.getLogger(__name__)

NAMESPACE = "restage"
_CLOSE_S = 120.0
# What a person should see at once, in place of figures that do not move meanwhile.
_SHOWN = (
    "waiting",
    "stop_requested",
    "drain",
    "crash",
    "hang",
    "save_failed",
    "sample_failed",
    "damaged_checkpoint",
)
_SETTLE_S = 30.0
_ENCODED = ("encode_end", "encode_ahead_end")
_NOTE_EVERY_S = 5.0


class TrackerService:
    """Owns events.jsonl, metrics.jsonl and Aim for the life of a driver, across worker groups."""

    def __init__(self, run_dir: str, plan: str, stages: dict[str, int], use_aim: bool) -> None:
        self._events = Journal(Path(run_dir) / EVENTS, durable=True)
        self._tracker = Tracker(run_dir, plan, stages, use_aim)
        self._stages = Path(run_dir) / "stages"
        self._latest: dict[str, Any] = {}
        self._encoding: dict[str, EncodeMeter] = {}  # by stage
        self._ahead: set[str] = set()  # those of them whose turn has not come
        self._noted_at = float("-inf")
        self._pids: list[int] = []
        self._is_saved = False

    def metric(self, metric: Metric) -> None:
        """Keep one line of metrics."""
        if not metric["context"]:
            values = metric["values"]
            self._latest = {
                **metric,
                "loss": values.get("loss"),
                "rate": values.get("samples_per_s"),
            }
        self._tracker.log({**metric, "clock": boot_clock()})

    def event(self, event: Event) -> None:
        """Keep one event."""
        if event["kind"] == "start":
            self._latest = {**event}
            self._pids = event.get("pids", [])
        elif event["kind"] == "stop_saved":
            self._is_saved = True
        elif event["kind"] in _SHOWN and event["stage"] is not None:
            self.progress(
                str(event["stage"]), f"{event['kind'].replace('_', ' ')}: {event['reason']}"
            )
        if event["kind"] in _ENCODED:
            self._encoding.pop(str(event["stage"]), None)
            self._ahead.discard(str(event["stage"]))
            (self._stages / str(event["stage"]) / ENCODING).unlink(missing_ok=True)
        self._events.append(**event, clock=boot_clock())
        self._tracker.event(event)

    def progress(self, stage: str, text: str) -> None:
        """Show something that is no metric in the progress line."""
        self._latest = {"stage": stage, "text": text}

    def encode_begin(
        self, stage: str, total: int, done: int, quarantined: int, is_ahead: bool
    ) -> None:
        """Show from now on how far the encoding of a stage's latents is."""
        self._encoding[stage] = EncodeMeter(total, done, quarantined)
        if is_ahead:
            self._ahead.add(stage)
        else:
            self._latest = {"stage": stage, "encoding": stage}

    def encoded(self, stage: str, shard: tuple[str, int], clips: int, absent: int) -> None:
        """Count a shard that has been committed."""
        if stage in self._encoding:
            self._encoding[stage].committed(shard, clips, absent)

    def latest(self) -> dict[str, Any]:
        """What the progress line shows: the newest metrics, start of a group, or text."""
        found = {**self._latest, "pids": self._pids, "is_saved": self._is_saved}
        meter = self._encoding.get(found.pop("encoding", ""))
        if meter is not None:
            found["text"] = f"encoding, {meter.now().text()}"
        elif "position" not in found and "text" not in found:
            found.pop("stage", None)  # its encoding has ended, and nothing has been told since
        for stage in self._ahead:
            found["ahead"] = f"ahead: {stage}, {self._encoding[stage].now().text()}"
        self._note()
        return found

    def _note(self) -> None:
        """Keep for `status` how far encodings are."""
        if time.monotonic() - self._noted_at < _NOTE_EVERY_S:
            return
        self._noted_at = time.monotonic()
        for stage, meter in self._encoding.items():
            found = json.dumps({**meter.now()._asdict(), "wall": time.time()})
            write_atomic(self._stages / stage / ENCODING, found.encode())

    def settle(self) -> None:
        """Put on the disk what was told before this call."""
        self._tracker.flush()

    def close(self) -> str | None:
        """Flush everything to disk; why Aim shows nothing, or None."""
        problem = self._tracker.aim_problem()
        self._tracker.close()
        self._events.close()
        return problem


class TrackerHandle:
    """Sends to the tracker without waiting; the same object serves driver and workers."""

    def __init__(self, name: str, actor: Any = None) -> None:  # Any: Ray's actor handle
        self.name = name
        # Only the handle that made the actor keeps it alive: the driver's.
        self._actor = actor or ray.get_actor(name, namespace=NAMESPACE)

    @classmethod
    def launch(
        cls, name: str, run_dir: Path, plan: str, stages: dict[str, int], use_aim: bool
    ) -> "TrackerHandle":
        """Start the actor on this node; it is restarted if it dies."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        service = ray.remote(TrackerService).options(
            name=name,
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=1,
            scheduling_strategy=here,
        )
        return cls(name, service.remote(str(run_dir), plan, stages, use_aim))

    def metric(self, metric: dict[str, Any]) -> None:
        """Send one line of metrics."""
        self._actor.metric.remote(metric)

    def event(
        self,
        kind: str,
        stage: str | None = None,
        position: int | None = None,
        reason: str = "",
        **more: Any,  # the fields of Event that belong to the kind
    ) -> None:
        """Send one event with the time of now."""
        fields = {"attempt": None, "world": None, **more}
        event = {"wall": time.time(), "kind": kind, "stage": stage, "position": position}
        self._actor.event.remote({**event, "reason": reason, **fields})

    def progress(self, stage: str, text: str) -> None:
        """Send a text for the progress line."""
        self._actor.progress.remote(stage, text)

    def encode_begin(
        self, stage: str, total: int, done: int, quarantined: int, is_ahead: bool
    ) -> None:
        """Send how much there is to encode, and how much of it is there."""
        self._actor.encode_begin.remote(stage, total, done, quarantined, is_ahead)

    def encoded(self, stage: str, shard: tuple[str, int], clips: int, absent: int) -> None:
        """Send that a shard has been committed."""
        self._actor.encoded.remote(stage, shard, clips, absent)

    def latest(self) -> dict[str, Any]:
        """What the progress line shows; empty while the tracker is busy, or starting again."""
        try:
            return dict(ray.get(self._actor.latest.remote(), timeout=2))
        except (GetTimeoutError, RayActorError):
            return {}

    def settle(self) -> None:
        """Wait until what this process has sent is on the disk, or for half a minute."""
        try:
            ray.get(self._actor.settle.remote(), timeout=_SETTLE_S)
        except (GetTimeoutError, RayActorError) as error:
            log.warning("the tracker lags behind: %s", error)

    def close(self) -> str | None:
        """Wait until everything sent before is on disk, and end the actor."""
        try:
            problem: str | None = ray.get(self._actor.close.remote(), timeout=_CLOSE_S)
        except (GetTimeoutError, RayActorError) as error:
            return f"the tracker did not answer: {error}"
        ray.kill(self._actor)
        return problem


@dataclass(frozen=True)
class EncodeTeller:
    """Tells the tracker how the encoding of one stage goes on, from any process; never fails."""

    tracker: str
    stage: str
    is_ahead: bool = False  # while another stage trains

    def begin(self, total: int, done: int, quarantined: int) -> None:
        """How many clips there are, how many are there, and how many of these are left out."""
        self._tell(lambda to: to.encode_begin(self.stage, total, done, quarantined, self.is_ahead))

    def committed(self, shard: tuple[str, int], clips: int, absent: int) -> None:
        """A shard of so many clips has been committed."""
        self._tell(lambda to: to.encoded(self.stage, shard, clips, absent))

    def _tell(self, say: Callable[[TrackerHandle], None]) -> None:
        try:
            say(_handle(self.tracker))
        except (RayError, ValueError) as error:  # no tracker: encoding goes on without it
            log.warning("how far the encoding is could not be told: %s", error)


@functools.lru_cache(maxsize=1)
def _handle(name: str) -> TrackerHandle:
    return TrackerHandle(name)
