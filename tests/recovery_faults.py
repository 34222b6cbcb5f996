"""The faults of tests/bench/recovery.py: what is done to a run, when, and what shows its end."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import planned_faults
import psutil
from elastic_driver import BATCH, DIT, Driver

from cluster import faults
from cluster.faults import SmallDisk
from elastic.checkpoint_ram import SHM
from elastic.journal import read_events

HANG_S = 4.0  # silence after which the runs call a hang
_MOMENT_S = 60.0  # for a moment that is waited for: a save, a restart
_AWHILE_S = 3.0  # for which something refuses or is frozen, less than what counts as a hang


@dataclass
class Scene:
    """Where a fault happens: the run, the stage, and what there is to break."""

    driver: Driver
    stage: str
    planned: Path
    draw: random.Random
    nodes: list[str]
    disk: SmallDisk | None = None
    number: int = 0  # of nodes that were added
    repair: Callable[[], None] | None = None
    """What a person would do after the message, before starting again."""

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return self.driver.folder.stage(self.stage)

    def role(self, name: str) -> list[int]:
        """Processes that do this, the oldest first."""
        return self.driver.roles()[name]

    def count(self, kind: str) -> int:
        """Events of this kind so far."""
        return sum(event["kind"] == kind for event in read_events(self.driver.folder.root))

    def wait_for(self, kind: str, act: Callable[[], object]) -> None:
        """Do something, and return at the event that follows from it."""
        before = self.count(kind)
        act()
        _at(lambda: self.count(kind) > before, f"event {kind!r}")

    def next_position(self) -> int:
        """A little ahead of what has been trained."""
        return self.driver.position(self.stage) + 2 * BATCH[self.stage]


Do = Callable[[Scene], None]


@dataclass(frozen=True)
class Fault:
    """One fault; `shows` is what has to follow before it counts as over.

    `attempt`: new updates by a new attempt; `updates`: new updates; `publish`: a new checkpoint;
    `damage`: a new attempt that has named a damaged checkpoint.
    """

    name: str
    do: Do
    shows: Literal["attempt", "updates", "publish", "damage"] = "attempt"
    ends_driver: bool = False
    """Whether the driver itself is what dies: the next one has to go on."""


def _at(true: Callable[[], bool], what: str) -> None:
    if not faults.when(true, _MOMENT_S):
        raise TimeoutError(f"the moment did not come within {_MOMENT_S:.0f} s: {what}")


def send_rank(rank: int, number: int = signal.SIGKILL) -> Do:
    return lambda scene: os.kill(scene.driver.pids()[rank], number)


def kill_all_ranks(scene: Scene) -> None:
    for pid in scene.driver.pids():
        faults.kill(pid)


def while_saving(act: Do) -> Do:
    def do(scene: Scene) -> None:
        _at(lambda: faults.is_saving(scene.folder), "a save")
        act(scene)

    return do


def _new_trainers(scene: Scene) -> list[int]:
    """Kill a rank and return the processes that take the place, as soon as they are there."""
    before = set(scene.role("trainer")) or set(scene.driver.pids())
    faults.kill(scene.driver.pids()[-1])
    _at(lambda: bool(set(_trainers(scene)) - before), "a new training process")
    return sorted(set(_trainers(scene)) - before)


def _trainers(scene: Scene) -> list[int]:
    return scene.role("trainer") or scene.role("supervisor")


def kill_while_restoring(scene: Scene) -> None:
    faults.kill(_new_trainers(scene)[-1])


def kill_twice(scene: Scene) -> None:
    scene.wait_for("start", lambda: faults.kill(scene.driver.pids()[-1]))
    faults.kill(scene.driver.pids()[0])


def from_inside(kind: str, **more: object) -> Do:
    def do(scene: Scene) -> None:
        position = scene.next_position()
        path = planned_faults.plan(scene.planned, kind, scene.stage, position, **more)
        _at(lambda: not path.exists(), f"{kind} in a training process")

    return do


def kill_role(role: str, which: int = -1) -> Do:
    return lambda scene: faults.kill(scene.role(role)[which])


def kill_host(scene: Scene) -> None:
    """Kill the warm process from which a training process was forked."""
    faults.kill(psutil.Process(scene.driver.pids()[-1]).ppid())


def freeze_role(role: str, which: int = -1) -> Do:
    return lambda scene: faults.freeze(scene.role(role)[which])


def freeze_awhile(role: str, which: int = -1) -> Do:
    def do(scene: Scene) -> None:
        pid = scene.role(role)[which]
        faults.freeze(pid)
        time.sleep(_AWHILE_S)
        faults.thaw(pid)

    return do


def lose_node(scene: Scene) -> None:
    scene.driver.tell("kill_node", node=scene.nodes.pop())


def lose_raylet(act: Callable[[int], None]) -> Do:
    def do(scene: Scene) -> None:
        scene.nodes.pop()
        act(scene.role("raylet")[-1])  # that of the newest node: the driver numbers none of them

    return do


def add_node(scene: Scene) -> None:
    scene.number += 1
    scene.nodes.append(f"added-{scene.number}")
    scene.driver.tell("add", node=scene.nodes[-1])


def drain_node(scene: Scene) -> None:
    scene.driver.tell("drain", node=scene.nodes.pop(), seconds=8)


def drain_and_kill(scene: Scene) -> None:
    drain_node(scene)
    faults.kill(scene.driver.pids()[0])


def kill_in_resize(scene: Scene) -> None:
    scene.wait_for("resize_requested", lambda: add_node(scene))
    faults.kill(scene.driver.pids()[0])


def kill_after_resize(scene: Scene) -> None:
    scene.wait_for("launch", lambda: drain_node(scene))
    before = set(_trainers(scene))
    _at(lambda: bool(set(_trainers(scene)) - before), "a training process of the new size")
    faults.kill(sorted(set(_trainers(scene)) - before)[0])


def _kill_rank_and_node(scene: Scene) -> None:
    faults.kill(scene.driver.pids()[0])
    lose_node(scene)


def send_driver(number: int) -> Do:
    return lambda scene: os.kill(scene.driver.process.pid, number)


def freeze_driver_awhile(scene: Scene) -> None:
    faults.freeze(scene.driver.process.pid)
    time.sleep(_AWHILE_S)
    faults.thaw(scene.driver.process.pid)


def fill_disk_awhile(leave_bytes: int, seconds: float) -> Do:
    def do(scene: Scene) -> None:
        assert scene.disk is not None, "the group has a small disk"
        scene.repair = scene.disk.free
        scene.disk.fill(leave_bytes)
        faults.when(lambda: scene.driver.process.poll() is not None, seconds)
        scene.disk.free()

    return do


def fill_disk_for_good(scene: Scene) -> None:
    """And have a save wanted that must not fail: that before a resize."""
    assert scene.disk is not None, "the group has a small disk"
    scene.repair = scene.disk.free
    scene.disk.fill(1_000_000)
    add_node(scene)


def refuse_writes(scene: Scene) -> None:
    with faults.refusing_writes(scene.folder / "checkpoints"):
        faults.when(lambda: scene.driver.process.poll() is not None, 2 * _AWHILE_S)


def _newest(scene: Scene) -> Path:
    folders = [p for p in (scene.folder / "checkpoints").glob("*/") if p.name.isdecimal()]
    return max(folders, key=lambda folder: int(folder.name))


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def damage_newest(damage: Callable[[Path], None]) -> Do:
    """Damage the newest checkpoint right after it was published, and have it wanted."""

    def do(scene: Scene) -> None:
        scene.wait_for("publish", lambda: None)
        for pid in scene.driver.pids():
            faults.freeze(pid)  # so that it stays the newest
        damage(_newest(scene))
        forget_copies()
        _all_ranks_if_alive(scene)

    return do


def forget_copies() -> None:
    """Remove what the nodes keep in memory, which is read before the storage is."""
    for folder in SHM.glob(f"restage-{os.getuid()}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _all_ranks_if_alive(scene: Scene) -> None:
    faults.end_all(scene.driver.pids())


def flip_a_bit(folder: Path) -> None:
    with _largest(folder).open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def truncate(folder: Path) -> None:
    os.truncate(_largest(folder), 1000)


def half_delete(folder: Path) -> None:
    _largest(folder).unlink()


def tear_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def damage_every(scene: Scene) -> None:
    """Not one is left: starting over in silence would be the worst answer."""
    kept = scene.folder / "kept"
    scene.wait_for("publish", lambda: None)
    for pid in scene.driver.pids():
        faults.freeze(pid)
    whole = [p for p in (scene.folder / "checkpoints").glob("*/") if p.name.isdecimal()]
    shutil.copytree(scene.folder / "checkpoints", kept)
    for folder in whole:
        half_delete(folder)

    def put_back() -> None:
        shutil.rmtree(scene.folder / "checkpoints")
        kept.rename(scene.folder / "checkpoints")

    scene.repair = put_back
    forget_copies()
    _all_ranks_if_alive(scene)


def begin_another_attempt(scene: Scene) -> None:
    """Another driver has begun the stage, unseen: this one may publish nothing more."""
    path = scene.folder / "attempt.json"
    before = json.loads(path.read_text())
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({**before, "attempt": before["attempt"] + 1}))
    aside.rename(path)


def at_switch(kind: str, act: Do) -> Do:
    """At an event of the second stage before its first update."""

    def do(scene: Scene) -> None:
        root = scene.driver.folder.root
        _at(
            lambda: any(e["kind"] == kind and e["stage"] == DIT for e in read_events(root)),
            f"{kind!r} of {DIT}",
        )
        act(scene)

    return do


def kill_first_trainer(scene: Scene) -> None:
    _at(lambda: bool(_trainers(scene)), "a training process")
    faults.kill(_trainers(scene)[0])
