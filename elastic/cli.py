"""The command line: one verb each, with an example; what it prints is for people."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from elastic import job_verbs
from elastic.checkpoint_place import check_place
from elastic.completion import SHELLS, check_verb, script
from elastic.errors import InputError, RunStopped, StageBlocked
from elastic.flags import (
    aim_flag,
    at_flag,
    cluster_flags,
    device_flags,
    doctor_flags,
    fault_flags,
    json_flag,
    keep_flags,
    latents_flag,
    port,
    training_flags,
)
from elastic.folders import RunFolder
from elastic.job_verbs import stop_flags, stop_verb, submit_flags
from elastic.look_verbs import (
    dashboard_verb,
    doctor_verb,
    report_verb,
    run_folder,
    status_verb,
)
from elastic.output import READER_GONE, has_reader
from elastic.sample_verb import sample_flags, sample_verb
from elastic.settings import Settings, read_settings
from elastic.versions import version_line
from models.perceptual import Lpips, check_lpips
from stages.lineage import parents
from stages.plan import Plan, PlanError, load_plan
from stages.stage import AutoencoderStage, DiffusionStage, Stage
from stages.videos import Videos

# What costs seconds to import (Ray, PyAV, plotly) is imported by the verb that needs it.

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit code."""
    parser = make_parser()
    words = sys.argv[1:] if arguments is None else arguments
    check_verb(parser, words)
    flags = parser.parse_args(words)
    try:
        # Each flag of a setting has its name; a verb has those that mean something to it.
        settings = read_settings(**{n: getattr(flags, n, None) for n in Settings.model_fields})
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s"
        )
        code: int = flags.verb(flags, settings)
        return code
    except (InputError, PlanError) as error:
        print(f"restage: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(
            "\nrestage: interrupted; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return INTERRUPTED
    except RunStopped as error:
        print(f"restage: {error}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except StageBlocked as error:
        print(f"restage: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # the supervisor of a run: said in one line, or with its traceback
        if flags.log_level == "debug":
            raise
        if isinstance(error, BrokenPipeError) and not has_reader():
            return READER_GONE
        print(
            f"restage: failed: {error}\n"
            "restage: what is published stays; the same command goes on from there "
            "(--log-level debug shows where it failed)",
            file=sys.stderr,
        )
        return FAILED


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="restage", description="Train video diffusion transformers in stages, elastically."
    )
    parser.add_argument("--version", action="version", version=version_line())
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    file_verbs = (
        ("plan", plan_verb, "print what would happen", "plan stages/recipes/demo.py"),
        ("encode", encode_verb, "encode latents that are missing", "encode my_plan.py"),
        ("repair", repair_verb, "encode latents that are damaged again", "repair my_plan.py"),
        ("train", train_verb, "do whatever is missing of a plan", "train my_plan.py --cpus 2"),
        ("submit", submit_verb, "train a plan as a job of a Ray cluster",
         "submit my_plan.py --address http://head:8265 --storage /mounted/runs"),
    )  # fmt: skip
    for name, verb, text, example in file_verbs:
        one = _verb(verbs, name, verb, text, example)
        one.add_argument("file", help="stage file")
        one.add_argument("--videos", metavar="DIR", help="use the clips of this folder instead")
        one.add_argument(
            "--captions", metavar="FILE", help="their table (default: NAME.txt beside)"
        )
        if name != "plan":
            submit_flags(one) if name == "submit" else cluster_flags(one)
            aim_flag(one)
            latents_flag(one)
            if name in ("train", "submit"):
                training_flags(one)
                keep_flags(one)
            continue
        json_flag(one)
        keep_flags(one)
        device_flags(one)
        fault_flags(one)
    one = _verb(verbs, "sample", sample_verb, "make videos from a stage",
                'sample runs/demo --caption "a red circle moving left slowly"')  # fmt: skip
    sample_flags(one)
    example = "export runs/demo --stage dc-ae-dit --layout diffusers --out dit.safetensors"
    one = _verb(verbs, "export", export_verb, "write averaged weights for other programs", example)
    one.add_argument("run", help="run folder")
    one.add_argument("--stage", required=True, help="which one")
    at_flag(one)
    one.add_argument(
        "--layout",
        choices=("open-sora", "bfl", "diffusers"),
        help="of a diffusion stage (default: bfl, the names of the FLUX files)",
    )
    one.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="default fp32")
    one.add_argument("--out", required=True, help="the .safetensors file; it may not exist")
    for name, verb, text in (
        ("status", status_verb, "say how far a run has come"),
        ("report", report_verb, "write report.html"),
    ):
        one = _verb(verbs, name, verb, text, f"{name} runs/demo")
        one.add_argument("run", help="run folder")
        if name == "status":
            json_flag(one)
    one = _verb(verbs, "dashboard", dashboard_verb, "show a run in Aim's pages, on this machine",
                "dashboard runs/demo")  # fmt: skip
    one.add_argument("run", help="run folder")
    one.add_argument("--port", type=port, default=0, help="default: any that is free")
    one.add_argument(
        "--rebuild", action="store_true", help="first make Aim's repository anew from the journals"
    )
    one = _verb(verbs, "verify", verify_verb, "read latents, name damage", "verify runs/demo")
    one.add_argument("store", help="run folder, or the folder of one latent store")
    json_flag(one)
    one = _verb(verbs, "doctor", doctor_verb, "look at this machine", "doctor --storage runs")
    doctor_flags(one)
    example = "completion bash"
    one = _verb(
        verbs, "completion", completion_verb, "print what a shell needs to complete", example
    )
    one.add_argument("shell", choices=SHELLS, help="its output is read by that shell")
    one = _verb(verbs, "stop", stop_verb, "end the driver of a run", "stop runs/demo --save")
    stop_flags(one)
    _verb(verbs, "demo", demo_verb, "the whole course on this machine", "demo")
    return parser


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    verb: Callable[[argparse.Namespace, Settings], int],
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    one = verbs.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: python -m elastic {example}",
    )
    one.add_argument("--storage", help="folder that holds the runs (default: runs)")
    one.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    one.set_defaults(verb=verb)
    return one


def read_plan_file(flags: argparse.Namespace) -> Plan:
    """The plan of a stage file, on the videos of the flags if they are given."""
    plan = load_plan(flags.file)
    for name in ("videos", "captions"):
        if getattr(flags, name) == "":
            raise InputError(f"--{name} '': empty; give a path, or leave --{name} out")
    if flags.captions is not None and flags.videos is None:
        raise InputError("--captions was given without --videos; give both or neither")
    if flags.videos is None:
        return plan
    if flags.captions is None:
        return with_videos(plan, Videos(f"{flags.videos.rstrip('/')}/"))
    return with_videos(plan, Videos(flags.captions, folder=flags.videos))


def with_videos(plan: Plan, videos: Videos) -> Plan:
    """The same plan on other videos."""
    changed: dict[str, Stage] = {}
    for stage in plan.stages:
        fields: dict[str, object] = {"data": videos}
        for field, parent in parents(stage):
            new = changed[parent.name]
            fields[field] = stage.init.replace(stage=new) if field == "init" else new
        changed[stage.name] = stage.replace(**fields)
    return Plan(plan.name, list(changed.values()))


def plan_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Print what would happen."""
    from elastic.plan_text import print_plan

    plan = read_plan_file(flags)
    if flags.videos is not None:
        check_inputs(plan, RunFolder.of(settings.storage_path, plan))
    print_plan(plan, flags, settings)
    return DONE


def encode_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Encode what is missing."""
    check_place(settings.latents, "latents")
    plan = read_plan_file(flags)
    check_inputs(plan, RunFolder.of(settings.storage_path, plan))
    from elastic.course import encode_plan
    from elastic.drive import run_course

    folder = run_course(plan, settings, encode_plan)
    print(f"latents: {folder.latents}")
    return DONE


def repair_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Find what is damaged, and encode that again."""
    check_place(settings.latents, "latents")
    plan = read_plan_file(flags)
    folder = RunFolder.of(settings.storage_path, plan)
    check_inputs(plan, folder)
    from elastic.drive import run_course
    from elastic.repair import repair_plan

    run_course(plan, settings, repair_plan)
    print(f"latents: {folder.latents}")
    return DONE


def verify_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Read latents, and name what is damaged."""
    from elastic import latent_verbs

    return latent_verbs.verify_verb(flags, settings)


def train_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Do whatever is missing."""
    check_place(settings.checkpoints)
    check_place(settings.latents, "latents")
    plan = read_plan_file(flags)
    check_inputs(plan, RunFolder.of(settings.storage_path, plan))
    from elastic.course import train_plan
    from elastic.drive import run_course
    from elastic.grow import grow_and_train
    from elastic.report import print_table, summarise, write_report

    folder = run_course(plan, settings, grow_and_train if flags.grow else train_plan)
    print_table(summarise(folder.root))
    print(f"samples: {folder.root / 'samples'}\nreport:  {write_report(folder.root)}")
    return DONE


def submit_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Have a cluster do whatever is missing."""
    return job_verbs.submit_verb(flags, read_plan_file(flags), settings)


def check_inputs(plan: Plan, folder: RunFolder) -> None:
    """InputError for tables, folders and weights that cannot be used, before anything starts."""
    from elastic.branch import check_branches, left_because
    from elastic.data.table import check_videos
    from elastic.start import INIT, check_origin
    from elastic.weights import finished

    for videos in dict.fromkeys(one for stage in plan.stages for one in stage.data.sources):
        check_videos(videos)
    check_branches(plan, folder)
    for stage in plan.stages:
        if finished(folder.stage(stage.name)) is not None or left_because(plan, folder, stage):
            continue  # its latents may go on being encoded; what it was trained with may be gone
        if not (folder.stage(stage.name) / INIT).exists():  # what has begun needs it no more
            check_origin(stage)
        weights = stage.codec.weights
        if weights is not None and not os.path.isfile(weights):
            raise InputError(
                f"stage {stage.name!r}: vae.weights {weights!r}: no such file; correct the path"
            )
        if isinstance(stage, AutoencoderStage) and isinstance(stage.perceptual, Lpips):
            try:
                check_lpips(Path(stage.perceptual.weights))
            except ValueError as error:
                raise InputError(f"stage {stage.name!r}: perceptual: {error}") from None
        if isinstance(stage, DiffusionStage):
            try:
                stage.text.check()
            except ValueError as error:
                raise InputError(f"stage {stage.name!r}: {error}") from None


def export_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Write averaged weights."""
    import torch

    from elastic.convert import export_stage
    from elastic.record import read_plan

    folder = run_folder(flags.run)
    stage = read_plan(folder).stage(flags.stage)
    dtype = torch.bfloat16 if flags.dtype == "bf16" else torch.float32
    digest = export_stage(folder, stage, flags.layout, dtype, Path(flags.out), flags.at)
    print(f"{flags.out}: {os.path.getsize(flags.out):,} bytes, SHA-256 {digest}")
    return DONE


def completion_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Print a completion script."""
    print(script(make_parser(), flags.shell), end="")
    return DONE


def demo_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """The whole course."""
    from elastic.demo import run_demo

    return run_demo(settings)
