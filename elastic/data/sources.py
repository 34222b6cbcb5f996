"""The two sources of samples: video files for autoencoders, latent stores for DiTs."""

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from elastic.data.ahead import read_ahead
from elastic.data.assign import Members, held_out_name
from elastic.data.clips import Clips
from elastic.data.decode import BadVideo, Unreachable, to_unit
from elastic.data.decoders import Answer, Decoders, Wanted
from elastic.data.growth import Growth
from elastic.data.joined import JoinedStores
from elastic.data.load import Round, Samples
from elastic.data.order import Later, Layout, layout_of
from elastic.data.permutation import Indices
from elastic.data.sealed import SealedStore
from elastic.errors import InputError
from models.text import TextEmbedding, WordHash, pad
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

log = logging.getLogger(__name__)

_AHEAD_BYTES = 2**30  # most that rounds which are read ahead may take
_PAUSES_S = (1.0, 4.0, 15.0, 40.0)  # before a file is tried again that cannot be read just now


class VideoSource:
    """Decodes clips when they are asked for, in processes of their own."""

    def __init__(
        self,
        stage: Stage,
        members: Members,
        held_out: bool,
        decoders: Decoders,
        growths: Sequence[Growth] = (),
    ) -> None:
        self._rate = stage.rate
        self._decoders = decoders
        self._broken: dict[Wanted | str, Answer] = {}  # once is enough: it may have taken minutes
        self._clips: dict[str, Clips] = {}
        self._layouts: dict[str, Layout] = {}
        for bucket in stage.buckets:
            name = held_out_name(bucket) if held_out else bucket.name
            parts = [members, *(growth.members for growth in growths)]
            found = [Clips.of(part.clips[name]) for part in parts if name in part.clips]
            self._clips[bucket.name] = Clips.joined(found)
            # What is measured on stays as it was.
            later = [] if held_out else [growth.later(name) for growth in growths]
            self._layouts[bucket.name] = layout_of(members.sizes(name), later)

    def layouts(self) -> dict[str, Layout]:
        """Where the clips of each source lie in each bucket, by its name."""
        return self._layouts

    def counts(self) -> dict[str, int]:
        """Clips of each bucket, by its name."""
        return {name: len(clips) for name, clips in self._clips.items()}

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        """The ids of the clips at these indices."""
        return self._clips[bucket.name].ids_at(indices)

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        """Zeros: an autoencoder reads no text."""
        return np.zeros(len(indices), np.int64)

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        """Decode the clips of each round, and of those that come next; a broken one is grey.

        It has weight 0. Unreachable is raised for a file that cannot be read for a minute: dropped,
        it would be missing from what is learnt without anybody's wish.
        """
        shown, asked = itertools.tee(rounds)
        wanted = (one for bucket, indices in asked for one in self._wanted(bucket, indices))
        answers = self._decoders.answers(wanted, self._decoders.num, self._broken)
        for bucket, indices in shown:
            pictures = {
                one: self._pictures(one, next(answers)) for one in self._wanted(bucket, indices)
            }
            yield self._samples(bucket, indices, pictures)

    def _wanted(self, bucket: Bucket, indices: Indices) -> list[Wanted]:
        """What is to be decoded for a round: each clip once, as a round may repeat it."""
        return list(dict.fromkeys(self._of(bucket, int(i)) for i in indices))

    def _of(self, bucket: Bucket, index: int) -> Wanted:
        clip = self._clips[bucket.name][index]
        size = bucket.height, bucket.width
        return Wanted(clip.path, bucket.frames, self._rate, *size, clip.segment)

    def _pictures(self, wanted: Wanted, answer: Answer) -> Tensor | None:
        for pause in _PAUSES_S:
            if not isinstance(answer, Unreachable):
                break
            log.warning("%s; tried again in %.0f s", answer, pause)
            time.sleep(pause)
            answer = next(self._decoders.answers([wanted], ahead=0))
        if isinstance(answer, Unreachable):
            raise answer
        if isinstance(answer, BadVideo):
            if wanted not in self._broken:  # the probe has looked at its first frame alone
                what = f"{wanted.path}{wanted.segment}"
                log.warning("%s: left out of its batch: %s", what, answer)
            self._broken[wanted] = answer
            return None
        assert isinstance(answer, np.ndarray), "a probe was not asked for"
        return to_unit(torch.from_numpy(answer))

    def _samples(
        self, bucket: Bucket, indices: Indices, pictures: Mapping[Wanted, Tensor | None]
    ) -> Samples:
        found = [pictures[self._of(bucket, int(i))] for i in indices]
        grey = torch.zeros(3, bucket.frames, bucket.height, bucket.width)
        return Samples(
            x_BCTHW=torch.stack([grey if x is None else x for x in found]),
            text=None,
            ids=self.sample_ids(bucket, indices),
            weight_B=torch.tensor([float(x is not None) for x in found]),
        )


class LatentSource:
    """Reads latents and text from sealed stores; no video is opened.

    There is a store of what the stage began with, and one of each growth. Where the stage has a
    mix, its members say which of them are of which source.
    """

    def __init__(
        self,
        stage: DiffusionStage,
        stores: SealedStore | Sequence[SealedStore],
        held_out: bool,
        members: Members | None = None,
        growths: Sequence[Growth] = (),
        pinned: bool = False,
    ) -> None:
        """`pinned`: latents are read to where a GPU can fetch them from."""
        self._pinned = pinned
        self._store = JoinedStores([stores] if isinstance(stores, SealedStore) else stores)
        self._stage = stage
        self._names = {b.name: held_out_name(b) if held_out else b.name for b in stage.buckets}
        self._layouts = {
            name: self._layout(stored, members, () if held_out else growths)
            for name, stored in self._names.items()
        }
        if not held_out:
            self._require_each(members)

    def layouts(self) -> dict[str, Layout]:
        """Where the samples of each source lie in each bucket, by its name."""
        return self._layouts

    @property
    def text_tokens(self) -> int:
        """The most tokens that a text may have."""
        return self._store.text_tokens

    def _layout(self, stored: str, members: Members | None, growths: Sequence[Growth]) -> Layout:
        """Where they lie now that those are left out which could not be encoded."""
        if members is None:
            return layout_of([self._store.count(stored)])
        later = [
            Later(self._store.present(number, stored, planned), starts)
            for number, (planned, starts) in enumerate(
                (growth.later(stored) for growth in growths), start=1
            )
        ]
        return layout_of(self._store.present(0, stored, members.sizes(stored)), later)

    def _require_each(self, members: Members | None) -> None:
        for name, layout in self._layouts.items():
            planned = [1] if members is None else members.sizes(name)
            for number, extents in enumerate(layout):
                if planned[number] and not extents[0].size:
                    raise InputError(
                        f"stage {self._stage.name!r}: bucket {name!r} has no latents of "
                        f"{self._stage.data.sources[number].table!r}: none of its clips could be "
                        "encoded; the reasons are in the log of the encoding"
                    )

    def null_text(self) -> TextEmbedding:
        """What dropped text is replaced by."""
        if self._store.null_text is not None:
            return self._store.null_text
        if isinstance(self._stage.text, WordHash):
            return self._stage.text.null()  # a store of before it was kept there
        raise InputError(
            f"stage {self._stage.name!r}: its latents were sealed without the null text; "
            "encode again"
        )

    def counts(self) -> dict[str, int]:
        """Samples of each bucket, by its name."""
        return {name: self._store.count(stored) for name, stored in self._names.items()}

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        """The ids of the samples at these indices."""
        return self._store.sample_ids(self._names[bucket.name], indices)

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        """Text tokens of the samples at these indices."""
        return self._store.text_lengths(self._names[bucket.name], indices)

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        """Read the samples of each round, and of those that come next."""
        return read_ahead(lambda one: self.fetch(*one), rounds, self._most_ahead())

    def _most_ahead(self) -> int:
        """As many rounds as pay where the store lies, if memory has room for them."""
        largest = max(
            bucket.micro * torch.bfloat16.itemsize * math.prod(self._store.shape(name))
            for bucket, name in zip(self._stage.buckets, self._names.values(), strict=True)
        )
        return max(2, min(self._store.reads_at_once, _AHEAD_BYTES // largest))

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        """Read these samples, bf16."""
        stored = self._names[bucket.name]
        out_BCTHW = torch.empty(
            (len(indices), *self._store.shape(stored)),
            dtype=torch.bfloat16,
            pin_memory=self._pinned,
        )
        read = self._store.read_batch(stored, indices, out_BCTHW)
        texts = [
            TextEmbedding(text_LD, pooled_P)
            for text_LD, pooled_P in zip(read.texts_LD, read.pooled_BP, strict=True)
        ]
        return Samples(
            x_BCTHW=read.latents_BCTHW,
            text=pad(texts),
            ids=read.sample_ids,
            weight_B=torch.ones(len(indices)),
            given_BCTHW=read.given_BCTHW,
        )
