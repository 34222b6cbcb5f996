"""Where the time of a run went, and how much of it was training that was kept."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from elastic.clock import Life, lives
from elastic.journal import Event, Metric
from elastic.timeline import ACTIVITIES, DOWN, TRAINING, Span, timeline

DEFINITION = (
    "Every second from a run's first line to its last lies in exactly one activity. Goodput is the "
    "time of training that was kept over the time in which a driver lived (all but down). Lost "
    "work is training beyond the position that the next attempt went on from, until the crash was "
    "noticed. Time is counted, not machines: that a smaller world trains more slowly is not in "
    "this number."
)


class Account(NamedTuple):
    """The time of a run: its spans, and their sums by stage and activity in microseconds.

    The stage "" is time that belongs to none.
    """

    spans: list[Span]
    by_stage_us: dict[str, dict[str, int]]

    @property
    def stages(self) -> list[str]:
        """The stages in the order in which they first took time, "" among them."""
        return list(self.by_stage_us)

    def seconds(self, activity: str | None = None, stage: str | None = None) -> float:
        """Seconds of one activity or all, in one stage or all."""
        accounts = self.by_stage_us.values() if stage is None else [self.by_stage_us.get(stage, {})]
        return (
            sum(
                us
                for account in accounts
                for name, us in account.items()
                if activity in (None, name)
            )
            / 1e6
        )

    def goodput(self, stage: str | None = None) -> float | None:
        """As DEFINITION says, of one stage or the run; None before any time has passed."""
        lived = self.seconds(None, stage) - self.seconds(DOWN, stage)
        return self.seconds(TRAINING, stage) / lived if lived > 0 else None


def account(events: Sequence[Event], metrics: Sequence[Metric]) -> Account:
    """The account of a run from its journals, in the order in which they were written.

    A run that is still going on is accounted for up to its last line.
    """
    return account_of(lives(events, metrics))


def account_of(found: list[Life]) -> Account:
    """As `account`, of journals whose times have been put right already."""
    spans = timeline(found)
    sums: dict[str, dict[str, int]] = {}
    for span in spans:
        mine = sums.setdefault(span.stage or "", dict.fromkeys(ACTIVITIES, 0))
        mine[span.activity] += span.end_us - span.begin_us
    return Account(spans, sums)


def account_lines(one: Account) -> list[str]:
    """What `status` prints: goodput of the run and its stages, then the parts of its time."""
    total = one.seconds()
    if not total:
        return []
    stages = [f"{stage} {shown_goodput(one, stage)}" for stage in one.stages if stage]
    parts = sorted(((one.seconds(name), name) for name in ACTIVITIES), reverse=True)
    spent = [
        f"{name} {duration(seconds)} ({100 * seconds / total:.1f} %)"
        for seconds, name in parts
        if seconds > 0
    ]
    return [
        f"goodput: {'; '.join([shown_goodput(one) + ' of the run', *stages])}",
        f"time:    {duration(total)} in all: {', '.join(spent)}",
        textwrap.fill(DEFINITION, 100),
    ]


def shown_goodput(one: Account, stage: str | None = None) -> str:
    """Goodput in per cent, or a dash before any time has passed."""
    share = one.goodput(stage)
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Seconds in words that people would choose."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24:,} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
