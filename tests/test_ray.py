"""The whole way on a real Ray cluster: a worker killed, a node that joins, a driver killed."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ray_beside import is_loopback, listening
from s3_server import s3_server  # noqa: F401  # a fixture
from store_places import Place, a_bucket  # noqa: F401  # a fixture

from elastic.data.assign import load_members
from elastic.data.decoders import shared_decoders
from elastic.data.growth import load_growths
from elastic.data.moving_shapes import write_demo_videos
from elastic.data.order import EMPTY_DIGEST, batch_at, chain_digest
from elastic.data.permutation import Indices
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource, VideoSource
from elastic.folders import MEMBERS, RunFolder
from elastic.journal import latest_values, read_events, read_metrics
from elastic.latent_pins import pinned_latents
from elastic.preview import positions_in
from elastic.record import read_plan
from stages.stage import AutoencoderStage, DiffusionStage, Stage

pytestmark = pytest.mark.ray

PLAN = Path(__file__).with_name("tiny_plan.py")
NO_AIM = {"RESTAGE_AIM": "0"}  # costs each driver seconds; two of the tests fill it
# Kills a worker in one stage and adds a node in another, as `make demo` does.
DRIVER = """
import sys
from pathlib import Path
from elastic import demo
from elastic.course import train_plan
from elastic.drive import run_course, start_cluster
from elastic.folders import MEMBERS, RunFolder
from elastic.settings import read_settings
from stages.plan import load_plan

settings = read_settings(storage=sys.argv[2], min_stay=2)
plan = load_plan(sys.argv[1])
cluster = start_cluster(settings, cpus=1)
try:
    cluster.add_node()
    faults = demo.Faults(plan, RunFolder.of(settings.storage_path, plan), cluster)
    run_course(plan, settings, train_plan, cluster, faults)
finally:
    cluster.stop()
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_videos(tmp_path_factory.mktemp("videos"), clips=40).table


def environment(videos: Path, times: int, stages: int = 5) -> dict[str, str]:
    variables = {"TINY_VIDEOS": videos, "TINY_TIMES": times, "TINY_STAGES": stages}
    around = {"PYTHONPATH": str(PLAN.parent.parent), "PYTHONWARNINGS": "default"}
    return {**os.environ, **{name: str(value) for name, value in variables.items()}, **around}


def wait_until(true: Callable[[], bool], what: str, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    pause = threading.Event()
    while not true():
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s for {what}"
        pause.wait(0.1)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def drawn(folder: RunFolder, stage: Stage) -> Iterator[Indices]:
    """The sample ids of each batch, from the pure function and what the stage has pinned."""
    own = folder.stage(stage.name)
    members, growths = load_members(own / MEMBERS), load_growths(own)
    source: Any
    if isinstance(stage, AutoencoderStage):
        source = VideoSource(
            stage, members, held_out=False, decoders=shared_decoders(1), growths=growths
        )
    else:
        stores = [SealedStore.open(*one) for one in pinned_latents(folder, stage.name)]
        source = LatentSource(stage, stores, held_out=False, members=members, growths=growths)
    position = 0
    while position < stage.budget:
        plan = batch_at(stage, position, source.layouts())
        yield source.sample_ids(plan.bucket, plan.indices)
        position += plan.bucket.batch


def expected_digest(folder: RunFolder, stage: Stage) -> str:
    """The digest of the whole order."""
    return functools.reduce(chain_digest, drawn(folder, stage), EMPTY_DIGEST)


def check_finished_run(folder: RunFolder) -> None:
    """Every stage finished, with the order that the pure function gives, and its videos."""
    plan = read_plan(folder)
    latest = latest_values(read_metrics(folder.root))
    for stage in plan.stages:
        last = [m for m in latest if m["stage"] == stage.name and not m["context"]][-1]
        assert last["position"] == stage.budget
        assert last["order_digest"] == expected_digest(folder, stage)
        assert np.isfinite(last["values"]["loss"])
        assert list((folder.samples(stage.name)).glob("*.mp4"))
        assert (folder.samples(stage.name) / "contact-sheet.png").exists()
        if isinstance(stage, DiffusionStage) and stage.sample_every is not None:
            made = [
                position // stage.sample_every
                for position in positions_in(folder.samples(stage.name))
            ]
            assert made == list(range(1, -(-stage.budget // stage.sample_every)))


def test_a_killed_worker_and_a_new_node_change_nothing_but_time(
    videos: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(PLAN), str(tmp_path)],
        env=environment(videos, times=4),
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    folder = RunFolder(tmp_path / "tiny")
    check_finished_run(folder)
    events = read_events(folder.root)

    told = [e for e in events if e["stage"] == "hunyuan-dit"]
    crashed = [e for e in told if e["kind"] in ("start", "crash")]
    assert [e["kind"] for e in crashed] == ["start", "crash", "start"]
    assert crashed[2]["position"], "it went on from a checkpoint"

    grown = [e for e in events if e["stage"] == "dc-ae-dit"]
    asked = next(i for i, e in enumerate(grown) if e["kind"] == "resize_requested")
    again = next(i for i, e in enumerate(grown) if i > asked and e["kind"] == "start")
    # The last: one that was due anyway may be published between the request and the stop.
    saved = [e for e in grown[asked:again] if e["kind"] == "publish"][-1]
    started = grown[again]
    assert saved["reason"] == "stop"
    assert (grown[asked]["world_from"], grown[asked]["world_to"]) == (2, 3)
    assert started["world"] == 3
    assert started["position"] == saved["position"], "a planned resize loses nothing"
    seen = [m["position"] for m in read_metrics(folder.root) if m["stage"] == "dc-ae-dit"]
    assert seen == sorted(seen), "no position was trained twice"


def test_a_stage_that_can_only_fail_again_is_not_tried_again(videos: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elastic", "train", str(PLAN), "--storage", str(tmp_path)],
        env={**environment(videos, times=1), **NO_AIM, "TINY_LR": "1e30"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1
    assert "worth a look: stage 'hunyuan-vae': optimizer.lr 1e+30: greater than 0.1" in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("restage: stage 'hunyuan-vae': gradient norm")
    assert "lower optimizer.lr" in message
    kinds = [e["kind"] for e in read_events(tmp_path / "tiny")]
    assert kinds.count("start") == 1
    assert "blocked" in kinds


def test_a_mix_whose_table_grows_while_its_driver_is_dead_goes_on_in_the_order_that_is_recorded(
    videos: Path, tmp_path: Path
) -> None:
    head, *rows = videos.read_text().splitlines()
    table = tmp_path / "films.csv"
    table.write_text("\n".join([head, *rows[:20]]))
    stills = tmp_path / "stock"
    stills.mkdir()
    for row in rows[20:30]:
        name, text, _ = row.split(",")
        os.link(videos.parent / name, stills / name)
        (stills / name).with_suffix(".txt").write_text(text)
    text = PLAN.read_text().replace("    Fresh,\n", "    Fresh,\n    Mix,\n")
    films = f"Videos({str(table)!r}, folder={str(videos.parent)!r})"
    mix = f"Mix(({films}, 3), (Videos({f'{stills}/'!r}, held_out_every=2), 1))"
    text = text.replace('Videos(os.environ.get("TINY_VIDEOS", "captions.csv"))', mix)
    plan = tmp_path / "mixed.py"
    plan.write_text(text)
    command = [sys.executable, "-m", "elastic", "train", str(plan), "--storage", str(tmp_path)]
    folder, around = RunFolder(tmp_path / "tiny"), environment(videos, times=4, stages=2)
    around |= NO_AIM

    def published() -> bool:
        events = read_events(folder.root)
        return any(e["kind"] == "publish" and e["stage"] == "hunyuan-dit" for e in events)

    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen([*command, "--cpus", "1"], env=around, stdout=log, stderr=log)
        wait_until(published, f"a checkpoint; {tmp_path}/first.log", 180)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    latents = Path(folder.latents)
    stores = {path: path.stat().st_mtime_ns for path in latents.glob("*/*/latent/c.*")}
    table.write_text("\n".join([head, *rows[:20], *rows[30:]]))
    grown = subprocess.run(
        [*command, "--cpus", "2", "--grow"],
        env=around, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert grown.returncode == 0, grown.stderr[-4000:]
    (growth,) = load_growths(folder.stage("hunyuan-dit"))
    assert growth.position > 0
    assert load_growths(folder.stage("hunyuan-vae")) == (), "it was finished"
    assert {path: path.stat().st_mtime_ns for path in stores} == stores, "nothing is encoded again"
    assert len(pinned_latents(folder, "hunyuan-dit")) == 2
    check_finished_run(folder)
    stage = read_plan(folder).stage("hunyuan-dit")
    new = {clip.sample_id for clips in growth.members.clips.values() for clip in clips}
    assert new <= set(np.concatenate(list(drawn(folder, stage))).tolist()), "all were trained on"
    status = subprocess.run(
        [sys.executable, "-m", "elastic", "status", str(folder.root)],
        env=around, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert f"grown: hunyuan-dit by {growth.members.num_clips()} clips" in status.stdout


def require_repair(folder: RunFolder, environment: dict[str, str]) -> None:
    """Damage a shard of a finished run: it is named, and encoded again to the same bytes."""

    def verb(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "elastic", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=180, check=False
        )

    latents = Place(folder.latents)
    shard = next(name for name in latents.names() if "/32px-5f/latent/c.0." in name)
    before = latents.read(shard)
    latents.flip(shard, 9, 1)
    named = verb("verify", str(folder.root))
    assert named.returncode == 1
    assert "32px-5f/latent/c.0.0.0.0.0 latent of sample" in named.stdout
    repaired = verb("repair", str(PLAN), "--storage", str(folder.root.parent), "--cpus", "2")
    assert repaired.returncode == 0, repaired.stderr[-4000:]
    assert "encoded again: 1 shards; sealed as " in repaired.stdout
    assert latents.read(shard) == before
    assert verb("verify", str(folder.root)).returncode == 0


def test_a_killed_driver_leaves_no_process_and_the_next_one_goes_on_with_latents_in_a_bucket(
    videos: Path, tmp_path: Path, bucket: Place
) -> None:
    command = [sys.executable, "-m", "elastic", "train", str(PLAN), "--storage", str(tmp_path)]
    # The whole course is another test's: a stage that was finished, and one that was cut off.
    folder, around = RunFolder(tmp_path / "tiny"), environment(videos, times=4, stages=2)

    def published() -> bool:
        events = read_events(folder.root)
        return any(e["kind"] == "publish" and e["stage"] == "hunyuan-dit" for e in events)

    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(
            [*command, "--cpus", "1", "--latents", bucket.root],
            env=around,
            stdout=log,
            stderr=log,
        )
        wait_until(published, f"a checkpoint; {tmp_path}/first.log", 180)
        family = psutil.Process(first.pid).children(recursive=True)
        agents = [p for p in family if "Agent" in " ".join(p.cmdline())]
        found = listening(family)  # the group that trains among them
        assert len(found) > 5
        assert [address for address in found if not is_loopback(address)] == []
        kept = [p.environ()["RAY_AUTH_TOKEN_PATH"] for p in family if p.name() == "raylet"]
        secret = Path(kept[0]).read_text()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    # Ray's agents try to reach the dead head for a minute or two; the next driver ends them.
    busy = [p for p in family if p not in agents]
    assert len(busy) > 5
    wait_until(lambda: not alive(busy), f"the end of {len(busy)} processes", 30)
    second = subprocess.run(
        [*command, "--cpus", "2"],
        env=around,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert second.returncode == 0, second.stderr[-4000:]
    assert not alive(family)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    check_finished_run(folder)
    assert folder.latents == f"{bucket.root}/tiny/latents"
    assert not (folder.root / "latents").exists()
    starts = [e for e in read_events(folder.root) if e["kind"] == "start"]
    assert [e["stage"] for e in starts].count("hunyuan-vae") == 1, "finished stages stay finished"
    again = [e for e in starts if e["stage"] == "hunyuan-dit"]
    assert len(again) == 2
    assert again[1]["position"], "it went on from a checkpoint"
    require_repair(folder, around)
