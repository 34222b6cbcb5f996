"""What a submitted job carries: the folder of its stage file, and these packages where they lack.

As `ray job submit --working-dir` packs a folder, `.gitignore` and `.rayignore` included; but it is
known before anything is sent whether it is small enough, and what is too large.
"""

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from elastic.errors import InputError
from elastic.own_packages import PACKAGES

# Of one request to Ray's job API; headers and file names take a little of it.
LIMIT_BYTES = 100 << 20
_ROOM_BYTES = 1 << 20
_NUM_NAMED = 5
_MIB = 1 << 20
# What no job needs from here: history, environments, runs, videos, caches; and what may hold keys.
EXCLUDED = (
    *(".git", ".hg", ".venv", "venv", "runs", ".aim", ".env", ".env.*"),
    *("__pycache__", ".*_cache", ".cache", "*.egg-info", "node_modules"),
    *("videos", "*.mp4", "*.mkv", "*.mov", "*.webm", "*.avi"),
)

log = logging.getLogger(__name__)


def files_of(folder: Path, excludes: Sequence[str]) -> list[Path]:
    """The files below a folder that a job carries, sorted; patterns are those of .gitignore."""
    found: list[Path] = []
    patterns = [_get_excludes(folder, [*EXCLUDED, *excludes])]
    _dir_travel(folder, patterns, found.append, include_gitignore=True, logger=log)
    return sorted(path for path in found if path.is_file())


def pack(folder: Path, excludes: Sequence[str], carries_us: bool, target: Path) -> int:
    """Write the zip file that a job carries; how many files it holds.

    InputError, before anything is read, if they are too large together.
    """
    files = {path.relative_to(folder).as_posix(): path for path in files_of(folder, excludes)}
    if carries_us:
        home = Path(__file__).resolve().parent.parent
        for package in PACKAGES:
            own = files_of(home / package, ())
            files |= {path.relative_to(home).as_posix(): path for path in own}
    _check_size(folder, list(files.values()))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, path in files.items():
            archive.write(path, name)
    return len(files)


def _check_size(folder: Path, files: list[Path]) -> None:
    sizes = sorted(((path.stat().st_size, path) for path in files), reverse=True)
    total = sum(size for size, _ in sizes)
    if total <= LIMIT_BYTES - _ROOM_BYTES:
        return
    named = ", ".join(f"{path} ({size / _MIB:,.1f} MiB)" for size, path in sizes[:_NUM_NAMED])
    raise InputError(
        f"folder {str(folder)!r}: its {len(sizes):,} files hold {total / _MIB:,.1f} MiB, and a job "
        f"may carry {LIMIT_BYTES / _MIB:.0f} MiB; leave some out with --exclude or .rayignore; "
        f"the largest: {named}"
    )
