"""Videos from a finished stage: samples of a DiT for captions, or reconstructions of a codec."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

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
from elastic.film import films_into
from elastic.record import difference
from elastic.sampler import GUIDANCE, SEED, STEPS, Guided, Sampler, noise_of, rows_of
from elastic.weights import file_digest
from models.codec import Codec, CodecModule
from models.given import given_frames
from models.text import TextEmbedding, pad
from stages.schedule import Bucket
from stages.stage import AutoencoderStage, DiffusionStage, Stage

log = logging.getLogger(__name__)

# Of the clips that are decoded at once: a decoder has a hundred channels and more of each.
_DECODED_PIXELS = 1 << 20
NUM_SAMPLES = 16
_MOST_LOOKED_AT = 256  # held-out clips


@dataclass(frozen=True)
class SampleRequest:
    """What to sample from a finished diffusion stage, and where to put it."""

    stage: DiffusionStage
    bucket: Bucket  # of the stage: how long and how large
    weights: Path
    codec_weights: Path
    scale: Scale
    null: TextEmbedding  # that of the latents that the stage was trained on
    captions: tuple[str, ...]
    folder: Path
    steps: int = STEPS
    guidance: float = GUIDANCE
    seed: int = SEED
    shift: float | None = None  # of time; that of the stage
    negative: str | None = None  # led away from, in place of the null text
    image: Path | None = None  # the first frame of every sample; for stages with image_condition
    text_fields: dict[str, Any] | None = None
    """The text encoder's fingerprint in the stage's latents (JSON); None if they are gone."""

    @property
    def guided(self) -> Guided:
        """In how many steps, and how strongly led by the text."""
        return Guided(self.steps, self.guidance, self.shift)


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
    image, a text encoder or a negative text that cannot be used; StageBlocked for latents that are
    not finite. Nothing is written then.
    """
    stage, bucket = request.stage, request.bucket
    _check_text(request)
    image_CTHW = None if request.image is None else read_image(request.image, stage, bucket)
    codec = load_codec(stage.codec, request.codec_weights, file_digest(request.codec_weights))
    given_1CTHW = None if image_CTHW is None else _given(request, codec, image_CTHW)
    null = request.null
    if request.negative is not None:
        (null,) = _encode(stage, [request.negative])
    sampler = Sampler.load(stage, bucket, request.guided, null, request.captions, request.weights)
    with films_into(request.folder, len(request.captions), stage.rate) as films:
        for caption, film in _made(request, sampler, codec, given_1CTHW):
            films.add(caption, film)
    return films.paths


def _made(
    request: SampleRequest, sampler: Sampler, codec: CodecModule, given_1CTHW: Tensor | None
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Each caption with its film, in order."""
    stage, bucket = request.stage, request.bucket
    shape = (stage.codec.channels, *stage.codec.grid(bucket.frames, bucket.height, bucket.width))
    for first in range(0, len(request.captions), sampler.at_once):
        captions = request.captions[first : first + sampler.at_once]
        places = range(first, first + len(captions))
        noise_BCTHW = torch.stack([noise_of(shape, place, request.seed) for place in places])
        given_BCTHW = None
        if given_1CTHW is not None:
            given_BCTHW = given_1CTHW.expand(len(captions), -1, -1, -1, -1)
        z_BCTHW = sampler.latents(noise_BCTHW, pad(_encode(stage, captions)), given_BCTHW)
        _require_finite(request, captions, z_BCTHW)
        left = iter(captions)
        for part_BCTHW in request.scale.restore(z_BCTHW).split(
            decoded_at_once(stage.codec, bucket)
        ):
            with torch.no_grad():
                x_BCTHW = codec.decode(part_BCTHW)
            yield from zip(islice(left, len(x_BCTHW)), to_frames(x_BCTHW), strict=True)


def decoded_at_once(codec: Codec, bucket: Bucket) -> int:
    """How many clips go through the decoder together: one, where they are large or tiled."""
    pixels = bucket.frames * bucket.height * bucket.width
    return max(1, min(chunk_size(codec), _DECODED_PIXELS // pixels))


def _given(request: SampleRequest, codec: CodecModule, image_CTHW: Tensor) -> Tensor:
    """The mask and latents of a first frame, (1, 1 + C, T, H, W)."""
    stage, bucket = request.stage, request.bucket
    device = next(codec.parameters()).device
    still_BCTHW = encode_still(codec, request.scale, to_unit(image_CTHW)[None].to(device))
    ends_BCTHW = still_BCTHW.expand(-1, -1, 2, -1, -1)
    yes_B = torch.ones(1, dtype=torch.bool, device=device)
    grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    return given_frames(ends_BCTHW, yes_B, ~yes_B, stage.model.token_grid(grid)[0])


def _check_text(request: SampleRequest) -> None:
    """InputError unless the text encoder can be used here and is that of the stage's latents.

    And where a negative text is asked for that nothing would be led away from.
    """
    stage = request.stage
    if request.negative is not None and rows_of(stage, request.guided) == 1:
        reason = "its model takes the strength of guidance (guidance=True), and walks once"
        if not stage.model.guidance:
            reason = "at guidance 1 nothing but the caption is walked"
        raise InputError(
            f"negative {request.negative!r}: stage {stage.name!r} has no use for it: {reason}; "
            "leave it out"
        )
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


def read_image(path: Path, stage: DiffusionStage, bucket: Bucket) -> Tensor:
    """A picture as the first frame of the clips of a bucket, uint8 C,1,H,W.

    Resized and cropped as clips are. InputError if it cannot be read, or the stage cannot use it.
    """
    reason = None
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
    captions: list[str] = []
    with films_into(folder, most, stage.rate) as films:
        for clip in clips:
            if len(captions) == most:
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
            films.add(clip.text, to_frames(torch.cat([x_BCTHW, back_BCTHW], dim=-1))[0])
            captions.append(clip.text)
    return films.paths, captions


def to_frames(x_BCTHW: Tensor) -> list[NDArray[np.uint8]]:
    """Clips in [-1, 1] as uint8 T,H,W,C arrays, clamped."""
    pixels_BCTHW = ((x_BCTHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(rearrange(pixels_BCTHW, "b c t h w -> b t h w c").cpu().numpy())
