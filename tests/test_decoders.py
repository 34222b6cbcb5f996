"""Decoders in processes of their own: what a file does to one of them stays there."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from videos_fixture import level_video

from elastic.data.decode import BadVideo, Unreachable, decode_clip
from elastic.data.decoders import MEMORY_BYTES, Answer, Decoders, Wanted, answer

RATE = Fraction(8)


def hostile(question: Wanted | str, pixels: NDArray[np.uint8]) -> Answer:
    """As a decoder that files can bring to crash, hang, or take memory, by their names."""
    name = question if isinstance(question, str) else Path(question.path).name
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        threading.Event().wait()
    elif name == "bomb":
        try:
            np.empty(2 * MEMORY_BYTES, np.uint8)
        except MemoryError:
            return BadVideo("took too much")
    elif name == "once" and not os.path.exists(question.path + ".seen"):  # type: ignore[union-attr]
        Path(question.path + ".seen").touch()  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(question, pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        level_video(folder / f"{number}.mp4", [20 + 30 * number] * 8, list(range(8)), 1 / RATE)
    level_video(folder / "once", [99] * 8, list(range(8)), 1 / RATE)
    return folder


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(2, hostile, kill_after_s=3.0)
    yield decoders
    decoders.close()


def wanted(path: Path, frames: int = 4, size: int = 32) -> Wanted:
    return Wanted(str(path), frames, RATE, size, size)


def test_pictures_come_in_order_and_are_those_of_one_process(
    decoders: Decoders, folder: Path
) -> None:
    asked = [wanted(folder / f"{n % 6}.mp4", 1 + n % 7, 16 * (1 + n % 3)) for n in range(20)]
    for one, x_CTHW in zip(asked, decoders.decode(asked, ahead=5), strict=True):
        assert isinstance(x_CTHW, torch.Tensor)
        assert torch.equal(x_CTHW, decode_clip(*one))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("crash", "ends its decoder by SIGSEGV"), ("hang", "more than 3 s, and no end"),
     ("bomb", "took too much"), ("gone.mp4", "does not exist")],
)  # fmt: skip
def test_what_a_file_does_to_its_decoder_is_told_of_that_file_alone(
    decoders: Decoders, folder: Path, name: str, reason: str
) -> None:
    names = ["0.mp4", name, "1.mp4", "2.mp4"]
    found = list(decoders.decode([wanted(folder / name) for name in names], ahead=9))
    assert isinstance(found[1], BadVideo)
    assert reason in found[1].reason
    assert all(isinstance(found[at], torch.Tensor) for at in (0, 2, 3))


def test_a_decoder_that_somebody_else_ends_costs_no_clip(decoders: Decoders, folder: Path) -> None:
    (x_CTHW,) = decoders.decode([wanted(folder / "once")], ahead=1)
    assert isinstance(x_CTHW, torch.Tensor)
    assert (folder / "once.seen").exists()


def test_a_file_that_cannot_be_reached_is_an_error_of_the_machine(
    decoders: Decoders, tmp_path: Path
) -> None:
    with pytest.raises(Unreachable, match="still mounted"):
        list(decoders.decode([wanted(tmp_path / "gone.mp4")], ahead=1))


def test_whoever_stops_early_leaves_nothing_running(decoders: Decoders, folder: Path) -> None:
    assert len(list(decoders.probe([str(folder / "0.mp4")] * 4))) == 4  # what stays has begun
    before = set(psutil.Process().children(recursive=True))
    decoders = Decoders(1)
    pictures = decoders.decode([wanted(folder / "0.mp4")] * 50, ahead=3)
    assert isinstance(next(pictures), torch.Tensor)
    pictures.close()  # type: ignore[attr-defined]  # a generator
    decoders.close()
    deadline = time.monotonic() + 20
    while set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, "a decoder outlives its owner's close"
        threading.Event().wait(0.05)
