"""Moving shapes: a video set drawn here, with captions that can be checked against pixels."""

import csv
import io
import itertools
import json
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.video.reformatter
import numpy as np
from numpy.typing import NDArray

from elastic.errors import InputError

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 60, 240),
    "yellow": (240, 225, 30),
    "cyan": (30, 220, 225),
    "magenta": (225, 40, 220),
    "orange": (245, 130, 15),
    "white": (240, 240, 240),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
}  # (y, x), y grows downwards
SPEEDS = {"slowly": 0.12, "quickly": 0.28}  # short sides per second
SIZES = ((64, 64), (64, 96), (96, 64), (96, 96), (96, 128))  # height, width
RATES = (Fraction(16), Fraction(24), Fraction(25), Fraction(30), Fraction(30000, 1001))
VISIBLE_S = 2.0
HELD_OUT_EVERY = 10
SHORT_EVERY = 29  # such a clip is good for images and too short for most video buckets
VARIABLE_EVERY = 7
_ODD = ("truncated.mp4", "empty.mp4", "sound-only.mp4", "noise.mp4", "missing.mp4")
_BT601 = av.video.reformatter.Colorspace.ITU601
DRAWING = 1  # grows when the same seed would draw other pixels


class Scene(NamedTuple):
    """What one clip shows; the caption says all of it."""

    shape: str
    colour: str
    direction: str
    speed: str

    @property
    def caption(self) -> str:
        """The text of the clip, as `a red circle moving left slowly`."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} moving {self.direction} {self.speed}"


class DemoSet(NamedTuple):
    """A written set: its table, its folder, and how many rows are good and odd."""

    table: Path
    folder: Path
    good: int
    odd: int


class _Sheet(NamedTuple):
    """How one clip is filmed: name, (height, width), when each frame is shown, in ticks."""

    name: str
    size_hw: tuple[int, int]
    ticks: tuple[int, ...]
    tick: Fraction
    seed: int


def render(
    shape: str,
    colour: str,
    direction: str,
    speed: str,
    size_hw: tuple[int, int],
    frames: int,
    rate: Fraction | float,
    seed: int,
) -> NDArray[np.uint8]:
    """Frames T,H,W,3 of one shape on dark grey; it stays whole in view for two seconds."""
    scene = Scene(shape, colour, direction, speed)
    return render_at(scene, size_hw, [float(k / rate) for k in range(frames)], seed)


def render_at(
    scene: Scene, size_hw: tuple[int, int], times_s: list[float], seed: int
) -> NDArray[np.uint8]:
    """Frames T,H,W,3 at the given times; frames of any rate show the same movement."""
    rng = np.random.default_rng([DRAWING, seed])
    height, width = size_hw
    side = min(height, width)
    diameter = side * rng.uniform(0.28, 0.40)
    velocity = SPEEDS[scene.speed] * side
    # Inside the central square, so that a centre crop to a square loses nothing.
    slack = side - diameter
    travel = velocity * VISIBLE_S
    start_along = rng.uniform(0, slack - travel) - (slack / 2)
    across = rng.uniform(-slack / 2, slack / 2)
    step_y, step_x = DIRECTIONS[scene.direction]
    along_T = start_along + velocity * np.asarray(times_s)
    y_T = height / 2 + (along_T * step_y if step_y else across + 0 * along_T)
    x_T = width / 2 + (along_T * step_x if step_x else across + 0 * along_T)
    dy_THW = (np.arange(height) + 0.5 - y_T[:, None]).astype(np.float32)[:, :, None]
    dx_THW = (np.arange(width) + 0.5 - x_T[:, None]).astype(np.float32)[:, None, :]
    cover_THW = np.clip(0.5 - _distance(scene.shape, dy_THW, dx_THW, diameter), 0, 1)
    ground = np.float32(rng.uniform(14, 40))
    colour_C = np.asarray(COLOURS[scene.colour], np.float32)
    mixed_THWC = ground + cover_THW[..., None] * (colour_C - ground)
    frames_THWC: NDArray[np.uint8] = (mixed_THWC + np.float32(0.5)).astype(np.uint8)
    return frames_THWC


def _distance(
    shape: str, dy: NDArray[np.float32], dx: NDArray[np.float32], diameter: float
) -> NDArray[np.float32]:
    """Pixels to the outline, negative inside; each shape fits a box of `diameter`."""
    radius = np.float32(diameter / 2)
    away: NDArray[np.float32]
    if shape == "circle":
        away = np.sqrt(dy * dy + dx * dx) - radius
    elif shape == "square":
        away = np.maximum(np.abs(dy), np.abs(dx)) - radius * np.float32(0.9)
    elif shape == "triangle":  # isosceles, its point up, as wide and as high as the box
        slope = np.float32(1 / np.sqrt(5))
        away = np.maximum((2 * np.abs(dx) - (dy + radius)) * slope, dy - radius)
    else:
        raise ValueError(f"shape {shape!r} is not known; it is one of {', '.join(SHAPES)}")
    return away


def write_demo_videos(folder: str | Path, clips: int = 640, seed: int = 0) -> DemoSet:
    """Write the set, or what a killed run left of it; a finished set is recognised and kept."""
    folder = Path(folder)
    table = folder / "captions.csv"
    claim = {"drawing": DRAWING, "clips": clips, "seed": seed}
    done = DemoSet(table, folder, clips + 1, len(_ODD))
    _claim(folder, claim)
    if table.exists():
        return done
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    rows = []
    for index in range(clips):
        scene, sheet, split = _clip(index, seed)
        if not (folder / sheet.name).exists():
            _publish(folder / sheet.name, _film(scene, sheet))
        rows.append((sheet.name, scene.caption, split))
    rows += _write_odd(folder, seed)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "text", "split"), *rows])
    # Last: a table says that every file it names is whole.
    _publish(table, text.getvalue().encode())
    return done


def _claim(folder: Path, claim: dict[str, int]) -> None:
    """Mark the folder as that of one set; another set's folder is refused."""
    mark = folder / "moving_shapes.json"
    if mark.exists():
        found = json.loads(mark.read_text())
        if found != claim:
            raise InputError(
                f"folder {str(folder)!r} holds the moving shapes {found}, and {claim} was asked "
                f"for; one folder holds one set: name another folder, or delete this one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "captions.csv").exists():
        raise InputError(
            f"folder {str(folder)!r} already has a captions.csv that moving shapes did not write; "
            f"name an empty folder"
        )
    _publish(mark, json.dumps(claim).encode())


def _publish(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _clip(index: int, seed: int) -> tuple[Scene, _Sheet, str]:
    """Clip `index` of the set: what it shows, how it is filmed, its split."""
    rng = np.random.default_rng([DRAWING, seed, index])
    turn, colour = divmod(index, len(COLOURS))
    rest = list(itertools.product(SHAPES, DIRECTIONS, SPEEDS))
    order = np.random.default_rng([DRAWING, seed, turn // len(rest), 1 << 20]).permutation(
        len(rest)
    )
    shape, direction, speed = rest[order[(turn + 5 * colour) % len(rest)]]
    scene = Scene(shape, list(COLOURS)[colour], direction, speed)
    # By turn and colour, so that every colour is held out equally often.
    split = "held-out" if (turn + 3 * colour) % HELD_OUT_EVERY == 0 else "train"
    is_short = index % SHORT_EVERY == SHORT_EVERY - 1
    length_s = rng.uniform(0.4, 1.0) if is_short else rng.uniform(2.2, 2.7)
    rate = RATES[rng.integers(len(RATES))]
    ticks, tick = _ticks(length_s, rate, index % VARIABLE_EVERY == VARIABLE_EVERY - 1, rng)
    size_hw = SIZES[rng.integers(len(SIZES))]
    name = f"{index:05d}.mp4"
    return scene, _Sheet(name, size_hw, ticks, tick, int(rng.integers(1 << 31))), split


def _ticks(
    length_s: float, rate: Fraction, is_variable: bool, rng: np.random.Generator
) -> tuple[tuple[int, ...], Fraction]:
    """When each frame is shown, and the length of a tick in seconds."""
    if not is_variable:
        return tuple(range(int(np.ceil(length_s * rate)))), 1 / rate
    gaps = rng.integers(20, 100, size=200)  # of 1/600 s: 6 to 30 frames a second
    shown = np.concatenate([[0], np.cumsum(gaps)])
    return tuple(int(t) for t in shown[shown < length_s * 600]), Fraction(1, 600)


def _film(scene: Scene, sheet: _Sheet) -> bytes:
    times_s = [float(t * sheet.tick) for t in sheet.ticks]
    return encode_mp4(render_at(scene, sheet.size_hw, times_s, sheet.seed), sheet.ticks, sheet.tick)


def encode_mp4(
    frames_THWC: NDArray[np.uint8],
    ticks: tuple[int, ...],
    tick: Fraction,
) -> bytes:
    """An H.264 mp4 in memory, BT.601: frame k is shown at ticks[k] * tick seconds."""
    height, width = frames_THWC.shape[1:3]
    buffer = io.BytesIO()
    # One converter for the clip, one thread: a new one for each frame costs a millisecond.
    converter = av.video.reformatter.VideoReformatter()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", options={"preset": "ultrafast", "crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base, context.framerate = tick, Fraction(round(1 / tick))
        context.thread_count = 1  # the same bytes on every machine
        context.colorspace, context.color_range = 6, 1  # SMPTE 170M, limited
        for pixels_HWC, shown in zip(frames_THWC, ticks, strict=True):
            rgb = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            frame = converter.reformat(rgb, format="yuv420p", dst_colorspace=_BT601, threads=1)
            frame.pts, frame.time_base = shown, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def tone_mp4(length_s: float) -> bytes:
    """An mp4 with sound and no picture."""
    rate = 16000
    wave = np.sin(np.arange(int(rate * length_s), dtype=np.float32) * 0.1)[None]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.sample_rate, sound.pts = rate, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def turn_mp4(mp4: bytes) -> bytes:
    """The same mp4 with the note that players turn it by 90 degrees clockwise."""
    # ISO 14496-12: in a version 0 `tkhd` box the matrix starts 44 bytes after the size field.
    at = mp4.index(b"tkhd") + 40
    one = 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    return mp4[: at + 4] + matrix + mp4[at + 4 + len(matrix) :]


def _write_odd(folder: Path, seed: int) -> list[tuple[str, str, str]]:
    """The files that people's folders have as well; `turned.mp4` among them is good."""
    scene, sheet, _ = _clip(0, seed)
    whole = _film(scene, sheet)
    times_s = [float(t * sheet.tick) for t in sheet.ticks]
    upright_THWC = render_at(scene, (96, 64), times_s, sheet.seed)
    lying_THWC = np.ascontiguousarray(np.rot90(upright_THWC, 1, axes=(1, 2)))
    noise = np.random.default_rng([DRAWING, seed]).bytes(4096)
    odd = {
        "truncated.mp4": whole[: len(whole) // 2],
        "empty.mp4": b"",
        "sound-only.mp4": tone_mp4(2.5),
        "noise.mp4": noise,
    }
    assert tuple(odd) == _ODD[:-1], f"odd files {tuple(odd)}"
    turned = turn_mp4(encode_mp4(lying_THWC, sheet.ticks, sheet.tick))
    for name, content in {**odd, "turned.mp4": turned}.items():
        _publish(folder / name, content)
    return [(name, scene.caption, "train") for name in ("turned.mp4", *_ODD)]
