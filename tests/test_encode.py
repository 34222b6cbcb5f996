"""Videos to sealed latents, and what training reads of either."""

# B sample, C channel, T frame, H, W pixels or latent grid, L text token, D text width

import io
import json
import pickle
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from s3_server import s3_server  # noqa: F401  # a fixture
from safetensors.torch import save_file
from store_places import Place, a_bucket, a_place  # noqa: F401  # fixtures
from tiny_text import change_weights, tiny_t5_clip
from torch._dynamo.testing import CompileCounterWithBackend
from videos_fixture import level_video

from elastic import ray_encode
from elastic.checkpoint_place import Register
from elastic.course import encode_stage, pin_members
from elastic.data import encode
from elastic.data.assign import (
    Members,
    assign,
    held_out_name,
    load_members,
)
from elastic.data.captions import captions_file
from elastic.data.clips import Clip
from elastic.data.decode import Unreachable, decode_clip, to_unit
from elastic.data.decoders import Decoders, Wanted, shared_decoders
from elastic.data.encode import (
    EncodeJob,
    Tally,
    encode_shards,
    find_scale,
    measure_scale,
    open_store,
    plan_job,
)
from elastic.data.growth import load_growths
from elastic.data.latents import Encoder, Scale, chunk_size
from elastic.data.manifest import ShardId
from elastic.data.moving_shapes import COLOURS, encode_mp4, render
from elastic.data.order import Later, batch_at, layout_of
from elastic.data.places import parent
from elastic.data.probe import probe
from elastic.data.probes import Probed
from elastic.data.schema import NULL_TEXT, shard_file
from elastic.data.sealed import SealedStore
from elastic.data.sources import LatentSource, VideoSource
from elastic.data.store import LatentStore
from elastic.data.verify import verify
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.grow import grow_stage
from elastic.kernels import compiled_encoder, compiles_encoder
from elastic.latent_pins import check_pinned, pinned_latents
from elastic.ray_encode import MOST_SHARDS, Done, in_groups
from elastic.ray_nodes import decoders_of_a_task
from elastic.repair import repair_plan
from elastic.weights import file_digest, load_weights
from models import DCAE, DiT, HunyuanVAE, T5Clip, Tiling, WordHash
from models.codec import Codec, CodecModule, Statistics
from models.fresh import fresh_parameters, named_generator
from stages import AdamW, Bucket, DiffusionStage, Ema, Given, Mix, Phase, Plan, Videos

SHORT, LONG = Bucket("32px", frames=4, batch=2), Bucket("32px", frames=8, batch=2)
CODEC = DCAE(
    channels=4,
    widths=(4, 4, 8, 8, 8, 8),
    encoder_depths=(1, 1, 1, 1, 1, 1),
    decoder_depths=(1, 1, 1, 1, 1, 1),
    head_width=8,
    weights="given.safetensors",
)
HUNYUAN = HunyuanVAE(
    channels=4, widths=(4, 4, 8, 8), layers=1, norm_groups=2, weights="given.safetensors"
)
STAGE = DiffusionStage(
    name="tiny",
    data=Videos("none.csv"),
    vae=CODEC,
    model=DiT(depth=1, depth_single=0, width=24, heads=2, patch=1),
    text=WordHash(width=8),
    schedule=(Phase(until=40, buckets=(SHORT, LONG)),),
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=10),
    rate=8.0,
    save_every=8,
    log_every=8,
    evaluate_every=8,
)
NUM_LONG, NUM_HELD_OUT = 7, 2
# Halves: the largest difference of a value from its bf16 neighbour, relative.
BF16_ROUNDING = 2**-8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Eleven films on the disk: nine of 8 frames and more, two of them held out, two of 5."""
    folder = tmp_path_factory.mktemp("films")
    clips = []
    for number in range(11):
        colour = list(COLOURS)[number % len(COLOURS)]
        frames = 9 if number < NUM_LONG + NUM_HELD_OUT else 5
        picture_THWC = render("circle", colour, "left", "slowly", (32, 48), frames, 8, seed=number)
        path = folder / f"{number}.mp4"
        path.write_bytes(encode_mp4(picture_THWC, tuple(range(frames)), Fraction(1, 8)))
        text = f"a {colour} circle" + " moves" * (number % 3)
        clips.append(Clip(900 + number, str(path), text, held_out=number < NUM_HELD_OUT))
    return clips


@pytest.fixture(scope="module")
def members(clips: list[Clip], tmp_path_factory: pytest.TempPathFactory) -> Members:
    found = {clip.sample_id: probe(clip.path) for clip in clips}
    path = tmp_path_factory.mktemp("members") / "clips.arrow"
    return assign(STAGE, Probed.of(clips, found)).save(path)


def _write_weights(path: Path, seed: int, codec: Codec = CODEC) -> Path:
    model = codec.build(device="meta")
    save_file(dict(fresh_parameters(model, lambda name: named_generator(seed, name))), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_weights(tmp_path_factory.mktemp("weights") / "codec.safetensors", 0)


@pytest.fixture(scope="module")
def codec(weights: Path) -> CodecModule:
    module = load_weights(CODEC.build(), weights)
    assert isinstance(module, CodecModule)
    return module


@pytest.fixture(scope="module")
def scale(weights: Path, members: Members) -> Scale:
    return measure_scale(STAGE, weights, members)


@pytest.fixture
def job(
    weights: Path, scale: Scale, members: Members, place: Place, monkeypatch: pytest.MonkeyPatch
) -> EncodeJob:
    monkeypatch.setattr(encode, "SHARD_SAMPLES", 3)
    return plan_job(STAGE, weights, scale, members, place.root)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _sealed(job: EncodeJob) -> SealedStore:
    store = open_store(job)
    for shard in store.missing():
        encode_shards(job, [shard])
    store.seal()
    return SealedStore.open(job.root, job.fingerprint)


def _pixels(clips: list[Clip], bucket: Bucket) -> torch.Tensor:
    frames = [decode_clip(clip.path, bucket.frames, STAGE.rate, 32, 32) for clip in clips]
    return to_unit(torch.stack(frames))


def test_every_clip_is_in_each_bucket_that_it_fills(members: Members) -> None:
    assert {name: len(found) for name, found in members.clips.items()} == {
        SHORT.name: 9,
        held_out_name(SHORT): 2,
        LONG.name: NUM_LONG,
        held_out_name(LONG): NUM_HELD_OUT,
    }
    assert members.num_clips() == 11


def test_a_bucket_that_no_clip_fills_is_named(clips: list[Clip]) -> None:
    probes = {clip.sample_id: probe(clip.path) for clip in clips}
    large = Phase(until=2, buckets=(Bucket("64px", frames=4, batch=2),))
    with pytest.raises(InputError, match=r"'tiny': bucket '64px-4f' has no train clip: of 11 "):
        assign(STAGE.replace(schedule=[large]), Probed.of(clips, probes))
    short = [clip for clip in clips if not clip.held_out or clip.sample_id == 900]
    probes[900] = probes[910]
    with pytest.raises(InputError, match="bucket '32px-8f' has no held-out clip"):
        assign(STAGE, Probed.of(short, probes))


def test_the_pinned_membership_reads_back_as_it_was(members: Members, clips: list[Clip]) -> None:
    assert members.path is not None
    again = load_members(members.path)
    assert again == members
    assert again.clips[held_out_name(LONG)] == clips[:NUM_HELD_OUT]
    assert again.clips[LONG.name] == clips[NUM_HELD_OUT : NUM_HELD_OUT + NUM_LONG]
    assert again.clips[SHORT.name][-2:] == clips[-2:]
    sent = pickle.dumps(members)
    assert pickle.loads(sent) == members
    assert len(sent) < 500, "it travels as a path"


def test_clips_that_an_earlier_version_pinned_are_not_chosen_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.stage(STAGE.name) / "clips.parquet").parent.mkdir(parents=True)
    (folder.stage(STAGE.name) / "clips.parquet").touch()
    course = SimpleNamespace(folder=folder)
    with pytest.raises(InputError, match=r"'tiny' of .* begun by an earlier version"):
        pin_members(course, STAGE)  # type: ignore[arg-type]


def test_encoding_that_was_cut_off_goes_on_with_what_is_missing(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(job)
    planned = store.missing()
    # Shards of 3: 9, 2, 7 and 2 clips.
    assert len(planned) == 3 + 1 + 3 + 1
    assert encode_shards(job, [planned[0]]).num_absent == 0
    assert open_store(job).missing() == planned[1:]
    decoded: list[str] = []

    asked = Decoders.decode

    def counted(self: Decoders, wanted: Iterable[Wanted], ahead: int) -> Any:
        some = list(wanted)
        decoded.extend(one.path for one in some)
        return asked(self, some, ahead)

    monkeypatch.setattr(Decoders, "decode", counted)
    _sealed(job)
    done = sum(len(store.planned(shard)) for shard in planned[1:])
    assert len(decoded) == done == 20 - 3
    assert open_store(job).missing() == []


@pytest.mark.usefixtures("one_thread")
def test_sealed_latents_are_those_of_the_codec_normalised_in_bf16(
    job: EncodeJob, codec: CodecModule, scale: Scale, members: Members
) -> None:
    store = _sealed(job)
    for bucket in (SHORT, LONG):
        clips = members.clips[bucket.name]
        assert store.sample_ids(bucket.name).tolist() == [clip.sample_id for clip in clips]
        with torch.no_grad():
            z_BCTHW = scale.normalise(codec.encode(_pixels(clips, bucket)))
        read = store.read_batch(bucket.name, range(len(clips)))
        assert read.latents_BCTHW.dtype == torch.bfloat16
        assert read.latents_BCTHW.shape == (len(clips), 4, bucket.frames // 4, 1, 1)
        torch.testing.assert_close(
            read.latents_BCTHW.float(), z_BCTHW, rtol=BF16_ROUNDING, atol=1e-5
        )
        assert z_BCTHW.std(0).min() > 0.01, "clips that give equal latents would prove little"
        for text_LD, pooled_P, clip in zip(read.texts_LD, read.pooled_BP, clips, strict=True):
            text = STAGE.text.encode([clip.text])[0]
            assert torch.equal(text_LD, text.embedding_LD.bfloat16())
            assert torch.equal(pooled_P, text.pooled_D.bfloat16())


def test_latents_have_mean_zero_and_deviation_one(job: EncodeJob) -> None:
    store = _sealed(job)
    z_BCTHW = store.read_batch(LONG.name, range(NUM_LONG)).latents_BCTHW.double()
    z_CN = z_BCTHW.transpose(0, 1).flatten(1)
    torch.testing.assert_close(z_CN.mean(1), torch.zeros(4).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(z_CN.std(1, correction=0), torch.ones(4).double(), rtol=0.01, atol=0)


@pytest.mark.usefixtures("one_thread")
def test_a_sampled_posterior_is_stored_as_mean_and_deviation_of_unit_variance(
    clips: list[Clip], tmp_path: Path
) -> None:
    codec = HUNYUAN.replace(posterior="sample")
    bucket = Bucket("32px", frames=5, batch=2)
    stage = STAGE.replace(vae=codec, schedule=(Phase(until=40, buckets=(bucket,)),))
    weights, module = _write_weights(tmp_path / "vae.safetensors", 0, codec), codec.build()
    load_weights(module, weights)
    found = {clip.sample_id: probe(clip.path) for clip in clips}
    members = assign(stage, Probed.of(clips, found)).save(tmp_path / "clips.arrow")
    scale = measure_scale(stage, weights, members)
    store = _sealed(plan_job(stage, weights, scale, members, str(tmp_path / "latents")))
    with torch.no_grad():
        moments = module.moments(_pixels(members.clips[bucket.name], bucket))
    mean_BCTHW, deviation_BCTHW = moments.chunk(2, dim=1)
    read = store.read_batch(bucket.name, range(len(moments))).latents_BCTHW.float()
    assert read.shape[1] == 8
    std = torch.tensor(scale.std).view(-1, 1, 1, 1)
    expected = torch.cat([scale.normalise(mean_BCTHW), deviation_BCTHW / std], dim=1)
    torch.testing.assert_close(read, expected, rtol=BF16_ROUNDING, atol=1e-4)
    mean_BCTHW, deviation_BCTHW = read.double().chunk(2, dim=1)
    variance_C = mean_BCTHW.var((0, 2, 3, 4), correction=0) + deviation_BCTHW.square().mean(
        (0, 2, 3, 4)
    )
    torch.testing.assert_close(variance_C, torch.ones(4).double(), rtol=0.02, atol=0)
    assert deviation_BCTHW.min() > 0
    same = plan_job(
        stage.replace(vae=codec.replace(posterior="mean")),
        weights,
        scale,
        members,
        str(tmp_path / "b"),
    )
    assert same.fingerprint != store.schema.fingerprint


def _giving(codec: Codec, buckets: tuple[Bucket, ...], patch: int) -> DiffusionStage:
    model = STAGE.model.replace(image_condition=True, patch=patch)
    schedule = (Phase(until=40, buckets=buckets),)
    return STAGE.replace(vae=codec, model=model, given=Given(), schedule=schedule)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["dc-ae", "mean", "sample"])
def test_first_and_last_frame_are_stored_as_if_there_were_no_others(
    clips: list[Clip], tmp_path: Path, mode: Literal["dc-ae", "mean", "sample"]
) -> None:
    if mode == "dc-ae":  # 4 frames are one latent frame: nothing is given there
        codec, long, short = CODEC, LONG, SHORT
    else:
        codec = HUNYUAN.replace(posterior=mode)
        long, short = (Bucket("32px", frames=frames, batch=2) for frames in (5, 1))
    stage = _giving(codec, (short, long), patch=1)
    module = codec.build()
    weights = _write_weights(tmp_path / "vae.safetensors", 0, codec)
    load_weights(module, weights)
    found = {clip.sample_id: probe(clip.path) for clip in clips}
    members = assign(stage, Probed.of(clips, found)).save(tmp_path / "clips.arrow")
    scale = measure_scale(stage, weights, members)
    job = plan_job(stage, weights, scale, members, str(tmp_path / "latents"))
    store = _sealed(job)
    plain = plan_job(
        STAGE.replace(vae=codec, schedule=stage.schedule),
        weights,
        scale,
        members,
        str(tmp_path / "b"),
    )
    assert plain.fingerprint != job.fingerprint
    found = LatentSource(stage, store, held_out=False)
    assert found.fetch(short, np.array([0])).given_BCTHW is None
    clip_paths = members.clips[long.name][:3]
    given_BCTHW = found.fetch(long, np.arange(3)).given_BCTHW
    assert given_BCTHW is not None
    given_BCTHW = given_BCTHW.float()
    x_BCTHW = _pixels(clip_paths, long)
    repeats = 4 if mode == "dc-ae" else 1
    for place in (0, -1):
        still_BCTHW = x_BCTHW[:, :, [place]].repeat(1, 1, repeats, 1, 1)
        with torch.no_grad():
            alone_BC1HW = scale.normalise(module.encode(still_BCTHW))
        torch.testing.assert_close(
            given_BCTHW[:, :, [place]], alone_BC1HW, rtol=BF16_ROUNDING, atol=1e-4
        )
    assert not torch.equal(given_BCTHW[:, :, 0], given_BCTHW[:, :, 1])


def test_restore_undoes_normalise(scale: Scale) -> None:
    z_BCTHW = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scale.restore(scale.normalise(z_BCTHW)), z_BCTHW)
    assert min(scale.std) > 0


def test_the_store_is_named_by_all_that_changes_a_number(job: EncodeJob, tmp_path: Path) -> None:
    def name(
        stage: DiffusionStage = job.stage,
        weights: Path = job.weights,
        scale: Scale = job.scale,
        members: Members = job.members,
    ) -> str:
        return plan_job(stage, weights, scale, members, str(tmp_path / "others")).fingerprint

    first = job.members.clips[SHORT.name][0]
    reworded = {name: list(clips) for name, clips in job.members.clips.items()}
    reworded[SHORT.name][0] = first._replace(text=first.text + " slowly")
    fewer = {**job.members.clips, SHORT.name: job.members.clips[SHORT.name][1:]}
    names = [
        name(),
        name(weights=_write_weights(tmp_path / "other.safetensors", 1)),
        name(scale=replace(job.scale, mean=tuple(m + 1e-6 for m in job.scale.mean))),
        name(scale=replace(job.scale, std=tuple(s * 2 for s in job.scale.std))),
        name(stage=STAGE.replace(rate=7.9)),
        name(stage=STAGE.replace(text=WordHash(width=8, position=0.5))),
        name(stage=STAGE.replace(vae=CODEC.replace(head_width=4))),
        name(members=Members(reworded)),
        name(members=Members(fewer)),
    ]
    assert names[0] == job.fingerprint
    assert len(set(names)) == len(names)
    # What changes no number changes no name: the training of the DiT, and where files lie.
    moved = {
        name: [clip._replace(path="/elsewhere" + clip.path) for clip in clips]
        for name, clips in job.members.clips.items()
    }
    assert name(stage=STAGE.replace(seed=5, optimizer=AdamW(lr=1.0))) == names[0]
    assert name(members=Members(moved)) == names[0]


def test_a_store_of_another_fingerprint_is_refused(job: EncodeJob) -> None:
    _sealed(job)
    with pytest.raises(InputError, match="have the fingerprint"):
        SealedStore.open(job.root, "0" * 32)


def test_a_stage_keeps_the_latents_that_it_was_pinned_to(job: EncodeJob, tmp_path: Path) -> None:
    pinned = tmp_path / "latents.json"
    check_pinned(job, pinned)  # nothing is pinned before the first encoding
    pinned.write_text(json.dumps({"fingerprint": job.fingerprint}))
    check_pinned(job, pinned)
    other = _write_weights(tmp_path / "codec.safetensors", 1)
    changed = plan_job(job.stage, other, job.scale, job.members, parent(job.root))
    with pytest.raises(InputError, match=rf"'tiny' was pinned to .*weights: '{job.weights_digest}"):
        check_pinned(changed, pinned)


def test_a_clip_that_broke_after_probing_is_absent_with_its_reason(
    job: EncodeJob, members: Members, tmp_path: Path
) -> None:
    clips = {name: list(found) for name, found in members.clips.items()}
    broken, gone = clips[LONG.name][1], clips[LONG.name][4]
    half = tmp_path / "half.mp4"
    half.write_bytes(Path(broken.path).read_bytes()[:200])
    clips[LONG.name][1] = broken._replace(path=str(half))
    clips[LONG.name][4] = gone._replace(path=str(tmp_path / "gone.mp4"))
    hurt = replace(job, members=Members(clips))
    store = open_store(hurt)
    done = [encode_shards(hurt, [shard]) for shard in store.missing()]
    assert sum(one.num_absent for one in done) == 2
    # 9 and 2 short clips, 7 and 2 long ones.
    assert sum(one.num_frames for one in done) == 11 * 4 + (9 - 2) * 8
    assert all(one.seconds > 0 for one in done)
    reasons = store.quarantined()
    assert set(reasons) == {broken.sample_id, gone.sample_id}
    assert all(reasons.values())
    store.seal()
    sealed = SealedStore.open(job.root, job.fingerprint)
    source = LatentSource(STAGE, sealed, held_out=False)
    assert source.counts() == {SHORT.name: 9, LONG.name: NUM_LONG - 2}
    ids = source.sample_ids(LONG, np.arange(NUM_LONG - 2))
    assert not {broken.sample_id, gone.sample_id} & set(ids.tolist())


def test_sources_of_a_mix_are_told_apart_where_some_of_their_clips_are_absent(
    job: EncodeJob, members: Members, tmp_path: Path
) -> None:
    clips = {name: list(found) for name, found in members.clips.items()}
    (tmp_path / "other.mp4").touch()  # in an empty folder it would be the mount that is gone
    for lost in (0, 1, 4):
        clips[LONG.name][lost] = clips[LONG.name][lost]._replace(path=str(tmp_path / "gone.mp4"))
    names = {SHORT.name: [4, 5], LONG.name: [3, 4], held_out_name(SHORT): [2, 0]}
    mixed = Members(clips, sources={**names, held_out_name(LONG): [0, 2]})
    stage = STAGE.replace(data=Mix((Videos("a.csv"), 1), (Videos("b.csv"), 3)))
    hurt = replace(job, members=mixed)
    store = open_store(hurt)
    encode_shards(hurt, store.missing())
    store.seal()
    sealed = SealedStore.open(job.root, job.fingerprint)
    source = LatentSource(stage, sealed, held_out=False, members=mixed)
    assert source.layouts() == {SHORT.name: layout_of([4, 5]), LONG.name: layout_of([1, 3])}
    held_out = LatentSource(stage, sealed, held_out=True, members=mixed)
    assert held_out.layouts() == {SHORT.name: layout_of([2, 0]), LONG.name: layout_of([0, 2])}
    own = {clip.sample_id: number for number, clip in enumerate(clips[LONG.name])}
    for position in range(0, stage.budget, 2):
        plan = batch_at(stage, position, source.layouts())
        assert (plan.indices < source.counts()[plan.bucket.name]).all()
    found = [own[number] for number in source.sample_ids(LONG, np.arange(4)).tolist()]
    assert found == [2, 3, 5, 6], "one of the first source, three of the second"
    lost = replace(mixed, sources={**names, LONG.name: [2, 5], held_out_name(LONG): [0, 2]})
    with pytest.raises(InputError, match=r"bucket '32px-8f' has no latents of 'a\.csv'"):
        LatentSource(stage, sealed, held_out=False, members=lost)


def test_the_scale_of_a_mix_does_not_hang_on_its_weights(
    weights: Path, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that stages with the same clips and other weights have the same latents."""
    monkeypatch.setattr(encode, "STATISTICS_CLIPS", 4)
    mixed = Members(members.clips, sources={LONG.name: [3, 4]})
    scales = [
        measure_scale(
            STAGE.replace(data=Mix((Videos("a.csv"), weight), (Videos("b.csv"), 1.0))),
            weights,
            mixed,
        )
        for weight in (1.0, 9.0)
    ]
    of_each = [members.clips[LONG.name][number] for number in (0, 1, 3, 4)]
    assert scales == [measure_scale(STAGE, weights, Members({LONG.name: of_each}))] * 2


Encode = tuple[Any, DiffusionStage, list[list[ShardId]]]


@pytest.fixture
def course(
    clips: list[Clip], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Encode:
    """A course whose stage has a table of nine of the films, and what each encoding encodes."""
    encoded: list[list[ShardId]] = []

    def encode_here(job: EncodeJob, gpus: float, watch: object, damaged: Any) -> Done:
        store = open_store(job)
        again = sorted(damaged.shards) if damaged else []
        encoded.append([*store.missing(), *again])
        encode_shards(job, store.missing())
        encode_shards(job, again, again=True)
        return Done(store.seal(), store.quarantined(), len(encoded[-1]), None)

    monkeypatch.setattr("elastic.course.encode_on_ray", encode_here)
    monkeypatch.setattr(
        "elastic.course.find_scale_on_ray",
        lambda stage, path, members, _: measure_scale(stage, path, members),
    )
    monkeypatch.setattr(encode, "SHARD_SAMPLES", 3)
    tracker = SimpleNamespace(event=lambda *_, **__: None, name="tracker")
    stage = STAGE.replace(
        data=_table_of(tmp_path, clips[:-4]), vae=CODEC.replace(weights=str(weights))
    )
    folder = RunFolder(tmp_path / "run")
    plan = Plan("tiny", [stage])
    driver = SimpleNamespace(folder=folder, tracker=tracker, gpus=0.0, plan=plan, packs=False)
    return driver, stage, encoded


def _table_of(folder: Path, clips: Iterable[Clip]) -> Videos:
    rows = [f"{c.path},{c.text},{'held-out' if c.held_out else 'train'}" for c in clips]
    (folder / "t.csv").write_text("\n".join(["path,text,split", *rows]))
    return Videos(str(folder / "t.csv"))


def _open(latents: Iterable[tuple[str, str, str]]) -> list[SealedStore]:
    return [SealedStore.open(*one) for one in latents]


def test_a_growth_is_encoded_alone_and_read_after_what_was_there(
    course: Encode, clips: list[Clip], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, stage, encoded = course
    members, own = pin_members(driver, stage), driver.folder.stage(stage.name)
    (first,) = encode_stage(driver, stage, members)
    place = Place(first.root)
    before = {name: place.read(name) for name in place.names()}
    pin = json.loads((own / "latents.json").read_text())
    assert "later" not in pin

    _table_of(tmp_path, clips)  # four more: two that are long, two that are short
    Register(own).add(8)
    grow_stage(driver, stage)
    (growth,) = load_growths(own)
    encoded.clear()
    stores = encode_stage(driver, stage, members)
    assert stores[0] == first
    assert encoded == [[], [(SHORT.name, 0), (SHORT.name, 1), (LONG.name, 0)]]
    assert before == {name: place.read(name) for name in before}, "nothing is encoded again"
    pinned = json.loads((own / "latents.json").read_text())
    assert {**pinned, "later": None} == {**pin, "later": None}
    assert pinned["later"] == [{"fingerprint": stores[1].fingerprint, "digest": stores[1].digest}]
    assert pinned_latents(driver.folder, stage.name) == stores
    encoded.clear()
    assert encode_stage(driver, stage, members) == stores
    assert encoded == [[], []], "the next start finds all of it there"

    source = LatentSource(stage, _open(stores), False, members, [growth])
    apart = [LatentSource(stage, store, held_out=False) for store in _open(stores)]
    assert source.counts() == {SHORT.name: 5 + 4, LONG.name: 5 + 2}
    # Positions 0 to 8 are two batches of 2 of each bucket: both sources go on to the end of 5.
    assert source.layouts() == {
        SHORT.name: layout_of([5], [Later([4], [5])]),
        LONG.name: layout_of([5], [Later([2], [5])]),
    }
    mixed = source.fetch(SHORT, np.array([7, 1, 5, 0]))
    old, new = apart[0].fetch(SHORT, np.array([1, 0])), apart[1].fetch(SHORT, np.array([2, 0]))
    assert mixed.ids.tolist() == [new.ids[0], old.ids[0], new.ids[1], old.ids[1]]
    assert mixed.ids.tolist() == source.sample_ids(SHORT, np.array([7, 1, 5, 0])).tolist()
    each = (new, 0), (old, 0), (new, 1), (old, 1)
    assert torch.equal(mixed.x_BCTHW, torch.stack([one.x_BCTHW[k] for one, k in each]))
    for row, (one, k) in enumerate(each):
        assert mixed.text is not None
        assert one.text is not None
        length = int(one.text.mask_BL[k].sum())  # type: ignore[index]
        assert int(mixed.text.mask_BL[row].sum()) == length  # type: ignore[index]
        assert source.text_lengths(SHORT, np.array([7, 1, 5, 0]))[row] == length
        found = mixed.text.text_BLD[row, :length]
        assert torch.equal(found, one.text.text_BLD[k, :length])
    held_out = LatentSource(stage, _open(stores), True, members)
    assert held_out.counts() == LatentSource(stage, _open(stores)[0], held_out=True).counts()


def test_a_growth_that_cannot_be_decoded_any_more_leaves_the_order_whole(
    course: Encode, clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, stage, _ = course
    members, own = pin_members(driver, stage), driver.folder.stage(stage.name)
    encode_stage(driver, stage, members)
    moved = clips[-1]._replace(path=str(tmp_path / "short.mp4"))
    shutil.copy(clips[-1].path, moved.path)
    _table_of(tmp_path, [*clips[:-1], moved])
    grow_stage(driver, stage)
    Path(moved.path).unlink()
    stores = _open(encode_stage(driver, stage, members))
    source = LatentSource(stage, stores, False, members, load_growths(own))
    assert source.layouts()[SHORT.name] == layout_of([5], [Later([3], [0])])
    for position in range(0, stage.budget, 2):
        plan = batch_at(stage, position, source.layouts())
        source.sample_ids(plan.bucket, plan.indices)


def test_what_is_damaged_of_a_growth_is_repaired(
    course: Encode, clips: list[Clip], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, stage, encoded = course
    with pytest.raises(InputError, match="no stage of 'tiny' has latents yet"):
        repair_plan(driver)
    members = pin_members(driver, stage)
    encode_stage(driver, stage, members)
    _table_of(tmp_path, clips)
    grow_stage(driver, stage)
    stores = encode_stage(driver, stage, members)
    grown, shard = Place(stores[1].root), shard_file(LONG.name, "latent", 0)
    before = grown.read(shard)
    grown.flip(shard, 9, 1)
    encoded.clear()
    repair_plan(driver)
    assert encoded == [[], [(LONG.name, 0)]]
    assert grown.read(shard) == before
    assert f"{stores[1].root}: encoded again: 1 shards" in capsys.readouterr().out
    assert verify(stores[1].root).is_whole
    encoded.clear()
    repair_plan(driver)
    assert encoded == []


def test_a_growth_keeps_the_latents_that_it_was_pinned_to(
    course: Encode, clips: list[Clip], tmp_path: Path
) -> None:
    driver, stage, _ = course
    members, own = pin_members(driver, stage), driver.folder.stage(stage.name)
    _table_of(tmp_path, clips)
    grow_stage(driver, stage)
    encode_stage(driver, stage, members)
    pin = json.loads((own / "latents.json").read_text())
    pin["later"][0]["fingerprint"] = "another"
    (own / "latents.json").write_text(json.dumps(pin))
    with pytest.raises(InputError, match="pinned to the latents another, and would now get"):
        encode_stage(driver, stage, members)


def test_latents_are_read_as_stored_with_text_padded_and_by_split(job: EncodeJob) -> None:
    store = _sealed(job)
    source = LatentSource(STAGE, store, held_out=False)
    indices = np.array([2, 0, 1])
    samples = source.fetch(SHORT, indices)
    read = store.read_batch(SHORT.name, indices)
    assert torch.equal(samples.x_BCTHW, read.latents_BCTHW)  # bf16, as they are stored
    assert samples.ids.tolist() == source.sample_ids(SHORT, indices).tolist()
    assert samples.weight_B.tolist() == [1, 1, 1]
    assert samples.text is not None
    assert samples.text.mask_BL is not None
    assert samples.text.mask_BL.sum(1).tolist() == [len(text_LD) for text_LD in read.texts_LD]
    held_out = LatentSource(STAGE, store, held_out=True)
    assert held_out.counts() == {SHORT.name: 2, LONG.name: 2}
    assert held_out.sample_ids(LONG, np.arange(2)).tolist() == [900, 901]


def test_the_null_text_comes_with_the_first_shard_and_from_the_store(job: EncodeJob) -> None:
    store = open_store(job)
    assert not store.has_null_text()
    encode_shards(job, store.missing()[:1])
    assert store.has_null_text()
    null = LatentSource(STAGE, _sealed(job), held_out=False).null_text()
    assert torch.equal(null.embedding_LD, STAGE.text.null().embedding_LD)
    assert torch.equal(null.pooled_D, STAGE.text.null().pooled_D)


def test_a_store_of_before_the_null_text_serves_a_stage_that_needs_no_file(
    job: EncodeJob, tmp_path: Path
) -> None:
    store = open_store(job)
    for shard in store.missing():
        encode_shards(job, [shard])
    Place(job.root).remove(NULL_TEXT)
    store.seal()
    sealed = SealedStore.open(job.root, job.fingerprint)
    assert not LatentSource(STAGE, sealed, held_out=False).null_text().embedding_LD.any()
    with_files = STAGE.replace(text=T5Clip(t5="none", clip="none"))
    with pytest.raises(InputError, match="'tiny': its latents were sealed without the null text"):
        LatentSource(with_files, sealed, held_out=False).null_text()


class _Task(SimpleNamespace):
    __hash__ = object.__hash__


class _RayHere:
    """As much of Ray as encoding uses; a task runs when it is made."""

    def remote(self, function: Callable[..., Any]) -> SimpleNamespace:
        def run(*arguments: Any) -> _Task:
            return _Task(result=function(*arguments))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=run))

    def get(self, task: _Task) -> Any:
        return task.result

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return running[:num_returns], running[num_returns:]


class Watched:
    """Whoever is told how far an encoding is."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int, int]] = []
        self.committed_shards: list[tuple[ShardId, int, int]] = []

    def begin(self, *told: int) -> None:
        self.begun.append(told)  # type: ignore[arg-type]  # three of them

    def committed(self, *told: Any) -> None:
        self.committed_shards.append(told)  # type: ignore[arg-type]  # a shard and two numbers


def test_a_whole_store_of_before_gets_its_null_text_when_it_is_opened_again(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_encode, "ray", _RayHere())
    watch = Watched()
    first = ray_encode.encode_on_ray(job, 0, watch)
    num = sum(len(clips) for clips in job.members.clips.values())
    assert watch.begun == [(num, 0, 0)]
    shards = open_store(job).shard_ids()
    told = [(shard, len(open_store(job).planned(shard)), 0) for shard in shards]
    assert watch.committed_shards == told
    assert first.clips == num
    Place(job.root).remove(NULL_TEXT)
    again = ray_encode.encode_on_ray(job, 0, watch)
    assert watch.begun[1:] == [(num, num, 0)]
    assert watch.committed_shards == told
    assert first.frames_per_s is not None
    assert first.frames_per_s > 0
    assert again == first._replace(clips=0, frames_per_s=None)
    assert SealedStore.open(job.root, job.fingerprint, again.digest).null_text is not None


class _RayOfTwo:
    """As much of Ray as encoding uses, with two workers: what is waited for runs in order."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.queued: list[Any] = []

    def remote(self, function: Callable[..., Any]) -> SimpleNamespace:
        def submit(*arguments: Any) -> SimpleNamespace:
            task = _Task(run=lambda: function(*arguments), result=None, error=None)
            self.queued.append(task)
            return task

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=submit))

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def get(self, task: Any) -> Any:
        if task.error is not None:
            raise task.error
        return task.result

    def cancel(self, task: Any) -> None:
        if task in self.queued:
            self.queued.remove(task)
            task.error = RuntimeError("cancelled")

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        while True:
            while self.queued and len(self.begun) < 2:
                self.begun.append(self.queued.pop(0))
            unfinished = [id(task) for task in (*self.begun, *self.queued)]
            done = [task for task in running if id(task) not in unfinished][:num_returns]
            if len(done) == num_returns:
                return done, [task for task in running if task not in done]
            task = self.begun.pop(0)
            try:
                task.result = task.run()
            except Exception as error:
                task.error = error


def test_a_task_decodes_on_as_many_cores_as_come_with_a_gpu_on_every_node() -> None:
    head = {"Alive": True, "Resources": {"CPU": 32.0}}
    large = {"Alive": True, "Resources": {"CPU": 96.0, "GPU": 8.0}}
    small = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 2.0}}
    gone = {"Alive": False, "Resources": {"CPU": 1.0, "GPU": 1.0}}
    assert decoders_of_a_task([head, large, small, gone], 1.0) == 8
    assert decoders_of_a_task([head, large], 1.0) == 12
    assert decoders_of_a_task([head, large], 0.0) == decoders_of_a_task([head], 1.0) == 1


@given(num=st.integers(0, 400), at_once=st.integers(0, 40))
def test_groups_of_shards_are_all_of_them_in_order_and_leave_work_for_everybody(
    num: int, at_once: int
) -> None:
    shards = [("32px", number) for number in range(num)]
    groups = in_groups(shards, at_once)
    assert [shard for group in groups for shard in group] == shards
    assert all(1 <= len(group) <= MOST_SHARDS for group in groups)
    assert len(groups) >= min(num, 4 * at_once)


@pytest.mark.parametrize("interrupted", [False, True])
def test_bad_input_in_one_shard_is_not_repeated_by_those_that_have_not_begun(
    interrupted: bool, job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ray_encode, "ray", _RayOfTwo())
    tried: list[tuple[str, int]] = []

    def failing(job: EncodeJob, shards: list[ShardId], again: bool, *more: Any) -> Tally:
        tried.extend(shards)
        if interrupted:
            signal.raise_signal(signal.SIGINT)  # how Ray cancels a task that runs
        if len(tried) == 2:
            raise InputError("no such folder")
        if len(tried) == 1:
            raise OSError("disk full")
        return encode_shards(job, shards, again, *more)

    monkeypatch.setattr(ray_encode, "encode_shards", failing)
    watch = Watched()
    with pytest.raises(InputError, match="no such folder"):
        ray_encode.encode_on_ray(job, 0, watch)
    store = open_store(job)
    assert len(store.shard_ids()) == 8
    assert len(tried) == 4  # both workers had begun another one, which is committed
    assert set(store.shard_ids()) - set(store.missing()) == set(tried[2:])
    assert [told[0] for told in watch.committed_shards] == tried[2:]
    assert signal.getsignal(signal.SIGINT) is before


def test_another_error_in_a_shard_is_raised_when_the_others_are_committed(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_encode, "ray", _RayOfTwo())

    def failing(job: EncodeJob, shards: list[ShardId], again: bool, *more: Any) -> Tally:
        if shards == open_store(job).shard_ids()[:1]:
            raise OSError("disk full")
        return encode_shards(job, shards, again, *more)

    monkeypatch.setattr(ray_encode, "encode_shards", failing)
    with pytest.raises(OSError, match="disk full"):
        ray_encode.encode_on_ray(job, 0, Watched())
    assert len(open_store(job).missing()) == 1


def test_a_shard_that_fails_leaves_the_others_of_its_task_and_what_is_there_stays(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(job)
    shards = store.shard_ids()
    write, written = LatentStore.write_shard, []

    def failing(self: LatentStore, bucket: str, shard: int, samples: Any) -> None:
        if (bucket, shard) == shards[2] and len(written) < 5:
            raise OSError("disk full for a moment")
        written.append((bucket, shard))
        write(self, bucket, shard, samples)

    monkeypatch.setattr(LatentStore, "write_shard", failing)
    encode_shards(job, shards[:1])
    with pytest.raises(OSError, match="for a moment"):
        encode_shards(job, shards[:6])
    # The one after it was encoded already when it failed, and is tried again with the rest.
    assert set(store.missing()) == {shards[2], *shards[6:]}
    assert written.count(shards[0]) == 1, "it was there"
    encode_shards(job, shards)
    assert store.missing() == []
    assert all(written.count(shard) == 1 for shard in shards)
    encode_shards(job, shards[:2], again=True)
    assert written[-2:] == shards[:2], "unless that is asked for"


def test_clips_that_cannot_be_read_just_now_are_not_pinned_out(
    clips: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["path,text", *(f"{clip.path},{clip.text}" for clip in clips)]
    (tmp_path / "none.csv").write_text("\n".join(lines))
    stage = STAGE.replace(data=Videos(str(tmp_path / "none.csv"), held_out_every=2))
    told: list[str] = []
    tracker = SimpleNamespace(event=lambda kind, *_, **__: told.append(kind))
    course = SimpleNamespace(folder=RunFolder(tmp_path / "run"), tracker=tracker)
    probe_files, times = Decoders.probe, 0

    def silent(self: Decoders, paths: Iterable[str]) -> Any:
        nonlocal times
        times += 1
        for path, found in zip(some := list(paths), probe_files(self, some), strict=True):
            yield (
                Unreachable(f"{path}: slow down") if path == clips[3].path and silent_for else found
            )

    silent_for = True
    monkeypatch.setattr(Decoders, "probe", silent)
    monkeypatch.setattr("elastic.course._TRY_AGAIN_S", 0.0)
    with pytest.raises(InputError, match=r"1 of 11 files cannot be read just now.*slow down"):
        pin_members(course, stage)  # type: ignore[arg-type]
    assert times >= 3, "it was tried again"
    own = course.folder.stage(stage.name)
    assert not own.exists() or list(own.iterdir()) == [], "nothing is left half done"
    silent_for = False
    members = pin_members(course, stage)  # type: ignore[arg-type]
    assert members.num_clips() == 11
    assert [path.name for path in own.iterdir()] == ["clips.arrow"]


def test_what_is_damaged_is_encoded_again_and_nothing_else(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_encode, "ray", _RayOfTwo())
    digest = ray_encode.encode_on_ray(job, 0, Watched()).digest
    store, files = Place(job.root), [shard_file(LONG.name, "latent", 0), NULL_TEXT]
    before = [store.read(name) for name in files]
    for name in files:
        store.flip(name, 9, 1)
    verdict = verify(job.root)
    assert set(verdict.shards) == {(LONG.name, 0)}
    encoded: list[tuple[str, int]] = []

    def counting(job: EncodeJob, shards: list[ShardId], again: bool, *more: Any) -> Tally:
        encoded.extend(shards)
        return encode_shards(job, shards, again, *more)

    monkeypatch.setattr(ray_encode, "encode_shards", counting)
    assert ray_encode.encode_on_ray(job, 0, Watched(), verdict).digest == digest
    assert encoded == [(LONG.name, 0)]
    assert [store.read(name) for name in files] == before
    assert verify(job.root).is_whole


def test_captions_lie_beside_the_latents_in_the_order_of_their_slots(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_encode, "ray", _RayOfTwo())
    digest = ray_encode.encode_on_ray(job, 0, Watched()).digest
    store, name = Place(job.root), captions_file(LONG.name)
    table = pq.read_table(io.BytesIO(store.read(name))).to_pydict()
    clips = job.members.clips[LONG.name]
    assert table["sample_id"] == [clip.sample_id for clip in clips]
    assert table["text"] == [clip.text for clip in clips]
    before = store.read(name)
    store.flip(name, 40, 1)
    verdict = verify(job.root)
    assert [fault.name for fault in verdict.faults] == [name]
    assert ray_encode.encode_on_ray(job, 0, Watched(), verdict).digest == digest
    assert store.read(name) == before
    store.remove(name)
    assert verify(job.root).is_whole, "a store of before had none, and nothing here reads them"


def test_a_damaged_shard_stays_as_it_is_where_a_clip_that_it_held_is_gone(
    job: EncodeJob, members: Members, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_encode, "ray", _RayOfTwo())
    ray_encode.encode_on_ray(job, 0, Watched())
    store, damaged = Place(job.root), shard_file(LONG.name, "latent", 0)
    store.flip(damaged, 9, 1)
    before = store.read(damaged)
    clips = {name: list(found) for name, found in members.clips.items()}
    (tmp_path / "another.mp4").touch()  # so that the folder is there, and its files are not lost
    clips[LONG.name][1] = clips[LONG.name][1]._replace(path=str(tmp_path / "gone.mp4"))
    hurt = replace(job, members=Members(clips))
    with pytest.raises(InputError, match=r"cannot be encoded again: '.*gone\.mp4', which it held"):
        ray_encode.encode_on_ray(hurt, 0, Watched(), verify(job.root))
    assert store.read(damaged) == before
    assert SealedStore.open(job.root, job.fingerprint).count(LONG.name) == NUM_LONG


def test_text_of_an_encoder_in_files_is_stored_and_read_without_it(
    weights: Path,
    scale: Scale,
    members: Members,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny_t5_clip(tmp_path)
    monkeypatch.chdir(tmp_path)
    stage = STAGE.replace(text=encoder.replace(t5="t5", clip="clip"))
    job = plan_job(stage, weights, scale, members, str(tmp_path / "latents"))
    monkeypatch.chdir("/")  # a worker runs elsewhere
    captions = [clip.text for clip in members.clips[SHORT.name]]
    expected, null = encoder.encode(captions), encoder.null()
    store = _sealed(job)
    for folder in ("t5", "clip"):
        shutil.rmtree(tmp_path / folder)
    source = LatentSource(stage, store, held_out=False)
    text = source.fetch(SHORT, np.arange(len(captions))).text
    assert text is not None
    assert text.mask_BL is not None
    for row, embedding in enumerate(expected):
        stored_LD = text.text_BLD[row, text.mask_BL[row]].float()
        torch.testing.assert_close(stored_LD, embedding.embedding_LD, rtol=BF16_ROUNDING, atol=1e-5)
        stored_D = text.pooled_BD[row].float()
        torch.testing.assert_close(stored_D, embedding.pooled_D, rtol=BF16_ROUNDING, atol=1e-5)
    assert torch.equal(source.null_text().embedding_LD, null.embedding_LD.bfloat16().float())
    assert torch.equal(source.null_text().pooled_D, null.pooled_D.bfloat16().float())


def test_a_machine_with_another_text_encoder_encodes_nothing(
    weights: Path, scale: Scale, members: Members, tmp_path: Path
) -> None:
    stage = STAGE.replace(text=tiny_t5_clip(tmp_path))
    job = plan_job(stage, weights, scale, members, str(tmp_path / "latents"))
    store = open_store(job)
    change_weights(tmp_path / "clip")
    with pytest.raises(InputError, match=r"'tiny': text: .* \(clip differ\)"):
        encode_shards(job, store.missing()[:1])
    shutil.rmtree(tmp_path / "t5")
    with pytest.raises(InputError, match=r"'tiny': text\.t5 .*no such folder"):
        encode_shards(job, store.missing()[:1])
    with pytest.raises(InputError, match=r"'tiny': text\.t5 .*no such folder"):
        plan_job(stage, weights, scale, members, str(tmp_path / "latents"))
    assert not store.has_null_text()


def test_pixels_are_read_by_split_and_a_broken_clip_is_grey_without_weight(
    members: Members, tmp_path: Path
) -> None:
    clips = {name: list(found) for name, found in members.clips.items()}
    (tmp_path / "other.mp4").touch()  # in an empty folder it would be the mount that is gone
    clips[SHORT.name][1] = clips[SHORT.name][1]._replace(path=str(tmp_path / "gone.mp4"))
    decoders = shared_decoders(1)
    source = VideoSource(STAGE, Members(clips), held_out=False, decoders=decoders)
    (samples,) = source.fetch_all([(SHORT, np.array([0, 1]))])
    assert samples.weight_B.tolist() == [1, 0]
    assert samples.ids.tolist() == [clip.sample_id for clip in clips[SHORT.name][:2]]
    assert torch.equal(samples.x_BCTHW[:1], _pixels(clips[SHORT.name][:1], SHORT))
    assert torch.equal(samples.x_BCTHW[1], torch.zeros(3, 4, 32, 32))
    held_out = VideoSource(STAGE, members, held_out=True, decoders=decoders)
    assert held_out.counts() == {SHORT.name: 2, LONG.name: 2}


def test_a_scale_of_no_readable_clip_is_refused(
    weights: Path, members: Members, tmp_path: Path
) -> None:
    path = tmp_path / "short.mp4"
    level_video(path, [9], [0], Fraction(1, 8))
    clips = {
        name: [clip._replace(path=str(path)) for clip in found]
        for name, found in members.clips.items()
    }
    with pytest.raises(InputError, match="none of the first 7 clips of bucket '32px-8f'"):
        measure_scale(STAGE, weights, Members(clips))


def test_a_published_scale_is_not_measured(weights: Path, members: Members) -> None:
    statistics = Statistics((1.0, 2.0, 3.0, 4.0), (0.5, 0.25, 2.0, 4.0))

    class Known(DCAE):
        published: ClassVar[Statistics] = statistics

    fields = {name: getattr(CODEC, name) for name in DCAE.model_fields}
    known = Known(**{**fields, "normalisation": "published"})
    stage = STAGE.model_copy(update={"vae": known})
    assert find_scale(stage, weights, members) == Scale(*statistics)
    assert find_scale(STAGE, weights, members) == measure_scale(STAGE, weights, members)


def test_tiled_clips_are_encoded_one_at_a_time(
    weights: Path, scale: Scale, members: Members, tmp_path: Path
) -> None:
    tiled = STAGE.replace(vae=CODEC.replace(tiling=Tiling(frames=None, pixels=64, overlap=0.5)))
    assert (chunk_size(CODEC), chunk_size(tiled.codec)) == (8, 1)
    job = plan_job(tiled, weights, scale, members, str(tmp_path))
    whole = plan_job(STAGE, weights, scale, members, str(tmp_path))
    assert job.fingerprint != whole.fingerprint
    z_BCTHW = _sealed(job).read_batch(LONG.name, range(NUM_LONG)).latents_BCTHW
    expected_BCTHW = _sealed(whole).read_batch(LONG.name, range(NUM_LONG)).latents_BCTHW
    torch.testing.assert_close(z_BCTHW, expected_BCTHW, rtol=2 * BF16_ROUNDING, atol=1e-4)


def _drawn_clips(count: int, frames: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(count)
    shape = (3, frames, 32, 32)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw) for _ in range(count)]


def test_only_whole_chunks_are_compiled_once_for_each_size(
    codec: CodecModule, scale: Scale, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compiled_encoder.cache_clear()
    counter = CompileCounterWithBackend("aot_eager")  # what is traced; no compiler is needed
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, options, **how: compiled(f, backend=counter, **how)
    )
    encoder = Encoder(CODEC, codec, scale)
    for frames in (4, 8):
        for count in (8, 8, 3):
            clips = _drawn_clips(count, frames)
            found, eager = (
                encoder.begin(clips, ends=False, compiled=compiled).wait()
                for compiled in (True, False)
            )
            for one, other in zip(found, eager, strict=True):
                torch.testing.assert_close(
                    one.latent_CTHW, other.latent_CTHW, rtol=2 * BF16_ROUNDING, atol=1e-4
                )
    assert counter.frame_count == 2, "a graph for each bucket"
    compiled_encoder.cache_clear()


def test_an_encoder_is_compiled_where_that_is_asked_for_or_worth_it() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    large = Bucket("256px", frames=32, batch=2)
    assert not compiles_encoder(STAGE, large, 10**6, cpu)
    assert not compiles_encoder(STAGE, large, 10**4, gpu)
    assert compiles_encoder(STAGE, large, 10**5, gpu)
    assert compiles_encoder(STAGE.replace(compile=True), SHORT, 1, cpu)
    assert not compiles_encoder(STAGE.replace(compile=False), large, 10**6, gpu)
    other = STAGE.replace(
        vae=HUNYUAN,
        compile=True,
        schedule=[Phase(until=40, buckets=(Bucket("32px", frames=5, batch=2),))],
    )
    assert not compiles_encoder(other, large, 10**6, gpu)


def test_a_stage_that_asks_for_it_encodes_compiled(
    job: EncodeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    begin = Encoder.begin

    def told(self: Encoder, clips: Any, ends: bool, compiled: bool = False) -> Any:
        asked.append(compiled)
        return begin(self, clips, ends)

    monkeypatch.setattr(Encoder, "begin", told)
    shards = open_store(job).shard_ids()
    encode_shards(job, shards[:1])
    encode_shards(replace(job, stage=STAGE.replace(compile=True)), shards[1:2])
    assert asked == [False, True]


def test_weights_of_another_shape_are_named(weights: Path, tmp_path: Path) -> None:
    assert file_digest(weights) == file_digest(_write_weights(tmp_path / "same.safetensors", 0))
    other = CODEC.replace(encoder_depths=(1, 1, 1, 1, 1, 2))
    with pytest.raises(InputError, match=r"missing .*encoder"):
        load_weights(other.build(), weights)
