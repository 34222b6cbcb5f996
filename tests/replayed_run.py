"""A run that meets faults, played update by update, and the journals that it leaves."""

import heapq
from typing import Any

from cluster.goodput import Costs, Fault, Kind

UPDATE_S = 1.0  # of an update on all machines
UPDATE = 8  # samples of it
LOG_UPDATES = 10


class Replay:
    """Does whole updates, and counts what it was not saved of as lost; the model knows neither.

    A fault that was announced, a machine that comes back and the end of the run wait for the end
    of an update, as the loop does.
    """

    def __init__(
        self, faults: list[Fault], costs: Costs, machines: int, least: int, end_s: float
    ) -> None:
        self.events: list[Any] = []
        self.metrics: list[Any] = []
        self.num_resyncs = 0  # moments at which it may be an update behind the model
        self.num_unwritten = 0  # saves that a crash came before
        self._costs, self._machines, self._all, self._least = costs, machines, machines, least
        self._now, self._updates, self._attempt = 0.0, 0, 0
        self._saved = 0  # updates in the newest save that can be restored
        self._saved_last = 0  # in the newest that was begun
        self._writing: tuple[float, int, float] | None = None  # visible from, updates, stall
        self._ready: float | None = 0.0  # when the group that starts will train
        self._is_training = False
        self._returns: list[float] = []
        self._event("run_start")
        for fault in faults:
            while self._returns and self._returns[0] <= fault.at_s:
                self._machine_returns(heapq.heappop(self._returns))
            if fault.place * self._all < self._machines:
                self._strike(fault)
        while self._returns and self._returns[0] < end_s:
            self._machine_returns(heapq.heappop(self._returns))
        self._until(end_s, in_order=True)
        if self._is_training:
            self._stop()
        self._now = max(self._now, end_s)
        self._event("run_end")
        self.events.sort(key=lambda event: event["wall"])

    @property
    def _update_s(self) -> float:
        return UPDATE_S * self._all / self._machines

    def _event(self, kind: str, updates: int | None = None, **more: Any) -> None:
        position = None if updates is None else updates * UPDATE
        stage = None if kind.startswith("run") else "a"
        line = {"wall": 1.8e9 + self._now, "kind": kind, "stage": stage, "position": position}
        own = {"attempt": self._attempt, "world": self._machines, "reason": ""}
        self.events.append({**own, **line, **more})

    def _strike(self, fault: Fault) -> None:
        is_announced = fault.kind is Kind.ANNOUNCED
        self._until(fault.at_s, in_order=is_announced)
        if is_announced:
            if self._is_training:
                self._event("resize_requested")
                self._stop()
        else:
            self._crash()
        seconds = self._costs.planned_s if is_announced else self._costs.machine_s
        if fault.kind is Kind.PROCESS:
            seconds = self._costs.process_s
        else:
            heapq.heappush(self._returns, fault.at_s + fault.away_s)
            self._machines -= 1
        self._start_after(seconds)

    def _machine_returns(self, at_s: float) -> None:
        """The group is resized once it trains; a stage that waits begins when there are enough."""
        if self._ready is not None and at_s < self._ready:
            heapq.heappush(self._returns, self._ready)
            return
        self._until(at_s, in_order=True)
        was_waiting = self._machines < self._least
        if self._is_training:
            self._event("resize_requested")
            self._stop()
        self._machines += 1
        while self._returns and self._returns[0] <= at_s and self._machines < self._all:
            heapq.heappop(self._returns)
            self._machines += 1
        self._ready = None
        self._start_after(self._costs.machine_s if was_waiting else self._costs.planned_s)

    def _start_after(self, seconds: float) -> None:
        if self._machines < self._least:
            self._ready = None
            self._event("waiting")
            return
        self._event("launch")
        self._ready = max(self._ready or 0.0, self._now + seconds)

    def _crash(self) -> None:
        """What a crash finds unwritten is gone, and so is what it was to save."""
        if self._is_training or self._ready is not None:
            self._event("crash", reason="signal 9")
        self.num_resyncs += self._is_training
        self.num_unwritten += self._writing is not None
        self._writing, self._is_training = None, False
        self._updates = self._saved_last = self._saved

    def _stop(self) -> None:
        """The last save ends with the group; its time is a part of `planned_s`."""
        self._land(self._now)
        self._saved = self._saved_last = self._updates
        self._event("publish", self._updates, seconds=0.0, background=0.0, reason="stop")
        self._is_training = False
        self.num_resyncs += 1

    def _land(self, by_s: float) -> None:
        """Tell of a save that is written by then."""
        if self._writing is None or self._writing[0] > by_s:
            return
        visible_s, updates, stall = self._writing
        now, self._now = self._now, visible_s
        times = {"seconds": stall, "background": self._costs.background_s}
        self._event("publish", updates, reason="due", **times)
        self._saved, self._writing, self._now = updates, None, now

    def _until(self, end_s: float, in_order: bool) -> None:
        """Start, then train; a save when it is due; `in_order` it ends behind a whole update."""
        if self._ready is not None and self._ready < end_s:
            self._now, self._ready, self._is_training = max(self._now, self._ready), None, True
            self._attempt += 1
            self._event("start", self._updates)
        while self._is_training and self._now < end_s:
            wanted = self._costs.interval_s / UPDATE_S
            if self._updates - self._saved_last >= wanted and self._writing is None:
                stall, self._saved_last = self._costs.save_s, self._updates
                visible_s = self._now + stall + self._costs.background_s
                self._writing = (visible_s, self._updates, stall)
                self._now += stall
            else:
                self._now += self._update_s
                self._updates += self._now <= end_s or in_order
                self._log(end_s, in_order)
            self._land(min(self._now, end_s))
        if not (in_order and self._is_training):
            self._now = end_s

    def _log(self, end_s: float, in_order: bool) -> None:
        if self._updates % LOG_UPDATES or not (self._now <= end_s or in_order):
            return
        values = {"samples_per_s": UPDATE / self._update_s, "data_wait": 0.0}
        line = {"wall": 1.8e9 + self._now, "stage": "a", "attempt": self._attempt, "context": {}}
        own = {"position": self._updates * UPDATE, "world": self._machines, "values": values}
        self.metrics.append({**line, **own})
