"""What SECURITY.md says, as far as no other test holds it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECURITY = ROOT / "SECURITY.md"
# The job of a driver, on its way to the training processes that the same driver has started.
PICKLES = {"elastic/ray_train.py", "elastic/attempt.py"}
READERS = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib", "yaml"}
# Each would run what a file says; `numpy.load` only with allow_pickle, and is not needed.
CALLS = {"torch.load", "np.load", "numpy.load"}


def trees() -> Iterator[tuple[str, ast.AST]]:
    for package in ("models", "stages", "cluster", "elastic"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.AST) -> set[str]:
    """The packages that are imported anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_a_run_s_own_messages_are_pickles() -> None:
    files = dict(trees())
    assert len(files) > 100, "the walk has missed the packages"
    assert {name for name, tree in files.items() if imported(tree) & READERS} == PICKLES
    called = {
        f"{name}: {ast.unparse(node.func)}"
        for name, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS
    }
    assert called == set()


def test_every_test_that_security_names_is_there() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", SECURITY.read_text())
    assert len(named) > 10
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
