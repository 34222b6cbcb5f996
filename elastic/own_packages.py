"""Whether our four packages are ours: asked at every start, before any of them is imported."""

import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

DISTRIBUTION = "restage"
PACKAGES = ("models", "stages", "cluster", "elastic")


class PackageError(ImportError):
    """The four packages are not those of one distribution; the message names the intruder."""


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
