"""Several sealed stores read as one: what a stage began with, and what came later."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elastic.data.permutation import Indices
from elastic.data.sealed import LatentBatch, SealedStore
from models.text import TextEmbedding


class JoinedStores:
    """The samples of a bucket are those of the first store, then those of the next, and so on."""

    def __init__(self, stores: Sequence[SealedStore]) -> None:
        self._stores = stores
        self._buckets = [{bucket.name for bucket in store.schema.buckets} for store in stores]

    @property
    def null_text(self) -> TextEmbedding | None:
        """What dropped text is replaced by, if the first store has it."""
        return self._stores[0].null_text

    @property
    def text_tokens(self) -> int:
        """The most tokens that a text of them may have."""
        return max(store.schema.text_tokens for store in self._stores)

    @property
    def reads_at_once(self) -> int:
        """How many threads it pays to read with."""
        return max(store.reads_at_once for store in self._stores)

    def shape(self, bucket: str) -> tuple[int, ...]:
        """The shape of a latent of the bucket."""
        return self._stores[0].schema.bucket(bucket).shape

    def count(self, bucket: str) -> int:
        """How many samples the bucket has."""
        return sum(self._counts(bucket))

    def present(self, number: int, bucket: str, planned: Sequence[int]) -> list[int]:
        """How many samples a store has of those planned: of sources of these sizes, in order."""
        if bucket not in self._buckets[number]:
            return [0] * len(planned)
        edges = np.cumsum([0, *planned]).tolist()
        before = [self._stores[number].present_before(bucket, edge) for edge in edges]
        return np.diff(before).tolist()

    def sample_ids(self, bucket: str, indices: Indices) -> Indices:
        """The ids of some samples of the bucket."""
        ids = np.empty(len(indices), np.int64)
        for store, where, own in self._split(bucket, indices):
            ids[where] = store.sample_ids(bucket, own)
        return ids

    def text_lengths(self, bucket: str, indices: Indices) -> Indices:
        """Text tokens of some samples of the bucket."""
        lengths = np.empty(len(indices), np.int64)
        for store, where, own in self._split(bucket, indices):
            lengths[where] = store.text_lengths(bucket, own)
        return lengths

    def read_batch(self, bucket: str, indices: Indices, out_BCTHW: Tensor) -> LatentBatch:
        """Read some samples; latents go into `out_BCTHW`, bf16."""
        parts = list(self._split(bucket, indices))
        if len(parts) == 1:
            ((store, _, own),) = parts
            return store.read_batch(bucket, own, out_BCTHW)
        read = [store.read_batch(bucket, own) for store, _, own in parts]
        order = torch.from_numpy(np.argsort(np.concatenate([where for _, where, _ in parts])))
        texts = [text_LD for batch in read for text_LD in batch.texts_LD]
        stills = [batch.given_BCTHW for batch in read if batch.given_BCTHW is not None]
        return LatentBatch(
            out_BCTHW.copy_(torch.cat([batch.latents_BCTHW for batch in read])[order]),
            [texts[place] for place in order.tolist()],
            torch.cat([batch.pooled_BP for batch in read])[order],
            np.concatenate([batch.sample_ids for batch in read])[order.numpy()],
            torch.cat(stills)[order] if stills else None,
        )

    def _counts(self, bucket: str) -> list[int]:
        stores = zip(self._stores, self._buckets, strict=True)
        return [store.count(bucket) if bucket in buckets else 0 for store, buckets in stores]

    def _split(self, bucket: str, indices: Indices) -> list[tuple[SealedStore, Indices, Indices]]:
        """Each store that has some of the samples, which of them, and their indices in it."""
        counts = np.array(self._counts(bucket))
        edges = np.cumsum(counts)
        numbers = np.searchsorted(edges, indices, side="right")
        found = []
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            own = indices[where] - (edges - counts)[number]
            found.append((self._stores[number], where, own))
        return found
