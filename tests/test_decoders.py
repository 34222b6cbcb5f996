"""Decoders in processes of their own: what a file does to one of them stays there."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
import torch
from videos_fixture import level_video

from elastic.data.decode import BadVideo, Unreachable, decode_clip
from elastic.data.decoders import Answer, Decoders, Times, Wanted, answer

RATE = Fraction(8)
HOME = Path(__file__).parent.parent


def hostile(question: Wanted | str) -> Answer:
    """As a decoder that files can bring to crash, hang, or take memory, by their names."""
    path = question if isinstance(question, str) else question.path
    name = Path(path).name
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "busy":
        while True:
            pass
    elif name == "still":
        threading.Event().wait()
    elif name == "oom":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "bomb":
        question = Wanted(path, 4, RATE, 60_000, 60_000)
    elif name == "once" and not os.path.exists(path + ".seen"):
        Path(path + ".seen").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(question)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        level_video(folder / f"{number}.mp4", [20 + 30 * number] * 8, list(range(8)), 1 / RATE)
    for name in ("once", "bomb"):
        level_video(folder / name, [99] * 8, list(range(8)), 1 / RATE)
    return folder


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(2, hostile, Times(processor=1.0, clock=5.0))
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
    [("crash", "ends its decoder by SIGSEGV"), ("busy", "more than 1 s of the processor"),
     ("bomb", "takes more than 4 GB"), ("gone.mp4", "does not exist")],
)  # fmt: skip
def test_what_a_file_does_to_its_decoder_is_told_of_that_file_alone(
    decoders: Decoders, folder: Path, name: str, reason: str
) -> None:
    names = ["0.mp4", name, "1.mp4", "2.mp4"]
    found = list(decoders.decode([wanted(folder / name) for name in names], ahead=9))
    assert isinstance(found[1], BadVideo)
    assert reason in found[1].reason
    assert all(isinstance(found[at], torch.Tensor) for at in (0, 2, 3))


@pytest.mark.parametrize(
    ("name", "reason"), [("still", "no answer in 5 s"), ("oom", "was ended by SIGKILL")]
)
def test_what_the_machine_does_to_a_decoder_says_nothing_about_the_file(
    decoders: Decoders, folder: Path, name: str, reason: str
) -> None:
    with pytest.raises(Unreachable, match=reason):
        list(decoders.decode([wanted(folder / name)], ahead=1))
    (found,) = decoders.probe([str(folder / name)])
    assert isinstance(found, Unreachable)
    assert isinstance(next(decoders.decode([wanted(folder / "0.mp4")], ahead=1)), torch.Tensor)


def test_decoders_that_cannot_be_started_call_no_file_bad(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = Decoders(1)
    monkeypatch.setattr("elastic.data.decoders._serve", sys.exit)  # by its name: at once, code 1
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="cannot be started here"):
        list(decoders.probe([str(folder / "0.mp4")]))
    decoders.close()
    assert time.monotonic() - began < 60, "its end is seen, not waited for"


def test_decoders_live_with_a_smaller_limit_of_memory(folder: Path) -> None:
    script = (
        "import resource, sys; from elastic.data.decoders import Decoders\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (4_500_000_000, 4_500_000_000))\n"
        "    decoders = Decoders(1); print(list(decoders.probe(sys.argv[1:]))); decoders.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "0.mp4")],
        env={**os.environ, "PYTHONPATH": str(HOME)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("[Probe(frames=8"), done.stdout


def test_a_decoder_that_somebody_else_ends_costs_no_clip(decoders: Decoders, folder: Path) -> None:
    (x_CTHW,) = decoders.decode([wanted(folder / "once")], ahead=1)
    assert isinstance(x_CTHW, torch.Tensor)
    assert (folder / "once.seen").exists()


def test_a_file_that_cannot_be_reached_is_an_error_of_the_machine(
    decoders: Decoders, tmp_path: Path
) -> None:
    with pytest.raises(Unreachable, match="still mounted"):
        list(decoders.decode([wanted(tmp_path / "gone.mp4")], ahead=1))


def test_an_end_does_not_wait_for_a_decoder_that_is_busy(folder: Path) -> None:
    decoders = Decoders(1, hostile, Times(processor=60.0, clock=60.0))
    pictures = decoders.decode([wanted(folder / "0.mp4"), wanted(folder / "still")], ahead=2)
    assert isinstance(next(pictures), torch.Tensor)
    began = time.monotonic()
    decoders.close()
    assert time.monotonic() - began < 20, "it would have been 60"


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


def test_decoders_end_with_a_process_that_is_killed_also_one_that_hangs(folder: Path) -> None:
    script = (
        "import sys; from fractions import Fraction\n"
        "from elastic.data.decoders import Decoders; from test_decoders import hostile, wanted\n"
        "if __name__ == '__main__':\n"
        "    from pathlib import Path\n"
        "    asked = [wanted(Path(sys.argv[1]) / name) for name in ('0.mp4', 'still', '0.mp4')]\n"
        "    found = Decoders(2, hostile).decode(asked, ahead=2)\n"
        "    next(found); print('ready', flush=True); next(found)\n"
    )
    paths = os.pathsep.join([str(HOME), str(HOME / "tests")])
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as asking:  # fmt: skip
        assert asking.stdout is not None
        assert asking.stdout.readline() == "ready\n"
        family = psutil.Process(asking.pid).children(recursive=True)
        assert len(family) > 2
        asking.kill()
        _, left = psutil.wait_procs(family, timeout=30)
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
