"""Captions beside the latents: a Parquet file in each bucket, whose rows are the planned samples.

Nothing here reads them: they make a store complete for whoever gets it alone.
"""

import io
import tempfile
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elastic.data.clips import Clip, Clips
from elastic.data.store_folder import StoreFolder

_COLUMNS = ["sample_id", "text"]
_PIECE = 2**22  # bytes of the file that are looked at at once


def captions_file(bucket: str) -> str:
    """The name of the file with the captions of a bucket."""
    return f"{bucket}/captions.parquet"


def publish_captions(folder: StoreFolder, bucket: str, clips: Sequence[Clip]) -> None:
    """Write sample ids and captions of a bucket, in the order of its arrays."""
    columns = Clips.of(clips)
    schema = pa.schema({"sample_id": pa.int64(), "text": pa.string()})
    with tempfile.TemporaryFile() as file:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for batch in columns.batches():
                writer.write_batch(batch.select(_COLUMNS))
        file.flush()
        whole = np.memmap(file, np.uint8, mode="r")
        pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
        folder.publish(captions_file(bucket), pieces)


def captions_fit(data: bytes, sample_ids: Sequence[int] | NDArray[np.int64]) -> bool:
    """Whether a file of captions is whole, and is of these samples."""
    try:
        table = pq.read_table(io.BytesIO(data), columns=_COLUMNS, page_checksum_verification=True)
    except (pa.ArrowException, OSError):  # pyarrow raises either
        return False
    return np.array_equal(table.column("sample_id").to_numpy(), np.asarray(sample_ids))
