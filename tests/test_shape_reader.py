from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from elastic.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, render
from elastic.film import Frames, read_mp4, write_mp4
from elastic.shape_reader import Reading, parse_caption, read_shape

LEAST = {"colour": 0.98, "direction": 0.98, "shape": 0.90}


def scenes(number: int) -> list[tuple[str, str, str, str]]:
    rng = np.random.default_rng(0)
    return [
        (
            str(rng.choice(SHAPES)),
            str(rng.choice(list(COLOURS))),
            str(rng.choice(list(DIRECTIONS))),
            str(rng.choice(["slowly", "quickly"])),
        )
        for _ in range(number)
    ]


def blurred(frames_THWC: Frames, radius: float) -> Frames:
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(one).filter(blur)) for one in frames_THWC])


def check(readings: list[tuple[tuple[str, str, str, str], Reading]]) -> None:
    right = {
        "shape": np.mean([scene[0] == reading.shape for scene, reading in readings]),
        "colour": np.mean([scene[1] == reading.colour for scene, reading in readings]),
        "direction": np.mean([scene[2] == reading.direction for scene, reading in readings]),
    }
    for what, least in LEAST.items():
        assert right[what] >= least, f"{what}: {right}"


def drawn(scene: tuple[str, str, str, str], seed: int, frames: int = 17) -> Frames:
    return render(*scene, size_hw=(64, 64), frames=frames, rate=8, seed=seed)


@pytest.mark.parametrize("frames", [16, 17])
def test_the_reader_names_what_was_drawn(frames: int) -> None:
    check(
        [(scene, read_shape(drawn(scene, seed, frames))) for seed, scene in enumerate(scenes(150))]
    )


def test_the_reader_names_what_was_drawn_after_video_compression(tmp_path: Path) -> None:
    readings = []
    for seed, scene in enumerate(scenes(80)):
        write_mp4(tmp_path / "a.mp4", drawn(scene, seed), 8)
        readings.append((scene, read_shape(read_mp4(tmp_path / "a.mp4").frames_THWC)))
    check(readings)


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_the_reader_names_what_was_drawn_through_a_blur(radius: float) -> None:
    check(
        [
            (scene, read_shape(blurred(drawn(scene, seed), radius)))
            for seed, scene in enumerate(scenes(100))
        ]
    )


def test_the_reader_names_what_was_drawn_through_noise() -> None:
    rng = np.random.default_rng(1)
    readings = []
    for seed, scene in enumerate(scenes(100)):
        noisy_THWC = drawn(scene, seed) + rng.normal(0, 10, (17, 64, 64, 3))
        readings.append((scene, read_shape(noisy_THWC.clip(0, 255).astype(np.uint8))))
    check(readings)


def test_an_empty_picture_reads_as_nothing() -> None:
    reading = read_shape(np.full((17, 64, 64, 3), 30, np.uint8))
    assert (reading.colour, reading.shape, reading.direction) == (None, None, None)
    assert reading.seen == 0


def test_noise_has_no_direction_that_a_line_explains() -> None:
    rng = np.random.default_rng(0)
    reading = read_shape(rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8))
    assert reading.straightness < 0.5


def test_a_shape_that_stands_still_has_no_direction() -> None:
    still_HWC = drawn(("square", "green", "up", "slowly"), 0)[0]
    reading = read_shape(np.stack([still_HWC] * 17))
    assert (reading.colour, reading.shape, reading.direction) == ("green", "square", None)


def test_a_still_image_names_colour_and_shape() -> None:
    reading = read_shape(drawn(("circle", "blue", "up", "slowly"), 0)[:1])
    assert (reading.colour, reading.shape, reading.direction) == ("blue", "circle", None)


def test_captions_are_read_word_by_word() -> None:
    assert parse_caption("An Orange triangle moving left quickly") == {
        "colour": "orange",
        "shape": "triangle",
        "direction": "left",
    }
    assert parse_caption("a red circle") == {"colour": "red", "shape": "circle"}
    assert parse_caption("redder leftover") == {}


def test_frames_of_a_wrong_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        read_shape(np.zeros((4, 4, 3), np.uint8))
