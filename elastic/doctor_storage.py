"""What `doctor` asks of the places for runs, checkpoints and latents: room, speed, and truth."""

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from elastic.data.places import as_os_errors, check_url, is_url, join
from elastic.errors import InputError
from elastic.finding import Finding

_GIB = 1 << 30
_PROBE_BYTES = 64 << 20
_SLOW_BYTES_PER_S = 50e6
_ANSWER_S = 60.0
_RULE = "can be written, renamed and read back, at 50 MB/s or more"


def place(name: str, where: str) -> list[Finding]:
    """What is found at a folder or URL, which `name` says the use of; nothing is left there."""
    where = where.removeprefix("file://")
    if is_url(where):
        return [_in_time(name, lambda: _url(name, where), where)]
    path = Path(where).expanduser().absolute()
    folder = next(part for part in (path, *path.parents) if part.is_dir())
    blocked = next((part for part in (path, *path.parents) if part.is_file()), None)
    if blocked is not None:
        advice = f"name a folder with --{name}, or move that file away"
        return [Finding("error", name, f"{blocked} is a file, not a folder", advice, "a folder")]
    return [_room(name, folder), _in_time(name, lambda: _folder(name, folder), str(folder))]


def _room(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    what, value = f"{name} room", f"{free / _GIB:.1f} GiB free at {folder}"
    rule = "1 GiB free for the demo, 10 GiB for real runs"
    if free < _GIB:
        return Finding("error", what, value, f"free some space, or name another --{name}", rule)
    if free < 10 * _GIB:
        advice = "`plan FILE` says what a run needs; free some space, or name a larger place"
        return Finding("warn", what, value, advice, rule)
    return Finding("ok", what, value, rule=rule)


def _in_time(name: str, probe: Callable[[], Finding], where: str) -> Finding:
    """The finding of a probe, or that it did not end: a dead mount or endpoint may never answer."""
    answer: Future[Finding] = Future()

    def look() -> None:
        try:
            answer.set_result(probe())
        except BaseException as error:  # raised again by `result`
            answer.set_exception(error)

    threading.Thread(target=look, daemon=True).start()
    with suppress(TimeoutError):
        return answer.result(_ANSWER_S)
    advice = "look at its mount, its network and the endpoint; or name another place"
    return Finding("error", name, f"{where}: no answer in {_ANSWER_S:.0f} s", advice, _RULE)


def _folder(name: str, folder: Path) -> Finding:
    """Write, flush, rename and read back as checkpoints are."""
    block = os.urandom(_PROBE_BYTES)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".restage-probe-") as probe:
            aside, final = Path(probe) / "aside", Path(probe) / "final"
            began = time.perf_counter()
            with aside.open("wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
                # Out of the page cache, so that the reading below asks the disk.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(aside, final)
            written = time.perf_counter()
            is_same = final.read_bytes() == block
            read = time.perf_counter()
    except OSError as error:
        advice = f"give the right to write and room to it, or name another --{name}"
        return Finding("error", name, f"{folder}: {error.strerror or error}", advice, _RULE)
    return _judge(name, str(folder), is_same, (written - began, read - written))


def _url(name: str, url: str) -> Finding:
    """Put, read back and remove an object; there is no rename, and a draft is never in the way."""
    try:
        check_url(url, name)
    except InputError as error:
        return Finding("error", name, str(error), "correct the URL", "a URL that can be used")
    import fsspec  # its back ends take long to import

    block = os.urandom(_PROBE_BYTES)
    try:
        with as_os_errors(url):
            system, path = fsspec.core.url_to_fs(join(url, f".restage-probe-{uuid.uuid4().hex}"))
            try:
                began = time.perf_counter()
                system.pipe_file(path, block)
                written = time.perf_counter()
                is_same = system.cat_file(path) == block
                read = time.perf_counter()
            finally:
                with suppress(Exception):  # the first error is the one to tell
                    system.rm_file(path)
    except OSError as error:
        advice = "look at the keys (AWS_ACCESS_KEY_ID), the endpoint (AWS_ENDPOINT_URL), and the "
        advice += "bucket's name and rights"
        return Finding("error", name, f"{url}: {error}", advice, _RULE)
    return _judge(name, url, is_same, (written - began, read - written))


def _judge(name: str, where: str, is_same: bool, seconds: tuple[float, float]) -> Finding:
    write, read = (_PROBE_BYTES / max(one, 1e-9) for one in seconds)
    value = f"writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s at {where}"
    if not is_same:
        advice = "do not use it: look at its disk and its memory"
        return Finding("error", name, f"{where} gave back other bytes", advice, _RULE)
    if min(write, read) < _SLOW_BYTES_PER_S:
        advice = "saving will be slow: a local disk, or a nearer bucket, helps"
        return Finding("warn", name, value, advice, _RULE)
    return Finding("ok", name, value, rule=_RULE)
