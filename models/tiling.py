"""Codecs on clips that are too large for them: overlapping tiles, blended with linear ramps.

A tile is encoded or decoded alone, so it sees nothing beyond its edges: tiled latents differ from
whole ones, and the tiling is part of the latents' fingerprint.

Memory, without gradients: the input, the output once in fp32, and one call on one tile of one
sample. For Video DC-AE at 256 px x 32 frames in fp32 a tensor at full resolution is
128 x 32 x 256 x 256 x 4 B = 1.1 GB; decoding one tile with the published widths took 6.1 GB beside
1.8 GB of weights (measured on a CPU), encoding up to eight such tensors with reduced ones. The
pixels of 128 frames of 768 x 768 px are 0.9 GB. Whole, each of the tensors takes 39 GB.

Time, in a causal codec (4k+1 frames): a tile is a number of whole strides and the frame before
them, 16+1 frames. All but the first throw away what comes out for that one frame, which the codec
took for the start of a clip: it stands in for the past that the tile does not see, and the result
is near the whole clip's, not equal to it. This is how HunyuanVideo is tiled where it was published
(arXiv 2412.03603). A codec of 4k frames needs no such frame.

Published loops cut off the last tile where the clip ends; here it is moved back until it fits, so
that every call has the same shape and no tile lies within another.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from models.record import Record

# B sample, C channel, T frame, H, W rows and columns of pixels or of the latent grid.
# A unit is one stride: one latent element, `stride` pixels or frames.

Three = tuple[int, int, int]


class Tiling(Record):
    """Tiles of a codec's `encode` and `decode`; clips that fit into one tile go through whole."""

    frames: int | None = Field(ge=1)
    """Frames of a tile, whole temporal strides; None never cuts time."""
    pixels: int = Field(ge=1)
    """Height and width of a tile."""
    overlap: float = Field(default=0.25, gt=0, le=0.5)
    """Share of a tile that it has in common with the next one, along each axis that is cut."""

    def check(self, name: str, stride: Three) -> None:
        """Raise ValueError if tile or overlap is not a whole number of the codec's strides."""
        down_t, *down_space = stride
        sides = [("pixels", self.pixels, down, "px") for down in sorted(set(down_space))]
        if self.frames is not None:
            sides.append(("frames", self.frames, down_t, "frames"))
        for field, size, down, unit in sides:
            if size % down:
                nearest = max(1, round(size / down)) * down
                raise ValueError(
                    f"{name}: tiling.{field} {size} does not fit; the rule is a multiple of the "
                    f"stride of {down} {unit}, and the nearest is {nearest}"
                )
            units = size // down
            shared = units * self.overlap
            if abs(shared - round(shared)) > 1e-6 or not round(shared):
                raise ValueError(
                    f"{name}: tiling.overlap {self.overlap} does not fit; of a tile of {size} "
                    f"{unit} it is {shared:.4g} strides of {down} {unit}, which must be a whole "
                    f"number from 1 up{_nearest_overlap(units, shared)}"
                )

    def units(self, stride: Three) -> tuple[int | None, int, int]:
        """A tile along T, H, W in whole strides; None where it is never cut."""
        frames = None if self.frames is None else self.frames // stride[0]
        return frames, self.pixels // stride[1], self.pixels // stride[2]


def _nearest_overlap(units: int, shared: float) -> str:
    if units < 2:
        return "; a tile of one stride cannot overlap: make the tile larger, or cut no time (None)"
    return f"; the nearest is {min(max(1, round(shared)), units // 2) / units:.6g}"


class Span(NamedTuple):
    """One tile along one axis."""

    read: slice
    write: slice
    skip: int
    """Elements at the start of the result that are not written."""
    weight: Tensor
    """Its share in each element that it writes."""


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """The first unit of each tile; the last tile ends where the axis does."""
    if length <= tile:
        return [0]
    step = tile - overlap
    return [*range(0, length - tile, step), length - tile]


def tile_weights(starts: list[int], tile: int, overlap: int, scale: int) -> Iterator[Tensor]:
    """The weight of each tile at its own elements, `scale` a unit; at any element they sum to 1.

    A tile rises linearly over its first `overlap` units, and what it takes is taken off every
    earlier one: also right where the last tile, moved back, lies over two.
    """
    for index, start in enumerate(starts):
        at = torch.arange(start * scale, (start + tile) * scale)
        weight = _rise(at, starts, index, overlap, scale)
        for later in range(index + 1, len(starts)):
            weight = weight * (1 - _rise(at, starts, later, overlap, scale))
        yield weight


def _rise(at: Tensor, starts: list[int], index: int, overlap: int, scale: int) -> Tensor:
    if index == 0:
        return torch.ones(len(at))
    into = at - starts[index] * scale + 0.5
    # By a tensor: a GPU multiplies by the inverse of a plain number, which rounds otherwise.
    return (into / into.new_full((), overlap * scale)).clamp(0, 1)


def spans(
    length: int, tile: int | None, overlap: float, lead: int, scales: tuple[int, int]
) -> list[Span]:
    """The tiles along an axis of `lead` elements and `length` units.

    `scales` are elements a unit in what is read and in what is written.
    """
    reads, writes = scales
    if tile is None or length <= tile:
        ends = lead + length * reads, lead + length * writes
        return [Span(slice(0, ends[0]), slice(0, ends[1]), 0, torch.ones(ends[1]))]
    shared = round(tile * overlap)
    starts = tile_starts(length, tile, shared)
    found = []
    for start, weight in zip(starts, tile_weights(starts, tile, shared, writes), strict=True):
        end, is_first = start + tile, start == 0
        found.append(
            Span(
                read=slice(start * reads, lead + end * reads),
                write=slice(0 if is_first else lead + start * writes, lead + end * writes),
                skip=0 if is_first else lead,
                weight=torch.cat([torch.ones(lead), weight]) if is_first else weight,
            )
        )
    return found


def encode_tiled(
    encode: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiling: Tiling, stride: Three, lead: int
) -> Tensor:
    """Latents, or moments, of clips: `encode` on each tile, blended on the latent grid."""
    frames, height, width = x_BCTHW.shape[2:]
    lengths = ((frames - lead) // stride[0], height // stride[1], width // stride[2])
    with x_BCTHW.device:  # weights made on the host would have to wait for what the device does
        axes = _axes(lengths, tiling, stride, lead, writes=(1, 1, 1))
    return _tiled(encode, x_BCTHW, axes)


def decode_tiled(
    decode: Callable[[Tensor], Tensor], z_BCTHW: Tensor, tiling: Tiling, stride: Three, lead: int
) -> Tensor:
    """Clips of latents: `decode` on each tile, blended in pixels."""
    frames, height, width = z_BCTHW.shape[2:]
    lengths = (frames - lead, height, width)
    with z_BCTHW.device:
        axes = _axes(lengths, tiling, stride, lead, writes=stride)
    return _tiled(decode, z_BCTHW, axes)


def _axes(
    lengths: Three, tiling: Tiling, stride: Three, lead: int, writes: Three
) -> list[list[Span]]:
    # What is written a unit at a time is read a stride at a time, and the other way round.
    reads = [down // scale for down, scale in zip(stride, writes, strict=True)]
    tiles = tiling.units(stride)
    leads = (lead, 0, 0)
    return [
        spans(lengths[i], tiles[i], tiling.overlap, leads[i], (reads[i], writes[i]))
        for i in range(3)
    ]


def _tiled(
    function: Callable[[Tensor], Tensor], whole_BCTHW: Tensor, axes: list[list[Span]]
) -> Tensor:
    if all(len(axis) == 1 for axis in axes):
        return function(whole_BCTHW)
    batch = len(whole_BCTHW)
    shape = [axis[-1].write.stop for axis in axes]
    sum_BCTHW = dtype = None
    for sample, (t, h, w) in product(range(batch), product(*axes)):
        part_CTHW = function(whole_BCTHW[sample : sample + 1, :, t.read, h.read, w.read])[0]
        if sum_BCTHW is None:
            dtype = part_CTHW.dtype
            sum_BCTHW = part_CTHW.new_zeros(batch, len(part_CTHW), *shape, dtype=torch.float32)
        weight_THW = t.weight[:, None, None] * h.weight[:, None] * w.weight
        share_CTHW = part_CTHW[:, t.skip :] * weight_THW
        sum_BCTHW[sample, :, t.write, h.write, w.write] += share_CTHW
        # Gone before the next tile is computed, not after.
        del part_CTHW, share_CTHW
    assert sum_BCTHW is not None, f"no tile in a batch of shape {tuple(whole_BCTHW.shape)}"
    return sum_BCTHW.to(dtype)
