"""Asking the driver of a run to end: by a small file in the run folder, which the driver looks for.

Whoever sees the run folder can ask, from any machine. Neither Ray nor torch is imported here.
"""

import fcntl
import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from elastic.errors import InputError, RunStopped
from elastic.files import write_atomic
from elastic.journal import EVENTS, Event, read_events

_REQUEST, _LOCK = "stop.json", ".driver.lock"
_SAVE_S = 600.0  # as before a resize
_ANSWER_S = 60.0  # a mounted folder may show a new file late
_END_S = 120.0  # for the last lines and processes of a driver
_LOOK_EVERY_S = 0.5
_TRIES, _TRY_AGAIN_S = 5, 0.1


class StopRequest(NamedTuple):
    """Somebody's wish that the driver of a run end."""

    id: str
    saves: bool  # publish a checkpoint first
    by: str
    wall: float

    def text(self) -> str:
        """For the journal and for `status`."""
        how = "after a save" if self.saves else "without a save"
        at = time.strftime("%H:%M:%S", time.localtime(self.wall))
        return f"asked by {self.by} at {at}, {how}"


def ask(root: Path, saves: bool) -> StopRequest:
    """Ask the driver of the run at `root`; it answers with an event that carries the id."""
    by = f"{getpass.getuser()}@{socket.gethostname()}"
    request = StopRequest(uuid.uuid4().hex, saves, by, time.time())
    write_atomic(root / _REQUEST, json.dumps(request._asdict()).encode())
    return request


def asked(root: Path) -> StopRequest | None:
    """What was asked of the run's driver last and is not done yet, if anything."""
    try:
        return StopRequest(**json.loads((root / _REQUEST).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError):
        return None  # not of this version, or the mount is away: looked at again soon


def is_to_save(root: Path) -> bool:
    """Whether the group that trains now is to publish a checkpoint and train no more."""
    request = asked(root)
    return request is not None and request.saves


def forget(root: Path) -> None:
    """Nothing is asked any more."""
    (root / _REQUEST).unlink(missing_ok=True)


class StopWatch:
    """The driver's side: ends its main thread with RunStopped when that has been asked for."""

    def __init__(self, root: Path, event: Callable[..., None]) -> None:
        self._root = root
        self._event = event
        self._told: StopRequest | None = None
        self._since = 0.0

    def look(self, stage: str | None, is_training: bool, is_saved: bool) -> None:
        """To be called again and again; a group that trains is waited for if it is to save."""
        request = asked(self._root)
        if request is None:
            return
        if request != self._told:
            self._told, self._since = request, time.monotonic()
            self._event("stop_requested", stage, reason=request.text(), what=request.id)
        if not request.saves or not is_training or is_saved:
            raise RunStopped(f"stopped, as {request.text()}")
        if time.monotonic() - self._since > _SAVE_S:
            raise RunStopped(
                f"stopped, as {request.text()}; the workers did not save within {_SAVE_S:.0f} s"
            )


@contextmanager
def driven(root: Path) -> Iterator[None]:
    """Hold the run for this driver alone; InputError if another one holds it.

    The lock notes this machine, for those who see the folder from another one.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = (root / _LOCK).open("a+")
    except OSError as error:
        raise InputError(
            f"storage {str(root.parent)!r} cannot be written ({error.strerror}); "
            "choose another folder with --storage"
        ) from None
    with handle:
        # `has_driver` of somebody else holds it for a moment.
        if not any(_locked(handle.fileno(), fcntl.LOCK_EX, n) for n in range(_TRIES)):
            raise InputError(
                f"run {str(root)!r} is in the hands of another driver on this machine; "
                "wait for it, or look with python -m elastic status"
            )
        handle.truncate(0)
        handle.write(_machine())
        handle.flush()
        os.fsync(handle.fileno())  # other machines look at it
        forget(root)  # it was asked of a driver that is gone
        try:
            yield
        finally:
            handle.truncate(0)


def _locked(file: int, how: int, num_before: int) -> bool:
    if num_before:
        time.sleep(_TRY_AGAIN_S)
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def has_driver(root: Path) -> bool | None:
    """Whether a driver has the run; None if one of another machine may have it."""
    try:
        handle = (root / _LOCK).open()
    except FileNotFoundError:
        return False
    with handle:
        if not _locked(handle.fileno(), fcntl.LOCK_SH, 0):
            return True
        return None if handle.read() not in ("", _machine()) else False


def _machine() -> str:
    """This machine since it was started; what shares a kernel shares its locks."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def stop_run(root: Path, saves: bool, say: Callable[[str], None]) -> bool:
    """Ask the driver of a run to end, and wait until it has; whether it has."""
    if has_driver(root) is False:
        say(f"no driver has run {str(root)!r}: there is nothing to stop")
        return False
    num_before = len(read_events(root))  # the group may have saved before the driver has answered
    request = ask(root, saves)
    say(f"asked the driver of {str(root)!r} to stop {'after a save' if saves else 'now'}")
    answered_by = time.monotonic() + _ANSWER_S
    ended_by = answered_by + _END_S + (_SAVE_S if saves else 0.0)
    for is_gone, events in _news(root):
        mine = [n for n, event in enumerate(events) if event.get("what") == request.id]
        ends = (
            [event for event in events[min(mine) :] if event["kind"] == "run_end"] if mine else []
        )
        # With its last line written it still ends its processes; then the run can go on.
        if ends and is_gone:
            say(_outcome(events[num_before:], ends[0]))
            return True
        if mine and is_gone:
            say("the driver has ended without a word; what is published stays")
            return False
        if mine and time.monotonic() > ended_by:  # a machine that is lost cannot say that it is
            last = _outcome(events[num_before:], ends[0]) if ends else "the driver has not ended"
            say(f"{last}; whether its machine still runs cannot be seen from here: look there")
            return bool(ends)
        if not mine and (is_gone or time.monotonic() > answered_by):
            forget(root)
            say(f"no driver of {str(root)!r} has answered, here or elsewhere: nothing was stopped")
            return False
    raise AssertionError("the news never end")


def _news(root: Path) -> Iterator[tuple[bool, list[Event]]]:
    """Whether the driver is gone, and the events of its run, again and again.

    Events are read when there are more.
    """
    size, events = -1, []
    while True:
        # Before its lines are read: of a driver that is gone they are all there then.
        is_gone = has_driver(root) is False
        # Looked at before it is read: what comes meanwhile is seen the next time.
        now = os.stat(root / EVENTS).st_size if (root / EVENTS).exists() else 0
        if now != size:
            size, events = now, read_events(root)
        yield is_gone, events
        time.sleep(_LOOK_EVERY_S)


def _outcome(after: list[Event], end: Event) -> str:
    published = [event for event in after if event["kind"] == "publish" and event["stage"]]
    if not published:
        return f"the driver has ended: {end['reason']}"
    last = published[-1]
    at = f"{last['stage']} is published at {last['position'] or 0:,} samples"
    return f"{at}; the driver has ended: {end['reason']}"
