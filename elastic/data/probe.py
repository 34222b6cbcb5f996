"""Finds out what a file really holds before any of it is used."""

import time
from fractions import Fraction
from typing import NamedTuple

import av

from elastic.data.decode import (
    DEADLINE_S,
    MAX_FRAMES,
    MAX_SECONDS,
    BadVideo,
    frame_time,
    last_frame_length,
    open_video,
)


class Probe(NamedTuple):
    """What was counted in a file; width and height are those on screen, after turning.

    Counted in pixels, which are shown `stretch` times as wide as high.
    """

    frames: int
    rate: Fraction
    width: int
    height: int
    rotation: int
    duration_s: float
    stretch: Fraction = Fraction(1)


def probe(path: str) -> Probe:
    """Decode the first frame and count the packets of the rest; BadVideo if it cannot be used."""
    deadline = time.thread_time() + DEADLINE_S
    first: av.VideoFrame | None = None
    times: list[Fraction] = []
    end = Fraction(0)
    with open_video(path) as (container, stream):
        aspect = stream.sample_aspect_ratio or Fraction(1)
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.pts is None or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise BadVideo(f"damaged after {len(times)} frames")
            times.append(packet.pts * packet.time_base)
            length = last_frame_length(packet.duration, packet.time_base, stream)
            end = max(end, times[-1] + length)
            if len(times) > MAX_FRAMES:
                raise BadVideo(f"more than {MAX_FRAMES:,} frames")
            if time.thread_time() > deadline:
                raise BadVideo(f"took more than {DEADLINE_S:.0f} s to read through")
    if first is None or not times:
        raise BadVideo("no frame could be decoded")
    frame_time(first)  # BadVideo for what decoding would refuse as well
    return _measure(first, sorted(times), end, stream.average_rate, aspect)


def _measure(
    first: av.VideoFrame,
    times: list[Fraction],
    end: Fraction,
    header_rate: Fraction | None,
    stretch: Fraction,
) -> Probe:
    duration = end - times[0]
    if duration > MAX_SECONDS:
        raise BadVideo(f"{float(duration):.0f} s long, more than {MAX_SECONDS:.0f} s")
    span = times[-1] - times[0]
    rate = (len(times) - 1) / span if span else header_rate or Fraction(1)
    width, height = first.width, first.height
    if first.rotation % 180:
        width, height, stretch = height, width, 1 / stretch
    return Probe(len(times), rate, width, height, first.rotation, float(duration), stretch)
