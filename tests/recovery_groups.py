"""Which faults the runs of tests/bench/recovery.py meet, where, and in which order."""

import signal
from dataclasses import dataclass, field

from elastic_driver import CODEC, DIT
from recovery_faults import (
    Fault,
    add_node,
    at_switch,
    begin_another_attempt,
    damage_every,
    damage_newest,
    drain_and_kill,
    drain_node,
    fill_disk_awhile,
    fill_disk_for_good,
    flip_a_bit,
    freeze_awhile,
    freeze_driver_awhile,
    freeze_role,
    from_inside,
    half_delete,
    kill_after_resize,
    kill_all_ranks,
    kill_first_trainer,
    kill_host,
    kill_in_resize,
    kill_role,
    kill_twice,
    kill_while_restoring,
    lose_node,
    lose_raylet,
    refuse_writes,
    send_driver,
    send_rank,
    tear_manifest,
    truncate,
    while_saving,
)

from cluster import faults


@dataclass(frozen=True)
class Group:
    """Faults that one run of the plan meets, by stage, in this order."""

    name: str
    codec: tuple[Fault, ...] = ()
    switch: tuple[Fault, ...] = ()
    """Between the end of the first stage and the first update of the second."""
    dit: tuple[Fault, ...] = ()
    small_disk: bool = field(default=False)
    dit_updates: int = 480
    """Of the second stage: enough that all faults come before its end."""

    @property
    def all(self) -> list[tuple[str, Fault]]:
        """Every fault with where it happens."""
        named = ((CODEC, self.codec), ("switch", self.switch), (DIT, self.dit))
        return [(where, fault) for where, found in named for fault in found]


_EVERY_STAGE = (
    Fault("first rank killed", send_rank(0)),
    Fault("last rank killed", send_rank(-1)),
    Fault("last rank frozen", send_rank(-1, signal.SIGSTOP)),
    Fault("error in a rank", from_inside("exception")),
    Fault("loss is NaN", from_inside("nan"), shows="updates"),
    Fault("rank ends by itself", from_inside("exit", code=7)),
    Fault("rank killed while saving", while_saving(send_rank(0))),
)
GROUPS = (
    Group(
        "processes",
        codec=_EVERY_STAGE,
        dit=(
            *_EVERY_STAGE,
            Fault("all ranks killed", kill_all_ranks),
            Fault("first rank hangs in Python", from_inside("hang")),
            Fault("rank frozen while saving", while_saving(send_rank(-1, signal.SIGSTOP))),
            Fault("rank killed while restoring", kill_while_restoring),
            Fault("killed again at the restart", kill_twice),
            Fault("clock an hour forward", from_inside("clock", seconds=3600), shows="updates"),
            Fault("clock an hour back", from_inside("clock", seconds=-3600), shows="updates"),
        ),
    ),
    Group(
        "ray",
        codec=(
            Fault("supervisor killed", kill_role("supervisor")),
            Fault("tracker killed", kill_role("tracker"), shows="updates"),
            Fault("fork host killed", kill_host),
        ),
        dit=(
            Fault("supervisor killed", kill_role("supervisor")),
            Fault("supervisor frozen", freeze_role("supervisor")),
            Fault("fork host killed", kill_host),
            Fault("tracker killed", kill_role("tracker"), shows="updates"),
            Fault("tracker frozen a while", freeze_awhile("tracker"), shows="updates"),
            Fault("coordinator killed", kill_role("coordinator"), shows="updates"),
            Fault("controller frozen a while", freeze_awhile("controller"), shows="updates"),
            Fault("controller killed", kill_role("controller")),
        ),
    ),
    Group(
        "nodes",
        codec=(
            Fault("node lost", lose_node),
            Fault("node added", add_node),
        ),
        dit=(
            Fault("node lost", lose_node),
            Fault("node added", add_node),
            Fault("node drained", drain_node),
            Fault("rank killed while a node joins", kill_in_resize),
            Fault("rank killed while a node drains", drain_and_kill),
            Fault("node added again", add_node),
            Fault("rank killed right after a resize", kill_after_resize),
            Fault("node added once more", add_node),
            Fault("node lost while saving", while_saving(lose_node)),
            Fault("node added at last", add_node),
            Fault("raylet killed", lose_raylet(faults.kill)),
        ),
    ),
    Group(
        "drivers",
        codec=(Fault("driver killed", send_driver(signal.SIGKILL), ends_driver=True),),
        switch=(
            Fault("driver killed", at_switch("encode_start", send_driver(signal.SIGKILL)),
                  ends_driver=True),
            Fault("rank killed", at_switch("launch", kill_first_trainer), shows="updates"),
        ),
        dit=(
            Fault("driver killed", send_driver(signal.SIGKILL), ends_driver=True),
            Fault("driver killed while saving", while_saving(send_driver(signal.SIGKILL)),
                  ends_driver=True),
            Fault("driver interrupted", send_driver(signal.SIGINT), ends_driver=True),
            Fault("driver frozen a while", freeze_driver_awhile, shows="updates"),
            Fault("head killed", kill_role("head"), ends_driver=True),
            Fault("raylet of the head killed", kill_role("raylet", 0), ends_driver=True),
        ),
    ),
    Group(
        "storage",
        small_disk=True,
        dit_updates=1600,  # training goes on while a disk is full
        codec=(Fault("disk full a while", fill_disk_awhile(200_000, 6.0), shows="publish"),),
        switch=(Fault("node lost", at_switch("encode_start", lose_node), shows="updates"),),
        dit=(
            Fault("node added", add_node),
            Fault("disk full a while", fill_disk_awhile(1_000_000, 8.0), shows="publish"),
            Fault("disk full to the last byte", fill_disk_awhile(0, 6.0), shows="publish"),
            Fault("disk full for good", fill_disk_for_good, shows="publish"),
            Fault("storage refuses writes a while", refuse_writes, shows="publish"),
            Fault("newest checkpoint has a flipped bit", damage_newest(flip_a_bit), shows="damage"),
            Fault("newest checkpoint is cut off", damage_newest(truncate), shows="damage"),
            Fault("newest checkpoint lacks a file", damage_newest(half_delete), shows="damage"),
            Fault("newest manifest is torn", damage_newest(tear_manifest), shows="damage"),
            Fault("every checkpoint is damaged", damage_every),
            Fault("another attempt has begun", begin_another_attempt, shows="publish"),
        ),
    ),
)  # fmt: skip
