"""From noise to latents on one device: as the stage computes, as many clips at once as fit well."""

# B sample, C channel, T frame, H, W latent grid

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from elastic.kernels import attention, attention_order, compile_blocks, compiles_walks, text_room
from elastic.memory import precision_bytes
from elastic.weights import load_weights
from elastic.workload import TRAINING, dit_flops, video_tokens
from models.flow import conditioned, euler_sample
from models.fresh import named_seed
from models.text import TextBatch, TextEmbedding, padded
from stages.schedule import Bucket
from stages.stage import DiffusionStage

STEPS, GUIDANCE, SEED = 25, 3.0, 0
# Of the largest tensor inside of a block, for all clips that are walked at once. A few of its size
# are there together; of 3,072 channels in bf16 it holds 25,000 tokens, enough to fill a GPU.
_LARGEST_BYTES = 1 << 30


class Guided(NamedTuple):
    """In how many steps, how strongly led by the text, and with which shift of time."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    shift: float | None = None  # that of the stage


@dataclass(frozen=True)
class Sampler:
    """A finished DiT on its device, for some captions and clips of one bucket."""

    stage: DiffusionStage
    bucket: Bucket
    guided: Guided
    null: TextEmbedding
    text_tokens: int  # of the longest of the captions, or of the null text
    at_once: int  # clips that are walked together
    model: nn.Module
    is_compiled: bool

    @classmethod
    def load(
        cls,
        stage: DiffusionStage,
        bucket: Bucket,
        guided: Guided,
        null: TextEmbedding,
        captions: Sequence[str],
        weights: Path,
    ) -> Self:
        """With finished weights, in the precision of the stage from the file on."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        text_tokens = max(stage.text.most_tokens(captions), len(null.embedding_LD))
        at_once = walked_at_once(stage, bucket, text_tokens, guided, len(captions))
        model: nn.Module = stage.build()
        if stage.precision == "bf16":
            model = model.to(torch.bfloat16)
        model = load_weights(model.to_empty(device=device), weights)
        flops = dit_flops(stage, bucket, text_tokens) / TRAINING * rows_of(stage, guided)
        is_compiled = compiles_walks(stage, flops * guided.steps * len(captions), device)
        if is_compiled:
            compile_blocks(model)
        return cls(stage, bucket, guided, null, text_tokens, at_once, model, is_compiled)

    def latents(
        self, noise_BCTHW: Tensor, text: TextBatch, given_BCTHW: Tensor | None = None
    ) -> Tensor:
        """What the model makes of noise and captions, fp32 on its device."""
        device = next(self.model.parameters()).device
        if self.is_compiled:  # for each length on its own
            length = max(text.text_BLD.shape[1], len(self.null.embedding_LD))
            tokens = video_tokens(self.stage, self.bucket)
            text = padded(text, text_room(length, tokens, self.text_tokens))
        with attention(attention_order(device)):
            return walk(
                self.stage, self.model, noise_BCTHW.to(device), text, self.null, self.guided,
                given_BCTHW,
            )  # fmt: skip


def walk(
    stage: DiffusionStage,
    model: Callable[..., Tensor],
    noise_BCTHW: Tensor,
    text: TextBatch,
    null: TextEmbedding,
    guided: Guided,
    given_BCTHW: Tensor | None = None,
) -> Tensor:
    """From noise to latents, on the device of the noise.

    Guidance is an input of the DiTs that take it, and classifier-free for all others.
    """
    _, _, num_frames, rows, columns = noise_BCTHW.shape
    frames, height, width = stage.model.token_grid((num_frames, rows, columns))
    shift = guided.shift or stage.noise.times(height * width, frames).alpha
    takes_guidance = stage.model.guidance
    moved = (None if x is None else x.to(noise_BCTHW.device) for x in text)
    return euler_sample(
        conditioned(model, guided.guidance if takes_guidance else None, given_BCTHW),
        noise_BCTHW,
        TextBatch(*moved),  # type: ignore[arg-type]  # only the mask may be None
        null,
        steps=guided.steps,
        guidance=1.0 if takes_guidance else guided.guidance,
        alpha=shift,
    )


def rows_of(stage: DiffusionStage, guided: Guided) -> int:
    """Rows of the model's batch for a clip: classifier-free guidance has one without its text."""
    return 1 if stage.model.guidance or guided.guidance == 1.0 else 2


def walked_at_once(
    stage: DiffusionStage, bucket: Bucket, text_tokens: int, guided: Guided, num_clips: int
) -> int:
    """How many of so many clips go through the model together: all turns are about alike.

    As few as keep the largest tensor of a block small, which is what a single-stream block makes
    of each token: query, key, value and the inside of its MLP.
    """
    values = 3 * stage.model.width + stage.model.mlp_width
    tokens = (video_tokens(stage, bucket) + text_tokens) * rows_of(stage, guided)
    most = max(1, _LARGEST_BYTES // (tokens * values * precision_bytes(stage)))
    turns = max(1, -(-num_clips // most))
    return max(1, -(-num_clips // turns))


def noise_of(shape: tuple[int, ...], place: int, seed: int = SEED) -> Tensor:
    """What the sample at a place of the list of captions starts from."""
    generator = torch.Generator().manual_seed(named_seed("sample", seed, place))
    return torch.randn(shape, generator=generator)
