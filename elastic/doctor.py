"""What is right and wrong with this machine for Restage, and what to do about each finding."""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Torch, PyAV and Aim are imported inside: `check_packages` runs at every start and must be cheap.

DISTRIBUTION = "restage"
PACKAGES = ("models", "stages", "cluster", "elastic")
_PYTHON = ">=3.11,<3.13"
_GIB = 1 << 30
_PROBE_BYTES = 64 << 20
_SLOW_BYTES_PER_S = 50e6


class Finding(NamedTuple):
    """One thing that was looked at; `advice` is empty when nothing is to be done."""

    level: Literal["ok", "warn", "error"]
    what: str
    value: str
    advice: str = ""


class PackageError(ImportError):
    """The four packages are not those of one distribution; the message names the intruder."""


def findings(storage: str | Path = ".", ray_address: str | None = None) -> list[Finding]:
    """Look at everything; takes some seconds, writes 64 MiB below `storage` and removes it."""
    folder = _existing_folder(Path(storage))
    path = Path(storage).absolute()
    blocked = next((part for part in (path, *path.parents) if part.is_file()), None)
    return [
        _python(),
        _own_packages(),
        *_versions(),
        _torch(),
        _gpus(),
        _memory(),
        _shared_memory(),
        _free_disk(folder),
        _storage_speed(folder) if blocked is None else _blocked_storage(blocked),
        _h264(),
        _aim(),
        _loopback(),
        *([_cluster(ray_address)] if ray_address else []),
    ]


def render(found: Iterable[Finding]) -> str:
    """The findings as text, one line each, with what to do below those that need it."""
    found = list(found)
    width = max((len(one.what) for one in found), default=0)
    lines = []
    for one in found:
        lines.append(f"{one.level:<5}  {one.what:<{width}}  {one.value}")
        if one.advice:
            lines.append(f"{'':<5}  {'':<{width}}  -> {one.advice}")
    counts = {level: sum(one.level == level for one in found) for level in ("error", "warn", "ok")}
    lines.append(f"{counts['error']} errors, {counts['warn']} warnings, {counts['ok']} ok")
    return "\n".join(lines)


def exit_code(found: Iterable[Finding]) -> int:
    """1 when there is an error, else 0."""
    return int(any(one.level == "error" for one in found))


def check_packages() -> Path:
    """The one folder that holds all four packages; PackageError when one comes from elsewhere.

    Flat names such as `models` are common: another folder on sys.path, or another distribution
    that was installed over ours, would be imported in our place without a word.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = _origin(name)
        if found != home / name:
            raise PackageError(
                f"package {name!r} comes from {found or 'nowhere'}, and elastic from "
                f"{home / 'elastic'}; all of {', '.join(PACKAGES)} must lie in one folder: "
                f"{_way_out(name, found)}"
            )
    changed = _overwritten(home)
    if changed:
        raise PackageError(
            f"{changed} is not the file that {DISTRIBUTION} installed; it {_owners(changed)}. "
            f"Reinstall in an environment of its own: pip install --force-reinstall {DISTRIBUTION}"
        )
    return home


def _origin(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin is None:  # a folder without an __init__.py
        places = list(spec.submodule_search_locations or [])
        return Path(places[0]).resolve() if places else None
    origin = Path(spec.origin).resolve()
    return origin.parent if origin.name == "__init__.py" else origin


def _way_out(name: str, found: Path | None) -> str:
    if found is None:
        return f"reinstall with: pip install --force-reinstall {DISTRIBUTION}"
    owners = importlib.metadata.packages_distributions().get(name, [])
    intruders = [owner for owner in owners if owner != DISTRIBUTION]
    if intruders and "site-packages" in found.parts:
        return f"it belongs to {', '.join(intruders)}: use an environment without it"
    return f"start from another folder, or take {found.parent} off PYTHONPATH"


def _overwritten(home: Path) -> str | None:
    """The first of our installed files that is gone or differs from the installed record."""
    try:
        record = importlib.metadata.distribution(DISTRIBUTION).read_text("RECORD")
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout
    for name, digest, _ in csv.reader((record or "").splitlines()):
        if name.split("/")[0] not in PACKAGES or not digest:
            continue
        file = home / name
        wanted = digest.removeprefix("sha256=")
        if not file.is_file() or _digest(file) != wanted:
            return name
    return None


def _digest(file: Path) -> str:
    """As wheels record it: SHA-256 in URL-safe base64 without padding."""
    raw = hashlib.sha256(file.read_bytes()).digest()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _owners(file: str) -> str:
    others = []
    for other in importlib.metadata.distributions():
        name = other.metadata["Name"]
        if name != DISTRIBUTION and any(str(one) == file for one in other.files or []):
            others.append(name)
    return f"was written by {', '.join(others)}" if others else "was changed or removed by hand"


def _own_packages() -> Finding:
    try:
        return Finding("ok", "packages", f"{', '.join(PACKAGES)} in {check_packages()}")
    except PackageError as error:
        return Finding("error", "packages", str(error), "see the message")


def _python() -> Finding:
    version = platform.python_version()
    if SpecifierSet(_PYTHON).contains(version, prereleases=True):
        return Finding("ok", "python", f"{version}, {sys.executable}")
    return Finding("error", "python", version, f"use a Python {_PYTHON}: Aim has no wheels beyond")


def requirements() -> list[Requirement]:
    """What Restage asks for, without extras: from the installation, or from the checkout."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).resolve().parent.parent / "pyproject.toml"
        if not path.exists():
            return []
        lines = tomllib.loads(path.read_text("utf-8"))["project"]["dependencies"]
    wanted = [Requirement(line) for line in lines]
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def _versions() -> list[Finding]:
    wanted = requirements()
    if not wanted:
        advice = f"install {DISTRIBUTION}, or start it from a checkout"
        return [Finding("warn", "versions", "the list of requirements is missing", advice)]
    return [check_version(one) for one in wanted]


def check_version(wanted: Requirement) -> Finding:
    """Whether the installed version of one requirement lies within its bounds."""
    level: Literal["warn", "error"] = "warn" if wanted.name == "aim" else "error"
    install = f"pip install '{wanted}'"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(level, wanted.name, "is not installed", install)
    if wanted.specifier.contains(version, prereleases=True):
        return Finding("ok", wanted.name, version)
    return Finding(level, wanted.name, f"{version}, needed {wanted.specifier}", install)


def _torch() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    value = f"{threads} threads on {cores} cores"
    if threads > cores:
        return Finding("warn", "torch threads", value, f"set OMP_NUM_THREADS to {cores} or less")
    return Finding("ok", "torch threads", value)


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            advice = f"torch {torch.__version__} does not see the GPUs: install a CUDA build"
            return Finding("warn", "GPUs", "nvidia-smi is there, torch sees none", advice)
        return Finding("ok", "GPUs", "none; training runs on the CPU with gloo")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("ok", "GPUs", f"{len(names)}: {', '.join(sorted(set(names)))}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    value = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available < 4 * _GIB:
        return Finding("warn", "memory", value, "close other programs: the demo needs about 4 GiB")
    return Finding("ok", "memory", value)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.exists():
        return Finding("warn", "shared memory", "no /dev/shm", "Ray will use slower files in /tmp")
    free = shutil.disk_usage(path).free
    value = f"{free / _GIB:.1f} GiB free in {path}"
    if free < _GIB:
        return Finding("warn", "shared memory", value, "in a container: --shm-size=4g")
    return Finding("ok", "shared memory", value)


def _existing_folder(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _blocked_storage(file: Path) -> Finding:
    advice = "name a folder with --storage, or move that file away"
    return Finding("error", "storage", f"{file} is a file, not a folder", advice)


def _free_disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    value = f"{free / _GIB:.1f} GiB free at {folder}"
    if free < _GIB:
        return Finding("error", "disk", value, "free some space, or name another --storage")
    if free < 10 * _GIB:
        return Finding("warn", "disk", value, "checkpoints and latents need more for real runs")
    return Finding("ok", "disk", value)


def _storage_speed(folder: Path) -> Finding:
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
        advice = "name a --storage that can be written"
        return Finding("error", "storage", f"{folder}: {error.strerror or error}", advice)
    write_rate, read_rate = _PROBE_BYTES / (written - began), _PROBE_BYTES / (read - written)
    value = f"writes {write_rate / 1e6:,.0f} MB/s, reads {read_rate / 1e6:,.0f} MB/s at {folder}"
    if not is_same:
        return Finding("error", "storage", f"{folder} gave back other bytes", "use another disk")
    if min(write_rate, read_rate) < _SLOW_BYTES_PER_S:
        return Finding("warn", "storage", value, "saving will be slow: a local disk helps")
    return Finding("ok", "storage", value)


def _h264() -> Finding:
    import av

    missing = []
    try:
        av.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        missing.append("encoder libx264")
    try:
        av.Codec("h264", "r")
    except av.codec.codec.UnknownCodecError:
        missing.append("decoder h264")
    if missing:
        advice = "install the wheel: pip install --force-reinstall --only-binary av av"
        return Finding("error", "H.264", f"PyAV lacks the {' and the '.join(missing)}", advice)
    return Finding("ok", "H.264", f"encoder and decoder in PyAV {av.__version__}")


def _aim() -> Finding:
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # SQLAlchemy's MovedIn20Warning: Aim calls a function that has moved.
            warnings.simplefilter("ignore", DeprecationWarning)
            import aim  # noqa: F401
    except ImportError as error:
        advice = "runs work without it; for the dashboard: pip install aim"
        return Finding("warn", "Aim", f"cannot be imported: {error}", advice)
    return Finding("ok", "Aim", f"imported in {time.perf_counter() - began:.1f} s")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = server.getsockname()
            with socket.create_connection(address, timeout=5):
                server.settimeout(5)
                server.accept()[0].close()
    except OSError as error:
        advice = "Ray and gloo need the loopback interface: ip link set lo up; look at the firewall"
        return Finding("error", "loopback", str(error), advice)
    return Finding("ok", "loopback", f"a connection to {address[0]}:{address[1]} works")


def _cluster(address: str) -> Finding:
    from cluster.token import advice, asks_for_token  # not before `check_packages`

    asks = asks_for_token(address)
    if asks is None:
        there = "start a cluster there, or give another --ray-address"
        return Finding("error", "Ray cluster", f"no head answers at {address}", there)
    if not asks:
        return Finding("warn", "Ray cluster", "asks nobody for a token", advice(address))
    return Finding("ok", "Ray cluster", f"{address} asks for a token")
