"""Which clips have a bucket's shape: large enough where it cuts them, and nearest to it."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from elastic.data.probes import Probed
from stages.schedule import Bucket
from stages.stage import Match, Stage

# What a bucket shows of a clip must have this share of the bucket's pixels, or it would be blown
# up. Open-Sora asks it of the whole clip, which is the same for a clip of the bucket's own shape:
# no side is enlarged by more than 1.118, the root of 1 / 0.8. Of another shape, what is cut off
# makes nothing sharper.
_SMALLEST_SHARE = 0.8
_SAME_SHAPE = 0.02  # of height over width: what sizes in whole strides differ by, as in align.py
_SAME_AREA = 2.0  # further apart two buckets are two resolutions, and a clip may have both


def is_large(bucket: Bucket, probed: Probed, match: Match) -> NDArray[np.bool_]:
    """Which clips a bucket would not blow up; by their whole area alone where any may match."""
    pixels = _SMALLEST_SHARE * bucket.width * bucket.height
    if match == "any":
        return probed.pixels() >= pixels
    high, wide = probed.shown()
    scale = np.minimum(high / bucket.height, wide / bucket.width)
    # Pixels that are not square are counted as they are stored.
    stretch = np.maximum(high * wide, 1) / np.maximum(probed.pixels(), 1)
    return scale**2 >= _SMALLEST_SHARE * stretch


def nearest(
    stage: Stage, large: Mapping[str, NDArray[np.bool_]], probed: Probed
) -> dict[str, NDArray[np.bool_]]:
    """Of the clips that are `large` enough for a bucket, by its name, those it is nearest to.

    Compared by the logarithm of height over width, as twice as high and twice as wide are equally
    far from a square; a clip that is as near to several buckets is in all of them.
    """
    if stage.match == "any":
        return dict(large)
    high, wide = probed.shown()
    shape = np.log(np.maximum(high, 1) / np.maximum(wide, 1))
    away = {b.name: np.abs(shape - math.log(b.height / b.width)) for b in stage.buckets}
    found = {}
    for bucket in stage.buckets:
        is_nearest = large[bucket.name].copy()
        for rival in _rivals(stage, bucket):
            is_nearer = away[rival] < away[bucket.name] - _SAME_SHAPE
            is_nearest &= ~(large[rival] & is_nearer)
        found[bucket.name] = is_nearest
    return found


def has_rivals(stage: Stage, bucket: Bucket) -> bool:
    """Whether clips that a bucket could have may be another's."""
    return stage.match == "aspect" and bool(_rivals(stage, bucket))


def _rivals(stage: Stage, bucket: Bucket) -> list[str]:
    """The buckets that may have a clip instead: as long, of like area, and there whenever it is.

    A phase that has only one of two shapes trains it on the clips of both.
    """
    phases = [{b.name for b in phase.buckets} for phase in stage.schedule]
    always = set.intersection(*(names for names in phases if bucket.name in names))
    area = bucket.height * bucket.width
    return [
        other.name
        for other in stage.buckets
        if other.name in always
        and other.name != bucket.name
        and other.frames == bucket.frames
        and 1 / _SAME_AREA < other.height * other.width / area < _SAME_AREA
    ]
