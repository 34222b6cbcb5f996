"""Captions to text embeddings: a built-in encoder that is deterministic and downloads nothing."""

# B sample, L text token, D text width

import functools
import hashlib
import math
import re
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

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


class TextEncoder(Protocol):
    """What a stage asks of its text encoder. Training asks nothing: it reads what is stored."""

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        ...

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        ...

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Embed captions, each at its true length; fp32 on the CPU."""
        ...

    def null(self) -> TextEmbedding:
        """The text that stands for no text."""
        ...

    def most_tokens(self, captions: Iterable[str]) -> int:
        """A length that no embedding of these captions exceeds, found without a model."""
        ...

    def fingerprint_fields(self) -> dict[str, str | int | float]:
        """What the numbers of an embedding depend on."""
        ...

    def located(self) -> Self:
        """The same encoder for a process that runs in another folder."""
        ...

    def check(self) -> None:
        """ValueError, with what to do, unless the encoder can be used on this machine."""
        ...


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

    def most_tokens(self, captions: Iterable[str]) -> int:
        """Tokens of the longest of these captions."""
        return max((len(_words(caption)) for caption in captions), default=0) or 1

    def located(self) -> Self:
        """Itself: it reads no file."""
        return self

    def check(self) -> None:
        """Nothing can be missing."""

    def _encode_one(self, caption: str) -> TextEmbedding:
        words = _words(caption)
        if not words:
            return self.null()
        words_LD = torch.tensor([_word_vector(word, self.width) for word in words])
        pooled_D = torch.nn.functional.normalize(words_LD.sum(0), dim=0) * math.sqrt(self.width)
        return TextEmbedding(words_LD + self.position * _order(len(words), self.width), pooled_D)


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold())


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


def padded(text: TextBatch, tokens: int) -> TextBatch:
    """The batch at so many tokens, or a few more: a multiple of 8; with a mask in any case."""
    text_BLD, mask_BL, pooled_BD = text
    length = -(-max(tokens, text_BLD.shape[1]) // 8) * 8
    short = length - text_BLD.shape[1]
    if mask_BL is None:
        mask_BL = torch.ones(text_BLD.shape[:2], dtype=torch.bool, device=text_BLD.device)
    text_BLD = functional.pad(text_BLD, (0, 0, 0, short))
    return TextBatch(text_BLD, functional.pad(mask_BL, (0, short)), pooled_BD)


def trimmed(text: TextBatch) -> TextBatch:
    """The batch without its mask where every token is real; it lies on the CPU."""
    if text.mask_BL is None or not bool(text.mask_BL.all()):
        return text
    return text._replace(mask_BL=None)


def without_text(
    text: TextBatch, null: TextEmbedding, tokens_B: Tensor, pooled_B: Tensor
) -> TextBatch:
    """The batch with the null text's tokens where `tokens_B`, its pooled vector where `pooled_B`.

    It grows to the length of the null text where that is longer than every caption.
    """
    text_BLD, mask_BL, pooled_BD = text
    num_null = len(null.embedding_LD)
    length = max(text_BLD.shape[1], num_null)
    if mask_BL is None:
        mask_BL = torch.ones(text_BLD.shape[:2], dtype=torch.bool, device=text_BLD.device)
    text_BLD = functional.pad(text_BLD, (0, 0, 0, length - text_BLD.shape[1]))
    mask_BL = functional.pad(mask_BL, (0, length - mask_BL.shape[1]))
    null_LD = functional.pad(null.embedding_LD.to(text_BLD), (0, 0, 0, length - num_null))
    null_mask_L = torch.arange(length, device=mask_BL.device) < num_null
    return TextBatch(
        torch.where(tokens_B[:, None, None], null_LD, text_BLD),
        torch.where(tokens_B[:, None], null_mask_L, mask_BL),
        torch.where(pooled_B[:, None], null.pooled_D.to(pooled_BD), pooled_BD),
    )


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
