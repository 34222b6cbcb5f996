"""Reads the table of clips: which file, which caption, train or held out."""

import difflib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from elastic.errors import InputError
from stages.videos import Videos

SPLITS = ("train", "held-out")


class Clip(NamedTuple):
    """One row: `sample_id` is a hash of the path as the table writes it, `path` is absolute."""

    sample_id: int
    path: str
    text: str
    held_out: bool


def sample_id(path: str) -> int:
    """63 bits of BLAKE2b of the path as the table writes it: the same on every machine."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_table(videos: Videos) -> list[Clip]:
    """The rows of the table in its order; InputError where a person has something to put right."""
    table = _load(videos.table)
    folder = os.path.abspath(videos.folder or os.path.dirname(videos.table) or ".")
    if not os.path.isdir(folder):
        raise InputError(
            f"video folder {folder!r} does not exist; relative paths of the table "
            f"{videos.table!r} are taken from it: correct the folder"
        )
    paths, texts = _column(table, "path", videos.table), _column(table, "text", videos.table)
    has_split = "split" in table.column_names
    splits = _column(table, "split", videos.table) if has_split else None
    if not paths:
        raise InputError(
            f"table {videos.table!r} has no rows; it needs at least one row of path and text"
        )
    clips: list[Clip] = []
    first_row: dict[int, int] = {}
    for row, (path, text) in enumerate(zip(paths, texts, strict=True), start=1):
        where = f"table {videos.table!r}, row {row}"
        number = sample_id(path)
        if number in first_row:
            raise InputError(
                f"{where}: path {path!r} is there already, in row {first_row[number]}; "
                f"a clip has one row: remove one of them"
            )
        first_row[number] = row
        if splits is None:
            held_out = number % videos.held_out_every == 0
        else:
            held_out = _is_held_out(splits[row - 1], where)
        clips.append(Clip(number, _absolute(path, folder, where), text, held_out))
    return clips


def _load(name: str) -> pa.Table:
    if not os.path.isfile(name):
        raise InputError(
            f"table {name!r} does not exist; it is a local CSV or Parquet file with the columns "
            f"path and text: correct the name"
        )
    readers = {".csv": _read_csv, ".parquet": pyarrow.parquet.read_table}
    suffix = Path(name).suffix.lower()
    if suffix not in readers:
        raise InputError(f"table {name!r} ends in {suffix!r}; it must end in .csv or .parquet")
    try:
        return readers[suffix](name)
    except (pa.ArrowException, OSError) as error:
        what = ascii(str(error))[1:-1][:300]  # a binary file would put its bytes on the terminal
        raise InputError(
            f"table {name!r} cannot be read as {suffix[1:]}: {what}; write it again as UTF-8 CSV "
            f"with a header line, or as Parquet"
        ) from error


def _read_csv(name: str) -> pa.Table:
    if os.path.getsize(name) == 0:
        raise InputError(f"table {name!r} is an empty file; it needs the header path,text")
    # Fixed types: a column of captions such as `12` must not become numbers.
    text = dict.fromkeys(("path", "text", "split"), pa.string())
    return pyarrow.csv.read_csv(
        name,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=text),
    )


def _column(table: pa.Table, column: str, name: str) -> list[str]:
    columns = table.column_names
    if columns.count(column) > 1:
        raise InputError(
            f"table {name!r} has {columns.count(column)} columns {column!r}; a column comes once: "
            "rename or remove the others"
        )
    if len(columns) == 1 and ";" in columns[0]:
        raise InputError(
            f"table {name!r} has the one column {columns[0]!r}; columns are parted by commas: "
            "write path,text"
        )
    if column not in columns:
        lowered = {found.lower(): found for found in columns}
        near = difflib.get_close_matches(column, lowered, n=1, cutoff=0.4)
        hint = f"nearest is {lowered[near[0]]!r}: rename it" if near else "add it"
        raise InputError(
            f"table {name!r} has no column {column!r}, it has {', '.join(map(repr, columns))}; "
            f"path and text must be there; {hint}"
        )
    values = table.column(column).to_pylist()
    for row, value in enumerate(values, start=1):
        is_usable = isinstance(value, str) and (value != "" or column != "path")
        if not is_usable:
            raise InputError(
                f"table {name!r}, row {row}: {column} is {value!r}; it must be text, and a path "
                f"must not be empty"
            )
    return values  # type: ignore[no-any-return]  # pyarrow has no types; every value was checked


def _is_held_out(split: str, where: str) -> bool:
    if split not in SPLITS:
        near = difflib.get_close_matches(split, SPLITS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{where}: split is {split!r}; it must be train or held-out, nearest is {near!r}"
        )
    return split == "held-out"


def _absolute(path: str, folder: str, where: str) -> str:
    if os.path.isabs(path):
        return os.path.normpath(path)
    inner = os.path.normpath(path)
    if inner == ".." or inner.startswith("../") or "\0" in inner:
        raise InputError(
            f"{where}: path {path!r} leads out of the folder {folder!r}; a relative path stays "
            f"inside it: move the file, or write its absolute path"
        )
    return os.path.join(folder, inner)
