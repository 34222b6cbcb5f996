"""Videos to a sealed latent store: what to encode, one shard of it, and sealing.

Nothing here knows where it runs: a shard is the unit of work, and any process may do any of them.
"""

import hashlib
import itertools
import json
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elastic.data.assign import Members
from elastic.data.captions import captions_file, publish_captions
from elastic.data.clips import Clip, ids_of
from elastic.data.decode import DECODE_VERSION, BadVideo, to_unit
from elastic.data.decoders import Wanted, shared_decoders
from elastic.data.latents import (
    Encoder,
    Pending,
    Scale,
    Stored,
    chunk_size,
    load_codec,
    posterior,
)
from elastic.data.places import join, name_of
from elastic.data.store import Absent, BucketPlan, LatentStore, Sample, StoreSchema, fingerprint
from elastic.data.store_folder import folder_at
from elastic.data.verify import FIELDS
from elastic.errors import InputError
from elastic.kernels import compiles_encoder
from elastic.weights import file_digest
from models.codec import Codec, CodecModule
from models.text import TextEncoder
from stages.schedule import Bucket
from stages.stage import DiffusionStage

SHARD_BYTES = 64_000_000
SHARD_SAMPLES = 64  # most; so that a small data set still spreads over the workers
STATISTICS_CLIPS = 128

ShardId = tuple[str, int]


@dataclass(frozen=True)
class EncodeJob:
    """All that a process needs to encode any shard of a stage's latents."""

    stage: DiffusionStage
    weights: Path
    weights_digest: str
    scale: Scale
    members: Members
    root: str  # of the store: a path or URL
    text: TextEncoder  # the stage's, to be used in any folder
    text_fields: dict[str, str | int | float]
    packed: bool = False  # a store that is begun; one that is there stays as it is

    @property
    def fingerprint(self) -> str:
        """The name of the store: changes whenever a stored number could change."""
        return name_of(self.root)

    def bucket(self, shard: ShardId) -> Bucket:
        """The bucket whose clips a shard holds, of either split."""
        name = shard[0].split(".")[0]
        return next(bucket for bucket in self.stage.buckets if bucket.name == name)


class Tally(NamedTuple):
    """What one process, and so one device, has encoded."""

    num_absent: int
    """Clips that could not be decoded."""
    num_frames: int
    """Frames that went into the codec."""
    seconds: float


def plan_job(
    stage: DiffusionStage, weights: Path, scale: Scale, members: Members, latents: str
) -> EncodeJob:
    """Name the store of a stage by everything that decides its content."""
    digest = file_digest(weights)
    captions = hashlib.blake2b(digest_size=16)
    for name, clips in sorted(members.clips.items()):
        captions.update(json.dumps([name, len(clips)]).encode())
        for clip in clips:
            captions.update(json.dumps([clip.sample_id, clip.text]).encode())
    try:
        text_fields = stage.text.fingerprint_fields()
    except ValueError as error:
        raise InputError(f"stage {stage.name!r}: {error}") from None
    fields: dict[str, Any] = {  # Any: JSON
        "codec": stage.codec.fingerprint_fields(),
        "weights": digest,
        "scale": [scale.mean, scale.std],
        "text": text_fields,
        "rate": stage.rate,
        "decode": DECODE_VERSION,
        "clips": captions.hexdigest(),
    }
    if stage.given is not None:
        fields["given"] = {"frames": "first, last", "still": stage.codec.nearest_frames(0)}
    root = join(latents, fingerprint(fields))
    described = np.frombuffer(json.dumps(fields, indent=1).encode(), np.uint8)
    folder_at(root).publish(FIELDS, [described])
    text = stage.text.located()
    return EncodeJob(stage, weights, digest, scale, members, root, text, text_fields)


def open_store(job: EncodeJob, damaged: Collection[str] = ()) -> LatentStore:
    """The store of the job, started if it is not there; damaged captions are written again."""
    stage, buckets, largest = job.stage, [], 1
    for bucket in stage.buckets:
        grid = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
        shape = (stage.codec.stored_channels, *grid)
        largest = max(largest, 2 * int(np.prod(shape)))
        given = (stage.codec.channels, 2, *grid[1:]) if stage.gives(bucket) else None
        for name, clips in job.members.clips.items():
            if name.split(".")[0] == bucket.name:
                plan = BucketPlan(name=name, shape=shape, sample_ids=ids_of(clips), given=given)
                buckets.append(plan)
    texts = (clip.text for clips in job.members.clips.values() for clip in clips)
    text_tokens = stage.text.most_tokens(texts)
    largest = max(largest, 2 * text_tokens * stage.text.width)
    schema = StoreSchema(
        fingerprint=job.fingerprint,
        buckets=tuple(buckets),
        samples_per_shard=max(1, min(SHARD_BYTES // largest, SHARD_SAMPLES)),
        text_tokens=text_tokens,
        text_width=stage.text.width,
        pooled_width=stage.text.pooled_width,
        packed=job.packed,
    )
    store = LatentStore.create(job.root, schema)
    for name, clips in job.members.clips.items():
        is_there = store.folder.size(captions_file(name)) is not None
        if not is_there or captions_file(name) in damaged:
            publish_captions(store.folder, name, clips)
    return store


def encode_shards(
    job: EncodeJob,
    shards: Sequence[ShardId],
    again: bool = False,
    decoders: int = 1,
    committed: Callable[[ShardId, int, int], None] = lambda shard, clips, absent: None,
) -> Tally:
    """Encode and commit some shards; returns what that was, and how long it took.

    `committed` is told each shard, its clips, and how many of them could not be decoded.
    While the codec works so many processes decode what comes next, and the shard before is written.
    Whoever comes first also publishes the text that stands for no text. `again` is for shards that
    were committed before and are damaged: InputError, and nothing is changed, where a clip that
    one held cannot be decoded any more. Otherwise a shard that fails is raised when the others have
    been tried, and one that is committed already is left as it is.
    """
    began = time.perf_counter()
    encode_null_text(job)
    store = LatentStore.open(job.root)
    codec = load_codec(job.stage.codec, job.weights, job.weights_digest)
    left = list(shards) if again else store.not_there(shards)
    for shard in sorted({*shards} - {*left}):  # whoever has committed it may not have lived to tell
        committed(shard, len(store.planned(shard)), 0)
    num_absent, num_frames, failure = 0, 0, None
    while left:
        done: list[ShardId] = []
        try:
            for shard, samples in _written(job, codec, store, left, again, decoders):
                done.append(shard)
                absent = sum(isinstance(sample, Absent) for sample in samples)
                committed(shard, len(samples), absent)
                num_absent += absent
                num_frames += (len(samples) - absent) * job.bucket(shard).frames
            break
        except InputError:
            raise
        except Exception as error:  # raised when the others have been tried
            # What its frames hold would stay: pictures, and on a GPU what did not fit.
            traceback.clear_frames(error.__traceback__)
            failure = failure or error
            left = left[len(done) + 1 :]
    if failure is not None:
        raise failure
    return Tally(num_absent, num_frames, time.perf_counter() - began)


def _written(
    job: EncodeJob,
    codec: CodecModule,
    store: LatentStore,
    shards: Sequence[ShardId],
    again: bool,
    decoders: int,
) -> Iterator[tuple[ShardId, list[Sample | Absent]]]:
    """Each of the shards when it has been committed, in order."""
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        before: tuple[ShardId, list[Sample | Absent], Future[None]] | None = None
        for shard, samples in _encode_all(job, codec, store, shards, decoders):
            if again:
                clips = job.members.clips[shard[0]][store.slots(shard)]
                _require_held(store, shard, samples, clips)
            if before is not None:
                before[2].result()
                yield before[:2]
            before = shard, samples, writer.submit(store.write_shard, *shard, samples)
        if before is not None:
            before[2].result()
            yield before[:2]


def _encode_all(
    job: EncodeJob,
    codec: CodecModule,
    store: LatentStore,
    shards: Sequence[ShardId],
    decoders: int,
) -> Iterator[tuple[ShardId, list[Sample | Absent]]]:
    """What each of the shards holds."""
    parts = [
        Part(job.bucket(shard), job.members.clips[shard[0]][store.slots(shard)]) for shard in shards
    ]
    encoder = Encoder(job.stage.codec, codec, job.scale)
    chunks = decode_ahead(job.stage.codec, parts, job.stage.rate, decoders)
    for shard, part in zip(shards, parts, strict=True):
        num_chunks = -(-len(part.clips) // chunk_size(job.stage.codec))
        yield shard, _encode(job, encoder, part, itertools.islice(chunks, num_chunks))


def _require_held(
    store: LatentStore,
    shard: ShardId,
    samples: Sequence[Sample | Absent],
    clips: Sequence[Clip],
) -> None:
    """InputError if a clip is absent now that the damaged shard held."""
    for sample, clip in zip(samples, clips, strict=True):
        if isinstance(sample, Absent) and store.has_held(shard, sample.sample_id):
            raise InputError(
                f"shard {shard[1]} of {shard[0]!r} in {store.folder.where!r} cannot be encoded "
                f"again: {clip.path!r}, which it held: {sample.reason}. Nothing was changed; "
                "restore the file and give the same command again"
            )


def encode_null_text(job: EncodeJob, again: bool = False) -> None:
    """Publish the text that stands for no text, unless it is there and not wanted `again`.

    InputError if this machine's text encoder cannot be used, or is not the one that was planned.
    """
    store = LatentStore.open(job.root)
    try:
        found = job.text.fingerprint_fields()
        differing = [name for name in found if found[name] != job.text_fields[name]]
        if differing:
            raise InputError(
                f"stage {job.stage.name!r}: text: the encoder's files here are not those "
                f"that the encoding was planned with ({', '.join(differing)} differ); give every "
                "machine the same folder"
            )
        if again or not store.has_null_text():
            store.publish_null_text(job.text.null())
    except ValueError as error:
        raise InputError(f"stage {job.stage.name!r}: {error}") from None


class Part(NamedTuple):
    """Clips that are decoded for one bucket."""

    bucket: Bucket
    clips: Sequence[Clip]


def decode_ahead(
    codec: Codec, parts: Sequence[Part], rate: float, decoders: int
) -> Iterator[tuple[Sequence[Clip], list[Tensor | BadVideo]]]:
    """The clips of each part in chunks, with their pictures; what comes next is decoded already."""
    size = chunk_size(codec)
    wanted = (
        Wanted(clip.path, bucket.frames, rate, bucket.height, bucket.width, clip.segment)
        for bucket, clips in parts
        for clip in clips
    )
    pictures = shared_decoders(decoders).decode(wanted, ahead=max(2 * size, decoders))
    for _, clips in parts:
        for first in range(0, len(clips), size):
            chunk = clips[first : first + size]
            yield chunk, list(itertools.islice(pictures, len(chunk)))


def _encode(
    job: EncodeJob,
    encoder: Encoder,
    part: Part,
    chunks: Iterable[tuple[Sequence[Clip], list[Tensor | BadVideo]]],
) -> list[Sample | Absent]:
    """What a shard holds; while its device works on a chunk, the one before is fetched."""
    # All at once: text is waited for, and on a GPU it stands behind the chunks that are begun.
    texts = job.text.encode([clip.text for clip in part.clips])
    ends = job.stage.gives(part.bucket)
    num_clips = len(job.members.clips[part.bucket.name])
    compiled = compiles_encoder(job.stage, part.bucket, num_clips, encoder.device)
    reasons: list[str | None] = []  # why a clip has no pictures
    stored: list[Stored] = []
    before: Pending | None = None
    for _, decoded in chunks:
        good = [x for x in decoded if isinstance(x, Tensor)]
        begun = encoder.begin(good, ends, compiled) if good else None
        stored += before.wait() if before is not None else []
        before = begun
        reasons += [x.reason if isinstance(x, BadVideo) else None for x in decoded]
    stored += before.wait() if before is not None else []
    samples: list[Sample | Absent] = []
    for clip, reason, text in zip(part.clips, reasons, texts, strict=True):
        if reason is not None:
            samples.append(Absent(clip.sample_id, reason))
            continue
        text_LD, pooled_P = text.embedding_LD.bfloat16(), text.pooled_D.bfloat16()
        latent_CTHW, given_CTHW = stored.pop(0)
        samples.append(Sample(clip.sample_id, latent_CTHW, text_LD, pooled_P, given_CTHW))
    return samples


def find_scale(stage: DiffusionStage, weights: Path, members: Members, decoders: int = 1) -> Scale:
    """The normalisation of a stage's latents: that of its published codec, or a measured one."""
    if stage.codec.normalisation == "measured":
        return measure_scale(stage, weights, members, decoders)
    codec = load_codec(stage.codec, weights, file_digest(weights))
    return Scale(*codec.published_statistics())


def measure_scale(
    stage: DiffusionStage, weights: Path, members: Members, decoders: int = 1
) -> Scale:
    """Mean and deviation of each channel over the first clips of the stage's longest bucket.

    Of what a DiT is trained on: the variance of the posterior counts where that is sampled. Of a
    mix as many of each source, so that stages which differ in its weights have the same latents.
    """
    bucket = max(stage.buckets, key=lambda b: b.frames)
    codec = load_codec(stage.codec, weights, file_digest(weights))
    device = next(codec.parameters()).device
    sums = torch.zeros(3, stage.codec.channels, dtype=torch.float64)
    alike = [Fraction(1)] * len(stage.data.sources)
    clips = members.some(bucket.name, alike, STATISTICS_CLIPS)
    for _, decoded in decode_ahead(stage.codec, [Part(bucket, clips)], stage.rate, decoders):
        good = [x for x in decoded if isinstance(x, Tensor)]
        if not good:
            continue
        found_BCTHW = posterior(codec, to_unit(torch.stack(good).to(device))).cpu()
        z_BCTHW, deviation_BCTHW = found_BCTHW.tensor_split([stage.codec.channels], dim=1)
        z_CN = z_BCTHW.double().transpose(0, 1).flatten(1)
        sums += torch.stack(
            [torch.full_like(sums[0], z_CN.shape[1]), z_CN.sum(1), z_CN.square().sum(1)]
        )
        if stage.codec.mode == "sample":
            sums[2] += deviation_BCTHW.double().square().sum(dim=(0, 2, 3, 4))
    count, total, squares = sums
    if not count.any():
        raise InputError(
            f"stage {stage.name!r}: none of the first {len(clips)} clips of bucket {bucket.name!r} "
            "can be decoded any more, so the latents' scale cannot be measured; restore the files"
        )
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return Scale(tuple(mean.tolist()), tuple(std.tolist()))
