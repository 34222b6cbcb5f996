"""The latent store: what was committed is read back exactly, and damage is named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from s3_server import s3_server  # noqa: F401  # a fixture
from store_places import Place, a_bucket, a_place  # noqa: F401  # fixtures

from elastic.data.packing import pack, unpack
from elastic.data.schema import NULL_TEXT, PLAN, array_digest, plan_json, sealed_file, shard_file
from elastic.data.shards import (
    canonical_digest,
    crc32c,
    group_json,
    json_bytes,
    plain_bytes,
)
from elastic.data.store import (
    Absent,
    BucketPlan,
    DamagedStore,
    LatentStore,
    Sample,
    SealedStore,
    ShardId,
    StoreSchema,
    fingerprint,
    per_sample_file,
)
from elastic.errors import InputError
from models.text import TextEmbedding

ROOT = Path(__file__).parent.parent
PRINT = fingerprint({"codec": "test", "rate": 8})
VIDEO, IMAGE = "32px-5f", "64px-1f"


def _schema(
    videos: int = 11,
    images: int = 3,
    k: int = 4,
    shape: tuple[int, int, int, int] = (4, 2, 3, 5),
    packed: bool = False,
) -> StoreSchema:
    return StoreSchema(
        packed=packed,
        fingerprint=PRINT,
        buckets=(
            BucketPlan(name=VIDEO, shape=shape, sample_ids=tuple(range(100, 100 + videos))),
            BucketPlan(name=IMAGE, shape=(4, 1, 2, 2), sample_ids=tuple(range(7, 7 + images))),
        ),
        samples_per_shard=k,
        text_tokens=19,
        text_width=6,
        pooled_width=5,
    )


def _sample(schema: StoreSchema, bucket: str, number: int) -> Sample:
    """The sample that encoding would give: a function of its id, as the store demands."""
    made = torch.Generator().manual_seed(number)
    length = number * 7 % (schema.text_tokens + 1)
    shapes = (schema.bucket(bucket).shape, (length, schema.text_width), (schema.pooled_width,))
    tensors = [torch.randn(shape, generator=made).to(torch.bfloat16) for shape in shapes]
    return Sample(number, tensors[0], tensors[1], tensors[2])


def _fill(store: LatentStore, absent: frozenset[int] = frozenset()) -> None:
    for shard in store.missing():
        _write(store, shard, absent)


def _write(store: LatentStore, shard: ShardId, absent: frozenset[int] = frozenset()) -> None:
    samples = [
        Absent(n, "cut off") if n in absent else _sample(store.schema, shard[0], n)
        for n in store.planned(shard)
    ]
    store.write_shard(*shard, samples)


def _check(root: str | Path, schema: StoreSchema, absent: frozenset[int] = frozenset()) -> None:
    sealed = SealedStore.open(root, PRINT)
    for bucket in schema.buckets:
        ids = [n for n in bucket.sample_ids if n not in absent]
        assert sealed.count(bucket.name) == len(ids)
        assert sealed.sample_ids(bucket.name).tolist() == ids
        order = random.Random(0).sample(range(len(ids)), len(ids))
        batch = sealed.read_batch(bucket.name, order)
        assert batch.sample_ids.tolist() == [ids[i] for i in order]
        for place, index in enumerate(order):
            wanted = _sample(schema, bucket.name, ids[index])
            assert torch.equal(batch.latents_BCTHW[place], wanted.latent_CTHW)
            assert torch.equal(batch.texts_LD[place], wanted.text_LD)
            assert torch.equal(batch.pooled_BP[place], wanted.pooled_P)


@settings(max_examples=20, deadline=None)
@given(
    videos=st.integers(1, 14),
    images=st.integers(1, 5),
    k=st.integers(1, 6),
    absent=st.frozensets(st.integers(100, 113)),
    packed=st.booleans(),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    videos: int,
    images: int,
    k: int,
    absent: frozenset[int],
    packed: bool,
) -> None:
    root = tmp_path_factory.mktemp("latents")
    schema = _schema(videos, images, k, packed=packed)
    store = LatentStore.create(root, schema)
    _fill(store, absent)
    assert store.missing() == []
    store.seal()
    _check(root, schema, absent)
    assert store.quarantined() == {n: "cut off" for n in absent if n < 100 + videos}


_ZARR = """
import json, sys
import numpy as np
import zarr
group = zarr.open_group(sys.argv[1], mode="r")
members = dict(group.members(max_depth=None))
arrays = {name: member[:] for name, member in members.items() if isinstance(member, zarr.Array)}
np.savez(sys.argv[2], **arrays)
print(json.dumps({"": dict(group.attrs), **{n: dict(m.attrs) for n, m in members.items()}}))
"""


def _by_zarr(
    place: Place, folder: Path
) -> tuple[dict[str, dict[str, str]], dict[str, NDArray[np.generic]]]:
    """Attributes and arrays of a store, as zarr alone reads them in a process of its own."""
    command = [sys.executable, "-c", _ZARR, place.root, str(folder / "arrays.npz")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with np.load(folder / "arrays.npz") as arrays:
        return json.loads(said), dict(arrays)


@pytest.mark.parametrize("packed", [False, True])
def test_zarr_reads_the_same_values(place: Place, tmp_path: Path, packed: bool) -> None:
    schema = _schema(packed=packed)
    absent = frozenset({102, 107})
    store = LatentStore.create(place.root, schema)
    _fill(store, absent)
    digest = store.seal()
    attributes, arrays = _by_zarr(place, tmp_path)
    assert attributes[""] == {"fingerprint": PRINT, "digest": digest}
    assert attributes[f"{VIDEO}/latent"] == {"logical_dtype": "bfloat16"}
    latent, text, pooled = (arrays[f"{VIDEO}/{name}"] for name in ("latent", "text", "pooled"))
    assert (latent.shape, text.shape, pooled.shape) == ((11, 4, 2, 3, 5), (11, 19, 6), (11, 5))
    ids, lengths = (arrays[f"{VIDEO}/{name}"] for name in ("sample_id", "text_length"))
    for slot, number in enumerate(schema.bucket(VIDEO).sample_ids):
        if number in absent:
            assert ids[slot] == -1
            assert (latent[slot] == 0x7FC0).all()  # NaN, which nothing takes for data
            continue
        wanted = _sample(schema, VIDEO, number)
        assert ids[slot] == number
        assert lengths[slot] == len(wanted.text_LD)
        for array, tensor in (
            (latent[slot], wanted.latent_CTHW),
            (text[slot, : lengths[slot]], wanted.text_LD),
            (pooled[slot], wanted.pooled_P),
        ):
            assert torch.equal(torch.from_numpy(array).view(torch.bfloat16), tensor)


def test_reading_fills_the_callers_buffer(place: Place) -> None:
    schema = _schema()
    store = LatentStore.create(place.root, schema)
    _fill(store)
    store.seal()
    sealed = SealedStore.open(place.root, PRINT)
    ring = torch.zeros((2, *schema.bucket(VIDEO).shape), dtype=torch.bfloat16)
    batch = sealed.read_batch(VIDEO, [9, 2], out=ring)
    assert batch.latents_BCTHW.data_ptr() == ring.data_ptr()
    assert torch.equal(ring[1], _sample(schema, VIDEO, 102).latent_CTHW)
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        sealed.read(VIDEO, 0, ring[0].float())
    with pytest.raises(IndexError, match="11 samples, not 11"):
        sealed.read(VIDEO, 11, ring[0])


def test_the_digest_is_of_the_content_and_not_of_the_way(place: Place) -> None:
    schema = _schema()
    digests = []
    for name, order in (("a", 1), ("b", -1)):
        writers = [LatentStore.create(f"{place.root}/{name}", schema) for _ in range(2)]
        for turn, shard in enumerate(writers[0].shard_ids()[::order]):
            _write(writers[turn % 2], shard)
        _write(writers[1], (VIDEO, 0))  # a second time, by whoever
        digests.append(writers[0].seal())
        assert writers[1].seal() == digests[-1]
    assert digests[0] == digests[1]
    other = LatentStore.create(f"{place.root}/c", schema)
    _fill(other, frozenset({100}))
    assert other.seal() != digests[0]


def test_another_fingerprint_digest_or_plan_is_refused(place: Place) -> None:
    store = LatentStore.create(place.root, _schema())
    with pytest.raises(InputError, match="not sealed"):
        SealedStore.open(place.root, PRINT)
    with pytest.raises(ValueError, match="4 shards are missing"):
        store.seal()
    _fill(store)
    digest = store.seal()
    assert SealedStore.open(place.root, PRINT, digest).digest == digest
    other = fingerprint({"codec": "test", "rate": 9})
    with pytest.raises(InputError, match=f"fingerprint {PRINT}, the stage needs {other}"):
        SealedStore.open(place.root, other)
    with pytest.raises(InputError, match=f"digest {digest}, the stage needs 00"):
        SealedStore.open(place.root, PRINT, "00")
    with pytest.raises(InputError, match="buckets is"):
        LatentStore.create(place.root, _schema(videos=12))
    assert LatentStore.open(place.root).schema == _schema()
    with pytest.raises(InputError, match=r"plan\.json is missing"):
        LatentStore.open(f"{place.root}/none")


def test_fingerprints_follow_values_and_not_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(TypeError):
        fingerprint({"a": object()})


def test_wrong_samples_are_not_written(place: Place) -> None:
    schema = _schema()
    store = LatentStore.create(place.root, schema)
    samples = [_sample(schema, VIDEO, n) for n in store.planned((VIDEO, 0))]
    with pytest.raises(ValueError, match="is planned as"):
        store.write_shard(VIDEO, 0, samples[::-1])
    wide = samples[0]._replace(latent_CTHW=samples[0].latent_CTHW.float())
    with pytest.raises(ValueError, match="sample 100, latent: must be bfloat16"):
        store.write_shard(VIDEO, 0, [wide, *samples[1:]])
    assert len(store.missing()) == 4


def test_a_torn_or_damaged_line_costs_one_shard(place: Place) -> None:
    schema = _schema()
    store = LatentStore.create(place.root, schema)
    _fill(store)
    ((name, whole),) = [log for log in place.logs().items() if IMAGE.encode() in log[1]]
    for cut in range(1, 60, 7):
        place.write(name, whole[:-cut])
        assert LatentStore.open(place.root).missing() == ([(IMAGE, 0)] if cut > 1 else [])
    middle = whole.rindex(b"absent")
    place.write(name, whole[:middle] + b"A" + whole[middle + 1 :])
    again = LatentStore.open(place.root)
    assert len(again.missing()) == 1
    # A torn line in front of a good one, as after a full disk.
    place.write(name, whole[:-20])
    _fill(again)
    again.seal()
    _check(place.root, schema)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", ["latent", "text", "pooled"])
def test_a_flipped_bit_is_found_and_named(place: Place, array: str, packed: bool) -> None:
    schema = _schema(packed=packed)
    store = LatentStore.create(place.root, schema)
    _fill(store)
    digest = store.seal()
    path = shard_file(VIDEO, array, 1)
    place.flip(path, 1, 4)
    sealed = SealedStore.open(place.root, PRINT)
    with pytest.raises(DamagedStore) as caught:
        sealed.read_batch(VIDEO, range(11))
    for word in (f"{place.root}/{path}", f"{array} of sample 104", "CRC", "delete that file"):
        assert word in str(caught.value)
    place.remove(path)
    with pytest.raises(DamagedStore, match="is gone with its shard"):
        SealedStore.open(place.root, PRINT).read_batch(VIDEO, range(11))
    assert store.missing() == [(VIDEO, 1)]
    _fill(store)
    assert store.seal() == digest
    _check(place.root, schema)


@pytest.mark.parametrize("array", ["latent", "text", "pooled"])
def test_a_damaged_index_of_a_packed_shard_is_found_and_named(place: Place, array: str) -> None:
    store = LatentStore.create(place.root, _schema(packed=True))
    _fill(store)
    store.seal()
    path = shard_file(VIDEO, array, 1)
    place.flip(path, -9, 4)
    with pytest.raises(DamagedStore, match=rf"{path}: {array} of .* has a damaged index"):
        SealedStore.open(place.root, PRINT).read_batch(VIDEO, range(11))


def test_packed_latents_take_less_and_are_the_same(tmp_path: Path) -> None:
    sizes = {}
    for packed in (False, True):
        schema = _schema(shape=(16, 3, 16, 16), packed=packed)
        store = LatentStore.create(tmp_path / str(packed), schema)
        _fill(store)
        store.seal()
        _check(tmp_path / str(packed), schema)
        sizes[packed] = sum(store.folder.sizes(f"{VIDEO}/latent").values())
    assert sizes[True] < 0.8 * sizes[False], "of noise, which packs worst"


def test_packed_bytes_are_a_function_of_the_content_in_any_thread() -> None:
    chunk = np.random.default_rng(0).standard_normal(2**21, np.float32).view(np.uint8)
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(pack, chunk).result()
    for _ in range(3):
        assert np.array_equal(pack(chunk), elsewhere)
    out = np.zeros(len(chunk), np.uint8)
    unpack(elsewhere, [len(elsewhere)], out)
    assert np.array_equal(out, chunk)
    with pytest.raises(ValueError, match="holds 8388608 bytes instead of 8388610"):
        unpack(elsewhere, [len(elsewhere)], np.zeros(len(chunk) + 2, np.uint8))


def test_a_store_that_was_begun_stays_packed_or_not(tmp_path: Path) -> None:
    for packed in (False, True):
        root = tmp_path / str(packed)
        _write(LatentStore.create(root, _schema(packed=packed)), (VIDEO, 0))
        store = LatentStore.create(root, _schema(packed=not packed))
        assert store.schema == _schema(packed=packed)
        _fill(store)
        store.seal()
        _check(root, _schema(packed=packed))


@pytest.mark.parametrize("array", ["latent", "text", "pooled"])
def test_a_truncated_shard_is_missing(place: Place, array: str) -> None:
    store = LatentStore.create(place.root, _schema())
    _fill(store)
    store.seal()
    path = shard_file(VIDEO, array, 2)
    place.write(path, place.read(path)[:3])
    assert store.missing() == [(VIDEO, 2)]
    with pytest.raises(DamagedStore, match="is cut off after"):
        SealedStore.open(place.root, PRINT).read_batch(VIDEO, range(11))


def test_the_null_text_is_sealed_with_the_store(place: Place) -> None:
    store = LatentStore.create(place.root, _schema())
    _fill(store)
    without = store.seal()
    assert SealedStore.open(place.root, PRINT).null_text is None
    null = TextEmbedding(torch.randn(3, 6).bfloat16(), torch.randn(5).bfloat16())
    assert not store.has_null_text()
    store.publish_null_text(null)
    digest = store.seal()
    assert digest != without
    found = SealedStore.open(place.root, PRINT, digest).null_text
    assert found is not None
    assert torch.equal(found.embedding_LD, null.embedding_LD.float())
    assert torch.equal(found.pooled_D, null.pooled_D.float())
    place.flip(NULL_TEXT, -1, 1)
    with pytest.raises(DamagedStore, match=r"null_text\.safetensors is not what was sealed"):
        SealedStore.open(place.root, PRINT)
    place.remove(NULL_TEXT)
    with pytest.raises(DamagedStore, match="delete it and"):
        SealedStore.open(place.root, PRINT)


def _with_stills() -> StoreSchema:
    schema = _schema()
    video, image = schema.buckets
    return replace(schema, buckets=(replace(video, given=(4, 2, 3, 5)), image))


def _fill_with_stills(store: LatentStore) -> None:
    for bucket, shard in store.missing():
        samples = []
        for number in store.planned((bucket, shard)):
            sample = _sample(store.schema, bucket, number)
            still = _still(number) if bucket == VIDEO else None
            samples.append(sample._replace(given_CTHW=still))
        store.write_shard(
            bucket, shard, [Absent(102, "cut") if s[0] == 102 else s for s in samples]
        )


def _still(number: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(9000 + number)
    return torch.randn((4, 2, 3, 5), generator=made).to(torch.bfloat16)


def test_stills_of_given_frames_are_kept_where_the_plan_has_them(
    place: Place, tmp_path: Path
) -> None:
    schema = _with_stills()
    store = LatentStore.create(place.root, schema)
    _fill_with_stills(store)
    digest = store.seal()
    assert LatentStore.open(place.root).schema == schema
    sealed = SealedStore.open(place.root, PRINT, digest)
    ids = [n for n in schema.bucket(VIDEO).sample_ids if n != 102]
    order = random.Random(1).sample(range(10), 10)
    batch = sealed.read_batch(VIDEO, order)
    assert batch.given_BCTHW is not None
    for number, index in enumerate(order):
        assert torch.equal(batch.given_BCTHW[number], _still(ids[index]))
        wanted = _sample(schema, VIDEO, ids[index])
        assert torch.equal(batch.latents_BCTHW[number], wanted.latent_CTHW)
    assert sealed.read_batch(IMAGE, [0]).given_BCTHW is None
    _, arrays = _by_zarr(place, tmp_path)
    array = arrays[f"{VIDEO}/given"]
    assert array.shape == (11, 4, 2, 3, 5)
    assert arrays[f"{VIDEO}/crc32c"].shape == (11, 4)
    assert arrays[f"{IMAGE}/crc32c"].shape == (3, 3)
    assert torch.equal(torch.from_numpy(array[5]).view(torch.bfloat16), _still(105))
    assert (array[2] == 0x7FC0).all()
    assert f"{IMAGE}/given" not in arrays


def test_damaged_stills_are_found_and_only_their_shard_is_redone(place: Place) -> None:
    store = LatentStore.create(place.root, _with_stills())
    _fill_with_stills(store)
    digest = store.seal()
    path = shard_file(VIDEO, "given", 1)
    place.flip(path, 1, 4)
    with pytest.raises(DamagedStore, match=r"given of sample 104 .*CRC"):
        SealedStore.open(place.root, PRINT).read_batch(VIDEO, range(10))
    place.remove(path)
    assert store.missing() == [(VIDEO, 1)]
    _fill_with_stills(store)
    assert store.seal() == digest
    SealedStore.open(place.root, PRINT).read_batch(VIDEO, range(10))


def test_a_sample_has_stills_exactly_where_the_plan_has_them(place: Place) -> None:
    store = LatentStore.create(place.root, _with_stills())
    bare = [_sample(store.schema, VIDEO, n) for n in store.planned((VIDEO, 0))]
    with pytest.raises(ValueError, match=r"bucket '32px-5f' keeps .*'given'.*got"):
        store.write_shard(VIDEO, 0, bare)
    image = [
        _sample(store.schema, IMAGE, n)._replace(given_CTHW=_still(n))
        for n in store.planned((IMAGE, 0))
    ]
    with pytest.raises(ValueError, match=r"bucket '64px-1f' keeps"):
        store.write_shard(IMAGE, 0, image)
    with pytest.raises(InputError, match="buckets is"):
        LatentStore.create(place.root, _schema())


def test_a_plan_without_stills_is_written_as_ever() -> None:
    """Stores that were started before stills were kept stay what they are."""
    bucket = plan_json(_schema())["buckets"][VIDEO]
    assert set(bucket) == {"shape", "num_samples", "sample_ids"}
    assert _schema().arrays(VIDEO) == ("latent", "text", "pooled")


def test_changed_rows_are_found_when_opened(place: Place) -> None:
    store = LatentStore.create(place.root, _schema())
    _fill(store)
    store.seal()
    place.flip(per_sample_file(VIDEO, "sample_id"), 0, 1)
    with pytest.raises(DamagedStore, match="sample_id"):
        SealedStore.open(place.root, PRINT)


@pytest.mark.parametrize("field", ["text_tokens", "shape"])
def test_a_plan_that_was_changed_after_the_seal_is_refused(place: Place, field: str) -> None:
    store = LatentStore.create(place.root, _schema())
    _fill(store)
    store.seal()
    plan = json.loads(place.read(PLAN))
    if field == "shape":
        plan["buckets"][VIDEO]["shape"][0] *= 1000
    else:
        plan[field] *= 1000
    place.write(PLAN, json.dumps(plan).encode())
    with pytest.raises(InputError, match=r"plan\.json.* is not what was sealed"):
        SealedStore.open(place.root, PRINT)


@pytest.mark.parametrize("words", [b"", b'{"shape": [1000000000000]}'])
def test_no_array_s_zarr_metadata_decides_what_is_read(place: Place, words: bytes) -> None:
    store = LatentStore.create(place.root, _schema())
    _fill(store)
    store.seal()
    before = SealedStore.open(place.root, PRINT).read_batch(VIDEO, [6])
    described = [name for name in place.names() if name.endswith("/zarr.json")]
    assert described
    for name in described:
        place.write(name, words)
    after = SealedStore.open(place.root, PRINT).read_batch(VIDEO, [6])
    assert torch.equal(before.latents_BCTHW, after.latents_BCTHW)


def test_two_machines_that_round_differently_leave_one_truth(place: Place) -> None:
    schema = _schema()
    first, second = (LatentStore.create(place.root, schema) for _ in range(2))
    _fill(first)
    samples = [_sample(schema, VIDEO, n) for n in first.planned((VIDEO, 1))]
    rounded = samples[2]._replace(latent_CTHW=samples[2].latent_CTHW + 1)
    second.write_shard(VIDEO, 1, [*samples[:2], rounded, samples[3]])
    assert first.missing() == []
    first.seal()
    batch = SealedStore.open(place.root, PRINT).read_batch(VIDEO, [6])
    assert torch.equal(batch.latents_BCTHW[0], rounded.latent_CTHW)
    # A mixture of both: neither line is true, so the shard is encoded again.
    place.flip(shard_file(VIDEO, "latent", 1), 0, 1)
    assert first.missing() == [(VIDEO, 1)]


_WRITER = """
import sys
sys.path.insert(0, "tests")
from test_store import _fill, _schema
from elastic.data.store import LatentStore
_fill(LatentStore.create(sys.argv[1], _schema(videos=480, shape=(16, 5, 16, 16))))
"""


def test_killed_writers_lose_nothing_that_was_committed(place: Place) -> None:
    schema = _schema(videos=480, shape=(16, 5, 16, 16))
    held = 0
    pause_s = (
        0.003 if place.root.startswith("/") else 0.05
    )  # what is asked of a bucket takes longer
    for _ in range(2):
        before = sum(log.count(b"crcs") for log in place.logs().values())
        with subprocess.Popen([sys.executable, "-c", _WRITER, place.root], cwd=ROOT) as child:
            deadline = time.monotonic() + 60
            lines = before
            while lines < before + 8 and time.monotonic() < deadline and child.poll() is None:
                time.sleep(pause_s)
                lines = sum(log.count(b"crcs") for log in place.logs().values())
            os.kill(child.pid, signal.SIGKILL)
        missing = LatentStore.open(place.root).missing()
        done = 121 - len(missing)
        assert held + 8 <= done < 121  # it went on where the last one stopped
        held = done
    store = LatentStore.create(place.root, schema)
    _fill(store)
    store.seal()
    assert [name for name in place.names() if name.endswith(".tmp")] == []
    _check(place.root, schema)


def test_bad_plans_are_refused() -> None:
    with pytest.raises(InputError, match="becomes a folder"):
        BucketPlan(name="../x", shape=(1, 1, 1, 1), sample_ids=(1,))
    with pytest.raises(InputError, match="has no samples"):
        BucketPlan(name="x", shape=(1, 1, 1, 1), sample_ids=())
    with pytest.raises(ValueError, match="distinct"):
        BucketPlan(name="x", shape=(1, 1, 1, 1), sample_ids=(1, 1))


def test_what_was_found_whole_is_not_checked_again_until_that_is_asked_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = _schema(videos=20)
    store = LatentStore.create(place.root, schema)
    _fill(store)
    store.seal()
    sealed, checked = SealedStore.open(place.root, PRINT), []
    monkeypatch.setattr("elastic.data.sealed.crc32c", lambda b: checked.append(1) or crc32c(b))
    sealed.read_batch(VIDEO, [3, 17])
    first = len(checked)
    assert first == 2 * len(schema.arrays(VIDEO))
    sealed.read_batch(VIDEO, [17, 3])
    assert len(checked) == first
    sealed.read_batch(VIDEO, [4])
    assert len(checked) == first * 3 // 2
    path = shard_file(VIDEO, "latent", 3 // schema.samples_per_shard)
    content = place.read(path)
    place.write(path, bytes(len(content) // 2) + content[len(content) // 2 :])
    sealed.forget_checks()
    with pytest.raises(DamagedStore, match="has CRC"):
        sealed.read_batch(VIDEO, range(8))


def test_many_shards_are_read_with_few_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.data.store_folder._OPEN_FILES", 3)
    schema = _schema(videos=20, k=1)
    store = LatentStore.create(tmp_path, schema)
    _fill(store)
    store.seal()
    sealed = SealedStore.open(tmp_path, PRINT)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert np.array_equal(sealed.read_batch(VIDEO, range(20)).sample_ids, np.arange(100, 120))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_absent_samples_leave_the_others_where_they_are(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("store")
    schema = _schema(videos=data.draw(st.integers(1, 13)), k=data.draw(st.integers(1, 5)))
    ids = schema.bucket(VIDEO).sample_ids
    absent = frozenset(data.draw(st.sets(st.sampled_from(ids), max_size=len(ids) - 1)))
    store = LatentStore.create(root, schema)
    _fill(store, absent)
    store.seal()
    _check(root, schema, absent)


_OPEN_AND_READ = """
import sys
from pathlib import Path
from elastic.data.sealed import SealedStore
store = SealedStore.open(sys.argv[1], sys.argv[2])
(bucket,) = store.schema.buckets
for index in range(0, store.count(bucket.name), max(1, store.count(bucket.name) // 50)):
    store.read_batch(bucket.name, [index])
# Not getrusage: its peak begins with that of the process that started this one.
(line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
print(line.split()[1])
"""


def _peak_kb(root: Path, num_samples: int) -> int:
    """Peak memory of a process that opens a store of so many samples and reads fifty of them."""
    plan = BucketPlan(name=VIDEO, shape=(1, 1, 1, 1), sample_ids=range(num_samples))
    schema = replace(_schema(k=1000), buckets=(plan,))
    store = LatentStore.create(root, schema)
    # What writing 10^6 samples one by one would leave, of zeros and without text.
    sizes = {"latent": 2, "text": 0, "pooled": 2 * schema.pooled_width}
    for array, size in sizes.items():
        store.folder.publish(shard_file(VIDEO, array, 0), [np.zeros(size * 1000, np.uint8)])
        for shard in range(1, num_samples // 1000):
            os.link(*(root / shard_file(VIDEO, array, number) for number in (0, shard)))
    crcs = [crc32c(np.zeros(size, np.uint8)) for size in sizes.values()]
    arrays: dict[str, NDArray[np.generic]] = {
        "sample_id": np.arange(num_samples, dtype="<i8"),
        "text_length": np.zeros(num_samples, "<i4"),
        "crc32c": np.tile(np.asarray(crcs, "<u4"), (num_samples, 1)),
    }
    for name, array_N in arrays.items():
        store.folder.publish(per_sample_file(VIDEO, name), plain_bytes(array_N))
    columns = {name: array_digest(a) for name, a in arrays.items()}
    content = {**plan_json(schema), "arrays": {VIDEO: columns}}
    digest = canonical_digest(content)
    store.folder.publish(sealed_file(digest), json_bytes(content))
    seal = group_json({"fingerprint": PRINT, "digest": digest})
    store.folder.publish("zarr.json", json_bytes(seal))
    command = [sys.executable, "-c", _OPEN_AND_READ, str(root), PRINT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_the_memory_of_a_reader_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    few, many = _peak_kb(tmp_path / "few", 1_000), _peak_kb(tmp_path / "many", 1_000_000)
    assert many < few + 16_000, "a tenth of what 10^6 ids and lengths take as Python objects"


def test_a_column_that_is_cut_off_while_it_is_open_is_damage_and_not_numbers(
    tmp_path: Path,
) -> None:
    schema = _schema(videos=64)
    store = LatentStore.create(tmp_path, schema)
    _fill(store)
    store.seal()
    sealed = SealedStore.open(tmp_path, PRINT)
    os.truncate(tmp_path / per_sample_file(VIDEO, "text_length"), 100)
    with pytest.raises(
        DamagedStore, match=r"text_length/c\.0 has been cut off since it was opened"
    ):
        sealed.read_batch(VIDEO, [63])


def test_the_ids_of_a_stored_plan_become_an_array_at_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = _schema(videos=50)
    LatentStore.create(tmp_path, schema)
    stored = LatentStore.open(tmp_path).schema.bucket(VIDEO).sample_ids
    monkeypatch.setattr(type(stored), "__getitem__", lambda *_: pytest.fail("one by one"))
    assert np.asarray(stored, "<i8").tolist() == list(schema.bucket(VIDEO).sample_ids)
