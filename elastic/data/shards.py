"""The bytes of zarr v3: shards, their index, and metadata.

Format: the Zarr v3 core specification and its `sharding_indexed` codec.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence

import google_crc32c
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
CHECKSUM_BYTES = 4  # at the end of a small array's chunk

# A quiet NaN in bf16: a slot that was never written does not read as data.
BF16_NAN = 0x7FC0
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def crc32c(data: Bytes) -> int:
    """CRC-32C of a contiguous byte array, without a copy."""
    # The extension takes numpy arrays as they are, and refuses memoryviews.
    return int(google_crc32c.value(data))


def as_bytes(array: NDArray[np.generic]) -> Bytes:
    """The bytes of an array, flat, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def sharded_json(
    shape: Sequence[int],
    shard: Sequence[int],
    chunk: Sequence[int],
    names: Sequence[str],
    packing: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """Metadata of a bf16 array that is kept as uint16 in shards; each chunk is packed as given."""
    inner = {
        "chunk_shape": list(chunk),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *packing],
        "index_codecs": _INDEX_CODECS,
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": inner}]
    found = _array_json(shape, shard, "uint16", BF16_NAN, codecs, names)
    return {**found, "attributes": {"logical_dtype": "bfloat16"}}


def plain_json(array: NDArray[np.generic], names: Sequence[str]) -> dict[str, object]:
    """Metadata of a small array that is kept in one chunk."""
    return _array_json(array.shape, array.shape, str(array.dtype), 0, _INDEX_CODECS, names)


def plain_bytes(array: NDArray[np.generic]) -> list[Bytes]:
    """The one chunk of a small array."""
    data = as_bytes(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return [data, np.frombuffer(struct.pack("<I", crc32c(data)), np.uint8)]


def group_json(attributes: dict[str, object]) -> dict[str, object]:
    """Metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def chunk_name(first: int, num_axes: int) -> str:
    """File name of the chunk whose first coordinate is `first` and the others 0."""
    return ".".join(["c", str(first), *["0"] * (num_axes - 1)])


def canonical(content: object) -> bytes:
    """JSON that is the same for equal content: sorted keys, no spaces, ASCII."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def json_bytes(content: object) -> list[Bytes]:
    """A JSON file's one piece."""
    return [np.frombuffer(canonical(content), np.uint8)]


def canonical_digest(content: object) -> str:
    """32 hex digits that equal content shares."""
    return hashlib.blake2b(canonical(content), digest_size=16).hexdigest()


def _array_json(
    shape: Sequence[int],
    chunk: Sequence[int],
    dtype: str,
    fill: int,
    codecs: Sequence[object],
    names: Sequence[str],
) -> dict[str, object]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # Dots, not slashes: all chunks of an array lie in one folder, and one fsync covers it.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": list(codecs),
        "dimension_names": list(names),
        "attributes": {},
    }
