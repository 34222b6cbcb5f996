from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from elastic.data.moving_shapes import render
from elastic.film import (
    Frames,
    animated_webp,
    contact_sheet,
    films_into,
    read_mp4,
    write_mp4,
)


def clip(frames: int = 17, size_hw: tuple[int, int] = (64, 96)) -> Frames:
    return render("circle", "red", "right", "quickly", size_hw, frames, 8, seed=3)


def psnr(a_THWC: Frames, b_THWC: Frames) -> float:
    error = np.mean((a_THWC.astype(np.float64) - b_THWC.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_an_mp4_gives_back_its_frames_and_rate(tmp_path: Path, frames: int) -> None:
    path = tmp_path / "a.mp4"
    film_THWC = clip(frames)
    write_mp4(path, film_THWC, 8)
    back = read_mp4(path)
    assert back.frames_THWC.shape == film_THWC.shape
    assert back.rate == 8.0
    assert psnr(back.frames_THWC, film_THWC) > 30


def test_colours_come_back_without_a_shift(tmp_path: Path) -> None:
    for name, rgb in {"red": (230, 30, 30), "green": (30, 190, 50), "blue": (40, 60, 240)}.items():
        film_THWC = np.full((3, 32, 32, 3), rgb, np.uint8)
        write_mp4(tmp_path / f"{name}.mp4", film_THWC, 8)
        back_THWC = read_mp4(tmp_path / f"{name}.mp4").frames_THWC
        assert np.abs(back_THWC.astype(int) - film_THWC).max() <= 4, name


def test_an_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, clip(), 8)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (6, 1)
    raw = path.read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat"), "the index must come first"
    assert [one.name for one in tmp_path.iterdir()] == ["a.mp4"]


def test_odd_sides_are_refused_with_the_nearest_even_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"31x33.*nearest are 32x34"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 31, 33, 3), np.uint8), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    path = tmp_path / "noise.mp4"
    path.write_bytes(b"not a video at all" * 50)
    with pytest.raises(ValueError, match=r"noise\.mp4.*cannot be decoded"):
        read_mp4(path)


def test_a_webp_moves_and_loops(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(animated_webp(clip(9, (64, 512)), 8, longest_side=128))
    with Image.open(path) as picture:
        assert picture.format == "WEBP"
        assert picture.size == (128, 16)
        assert picture.n_frames == 9
        assert picture.info["loop"] == 0
        picture.seek(1)
        picture.load()
        assert picture.info["duration"] == 125


def test_a_sheet_shows_the_pixels_of_first_and_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    film_THWC = np.zeros((9, 16, 16, 3), np.uint8)
    film_THWC[0], film_THWC[-1] = (255, 0, 0), (0, 0, 255)
    contact_sheet(path, [("first", film_THWC), ("a " * 400, film_THWC)], columns=4)
    with Image.open(path) as picture:
        pixels_HWC = np.asarray(picture)
    scaled = 128  # 16 pixels, eight times
    for rgb in ((255, 0, 0), (0, 0, 255)):
        assert (pixels_HWC == rgb).all(axis=-1).sum() == 2 * scaled * scaled
    dark = (pixels_HWC[:30] < 100).all(axis=-1)
    assert dark.sum() > 30, "the caption stands above its row"


def test_a_sheet_of_a_still_shows_it_once(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    contact_sheet(path, [("", np.full((1, 128, 128, 3), (9, 200, 9), np.uint8))], columns=6)
    with Image.open(path) as picture:
        pixels_HWC = np.asarray(picture)
    assert (pixels_HWC == (9, 200, 9)).all(axis=-1).sum() == 128 * 128


def test_a_sheet_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet(tmp_path / "sheet.png", [])


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def _breaks_off(folder: Path, error: BaseException) -> None:
    with films_into(folder, 2, 8) as films:
        films.add("another", clip(3))
        raise error


def test_films_appear_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "asked"
    with pytest.raises(ValueError, match="the second"):
        _breaks_off(folder, ValueError("the second"))
    assert not folder.exists()
    with films_into(folder, 2, 8) as films:
        films.add("a circle", clip())
        assert not _files(folder).keys() - {".draft/00.mp4"}
        films.add("a square", clip(5))
    assert films.paths == [folder / "00.mp4", folder / "01.mp4"]
    before = _files(folder)
    assert before.keys() == {"00.mp4", "01.mp4", "contact-sheet.png"}
    with pytest.raises(KeyboardInterrupt):
        _breaks_off(folder, KeyboardInterrupt())
    assert _files(folder) == before


def test_a_draft_of_a_killed_process_is_no_film(tmp_path: Path) -> None:
    (tmp_path / ".draft").mkdir()
    (tmp_path / ".draft" / "07.mp4").write_bytes(b"half a film")
    with films_into(tmp_path, 1, 8) as films:
        films.add("a circle", clip())
    assert _files(tmp_path).keys() == {"00.mp4", "contact-sheet.png"}


def test_of_many_films_the_names_are_in_order_and_the_sheet_has_the_first(tmp_path: Path) -> None:
    shown = []
    for count in (16, 101):
        folder = tmp_path / str(count)
        with films_into(folder, count, 8) as films:
            for _ in range(count):
                films.add("a circle", clip(1, (16, 16)))
        assert sorted(films.paths) == films.paths
        shown.append((folder / "contact-sheet.png").read_bytes())
    assert shown[0] == shown[1]


def test_a_sheet_keeps_of_a_film_what_it_shows(tmp_path: Path) -> None:
    film_THWC = clip(17)
    contact_sheet(tmp_path / "whole.png", [("a circle", film_THWC)])
    with films_into(tmp_path / "films", 1, 8) as films:
        films.add("a circle", film_THWC)
        film_THWC[:] = 0  # nothing hangs on the film itself any more
    sheets = (tmp_path / "whole.png", tmp_path / "films" / "contact-sheet.png")
    assert len({path.read_bytes() for path in sheets}) == 1
