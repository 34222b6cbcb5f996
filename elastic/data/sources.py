"""The two sources of samples: video files for autoencoders, latent stores for DiTs."""

import logging
from collections.abc import Sequence

import torch

from elastic.data.assign import Members, held_out_name
from elastic.data.clips import Clip, Clips
from elastic.data.decode import BadVideo, decode_clip, to_unit
from elastic.data.growth import Growth
from elastic.data.joined import JoinedStores
from elastic.data.load import Samples
from elastic.data.order import Later, Layout, layout_of
from elastic.data.permutation import Indices
from elastic.data.sealed import SealedStore
from elastic.errors import InputError
from models.text import TextEmbedding, WordHash, pad
from stages.schedule import Bucket
from stages.stage import DiffusionStage, Stage

log = logging.getLogger(__name__)


class VideoSource:
    """Decodes clips when they are asked for."""

    def __init__(
        self, stage: Stage, members: Members, held_out: bool, growths: Sequence[Growth] = ()
    ) -> None:
        self._rate = stage.rate
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

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        """Decode these clips; one that breaks only now is grey and has weight 0."""
        decoded = [self._decode(self._clips[bucket.name][int(i)], bucket) for i in indices]
        grey = torch.zeros(3, bucket.frames, bucket.height, bucket.width)
        return Samples(
            x_BCTHW=torch.stack([grey if x is None else x for x in decoded]),
            text=None,
            ids=self.sample_ids(bucket, indices),
            weight_B=torch.tensor([float(x is not None) for x in decoded]),
        )

    def _decode(self, clip: Clip, bucket: Bucket) -> torch.Tensor | None:
        try:
            return to_unit(
                decode_clip(clip.path, bucket.frames, self._rate, bucket.height, bucket.width)
            )
        except (BadVideo, MemoryError, RuntimeError, ValueError) as error:
            # The probe has looked at its first frame alone, and this is the process that trains.
            log.warning("%s: left out of its batch: %s", clip.path, error)
            return None


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
    ) -> None:
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

    def fetch(self, bucket: Bucket, indices: Indices) -> Samples:
        """Read these samples, widened to fp32."""
        read = self._store.read_batch(self._names[bucket.name], indices)
        texts = [
            TextEmbedding(text_LD.float(), pooled_P.float())
            for text_LD, pooled_P in zip(read.texts_LD, read.pooled_BP, strict=True)
        ]
        return Samples(
            x_BCTHW=read.latents_BCTHW.float(),
            text=pad(texts),
            ids=read.sample_ids,
            weight_B=torch.ones(len(indices)),
            given_BCTHW=None if read.given_BCTHW is None else read.given_BCTHW.float(),
        )
