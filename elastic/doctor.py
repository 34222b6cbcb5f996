"""What is right and wrong with this machine for Restage, and what to do about each finding."""

import importlib.metadata
import platform
import sys
import time
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from elastic.doctor_gpu import gpus, torch_threads
from elastic.doctor_machine import memory, open_files, shared_memory
from elastic.doctor_network import given_port, gloo, loopback, ray_ports
from elastic.doctor_storage import place
from elastic.finding import Finding
from elastic.own_packages import DISTRIBUTION, PACKAGES, PackageError, check_packages

# PyAV, Aim and Ray are imported inside: one that is broken or missing is a finding.

_PYTHON = ">=3.11,<3.13"
# libav's own decoder of AV1 needs a device.
_DECODERS = {"HEVC": "hevc", "VP9": "vp9", "AV1": "libdav1d"}


def findings(
    storage: str | Path = ".",
    ray_address: str | None = None,
    checkpoints: str | None = None,
    latents: str | None = None,
    ports: Sequence[int] = (),
) -> list[Finding]:
    """Look at everything; takes some seconds to a minute.

    Writes 64 MiB below each place and removes them. With a Ray address, one task on each node.
    """
    elsewhere = [("checkpoints", checkpoints), ("latents", latents)]
    found = [
        _python(),
        _own_packages(),
        *_versions(),
        torch_threads(),
        *gpus(),
        memory(),
        shared_memory(),
        open_files(),
        *place("storage", str(storage)),
        *(one for name, where in elsewhere if where is not None for one in place(name, where)),
        *_codecs(),
        _aim(),
        loopback(),
        gloo(),
        ray_ports(),
        *(given_port(port) for port in ports),
    ]
    if ray_address is not None:
        from elastic.ray_doctor import cluster_findings

        found += cluster_findings(ray_address)
    return found


def _own_packages() -> Finding:
    rule = "all of one distribution, in one folder"
    try:
        value = f"{', '.join(PACKAGES)} in {check_packages()}"
    except PackageError as error:
        return Finding("error", "packages", str(error), "see the message", rule)
    return Finding("ok", "packages", value, rule=rule)


def _python() -> Finding:
    version = platform.python_version()
    if SpecifierSet(_PYTHON).contains(version, prereleases=True):
        return Finding("ok", "python", f"{version}, {sys.executable}", rule=_PYTHON)
    advice = "make a .venv with Python 3.11 or 3.12: make PYTHON=/path/to/python3.12 venv"
    return Finding("error", "python", version, advice, _PYTHON)


def requirements() -> list[Requirement]:
    """What Restage asks for, without extras: from the checkout, or from the installation."""
    path = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if path.exists():
        # First: an editable installation keeps the list of the day on which it was made.
        lines = tomllib.loads(path.read_text("utf-8"))["project"]["dependencies"]
    else:
        try:
            lines = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            return []
    wanted = [Requirement(line) for line in lines]
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def _versions() -> list[Finding]:
    wanted = requirements()
    if not wanted:
        advice = f"install {DISTRIBUTION}, or start it from a checkout"
        missing = "the list of requirements is missing"
        return [Finding("warn", "versions", missing, advice, "a list to compare with")]
    return [check_version(one) for one in wanted]


def check_version(wanted: Requirement) -> Finding:
    """Whether the installed version of one requirement lies within its bounds."""
    level: Literal["warn", "error"] = "warn" if wanted.name == "aim" else "error"
    install, rule = f"pip install '{wanted}'", str(wanted.specifier) or "any version"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(level, wanted.name, "is not installed", install, rule)
    if wanted.specifier.contains(version, prereleases=True):
        return Finding("ok", wanted.name, version, rule=rule)
    return Finding(level, wanted.name, version, install, rule)


def _codecs() -> list[Finding]:
    """What PyAV can write and read; training needs H.264 alone where all clips are H.264."""
    import av

    needed = [] if _has_codec("libx264", "w") else ["libx264"]
    needed += [] if _has_codec("h264", "r") else ["h264"]
    lacking = [name for name, codec in _DECODERS.items() if not _has_codec(codec, "r")]
    advice = "install the wheel: pip install --force-reinstall --only-binary av av"
    rule, others = "encoder libx264 and decoder h264", "decoders of HEVC, VP9 and AV1"
    value = f"encoder and decoder in PyAV {av.__version__}"
    return [
        Finding("error", "H.264", f"PyAV lacks {' and '.join(needed)}", advice, rule)
        if needed
        else Finding("ok", "H.264", value, rule=rule),
        Finding("warn", "decoders", f"PyAV lacks {', '.join(lacking)}", advice, others)
        if lacking
        else Finding("ok", "decoders", ", ".join(_DECODERS), rule=others),
    ]


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    import av

    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _aim() -> Finding:
    rule = "can be imported, if its pages are wanted"
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # SQLAlchemy's MovedIn20Warning: Aim calls a function that has moved.
            warnings.simplefilter("ignore", DeprecationWarning)
            import aim  # noqa: F401
    except ImportError as error:
        advice = "runs work without it; for the dashboard: pip install aim"
        return Finding("warn", "Aim", f"cannot be imported: {error}", advice, rule)
    return Finding("ok", "Aim", f"imported in {time.perf_counter() - began:.1f} s", rule=rule)
