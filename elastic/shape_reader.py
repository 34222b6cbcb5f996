"""Names colour, shape and direction of a moving shape from its pixels; knows nothing of models.

# T frame, H height, W width, C = 3 red green blue
"""

import re
from typing import NamedTuple

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from elastic.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES

_MIN_CONTRAST = 40.0  # of 441, the distance from black to white; below it nothing is seen
_MIN_PIXELS = 6
_STILL = 0.1  # pixels a frame; slower counts as not moving
# How much of its box each shape fills: pi/4, 1, 1/2.
_FILL = {"circle": 0.785, "square": 1.0, "triangle": 0.5}
_CHROMATIC = 0.25  # least saturation of a colour that has a hue

Frames = NDArray[np.uint8]


class Reading(NamedTuple):
    """What the pixels show; a name is None when it cannot be told."""

    colour: str | None
    shape: str | None
    direction: str | None
    contrast: float  # 0..1, of the foreground against the background
    seen: float  # 0..1, the share of frames with a foreground
    colour_margin: float  # 0..1, how much nearer the named colour is than the next
    straightness: float  # 0..1, the share of the centre's movement that a line explains


NOTHING = Reading(None, None, None, 0.0, 0.0, 0.0, 0.0)


class _Centres(NamedTuple):
    """Soft centres of the foreground and the frames in which there is one."""

    y_T: NDArray[np.float64]
    x_T: NDArray[np.float64]
    is_seen_T: NDArray[np.bool_]


def parse_caption(text: str) -> dict[str, str]:
    """The colour, shape and direction words of a caption; a word that is missing has no key."""
    words = re.findall(r"[a-z]+", text.lower())
    palettes = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
    return {
        key: word for key, names in palettes.items() for word in reversed(words) if word in names
    }


def read_shape(frames_THWC: Frames) -> Reading:
    """Read a clip of uint8 T,H,W,3; never fails on pixels, an empty picture reads as None."""
    if frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or 0 in frames_THWC.shape:
        raise ValueError(
            f"frames of shape {frames_THWC.shape}; expected (frames, height, width, 3), none empty"
        )
    pixels_THWC = frames_THWC.astype(np.float64)
    contrast_THW = _contrast(pixels_THWC)
    peak = float(np.quantile(contrast_THW, 0.995))
    if peak < _MIN_CONTRAST:
        return NOTHING._replace(contrast=peak / 441)
    is_inside_THW = contrast_THW > 0.5 * peak
    centres = _centres(is_inside_THW, contrast_THW)
    if not centres.is_seen_T.any():
        return NOTHING._replace(contrast=peak / 441)
    # Well inside the outline: edges are mixed with the background, and video blurs colour most.
    is_core_THW = contrast_THW > 0.85 * peak
    colour, margin = _colour(np.median(pixels_THWC[is_core_THW], axis=0))
    direction, straightness = _direction(centres)
    shape = _shape(is_inside_THW[centres.is_seen_T])
    seen = float(centres.is_seen_T.mean())
    return Reading(colour, shape, direction, peak / 441, seen, margin, straightness)


def _contrast(pixels_THWC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance T,H,W of every pixel from the median colour of its frame's border."""
    top, bottom = pixels_THWC[:, 0], pixels_THWC[:, -1]
    left, right = pixels_THWC[:, :, 0], pixels_THWC[:, :, -1]
    border_TNC = np.concatenate([top, bottom, left, right], axis=1)
    background_TC = np.median(border_TNC, axis=1)
    away_THWC = pixels_THWC - rearrange(background_TC, "t c -> t 1 1 c")
    contrast_THW: NDArray[np.float64] = np.sqrt((away_THWC**2).sum(axis=-1))
    return contrast_THW


def _centres(is_inside_THW: NDArray[np.bool_], contrast_THW: NDArray[np.float64]) -> _Centres:
    weight_THW = np.where(is_inside_THW, contrast_THW, 0.0)
    mass_T = np.maximum(weight_THW.sum(axis=(1, 2)), 1e-9)
    y_H, x_W = (np.arange(size, dtype=np.float64) for size in weight_THW.shape[1:])
    y_T = (weight_THW.sum(axis=2) * y_H).sum(axis=1) / mass_T
    x_T = (weight_THW.sum(axis=1) * x_W).sum(axis=1) / mass_T
    return _Centres(y_T, x_T, is_inside_THW.sum(axis=(1, 2)) >= _MIN_PIXELS)


def _colour(rgb_C: NDArray[np.float64]) -> tuple[str, float]:
    """The palette colour nearest by hue, or by lack of it, and its lead over the next."""
    distance = {name: _colour_distance(rgb_C, np.array(rgb)) for name, rgb in COLOURS.items()}
    first, second = sorted(distance, key=distance.__getitem__)[:2]
    total = distance[first] + distance[second]
    return first, float((distance[second] - distance[first]) / total) if total else 0.0


def _colour_distance(a_C: NDArray[np.float64], b_C: NDArray[np.float64]) -> float:
    """Distance in the plane of hue and saturation; brightness does not count."""
    a, b = _hue_vector(a_C), _hue_vector(b_C)
    return float(np.hypot(*(a - b)))


def _hue_vector(rgb_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """A point on the unit circle for a colour with a hue, the origin for a grey one."""
    red, green, blue = rgb_C / 255
    # The projection of the colour cube along its grey diagonal.
    along, across = red - (green + blue) / 2, (green - blue) * np.sqrt(3) / 2
    length = float(np.hypot(along, across))
    brightest = max(red, green, blue)
    if length == 0 or (brightest - min(red, green, blue)) / brightest < _CHROMATIC:
        return np.zeros(2)
    return np.array([along, across]) / length


def _shape(is_inside_THW: NDArray[np.bool_]) -> str | None:
    """The shape whose outline explains the averaged silhouette best."""
    fills, tapers = [], []
    for is_inside_HW in is_inside_THW:
        rows = np.flatnonzero(is_inside_HW.any(axis=1))
        columns = np.flatnonzero(is_inside_HW.any(axis=0))
        box_HW = is_inside_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        fills.append(float(box_HW.mean()))
        height = len(rows)
        third = max(1, height // 3)
        tapers.append(float(box_HW[-third:].mean() - box_HW[:third].mean()))
    fill, taper = float(np.median(fills)), float(np.median(tapers))
    # A triangle stands on its base: its lowest third is far wider than its highest.
    if taper > 0.3:
        return "triangle"
    if fill > (_FILL["circle"] + _FILL["square"]) / 2:
        return "square"
    return "circle" if fill > (_FILL["circle"] + _FILL["triangle"]) / 2 else None


def _direction(centres: _Centres) -> tuple[str | None, float]:
    """The axis and sign of the regression line through the centres over time."""
    time_T = np.flatnonzero(centres.is_seen_T).astype(np.float64)
    if len(time_T) < 3:
        return None, 0.0
    y_T, x_T = centres.y_T[centres.is_seen_T], centres.x_T[centres.is_seen_T]
    away_T = time_T - time_T.mean()
    speed_y, speed_x = (float((away_T * p_T).sum() / (away_T**2).sum()) for p_T in (y_T, x_T))
    variance = float(y_T.var() + x_T.var())
    explained = (speed_y**2 + speed_x**2) * float(away_T.var())
    straightness = explained / variance if variance > 0 else 0.0
    if max(abs(speed_y), abs(speed_x)) < _STILL:
        return None, straightness
    along = {
        name: step_y * speed_y + step_x * speed_x for name, (step_y, step_x) in DIRECTIONS.items()
    }
    return max(along, key=along.__getitem__), straightness
