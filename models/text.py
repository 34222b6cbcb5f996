"""Captions to text embeddings: a built-in encoder that is deterministic and downloads nothing."""

# B sample, L text token, D text width

import functools
import hashlib
import math
import re
import statistics
import unicodedata
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from models.record import Record

_VALUES_PER_DIGEST = 16  # a 64-byte digest holds 16 unsigned 32-bit numbers


class TextEmbedding(NamedTuple):
    """One caption: a vector for each token at its true length (L >= 1), and one for the whole."""

    embedding_LD: Tensor
    pooled_D: Tensor


class TextBatch(NamedTuple):
    """Captions padded to one length; `mask_BL` is True where a token is real and attended.

    A mask of None says that nothing is padded, which leaves attention its fastest kernel.
    """

    text_BLD: Tensor
    mask_BL: Tensor | None
    pooled_BD: Tensor


class WordHash(Record):
    """Each word is a fixed Gaussian vector drawn from a hash of its letters.

    Case, Unicode form and punctuation do not matter; the order of words does, through a sinusoid
    of amplitude `position`. The pooled vector is their sum at unit variance, without order.
    """

    rule: ClassVar[int] = 1  # raised when the same caption would give other numbers

    width: int = Field(default=64, ge=2)
    position: float = Field(default=0.25, ge=0, allow_inf_nan=False)

    @property
    def pooled_width(self) -> int:
        """The width of the pooled vector."""
        return self.width

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Embed captions as fp32 on the CPU; one without a word gives the null text."""
        return [self._encode_one(caption) for caption in captions]

    def null(self) -> TextEmbedding:
        """The text that stands for no text: a single zero token and a zero pooled vector."""
        return TextEmbedding(torch.zeros(1, self.width), torch.zeros(self.width))

    def fingerprint_fields(self) -> dict[str, str | int | float]:
        """What the numbers of an embedding depend on."""
        return {
            "encoder": type(self).__name__,
            "rule": self.rule,
            "width": self.width,
            "position": self.position,
        }

    def _encode_one(self, caption: str) -> TextEmbedding:
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold())
        if not words:
            return self.null()
        words_LD = torch.tensor([_word_vector(word, self.width) for word in words])
        pooled_D = torch.nn.functional.normalize(words_LD.sum(0), dim=0) * math.sqrt(self.width)
        return TextEmbedding(words_LD + self.position * _order(len(words), self.width), pooled_D)


def pad(embeddings: Sequence[TextEmbedding]) -> TextBatch:
    """Stack captions, zeros after the end of each; `mask_BL` is True on the real tokens."""
    if not embeddings:
        raise ValueError("pad() got no caption; a batch holds at least one")
    text_BLD = torch.nn.utils.rnn.pad_sequence(
        [embedding.embedding_LD for embedding in embeddings], batch_first=True
    )
    length_B = torch.tensor([len(embedding.embedding_LD) for embedding in embeddings])
    mask_BL = torch.arange(text_BLD.shape[1]) < length_B[:, None]
    return TextBatch(text_BLD, mask_BL, torch.stack([each.pooled_D for each in embeddings]))


@functools.lru_cache(maxsize=65_536)
def _word_vector(word: str, width: int) -> tuple[float, ...]:
    """Standard normal values by inversion of the hash's bits.

    Not from a torch generator: its stream may change between versions, and stored embeddings
    must stay valid.
    """
    inverse = statistics.NormalDist().inv_cdf
    values: list[float] = []
    for block in range(math.ceil(width / _VALUES_PER_DIGEST)):
        digest = hashlib.blake2b(word.encode(), salt=block.to_bytes(16, "big")).digest()
        bits = [int.from_bytes(digest[at : at + 4], "big") for at in range(0, len(digest), 4)]
        values += [inverse((each + 0.5) / 2**32) for each in bits]
    return tuple(values[:width])


def _order(length: int, width: int) -> Tensor:
    """Sinusoids of the word's place, (L, D)."""
    place_L1 = torch.arange(length)[:, None]
    rate_D = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    wave_LD = torch.stack([(place_L1 * rate_D).sin(), (place_L1 * rate_D).cos()], dim=-1)
    return wave_LD.flatten(1)[:, :width]
