"""Where the clips of a stage come from."""

from fractions import Fraction
from typing import Annotated

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from models.record import Record

SMALLEST_SHARE = Fraction(1, 1_000_000)


class Videos(Record):
    """A table of clips: a CSV or Parquet file with the columns `path` and `text`; or a folder.

    Of a folder (`clips/`) every video and picture in it and in its folders is taken, in the order
    of their names; the caption is in a file of the same name that ends in `.txt`, or is empty.
    Table, folder and paths may be URLs that fsspec knows, such as s3://bucket/clips.parquet; keys
    come from the environment. Relative paths in the table are taken from `folder`, or from the
    table's own folder.
    Optional columns `start` and `end`, in seconds after the file's first frame, make a clip of a
    part of it; rows of one file with different ones are different clips.
    An optional column `split` marks held-out clips with the word `held-out`; without it every
    `held_out_every`-th file, by the hash of its path, is held out.
    """

    table: str
    folder: str | None = None
    held_out_every: int = Field(default=16, ge=2)

    def __init__(self, table: str, **fields: object) -> None:
        super().__init__(**{"table": table, **fields})

    @property
    def sources(self) -> tuple["Videos", ...]:
        """Itself: there is one."""
        return (self,)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """All of a stage's samples."""
        return (Fraction(1),)


class Part(Record):
    """One source of a mix and its weight."""

    videos: Videos
    weight: float = Field(gt=0, allow_inf_nan=False)


def _as_part(part: object) -> object:
    """A pair as fields; records, and fields of JSON, stay as they are."""
    if isinstance(part, Part | dict):
        return part
    if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], Videos):
        return {"videos": part[0], "weight": part[1]}
    raise ValueError(f"{part!r} is no source with its weight; write (Videos('clips.parquet'), 0.7)")


class Mix(Record):
    """Several sources, and how much of a stage's samples comes from each, whatever their sizes.

    `Mix((Videos("films.parquet"), 0.7), (Videos("stock/"), 0.3))`; weights count relative to one
    another. An epoch is that of a source: a small one with a large weight comes round oftener. Of
    a bucket that a source has no clip for, the others have its share.
    """

    parts: tuple[Part, ...]

    def __init__(self, *pairs: tuple[Videos, float], **fields: object) -> None:
        super().__init__(**{"parts": pairs, **fields})

    @field_validator("parts", mode="before")
    @classmethod
    def _pairs_are_parts(cls, parts: object) -> object:
        return tuple(map(_as_part, parts)) if isinstance(parts, tuple) else parts

    @model_validator(mode="after")
    def _check_parts(self) -> "Mix":
        if len(self.parts) < 2:
            raise ValueError(
                f"{len(self.parts)} sources: a mix has two or more, each with its weight, such as "
                "Mix((Videos('films.parquet'), 0.7), (Videos('stock/'), 0.3)); of one, give the "
                "Videos itself"
            )
        for number, videos in enumerate(self.sources):
            if videos in self.sources[:number]:
                raise ValueError(f"{videos.table!r} is there twice; add the weights")
        for videos, share in zip(self.sources, self.shares, strict=True):
            if share < SMALLEST_SHARE:
                raise ValueError(
                    f"{videos.table!r} gets {float(share):.2g} of the samples, and the least is "
                    f"{float(SMALLEST_SHARE):g}: raise its weight, or leave it out"
                )
        return self

    @property
    def sources(self) -> tuple[Videos, ...]:
        """The sources in the order in which they are written."""
        return tuple(part.videos for part in self.parts)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """What each source has of the samples; together 1."""
        # As written: 0.7 is seven tenths, and not the binary fraction next to it.
        weights = [Fraction(repr(part.weight)) for part in self.parts]
        return tuple(weight / sum(weights) for weight in weights)


def _kind(data: object) -> str:
    is_mix = isinstance(data, Mix) or (isinstance(data, dict) and "parts" in data)
    return "mix" if is_mix else "videos"


# By their fields, as neither has a word for its kind in the runs of before there were two.
Data = Annotated[
    Annotated[Videos, Tag("videos")] | Annotated[Mix, Tag("mix")], Discriminator(_kind)
]
