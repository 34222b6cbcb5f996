"""What a look at a machine has found, and how it is shown to people and to programs."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at; `remedy` is empty when nothing is to be done."""

    level: Literal["ok", "warn", "error"]
    what: str
    value: str
    remedy: str = ""
    rule: str = ""  # what the value should be; one that is not ok breaks it


def render(found: Iterable[Finding]) -> str:
    """The findings as text, one line each; below those that need it, the rule and what to do."""
    found = list(found)
    width = max((len(one.what) for one in found), default=0)
    lines = []
    for one in found:
        lines.append(f"{one.level:<5}  {one.what:<{width}}  {one.value}")
        if one.remedy:
            needed = f" (needed: {one.rule})" if one.rule else ""
            lines.append(f"{'':<5}  {'':<{width}}  -> {one.remedy}{needed}")
    counts = _counts(found)
    lines.append(f"{counts['error']} errors, {counts['warn']} warnings, {counts['ok']} ok")
    return "\n".join(lines)


def as_json(found: Iterable[Finding]) -> dict[str, Any]:  # Any: a JSON tree
    """The findings for programs."""
    found = list(found)
    return {"findings": [one._asdict() for one in found], "counts": _counts(found)}


def exit_code(found: Iterable[Finding]) -> int:
    """1 when there is an error, else 0."""
    return int(any(one.level == "error" for one in found))


def _counts(found: list[Finding]) -> dict[str, int]:
    return {level: sum(one.level == level for one in found) for level in ("error", "warn", "ok")}
