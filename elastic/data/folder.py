"""Reads a folder of clips in place of a table: the videos and pictures in it, captions beside."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from elastic.data import places
from elastic.data.clips import ROWS, SCHEMA, sample_id
from elastic.errors import InputError

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *(
            "mp4",
            "m4v",
            "mov",
            "qt",
            "3gp",
            "3g2",
            "mj2",
            "mkv",
            "webm",
            "avi",
            "ts",
            "mts",
            "m2ts",
        ),
        *("mpg", "mpeg", "m2v", "vob", "flv", "wmv", "asf", "ogv", "ogg", "mxf", "ivf", "obu"),
        *("nut", "dv", "gxf", "rm", "rmvb", "h264", "264", "hevc", "265", "vvc", "av1", "mjpeg"),
        *("mjpg", "y4m", "swf", "gif", "apng", "png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"),
        *("jxl", "ppm", "pgm"),
    )
)
_CAPTION = ".txt"
_MOST_BYTES = 65_536  # of a caption; longer is another kind of text
_READERS = 32  # threads that read captions: on a shared disk or a bucket each is a round trip


class Named(NamedTuple):
    """A file that is taken, by its name from the folder on, and that of its caption, if any."""

    name: str
    caption: str | None


def read_folder(folder: str, held_out_every: int) -> Iterator[pa.RecordBatch]:
    """The clips of a folder in the order of their names; the id of a clip is that of its name.

    InputError where there is none, or where a person has something to put right.
    """
    found = names_in(folder)
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(found), ROWS):
            some = found[first : first + ROWS]
            ids = [sample_id(clip.name) for clip in some]
            columns = (
                ids,
                [places.join(folder, clip.name) for clip in some],
                list(pool.map(lambda clip: _caption(folder, clip.caption), some)),
                [number % held_out_every == 0 for number in ids],
                [0] * len(ids),
                [None] * len(ids),
            )
            yield pa.RecordBatch.from_pydict(
                dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA
            )


def names_in(folder: str) -> list[Named]:
    """What is taken of a folder, in order; InputError where that is nothing."""
    try:
        names = list(places.files_below(folder))
    except NotADirectoryError:
        raise InputError(f"folder {folder!r} is a file; write it without a slash") from None
    except FileNotFoundError:
        raise InputError(f"folder {folder!r} does not exist: correct the name") from None
    except OSError as error:
        raise InputError(f"folder {folder!r} cannot be read: {error}") from error
    clips, captions, others = list[tuple[str, str]](), dict[str, str](), list[str]()
    for name in names:
        stem, dot, ending = name.rpartition(".")
        suffix = dot + ending.lower()
        if suffix in SUFFIXES:
            clips.append((name, stem))
        elif suffix == _CAPTION:
            captions[stem] = min(name, captions.get(stem, name))
        else:
            others.append(name)
    if not clips:
        raise InputError(_holds_none(folder, len(captions), others))
    for name, _ in clips:
        _require_utf8(folder, name)
    return [Named(name, captions.get(stem)) for name, stem in sorted(clips)]


def _holds_none(folder: str, num_captions: int, others: list[str]) -> str:
    tables = [name for name in others if name.lower().endswith((".csv", ".parquet"))]
    hint = f"; or is {places.join(folder, min(tables))!r} the table?" if tables else ""
    return (
        f"folder {folder!r} holds no clip: none of its {num_captions + len(others)} files "
        "ends as a video or picture does (.mp4, .webm, .jpg; hidden ones are not counted): "
        f"correct the name, or add clips{hint}"
    )


def _require_utf8(folder: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"folder {folder!r}: the name {name!a} is not UTF-8: rename the file"
        ) from None


def _caption(folder: str, name: str | None) -> str:
    if name is None:
        return ""
    path = places.join(folder, name)
    try:
        with places.open_read(path) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise InputError(
                f"caption {path!r} is longer than {_MOST_BYTES:,} bytes; shorten it, or give it "
                "another ending"
            )
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"caption {path!r} cannot be read as UTF-8 text: {error}") from error
    return text.strip()
