"""The patch embedding that makes latents of a new autoencoder look like those of the old one.

A patch embedding is one linear layer, so the one that imitates another in the mean square is the
solution of a ridge system: sums over tokens, in fp64, that may be taken apart and added up again.
"""

# C cells of a new patch, E cells of an old patch, D width, N tokens, T, H, W grid, K latent steps

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from models.flow import Times, shifted

_COVERED = 0.99  # share of a new token that old tokens must cover, for it to count
_SEEN = 0.05  # of the strongest direction of a solution; weaker ones are as good as unseen


@dataclass(frozen=True)
class PairSums:
    """Sums over pairs of a new token's cells and the old cells behind it, fp64."""

    count: Tensor
    new_C: Tensor
    old_E: Tensor
    new_new_CC: Tensor
    new_old_CE: Tensor

    @classmethod
    def of(cls, new_NC: Tensor, old_NE: Tensor) -> "PairSums":
        """The sums over some pairs."""
        new, old = new_NC.double(), old_NE.double()
        count = torch.tensor(float(len(new)), dtype=torch.float64)
        return cls(count, new.sum(0), old.sum(0), new.T @ new, new.T @ old)

    def __add__(self, other: "PairSums") -> "PairSums":
        mine, theirs = vars(self).values(), vars(other).values()
        return PairSums(*(a + b for a, b in zip(mine, theirs, strict=True)))


def solve_embedding(
    sums: PairSums, weight_DE: Tensor, bias_D: Tensor, times: Times, ridge: float
) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (D) of the new embedding, fp32.

    It is fitted to what the old embedding makes of latents scaled by 1 - t, for t as training draws
    it: the signal in a noisy latent, at every level of noise. `ridge` is a share of the latents'
    mean square.
    """
    first, second = signal_moments(times)
    num_cells = len(sums.new_C)
    penalty = ridge * second * sums.new_new_CC.diagonal().mean()
    gram = torch.zeros(num_cells + 1, num_cells + 1, dtype=torch.float64)
    gram[:-1, :-1] = second * sums.new_new_CC
    gram.diagonal()[:-1] += penalty  # the bias is not held back
    gram[:-1, -1] = gram[-1, :-1] = first * sums.new_C
    gram[-1, -1] = sums.count
    weight, bias = weight_DE.double(), bias_D.double()
    cross_D = torch.cat(
        [
            second * sums.new_old_CE @ weight.T + first * sums.new_C[:, None] * bias,
            (first * sums.old_E @ weight.T + sums.count * bias)[None],
        ]
    )
    solution = torch.linalg.solve(gram, cross_D)
    return solution[:-1].T.contiguous().float(), solution[-1].contiguous().float()


def complete(weight_DC: Tensor, fresh_DC: Tensor) -> Tensor:
    """The embedding with a fresh one in the directions of a patch that it does not see.

    An old patch has fewer cells than a deep-compressed one (64 and 128 in Open-Sora 2.0), so that a
    solution is blind to the rest: to what only the new latents hold, and to half of the noise,
    which has to be predicted. What was measured without it: tests/bench/README.md.
    """
    _, strength, direction_KC = torch.linalg.svd(weight_DC.double(), full_matrices=False)
    seen_KC = direction_KC[strength > _SEEN * strength.max()]
    fresh_DC = fresh_DC.double()
    unseen_DC = fresh_DC - fresh_DC @ seen_KC.T @ seen_KC
    whole_DC: Tensor = (weight_DC.double() + unseen_DC).float()
    return whole_DC


def signal_moments(times: Times, points: int = 4096) -> tuple[float, float]:
    """Means of 1 - t and of its square over the times that are drawn."""
    quantile = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    drawn = torch.sigmoid(torch.special.ndtri(quantile) * times.std + times.centre)
    parts = ((1 - times.uniform, drawn), (times.uniform, shifted(quantile, times.alpha)))
    first = sum(share * float((1 - t).mean()) for share, t in parts)
    return first, sum(share * float((1 - t).square().mean()) for share, t in parts)


def overlap(new: Sequence[float], old: Sequence[float]) -> Tensor:
    """Share of each new interval that each old one covers, (new, old), fp64; edges ascend."""
    new_edges = torch.tensor(new, dtype=torch.float64)
    old_edges = torch.tensor(old, dtype=torch.float64)
    upper = torch.minimum(new_edges[1:, None], old_edges[None, 1:])
    lower = torch.maximum(new_edges[:-1, None], old_edges[None, :-1])
    return (upper - lower).clamp_min(0) / new_edges.diff()[:, None]


def paired_cells(
    new_BTHWC: Tensor, old_BTHWE: Tensor, shares: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Cells of the new tokens that old tokens cover, and the mean of the old cells behind each.

    `shares` are the overlaps along T, H and W; both results have one row for each token.
    """
    t, h, w = shares
    covered_THW = einsum(t.sum(1), h.sum(1), w.sum(1), "t, h, w -> t h w") > _COVERED
    behind_BTHWE = einsum(old_BTHWE.double(), t, h, w, "b k i j e, t k, h i, w j -> b t h w e")
    return new_BTHWC[:, covered_THW].flatten(0, 1), behind_BTHWE[:, covered_THW].flatten(0, 1)
