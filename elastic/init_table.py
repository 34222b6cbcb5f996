"""What an init policy does with each parameter, worked out from names and shapes alone."""

import difflib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from elastic.errors import InputError
from stages.init import Align, Continue, FromFile, Switch, is_asked_new, matches, parent_of
from stages.stage import Stage

Action = Literal["loaded", "converted", "solved", "new", "dropped"]
Shape = tuple[int, ...]
SOLVED = ("img_in.weight", "img_in.bias")
_BYTES = 4  # parameters are fp32 while they train


class Row(NamedTuple):
    """One parameter of the stage, or one tensor of its origin that is left out."""

    name: str
    action: Action
    size: int


class Available(NamedTuple):
    """What the origin of a stage holds, under our names."""

    shapes: Mapping[str, Shape]
    converted: frozenset[str]  # names whose values are rearranged on the way
    leftover: Mapping[str, Shape]  # tensors of a file that have no name here
    where: str


NOTHING = Available({}, frozenset(), {}, "nothing")


@dataclass(frozen=True)
class InitTable:
    """Loaded, converted, solved, new and dropped, in the order of the model."""

    policy: str
    rows: tuple[Row, ...]

    def names(self, *actions: Action) -> list[str]:
        """The parameters that are given values in one of these ways."""
        return [row.name for row in self.rows if row.action in actions]

    def lines(self) -> Iterator[str]:
        """The table as people read it: one line for each action, layers that repeat as one."""
        for action in ("loaded", "converted", "solved", "new", "dropped"):
            rows = [row for row in self.rows if row.action == action]
            if rows:
                count = sum(row.size for row in rows)
                yield (
                    f"{action:<9} {count:>15,} parameters, {len(rows):>4} tensors, "
                    f"{count * _BYTES / 2**20:>10,.2f} MiB: {_layers([row.name for row in rows])}"
                )

    def as_json(self) -> dict[str, object]:
        """Policy, totals and every row."""
        totals = {
            action: {
                "tensors": len(self.names(action)),
                "parameters": sum(row.size for row in self.rows if row.action == action),
            }
            for action in dict.fromkeys(row.action for row in self.rows)
        }
        return {
            "policy": self.policy,
            "totals": totals,
            "rows": [row._asdict() for row in self.rows],
        }


def init_table(stage: Stage, available: Available | None = None) -> InitTable:
    """The table of a stage whose origin holds what is `available` (by default: its parent's model).

    InputError for a parameter without a source, a shape that does not fit, a tensor that nothing
    uses and a pattern that matches nothing.
    """
    init = stage.init
    model = shapes_of(stage)
    if available is None:
        available = parent_shapes(stage)
    where = f"stage {stage.name!r}: init: {type(init).__name__}"
    _check_patterns(stage, model, available, where)
    rows = [Row(name, _action(stage, name, model[name], available, where), math.prod(model[name]))
            for name in model]  # fmt: skip
    used = {row.name for row in rows if row.action in ("loaded", "converted")}
    if isinstance(init, Switch) and not used:
        raise InputError(f"{where}: nothing would be loaded from {available.where}; use Fresh")
    rows += [Row(n, "dropped", math.prod(s)) for n, s in available.shapes.items() if n not in used]
    rows += [Row(n, "dropped", math.prod(s)) for n, s in available.leftover.items()]
    _check_unused(stage, set(model), available, where)
    return InitTable(type(init).__name__, tuple(rows))


@functools.lru_cache(maxsize=64)
def shapes_of(stage: Stage) -> Mapping[str, Shape]:
    """Every parameter of the stage's model."""
    return {name: tuple(parameter.shape) for name, parameter in stage.build().named_parameters()}


def parent_shapes(stage: Stage) -> Available:
    """What the stage's parent will hold; nothing for a stage without one."""
    parent = parent_of(stage.init)
    if parent is None:
        return NOTHING
    return Available(shapes_of(parent), frozenset(), {}, f"stage {parent.name!r}")


def _action(stage: Stage, name: str, shape: Shape, available: Available, where: str) -> Action:
    if isinstance(stage.init, Align) and name in SOLVED:
        return "solved"
    if is_asked_new(stage.init, name):
        return "new"
    there = available.shapes.get(name)
    if there is None:
        if isinstance(stage.init, Continue):
            return "new"  # a layer that the stage gained; stages.lineage says which it may
        raise InputError(
            f"{where}: {name} is not in {available.where}; if it should start anew, name it: "
            f"fresh=({name!r},)"
        )
    if there != shape:
        raise InputError(
            f"{where}: {name} is {_shown(there)} in {available.where} and {_shown(shape)} in the "
            f"stage's model; give the model the same shape, or name it: fresh=({name!r},)"
        )
    return "converted" if name in available.converted else "loaded"


def _check_patterns(
    stage: Stage, model: Mapping[str, Shape], available: Available, where: str
) -> None:
    if not isinstance(stage.init, Switch):
        return
    for pattern in stage.init.fresh:
        if isinstance(stage.init, Align) and any(matches((pattern,), name) for name in SOLVED):
            raise InputError(
                f"{where}: fresh pattern {pattern!r} names {SOLVED[0]}, which Align solves for; "
                "leave it out, or use KeepTrunk"
            )
        if not any(matches((pattern,), name) for name in model):
            raise InputError(
                f"{where}: fresh pattern {pattern!r} matches no parameter{_closest(pattern, model)}"
            )
    if isinstance(stage.init, FromFile):
        keys = [*available.leftover, *(n for n in available.shapes if n not in model)]
        for pattern in stage.init.drop:
            if not any(matches((pattern,), key) for key in keys):
                raise InputError(
                    f"{where}: drop pattern {pattern!r} matches no tensor that would be left over"
                    f"{_closest(pattern, keys)}"
                )


def _check_unused(stage: Stage, model: set[str], available: Available, where: str) -> None:
    if not isinstance(stage.init, FromFile):
        return
    unused = [*available.leftover, *(n for n in available.shapes if n not in model)]
    surprising = [key for key in unused if not matches(stage.init.drop, key)]
    if surprising:
        raise InputError(
            f"{where}: {len(surprising)} tensors of {available.where} have no place in the model, "
            f"such as {', '.join(surprising[:3])}; if they should be left out, name them: "
            f"drop=({surprising[0]!r}, ...)"
        )


def _closest(word: str, known: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.3)
    return f"; the closest is {close[0]!r}" if close else ""


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a number"


def _layers(names: list[str]) -> str:
    """Names by their first part; blocks of one list are counted."""
    heads = Counter(name.split(".")[0] for name in names)
    blocks = {
        head: len({name.split(".")[1] for name in names if name.startswith(f"{head}.")})
        for head in heads
        if head.endswith("_blocks")
    }
    return ", ".join(f"{blocks[h]} {h}" if h in blocks else h for h in heads)
