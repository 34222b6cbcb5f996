"""Captions to text embeddings as FLUX and Open-Sora 2.0 take them: T5 tokens and CLIP's vector.

Both encoders are read from local folders in the layout of Hugging Face: `config.json`, safetensors
and the tokenizer's files. Nothing is fetched, nothing is unpickled, no code in a folder is run.
"""

# B sample, L text token, D text width

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from models.record import Record
from models.text import TextEmbedding
from models.text_folder import CLIP, SMALL, T5, WEIGHTS, check_folder

_BATCH = 16  # captions at once
_INSTALL = 'T5Clip needs transformers: pip install "restage[text]"'


class T5Clip(Record):
    """T5's encoder for the tokens, CLIP's text model for the pooled vector; published sizes.

    A caption has as many tokens as T5's tokenizer makes of it, its end token included, and at most
    `tokens`. Padding is not attended, so an embedding does not depend on what it is encoded with,
    up to rounding; the published code pads to 512 tokens and attends the padding.
    """

    rule: ClassVar[int] = 1  # raised when the same caption would give other numbers

    t5: str = Field(min_length=1)
    """Folder of the T5 encoder and its tokenizer."""
    clip: str = Field(min_length=1)
    """Folder of the CLIP text model and its tokenizer."""
    tokens: int = Field(default=512, ge=2)
    clip_tokens: int = Field(default=77, ge=3)
    t5_width: int = Field(default=4096, ge=1)
    pooled: int = Field(default=768, ge=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the encoders compute in; the published code takes bfloat16."""

    @property
    def width(self) -> int:
        """Width of a token's vector."""
        return self.t5_width

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.pooled

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Embed captions, on the GPU if there is one; fp32 on the CPU."""
        found: list[TextEmbedding] = []
        for first in range(0, len(captions), _BATCH):
            found += _encode(_load(self), self, list(captions[first : first + _BATCH]))
        return found

    def null(self) -> TextEmbedding:
        """The text that stands for no text: the empty caption, as T5 and CLIP embed it."""
        return self.encode([""])[0]

    def most_tokens(self, captions: Iterable[str]) -> int:
        """No embedding of these captions is longer; the limit itself, as counting costs minutes."""
        return self.tokens

    def fingerprint_fields(self) -> dict[str, str | int | float]:
        """What the numbers of an embedding depend on; reads every file once a process."""
        self.check()
        return {
            "encoder": type(self).__name__,
            "rule": self.rule,
            "t5": _folder_digest(Path(self.t5)),
            "clip": _folder_digest(Path(self.clip)),
            "tokens": self.tokens,
            "clip_tokens": self.clip_tokens,
            "width": self.width,
            "pooled": self.pooled,
            "dtype": self.dtype,
        }

    def located(self) -> Self:
        """The same encoder with absolute folders, for a process that runs elsewhere."""
        return self.replace(t5=str(Path(self.t5).absolute()), clip=str(Path(self.clip).absolute()))

    def check(self) -> None:
        """ValueError unless transformers is installed and both folders hold what is needed.

        Reads headers and small files; no model is loaded.
        """
        if importlib.util.find_spec("transformers") is None:
            raise ValueError(_INSTALL)
        t5 = check_folder(f"text.t5 {self.t5!r}", Path(self.t5), T5)
        clip = check_folder(f"text.clip {self.clip!r}", Path(self.clip), CLIP)
        self._check_size("t5_width", self.t5, t5["d_model"])
        self._check_size("pooled", self.clip, clip["hidden_size"])
        places = clip["max_position_embeddings"]
        if self.clip_tokens > places:
            raise ValueError(
                f"text.clip_tokens={self.clip_tokens}: the model in {self.clip!r} knows {places} "
                "places; write that or less"
            )

    def _check_size(self, field: str, folder: str, size: int) -> None:
        if getattr(self, field) != size:
            raise ValueError(
                f"text.{field}={getattr(self, field)}: the model in {folder!r} has {size}; write "
                f"{field}={size}, or give the folder of another model"
            )


class _Loaded(NamedTuple):
    # Any: transformers is an optional dependency, and its classes are known only when it is there
    t5: Any
    t5_tokenizer: Any
    clip: Any
    clip_tokenizer: Any


@functools.lru_cache(maxsize=1)
def _load(encoder: T5Clip) -> _Loaded:
    """Both encoders, once a process."""
    encoder.check()
    # Late: an optional dependency, and one that takes seconds to import.
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = (
        ("t5", encoder.t5, T5EncoderModel),
        ("clip", encoder.clip, CLIPTextModel),
    )
    tokenizers, models = [], []
    for field, folder, kind in places:
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=getattr(torch, encoder.dtype),
                output_loading_info=True,
            )
        except MemoryError:
            raise  # nothing that a folder could do for
        # transformers raises many kinds; what passed the checks and is broken still is bad input.
        except Exception as error:
            raise ValueError(
                f"text.{field} {folder!r}: transformers cannot load it as a {kind.__name__} "
                f"({type(error).__name__}: {error}); copy the published files again"
            ) from error
        # transformers fills what the file lacks with random numbers, and only logs it.
        lacking = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if lacking:
            raise ValueError(
                f"text.{field} {folder!r}: the weights do not fill a {kind.__name__}: "
                f"{lacking[:3]} ({len(lacking)} in all) are missing or have another shape; is it "
                "the right file?"
            )
        tokenizers.append(tokenizer)
        models.append(model.to(device).eval().requires_grad_(False))
    return _Loaded(models[0], tokenizers[0], models[1], tokenizers[1])


@torch.no_grad()
def _encode(loaded: _Loaded, encoder: T5Clip, captions: list[str]) -> list[TextEmbedding]:
    token_BL, mask_BL = _tokens(loaded.t5_tokenizer, captions, encoder.tokens, loaded.t5.device)
    text_BLD = loaded.t5(input_ids=token_BL, attention_mask=mask_BL).last_hidden_state
    token_BL, clip_mask_BL = _tokens(
        loaded.clip_tokenizer, captions, encoder.clip_tokens, loaded.clip.device
    )
    pooled_BD = loaded.clip(input_ids=token_BL, attention_mask=clip_mask_BL).pooler_output
    # All at once: a GPU would be waited for several times with each caption.
    text_BLD, mask_BL, pooled_BD = (x.cpu() for x in (text_BLD, mask_BL.bool(), pooled_BD))
    return [
        TextEmbedding(text_LD[mask_L].float(), pooled_D.float().clone())
        for text_LD, mask_L, pooled_D in zip(text_BLD, mask_BL, pooled_BD, strict=True)
    ]


def _tokens(
    tokenizer: Any,  # Any: of transformers
    captions: list[str],
    most: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Token numbers and which of them are real, both (B, L)."""
    found = tokenizer(captions, padding=True, truncation=True, max_length=most, return_tensors="pt")
    return found["input_ids"].to(device), found["attention_mask"].to(device)


def _folder_digest(folder: Path) -> str:
    """32 hex digits of the names and contents of the files that decide an embedding.

    Readme files and weights of other formats do not.
    """
    digest = hashlib.blake2b(digest_size=16)
    weights = [path.name for path in folder.glob(WEIGHTS)]
    for name in sorted({*weights, *(n for n in SMALL if (folder / n).is_file())}):
        state = (folder / name).stat()
        content = _file_digest(folder / name, state.st_size, state.st_mtime_ns)
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, changed_ns: int) -> str:
    """SHA-256 of a file; size and time of change make another content another entry."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
