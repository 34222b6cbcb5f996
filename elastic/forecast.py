"""What a plan would do, from arithmetic alone: tokens, parameters, memory, FLOPs, disk."""

import math
import os
from collections.abc import Iterable, Iterator
from operator import mul
from pathlib import Path

import torch
from torch import nn

from elastic.branch import left_because
from elastic.checkpoint_store import DEFAULT_KEEP, Keep
from elastic.data.clips import Clips
from elastic.data.places import is_there
from elastic.data.schema import TEXT_BLOCK
from elastic.data.table import read_tables
from elastic.fit import memory_lines, shown, workers_on
from elastic.folders import RunFolder
from elastic.init_table import shapes_of
from elastic.outlook import Faults, outlook_lines, sample_flops, scale_lines
from elastic.shares import computed, share_lines
from elastic.start import check_origin
from elastic.traffic import update_traffic
from elastic.weights import finished
from elastic.worth_a_look import worth_a_look
from models.t5_clip import T5Clip
from stages.init import Fresh, FromFile, KeepTrunk, branch_of
from stages.lineage import branches
from stages.noise import Noise
from stages.plan import Plan
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

_BYTES_SAVED = 16  # fp32: value, two moments, average
_BYTES_SAVED_OF_CRITIC = 12  # fp32: value, two moments
BYTES_A_WEIGHT = 4


def forecast(
    plan: Plan,
    storage: Path,
    gpus: int | None = None,
    faults: Faults | None = None,
    keep: Keep = DEFAULT_KEEP,
) -> str:
    """The text that `plan` prints, for so many GPUs or the fewest that each stage asks for.

    With the expected goodput, if it is said what faults there are. InputError where a
    stage cannot start as its init policy says, or on so few GPUs.
    """
    folder = RunFolder.of(storage, plan)
    lines = [f"plan {plan.name}: {len(plan.stages)} stages, kept in {folder.root}"]
    for number, stage in enumerate(plan.stages, 1):
        why = left_because(plan, folder, stage)
        done = "finished" if finished(folder.stage(stage.name)) else "left" if why else "to do"
        lines += ["", f"{number}. {stage.name} ({type(stage).__name__}, {done})"]
        lines += [f"   {why}"] if why else []
        lines += [f"   {line}" for line in _stage(stage, gpus)]
        if faults is not None:
            workers, size = workers_on(stage, gpus), saved_bytes(stage)
            lines += [f"   {line}" for line in outlook_lines(stage, workers, faults, size)]
    lines += ["", f"disk: {_disk(plan, keep)}"]
    lines += [f"not here: {table!r}; train needs it" for table in absent(plan)]
    lines += [f"worth a look: {said}" for stage in plan.stages for said in worth_a_look(stage)]
    if faults is not None:
        largest = max(plan.stages, key=saved_bytes)
        scales = scale_lines(faults, saved_bytes(largest), gpus, largest.multiple)
        lines += ["", *scales]
    return "\n".join(lines)


def _disk(plan: Plan, keep: Keep) -> str:
    """What the finished run holds: its checkpoints while it trains, weights, latents."""
    counts = [count_parameters(stage) for stage in plan.stages]
    saved = [saved_bytes(stage) for stage in plan.stages]
    held = [most_held(plan, stage, keep) for stage in plan.stages]
    parts = [
        f"weights {shown(sum(counts) * BYTES_A_WEIGHT)}",
        f"checkpoints {shown(sum(map(mul, held, saved)))} ({keep}), "
        f"{shown(max(saved))} more while one is written",
    ]
    if not any(isinstance(stage, DiffusionStage) for stage in plan.stages):
        return "; ".join(parts)
    latents = most_latent_bytes(plan)
    if latents is None:
        return "; ".join([*parts, "latents: not known before the clips are there"])
    return "; ".join([*parts, f"latents at most {shown(latents)}, if every clip fills each bucket"])


def most_held(plan: Plan, stage: Stage, keep: Keep) -> int:
    """Checkpoints that a stage may hold at once, with those that branches start from."""
    return keep.most(stage.budget) + len({*branches(plan.stages, stage).values()})


def absent(plan: Plan) -> list[str]:
    """The tables and folders of clips that are not on this machine."""
    named = dict.fromkeys(one.table for stage in plan.stages for one in stage.data.sources)
    return [table for table in named if not is_there(table)]


def most_latent_bytes(plan: Plan) -> int | None:
    """What is stored of all clips if each fills each bucket; None before the tables are there."""
    stages = [stage for stage in plan.stages if isinstance(stage, DiffusionStage)]
    sources = [videos for stage in stages for videos in stage.data.sources]
    if not all(is_there(videos.table) for videos in sources):
        return None
    latents = 0
    for stage in stages:
        clips = Clips.joined(read_tables(stage.data))
        a_clip = sum(latent_bytes(stage, bucket) for bucket in stage.buckets)
        a_clip += len(stage.buckets) * text_bytes(stage, clips.texts())
        latents += len(clips) * a_clip
    return latents


def latent_bytes(stage: Stage, bucket: Bucket) -> int:
    """What is stored of a clip in this bucket beside its text."""
    t, h, w = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    values = stage.codec.stored_channels * t * h * w
    if isinstance(stage, DiffusionStage) and stage.gives(bucket):
        values += stage.codec.channels * 2 * h * w
    return values * torch.bfloat16.itemsize


def text_bytes(stage: DiffusionStage, captions: Iterable[str]) -> int:
    """The most that is stored of the text of one clip in one bucket, in whole blocks of tokens."""
    blocks = -(-stage.text.most_tokens(captions) // TEXT_BLOCK)
    values = blocks * TEXT_BLOCK * stage.text.width + stage.text.pooled_width
    return values * torch.bfloat16.itemsize


def most_text_bytes(stage: DiffusionStage) -> int | None:
    """The most that is stored of any text in one bucket; None where only the captions tell."""
    return text_bytes(stage, ()) if isinstance(stage.text, T5Clip) else None


def _stage(stage: Stage, gpus: int | None) -> list[str]:
    (low, high), workers = stage.workers, workers_on(stage, gpus)
    module = stage.build()
    count = count_parameters(stage)
    return [
        *_data(stage),
        f"codec       {_codec(stage)}",
        *(_conditions(stage) if isinstance(stage, DiffusionStage) else []),
        f"parameters  {count:,}",
        *_start(stage),
        f"workers     {low} to {high}{_layout(stage, workers)}",
        *memory_lines(stage, module, gpus),
        f"checkpoint  {shown(saved_bytes(stage))} every {stage.save_every:,} samples, with "
        f"{shown(saved_bytes(stage) / stage.holders(workers))} of host memory on each of "
        f"{workers} workers",
        *(_losses(stage) if isinstance(stage, AutoencoderStage) else []),
        *_phases(stage, module, gpus),
    ]


def _data(stage: Stage) -> list[str]:
    """Of a mix, what each source has of the samples."""
    if len(stage.data.sources) == 1:
        return []
    each = zip(stage.data.shares, stage.data.sources, strict=True)
    return [f"data        {', '.join(f'{float(s):.4g} {v.table}' for s, v in each)}"]


def _layout(stage: Stage, workers: int) -> str:
    """What so many workers share, where that is more than the model."""
    if stage.multiple == 1 and stage.shard_within is None:
        return ""
    holders, context = stage.holders(workers), stage.context
    said = [f", in multiples of {stage.multiple}; of {workers}, {workers // holders} x {holders}"]
    said.append("hold the model" if holders < workers else "hold the model together")
    if context > 1:
        said.append(f"and {workers // context} x {context} share the tokens of a sample")
    return " ".join(said)


def _start(stage: Stage) -> list[str]:
    """What the init policy does with each parameter, and what positions mean after a switch."""
    init = stage.init
    if isinstance(init, Fresh):
        return [f"start       Fresh(seed={init.seed}): every parameter new"]
    origin = init.path if isinstance(init, FromFile) else init.stage.name
    at = branch_of(init)
    where = "" if at is None else f", from its checkpoint at {at:,} samples"
    lines = [f"start       {type(init).__name__}({origin}){where}"]
    if isinstance(init, FromFile) and not Path(init.path).exists():
        return [*lines, "  not known before the file is there"]
    lines += [f"  {line}" for line in check_origin(stage).lines()]
    if isinstance(init, KeepTrunk) and isinstance(stage, DiffusionStage):
        lines.append(f"  positions  {_positions(init.stage)}, before; {_positions(stage)}, here")
    return lines


def _positions(stage: DiffusionStage) -> str:
    _, height, width = stage.codec.stride
    patch, steps = stage.model.patch, stage.model.spacing(stage.codec.stride)
    return f"a token of {height * patch}x{width * patch} px is {steps[1]:g} x {steps[2]:g} steps"


def _losses(stage: AutoencoderStage) -> list[str]:
    terms = ["absolute and squared error of pixels"]
    if stage.kl_weight:
        terms.append(f"{stage.kl_weight:g} KL")
    if stage.perceptual is not None:
        terms.append(f"{stage.perceptual.weight:g} {stage.perceptual.name}")
    lines = [f"losses      {' + '.join(terms)}"]
    critic = stage.adversarial
    if critic is not None:
        lines.append(
            f"  from {critic.start:,} samples on + {critic.weight:g} hinge loss of a video "
            f"discriminator: {_size(critic.build('meta')):,} parameters, whole on every worker"
        )
    return lines


def saved_bytes(stage: Stage) -> int:
    """A checkpoint: the model's state and the critic's, which has no average."""
    critic = stage.adversarial if isinstance(stage, AutoencoderStage) else None
    extra = 0 if critic is None else _size(critic.build("meta")) * _BYTES_SAVED_OF_CRITIC
    return count_parameters(stage) * _BYTES_SAVED + extra


def count_parameters(stage: Stage) -> int:
    """Parameters that the stage trains, and those that it holds still."""
    return sum(math.prod(shape) for shape in shapes_of(stage).values())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _phases(stage: Stage, module: nn.Module, gpus: int | None) -> list[str]:
    lines, start = [], 0
    for phase in stage.schedule:
        cycles = (phase.until - start) // phase.cycle
        lines.append(f"samples     {start:,} to {phase.until:,}: {cycles:,} rounds of")
        for bucket in phase.buckets:
            lines.append(
                f"  {bucket.name:<12}  batch {bucket.batch}, {_shape(stage, module, bucket, gpus)}"
            )
            lines += [f"    {line}" for line in share_lines(stage, bucket, gpus)]
        start = phase.until
    return lines


def _shape(stage: Stage, module: nn.Module, bucket: Bucket, gpus: int | None) -> str:
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    shape = f"latent {stage.codec.channels}x{'x'.join(map(str, grid))}"
    if not isinstance(stage, DiffusionStage):
        return shape
    frames, height, width = stage.model.token_grid(grid)
    workers, flops = workers_on(stage, gpus), sample_flops(stage, bucket)
    dealt = computed(stage, bucket, workers)
    text = most_text_bytes(stage)
    sent = update_traffic(stage, module, bucket, stage.text.most_tokens(()), workers).total
    return (
        f"{shape}, {frames * height * width:,} tokens, time shift "
        f"{stage.times(bucket).alpha:.2f}, {_flops(flops)} a sample, "
        f"{_flops(flops * dealt / stage.context)} an update on each of {workers} workers, which "
        f"sends {shown(sent / workers)}, "
        f"{shown(latent_bytes(stage, bucket))} stored a clip"
        + (f" + up to {shown(text)} of text" if text else "")
    )


def _codec(stage: Stage) -> str:
    """The codec, and what decides its latents."""
    codec = stage.codec
    t, h, w = codec.stride
    said = [f"{codec.name} {t}x{h}x{w}, {codec.channels} channels"]
    if isinstance(stage, DiffusionStage) and isinstance(stage.vae, AutoencoderStage):
        said.append(f"trained by {stage.vae.name}")
    if codec.weights is not None:
        said.append(_file(codec.weights))
    if isinstance(stage, DiffusionStage):
        said.append(f"{codec.normalisation} statistics")
        said += [f"tiles of {codec.tiling.pixels} px"] if codec.tiling else []
        said += ["a sample of the posterior"] if codec.mode == "sample" else []
    return ", ".join(said)


def _conditions(stage: DiffusionStage) -> Iterator[str]:
    """Text, given frames and noise, as the DiT gets them."""
    text = stage.text
    named = type(text).__name__
    if isinstance(text, T5Clip):
        named += f" ({_file(text.t5)}, {_file(text.clip)}), at most {text.tokens} tokens"
    dropout = stage.text_dropout
    shares = (
        f"{dropout:g}" if isinstance(dropout, float) else " and ".join(f"{d:g}" for d in dropout)
    )
    yield f"text        {named}; dropped {shares}"
    if stage.given is not None:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in stage.given)
        yield f"given       {weights}"
    if stage.noise != Noise():
        yield f"noise       {stage.noise.text()}"


def _file(path: str) -> str:
    return path if os.path.exists(path) else f"{path} (not there yet)"


def _flops(count: float) -> str:
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while count >= base and power < len(units) - 1:
        count /= base
        power += 1
    return f"{count:.3g} {units[power]}"
