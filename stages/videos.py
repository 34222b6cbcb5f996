"""Where the clips of a stage come from."""

from pydantic import Field

from models.record import Record


class Videos(Record):
    """A table of clips: a CSV or Parquet file with the columns `path` and `text`; or a folder.

    Of a folder (`clips/`) every video and picture in it and in its folders is taken, in the order
    of their names; the caption is in a file of the same name that ends in `.txt`, or is empty.
    Table, folder and paths may be URLs that fsspec knows, such as s3://bucket/clips.parquet; keys
    come from the environment. Relative paths in the table are taken from `folder`, or from the
    table's own folder.
    An optional column `split` marks held-out clips with the word `held-out`; without it every
    `held_out_every`-th clip, by the hash of its path, is held out.
    """

    table: str
    folder: str | None = None
    held_out_every: int = Field(default=16, ge=2)

    def __init__(self, table: str, **fields: object) -> None:
        super().__init__(**{"table": table, **fields})
