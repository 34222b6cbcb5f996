"""Which versions these are, without importing what takes seconds to import."""

import importlib.metadata
import platform

_NAMED = ("restage", "torch", "ray")


def version_line() -> str:
    """Our version, and those of what decides most of what happens."""
    return ", ".join([*(f"{name} {_version(name)}" for name in _NAMED), _python()])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _python() -> str:
    return f"Python {platform.python_version()}"
