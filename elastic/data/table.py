"""Reads the table of clips, or a folder: which file, which caption, train or held out."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from elastic.data import places
from elastic.data.clips import ROWS, SCHEMA, Clips, read_parts, sample_id, write_parts
from elastic.data.folder import names_in, read_folder
from elastic.data.segment import SECOND, Segment
from elastic.errors import InputError
from stages.videos import Mix, Videos

SPLITS = ("train", "held-out")
_COLUMNS = ("path", "text", "split", "start", "end")
_MOST_SECONDS = 10**9
_NEEDED = ("path", "text")


def read_table(videos: Videos, spill: Path | None = None) -> Clips:
    """The rows of the table in its order; InputError where a person has something to put right.

    They are kept in memory, or in the file `spill`, which is then mapped and may be deleted.
    """
    (clips,) = read_tables(videos, spill)
    return clips


def read_tables(data: Videos | Mix, spill: Path | None = None) -> list[Clips]:
    """The rows of each source, as `read_table` reads them; of a mix, no two have the same id."""
    rows = {str(number): _source(videos, number) for number, videos in enumerate(data.sources)}
    if spill is None:
        batches = {name: pa.Table.from_batches(some, schema=SCHEMA) for name, some in rows.items()}
        parts = {name: Clips(table) for name, table in batches.items()}
    else:
        write_parts(spill, rows.items())
        parts = read_parts(spill)
    found = [parts.get(name, Clips(SCHEMA.empty_table())) for name in rows]
    for videos, clips in zip(data.sources, found, strict=True):
        if not len(clips):
            raise InputError(
                f"table {videos.table!r} has no rows; it needs at least one row of path and text"
            )
        _require_distinct(videos.table, clips.ids())
    return found


def read_captions(name: str) -> list[str]:
    """The captions of a file in its order: one a line, or the column text of a table.

    InputError where it cannot be read, or holds none.
    """
    if Path(name).suffix.lower() in _READERS:
        captions: list[str] = []
        for batch in _read(name, ("text",)):
            captions += _values(batch, "text", name, len(captions) + 1)
    else:
        captions = [line.strip() for line in _text_of(name).splitlines() if line.strip()]
    if not captions:
        raise InputError(f"captions {name!r}: the file holds none; write one a line")
    return captions


def _text_of(name: str) -> str:
    if places.is_url(name):
        places.check_url(name, "captions")
    try:
        with places.open_read(name) as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"captions {name!r} cannot be read: {error}; correct the path") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(
            f"captions {name!r}: not UTF-8 text; write one caption a line, or give a table that "
            f"ends in {' or '.join(_READERS)}"
        )
    return text


def check_videos(videos: Videos) -> None:
    """InputError for a table or folder that cannot be used, or none of whose files exists."""
    if _is_folder(videos):
        names_in(_folder(videos))  # their captions are not looked at: that is long in a bucket
        return
    clips = read_table(videos)
    # One that is there will do: files that are missing are quarantined one by one.
    if not any(places.is_there(clip.path) for clip in clips):
        raise InputError(
            f"table {videos.table!r}: none of its {len(clips)} files exists, the first would "
            f"be {clips[0].path!r}; relative paths are taken from the video folder: correct it"
        )


def _source(videos: Videos, number: int) -> Iterator[pa.RecordBatch]:
    """The rows of a source of a mix: names may be alike in several of them, ids may not.

    The first source keeps its ids, so that its clips are those that they are without the mix.
    """
    for batch in _rows(videos):
        if number == 0:
            yield batch
            continue
        ids = [sample_id(f"{number}\0{own}") for own in batch.column("sample_id").to_pylist()]
        columns = [pa.array(ids, pa.int64()), *batch.columns[1:]]
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _rows(videos: Videos) -> Iterator[pa.RecordBatch]:
    """The rows of the table, or those that stand for the files of the folder."""
    if _is_folder(videos):
        return read_folder(_folder(videos), videos.held_out_every)
    return _all_clips(videos, _video_folder(videos))


def _is_folder(videos: Videos) -> bool:
    """Whether a folder stands in the place of the table."""
    name = videos.table
    for what, place in (("table", name), ("video folder", videos.folder or "")):
        if places.is_url(place):
            places.check_url(place, what)
    try:
        return places.is_folder(name)
    except OSError as error:
        raise InputError(f"table {name!r} cannot be reached: {error}") from error


def _folder(videos: Videos) -> str:
    """The folder that stands in the place of the table."""
    name = videos.table
    if videos.folder is not None:
        raise InputError(
            f"folder {videos.folder!r} is for the paths of a table, and {name!r} is a folder "
            "itself: leave one of them out"
        )
    return name if places.is_url(name) else os.path.abspath(name)


def _video_folder(videos: Videos) -> str:
    """Where the relative paths of a table are taken from."""
    folder = videos.folder or places.parent(videos.table) or "."
    if places.is_url(folder):  # there are no folders, only names that begin alike
        return folder
    folder = os.path.abspath(folder)
    if not os.path.isdir(folder):
        raise InputError(
            f"video folder {folder!r} does not exist; relative paths of the table "
            f"{videos.table!r} are taken from it: correct the folder"
        )
    return folder


def _all_clips(videos: Videos, folder: str) -> Iterator[pa.RecordBatch]:
    first_row = 1
    for batch in _read(videos.table):
        yield _clips(batch, videos, folder, first_row)
        first_row += len(batch)


def _clips(batch: pa.RecordBatch, videos: Videos, folder: str, first_row: int) -> pa.RecordBatch:
    """Some rows of the table as clips."""
    name = videos.table
    paths, texts = _values(batch, "path", name, first_row), _values(batch, "text", name, first_row)
    starts, ends = (_times(batch, column, name, first_row) for column in ("start", "end"))
    segments = [Segment(start or 0, end) for start, end in zip(starts, ends, strict=True)]
    for row, segment in enumerate(segments, start=first_row):
        _require_order(segment, f"table {name!r}, row {row}")
    ids = [sample_id(*one) for one in zip(paths, segments, strict=True)]
    if "split" in batch.schema.names:
        splits = enumerate(_values(batch, "split", name, first_row), start=first_row)
        held_out = [_is_held_out(split, f"table {name!r}, row {row}") for row, split in splits]
    else:
        # By the file alone: parts of one film are too much alike to be measured on and trained on.
        held_out = [sample_id(path) % videos.held_out_every == 0 for path in paths]
    found = [
        _absolute(path, folder, f"table {name!r}, row {row}")
        for row, path in enumerate(paths, start=first_row)
    ]
    first_us, last_us = [one.start_us for one in segments], [one.end_us for one in segments]
    columns = (ids, found, texts, held_out, first_us, last_us)
    return pa.RecordBatch.from_pydict(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


def _times(batch: pa.RecordBatch, column: str, name: str, first_row: int) -> list[int | None]:
    """Microseconds, of a column of seconds that need not be there; None where there is none."""
    if column not in batch.schema.names:
        return [None] * len(batch)
    found: list[int | None] = []
    for row, value in enumerate(batch.column(column).to_pylist(), start=first_row):
        try:
            seconds = None if value is None or value == "" else float(value)
            is_usable = seconds is None or 0 <= seconds <= _MOST_SECONDS
        except (TypeError, ValueError):
            is_usable = False
        if not is_usable or isinstance(value, bool):
            raise InputError(
                f"table {name!r}, row {row}: {column} is {value!r}; it must be a number of seconds "
                f"from the file's first frame on, 0 to {_MOST_SECONDS:,}, or be left empty"
            )
        found.append(None if seconds is None else round(seconds * SECOND))
    return found


def _require_order(segment: Segment, where: str) -> None:
    if segment.end_us is not None and segment.end_us <= segment.start_us:
        raise InputError(
            f"{where}: end is {segment.end_us / SECOND:g} and start is "
            f"{segment.start_us / SECOND:g} seconds; a clip ends after it starts: correct one of "
            "them, or leave the end empty for the rest of the file"
        )


def _require_distinct(name: str, ids: NDArray[np.int64]) -> None:
    if len(np.unique(ids)) == len(ids):
        return
    order = np.argsort(ids, kind="stable")
    again = order[1:][np.diff(ids[order]) == 0]  # of rows alike, all but the first
    row = int(again.min())
    first = int(np.flatnonzero(ids == ids[row])[0])
    path = _path_at(name, row)
    raise InputError(
        f"table {name!r}, row {row + 1}: path {path!r} is there already, in row {first + 1}; "
        f"a clip has one row: remove one of them, or give each its own start and end"
    )


def _path_at(name: str, row: int) -> str:
    for batch in _read(name):
        if row < len(batch):
            return str(batch.column("path")[row].as_py())
        row -= len(batch)
    raise AssertionError(f"{name} has changed while it was read")


def _read(name: str, needed: tuple[str, ...] = _NEEDED) -> Iterator[pa.RecordBatch]:
    """The columns of the table that are used, some rows at a time."""
    try:
        is_there = places.is_file(name)
    except OSError as error:
        raise InputError(f"table {name!r} cannot be reached: {error}") from error
    if not is_there:
        wanted = "columns path and text) or a folder of videos"
        raise InputError(
            f"{name!r} does not exist; it is a table (a CSV or Parquet file, or its URL, with the "
            f"{wanted if needed == _NEEDED else 'column text)'}: correct the name"
        )
    suffix = Path(name).suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"table {name!r} ends in {suffix!r}; it must end in .csv or .parquet")
    try:
        yield from _READERS[suffix](name, needed)
    except (pa.ArrowException, OSError) as error:
        what = ascii(str(error))[1:-1][:300]  # a binary file would put its bytes on the terminal
        raise InputError(
            f"table {name!r} cannot be read as {suffix[1:]}: {what}; write it again as UTF-8 CSV "
            f"with a header line, or as Parquet"
        ) from error


def _read_parquet(name: str, needed: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    with places.open_read(name) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        columns = _columns(file.schema_arrow.names, name, needed)
        yield from file.iter_batches(batch_size=ROWS, columns=columns)


def _read_csv(name: str, needed: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    found = places.stamp(name)
    if found is None or not found.size:
        raise InputError(f"table {name!r} is an empty file; it needs the header path,text")
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with (
        places.open_read(name) as file,
        pyarrow.csv.open_csv(file, parse_options=parse) as reader,
    ):
        columns = _columns(reader.schema.names, name, needed)
    # Fixed types: a column of captions such as `12` must not become numbers. Other columns are not
    # converted: their types would be guessed from the first rows.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()), include_columns=columns
    )
    # Threads would read the file ahead of whoever uses its rows, whole.
    slowly = pyarrow.csv.ReadOptions(use_threads=False)
    with (
        places.open_read(name) as file,
        pyarrow.csv.open_csv(file, slowly, parse, convert) as reader,
    ):
        yield from reader


_READERS = {".csv": _read_csv, ".parquet": _read_parquet}


def _columns(names: list[str], table: str, needed: tuple[str, ...]) -> list[str]:
    """Those of the columns that are used; InputError for one that is missing or there twice."""
    if len(names) == 1 and ";" in names[0]:
        raise InputError(
            f"table {table!r} has the one column {names[0]!r}; columns are parted by commas: "
            f"write {','.join(needed)}"
        )
    for column in _COLUMNS:
        if names.count(column) > 1:
            raise InputError(
                f"table {table!r} has {names.count(column)} columns {column!r}; a column comes "
                "once: rename or remove the others"
            )
    for column in needed:
        if column not in names:
            lowered = {found.lower(): found for found in names}
            near = difflib.get_close_matches(column, lowered, n=1, cutoff=0.4)
            hint = f"nearest is {lowered[near[0]]!r}: rename it" if near else "add it"
            raise InputError(
                f"table {table!r} has no column {column!r}, it has {', '.join(map(repr, names))}; "
                f"{' and '.join(needed)} must be there; {hint}"
            )
    return [column for column in _COLUMNS if column in names]


def _values(batch: pa.RecordBatch, column: str, name: str, first_row: int) -> list[str]:
    values = batch.column(column).to_pylist()
    for row, value in enumerate(values, start=first_row):
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
    if "\0" in path:
        raise InputError(f"{where}: path {path!r} has a NUL character in it: write its real name")
    if places.is_url(path):
        places.check_url(path, where)
        return path
    if os.path.isabs(path):
        return os.path.normpath(path)
    inner = os.path.normpath(path)
    if inner == ".." or inner.startswith("../"):
        raise InputError(
            f"{where}: path {path!r} leads out of the folder {folder!r}; a relative path stays "
            f"inside it: move the file, or write its absolute path"
        )
    return places.join(folder, inner)
