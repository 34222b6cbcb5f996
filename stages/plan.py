"""A plan: the stages of a course, in order."""

import difflib
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError, model_validator

from models.record import Record
from stages.explain import faults, nearest
from stages.lineage import check_init, parents
from stages.names import SafeName
from stages.stage import Stage


class PlanError(ValueError):
    """Something in a stage file is wrong; the message says what, which value, which rule."""


class Plan(Record):
    """Stages in the order in which they are trained; a parent comes before its children."""

    name: SafeName
    stages: tuple[Stage, ...]

    def __init__(self, name: str, stages: object, **fields: object) -> None:
        super().__init__(**{"name": name, "stages": stages, **fields})

    @model_validator(mode="after")
    def _check_order(self) -> "Plan":
        if not self.stages:
            raise ValueError(f"plan {self.name!r}: stages []: a plan needs at least one stage")
        seen: list[Stage] = []
        for stage in self.stages:
            if stage.name in (earlier.name for earlier in seen):
                raise ValueError(f"plan {self.name!r}: two stages are named {stage.name!r}")
            check_init(stage)
            for field, parent in parents(stage):
                if parent in seen:
                    continue
                if parent.name in (earlier.name for earlier in seen):
                    raise ValueError(
                        f"stage {stage.name!r}: {field}: its parent {parent.name!r} is not the "
                        f"stage of that name in plan {self.name!r}: one of them was changed; give "
                        "the same value to both"
                    )
                raise ValueError(
                    f"stage {stage.name!r}: {field}: its parent {parent.name!r} does not come "
                    f"earlier in plan {self.name!r} ({', '.join(s.name for s in self.stages)}); "
                    "put it before this stage"
                )
            seen.append(stage)
        return self

    def stage(self, name: str) -> Stage:
        """The stage of that name; PlanError with the nearest name otherwise."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise PlanError(f"plan {self.name!r} has no stage {name!r}{nearest(name, self._names())}")

    def _names(self) -> list[str]:
        return [stage.name for stage in self.stages]


def load_plan(path: str | Path) -> Plan:
    """Run a stage file and return its plan; every mistake in it becomes one PlanError.

    It may import what lies beside it, from wherever the command is given.
    """
    path = Path(path)
    if path.is_dir():
        raise PlanError(f"stage file {str(path)!r}: a folder; name a .py file in it")
    if not path.is_file():
        raise PlanError(f"stage file {str(path)!r}: no such file; try stages/recipes/demo.py")
    beside = str(path.absolute().parent)
    if beside not in sys.path:
        sys.path.append(beside)  # last: a file there may have the name of a package of ours
    names: dict[str, object] = {"__name__": "stage_file", "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), names)
    except ValidationError as error:
        where = f"{path}:{_line(path, error)}"
        raise PlanError("\n".join(f"{where}: {fault}" for fault in faults(error))) from None
    except SyntaxError as error:
        # A module that the file imports may be the broken one; null bytes come without a place.
        where = f"{error.filename or path}:{error.lineno or 0}"
        raise PlanError(f"{where}: not Python: {error.msg}") from None
    # Whatever a user's file may do; all of it is bad input.
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, NameError) and error.name:
            close = difflib.get_close_matches(error.name, names, n=1)
            message += f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"{path}:{_line(path, error)}: {message}") from error
    plans = list({id(value): value for value in names.values() if isinstance(value, Plan)}.values())
    if len(plans) != 1:
        raise PlanError(
            f"{path}: defines {len(plans)} plans; a stage file ends with exactly one, "
            "such as plan = Plan('name', [stage, ...])"
        )
    return plans[0]


def _line(path: Path, error: BaseException) -> int:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
    return lines[-1] or 0 if lines else 0
