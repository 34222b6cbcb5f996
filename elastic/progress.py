"""One live line on a terminal; plain lines, now and then, where the output is a file."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from elastic.encode_progress import duration

_PLAIN_EVERY_S = 10.0


class ProgressLine:
    """Shows position, loss, rate, world size and time left of the stage that is under way."""

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self._budgets = budgets
        self._live = sys.stderr.isatty()
        self._last = ""
        self._stage = ""
        self._shown_at = 0.0

    def show(self, latest: Mapping[str, Any]) -> None:  # Any: a metric, an event or a text
        """Show what the tracker knows last."""
        text = describe(latest, self._budgets)
        if not text or text == self._last:
            return
        stage = str(latest["stage"])
        now = time.monotonic()
        if self._live:
            if self._stage not in ("", stage):
                sys.stderr.write("\n")
            sys.stderr.write(f"\r\x1b[2K{text}")
        elif stage != self._stage or now - self._shown_at >= _PLAIN_EVERY_S:
            sys.stderr.write(f"{text}\n")
            self._shown_at = now
        else:
            return
        sys.stderr.flush()
        self._last, self._stage = text, stage

    def end(self) -> None:
        """Leave the line as it is and go on below it."""
        if self._live and self._last:
            sys.stderr.write("\n")


def describe(latest: Mapping[str, Any], budgets: Mapping[str, int]) -> str:
    """The line for what the tracker knows last; empty before the first stage."""
    stage = latest.get("stage")
    if stage is None:
        return ""
    if "text" in latest:
        return f"{stage}  {latest['text']}"
    position, budget = int(latest["position"]), budgets[stage]
    parts = [f"{stage}  {position:,} of {budget:,} samples ({position / budget:.0%})"]
    if latest.get("loss") is not None:
        parts.append(f"loss {latest['loss']:.4f}")
    if latest.get("rate"):
        parts.append(f"{latest['rate']:.1f} samples/s")
    parts.append(f"world {latest['world']}")
    if latest.get("rate"):
        parts.append(f"{duration((budget - position) / latest['rate'])} left")
    if "ahead" in latest:
        parts.append(str(latest["ahead"]))
    return "  ".join(parts)
