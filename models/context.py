"""One sample's tokens over several ranks: context parallelism as in DeepSpeed-Ulysses.

Each rank holds a run of the joint sequence. For attention the ranks exchange: what one had was its
tokens for all heads, what it gets is all tokens for its heads. So attention itself, its kernel and
its mask are those of one rank (arXiv 2309.14509). Every exchange has an exact gradient, by which
the gradients of parameters are parts of a sum over the ranks.
"""

# B sample, N video token, S token of the joint sequence, D width, A attention head, E its channel

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor


@dataclass(frozen=True)
class Context:
    """The ranks that share the tokens of each sample; all of them compute the same samples."""

    group: dist.ProcessGroup
    rank: int  # in the group
    size: int

    def share(self, text_tokens: int, video_tokens: int) -> "Share":
        """How the tokens of a joint sequence, text first, are cut: as evenly as can be."""
        total = text_tokens + video_tokens
        cuts = [total * rank // self.size for rank in range(self.size + 1)]
        return Share(self, text_tokens, tuple(pairwise(cuts)))


@dataclass(frozen=True)
class Share:
    """The run of a joint sequence that each rank of a context holds."""

    context: Context
    num_text: int
    runs: tuple[tuple[int, int], ...]

    @property
    def joint(self) -> slice:
        """This rank's tokens of the joint sequence."""
        return slice(*self.runs[self.context.rank])

    @property
    def text(self) -> slice:
        """This rank's tokens of the text; there may be none."""
        first, end = self.runs[self.context.rank]
        return slice(min(first, self.num_text), min(end, self.num_text))

    @property
    def video(self) -> slice:
        """This rank's tokens of the video; there may be none."""
        return slice(*self._video_run(self.context.rank))

    def to_heads(self, *own_BASE: Tensor) -> tuple[Tensor, ...]:
        """All tokens for this rank's share of the heads, of its own tokens for all heads."""
        size, own = self.context.size, own_BASE[0].shape[2]
        per_rank = [rearrange(x, "b (r a) s e -> r s b a e", r=size) for x in own_BASE]
        sent = torch.stack(per_rank, dim=2).flatten(0, 1)
        got = self._exchange(sent, [own] * size, self._counts)
        return rearrange(got, "s k b a e -> k b a s e").unbind(0)

    def to_tokens(self, own_BASE: Tensor) -> Tensor:
        """This rank's tokens for all heads, (B, S, D), of all tokens for its heads."""
        size, counts = self.context.size, self._counts
        sent = rearrange(own_BASE, "b a s e -> s b a e").contiguous()
        got = self._exchange(sent, counts, [counts[self.context.rank]] * size)
        return rearrange(got, "(r s) b a e -> b s (r a e)", r=size)

    def whole_video(self, own_BND: Tensor) -> Tensor:
        """The video tokens of all ranks, on every rank."""
        runs = [self._video_run(rank) for rank in range(self.context.size)]
        sent = rearrange(own_BND, "b n d -> n b d").repeat(self.context.size, 1, 1)
        counts = [end - first for first, end in runs]
        got = self._exchange(sent, [own_BND.shape[1]] * self.context.size, counts)
        return rearrange(got, "n b d -> b n d")

    @property
    def _counts(self) -> list[int]:
        return [end - first for first, end in self.runs]

    def _video_run(self, rank: int) -> tuple[int, int]:
        first, end = self.runs[rank]
        return max(first - self.num_text, 0), max(end - self.num_text, 0)

    def _exchange(self, sent: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Send so many rows to each rank, and get so many of each."""
        # Torch's traceable form: a compiled block stays one graph.
        got: Tensor = wait_tensor(
            all_to_all_single_autograd(sent, list(of), list(to), self.context.group)
        )
        return got
