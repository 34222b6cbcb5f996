"""Samples while a stage trains: for a few of its captions, from the average as it stands.

In the loop, not beside it: the average lies in parts on the ranks, whose GPUs are all taken. The
ranks deal the captions out and walk them together, as a sharded model wants; the first rank decodes
what comes of it, one clip at a time, with a codec that it holds only meanwhile.
"""

# B sample, C channel, T frame, H, W latent grid

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from elastic.data.clips import Clip
from elastic.data.latents import Scale
from elastic.data.load import Source
from elastic.ema import EmaWeights
from elastic.errors import InputError
from elastic.film import write_mp4
from elastic.folders import RunFolder
from elastic.kernels import eager
from elastic.meter import is_due
from elastic.sample import captions_of, longest_bucket, to_frames
from elastic.sampler import Guided, noise_of, walk
from elastic.tries import Tries
from elastic.weights import file_digest, load_weights
from elastic.world import World
from models.codec import CodecModule
from models.text import TextBatch, TextEmbedding
from stages.stage import DiffusionStage

log = logging.getLogger(__name__)

NUM_PREVIEWS = 4  # every worker waits for them
_USUAL = Guided()
_MOST_TRIES = 2  # of a position: one may have ended for another reason


@dataclass(frozen=True)
class PreviewJob:
    """Where the samples of a stage lie, and what their latents are decoded with: plain data."""

    root: Path  # of the run
    codec_weights: Path
    digest: str  # of that file
    scale: Scale
    guided: Guided = _USUAL


class Shown(NamedTuple):
    """A caption, its place among those of the stage's end, and where its text is stored."""

    place: int
    caption: str
    row: int  # of a held-out sample of the stage's longest clips


class Previews:
    """Makes the samples of one stage; every rank holds one, and calls each method."""

    def __init__(
        self,
        stage: DiffusionStage,
        job: PreviewJob,
        clips: Iterable[Clip],
        held_out: Source,
        null: TextEmbedding,
    ) -> None:
        """`clips` are those whose captions are sampled at the stage's end."""
        self._stage = stage
        self._job = job
        self._held_out = held_out
        self._null = null
        self._shown = shown(stage, clips, held_out)
        self._sampled_at = 0
        self.folder = RunFolder(job.root).samples(stage.name)

    def begin(self, world: World, position: int) -> None:
        """Find out what has been sampled on the way to this position, by whatever attempt."""
        known = world.on_first(lambda: positions_in(self.folder))
        self._sampled_at = max((p for p in known if p <= position), default=0)

    def is_due(self, position: int) -> bool:
        """Whether samples are to be made at this position."""
        every = self._stage.sample_every
        return bool(every and self._shown) and is_due(every or 1, position, self._sampled_at)

    def make(
        self, model: nn.Module, ema: EmaWeights, world: World, position: int, tell: "Teller"
    ) -> None:
        """Publish the samples of this position, unless they are there; what fails is told.

        Nothing of it is kept by the model, the average or the order, and training goes on. Given up
        when a rank is asked to stop: whoever goes on from here makes them.
        """
        began, kind, reason = time.monotonic(), "preview", "averaged weights"
        if world.on_first(lambda: position in positions_in(self.folder)):
            reason = "made before"  # the attempt that made them may not have lived to tell
        else:
            watch = partial(_watch, world, position, tell)
            try:
                problem = self._try(model, ema, world, position, watch)
            except _Asked:
                self._note(world, position, tries=0)
                log.info("no samples at %s: asked to stop", f"{position:,}")
                return
            if problem is not None:
                kind, reason = "preview_failed", problem
        self._sampled_at = position
        more: dict[str, Any] = {"seconds": round(time.monotonic() - began, 3)}  # Any: of an event
        if kind == "preview":
            paths = [self._path(position, one) for one in self._shown]
            more["paths"] = [str(path.relative_to(self._job.root)) for path in paths]
            more["captions"] = [one.caption for one in self._shown]
        tell.event(kind, position, reason, **more)

    def _try(
        self,
        model: nn.Module,
        ema: EmaWeights,
        world: World,
        position: int,
        watch: Callable[[], None],
    ) -> str | None:
        """Make and publish them; why there are none, on every rank.

        Whatever ends an attempt here would end the next one at the same place: a few may try.
        """
        tries = world.on_first(self._tries_of(position).count)
        if tries >= _MOST_TRIES:
            return f"{tries} attempts ended while they made them"
        problem = self._note(world, position, tries + 1)
        if problem is None:
            texts, problem = self._texts(world)
        if problem is None:
            with ema.in_place(), eager():
                latents = self._walk(model, world, texts, watch)
            problem = self._publish(world, latents, position, watch)
        self._note(world, position, tries=0)
        return problem

    def _tries_of(self, position: int) -> Tries:
        return Tries(self.folder / f".tries-{position}")

    def _note(self, world: World, position: int, tries: int) -> str | None:
        """How many attempts have begun with this position and not come to its end."""
        note = partial(self._tries_of(position).note, tries)
        return world.on_first(partial(_tried, note))

    def _texts(self, world: World) -> tuple[list[TextBatch], str | None]:
        """The text of each caption that this rank walks, in turn; or why a rank has none."""
        texts: list[TextBatch] = []

        def read() -> None:
            for first in range(world.reader, world.reader + len(self._shown), world.readers):
                texts.append(self._text(self._shown[min(first, len(self._shown) - 1)]))

        problems = world.gather(_tried(read))
        return texts, next((one for one in problems if one is not None), None)

    def _path(self, position: int, one: Shown) -> Path:
        return self.folder / str(position) / f"{one.place:02d}.mp4"

    def _walk(
        self, model: nn.Module, world: World, texts: list[TextBatch], watch: Callable[[], None]
    ) -> list[Tensor]:
        """The latents of each caption, on the CPU of every rank.

        Every rank runs the same number of times: one with no caption left walks the last again.
        """
        count = len(self._shown)

        def watched(*inputs: Any) -> Tensor:  # Any: whatever the model takes
            watch()
            velocity_BCTHW: Tensor = model(*inputs)
            return velocity_BCTHW

        latents: list[Tensor] = []
        for turn, first in enumerate(range(0, count, world.readers)):
            mine = first + world.reader
            place = self._shown[min(mine, count - 1)].place
            z_BCTHW = self._walk_one(watched, world, place, texts[turn])
            for number in range(first, min(first + world.readers, count)):
                own = z_BCTHW if number == mine and world.counts else torch.zeros_like(z_BCTHW)
                latents.append(world.sum(own.clone()).cpu())
        return latents

    def _walk_one(
        self, model: Callable[..., Tensor], world: World, place: int, text: TextBatch
    ) -> Tensor:
        stage, bucket = self._stage, longest_bucket(self._stage)
        grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
        noise_BCTHW = noise_of((stage.codec.channels, *grid), place)[None]
        z_BCTHW = noise_BCTHW.to(world.device)
        return walk(stage, model, z_BCTHW, text, self._null, self._job.guided)

    def _text(self, one: Shown) -> TextBatch:
        """As it was embedded for training: no text encoder has to be here."""
        bucket = longest_bucket(self._stage)
        (samples,) = self._held_out.fetch_all([(bucket, np.array([one.row]))])
        assert samples.text is not None, "a diffusion stage reads latents with their text"
        text_BLD, mask_BL, pooled_BD = samples.text
        return TextBatch(text_BLD.float(), mask_BL, pooled_BD.float())

    def _publish(
        self, world: World, latents: list[Tensor], position: int, watch: Callable[[], None]
    ) -> str | None:
        """Decode on the first rank, and publish by one rename; why that failed, on every rank."""
        darkroom = _Darkroom(self._stage, self._job, self.folder / f".{position}", world.device)
        names = [self._path(position, one).name for one in self._shown]
        steps: list[Callable[[], None]] = [
            darkroom.open,
            *(partial(darkroom.add, *pair) for pair in zip(names, latents, strict=True)),
            partial(darkroom.publish, self.folder / str(position)),
        ]
        try:
            for step in steps:
                watch()  # who waits is alive too
                problem = world.on_first(partial(_tried, step))
                if problem is not None:
                    return problem
        finally:
            darkroom.close()
        return None


class Teller(NamedTuple):
    """What is said meanwhile: signs of life, what came of it, and whether this rank shall stop."""

    beat: Callable[[str, int], None]
    event: Callable[..., None]
    stop_wanted: Callable[[], bool]


class _Asked(Exception):
    """A rank has been asked to stop; raised on all of them."""


def _watch(world: World, position: int, tell: Teller) -> None:
    """Give a sign of life, and find out whether to go on."""
    tell.beat("sample", position)
    if world.most(int(tell.stop_wanted())):
        raise _Asked


class _Darkroom:
    """Latents to films in a draft folder, which becomes the published one when all are there."""

    def __init__(
        self, stage: DiffusionStage, job: PreviewJob, draft: Path, device: torch.device
    ) -> None:
        self._stage, self._job, self._draft, self._device = stage, job, draft, device
        self._codec: CodecModule | None = None
        self._has_begun = False

    def open(self) -> None:
        """Load the codec, and begin with an empty draft: a killed attempt may have left one."""
        weights = self._job.codec_weights
        if file_digest(weights) != self._job.digest:
            raise InputError(f"{weights} are not the weights that the latents were made with")
        self._has_begun = True
        shutil.rmtree(self._draft, ignore_errors=True)
        self._draft.mkdir(parents=True)
        module = load_weights(self._stage.codec.build(), weights).to(self._device)
        assert isinstance(module, CodecModule), f"{self._stage.codec.name} built {type(module)}"
        self._codec = module

    @torch.no_grad()
    def add(self, name: str, z_BCTHW: Tensor) -> None:
        """Decode one clip."""
        if not z_BCTHW.isfinite().all():
            raise ValueError("the latents are not finite; look at the stage's loss")
        assert self._codec is not None, "opened first"
        x_BCTHW = self._codec.decode(self._job.scale.restore(z_BCTHW.to(self._device)))
        write_mp4(self._draft / name, to_frames(x_BCTHW)[0], self._stage.rate)

    def publish(self, folder: Path) -> None:
        """Make the draft visible; what another attempt has published stays."""
        os.rename(self._draft, folder)

    def close(self) -> None:
        """Give back the codec's memory, and the draft of what could not be published."""
        if not self._has_begun:
            return
        self._codec = None
        shutil.rmtree(self._draft, ignore_errors=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # kept for a codec, it would be missing in the next update


def shown(stage: DiffusionStage, clips: Iterable[Clip], held_out: Source) -> list[Shown]:
    """The first captions of the stage's end whose text is stored, with their places there."""
    bucket = longest_bucket(stage)
    indices = np.arange(held_out.counts()[bucket.name])
    stored = dict(zip(held_out.sample_ids(bucket, indices).tolist(), indices, strict=True))
    clips = list(clips)
    rows = {clip.text: int(stored[clip.sample_id]) for clip in clips if clip.sample_id in stored}
    named = enumerate(captions_of(clips))
    return [Shown(i, text, rows[text]) for i, text in named if text in rows][:NUM_PREVIEWS]


def positions_in(folder: Path) -> list[int]:
    """The positions at which samples of a stage were published, in order."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _tried(step: Callable[[], None]) -> str | None:
    """What went wrong: films are nothing that training has to end for."""
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
