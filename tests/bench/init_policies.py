"""Which init policy serves best when the autoencoder is switched: held-out loss over samples.

A DiT is trained on latents of the first codec (4x8x8, causal, 16 channels, patch 2), then one on
latents of the second (4x32x32, 128 channels, patch 1) under every policy, with the same clips,
order and noise. The clips are moving shapes of 64 px. The codecs are principal components of
patches in those two geometries: made in seconds, the same everywhere, true to their clips.
"""

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

# What lies beside this script is measured, whatever is installed; tiny.py is in tests/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figure import record
from tiny import world_of_one

from elastic.align import Pairs
from elastic.checkpoint import Checkpoints, Fence
from elastic.data.load import Round, Samples
from elastic.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Scene, render_at
from elastic.data.order import Layout, layout_of
from elastic.data.permutation import Indices
from elastic.loop import Run, train_stage
from elastic.meter import Meter
from elastic.objective import FlowMatching
from elastic.sample import to_frames
from elastic.shape_reader import read_shape
from elastic.start import Origin
from elastic.weights import WEIGHTS, load_weights
from elastic.world import World
from models import DCAE, DiT, HunyuanVAE, WordHash
from models.flow import euler_sample
from models.fresh import named_generator
from models.text import pad
from stages import AdamW, Align, Bucket, DiffusionStage, Ema, Fresh, KeepTrunk, Phase, Videos

# B clip, C channel, T, H, W, frames and pixels or latent grid, N patches, P values of a patch

SIDE, FRAMES, RATE = 64, 17, 24.0
NUM_CLIPS, NUM_HELD_OUT, NUM_SAMPLES = 1152, 96, 96
POINTS = 24  # measurements in each run
POLICIES = ("fresh", "keep", "keep-frozen", "align", "align-token", "align-half")


class Clip(NamedTuple):
    """A scene and the seed of where it happens."""

    scene: Scene
    seed: int


def clips(first: int, count: int) -> list[Clip]:
    """Clips `first` and on, each a scene drawn by its number."""
    chosen = []
    for number in range(first, first + count):
        rng = np.random.default_rng([7, number])
        words = [str(rng.choice(list(c))) for c in (SHAPES, COLOURS, DIRECTIONS, SPEEDS)]
        chosen.append(Clip(Scene(*words), number))
    return chosen


def pixels(clip: Clip) -> Tensor:
    """The clip in [-1, 1], (C, T, H, W)."""
    frames_THWC = render_at(clip.scene, (SIDE, SIDE), [k / RATE for k in range(FRAMES)], clip.seed)
    return torch.from_numpy(frames_THWC).permute(3, 0, 1, 2).float() / 127.5 - 1


class PatchCodec(NamedTuple):
    """Principal components of patches; a causal one has a basis of its own for the first frame."""

    stride: tuple[int, int, int]
    lead: int
    bases: tuple[tuple[Tensor, Tensor, Tensor], ...]  # mean P, basis P C, deviation C

    @classmethod
    def fit(cls, stride: tuple[int, int, int], lead: int, channels: int) -> "PatchCodec":
        """Fitted to the first clips, and scaled to unit deviation as stored latents are."""
        x_BCTHW = torch.stack([pixels(clip) for clip in clips(0, 256)])
        bases = []
        for part_BCTHW, down in _parts(x_BCTHW, stride, lead):
            patch_NP = _patches(part_BCTHW, down).flatten(0, 3)
            mean_P = patch_NP.mean(0)
            _, deviation_C, basis_CP = torch.pca_lowrank(patch_NP - mean_P, channels, center=False)
            scale_C = deviation_C / math.sqrt(len(patch_NP))
            bases.append((mean_P, basis_CP, scale_C))
        return cls(stride, lead, tuple(bases))

    def encode(self, x_BCTHW: Tensor) -> Tensor:
        """Latents (B, C, t, h, w)."""
        latents = [
            (_patches(part, down) - mean_P) @ basis_PC / scale_C
            for (part, down), (mean_P, basis_PC, scale_C) in zip(
                _parts(x_BCTHW, self.stride, self.lead), self.bases, strict=True
            )
        ]
        return rearrange(torch.cat(latents, dim=1), "b t h w c -> b c t h w")

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Clips (B, C, T, H, W)."""
        z_BTHWC = rearrange(z_BCTHW, "b c t h w -> b t h w c")
        counts = [self.lead, z_BTHWC.shape[1] - self.lead] if self.lead else [z_BTHWC.shape[1]]
        parts = []
        for z, (mean_P, basis_PC, scale_C), down in zip(
            z_BTHWC.split(counts, dim=1), self.bases, _downs(self.stride, self.lead), strict=True
        ):
            patch = (z * scale_C) @ basis_PC.T + mean_P
            r, p, q = down
            parts.append(
                rearrange(patch, "b t h w (c r p q) -> b c (t r) (h p) (w q)", r=r, p=p, q=q)
            )
        return torch.cat(parts, dim=2)


def _downs(stride: tuple[int, int, int], lead: int) -> list[tuple[int, int, int]]:
    return [(1, *stride[1:]), stride] if lead else [stride]


def _parts(
    x_BCTHW: Tensor, stride: tuple[int, int, int], lead: int
) -> list[tuple[Tensor, tuple[int, int, int]]]:
    """The first frame and the others where the codec is causal, else all whole strides."""
    whole = (x_BCTHW.shape[2] - lead) // stride[0] * stride[0] + lead
    x_BCTHW = x_BCTHW[:, :, :whole]
    pieces = [x_BCTHW[:, :, :lead], x_BCTHW[:, :, lead:]] if lead else [x_BCTHW]
    return list(zip(pieces, _downs(stride, lead), strict=True))


def _patches(x_BCTHW: Tensor, down: tuple[int, int, int]) -> Tensor:
    r, p, q = down
    return rearrange(x_BCTHW, "b c (t r) (h p) (w q) -> b t h w (c r p q)", r=r, p=p, q=q)


class Latents:
    """Latents of clips in memory, under ids that both codecs share."""

    def __init__(self, stage: DiffusionStage, codec: PatchCodec, chosen: list[Clip]) -> None:
        self._z_NCTHW = torch.cat([codec.encode(pixels(clip)[None]) for clip in chosen])
        self._text = stage.text.encode([clip.scene.caption for clip in chosen])
        self._ids = np.array([clip.seed for clip in chosen])
        self._bucket = stage.buckets[0].name

    def counts(self) -> dict[str, int]:
        return {self._bucket: len(self._ids)}

    def layouts(self) -> dict[str, Layout]:
        return {name: layout_of([count]) for name, count in self.counts().items()}

    def sample_ids(self, bucket: Bucket, indices: Indices) -> Indices:
        return self._ids[indices]

    def text_lengths(self, bucket: Bucket, indices: Indices) -> Indices:
        return np.array([len(self._text[i].embedding_LD) for i in indices])

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        for _, indices in rounds:
            text = pad([self._text[i] for i in indices])
            z_BCTHW = self._z_NCTHW[torch.from_numpy(np.asarray(indices))]
            yield Samples(z_BCTHW, text, self._ids[indices], torch.ones(len(indices)))


def old_stage(samples: int) -> DiffusionStage:
    """The stage before the switch."""
    return DiffusionStage(
        name="before",
        data=Videos("none.csv"),
        vae=HunyuanVAE(channels=16, weights="none"),
        model=DiT(depth=2, depth_single=2, width=128, heads=4, patch=2),
        text=WordHash(width=32),
        init=Fresh(seed=0),
        rate=RATE,
        schedule=[Phase(until=samples, buckets=[Bucket("64px", frames=17, batch=16, micro=16)])],
        optimizer=AdamW(
            lr=2e-3, betas=(0.9, 0.99), warmup=min(500, samples // 8), decay=samples // 3
        ),
        ema=Ema(halflife=500),
        save_every=samples,
        log_every=samples // POINTS,
        evaluate_every=samples // POINTS,
        held_out=NUM_HELD_OUT,
    )


def new_stage(policy: str, seed: int, samples: int, parent: DiffusionStage) -> DiffusionStage:
    """The stage after the switch, under one policy."""
    init = {
        "fresh": Fresh(seed=seed),
        "keep": KeepTrunk(parent, seed=seed),
        "keep-frozen": KeepTrunk(parent, seed=seed, warmup_samples=samples // 12),
        "align": Align(parent, seed=seed),
    }[policy.removesuffix("-token").removesuffix("-half")]
    until = samples // 2 if policy.endswith("-half") else samples
    unit = "pixel" if isinstance(init, KeepTrunk) and not policy.endswith("-token") else "token"
    return parent.replace(
        name="after",
        vae=DCAE(channels=128, weights="none"),
        model=parent.model.replace(patch=1, rope_unit=unit),
        init=init,
        seed=seed,
        schedule=[Phase(until=until, buckets=[Bucket("64px", frames=16, batch=16, micro=16)])],
        optimizer=parent.optimizer.replace(warmup=min(500, until // 8), decay=until // 3),
        save_every=until,
        log_every=samples // POINTS,
        evaluate_every=samples // POINTS,
    )


@functools.cache
def codecs() -> tuple[PatchCodec, PatchCodec]:
    """The codec before the switch and the one after it."""
    torch.manual_seed(0)  # pca_lowrank draws
    return PatchCodec.fit((4, 8, 8), 1, 16), PatchCodec.fit((4, 32, 32), 0, 128)


@functools.cache
def latents(stage: str, held_out: bool) -> Latents:
    """The latents of a stage; all its versions share them."""
    before = old_stage(POINTS * 16)
    codec = codecs()[0 if stage == "before" else 1]
    like = before if stage == "before" else new_stage("fresh", 0, POINTS * 16, before)
    first, count = (NUM_CLIPS, NUM_HELD_OUT) if held_out else (0, NUM_CLIPS)
    return Latents(like, codec, clips(first, count))


def train(stage: DiffusionStage, world: World, folder: Path, origin: Origin) -> list[Any]:
    """Train a stage into a folder; its metric lines."""
    lines: list[Any] = []
    fence = Fence.take(folder)
    run = Run(
        folder=folder,
        world=world,
        checkpoints=Checkpoints(folder, world, fence, lambda *a, **k: None),
        meter=Meter(stage, world, fence.attempt, lines.append),
        stop_wanted=lambda: False,
        event=lambda *a, **k: None,
        origin=origin,
    )
    train_stage(
        stage,
        FlowMatching(
            stage, latents(stage.name, False), latents(stage.name, True), stage.text.null()
        ),
        run,
    )
    return lines


def curve(lines: list[Any]) -> list[tuple[int, float]]:
    """Held-out loss by samples seen."""
    return [
        (line["position"], line["values"]["loss"])
        for line in lines
        if line["context"].get("subset") == "held_out"
    ]


class Task(NamedTuple):
    """One run after the switch."""

    parent: Path
    parent_samples: int
    policy: str
    seed: int
    samples: int


def run_task(task: Task) -> dict[str, Any]:
    """Train one stage in this process: its curve, and what a reader of pixels sees at the end."""
    parent = old_stage(task.parent_samples)
    stage = new_stage(task.policy, task.seed, task.samples, parent)
    origin = Origin(
        task.parent, lambda: Pairs(parent, latents("before", False), latents("after", False))
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, world_of_one() as world:
        lines = train(stage, world, Path(scratch), origin)
        named = read_samples(stage, codecs()[1], Path(scratch) / WEIGHTS, task.seed)
    done = {"policy": task.policy, "seed": task.seed, "curve": curve(lines), "named": named,
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    print(json.dumps({**done, "curve": done["curve"][-1]}), file=sys.stderr, flush=True)
    return done


def read_samples(
    stage: DiffusionStage, codec: PatchCodec, weights: Path, seed: int
) -> dict[str, float]:
    """Shares of samples in which the captioned colour, shape and direction are seen."""
    model = load_weights(stage.build("cpu"), weights)
    bucket = stage.buckets[0]
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    chosen = clips(NUM_CLIPS, NUM_SAMPLES)
    shape = (NUM_SAMPLES, stage.codec.channels, *grid)
    z_BCTHW = euler_sample(
        model,
        torch.randn(shape, generator=named_generator("bench", seed)),
        pad(stage.text.encode([clip.scene.caption for clip in chosen])),
        stage.text.null(),
        steps=25,
        guidance=3.0,
        alpha=stage.times(bucket).alpha,
    )
    hits: dict[str, int] = {"colour": 0, "shape": 0, "direction": 0}
    for clip, film in zip(chosen, to_frames(codec.decode(z_BCTHW)), strict=True):
        reading = read_shape(film)._asdict()
        for what in hits:
            hits[what] += reading[what] == getattr(clip.scene, what)
    return {what: hit / NUM_SAMPLES for what, hit in hits.items()}


def figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean curves, spreads of the ends, and where each policy passes the end of `fresh`."""
    final = {r["seed"]: r["curve"][-1][1] for r in results if r["policy"] == "fresh"}
    budget = max(r["curve"][-1][0] for r in results)
    table: dict[str, Any] = {}
    for policy in dict.fromkeys(r["policy"] for r in results):
        own = [r for r in results if r["policy"] == policy]
        ends = [r["curve"][-1][1] for r in own]
        passed = [
            next((at for at, loss in r["curve"] if loss <= final[r["seed"]]), None) for r in own
        ]
        points = zip(*[r["curve"] for r in own], strict=True)
        table[policy] = {
            "curve": [[p[0][0], round(statistics.mean(v for _, v in p), 5)] for p in points],
            "final_loss": {"median": statistics.median(ends), "all": ends},
            "share_of_samples_to_fresh": [None if at is None else at / budget for at in passed],
            "named": {w: statistics.mean(r["named"][w] for r in own) for w in own[0]["named"]},
        }
    return table


def psnr(codec: PatchCodec) -> float:
    """PSNR in dB on the held-out clips."""
    x_BCTHW = torch.stack([pixels(clip) for clip in clips(NUM_CLIPS, NUM_HELD_OUT)])
    y_BCTHW = codec.decode(codec.encode(x_BCTHW))
    error = (y_BCTHW.clamp(-1, 1) - x_BCTHW[:, :, : y_BCTHW.shape[2]]).square().mean()
    return float(10 * torch.log10(4 / error))


def main() -> None:
    """Train the parent, then every policy for every seed, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4_608, help="after the switch")
    parser.add_argument("--parent-samples", type=int, default=6_144, help="before it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the samples")
    flags = parser.parse_args()
    shorter = 10 if flags.quick else 1
    unit = 16 * POINTS  # whole batches at every measurement
    before = flags.parent_samples // shorter // unit * unit
    after = flags.samples // shorter // unit * unit
    with tempfile.TemporaryDirectory() as folder:
        with world_of_one() as world:
            lines = train(old_stage(before), world, Path(folder), Origin())
        print(f"before the switch: {curve(lines)[-1]}", file=sys.stderr, flush=True)
        tasks = [
            Task(Path(folder), before, policy, seed, after)
            for seed in range(1 if flags.quick else flags.seeds)
            for policy in flags.policies
        ]
        with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
            results = pool.map(run_task, tasks, chunksize=1)
    table = figures(results)
    shares = table.get("align", {}).get("share_of_samples_to_fresh", [None])
    first, second = codecs()
    record(
        "init_policies",
        figures={
            "samples": after,
            "psnr_db": {"before": psnr(first), "after": psnr(second)},
            "loss_before_the_switch": curve(lines),
            "policies": table,
        },
        goal="align reaches the final held-out loss of fresh in at most half of its samples",
        holds=all(share is not None and share <= 0.5 for share in shares),
        keep=not flags.quick,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
