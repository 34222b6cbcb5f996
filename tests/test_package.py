"""What is shipped: the four packages, all of each, and nothing else."""

import configparser
import email
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("models", "stages", "cluster", "elastic")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as an installer would build it, from a copy: a build leaves files beside."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    # A folder that discovery would take for a package.
    (copy / "notes").mkdir()
    (copy / "notes/__init__.py").touch()
    for name in ("pyproject.toml", PROJECT["readme"]):
        shutil.copy(ROOT / name, copy / name)
    # The build backend's own hook, so that neither pip nor the network is needed.
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def _shipped(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def _text(wheel: zipfile.ZipFile, name: str) -> str:
    (found,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return wheel.read(found).decode()


def test_the_wheel_holds_the_four_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".md", ".pyc")
    }
    assert "elastic/data/order.py" in expected
    assert "stages/recipes/demo.py" in expected
    assert _shipped(wheel) == expected


def test_the_wheel_says_its_name_version_and_command(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(_text(wheel, "METADATA"))
    assert metadata["Name"] == "restage"
    assert metadata["Version"] == PROJECT["version"] == "0.1.0"
    assert metadata["Requires-Python"] is not None
    commands = configparser.ConfigParser()
    commands.read_string(_text(wheel, "entry_points.txt"))
    assert dict(commands["console_scripts"]) == {"restage": "elastic.__main__:main"}
    assert set(_text(wheel, "top_level.txt").split()) == set(PACKAGES)


def test_every_dependency_has_a_bound_and_none_is_the_name_that_exists_nowhere() -> None:
    # In the product's card, but on no registry: anyone could register it.
    assert not [line for line in PROJECT["dependencies"] if line.startswith("fsdp")]
    for line in PROJECT["dependencies"]:
        assert any(sign in line for sign in (">=", "==")), line


def test_what_users_install_has_a_ceiling_and_the_pinned_versions_lie_within() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        (pins[canonicalize_name(pin.name)],) = [one.version for one in pin.specifier]
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["text"]):
        needed = Requirement(line)
        assert {"<", "=="} & {one.operator for one in needed.specifier}, line
        assert pins[canonicalize_name(needed.name)] in needed.specifier, line


def _installed(lines: Iterable[str]) -> dict[str, str]:
    """The version of every package that these requirements bring, and those that it brings."""
    found: dict[str, str] = {}
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        needed, extra = todo.pop()
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(needed.name)
        is_new = name not in found
        try:
            one = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # what only an extra or another system needs
        found[name] = one.version
        if is_new or needed.extras:
            for extra in ("", *needed.extras):
                todo += [(Requirement(line), extra) for line in one.requires or ()]
    return found


def test_nothing_is_installed_that_is_not_pinned_and_nothing_at_another_version() -> None:
    """An audit that needs no network: a package that came in unseen has no line to be read."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        (pins[canonicalize_name(pin.name)],) = [one.version for one in pin.specifier]
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["text"], *extras["s3"], *extras["dev"]]
    found = _installed(line for line in lines if not line.startswith("restage"))
    assert len(found) > 100
    unpinned = found.keys() - pins.keys() - {"setuptools", "pip"}
    assert not unpinned, "read what it is, then give it a line in constraints.txt"
    others = {n: v for n, v in found.items() if n in pins and v.split("+")[0] != pins[n]}
    assert not others, "make venv installs what was tested"


def test_the_lowest_diffusers_has_every_class_that_the_published_codecs_build() -> None:
    (line,) = [one for one in PROJECT["dependencies"] if one.startswith("diffusers")]
    source = (ROOT / "models/published.py").read_text()
    needed = re.findall(r'_diffusers\(self, "([\d.]+)"\)', source)
    assert len(needed) == 5
    (lowest,) = [one.version for one in Requirement(line).specifier if one.operator == ">="]
    assert Version(lowest) >= max(map(Version, needed))


def test_the_command_is_a_function_of_the_package() -> None:
    module, function = PROJECT["scripts"]["restage"].split(":")
    code = f"import {module} as m; print(callable(m.{function}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr
