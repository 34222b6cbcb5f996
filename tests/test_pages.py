"""README.md and docs/: their tables are those of the kept results, and what they name is there."""

import re
from pathlib import Path

import pytest
import show_bench

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(page for name in ("models", "stages", "cluster", "elastic", "tests") for page in
      (ROOT / name).rglob("README.md")),
]  # fmt: skip
PROSE = [page for page in PAGES if page.name != "transcript.md"]  # which is a recorded session


@pytest.mark.parametrize("page", show_bench.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_kept_results(page: Path) -> None:
    text = page.read_text()
    assert "<!-- table: " in text
    again = show_bench.filled(text, show_bench.tables(show_bench.results()))
    assert text == again, "run .venv/bin/python tests/show_bench.py"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_of_tests_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`tests/([\w/.]+\.\w+)[`:]", page.read_text()):
        assert (ROOT / "tests" / name).exists(), f"{page.name}: tests/{name}"
