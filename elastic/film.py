"""Frames to files and back: H.264 mp4, animated WEBP, and the contact sheet PNG.

# T frame, H height, W width, C = 3 red green blue
"""

import io
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.video.reformatter
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from elastic.files import write_atomic

Frames = NDArray[np.uint8]

_BT601 = av.video.reformatter.Colorspace.ITU601
_SMPTE_170M, _LIMITED = 6, 1  # the numbers of ITU-T H.273 for the matrix of BT.601
_THUMB = 120  # pixels, the least long side of a frame on the sheet
_GAP = 8
_TEXT = 18
_COLUMNS, _MOST_ROWS = 6, 16  # of a sheet

# What a truncated file ends with depends on where it was cut.
_CUT_SHORT = (av.error.InvalidDataError, av.error.EOFError)


class Film(NamedTuple):
    """Decoded frames T,H,W,C in 0..255 and how many of them make a second."""

    frames_THWC: Frames
    rate: float


def write_mp4(path: str | Path, frames_THWC: Frames, rate: float | Fraction) -> None:
    """Publish an H.264 yuv420p mp4 that browsers play; ValueError for odd sizes."""
    _check_frames(frames_THWC)
    height, width = frames_THWC.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"mp4 {str(path)!r}: frames of {height}x{width}; H.264 in yuv420p needs even sides: "
            f"nearest are {height + height % 2}x{width + width % 2}"
        )
    ticks = Fraction(rate).limit_denominator(1001)
    with tempfile.TemporaryDirectory() as folder:
        # In a file: moving the index to the front makes the muxer read back what it wrote.
        aside = Path(folder) / "film.mp4"
        _encode(aside, frames_THWC, ticks)
        write_atomic(Path(path), aside.read_bytes())


def _encode(path: Path, frames_THWC: Frames, rate: Fraction) -> None:
    options = {"movflags": "faststart"}  # plays before the whole file has arrived
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = 1  # small frames: threads cost more than they give
        # Some players show untagged files with BT.709: colours shift visibly.
        context.colorspace, context.color_range = _SMPTE_170M, _LIMITED
        converter = av.video.reformatter.VideoReformatter()
        for pts, pixels_HWC in enumerate(frames_THWC):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
            frame = converter.reformat(rgb, format="yuv420p", dst_colorspace=_BT601)
            frame.pts, frame.time_base = pts, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_mp4(path: str | Path) -> Film:
    """All frames of the first video stream; ValueError names a file that holds none."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{str(path)!r} holds no video stream; name an mp4 with pictures")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except _CUT_SHORT as error:
        raise ValueError(f"{str(path)!r} cannot be decoded as video: {error}") from error
    if not frames:
        raise ValueError(f"{str(path)!r} holds no frame; it was cut short or never written")
    return Film(np.stack(frames), rate)


def first_frame(path: str | Path, longest_side: int = 128) -> bytes:
    """The first frame of a film as a small WEBP; ValueError names a file that holds none."""
    try:
        with av.open(str(path)) as container:
            frames = container.decode(video=0) if container.streams.video else iter(())
            pixels_HWC = next((frame.to_ndarray(format="rgb24") for frame in frames), None)
    except _CUT_SHORT as error:
        raise ValueError(f"{str(path)!r} cannot be decoded as video: {error}") from error
    if pixels_HWC is None:
        raise ValueError(f"{str(path)!r} holds no frame; it was cut short or never written")
    return animated_webp(np.asarray(pixels_HWC, np.uint8)[None], 1.0, longest_side)


def animated_webp(frames_THWC: Frames, rate: float, longest_side: int = 256) -> bytes:
    """A looping WEBP of at most `longest_side` pixels; small frames are not enlarged."""
    _check_frames(frames_THWC)
    height, width = frames_THWC.shape[1:3]
    scale = min(1.0, longest_side / max(height, width))
    size_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [Image.fromarray(pixels_HWC).resize(size_wh) for pixels_HWC in frames_THWC]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=max(1, round(1000 / rate)),
        loop=0,
        quality=85,
    )
    return buffer.getvalue()


class Films:
    """Films in a folder that is not yet that of their end; made by `films_into`."""

    def __init__(self, draft: Path, end: Path, count: int, rate: float) -> None:
        self._draft, self._end, self._rate = draft, end, rate
        self._digits = max(2, len(str(count - 1)))
        self.paths: list[Path] = []  # where they will be
        self._rows: list[tuple[str, Frames]] = []

    def add(self, caption: str, frames_THWC: Frames) -> None:
        """Write the next one; nothing of it stays in memory but what the sheet shows."""
        name = f"{len(self.paths):0{self._digits}d}.mp4"
        write_mp4(self._draft / name, frames_THWC, self._rate)
        self.paths.append(self._end / name)
        if len(self._rows) < _MOST_ROWS:
            self._rows.append((caption, _shown(frames_THWC, _COLUMNS)))

    def sheet(self) -> None:
        """Write the contact sheet, of the first of them."""
        if self._rows:
            contact_sheet(self._draft / "contact-sheet.png", self._rows)


@contextmanager
def films_into(folder: Path, count: int, rate: float) -> Iterator[Films]:
    """So many films that appear in a folder when all are made, the contact sheet last; or none."""
    had_folder, draft = folder.exists(), folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(parents=True)
    films = Films(draft, folder, count, rate)
    try:
        yield films
        films.sheet()
        for path in sorted(draft.iterdir()):
            os.replace(path, folder / path.name)
    except BaseException:
        shutil.rmtree(draft)
        if not had_folder:
            with suppress(OSError):  # something of it has appeared
                folder.rmdir()
        raise
    draft.rmdir()


def contact_sheet(
    path: str | Path, rows: Sequence[tuple[str, Frames]], columns: int = _COLUMNS
) -> None:
    """Publish a PNG: one row a caption, `columns` frames from first to last across it."""
    if not rows:
        raise ValueError(f"contact sheet {str(path)!r}: no rows; give at least one film")
    if columns < 1:
        raise ValueError(f"contact sheet {str(path)!r}: columns={columns}, must be at least 1")
    font = ImageFont.load_default(size=_TEXT)
    strips = [_strip(frames_THWC, columns) for _, frames_THWC in rows]
    width = max(strip.width for strip in strips) + 2 * _GAP
    captions = [_wrap(caption, width - 2 * _GAP, font) for caption, _ in rows]
    line_height = _TEXT + 4
    heights = [
        len(lines) * line_height + strip.height + 2 * _GAP
        for lines, strip in zip(captions, strips, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for lines, strip, height in zip(captions, strips, heights, strict=True):
        for number, line in enumerate(lines):
            draw.text((_GAP, top + number * line_height), line, fill=(20, 20, 20), font=font)
        sheet.paste(strip, (_GAP, top + len(lines) * line_height))
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_atomic(Path(path), buffer.getvalue())


def _strip(frames_THWC: Frames, columns: int) -> Image.Image:
    _check_frames(frames_THWC)
    height, width = frames_THWC.shape[1:3]
    # Whole multiples and no smoothing: what the model drew, not what a filter made of it.
    scale = max(1, -(-_THUMB // max(height, width)))
    cell_w, cell_h = width * scale, height * scale
    strip = Image.new("RGB", (columns * (cell_w + _GAP) - _GAP, cell_h), (250, 250, 250))
    for column, pixels_HWC in enumerate(_shown(frames_THWC, columns)):
        picture = Image.fromarray(pixels_HWC)
        picture = picture.resize((cell_w, cell_h), Image.Resampling.NEAREST)
        strip.paste(picture, (column * (cell_w + _GAP), 0))
    return strip


def _shown(frames_THWC: Frames, columns: int) -> Frames:
    """A copy of the frames that a sheet of so many columns shows."""
    last = len(frames_THWC) - 1
    return np.take(frames_THWC, np.unique(np.linspace(0, last, columns).round().astype(int)), 0)


def _wrap(
    caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    per_line = max(8, int(width / max(1.0, font.getlength("n"))))
    return textwrap.wrap(caption, per_line, max_lines=3, placeholder=" ...") or [""]


def _check_frames(frames_THWC: Frames) -> None:
    shape, dtype = frames_THWC.shape, frames_THWC.dtype
    if len(shape) != 4 or shape[3] != 3 or 0 in shape or dtype != np.uint8:
        raise ValueError(
            f"frames of shape {shape} and type {dtype}; expected (frames, height, width, 3) "
            "uint8 with at least one frame"
        )
