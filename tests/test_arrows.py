"""Who imports whom: the packages point one way, and Ray and Aim stay in their files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "models": {"models"},
    "cluster": {"cluster"},
    "stages": {"stages", "models"},
    "elastic": {"elastic", "stages", "models", "cluster"},
}
# The files that drive Ray; doctor.py asks importlib.metadata about it, and imports Aim to try it.
DRIVES_RAY = {"elastic/course.py", "elastic/drive.py"}
TALKS_TO_AIM = {"elastic/aim_view.py", "elastic/doctor.py", "elastic/dashboard.py"}
# What has to run under plain torch.distributed, with everything that it imports.
WITHOUT_RAY = (
    *("elastic/loop.py", "elastic/objective.py", "elastic/weights.py", "elastic/data/*.py"),
    *("elastic/weight_source.py", "elastic/convert.py"),
    *("elastic/attempt.py", "elastic/fork_host.py", "elastic/link.py", "elastic/rally.py"),
)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, however deep inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its package, whatever it is called.
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            named = node.args[0] if node.args else None
            is_word = isinstance(named, ast.Constant)
            yield node.lineno, str(named.value) if isinstance(named, ast.Constant) else "?"
            assert is_word, f"{path}:{node.lineno}: an import that nobody can read"


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for package in MAY_IMPORT:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path


def _drives_ray(name: str) -> bool:
    in_driver = name.startswith("elastic/ray_") or name in DRIVES_RAY
    return name.startswith("cluster/") or in_driver


def wrong_arrows(root: Path) -> list[str]:
    """Every import that breaks a rule, as `file:line: name`."""
    wrong = []
    for name, path in _files(root):
        package = name.split("/")[0]
        for line, imported in _imports(path):
            first = imported.split(".")[0]
            is_ours = first in MAY_IMPORT
            breaks_rule = (
                (is_ours and first not in MAY_IMPORT[package])
                or first in ("", "tests")
                or (first == "ray" and not _drives_ray(name))
                or (first == "aim" and name not in TALKS_TO_AIM)
            )
            if breaks_rule:
                wrong.append(f"{name}:{line}: {imported}")
    return wrong


def reached(root: Path, start: Path) -> set[str]:
    """Files of ours that a file imports, and those import, and so on."""
    todo, seen = [start], set[str]()
    while todo:
        path = todo.pop()
        name = path.relative_to(root).as_posix()
        if name in seen:
            continue
        seen.add(name)
        for _, imported in _imports(path):
            parts = imported.split(".")
            for length in range(1, len(parts) + 1):
                module = root.joinpath(*parts[:length])
                found = (module.with_suffix(".py"), module / "__init__.py")
                todo.extend(file for file in found if file.is_file())
    return seen


def test_all_imports_point_the_right_way() -> None:
    assert len(list(_files(ROOT))) > 40, "the walk has missed the packages"
    assert wrong_arrows(ROOT) == []


# A supervisor starts within seconds because it leaves torch to the fork host.
WITHOUT_TORCH = ("ray_worker", "ray_placing", "ray_policy", "ray_host", "ray_tracker", "ray_gain")


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_runs_in_a_supervisor_or_controller_imports_no_torch(name: str) -> None:
    found = reached(ROOT, ROOT / f"elastic/{name}.py")
    assert f"elastic/{name}.py" in found
    heavy = {
        file for file in found for _, what in _imports(ROOT / file) if what.startswith("torch")
    }
    assert not heavy


STARTS = sorted(path for pattern in WITHOUT_RAY for path in ROOT.glob(pattern))


@pytest.mark.parametrize("start", STARTS, ids=[str(path.relative_to(ROOT)) for path in STARTS])
def test_training_and_data_reach_no_file_that_drives_ray(start: Path) -> None:
    assert not {name for name in reached(ROOT, start) if _drives_ray(name)}


def test_what_reaches_ray_is_seen() -> None:
    """The control: the driver of training does."""
    found = reached(ROOT, ROOT / "elastic/course.py")
    assert "elastic/loop.py" in found
    assert "elastic/ray_tracker.py" in found


WRONG = {
    "models/net.py": "import stages",
    "models/deep.py": "def f():\n    from elastic.loop import train_stage",
    "models/tests_too.py": "from tests import tiny",
    "cluster/up.py": "from models.record import Record",
    "stages/plan.py": "import elastic.loop as loop",
    "stages/recipes/demo.py": "import importlib\nimportlib.import_module('cluster.local')",
    "elastic/loop.py": "import ray.train",
    "elastic/data/load.py": "try:\n    from ray import data\nexcept ImportError:\n    pass",
    "elastic/meter.py": "from aim import Run",
    "elastic/state.py": "from . import loop",
    "models/raised.py": "import ray",
}
RIGHT = {
    "models/text.py": "import torch\nfrom models import net",
    "stages/stage.py": "from models.record import Record\nimport stages.plan",
    "cluster/local.py": "import ray",
    "elastic/ray_train.py": "from ray.train import RunConfig\nfrom elastic.loop import Run",
    "elastic/aim_view.py": "import aim",
    "elastic/report.py": "import array, rayleigh, aimless\nfrom stages import Plan\nimport cluster",
}


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_arrow_is_found(tmp_path: Path, name: str) -> None:
    _write(tmp_path, RIGHT | {name: WRONG[name]})
    (found,) = wrong_arrows(tmp_path)
    assert found.startswith(f"{name}:")


def test_right_arrows_are_left_alone(tmp_path: Path) -> None:
    _write(tmp_path, RIGHT)
    assert wrong_arrows(tmp_path) == []
