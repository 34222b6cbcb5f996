"""Turns a stretch of a video file into a clip of fixed size, by presentation time."""

# C channel, T frame, H, W pixels

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import av.container
import av.error
import av.stream
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from elastic.data.places import is_url, open_read
from elastic.data.seek import packets_before
from elastic.data.segment import WHOLE, Segment

DECODE_VERSION = 2  # grows when the same file would give other pixels; part of the fingerprint

MAX_FRAMES = 200_000
MAX_PIXELS = 8192 * 4608
MAX_STRETCH = 8  # of a pixel; an anamorphic film has 2
MAX_SECONDS = 4 * 3600.0
DEADLINE_S = 120.0  # of the processor, for one clip; one that takes longer is broken or hostile

# What libav may take a file for. Playlists and scripts are not among them: they open other files,
# and other machines.
_FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v"),
    *("flv", "live_flv", "asf", "ogg", "mxf", "ivf", "obu", "nut", "dv", "gxf", "rm", "h264"),
    *("hevc", "vvc", "av1", "mjpeg", "y4m", "yuv4mpegpipe", "gif", "apng", "swf", "wav", "mp3"),
    *("flac", "aac", "image2", "image2pipe", "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe"),
    *("tiff_pipe", "jpegxl_pipe", "ppm_pipe", "pgm_pipe", "gif_pipe", "webp"),
)
_OPTIONS = {
    "format_whitelist": ",".join(_FORMATS),
    "protocol_whitelist": "file",
    "pattern_type": "none",  # a picture's name with a percent sign is no series of pictures
    "max_pixels": str(MAX_PIXELS),  # before any memory is taken for them
}
_NOT_FILES = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
              stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}  # fmt: skip

# H.273: transfer curves that need tone mapping, which is another task than decoding.
_HDR = {16: "PQ", 18: "HLG"}
_BT709, _BT601 = 1, 5
_MATRICES = (1, 4, 5, 6, 7, 9)  # the colour matrices that swscale knows by their H.273 number


class BadVideo(Exception):
    """A file that cannot give the clip; `reason` says why, in words for the quarantine list."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unreachable(OSError):
    """A file that cannot be read just now; that says nothing about the file, and may pass."""


@contextmanager
def open_video(path: str) -> Iterator[tuple[av.container.InputContainer, VideoStream]]:
    """The container and its first video stream that is no cover picture, decoding on one thread.

    BadVideo for a file that is broken, or gone from its folder; Unreachable where the disk, its
    permissions or this process are at fault.
    """
    try:
        with (
            _source(path) as source,
            av.open(source, "r", options=dict(_OPTIONS), metadata_errors="ignore") as container,
        ):
            stream = _film(container)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            # One thread costs the least CPU per frame; many clips at once fill the cores.
            stream.codec_context.thread_count = 1
            stream.thread_type = "NONE"
            yield container, stream
    except FileNotFoundError as error:
        _require_reachable(path)
        raise BadVideo("the file does not exist") from error
    except av.error.EOFError as error:
        raise BadVideo("empty or cut off: no frame could be read") from error
    except av.error.FFmpegError as error:
        _require_reachable(path)
        raise BadVideo(f"cannot be read: {error.strerror}") from error


@contextmanager
def _source(path: str) -> Iterator[str | BinaryIO]:
    """What libav opens: a path by itself, and a URL by fsspec, which libav's own are not."""
    if not is_url(path):
        _require_file(path)
        yield path
        return
    try:
        with open_read(path) as file:
            yield file
    except FileNotFoundError as error:
        raise BadVideo("the file does not exist") from error
    except av.error.FFmpegError:
        raise
    except OSError as error:
        raise Unreachable(f"{path}: {error}") from error


def _require_file(path: str) -> None:
    """BadVideo for what is no file: a pipe would be waited for, and a device never ends."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadVideo("a link that leads back to itself") from error
        return  # libav finds the same, and what it means is decided then
    if not stat.S_ISREG(mode):
        raise BadVideo(f"{_NOT_FILES[stat.S_IFMT(mode)]}, not a file")


def _film(container: av.container.InputContainer) -> VideoStream:
    """The first video stream that is no cover picture, and whose frames are not too large."""
    streams = container.streams.video
    if not streams:
        raise BadVideo("no video stream")
    cover = av.stream.Disposition.attached_pic
    films = [stream for stream in streams if not stream.disposition & cover]
    if not films:
        raise BadVideo("no video stream but a cover picture")
    stream = films[0]
    if stream.codec_context is None:
        raise BadVideo("no decoder for its codec")
    _require_size(stream.codec_context.width, stream.codec_context.height)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / MAX_STRETCH <= aspect <= MAX_STRETCH:
        raise BadVideo(f"pixels {float(aspect):.4g} times as wide as high")
    return stream


def _require_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadVideo(f"{width}x{height} is more than {MAX_PIXELS:,} pixels")


def _require_reachable(path: str) -> None:
    """Unreachable unless the file can be read; BadVideo if it has been deleted.

    Where a mount is gone its files are not deleted, and must not count as such.
    """
    if is_url(path):
        return  # what went wrong there was raised as it is
    try:
        with open(path, "rb") as file:
            file.read(1)
    except IsADirectoryError:
        return
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not is_mount_gone(path):
            raise BadVideo("the file does not exist") from error
        raise Unreachable(f"{path}: {error.strerror}; is its folder still mounted?") from error


def is_mount_gone(path: str) -> bool:
    """Whether the folder of a file that is not there is gone or empty: so says a lost mount."""
    return not is_url(path) and not _has_files(os.path.dirname(os.path.realpath(path)))


def _has_files(folder: str) -> bool:
    try:
        with os.scandir(folder or ".") as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def frame_time(frame: av.VideoFrame) -> Fraction:
    """When it is shown, in seconds; BadVideo if that is unknown or the frame is not usable."""
    if frame.pts is None or frame.time_base is None:
        raise BadVideo("a frame has no presentation time")
    _require_size(frame.width, frame.height)
    if int(frame.color_trc) in _HDR:
        raise BadVideo(f"high dynamic range ({_HDR[int(frame.color_trc)]}): needs tone mapping")
    if frame.interlaced_frame:
        raise BadVideo("interlaced: its frames show two moments each, line by line")
    if frame.rotation % 90:
        raise BadVideo(f"turned by {frame.rotation} degrees; only quarter turns are known")
    return frame.pts * frame.time_base


def decode_clip(
    path: str,
    frames: int,
    rate: Fraction | float,
    height: int,
    width: int,
    segment: Segment = WHOLE,
) -> Tensor:
    """The first `frames` pictures at `rate` a second, uint8 C,T,H,W; BadVideo if it has fewer.

    Picture k is the last frame that is on screen at k / rate seconds after the first frame,
    turned as the file asks, resized to cover height x width, and cropped at the centre.
    Of a segment, k / rate seconds after its start: a frame of before it, or of its end and after,
    is no part of it.
    """
    if segment.start_us:
        with suppress(_Missed):
            return _decoded(path, _Times(frames, Fraction(rate), segment, True), height, width)
    return _decoded(path, _Times(frames, Fraction(rate), segment, False), height, width)


class _Missed(Exception):
    """The frames that are wanted cannot be come by without those before them."""


class _Times(NamedTuple):
    """Which moments of a file are wanted, and whether what is before them may be left out."""

    frames: int
    rate: Fraction
    segment: Segment
    seeks: bool


def _decoded(path: str, times: _Times, height: int, width: int) -> Tensor:
    converter = VideoReformatter()
    pictures: list[Tensor] = []
    with open_video(path) as (container, stream):
        aspect = stream.sample_aspect_ratio or Fraction(1)
        last: tuple[av.VideoFrame, Tensor] | None = None
        for frame in _at_times(container, stream, times):
            # A slow video shows one frame at several times; it is converted once.
            if last is None or last[0] is not frame:
                pixels_HWC = _rgb(frame, converter)
                last = frame, _cover(pixels_HWC, aspect, frame.rotation, height, width)
            pictures.append(last[1])
    return torch.stack(pictures, dim=1)


def to_unit(x_uint8: Tensor) -> Tensor:
    """Pixel values 0 to 255 as float32 from -1 to 1: the same to the bit on every device."""
    x = x_uint8.to(torch.float32)
    # By a tensor: a GPU multiplies by the inverse of a plain number, which rounds otherwise.
    return x.div_(x.new_full((), 127.5)).sub_(1.0)


def _at_times(
    container: av.container.InputContainer, stream: VideoStream, times: _Times
) -> Iterator[av.VideoFrame]:
    """The frame on screen at k / rate seconds after the start, for each k below `frames`."""
    frames, rate, segment, _ = times
    length = segment.length
    given = 0
    shown: av.VideoFrame | None = None
    until = Fraction(0)
    for at, frame in _since_start(container, stream, times):
        if length is not None and at >= length:
            until = length
            break
        while shown is not None and given < frames and given / rate < at:
            yield shown
            given += 1
        shown = frame
        until = at + last_frame_length(frame.duration, frame.time_base, stream)
        until = until if length is None else min(until, length)
        if given == frames - 1 and given / rate <= at:
            break
    while shown is not None and given < frames and given / rate < until:
        yield shown
        given += 1
    if shown is None and not segment.is_whole:
        raise BadVideo(f"has no frame{segment}")
    if given < frames:
        raise BadVideo(
            f"too short{segment}: {float(until):.2f} s, {frames} frames at {rate} a second "
            f"need more than {float((frames - 1) / rate):.2f} s"
        )


def _since_start(
    container: av.container.InputContainer, stream: VideoStream, times: _Times
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """The frames of a segment and whatever follows it, and when after its start each is shown."""
    deadline = time.thread_time() + DEADLINE_S
    origin: Fraction | None = None
    for seen, frame in enumerate(_all_frames(container, stream, times)):
        at = frame_time(frame)
        if seen >= MAX_FRAMES:
            raise BadVideo(f"more than {MAX_FRAMES:,} frames before the clip was full")
        if time.thread_time() > deadline:
            raise BadVideo(f"took more than {DEADLINE_S:.0f} s to decode")
        origin = at + times.segment.start if origin is None else origin
        if at >= origin or not times.segment.start_us:
            yield at - origin, frame


def _all_frames(
    container: av.container.InputContainer, stream: VideoStream, times: _Times
) -> Iterator[av.VideoFrame]:
    """The first frame of a file, and the others; where it seeks, those of before may be missing.

    Raises _Missed if what it seeks is not found.
    """
    frames = container.decode(stream)
    if not times.seeks:
        yield from frames
        return
    first = next(frames, None)
    if first is None:
        return
    yield first
    start = frame_time(first) + times.segment.start
    packets = packets_before(container, stream, start)
    if packets is None:
        raise _Missed
    is_there = False
    for frame in (frame for packet in packets for frame in packet.decode()):
        # A film that is refreshed bit by bit is shown only when all of it has been.
        if not is_there and frame_time(frame) > start:
            raise _Missed
        is_there = True
        yield frame
    if not is_there:
        raise _Missed


def last_frame_length(
    duration: int | None, time_base: Fraction | None, stream: VideoStream
) -> Fraction:
    """Seconds that a frame stays on screen when none follows."""
    if duration and time_base:
        return duration * time_base
    return 1 / stream.average_rate if stream.average_rate else Fraction(1, 1000)


def _rgb(frame: av.VideoFrame, converter: VideoReformatter) -> NDArray[np.uint8]:
    """RGB pixels H,W,C as stored, not turned."""
    matrix = int(frame.colorspace)
    if matrix not in _MATRICES:
        # Unmarked files: what players do. swscale alone would take BT.601 for all.
        matrix = _BT709 if frame.height >= 720 else _BT601
    # One converter for the clip, one thread: a new one for each frame costs a millisecond.
    rgb = converter.reformat(frame, format="rgb24", src_colorspace=matrix, threads=1)
    return rgb.to_ndarray()  # type: ignore[return-value]  # rgb24 is uint8


def _cover(
    pixels_HWC: NDArray[np.uint8], aspect: Fraction, rotation: int, height: int, width: int
) -> Tensor:
    """Turned, resized until it covers the target, cropped at the centre: uint8 C,H,W."""
    tall, wide = pixels_HWC.shape[0], pixels_HWC.shape[1] * aspect
    turns = rotation // 90 % 4
    x_HWC = torch.from_numpy(np.ascontiguousarray(np.rot90(pixels_HWC, turns)))
    shown_h, shown_w = (wide, tall) if turns % 2 else (tall, wide)
    scale = max(height / Fraction(shown_h), width / Fraction(shown_w))
    size = max(height, round(shown_h * scale)), max(width, round(shown_w * scale))
    x_1CHW = rearrange(x_HWC, "h w c -> 1 c h w")
    if size != tuple(x_1CHW.shape[2:]):
        x_1CHW = interpolate(x_1CHW, size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x_1CHW[0, :, top : top + height, left : left + width].contiguous()
