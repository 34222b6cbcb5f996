"""The frames of a film from some moment on, without decoding what comes long before it."""

import itertools
from collections.abc import Iterator
from fractions import Fraction

import av
import av.container
import av.error
from av.packet import Packet
from av.video.stream import VideoStream

# Their indices say which frames stand alone. Of others it is not known, or must be guessed: they
# are decoded from the beginning.
_SEEKS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Seconds. An index may be in the order of decoding: a frame found in it is shown some time later.
_BACK = (0, 2, 20)


def packets_before(
    container: av.container.InputContainer, stream: VideoStream, moment: Fraction
) -> "Iterator[Packet[VideoStream]] | None":
    """The packets from one on that is shown by then and needs none before it; None: not found.

    Frames that come out of them and are shown before that one may be damaged: they lean on what
    was left out.
    """
    if container.format.name not in _SEEKS or stream.time_base is None:
        return None
    for back in _BACK:
        try:
            container.seek(int((moment - back) / stream.time_base), stream=stream)
            packets = container.demux(stream)
            first = next(packets, None)
        except av.error.FFmpegError:
            return None
        if first is None or first.pts is None or not first.is_keyframe:
            continue
        if first.pts * stream.time_base <= moment:
            return itertools.chain([first], packets)
    return None
