"""Videos from a finished stage: samples of a DiT for captions, or reconstructions of a codec."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from elastic.data.assign import Members, held_out_name
from elastic.data.clips import Clip
from elastic.data.decode import BadVideo, decode_clip, to_unit
from elastic.data.latents import Scale, chunk_size, encode_still, load_codec
from elastic.errors import InputError, StageBlocked
from elastic.film import contact_sheet, write_mp4
from elastic.record import difference
from elastic.weights import file_digest, load_weights
from models.flow import conditioned, euler_sample, time_shift
from models.fresh import named_seed
from models.given import given_frames
from models.text import TextBatch, TextEmbedding, pad
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

log = logging.getLogger(__name__)

_CHUNK = 8  # clips decoded at once
NUM_SAMPLES = 16
_MOST_LOOKED_AT = 256  # held-out clips
STEPS, GUIDANCE, SEED = 25, 3.0, 0


class Guided(NamedTuple):
    """In how many steps, and how strongly led by the text."""

    steps: int = STEPS
    guidance: float = GUIDANCE


@dataclass(frozen=True)
class SampleRequest:
    """What to sample from a finished diffusion stage, and where to put it."""

    stage: DiffusionStage
    weights: Path
    codec_weights: Path
    scale: Scale
    null: TextEmbedding  # that of the latents that the stage was trained on
    captions: tuple[str, ...]
    folder: Path
    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = SEED
    image: Path | None = None  # the first frame of every sample; for stages with image_condition
    text_fields: dict[str, Any] | None = None
    """The text encoder's fingerprint in the stage's latents (JSON); None if they are gone."""


def longest_bucket(stage: Stage) -> Bucket:
    """The bucket that samples are made in: the stage's longest clips."""
    return max(stage.buckets, key=lambda bucket: (bucket.frames, bucket.height * bucket.width))


def clips_looked_at(stage: Stage, members: Members) -> list[Clip]:
    """The held-out clips among which those are found that are shown, or whose captions are."""
    name = held_out_name(longest_bucket(stage))
    return members.some(name, stage.data.shares, _MOST_LOOKED_AT)


def captions_of(clips: Iterable[Clip]) -> list[str]:
    """The captions that samples are made for, each once."""
    return list(dict.fromkeys(clip.text for clip in clips))[:NUM_SAMPLES]


def make_samples(request: SampleRequest) -> list[Path]:
    """Write one mp4 for each caption and a contact sheet; the paths of the mp4s.

    Averaged weights, Euler steps, classifier-free guidance, which is an input of the DiTs that take
    it; the noise of a caption is a function of (seed, its place in the list). InputError for an
    image or a text encoder that cannot be used; StageBlocked, and nothing is written, for latents
    that are not finite.
    """
    stage, bucket = request.stage, longest_bucket(request.stage)
    _check_text(request)
    image_CTHW = None if request.image is None else read_image(request.image, stage)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = load_codec(stage.codec, request.codec_weights, file_digest(request.codec_weights))
    channels = stage.codec.channels
    model = load_weights(stage.build("cpu"), request.weights).to(device)
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    given_BCTHW = None
    if image_CTHW is not None:
        x_BCTHW = to_unit(image_CTHW)[None].to(device)
        still_BCTHW = encode_still(codec, request.scale, x_BCTHW)
        ends_BCTHW = still_BCTHW.expand(-1, -1, 2, -1, -1)
        yes_B = torch.ones(1, dtype=torch.bool, device=device)
        given_BCTHW = given_frames(ends_BCTHW, yes_B, ~yes_B, stage.model.token_grid(grid)[0])
    films: list[NDArray[np.uint8]] = []
    for first in range(0, len(request.captions), _CHUNK):
        captions = request.captions[first : first + _CHUNK]
        noise_BCTHW = torch.stack(
            [noise_of((channels, *grid), first + i, request.seed) for i in range(len(captions))]
        )
        z_BCTHW = walk(
            stage,
            model,
            noise_BCTHW.to(device),
            pad(_encode(stage, captions)),
            request.null,
            Guided(request.steps, request.guidance),
            None if given_BCTHW is None else given_BCTHW.expand(len(captions), -1, -1, -1, -1),
        )
        _require_finite(request, captions, z_BCTHW)
        with torch.no_grad():
            for part_BCTHW in request.scale.restore(z_BCTHW).split(chunk_size(stage.codec)):
                films += to_frames(codec.decode(part_BCTHW))
    return _write(request.folder, list(request.captions), films, stage.rate)


def walk(
    stage: DiffusionStage,
    model: Callable[..., Tensor],
    noise_BCTHW: Tensor,
    text: TextBatch,
    null: TextEmbedding,
    guided: Guided,
    given_BCTHW: Tensor | None = None,
) -> Tensor:
    """From noise to latents of the stage's longest clips, on the device of the noise.

    Guidance is an input of the DiTs that take it, and classifier-free for all others.
    """
    bucket, takes_guidance = longest_bucket(stage), stage.model.guidance
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    frames, height, width = stage.model.token_grid(grid)
    moved = (None if x is None else x.to(noise_BCTHW.device) for x in text)
    return euler_sample(
        conditioned(model, guided.guidance if takes_guidance else None, given_BCTHW),
        noise_BCTHW,
        TextBatch(*moved),  # type: ignore[arg-type]  # only the mask may be None
        null,
        steps=guided.steps,
        guidance=1.0 if takes_guidance else guided.guidance,
        alpha=time_shift(height * width, frames),
    )


def _check_text(request: SampleRequest) -> None:
    """InputError unless the text encoder can be used here and is that of the stage's latents."""
    stage = request.stage
    try:
        stage.text.check()
        if request.text_fields is None:
            return
        changes = difference(request.text_fields, stage.text.fingerprint_fields(), "text")
    except ValueError as error:
        raise text_error(stage, error) from None
    if changes:
        raise InputError(
            f"stage {stage.name!r}: {stage.text!r} is not the text encoder that the stage was "
            f"trained with: {'; '.join(changes)}; put back the files that were there"
        )


def _encode(stage: DiffusionStage, captions: Sequence[str]) -> list[TextEmbedding]:
    try:
        return stage.text.encode(captions)
    except ValueError as error:
        raise text_error(stage, error) from None


def text_error(stage: DiffusionStage, error: ValueError) -> InputError:
    """What to say of a text encoder that cannot be used for sampling."""
    return InputError(
        f"stage {stage.name!r}: {error}. Sampling embeds captions by the encoder that the run "
        "names: put it back there"
    )


def _require_finite(request: SampleRequest, captions: Sequence[str], z_BCTHW: Tensor) -> None:
    wrong = [
        caption
        for caption, z_CTHW in zip(captions, z_BCTHW, strict=True)
        if not z_CTHW.isfinite().all()  # waits for the device
    ]
    if wrong:
        raise StageBlocked(
            f"stage {request.stage.name!r}: the latents sampled for {wrong[0]!r} are not finite "
            f"({len(wrong)} of {len(captions)} captions, guidance {request.guidance:g}, "
            f"{request.steps} steps), and nothing was written; lower the guidance, and if that "
            "does not help look at the stage's loss in the report"
        )


def read_image(path: Path, stage: DiffusionStage) -> Tensor:
    """A picture as the first frame of the stage's longest clips, uint8 C,1,H,W.

    Resized and cropped as clips are. InputError if it cannot be read, or the stage cannot use it.
    """
    bucket, reason = longest_bucket(stage), None
    if not stage.model.image_condition:
        reason = "its model was built without image_condition=True"
    elif not stage.gives(bucket):
        reason = f"its clips of {bucket.frames} frames have a single latent frame"
    elif stage.given is not None and not stage.given.head:
        reason = "it was trained with Given(head=0), so it never saw a first frame alone"
    if reason is not None:
        raise InputError(
            f"image {str(path)!r}: stage {stage.name!r} takes no first frame: {reason}; leave the "
            "image out, or sample from another stage"
        )
    if not path.is_file():
        raise InputError(f"image {str(path)!r}: no such file; correct the path")
    try:
        return decode_clip(str(path), 1, stage.rate, bucket.height, bucket.width)
    except BadVideo as error:
        raise InputError(f"image {str(path)!r}: {error.reason}; give a PNG or JPEG file") from None


def make_reconstructions(
    stage: AutoencoderStage, weights: Path, clips: list[Clip], folder: Path, most: int
) -> tuple[list[Path], list[str]]:
    """Write up to `most` clips beside what the codec gives back of them, left and right in one mp4.

    Returns the paths of the mp4s and the captions; clips that broke since the probing are skipped.
    """
    bucket = longest_bucket(stage)
    codec = load_codec(stage.codec, weights, file_digest(weights))
    device = next(codec.parameters()).device
    films: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for clip in clips:
        if len(films) == most:
            break
        try:
            size = bucket.height, bucket.width
            x_CTHW = decode_clip(clip.path, bucket.frames, stage.rate, *size, clip.segment)
        except BadVideo as error:
            log.warning("%s: not shown: %s", clip.path, error)
            continue
        x_BCTHW = to_unit(x_CTHW)[None].to(device)
        with torch.no_grad():
            back_BCTHW = codec.decode(codec.encode(x_BCTHW))
        films += to_frames(torch.cat([x_BCTHW, back_BCTHW], dim=-1))
        captions.append(clip.text)
    return _write(folder, captions, films, stage.rate), captions


def to_frames(x_BCTHW: Tensor) -> list[NDArray[np.uint8]]:
    """Clips in [-1, 1] as uint8 T,H,W,C arrays, clamped."""
    pixels_BCTHW = ((x_BCTHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(rearrange(pixels_BCTHW, "b c t h w -> b t h w c").cpu().numpy())


def noise_of(shape: tuple[int, ...], place: int, seed: int = SEED) -> Tensor:
    """What the sample at a place of the list of captions starts from."""
    generator = torch.Generator().manual_seed(named_seed("sample", seed, place))
    return torch.randn(shape, generator=generator)


def _write(
    folder: Path, captions: list[str], films: list[NDArray[np.uint8]], rate: float
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.mp4" for number in range(len(films))]
    for path, film in zip(paths, films, strict=True):
        write_mp4(path, film, rate)
    if films:
        contact_sheet(folder / "contact-sheet.png", list(zip(captions, films, strict=True)))
    return paths
