"""`--json`: one object, and the names that docs/json.md promises."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic.cli import main
from elastic.data.assign import Assignment
from elastic.data.clips import Clip, Clips
from elastic.data.growth import record_growth
from elastic.data.store import Fault
from elastic.data.verify import Verdict
from elastic.encode_progress import ENCODING
from elastic.finding import Finding, as_json
from elastic.folders import RunFolder
from elastic.journal import METRICS, Journal
from elastic.latent_verbs import as_json as store_json
from elastic.record import write_record
from stages.plan import load_plan

PLAN = Path(__file__).with_name("tiny_plan.py")
DOCS = Path(__file__).parent.parent / "docs" / "json.md"


def promised(verb: str) -> set[str]:
    """The names in backticks of a verb's section."""
    section = DOCS.read_text().split(f"\n## {verb}")[1].split("\n## ")[0]
    return {name for name in re.findall(r"`([^`]+)`", section) if not name.startswith("--")}


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The one object that a verb prints."""
    assert main([str(argument) for argument in arguments]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def names_in(tree: object, free: tuple[str, ...] = ()) -> set[str]:
    """Every name of a tree, but for those below `free` ones, which are the user's or open lists."""
    if isinstance(tree, list):
        return {name for one in tree for name in names_in(one, free)}
    if not isinstance(tree, dict):
        return set()
    below = [names_in(value, free) for name, value in tree.items() if name not in free]
    return set(tree).union(*below)


def test_plan_prints_the_figures_that_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--storage", tmp_path, "--failure-rate", 0.003, "--json")
    shown = printed(capsys, "plan", PLAN, *flags)
    assert names_in(shown, ("state", "needed", "kept")) == promised("plan FILE")
    plan = load_plan(PLAN)
    assert [one["stage"] for one in shown["stages"]] == [stage.name for stage in plan.stages]
    for one, stage in zip(shown["stages"], plan.stages, strict=True):
        module = stage.build()
        assert one["parameters"] == sum(p.numel() for p in module.parameters())
        assert one["phases"][-1]["until"] == one["budget"] == stage.budget
        for phase in one["phases"]:
            cycle = sum(bucket["batch"] for bucket in phase["buckets"])
            assert phase["rounds"] * cycle == phase["until"] - phase["from"]


def test_status_prints_the_figures_that_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = load_plan(PLAN)
    folder = RunFolder.of(tmp_path, plan)
    folder.root.mkdir(parents=True)
    write_record(folder, plan)
    name = plan.stages[1].name
    folder.stage(name).mkdir(parents=True)
    encoded = {"total": 10, "done": 4, "quarantined": 1, "rate": 2.0, "wall": 0.0}
    (folder.stage(name) / ENCODING).write_text(json.dumps(encoded))
    clips = Clips.of([Clip(7, "/clips/a.mp4", "a circle", held_out=False)])
    new = Assignment(clips, {"32px-5f": np.array([0])}, [1])
    record_growth(folder.stage(name), 12, {"32px-5f": [0]}, new)
    names = ("samples_per_s", "tokens_per_s", "tokens_per_s_per_worker", "useful_tokens")
    names += ("data_wait", "flops_per_device", "mfu", "memory_peak")
    journal = Journal(folder.root / METRICS)
    journal.append(
        wall=1.0, stage=name, position=8, attempt=1, world=3, context={},
        values=dict.fromkeys(names, 0.5),
    )  # fmt: skip
    journal.close()
    shown = printed(capsys, "status", folder.root, "--json")
    assert names_in(shown, ("seconds",)) == promised("status RUN")
    assert shown["finished"] is False
    stages = {one["stage"]: one for one in shown["stages"]}
    assert list(stages) == [stage.name for stage in plan.stages]
    assert stages[name]["encoding"]["seconds_left"] == 3.0
    assert stages[name]["samples"] == 8
    assert stages[name]["speed"] == {"workers": 3, **dict.fromkeys(names, 0.5)}
    assert stages[name]["grown"] == [{"position": 12, "clips": 1}]
    assert stages[plan.stages[0].name]["encoding"] is None


def test_tables_of_measurements_and_one_object_are_not_asked_for_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--storage", str(tmp_path), "--json", "--measure"]
    assert main(["plan", str(PLAN), *flags]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_verdict_has_the_names_that_verify_promises() -> None:
    """The object around it is looked at in tests/test_verify.py."""
    verdict = Verdict()
    verdict.missing = [("32px-5f", 3)]
    verdict.seal = [Fault("digest", "is gone")]
    found = store_json("runs/a/latents/bb", verdict)
    assert {"stores"} | names_in(found) == promised("verify STORE")
    assert found["missing"] == [["32px-5f", 3]]


def test_a_look_at_a_machine_has_the_names_that_doctor_promises() -> None:
    found = as_json([Finding("ok", "python", "3.11")])
    assert names_in(found) == promised("doctor")
    assert found["counts"] == {"error": 0, "warn": 0, "ok": 1}
