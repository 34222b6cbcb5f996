"""Weights from files, in our names and rows, read where they are asked for.

Nothing but headers is read when a source is opened; every rank then reads its own rows.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from elastic.ema import local
from elastic.errors import InputError
from elastic.shard import own_slices
from elastic.tensor_file import DTYPES, Entry, read_header, read_rows
from models import layouts
from models.dit import DiT
from models.layouts import LayoutName, Piece, RotaryName, Widths

LayoutChoice = Literal["auto", "own"] | LayoutName
CHUNK = 4_000_000
"""Values that are read or written at a time; small beside any part, large beside a request."""


@dataclass(frozen=True)
class Part:
    """A piece of a parameter, and the tensor that holds it."""

    entry: Entry
    first: int
    rows: int
    head: int


class WeightSource:
    """Parameters by our names; `leftover` are the shapes of the file's other tensors."""

    def __init__(
        self, path: Path, parts: Mapping[str, tuple[Part, ...]], leftover: Iterable[Entry]
    ) -> None:
        self.path = path
        self.leftover = {entry.key: entry.shape for entry in sorted(leftover, key=lambda e: e.key)}
        self.shapes = {
            name: (sum(p.rows for p in own), *own[0].entry.shape[1:]) for name, own in parts.items()
        }
        self._parts = dict(parts)

    def identity(self) -> str:
        """A digest of what lies where in the files, without their values."""
        parts = [(name, [vars(p) for p in own]) for name, own in sorted(self._parts.items())]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first:last of a parameter, fp32 on the CPU."""
        read, before = [], 0
        for part in self._parts[name]:
            low, high = max(first - before, 0), min(last - before, part.rows)
            if low < high:
                read.append(_read(part, low, high))
            before += part.rows
        if not read:
            return torch.empty((0, *self.shapes[name][1:]))
        return read[0] if len(read) == 1 else torch.cat(read)

    def is_converted(self, name: str) -> bool:
        """Whether its rows lie otherwise in the file than in our parameter."""
        own = self._parts[name]
        return len(own) > 1 or own[0].head > 0 or own[0].rows != own[0].entry.shape[0]

    def source_of(self, name: str) -> str:
        """Where the parameter is read from, for messages."""
        own = self._parts[name]
        where = dict.fromkeys(f"{p.entry.path.name}: {p.entry.key}" for p in own)
        turned = " (half-split rotary)" if any(p.head for p in own) else ""
        return f"{', '.join(where)}{turned}"


def _read(part: Part, low: int, high: int) -> Tensor:
    if not part.head:
        return read_rows(part.entry, part.first + low, part.first + high).float()
    # Neighbours of ours lie half a head apart there, so whole heads are read.
    start, end = low // part.head * part.head, -(-high // part.head) * part.head
    heads = read_rows(part.entry, part.first + start, part.first + end)
    return layouts.interleaved(heads, part.head)[low - start : high - start].float()


@torch.no_grad()
def fill(parameter: Tensor, source: WeightSource, name: str) -> None:
    """Copy what this rank holds of a parameter from the source; no other rows are read.

    No rank waits for another. InputError where the shapes differ.
    """
    if source.shapes[name] != tuple(parameter.shape):
        raise InputError(
            f"{source.source_of(name)}: shape {source.shapes[name]}, but {name} of the model has "
            f"{tuple(parameter.shape)}; take the file that belongs to this model"
        )
    own, *others = own_slices(parameter)
    assert [s.stop for s in others] == list(parameter.shape[1:]), f"{name}: not sharded by rows"
    mine, at_once = local(parameter), max(1, CHUNK // max(1, parameter.shape[1:].numel()))
    for first in range(own.start, own.stop, at_once):
        last = min(first + at_once, own.stop)
        mine[first - own.start : last - own.start].copy_(source.rows(name, first, last))


def own_weights(path: Path) -> WeightSource:
    """The weights of a finished stage, or any file whose names are the module's own."""
    return open_weights(path, None, "own")


def open_weights(
    path: Path,
    shape: DiT | None,
    layout: LayoutChoice = "auto",
    rotary: Literal["auto"] | RotaryName = "auto",
) -> WeightSource:
    """A source over a .safetensors file, or a folder of them with or without an index.

    Splits and heads are those of `shape`, or without one, those that the file's tensors imply.
    InputError where the files are not whole, or do not hold what their layout and `shape` say.
    """
    entries = _entries(path)
    if layout == "own":
        # What is no parameter is left over, for whoever asks to say whether that may be.
        named = {key: (Piece(key),) for key, e in entries.items() if e.dtype in DTYPES and e.shape}
        return _source(path, entries, named)
    prefix = layouts.shared_prefix(entries)
    entries = {key.removeprefix(prefix): entry for key, entry in entries.items()}
    try:
        detected = layouts.detect_layout(entries)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if layout not in ("auto", detected):
        raise InputError(
            f"{path}: layout {layout!r}, but its keys are those of {detected!r}; correct the "
            'layout or leave it at "auto"'
        )
    chosen = layouts.layout_of(detected, None if rotary == "auto" else rotary)
    try:
        widths = Widths.of(shape) if shape else layouts.implied_widths(
            chosen.name, {key: entry.shape for key, entry in entries.items()}
        )  # fmt: skip
    except LookupError as error:
        raise InputError(f"{path}, layout {chosen.name}: {error.args[0]}") from None
    return _source(path, entries, dict(_found(path, entries, chosen, widths)))


def _found(
    path: Path, entries: Mapping[str, Entry], layout: layouts.Layout, widths: Widths
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    for name in layouts.our_names(entries):
        try:
            pieces = layouts.pieces(name, layout, widths)
        except LookupError:
            continue
        missing = [piece.key for piece in pieces if piece.key not in entries]
        if not missing:
            yield name, pieces
        elif len(missing) < len(pieces):
            there = next(piece.key for piece in pieces if piece.key in entries)
            raise InputError(
                f"{path}: has {there} but not {', '.join(missing)}, which make up {name} together; "
                "get the file again, or name its layout"
            )


def _source(
    path: Path, entries: Mapping[str, Entry], named: Mapping[str, tuple[Piece, ...]]
) -> WeightSource:
    used: Counter[str] = Counter()
    parts: dict[str, tuple[Part, ...]] = {}
    for name, pieces in named.items():
        parts[name] = tuple(_part(path, entries[piece.key], piece) for piece in pieces)
        for piece, part in zip(pieces, parts[name], strict=True):
            used[piece.key] += part.rows
        if len({part.entry.shape[1:] for part in parts[name]}) > 1:
            shapes = ", ".join(f"{p.entry.key} {p.entry.shape}" for p in parts[name])
            raise InputError(f"{path}: {shapes} make up {name}, but differ in width; it is damaged")
    for key, rows in used.items():
        if rows != entries[key].shape[0]:
            raise InputError(
                f"{path}: {entries[key].key} has {entries[key].shape[0]:,} rows, a model of this "
                f"shape {rows:,}; take the file that belongs to this model, or correct the model"
            )
    return WeightSource(path, parts, (entries[key] for key in entries.keys() - used.keys()))


def _part(path: Path, entry: Entry, piece: Piece) -> Part:
    if entry.dtype not in DTYPES:
        hint = "quantised weights lack their scales here" if entry.dtype.startswith("F8") else ""
        raise InputError(
            f"{path}: {entry.key} is {entry.dtype}; read are {', '.join(DTYPES)}"
            f"{f' ({hint})' if hint else ''}: take a file in one of those"
        )
    if not entry.shape:
        raise InputError(f"{path}: {entry.key} is a single number, not a parameter; get it again")
    rows = entry.shape[0] if piece.rows is None else piece.rows
    return Part(entry, piece.first, rows, piece.head)


def _entries(path: Path) -> dict[str, Entry]:
    """Every tensor of the file or the folder."""
    if path.name.endswith(".safetensors.index.json"):
        path = path.parent
    if path.is_file():
        _check_alone([path])
        return read_header(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file; correct the path")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise InputError(
            f"{path}: has {len(indices)} indices, {indices[0].name} and {indices[1].name}; keep "
            "one, or name a single file"
        )
    promised = _index(indices[0]) if indices else {}
    shards = [path / name for name in sorted(set(promised.values()))] or sorted(
        path.glob("*.safetensors")
    )
    if not shards:
        pickles = [
            p for p in sorted(path.iterdir()) if p.suffix in (".pt", ".pth", ".ckpt", ".bin")
        ]
        if pickles:
            read_header(pickles[0])
        raise InputError(f"{path}: holds no .safetensors file; name the file or its folder")
    gone = [shard.name for shard in shards if not shard.is_file()]
    if gone:
        raise InputError(f"{path}: {indices[0].name} names {gone[0]}, which is not there; get it")
    if not indices:
        _check_alone(shards)
    found: dict[str, Entry] = {}
    for shard in shards:
        held = read_header(shard)
        for key in held.keys() & found.keys():
            raise InputError(
                f"{path}: {key} is in {found[key].path.name} and in {shard.name}; remove the one "
                "that does not belong there"
            )
        found |= held
    for key, file in promised.items():
        if key not in found or found[key].path.name != file:
            raise InputError(
                f"{path}: {indices[0].name} says that {key} is in {file}, where it is not; get the "
                "index and the file again"
            )
    return found


def _check_alone(shards: list[Path]) -> None:
    """InputError if the names of shards without an index say that others belong to them."""
    for shard in shards:
        match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", shard.name)
        if match is None:
            continue
        head, number, of, count, tail = match.groups()
        there = {other.name for other in shards}
        for wanted in range(1, int(count) + 1):
            name = f"{head}{wanted:0{len(number)}d}{of}{count}{tail}"
            if name not in there:
                raise InputError(
                    f"{shard}: one of {int(count)} shards, and {name} is not given with it; name "
                    "the folder that holds them all"
                )


def _index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = {str(key): str(file) for key, file in weight_map.items()}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); get it again") from None
    for file in names.values():
        if Path(file).name != file:
            raise InputError(f"{path}: names {file!r}; a shard lies beside its index: correct it")
    return names
