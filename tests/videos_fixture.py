"""Makes tiny mp4 files for tests: plain ones from moving_shapes, and odd ones."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from elastic.data.moving_shapes import encode_mp4


def level_video(path: Path, levels: list[int], ticks: list[int], tick: Fraction) -> None:
    """A 32x48 video whose frame k is plain grey levels[k], shown at ticks[k] * tick seconds."""
    frames_THWC = np.empty((len(levels), 32, 48, 3), np.uint8)
    frames_THWC[:] = np.asarray(levels, np.uint8)[:, None, None, None]
    path.write_bytes(encode_mp4(frames_THWC, tuple(ticks), tick))


def still_video(path: Path, picture_HWC: np.ndarray, num_frames: int = 24, rate: int = 8) -> None:
    """A video that shows one picture."""
    frames_THWC = np.repeat(picture_HWC[None], num_frames, axis=0)
    path.write_bytes(encode_mp4(frames_THWC, tuple(range(num_frames)), Fraction(1, rate)))


def tagged_video(path: Path, pix_fmt: str, color_trc: int) -> None:
    """Three grey frames in a pixel format, with a transfer curve by its H.273 number."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        stream.codec_context.color_trc = color_trc
        stream.codec_context.thread_count = 1
        for k in range(3):
            grey = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 128, np.uint8), "rgb24")
            frame = grey.reformat(format=pix_fmt)
            frame.color_trc = color_trc
            frame.pts, frame.time_base = k, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(buffer.getvalue())
