"""Training on videos that are decoded meanwhile: what a file does, and what is read ahead."""

import os
import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from test_decoders import hostile
from tiny import attempt, world_of_one
from videos_fixture import level_video

from elastic.attempt import WorkerJob
from elastic.data import sources
from elastic.data.assign import Members
from elastic.data.clips import Clip, Clips, write_parts
from elastic.data.decode import Unreachable, decode_clip, to_unit
from elastic.data.decoders import Answer, Decoders, Times, Wanted
from elastic.data.load import Samples, rounds_of
from elastic.data.order import EMPTY_DIGEST, batch_at, chain_digest
from elastic.data.sources import VideoSource
from elastic.folders import MEMBERS
from elastic.lease import fork, start_host, wait_for_host
from elastic.link import Measured, Order
from elastic.loop import Outcome
from elastic.objective import Reconstructing
from models import DCAE
from stages import AdamW, AutoencoderStage, Bucket, Ema, Fresh, Phase, Videos

RATE = Fraction(8)
NUM, BUCKET = 6, Bucket("32px", frames=4, batch=4, micro=2)
STAGE = AutoencoderStage(
    name="ae",
    data=Videos("none.csv"),
    vae=DCAE(
        channels=4,
        widths=(4, 4, 8, 8, 8, 8),
        encoder_depths=(1, 1, 1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1, 1, 1),
        head_width=8,
    ),
    init=Fresh(seed=0),
    schedule=(Phase(until=16, buckets=(BUCKET,)),),
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=10),
    rate=8.0,
    save_every=16,
    log_every=4,
    evaluate_every=16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(NUM):
        level_video(folder / f"{number}.mp4", [20 + 30 * number] * 8, list(range(8)), 1 / RATE)
    return folder


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    decoders = Decoders(2, hostile, Times(processor=1.0, clock=60.0))
    yield decoders
    decoders.close()


def members(folder: Path, *names: str) -> Members:
    """The six films, some of them replaced by these; the first is held out too."""
    films = [str(folder / name) for name in names] + [
        str(folder / f"{number}.mp4") for number in range(len(names), NUM)
    ]
    clips = [
        Clip(100 + number, path, "a film", held_out=False) for number, path in enumerate(films)
    ]
    return Members({BUCKET.name: clips, f"{BUCKET.name}.held-out": clips[-1:]})


def source(found: Members, decoders: Decoders, held_out: bool = False) -> VideoSource:
    return VideoSource(STAGE, found, held_out, decoders)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("crash", "ends its decoder by SIGSEGV"), ("busy", "took more than 1 s of the processor")],
)
def test_a_clip_that_crashes_or_hangs_its_decoder_costs_training_that_clip_alone(
    name: str, reason: str, folder: Path, decoders: Decoders, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found, seen = members(folder, name), dict[int, set[float]]()

    class Watched(VideoSource):
        def _samples(self, *arguments: object) -> Samples:
            samples = super()._samples(*arguments)  # type: ignore[arg-type]  # whatever they are
            for number, weight in zip(samples.ids, samples.weight_B.tolist(), strict=True):
                seen.setdefault(int(number), set()).add(weight)
            return samples

    with world_of_one() as world:
        clips = Watched(STAGE, found, held_out=False, decoders=decoders)
        goal = Reconstructing(STAGE, clips, source(found, decoders, True), world.device)
        done = attempt(world, tmp_path, STAGE, goal)
    assert done.outcome is Outcome.FINISHED
    assert all(np.isfinite(line["values"]["loss"]) for line in done.lines if not line["context"])
    assert seen == {100: {0.0}} | {100 + number: {1.0} for number in range(1, NUM)}
    told = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert told == [f"{folder / name}: left out of its batch: {reason}"], "once, not each epoch"
    digest, position = EMPTY_DIGEST, 0
    while position < STAGE.budget:
        plan = batch_at(STAGE, position, clips.counts())
        digest = chain_digest(digest, clips.sample_ids(plan.bucket, plan.indices))
        position += plan.bucket.batch
    assert done.lines[-1]["order_digest"] == digest, "the order is that of all clips"


def test_a_file_that_cannot_be_read_just_now_is_waited_for_and_then_an_error(
    folder: Path, decoders: Decoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    mount = tmp_path / "mount"

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:  # it comes back
            mount.mkdir()
            (mount / "0.mp4").write_bytes((folder / "0.mp4").read_bytes())

    monkeypatch.setattr(sources.time, "sleep", pause)
    found = members(folder, str(mount / "0.mp4"))
    (samples,) = source(found, decoders).fetch_all([(BUCKET, np.array([0, 1]))])
    assert samples.weight_B.tolist() == [1.0, 1.0]
    assert len(pauses) == 2
    found = members(folder, str(tmp_path / "lost" / "0.mp4"))
    with pytest.raises(Unreachable, match="still mounted"):
        list(source(found, decoders).fetch_all([(BUCKET, np.array([0, 1]))]))
    assert len(pauses) == 2 + len(sources._PAUSES_S)


def test_pictures_are_those_of_one_process_for_any_world(folder: Path, decoders: Decoders) -> None:
    clips = source(members(folder), decoders)
    plans = [batch_at(STAGE, position, clips.counts()) for position in range(0, 16, 4)]
    for size in (1, 3):
        for rank in range(size):
            for micro in rounds_of(plans, clips, rank, size):
                numbers = micro.samples.ids - 100
                expected = [
                    to_unit(decode_clip(str(folder / f"{number}.mp4"), 4, RATE, 32, 32))
                    for number in numbers
                ]
                assert torch.equal(micro.samples.x_BCTHW, torch.stack(expected))


def test_clips_of_later_rounds_are_asked_for_before_they_are_wanted(folder: Path) -> None:
    asked: list[str] = []
    arrived = threading.Semaphore(0)

    class Noted(Decoders):
        def _ask(self, question: Wanted | str, known: object) -> Answer:
            assert isinstance(question, Wanted)
            asked.append(question.path)
            arrived.release()
            return np.zeros((3, 4, 32, 32), np.uint8)

    decoders = Noted(3)
    rounds = [(BUCKET, np.array([first, first + 1])) for first in (0, 2, 4)]
    samples = source(members(folder), decoders).fetch_all(rounds)
    next(samples)
    for _ in range(4):  # the first round's two, and two more
        assert arrived.acquire(timeout=30)
    samples.close()  # type: ignore[attr-defined]  # a generator
    decoders.close()
    assert sorted(asked) == sorted(set(asked)), "each once"


def test_a_forked_training_process_takes_its_decoders_along_when_it_is_killed(
    folder: Path, tmp_path: Path
) -> None:
    stage = STAGE.replace(schedule=(Phase(until=100_000, buckets=(BUCKET,)),))
    write_parts(
        tmp_path / MEMBERS,
        [(name, Clips.of(clips).batches()) for name, clips in members(folder).clips.items()],
    )
    job, host = pickle.dumps(WorkerJob(stage, tmp_path)), start_host(tmp_path / "host.sock")
    assert wait_for_host(tmp_path / "host.sock", 120)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        own = os.getpid()
        order = Order(0, 1, "127.0.0.1", port, job, own, own, num_decoders=2)
        lease = fork(tmp_path / "host.sock", order, listening)
    message = None
    while not isinstance(message, Measured):
        assert lease.pipe.poll(120), "no word"
        message = lease.pipe.recv()
    family = psutil.Process(lease.pid).children(recursive=True)
    names = [" ".join(process.cmdline()) for process in family]
    assert sum("forkserver" in name for name in names) == 3, "the two decoders and their parent"
    assert not any("fork_host" in name for name in names), "they are not the host again"
    os.kill(lease.pid, signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=30)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    lease.close()
    host.communicate(timeout=60)
