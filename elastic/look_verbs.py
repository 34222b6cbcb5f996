"""The verbs that look: `status`, `report` and `dashboard` of a run, `doctor` of a machine."""

import argparse
import json
from pathlib import Path

from elastic.folders import RunFolder
from elastic.settings import Settings
from stages.plan import Plan
from stages.stage import Stage

# As in elastic/cli.py: what costs seconds to import is imported by the verb that needs it.


def run_folder(path: str) -> RunFolder:
    """The run folder at a path."""
    return RunFolder(Path(path).absolute())


def doctor_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Look at this machine."""
    from elastic.doctor import findings
    from elastic.finding import as_json, exit_code, render

    found = findings(
        settings.storage_path,
        settings.ray_address,
        settings.checkpoints,
        settings.latents,
        flags.port,
    )
    print(json.dumps(as_json(found)) if flags.json else render(found))
    return exit_code(found)


def status_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Say how far a run has come."""
    from elastic.data.growth import growth_lines
    from elastic.encode_progress import encoding_lines
    from elastic.goodput import account_lines
    from elastic.record import read_plan
    from elastic.showing import missing_line, why_missing
    from elastic.speed import speed_lines
    from elastic.status_json import status_json
    from elastic.stop import asked, has_driver
    from elastic.summary import print_table, read_history, summarise_history

    folder = run_folder(flags.run)
    plan = read_plan(folder)
    history = read_history(folder.root)
    if flags.json:
        print(json.dumps(status_json(folder, plan, history)))
        return 0
    request = asked(folder.root)
    if request is not None and has_driver(folder.root) is not False:
        print(f"stopping, as {request.text()}")
    print_table(summarise_history(history))
    print("\n".join([*speed_lines(history), *account_lines(history.account)]))
    names = [stage.name for stage in plan.stages]
    for line in encoding_lines(folder.root, names, history.events):
        print(line)
    for stage in plan.stages:
        for line in growth_lines(folder.stage(stage.name)):
            print(line)
        reason = why_missing(history.events, stage.name)
        if reason is not None:
            print(missing_line(folder, stage.name, reason))
        standing = _standing(plan, folder, stage)
        if standing is not None:
            print(standing)
    return 0


def _standing(plan: Plan, folder: RunFolder, stage: Stage) -> str | None:
    """Whether a stage is finished, and where it has checkpoints; None without any."""
    from elastic.branch import left_because, shown
    from elastic.checkpoint_place import Register
    from elastic.weights import finished

    saved = sorted(Register(folder.stage(stage.name)).positions(), reverse=True)
    if finished(folder.stage(stage.name)) is not None:
        return f"checkpoints of {stage.name}: {shown(saved)}" if saved else None
    why = left_because(plan, folder, stage)
    said = [f"{stage.budget:,} samples"]
    said += [f"checkpoints at {shown(saved)}"] if saved else []
    said += [why] if why else []
    return f"not finished: {stage.name} ({'; '.join(said)})"


def report_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Write report.html."""
    from elastic.record import read_plan
    from elastic.report import write_report

    folder = run_folder(flags.run)
    read_plan(folder)
    print(write_report(folder.root))
    return 0


def dashboard_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Serve Aim's pages until Ctrl-C."""
    from elastic.dashboard import show

    show(run_folder(flags.run), flags.port, flags.rebuild)
    return 0
