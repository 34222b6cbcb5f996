"""Names that become paths."""

import re
from typing import Annotated

from pydantic import AfterValidator

_SAFE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
# Windows reads these as devices whatever the folder.
_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}


def check_safe_name(name: str) -> str:
    """Return the name if it can stand as one path component everywhere, else raise ValueError."""
    if not _SAFE.fullmatch(name) or ".." in name or name.split(".")[0] in _RESERVED:
        suggestion = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:64].strip("-") or "name"
        suggestion = f"{suggestion}-0" if suggestion in _RESERVED else suggestion
        raise ValueError(
            f"name {name!r}: names become folders, so only a-z, 0-9, '.', '_' and '-' are allowed, "
            f"1 to 64 of them, a letter or digit at both ends; try {suggestion!r}"
        )
    return name


SafeName = Annotated[str, AfterValidator(check_safe_name)]
