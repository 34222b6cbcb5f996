"""The verb `sample`: films of any captions, from a stage's end or one of its checkpoints."""

import argparse
from dataclasses import replace
from pathlib import Path

from elastic.errors import InputError
from elastic.flags import at_flag, at_least_one, finite, shift
from elastic.folders import RunFolder
from elastic.look_verbs import run_folder
from elastic.settings import Settings
from stages.plan import Plan
from stages.schedule import Bucket
from stages.stage import DiffusionStage

# As in elastic/cli.py: what costs seconds to import is imported by the verb that needs it.


def sample_flags(parser: argparse.ArgumentParser) -> None:
    """What `sample` takes."""
    parser.add_argument("run", help="run folder")
    parser.add_argument("--stage", help="diffusion stage (default: the last that is finished)")
    at_flag(parser)
    parser.add_argument(
        "--bucket", metavar="NAME", help="size and length, as 256px-33f (default: the longest)"
    )
    parser.add_argument("--caption", action="append", default=[], help="may be given many times")
    parser.add_argument(
        "--captions", metavar="FILE", help="one a line, or the column text of a .csv or .parquet"
    )
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--image", metavar="FILE", help="first frame (PNG or JPEG) of every video")
    parser.add_argument("--out", help="folder for the mp4 files (default: in the run folder)")
    parser.add_argument("--steps", type=at_least_one, default=25, help="Euler steps (default 25)")
    parser.add_argument("--guidance", type=finite, default=3.0, help="default 3.0; 1 is none")
    parser.add_argument("--shift", type=shift, help="of time (default: that of the stage)")
    parser.add_argument("--seed", type=int, default=0)


def sample_verb(flags: argparse.Namespace, settings: Settings) -> int:
    """Make videos."""
    from elastic.checkpoint_weights import weights_of
    from elastic.course import sample_request
    from elastic.record import read_plan
    from elastic.sample import make_samples

    folder = run_folder(flags.run)
    stage = chosen_stage(read_plan(folder), folder, flags.stage)
    captions = chosen_captions(flags.caption, flags.captions)
    asked = "asked" if flags.at is None else f"asked-{flags.at}"
    target = (Path(flags.out) if flags.out else folder.samples(stage.name) / asked).absolute()
    bucket = None if flags.bucket is None else chosen_bucket(stage, flags.bucket)
    with weights_of(folder.stage(stage.name), stage, flags.at, target) as weights:
        request = sample_request(folder, stage, captions, target, weights)
        request = replace(
            request,
            bucket=bucket or request.bucket,
            negative=flags.negative,
            steps=flags.steps,
            guidance=flags.guidance,
            shift=flags.shift,
            seed=flags.seed,
            image=None if flags.image is None else Path(flags.image).absolute(),
        )
        for path in make_samples(request):
            print(path)
    return 0


def chosen_stage(plan: Plan, folder: RunFolder, name: str | None) -> DiffusionStage:
    """The diffusion stage of this name, or the last that is finished."""
    from elastic.weights import finished

    if name is not None:
        stage = plan.stage(name)
        if not isinstance(stage, DiffusionStage):
            raise InputError(f"stage {name!r} trains an autoencoder; sample from a diffusion stage")
        return stage
    stages = (stage for stage in plan.stages if isinstance(stage, DiffusionStage))
    done = [stage for stage in stages if finished(folder.stage(stage.name))]
    if not done:
        raise InputError(
            f"no diffusion stage of {str(folder.root)!r} is finished; name one that is under way, "
            "and one of its checkpoints: --stage NAME --at POSITION"
        )
    return done[-1]


def chosen_bucket(stage: DiffusionStage, name: str) -> Bucket:
    """The bucket of this name."""
    named = {bucket.name: bucket for bucket in stage.buckets}
    if name not in named:
        raise InputError(f"stage {stage.name!r} has no bucket {name!r}; it has {', '.join(named)}")
    return named[name]


def chosen_captions(given: list[str], file: str | None) -> tuple[str, ...]:
    """Those that were given, and then those of the file."""
    from elastic.data.table import read_captions

    captions = (*given, *([] if file is None else read_captions(file)))
    if not captions:
        raise InputError(
            "no caption: give --caption 'a red circle', many times if you like, or --captions FILE"
        )
    return captions
