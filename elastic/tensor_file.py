"""Safetensors files read by rows and written tensor by tensor.

The format is a few lines (its length, a JSON header, the data), and reading it ourselves gives what
the library's memory map does not: memory that holds what was asked for and no pages of the file,
and a message for each way in which a file can be wrong.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from elastic.errors import InputError
from elastic.files import fsync_dir, read_into

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_OTHER_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1,
                "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes begin at `begin`, counted from the start of the file."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by key; InputError where it is none, or not whole."""
    if path.suffix in _PICKLES:
        raise InputError(_pickle_message(path))
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if 2 <= length <= min(size - 8, _LONGEST_HEADER) else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and not text):
        raise InputError(_pickle_message(path))
    if not size:
        raise InputError(f"{path}: empty; get it again")
    if start == b"version ":
        raise InputError(f"{path}: a Git LFS pointer, not the file; fetch it: git lfs pull")
    try:
        header = json.loads(text, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        entries = {key: _entry(path, key, fields, 8 + length) for key, fields in header.items()}
        end = 8 + length + _data_bytes(fields["data_offsets"] for fields in header.values())
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: its header is damaged or it is no safetensors file ({error}); get it again"
        ) from None
    if size != end:
        word = "cut off" if size < end else "too long"
        raise InputError(
            f"{path}: {word}: it has {size:,} bytes, its header says {end:,}; get it again"
        )
    return entries


def _pickle_message(path: Path) -> str:
    target = f"{path.stem}-converted.safetensors"
    return (
        f"{path}: a pickle, which can run any program when it is read, so it is not read; convert "
        f'it: python -c "import torch, safetensors.torch as s; s.save_file(torch.load('
        f"'{path.name}', map_location='cpu', weights_only=True), '{target}')\""
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON
    whole = dict(pairs)
    if len(whole) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return whole


def _entry(path: Path, key: str, fields: Any, data: int) -> Entry:  # Any: JSON of a stranger
    dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{key!r} has shape {shape} at bytes {begin}:{end}")
    size = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES.get(dtype)
    if size is not None and end - begin != math.prod(shape) * size:
        raise ValueError(f"{key!r} is {dtype} {shape} in {end - begin} bytes")
    return Entry(path, key, dtype, shape, data + begin)


def _data_bytes(spans: Iterable[tuple[int, int]]) -> int:
    end = 0
    for begin, after in sorted(spans):
        if begin != end:
            raise ValueError(f"its tensors leave out or share bytes at {min(begin, end)}")
        end = after
    return end


def read_rows(entry: Entry, first: int, last: int) -> Tensor:
    """Rows first:last of a tensor in its own dtype; no other byte of the file is read."""
    assert entry.shape, f"{entry.key}: a scalar has no rows"
    assert 0 <= first <= last <= entry.shape[0], f"{entry.key}: rows {first}:{last}"
    rows = torch.empty((last - first, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
    if not rows.numel():
        return rows
    view = rows.view(torch.uint8).numpy().data.cast("B")
    row_bytes = len(view) // (last - first)
    read_into(entry.path, entry.begin + first * row_bytes, view)
    return rows


class TensorWriter:
    """Writes a safetensors file aside, tensor by tensor, and publishes it by one rename.

    Tensors lie, and must be appended, in the order of their names; equal tensors and metadata give
    equal bytes, and they are the bytes that safetensors itself would write.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:  # fmt: skip
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for name in sorted(shapes):
            begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
            shape = list(shapes[name])
            header[name] = {"dtype": _WORDS[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.names = sorted(shapes)
        self.num_bytes = 8 + len(text) + end
        self.path = path
        self._dtype = dtype
        self._start = len(text).to_bytes(8, "little") + text
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")

    def missing_space(self) -> str | None:
        """What to say if the file does not fit where it is to lie."""
        there = next(folder for folder in self.path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(there).free
        if free >= self.num_bytes:
            return None
        return (
            f"{self.path}: needs {self.num_bytes / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free "
            f"there; make room and give the same command again"
        )

    def open(self) -> None:
        """Begin the file; the folder is made if it is missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._aside.open("xb")
        self._write(self._start)

    def append(self, rows: Tensor) -> None:
        """Add whole rows of the tensor whose turn it is."""
        assert rows.dtype == self._dtype, f"{rows.dtype} in a file of {self._dtype}"
        self._write(rows.contiguous().flatten().view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None, f"{self.path}: not opened"
        self._digest.update(data)
        self._file.write(data)

    def publish(self) -> str:
        """Make the file visible; its SHA-256."""
        assert self._file is not None, f"{self.path}: not opened"
        written = self._file.tell()
        assert written == self.num_bytes, f"{self.path}: {written} of {self.num_bytes} bytes"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self.path)
        fsync_dir(self.path.parent)
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Delete what was written; nothing becomes visible."""
        if self._file is not None:
            self._file.close()
        self._aside.unlink(missing_ok=True)
