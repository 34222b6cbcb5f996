"""Append-only JSON lines, the truth of a run: a killed writer loses at most one line."""

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


class Event(TypedDict):
    """One line of events.jsonl; the optional fields belong to the kinds that need them."""

    wall: float
    kind: str
    stage: str | None
    position: int | None
    attempt: int | None
    world: int | None
    reason: str
    resumed_from: NotRequired[int | None]
    path: NotRequired[str]
    seconds: NotRequired[float]
    background: NotRequired[float]  # how long a save went on beside training, failed or not
    phases: NotRequired[dict[str, float]]  # of a start: what its seconds were spent on
    clock: NotRequired[float]  # seconds since the tracker's machine was booted
    world_from: NotRequired[int]
    world_to: NotRequired[int]
    lost_samples: NotRequired[int]
    what: NotRequired[str]
    gpus: NotRequired[bool]  # of a run_start: whether each worker computes on a GPU
    nodes: NotRequired[int]
    clips: NotRequired[int]
    shards: NotRequired[int]
    quarantined: NotRequired[int]
    encoded: NotRequired[int]  # clips of all buckets that this encoding has done itself
    device_frames_per_s: NotRequired[float | None]  # into a codec, mean over the devices
    paths: NotRequired[list[str]]
    captions: NotRequired[list[str]]
    count: NotRequired[int]
    reasons: NotRequired[dict[str, int]]
    pids: NotRequired[list[int]]
    supervisors: NotRequired[list[int]]


class Metric(TypedDict):
    """One line of metrics.jsonl, one log interval; null stands for NaN and infinity."""

    wall: float
    stage: str
    attempt: int
    position: int
    world: int
    context: dict[str, str]
    values: dict[str, float | None]
    order_digest: NotRequired[str]
    seconds: NotRequired[float]  # that a measurement on held-out clips took
    clock: NotRequired[float]  # seconds since the tracker's machine was booted


class Journal:
    """Appends one JSON object a line; `durable` waits for the disk on every line."""

    def __init__(self, path: str | Path, durable: bool = False) -> None:
        self.path = Path(path)
        self.durable = durable
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._is_torn = _ends_torn(self._file)

    def append(self, **fields: Any) -> None:  # Any: whatever JSON holds
        """Write one line with one system call; OSError when the disk takes only part of it."""
        # The newline in front closes a line that a killed writer, or a full disk, left unfinished.
        start = b"\n" if self._is_torn else b""
        text = json.dumps(_finite(fields), ensure_ascii=False, allow_nan=False)
        line = start + text.encode("utf-8", "replace") + b"\n"
        self._is_torn = True
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(
                f"{self.path}: only {written} of {len(line)} bytes were written; "
                "free some space, then run the same command again"
            )
        self._is_torn = False
        if self.durable:
            os.fsync(self._file)

    def sync(self) -> None:
        """Wait until every line has reached the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Wait for the disk and close the file; closing twice is allowed."""
        if self._file < 0:
            return
        self.sync()
        os.close(self._file)
        self._file = -1


def scan_journal(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal and the number of torn ones; a missing file has no lines."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    lines: list[dict[str, Any]] = []
    num_torn = 0
    for line in raw.split(b"\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            num_torn += 1
            continue
        if isinstance(value, dict):
            lines.append(value)
        else:
            num_torn += 1
    return lines, num_torn


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; torn ones are skipped and their number is logged."""
    lines, num_torn = scan_journal(path)
    if num_torn:
        log.warning("%s: skipped %d torn lines, kept %d", path, num_torn, len(lines))
    return lines


def read_events(run_dir: str | Path) -> list[Event]:
    """The events of a run folder, in the order in which they were written."""
    return cast(list[Event], read_journal(Path(run_dir) / EVENTS))


def read_metrics(run_dir: str | Path) -> list[Metric]:
    """The metrics of a run folder, redone positions included (see `latest_values`)."""
    return cast(list[Metric], read_journal(Path(run_dir) / METRICS))


def latest_values(metrics: Iterable[Metric]) -> list[Metric]:
    """One line for each (stage, position, context), of the highest attempt; sorted by position.

    Stages keep the order in which they first appear. What an attempt did beyond the point where
    a higher one took over is left out: those samples were lost, and are done again.
    """
    latest: dict[tuple[str, int, str], Metric] = {}
    begins: dict[str, dict[int, int]] = {}  # stage, attempt: lowest position
    for metric in metrics:
        stage, position, attempt = metric["stage"], metric["position"], metric["attempt"]
        lowest = begins.setdefault(stage, {})
        lowest[attempt] = min(position, lowest.get(attempt, position))
        key = (stage, position, json.dumps(metric["context"], sort_keys=True))
        if key not in latest or attempt >= latest[key]["attempt"]:
            latest[key] = metric
    order = list(begins)
    ends = {
        (stage, attempt): min((low for a, low in lowest.items() if a > attempt), default=None)
        for stage, lowest in begins.items()
        for attempt in lowest
    }
    kept = []
    for metric in latest.values():
        end = ends[metric["stage"], metric["attempt"]]
        # At the very point of the takeover the older line stands unless it was written again.
        if end is None or metric["position"] <= end:
            kept.append(metric)
    return sorted(kept, key=lambda m: (order.index(m["stage"]), m["position"]))


def _ends_torn(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _finite(value: Any) -> Any:
    # JSON has no NaN: other readers (jq, JavaScript) refuse the word that Python would write.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
