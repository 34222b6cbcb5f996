"""What a mistake in a record is called: one line a fault, with the field, the value, the rule."""

import difflib
import math
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from models.record import Record

_WHOLE = ("int_type", "int_from_float", "int_parsing")
# A value that is no record, where one is meant: by itself, in a union, in one with a discriminator.
_NO_RECORD = ("model_type", "model_attributes_type", "union_tag_not_found", "union_tag_invalid")
_IN_SAMPLES = frozenset(
    {
        *("until", "warmup", "decay", "warmup_samples", "guard_samples", "halflife", "start"),
        *("save_every", "log_every", "evaluate_every", "sample_every"),
    }
)


def explain(error: ValidationError) -> str:
    """A pydantic error in one line."""
    return "; ".join(faults(error))


def faults(error: ValidationError) -> list[str]:
    """A pydantic error as one line a fault: field, value, rule, and the nearest right value."""
    lines, known = [], list(_fields(error.title))
    unknown = [one["loc"][-1] for one in error.errors() if one["type"] == "extra_forbidden"]
    misspelt = {name for word in unknown for name in _closest(str(word), known)}
    for fault in error.errors():
        # What follows from another fault is none of its own.
        follows = fault["type"] == "missing" and fault["loc"][-1] in misspelt
        if follows or fault["type"] == "default_factory_not_called":
            continue
        # Pydantic's own names for the branches of a union: with brackets, or those of records.
        path = [part for part in fault["loc"] if isinstance(part, int) or _is_field(part)]
        message = _message(error.title, path, fault)
        if len(path) > 1 and isinstance(path[-1], int) and fault["type"] == "missing":
            path.pop()
        field = ".".join(map(str, path))
        lines.append(f"{error.title} {field}: {message}" if field else message)
    return list(dict.fromkeys(lines))


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: the one that was meant, or all there are."""
    close = _closest(word, known)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(known))}"


def _closest(word: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=1)


def _message(title: str, path: list[int | str], fault: Any) -> str:  # Any: pydantic's dict of one
    kind, value, said = fault["type"], fault["input"], fault["msg"]
    names = [part for part in path if isinstance(part, str)]
    field = _fields(title).get(names[0]) if len(names) == 1 else None
    if kind == "value_error":
        return str(said.removeprefix("Value error, "))
    if kind == "extra_forbidden":
        return f"{title} has no such field{nearest(str(path[-1]), list(_fields(title)))}"
    if kind == "missing" and len(path) == 1:
        return f"{title} needs this field"
    if isinstance(value, str) and kind in (*_WHOLE, "float_type") and _is_number(value):
        there = f"{path[-1]}={value}" if isinstance(path[-1], str) else value
        return f"{value!r} is text; drop the quotes: {there}"
    if kind in _WHOLE:
        return f"{value!r} is not a whole number{_unit(names[-1], value)}"
    if kind in ("tuple_type", "too_short", "too_long", "missing") and field is not None:
        return _several(names[0], field, value)
    if kind in _NO_RECORD and field is not None:
        return _no_record(field, value)
    return f"{said}, got {textwrap.shorten(repr(value), 100)}"


def _is_field(part: str) -> bool:
    return "[" not in part and part.islower()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _unit(name: str, value: object) -> str:
    """What is counted, and the nearest whole number of it."""
    unit = " of samples" if name in _IN_SAMPLES else ""
    if not isinstance(value, float) or not math.isfinite(value):
        return unit
    if unit and 0 < value < 1:
        return f"{unit}; it is no share: count the samples, such as {name}=1_000"
    return f"{unit}; nearest is {max(1, round(value))}"


def _several(name: str, field: FieldInfo, value: object) -> str:
    """That a field has several values, or so many."""
    kinds = get_args(field.annotation)
    shown = f"{len(value)} values" if isinstance(value, tuple) else _shown(value)
    if Ellipsis in kinds:
        return f"{shown} by itself; write a list: {name}=[...]"
    example = (value,) * len(kinds) if isinstance(value, int) else field.default
    such = f", such as {name}={example}" if isinstance(example, tuple) else ""
    return f"{shown}; write {len(kinds)} in brackets{such}"


def _no_record(field: FieldInfo, value: object) -> str:
    """Which records may be given, and how they are written."""
    kinds = list(_records(field.annotation))
    if isinstance(value, type) and value in kinds:
        return f"{value.__name__} is the class itself; write {_call(value)}"
    calls = [_call(kind) for kind in kinds]
    if type(None) in get_args(field.annotation):
        calls.append("None")
    may_be = f"{', '.join(calls[:-1])} or {calls[-1]}" if calls[1:] else calls[0]
    return f"{_shown(value)} does not belong here; give {may_be}"


def _records(annotation: Any) -> Iterator[type[Record]]:  # Any: what stands after a field's colon
    """The records that an annotation names, in its order."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        yield annotation
    for part in get_args(annotation):
        yield from _records(part)


def _call(kind: type[Record]) -> str:
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    inside = ", ".join(f"{name}=..." for name in needed) if len(needed) < 4 else "..."
    return f"{kind.__name__}({inside})"


def _shown(value: object) -> str:
    if isinstance(value, Record):  # which may hold stages that hold stages
        return f"one {type(value).__name__}"
    return textwrap.shorten(repr(value), 100)


def _fields(title: str) -> dict[str, FieldInfo]:
    """The fields of the record of that name."""
    todo = list(Record.__subclasses__())
    while todo:
        record = todo.pop()
        if record.__name__ == title:
            return dict(record.model_fields)
        todo.extend(record.__subclasses__())
    return {}
