"""A corpus of odd video files: each either shows the pattern below or says why it is not used."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from elastic.data.moving_shapes import tone_mp4, turn_mp4

FRAMES, RATE, HEIGHT, WIDTH = 8, 8, 64, 96
_PRESETS = {
    "libx264": {"preset": "ultrafast", "crf": "8"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:crf=8"},
    "libvpx-vp9": {"crf": "10", "b": "0", "cpu-used": "8", "deadline": "realtime"},
    "libsvtav1": {"crf": "10", "preset": "12", "svtav1-params": "lp=1"},
    "mjpeg": {"qmin": "2", "qmax": "2"},
    "mpeg2video": {"qmin": "2", "qmax": "2"},
    "mpeg4": {"qmin": "2", "qmax": "2"},
}
COLOURS = np.array([[210, 40, 40], [40, 180, 60], [50, 70, 220], [220, 220, 210]])


class Odd(NamedTuple):
    """One kind of file: what is wrong with it, or how far its colours may be off."""

    name: str
    make: Callable[[Path], None]
    reason: str = ""  # a pattern that the reason for its quarantine matches; empty for a good file
    off: float = 10.0  # of 255
    frames: int = FRAMES


def pattern(height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES) -> NDArray[np.uint8]:
    """Four coloured quarters that grow brighter from frame to frame, T,H,W,3."""
    x_THWC = np.empty((frames, height, width, 3), np.uint8)
    for at in range(frames):
        x_THWC[at] = _quarters(at, height, width)
    return x_THWC


def _quarters(at: int, height: int, width: int) -> NDArray[np.uint8]:
    colours = (COLOURS * (at + 9) / (FRAMES + 9)).astype(np.uint8)
    x_HWC = np.empty((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    x_HWC[:top, :left], x_HWC[:top, left:] = colours[0], colours[1]
    x_HWC[top:, :left], x_HWC[top:, left:] = colours[2], colours[3]
    return x_HWC


def quarter_colours(x_CTHW: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean colour of the middle of each quarter of each frame: T, 4, 3."""
    _, _, height, width = x_CTHW.shape
    h, w = height // 4, width // 4
    places = [(h, w), (h, width - w), (height - h, w), (height - h, width - w)]
    found = [
        x_CTHW[:, :, y - h // 2 : y + h // 2, x - w // 2 : x + w // 2].mean((2, 3))
        for y, x in places
    ]
    return np.stack(found).transpose(2, 0, 1)


def wanted_colours(frames: int) -> NDArray[np.float64]:
    """What `quarter_colours` gives for the pattern itself."""
    x_CTHW = pattern(frames=frames).transpose(3, 0, 1, 2)
    return quarter_colours(x_CTHW)


def video(
    codec: str,
    form: str,
    pix_fmt: str = "yuv420p",
    x_THWC: NDArray[np.uint8] | None = None,
    ticks: list[int] | None = None,
    tick: Fraction = Fraction(1, RATE),
    **more: object,
) -> bytes:
    """The pattern, or other frames, by some codec in some container; `more` is set on the codec."""
    x_THWC = pattern() if x_THWC is None else x_THWC
    ticks = ticks or list(range(len(x_THWC)))
    buffer = io.BytesIO()
    options = {**_PRESETS.get(codec, {}), **more.pop("options", {})}  # type: ignore[dict-item]
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = x_THWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.thread_count = 1
        context.time_base = tick
        for name, value in more.items():
            setattr(context, name, value)
        for pixels_HWC, shown in zip(x_THWC, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels_HWC, "rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = shown, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def still(codec: str, pix_fmt: str, x_HWC: NDArray[np.uint8] | None = None) -> bytes:
    """The first frame of the pattern, or another one, as a picture."""
    context = av.CodecContext.create(codec, "w")
    frame = av.VideoFrame.from_ndarray(pattern()[0] if x_HWC is None else x_HWC, "rgb24")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt = frame.width, frame.height, pix_fmt
    context.time_base = Fraction(1, RATE)
    context.options = {**_PRESETS.get(codec, {}), "lossless": "1"} if codec == "libwebp" else {}
    packets = [*context.encode(frame.reformat(format=pix_fmt)), *context.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def _file(content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: _write(path, content())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _h264() -> bytes:
    return video("libx264", "mp4")


def _cut(share: float, whole: Callable[[], bytes] = _h264) -> Callable[[Path], None]:
    return _file(lambda: (lambda content: content[: int(len(content) * share)])(whole()))


def _vfr() -> bytes:
    """The pattern's frames at uneven times, which all have passed by the time they are wanted."""
    return video("libx264", "matroska", ticks=[0, 110, 250, 300, 500, 625, 740, 875],
                 tick=Fraction(1, 1000))  # fmt: skip


def _late_start() -> bytes:
    return video("libx264", "mpegts", ticks=[800 + k for k in range(FRAMES)])


def _two_sizes() -> bytes:
    """Frames that are twice as large from the middle on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("mjpeg", rate=RATE)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for at in range(FRAMES):
            size = 1 if at < FRAMES // 2 else 2
            picture = still("mjpeg", "yuvj420p", pattern(size * HEIGHT, size * WIDTH)[at])
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts = stream, at, at
            packet.time_base, packet.is_keyframe = Fraction(1, RATE), True
            out.mux(packet)
    return buffer.getvalue()


def _twice_turned() -> bytes:
    return turn_mp4(video("libx264", "mp4", x_THWC=np.rot90(pattern(), 1, (1, 2)).copy()))


def _with_cover(only: bool) -> bytes:
    """Music with a cover picture; or a film with one, which comes first."""
    buffer = io.BytesIO()
    cover = still("mjpeg", "yuvj420p", np.full((32, 32, 3), 90, np.uint8))
    whole = io.BytesIO(tone_mp4(1.0) if only else _h264())
    with av.open(whole) as source, av.open(buffer, "w", format="mp4") as out:
        picture = out.add_stream("mjpeg", rate=1)
        assert isinstance(picture, av.VideoStream)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        given = (source.streams.audio if only else source.streams.video)[0]
        copied = out.add_stream_from_template(given)
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.time_base = picture, 0, 0, Fraction(1)
        packet.is_keyframe = True
        out.mux(packet)
        for packet in source.demux(given):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
    return buffer.getvalue()


def _png(width: int, height: int) -> bytes:
    """A picture of one colour whose pixels are not there: only their number is declared."""

    def part(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


def _huge_jpeg() -> bytes:
    content = bytearray(still("mjpeg", "yuvj420p"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(content)


def _playlist(path: Path) -> None:
    (path.parent / "beside.ts").write_bytes(video("libx264", "mpegts"))
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nbeside.ts\n#EXT-X-ENDLIST\n")


def _script(path: Path) -> None:
    (path.parent / "other.mp4").write_bytes(_h264())
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")


def _flipped() -> bytes:
    """One bit of the index: where the chunks lie."""
    content = bytearray(_h264())
    content[content.index(b"stsz") + 2] ^= 0xFF
    return bytes(content)


def _no_times() -> bytes:
    return video("libx264", "h264")


def _bare(name: str, content: Callable[[], bytes], reason: str = "", **more: float) -> Odd:
    return Odd(name, _file(content), reason, **more)  # type: ignore[arg-type]


KINDS = (
    _bare("h264.mp4", _h264),
    _bare("hevc.mp4", lambda: video("libx265", "mp4")),
    _bare("vp9.webm", lambda: video("libvpx-vp9", "webm")),
    _bare("av1.mp4", lambda: video("libsvtav1", "mp4")),
    _bare("mjpeg.avi", lambda: video("mjpeg", "avi", "yuvj420p")),
    _bare("mpeg2.ts", lambda: video("mpeg2video", "mpegts")),
    _bare("mpeg4.avi", lambda: video("mpeg4", "avi")),
    _bare("prores.mov", lambda: video("prores_ks", "mov", "yuv422p10le")),
    _bare("ffv1.mkv", lambda: video("ffv1", "matroska", "yuv444p")),
    _bare("palette.gif", lambda: video("gif", "gif", "rgb8"), off=45),
    _bare("moving.apng", lambda: video("apng", "apng", "rgb24"), off=3),
    _bare("alpha.mov", lambda: video("qtrle", "mov", "argb"), off=3),
    _bare("ten-bit.mkv", lambda: video("libx264", "matroska", "yuv420p10le")),
    _bare("full-range.mp4", lambda: video("libx264", "mp4", "yuvj420p", color_range=2)),
    _bare("4-4-4.mp4", lambda: video("libx264", "mp4", "yuv444p")),
    _bare("b-frames.mp4", lambda: video("libx264", "mp4",
                                        options={"bf": "3", "preset": "medium"})),
    _bare("odd-sides.mkv", lambda: video("ffv1", "matroska", "yuv420p", pattern(65, 97))),
    _bare("wide-pixels.mp4", lambda: video("libx264", "mp4", x_THWC=pattern(64, 48),
                                           sample_aspect_ratio=Fraction(2))),
    _bare("uneven-times.mkv", _vfr),
    _bare("late-start.ts", _late_start),
    _bare("changes-its-size.mkv", _two_sizes),
    _bare("turned.mp4", _twice_turned),
    _bare("one-frame.mp4", lambda: video("libx264", "mp4", x_THWC=pattern()[:1]), frames=1),
    _bare("still.png", lambda: still("png", "rgb24"), frames=1, off=1),
    _bare("still.jpg", lambda: still("mjpeg", "yuvj420p"), frames=1),
    _bare("still.webp", lambda: still("libwebp", "bgra"), frames=1, off=1),
    _bare("still.bmp", lambda: still("bmp", "bgr24"), frames=1, off=1),
    _bare("film-with-cover.mp4", lambda: _with_cover(only=False)),
    _bare("matroska-called.mp4", lambda: video("libx264", "matroska")),
    _bare("no-suffix", _h264),
    _bare("Füße 影片 🎬.mp4", _h264),
    _bare("-i ; $(reboot) `id` 'x' \"y\" *?.mp4", _h264),
    _bare("two\nlines.mp4", _h264),
    _bare("numbered-%03d.png", lambda: still("png", "rgb24"), frames=1, off=1),
    _bare("concat:a|b.mp4", _h264),
    # And those that are not used.
    _bare("empty.mp4", lambda: b"", "empty|cannot be read"),
    _bare("noise.mp4", lambda: np.random.default_rng(0).bytes(5000), "cannot be read"),
    _bare("text.mp4", lambda: b"not a video, though it is called one\n" * 9, "cannot be read"),
    Odd("cut-tenth.mp4", _cut(0.1), "cannot be read"),
    Odd("cut-half.mp4", _cut(0.5), "cannot be read"),
    Odd("cut-end.mp4", _cut(0.95), "cannot be read|cut off"),
    Odd("cut.mkv", _cut(0.5, lambda: video("ffv1", "matroska", "yuv444p")),
        "too short|cannot be read|cut off|damaged"),
    Odd("cut.ts", _cut(0.5, lambda: video("mpeg2video", "mpegts")),
        "too short|cannot be read|cut off|damaged"),
    _bare("damaged-index.mp4", _flipped, "cannot be read|no frame could|too short"),
    _bare("sound.mp4", lambda: tone_mp4(1.0), "no video stream"),
    _bare("sound-with-cover.m4a", lambda: _with_cover(only=True), "cover"),
    _bare("no-times.h264", _no_times, "no presentation time|no frame"),
    _bare("interlaced.ts", lambda: video("mpeg2video", "mpegts",
                                         options={"flags": "+ildct+ilme"}), "interlaced"),
    _bare("pq.mp4", lambda: video("libx265", "mp4", "yuv420p10le", color_trc=16,
                                  options={"x265-params": "log-level=none:pools=1:transfer=16"}),
          "PQ"),
    _bare("hlg.mp4", lambda: video("libx265", "mp4", "yuv420p10le", color_trc=18,
                                   options={"x265-params": "log-level=none:pools=1:transfer=18"}),
          "HLG"),
    _bare("stretched.mp4", lambda: video("libx264", "mp4", sample_aspect_ratio=Fraction(1, 20)),
          "times as wide as high"),
    _bare("huge.png", lambda: _png(60_000, 60_000), "pixels|cannot be read"),
    _bare("bomb.png", lambda: _png(16_000, 9_000), "pixels|cannot be read"),
    _bare("huge.jpg", _huge_jpeg, "pixels|cannot be read"),
    Odd("playlist.mp4", _playlist, "cannot be read|not a kind"),
    Odd("script.mp4", _script, "cannot be read|not a kind"),
    Odd("folder.mp4", Path.mkdir, "folder"),
    Odd("pipe.mp4", os.mkfifo, "named pipe"),
    Odd("endless.mp4", lambda path: path.symlink_to("/dev/zero"), "device"),
    Odd("dangling.mp4", lambda path: path.symlink_to("nowhere"), "does not exist"),
    Odd("round.mp4", lambda path: path.symlink_to(path.name), "leads back to itself"),
)  # fmt: skip
