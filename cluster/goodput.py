"""What share of its time a run trains, modelled event by event: faults, saves, restarts, waiting.

Between two faults the time follows from arithmetic (so many updates, so many saves), so a run costs
as much to model as it has faults, and 10,000 GPUs take seconds.

Machines fail independently of each other and of their age (exponential times, as Young and Daly
assume). A fault is one of three: a training process dies and is started again where it was, or a
machine is lost, and with either what was done since the last save; or the end of a machine is
announced in time to save.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from typing import NamedTuple

DAY_S = 86_400.0
_LEAST_RUNS, _MOST_RUNS = 20, 400
_MOST_FAULTS = 100_000  # over all runs: a second or two
_QUANTILES = (0.05, 0.95)


class Kind(Enum):
    """What a fault takes."""

    PROCESS = "process"  # a training process; its machine goes on
    MACHINE = "machine"  # a machine, at once
    ANNOUNCED = "announced"  # a machine, after a notice


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The machines of a run, what befalls them, and when others come; ValueError if impossible."""

    machines: int
    least: int  # machines without which the stage does not train
    faults_per_day: float  # of one machine, announced ones among them
    announced_share: float = 0.0  # of all faults
    machine_share: float = 1.0  # of the others: those that take the machine, not a process alone
    spares: int = 0  # machines that wait to take the place of one that is lost
    return_s: float = 0.0  # mean time until a lost machine, or another for it, is there
    gpus: float = 1.0  # of one machine, in the mean
    multiple: int = 1  # of GPUs that a group always has; the rest of what is there stands idle
    speed: Callable[[float], float] = float  # of a group of so many GPUs; only ratios count

    def __post_init__(self) -> None:
        _require_finite(self)
        if not 1 <= self.least <= self.machines:
            raise ValueError(f"least={self.least}: must lie between 1 and machines={self.machines}")
        for name in ("announced_share", "machine_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share is at most 1")

    def used(self, machines: int) -> float:
        """How many of so many machines a group takes up: a whole multiple of GPUs."""
        if self.multiple == 1:
            return machines
        # The mean of GPUs a machine may be a fraction, and its sum end just below a whole number.
        there = math.floor(machines * self.gpus + 1e-6)
        return (there - there % self.multiple) / self.gpus

    def rate(self, machines: int) -> float:
        """How fast the group of so many machines is, where that of all of them has 1."""
        these, whole = (self.speed(self.used(n) * self.gpus) for n in (machines, self.machines))
        return these / whole

    @property
    def crash_mean_s(self) -> float:
        """Mean time between two faults that come without notice, on all machines together."""
        rate = self.machines * self.faults_per_day * (1 - self.announced_share)
        return DAY_S / rate if rate else math.inf


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that saves and restarts take; ValueError for what cannot be."""

    interval_s: float  # of training between two saves, on all machines
    save_s: float  # that a save takes from the training: its stall, and the slow-down after it
    background_s: float  # after those, until what was saved can be restored
    planned_s: float  # without an update at a resize that was known of, its save included
    process_s: float  # without an update after a process died
    machine_s: float  # without an update after a machine was lost

    def __post_init__(self) -> None:
        _require_finite(self)
        if not self.interval_s > 0:
            raise ValueError(f"interval_s={self.interval_s}: must be greater than 0")


class Fault(NamedTuple):
    """One fault: when, what it takes, which machine of all (from 0 up to 1), and for how long."""

    at_s: float
    kind: Kind
    place: float
    away_s: float


@dataclass
class Times:
    """Seconds of a run by what went on, and the work done in seconds of all machines."""

    training: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    starting: float = 0.0
    waiting: float = 0.0
    work: float = 0.0

    @property
    def total(self) -> float:
        """All of the time."""
        return self.training + self.saving + self.lost + self.starting + self.waiting

    @property
    def goodput(self) -> float:
        """Share of the time in which updates were done that were kept."""
        return self.training / self.total if self.total else 1.0


class Expected(NamedTuple):
    """Goodput over many modelled runs, and the mean share of the time of everything else."""

    goodput: float
    standard_error: float
    low: float  # 5 % of the runs have less
    high: float  # 5 % of the runs have more
    shares: Times  # means, each of one second
    num_runs: int
    run_s: float  # how long each of them was; less than asked for where faults are very many


def best_interval(save_s: float, crash_mean_s: float) -> float:
    """Seconds of training between saves that waste the least: Daly's higher-order optimum.

    Of Young's first-order one, sqrt(2 save mean), it is a correction for long saves. Infinite
    where nothing fails.
    """
    if math.isinf(crash_mean_s):
        return math.inf
    if save_s >= 2 * crash_mean_s:
        return crash_mean_s
    ratio = math.sqrt(save_s / (2 * crash_mean_s))
    return math.sqrt(2 * save_s * crash_mean_s) * (1 + ratio / 3 + ratio**2 / 9) - save_s


def expected(fleet: Fleet, costs: Costs, run_s: float, seed: int = 0) -> Expected:
    """Model many runs of this length, or of one that can be modelled; a seed is one answer."""
    faults = max(1.0, fleet.machines * fleet.faults_per_day * run_s / DAY_S)
    num_runs = round(min(_MOST_RUNS, max(_LEAST_RUNS, _MOST_FAULTS / faults)))
    # A run that would have more faults than can be modelled is modelled for less long.
    run_s *= min(1.0, _MOST_FAULTS / (faults * num_runs))
    runs = [
        run(fleet, costs, draw_faults(fleet, random.Random(f"{seed}/{number}")), run_s)
        for number in range(num_runs)
    ]
    goodputs = sorted(one.goodput for one in runs)
    mean = math.fsum(goodputs) / num_runs
    variance = math.fsum((value - mean) ** 2 for value in goodputs) / (num_runs - 1)
    low, high = (goodputs[round(share * (num_runs - 1))] for share in _QUANTILES)
    shares = Times(
        **{
            field.name: math.fsum(getattr(one, field.name) for one in runs) / num_runs / run_s
            for field in fields(Times)
        }
    )
    return Expected(mean, math.sqrt(variance / num_runs), low, high, shares, num_runs, run_s)


def draw_faults(fleet: Fleet, random_: random.Random) -> Iterator[Fault]:
    """Faults of the whole fleet without end; none where nothing fails."""
    rate = fleet.machines * fleet.faults_per_day / DAY_S
    at = 0.0
    while rate > 0:
        at += random_.expovariate(rate)
        kind = Kind.PROCESS
        if random_.random() < fleet.announced_share:
            kind = Kind.ANNOUNCED
        elif random_.random() < fleet.machine_share:
            kind = Kind.MACHINE
        away = random_.expovariate(1 / fleet.return_s) if fleet.return_s else 0.0
        yield Fault(at, kind, random_.random(), away)


def run(fleet: Fleet, costs: Costs, faults: Iterable[Fault], run_s: float) -> Times:
    """Model one run with these faults, in the order of their times, for `run_s` seconds."""
    one = _Run(fleet, costs)
    for fault in faults:
        if fault.at_s >= run_s:
            break
        while one.returns and one.returns[0] <= fault.at_s:
            one.machine_returns(heapq.heappop(one.returns))
        # A place that is empty cannot fail.
        if fault.place * fleet.machines < one.machines:
            one.strike(fault)
    while one.returns and one.returns[0] < run_s:
        one.machine_returns(heapq.heappop(one.returns))
    one.settle(run_s, is_crash=False)
    return one.times


class _Run:
    """A run at one moment: since when the group is what it is, and from when on it trains."""

    def __init__(self, fleet: Fleet, costs: Costs) -> None:
        self.fleet, self.costs = fleet, costs
        self.times = Times()
        self.returns: list[float] = []  # a heap of when lost machines are back
        self.machines, self.spares = fleet.machines, fleet.spares
        self.since_s = 0.0
        self.ready_s = 0.0

    def strike(self, fault: Fault) -> None:
        """A process or a machine is lost, and the group starts again with what is left."""
        if fault.place * self.fleet.machines >= math.ceil(self.fleet.used(self.machines)):
            if fault.kind is not Kind.PROCESS:  # it stood idle: nobody notices
                heapq.heappush(self.returns, fault.at_s + fault.away_s)
                self.machines -= 1
            return
        self.settle(fault.at_s, is_crash=fault.kind is not Kind.ANNOUNCED)
        seconds = self.costs.process_s
        if fault.kind is not Kind.PROCESS:
            is_announced = fault.kind is Kind.ANNOUNCED
            seconds = self.costs.planned_s if is_announced else self.costs.machine_s
            heapq.heappush(self.returns, fault.at_s + fault.away_s)
            if self.spares:
                self.spares -= 1
            else:
                self.machines -= 1
        # A fault amid a restart makes none of what is still to be done any shorter.
        self.ready_s = max(self.ready_s, fault.at_s + seconds)

    def machine_returns(self, at_s: float) -> None:
        """A machine joins the group, or the spares if none is missing."""
        if self.machines == self.fleet.machines:
            self.spares += 1
            return
        was_running, rate = self.is_running, self.fleet.rate
        if was_running and rate(self.machines + 1) <= rate(self.machines):
            self.machines += 1  # too few for a larger group, or for a faster one
            return
        if was_running and at_s < self.ready_s:  # a group that starts is left alone until it trains
            heapq.heappush(self.returns, self.ready_s)
            return
        self.settle(at_s, is_crash=False)
        self.machines += 1
        while self.returns and self.returns[0] <= at_s and self.machines < self.fleet.machines:
            heapq.heappop(self.returns)
            self.machines += 1
        self.ready_s = at_s + (self.costs.planned_s if was_running else self.costs.machine_s)

    @property
    def is_running(self) -> bool:
        """Whether there are machines enough to train."""
        return self.machines >= self.fleet.least

    def settle(self, now_s: float, is_crash: bool) -> None:
        """Account for the time since the last change; a crash takes what was not saved."""
        since, self.since_s = self.since_s, max(now_s, self.since_s)
        if not self.is_running:
            self.times.waiting += self.since_s - since
            return
        ready = min(max(self.ready_s, since), self.since_s)
        self.times.starting += ready - since
        self._train(self.since_s - ready, is_crash)

    def _train(self, seconds: float, is_crash: bool) -> None:
        """Account for a stretch that begins at a saved position: train, save, train, save."""
        costs, speed = self.costs, self.fleet.rate(self.machines)
        # A save is due after so many samples, and waits until the one before it is written.
        stretch = min(max(costs.interval_s / speed, costs.background_s), seconds + 1.0)
        cycle = stretch + costs.save_s
        num_cycles = math.floor(seconds / cycle)
        rest = seconds - num_cycles * cycle
        training = num_cycles * stretch + min(rest, stretch)
        kept = training
        if is_crash:
            num_saved = math.floor(max(0.0, seconds - costs.background_s) / cycle)
            kept = min(training, num_saved * stretch)
        self.times.training += kept
        self.times.lost += training - kept
        self.times.saving += seconds - training
        self.times.work += kept * speed


def _require_finite(record: Fleet | Costs) -> None:
    for field in fields(record):
        value = getattr(record, field.name)
        is_allowed = callable(value) or (field.name == "interval_s" and value == math.inf)
        if not (is_allowed or 0 <= value < math.inf):
            raise ValueError(f"{field.name}={value}: must be a finite number, 0 or more")
