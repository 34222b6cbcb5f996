"""The faults of tests/bench/recovery.py: what is done to a run, when, and what shows its end."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import planned_faults
from elastic_driver import BATCH, CODEC, DIT, Driver

from cluster import faults
from cluster.faults import SmallDisk
from elastic.journal import read_events

HANG_S = 6.0  # silence after which the runs call a hang
_MOMENT_S = 60.0  # for a moment that is waited for: a save, a restart
_AWHILE_S = 4.0  # for which something refuses or is frozen, less than what counts as a hang


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

    `attempt`: new updates by a new attempt; `updates`: new updates; `publish`: a new checkpoint.
    """

    name: str
    do: Do
    shows: Literal["attempt", "updates", "publish"] = "attempt"
    ends_driver: bool = False
    """Whether the driver itself is what dies: the next one has to go on."""


@dataclass(frozen=True)
class Group:
    """Faults that one run of the plan meets, by stage, in this order."""

    name: str
    codec: tuple[Fault, ...] = ()
    switch: tuple[Fault, ...] = ()
    """Between the end of the first stage and the first update of the second."""
    dit: tuple[Fault, ...] = ()
    small_disk: bool = field(default=False)

    @property
    def all(self) -> list[tuple[str, Fault]]:
        """Every fault with where it happens."""
        named = ((CODEC, self.codec), ("switch", self.switch), (DIT, self.dit))
        return [(where, fault) for where, found in named for fault in found]


def _at(true: Callable[[], bool], what: str) -> None:
    if not faults.when(true, _MOMENT_S):
        raise TimeoutError(f"the moment did not come within {_MOMENT_S:.0f} s: {what}")


def _signal(rank: int, number: int = signal.SIGKILL) -> Do:
    return lambda scene: os.kill(scene.driver.pids()[rank], number)


def _all_ranks(scene: Scene) -> None:
    for pid in scene.driver.pids():
        faults.kill(pid)


def _while_saving(act: Do) -> Do:
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


def _while_restoring(scene: Scene) -> None:
    faults.kill(_new_trainers(scene)[-1])


def _twice(scene: Scene) -> None:
    scene.wait_for("start", lambda: faults.kill(scene.driver.pids()[-1]))
    faults.kill(scene.driver.pids()[0])


def _planned(kind: str, **more: object) -> Do:
    def do(scene: Scene) -> None:
        position = scene.next_position()
        path = planned_faults.plan(scene.planned, kind, scene.stage, position, **more)
        _at(lambda: not path.exists(), f"{kind} in a training process")

    return do


def _kill_role(role: str, which: int = -1) -> Do:
    return lambda scene: faults.kill(scene.role(role)[which])


def _freeze_role(role: str, which: int = -1) -> Do:
    return lambda scene: faults.freeze(scene.role(role)[which])


def _freeze_awhile(role: str, which: int = -1) -> Do:
    def do(scene: Scene) -> None:
        pid = scene.role(role)[which]
        faults.freeze(pid)
        time.sleep(_AWHILE_S)
        faults.thaw(pid)

    return do


def _lose_node(scene: Scene) -> None:
    scene.driver.tell("kill_node", node=scene.nodes.pop())


def _lose_raylet(act: Callable[[int], None]) -> Do:
    def do(scene: Scene) -> None:
        scene.nodes.pop()
        act(scene.role("raylet")[-1])  # that of the newest node: the driver numbers none of them

    return do


def _add_node(scene: Scene) -> None:
    scene.number += 1
    scene.nodes.append(f"added-{scene.number}")
    scene.driver.tell("add", node=scene.nodes[-1])


def _drain(scene: Scene) -> None:
    scene.driver.tell("drain", node=scene.nodes.pop(), seconds=8)


def _drain_and_kill(scene: Scene) -> None:
    _drain(scene)
    faults.kill(scene.driver.pids()[0])


def _kill_in_resize(scene: Scene) -> None:
    scene.wait_for("resize_requested", lambda: _add_node(scene))
    faults.kill(scene.driver.pids()[0])


def _kill_after_resize(scene: Scene) -> None:
    scene.wait_for("launch", lambda: _drain(scene))
    before = set(_trainers(scene))
    _at(lambda: bool(set(_trainers(scene)) - before), "a training process of the new size")
    faults.kill(sorted(set(_trainers(scene)) - before)[0])


def _kill_rank_and_node(scene: Scene) -> None:
    faults.kill(scene.driver.pids()[0])
    _lose_node(scene)


def _driver(number: int) -> Do:
    return lambda scene: os.kill(scene.driver.process.pid, number)


def _driver_awhile(scene: Scene) -> None:
    faults.freeze(scene.driver.process.pid)
    time.sleep(_AWHILE_S)
    faults.thaw(scene.driver.process.pid)


def _disk_full(leave_bytes: int, seconds: float) -> Do:
    def do(scene: Scene) -> None:
        assert scene.disk is not None, "the group has a small disk"
        scene.repair = scene.disk.free
        scene.disk.fill(leave_bytes)
        faults.when(lambda: scene.driver.process.poll() is not None, seconds)
        scene.disk.free()

    return do


def _disk_full_for_good(scene: Scene) -> None:
    assert scene.disk is not None, "the group has a small disk"
    scene.repair = scene.disk.free
    scene.disk.fill(1_000_000)


def _refusing(scene: Scene) -> None:
    with faults.refusing_writes(scene.folder / "checkpoints"):
        faults.when(lambda: scene.driver.process.poll() is not None, 2 * _AWHILE_S)


def _newest(scene: Scene) -> Path:
    folders = [p for p in (scene.folder / "checkpoints").glob("*/") if p.name.isdecimal()]
    return max(folders, key=lambda folder: int(folder.name))


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def _damaged(damage: Callable[[Path], None]) -> Do:
    """Damage the newest checkpoint right after it was published, and have it wanted."""

    def do(scene: Scene) -> None:
        scene.wait_for("publish", lambda: None)
        damage(_newest(scene))
        faults.end_all(scene.role("host"))  # with them what a node keeps in memory
        _all_ranks_if_alive(scene)

    return do


def _all_ranks_if_alive(scene: Scene) -> None:
    faults.end_all(scene.driver.pids())


def _flip_a_bit(folder: Path) -> None:
    with _largest(folder).open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def _truncate(folder: Path) -> None:
    os.truncate(_largest(folder), 1000)


def _half_delete(folder: Path) -> None:
    _largest(folder).unlink()


def _tear_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def _damage_all(scene: Scene) -> None:
    """Not one is left: starting over in silence would be the worst answer."""
    kept = scene.folder / "kept"
    scene.wait_for("publish", lambda: None)
    whole = [p for p in (scene.folder / "checkpoints").glob("*/") if p.name.isdecimal()]
    shutil.copytree(scene.folder / "checkpoints", kept)
    for folder in whole:
        _half_delete(folder)

    def put_back() -> None:
        shutil.rmtree(scene.folder / "checkpoints")
        kept.rename(scene.folder / "checkpoints")

    scene.repair = put_back
    faults.end_all(scene.role("host"))
    _all_ranks_if_alive(scene)


def _another_attempt(scene: Scene) -> None:
    """Another driver has begun the stage, unseen: this one may publish nothing more."""
    path = scene.folder / "attempt.json"
    number = json.loads(path.read_text())["attempt"]
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({"attempt": number + 1}))
    aside.rename(path)


def _at_switch(kind: str, act: Do) -> Do:
    """At an event of the second stage before its first update."""

    def do(scene: Scene) -> None:
        root = scene.driver.folder.root
        _at(
            lambda: any(e["kind"] == kind and e["stage"] == DIT for e in read_events(root)),
            f"{kind!r} of {DIT}",
        )
        act(scene)

    return do


def _first_trainer(scene: Scene) -> None:
    _at(lambda: bool(_trainers(scene)), "a training process")
    faults.kill(_trainers(scene)[0])


_EVERY_STAGE = (
    Fault("first rank killed", _signal(0)),
    Fault("last rank killed", _signal(-1)),
    Fault("last rank frozen", _signal(-1, signal.SIGSTOP)),
    Fault("error in a rank", _planned("exception")),
    Fault("loss is NaN", _planned("nan"), shows="updates"),
    Fault("rank ends by itself", _planned("exit", code=7)),
    Fault("rank killed while saving", _while_saving(_signal(0))),
)
GROUPS = (
    Group(
        "processes",
        codec=_EVERY_STAGE,
        dit=(
            *_EVERY_STAGE,
            Fault("all ranks killed", _all_ranks),
            Fault("first rank hangs in Python", _planned("hang")),
            Fault("rank frozen while saving", _while_saving(_signal(-1, signal.SIGSTOP))),
            Fault("rank killed while restoring", _while_restoring),
            Fault("killed again at the restart", _twice),
            Fault("clock an hour forward", _planned("clock", seconds=3600), shows="updates"),
            Fault("clock an hour back", _planned("clock", seconds=-3600), shows="updates"),
        ),
    ),
    Group(
        "ray",
        codec=(
            Fault("supervisor killed", _kill_role("supervisor")),
            Fault("tracker killed", _kill_role("tracker"), shows="updates"),
            Fault("fork host killed", _kill_role("host")),
        ),
        dit=(
            Fault("supervisor killed", _kill_role("supervisor")),
            Fault("supervisor frozen", _freeze_role("supervisor")),
            Fault("fork host killed", _kill_role("host")),
            Fault("tracker killed", _kill_role("tracker"), shows="updates"),
            Fault("tracker frozen a while", _freeze_awhile("tracker"), shows="updates"),
            Fault("coordinator killed", _kill_role("coordinator"), shows="updates"),
            Fault("controller frozen a while", _freeze_awhile("controller"), shows="updates"),
            Fault("controller killed", _kill_role("controller")),
        ),
    ),
    Group(
        "nodes",
        codec=(
            Fault("node lost", _lose_node),
            Fault("node added", _add_node),
        ),
        dit=(
            Fault("node lost", _lose_node),
            Fault("node added", _add_node),
            Fault("node drained", _drain),
            Fault("rank killed while a node joins", _kill_in_resize),
            Fault("rank killed while a node drains", _drain_and_kill),
            Fault("node added again", _add_node),
            Fault("rank killed right after a resize", _kill_after_resize),
            Fault("node added once more", _add_node),
            Fault("node lost while saving", _while_saving(_lose_node)),
            Fault("node added at last", _add_node),
            Fault("raylet killed", _lose_raylet(faults.kill)),
        ),
    ),
    Group(
        "drivers",
        codec=(Fault("driver killed", _driver(signal.SIGKILL), ends_driver=True),),
        switch=(
            Fault("driver killed", _at_switch("encode_start", _driver(signal.SIGKILL)),
                  ends_driver=True),
            Fault("rank killed", _at_switch("launch", _first_trainer), shows="updates"),
        ),
        dit=(
            Fault("driver killed", _driver(signal.SIGKILL), ends_driver=True),
            Fault("driver killed while saving", _while_saving(_driver(signal.SIGKILL)),
                  ends_driver=True),
            Fault("driver interrupted", _driver(signal.SIGINT), ends_driver=True),
            Fault("driver frozen a while", _driver_awhile, shows="updates"),
            Fault("head killed", _kill_role("head"), ends_driver=True),
            Fault("raylet of the head killed", _kill_role("raylet", 0), ends_driver=True),
        ),
    ),
    Group(
        "storage",
        small_disk=True,
        codec=(Fault("disk full a while", _disk_full(200_000, 6.0), shows="publish"),),
        switch=(Fault("node lost", _at_switch("encode_start", _lose_node), shows="updates"),),
        dit=(
            Fault("node added", _add_node),
            Fault("disk full a while", _disk_full(1_000_000, 8.0), shows="publish"),
            Fault("disk full to the last byte", _disk_full(0, 6.0), shows="publish"),
            Fault("disk full for good", _disk_full_for_good, shows="publish"),
            Fault("storage refuses writes a while", _refusing, shows="publish"),
            Fault("newest checkpoint has a flipped bit", _damaged(_flip_a_bit)),
            Fault("newest checkpoint is cut off", _damaged(_truncate)),
            Fault("newest checkpoint lacks a file", _damaged(_half_delete)),
            Fault("newest manifest is torn", _damaged(_tear_manifest)),
            Fault("every checkpoint is damaged", _damage_all),
            Fault("another attempt has begun", _another_attempt, shows="publish"),
        ),
    ),
)  # fmt: skip
