"""The rally of supervisors, with threads in their place: real sockets, no Ray, no torch."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from typing import Any

import pytest

from elastic.rally import (
    Abort,
    Address,
    Begin,
    Clear,
    Disband,
    Done,
    Loss,
    Over,
    Rally,
    join,
)

DEADLINE_S = 20.0


def hear(member: Any) -> Any:
    assert member.poll(DEADLINE_S), "nothing was said"
    return member.recv()


@contextmanager
def rally(size: int, may_go_on: Callable[[Loss], bool] = lambda loss: True) -> Iterator[list[Any]]:
    kept = Rally("127.0.0.1", size, may_go_on)
    members = [join(kept.address, rank) for rank in range(size)]
    try:
        yield members
    finally:
        for member in members:
            member.close()


def begun(members: list[Any]) -> Begin:
    (word,) = set(map(hear, members))
    assert isinstance(word, Begin)
    return word


def test_a_life_in_which_all_finish_is_the_last() -> None:
    with rally(3) as members:
        assert begun(members).life == 1
        for member in members:
            member.send(Over("finished"))
        assert [hear(member) for member in members] == [Done()] * 3


def test_a_lost_process_ends_all_and_the_next_life_begins_when_all_are_gone() -> None:
    losses: list[Loss] = []
    with rally(3, lambda loss: not losses.append(loss)) as members:
        first = begun(members)
        members[1].send(Over("crashed", "killed by SIGKILL", died=True))
        assert {type(hear(member)) for member in members} == {Abort}
        for member in members[:2]:
            member.send(Clear())
        assert not members[0].poll(0.2), "one of the processes still lives"
        members[2].send(Clear())
        second = begun(members)
        assert second.life == 2
        assert second.port != first.port, "nobody finds the store of a life that is over"
    assert losses == [Loss(1, 1, "killed by SIGKILL", is_hang=False)]


def test_who_died_is_the_cause_though_the_others_complain_first() -> None:
    losses: list[Loss] = []
    with rally(3, lambda loss: not losses.append(loss)) as members:
        begun(members)
        members[0].send(Over("crashed", "connection closed by peer"))
        hear(members[0])
        members[2].send(Over("crashed", "killed by SIGKILL", died=True))
        for member in members:
            member.send(Clear())
        for member in members[1:]:
            assert isinstance(hear(member), Abort)
        begun(members)
    assert [loss.reason for loss in losses] == ["killed by SIGKILL"]


def test_a_hang_asks_for_stacks() -> None:
    with rally(2) as members:
        begun(members)
        members[0].send(Over("hung", "silent for 60 s"))
        assert hear(members[1]) == Abort("rank 0: silent for 60 s", is_hang=True)


def test_a_group_that_loses_too_many_lives_is_disbanded() -> None:
    with rally(2, lambda loss: loss.life < 2) as members:
        for _ in range(2):
            begun(members)
            members[0].send(Over("crashed", "exit code 1"))
            assert isinstance(hear(members[0]), Abort)
            assert isinstance(hear(members[1]), Abort)
            for member in members:
                member.send(Clear())
        assert {hear(member) for member in members} == {Disband("Regroup", "rank 0: exit code 1")}


@pytest.mark.parametrize("kind", ["StageBlocked", "InputError"])
def test_what_would_only_repeat_reaches_every_supervisor_as_it_is(kind: str) -> None:
    with rally(2) as members:
        begun(members)
        members[0].send(Over("crashed", "lost a peer"))
        hear(members[0])
        members[1].send(Over(kind, "lower optimizer.lr"))
        for member in members:
            member.send(Clear())
        assert isinstance(hear(members[1]), Abort)
        assert {hear(member) for member in members} == {Disband(kind, "lower optimizer.lr")}


def test_a_lost_supervisor_disbands_the_group() -> None:
    with rally(3) as members:
        begun(members)
        members[1].close()
        for member in (members[0], members[2]):
            word = hear(member)
            assert isinstance(word, Disband)
            assert word.kind == "Regroup"
            assert "rank 1" in word.reason


def test_a_supervisor_that_is_lost_while_processes_are_ended_disbands_the_group() -> None:
    with rally(2) as members:
        begun(members)
        members[0].send(Over("crashed", "exit code 1"))
        hear(members[0])
        members[1].close()
        assert isinstance(hear(members[0]), Disband)


def test_strangers_are_turned_away_and_hold_up_nobody() -> None:
    kept = Rally("127.0.0.1", 1, lambda loss: True)
    host, port, _ = kept.address
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        join(Address(host, port, b"guess"), 0).recv()
    with (
        socket.create_connection((host, port)) as talking,
        socket.create_connection((host, port)),  # says nothing at all
    ):
        talking.sendall(b"GET / HTTP/1.1\r\n\r\n")
        member = join(kept.address, 0)
        assert isinstance(hear(member), Begin)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, port))
    member.close()


def test_an_error_in_the_rally_itself_disbands_the_group() -> None:
    def broken(loss: Loss) -> bool:
        raise ValueError("the tracker is gone")

    with rally(1, broken) as members:
        begun(members)
        members[0].send(Over("crashed", "exit code 1"))
        hear(members[0])
        members[0].send(Clear())
        assert hear(members[0]) == Disband("Regroup", "the tracker is gone")
