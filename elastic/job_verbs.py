"""The verbs for runs that are driven elsewhere: `submit` sends one to a cluster, `stop` ends it."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from elastic.data.places import is_url
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.settings import Settings
from models.perceptual import Lpips
from stages.init import FromFile
from stages.plan import Plan
from stages.stage import AutoencoderStage, DiffusionStage

_STAY_HERE = ("storage", "ray_address", "cpus")  # the cluster is given, and storage comes first


def submit_flags(parser: argparse.ArgumentParser) -> None:
    """What `submit` takes besides what `train` does."""
    parser.add_argument("--address", help="job API (default: RAY_API_SERVER_ADDRESS)")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave these files of the stage file's folder here; as in .gitignore, many times",
    )
    parser.add_argument(
        "--carry", action="store_true", help="send Restage along, to a cluster that has none"
    )
    parser.add_argument("--detach", action="store_true", help="print the job's id and leave it")


def stop_flags(parser: argparse.ArgumentParser) -> None:
    """What `stop` takes."""
    parser.add_argument("run", help="run folder; with --address, or the plan's name")
    parser.add_argument("--save", action="store_true", help="have a checkpoint published before")
    parser.add_argument("--address", help="job API of the cluster, where the folder is not seen")


def submit_verb(flags: argparse.Namespace, plan: Plan, settings: Settings) -> int:
    """Train a plan as a job of a cluster, and follow it."""
    file = Path(flags.file).absolute()
    run = _run_on_the_cluster(plan, settings)
    relative = list(relative_paths(plan))
    if relative:
        raise InputError(
            f"{flags.file}: {'; '.join(relative)}: relative, so it would be looked for in the "
            "job's own copy of the folder; write the whole path, as all machines see it"
        )
    for name in ("latents", "checkpoints"):
        place = getattr(settings, name)
        if place is not None and not is_url(place) and not os.path.isabs(place):
            raise InputError(
                f"{name} {place!r}: relative, so it would lie in the job's own copy of the folder; "
                "give a URL, or the whole path of a folder that all machines of the cluster see"
            )
    address = flags.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise InputError("submit needs --address of the job API, such as http://127.0.0.1:8265")
    from elastic.ray_jobs import Submission, connect, submit_and_follow

    command = ("train", file.name, "--storage", settings.storage, *passed_on(flags, settings))
    what = Submission(plan.name, str(run), file.parent, command, tuple(flags.exclude), flags.carry)
    return submit_and_follow(connect(address), what, flags.detach)


def stop_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Ask the driver to end, and wait for it."""
    if flags.address is not None:
        from elastic.ray_jobs import connect, stop_job

        return stop_job(connect(flags.address), flags.run, flags.save)
    from elastic.record import read_plan
    from elastic.stop import stop_run

    folder = RunFolder(Path(flags.run).absolute())
    read_plan(folder)
    return 0 if stop_run(folder.root, flags.save, print) else 1


def _run_on_the_cluster(plan: Plan, settings: Settings) -> Path:
    """The run folder; its path means there what it means here, or it is not seen from here."""
    if "storage" not in settings.model_fields_set:
        raise InputError(
            "submit needs --storage: a folder that all machines of the cluster see, such as "
            "/mounted/runs; without it the run would lie in the job's own copy of the folder"
        )
    if not os.path.isabs(settings.storage):
        raise InputError(
            f"storage {settings.storage!r}: relative, so the run would lie in the job's own copy "
            "of the folder; give the whole path of a folder that all machines of the cluster see"
        )
    return RunFolder.of(settings.storage_path, plan).root


def relative_paths(plan: Plan) -> Iterator[str]:
    """Files that stages name by relative paths, as `stage 'a': data.table 'b.csv'`."""
    for stage in plan.stages:
        named = {"vae.weights": stage.codec.weights}
        for number, videos in enumerate(stage.data.sources):
            where = "data" if len(stage.data.sources) == 1 else f"data.parts[{number}].videos"
            named |= {f"{where}.table": videos.table, f"{where}.folder": videos.folder}
        if isinstance(stage.init, FromFile):
            named["init.path"] = stage.init.path
        if isinstance(stage, AutoencoderStage) and isinstance(stage.perceptual, Lpips):
            named["perceptual.weights"] = stage.perceptual.weights
        if isinstance(stage, DiffusionStage) and stage.text.located() != stage.text:
            yield f"stage {stage.name!r}: the folders of text"
        for field, path in named.items():
            if path is not None and not os.path.isabs(path) and not is_url(path):
                yield f"stage {stage.name!r}: {field} {path!r}"


def passed_on(flags: argparse.Namespace, settings: Settings) -> list[str]:
    """The flags of `train` that say there what is set here, by flag, variable or .env."""
    words = []
    for name in ("videos", "captions"):
        if getattr(flags, name) is not None:
            words += [f"--{name}", getattr(flags, name)]
    for name in sorted(settings.model_fields_set - set(_STAY_HERE)):
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if name == "aim":
            words += [] if value else ["--no-aim"]
        elif isinstance(value, bool):
            words += [flag] if value else []
        elif value is not None:
            words += [flag, str(value)]
    return words
