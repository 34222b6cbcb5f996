"""Verifying a latent store names every damage and nothing else; repair redoes only that."""

import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import s3_server  # noqa: F401  # a fixture
from store_places import Place, a_bucket, a_place  # noqa: F401  # fixtures
from test_store import PRINT, _fill, _schema, _write

from elastic.cli import main
from elastic.data.store import LatentStore, SealedStore
from elastic.data.verify import FIELDS, verify
from elastic.errors import InputError
from models.text import WordHash

ABSENT = frozenset({102})
STANDS_FOR = {"codec": "test", "rate": 8}  # the fields of PRINT


def sealed(place: Place, packed: bool = False) -> tuple[LatentStore, str]:
    """A finished store with one clip that could not be encoded, and its digest."""
    store = LatentStore.create(place.root, _schema(packed=packed))
    describe(place)
    _fill(store, ABSENT)
    store.publish_null_text(WordHash(width=6).null())
    return store, store.seal()


def describe(place: Place) -> None:
    """Publish what the fingerprint stands for."""
    place.write(FIELDS, json.dumps(STANDS_FOR, indent=1).encode())


def contents(place: Place) -> dict[str, bytes]:
    """Every file but the commit logs, which have the name of their writer."""
    return {name: place.read(name) for name in place.names() if not name.endswith(".jsonl")}


def test_a_whole_store_has_no_fault(place: Place) -> None:
    store, _ = sealed(place)
    seen: list[tuple[int, int]] = []
    verdict = verify(place.root, lambda done, total: seen.append((done, total)))
    assert verdict.is_whole, verdict.faults
    assert verdict.num_shards == len(store.shard_ids()) == 4
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_named_and_repaired_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    _damage_and_repair(Place(str(tmp_path_factory.mktemp("store"))), data)


# A folder takes the same path with more examples; each takes seconds here.
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_in_a_bucket_as_well(bucket: Place, data: st.DataObject) -> None:
    _damage_and_repair(bucket.below(uuid.uuid4().hex), data)


def _damage_and_repair(place: Place, data: st.DataObject) -> None:
    store, digest = sealed(place, packed=data.draw(st.booleans()))
    before = contents(place)
    name = data.draw(st.sampled_from(sorted(n for n in before if not n.startswith("plan"))))
    damage(place, name, data)
    is_gone = name not in place.names()
    verdict = verify(place.root)
    if name == "zarr.json" and is_gone:
        assert not verdict.is_sealed, "a store without a seal is not finished"
        assert verdict.faults == []
    elif name == FIELDS and is_gone:
        assert verdict.is_whole, "nothing is read from it"
    else:
        assert {fault.name for fault in verdict.faults} == {name}
        assert not verdict.is_whole
    # What repair does: damaged shards are made again, and all is sealed and described anew.
    assert len(verdict.shards) <= 1
    for shard in verdict.shards:
        _write(store, shard, ABSENT)
    if verdict.lost_null_text:
        store.publish_null_text(WordHash(width=6).null())
    describe(place)
    assert store.seal() == digest
    assert contents(place) == before
    assert verify(place.root).is_whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_plan_is_said_and_nothing_is_judged_by_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    _damage_the_plan(Place(str(tmp_path_factory.mktemp("store"))), data)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_of_a_plan_in_a_bucket_as_well(bucket: Place, data: st.DataObject) -> None:
    _damage_the_plan(bucket.below(uuid.uuid4().hex), data)


def _damage_the_plan(place: Place, data: st.DataObject) -> None:
    sealed(place)
    name = data.draw(st.sampled_from(["plan.json", "plan-32px-5f.i64", "plan-64px-1f.i64"]))
    damage(place, name, data)
    with pytest.raises(InputError, match=r"is damaged|plan\.json is missing"):
        verify(place.root)


def damage(place: Place, name: str, data: st.DataObject) -> None:
    """Flip a bit of a file, cut it off somewhere, or remove it."""
    content = place.read(name)
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "gone"]))
    if kind == "gone":
        place.remove(name)
    elif kind == "cut":
        place.write(name, content[:at])
    else:
        place.flip(name, at, 1 << data.draw(st.integers(0, 7)))


def test_every_damage_is_named_with_its_sample(place: Place) -> None:
    sealed(place)
    sample_bytes = 2 * 4 * 2 * 3 * 5
    for at in (0, 2 * sample_bytes, -1):
        place.flip("32px-5f/latent/c.1.0.0.0.0", at, 1)
    place.remove("64px-1f/text/c.0.0.0")
    said = [f"{fault.name.rpartition('/')[2]}: {fault.what}" for fault in verify(place.root).faults]
    assert [line.partition(" has CRC")[0] for line in said] == [
        "c.1.0.0.0.0: latent of sample 104",
        "c.1.0.0.0.0: latent of sample 106",
        "c.1.0.0.0.0: the index of its latent is damaged",
        "c.0.0.0: is gone",
    ]


def test_a_store_that_is_not_finished_is_not_whole_and_not_damaged(place: Place) -> None:
    store = LatentStore.create(place.root, _schema())
    _write(store, ("32px-5f", 0))
    verdict = verify(place.root)
    assert not verdict.is_whole
    assert not verdict.is_sealed
    assert verdict.faults == []
    assert verdict.missing == [("32px-5f", 1), ("32px-5f", 2), ("64px-1f", 0)]


def test_lost_commit_lines_of_a_sealed_store_are_damage(place: Place) -> None:
    _, digest = sealed(place)
    for log in place.logs():
        place.remove(log)
    verdict = verify(place.root)
    assert len(verdict.shards) == verdict.num_shards
    assert "has no line for shard 0 of '32px-5f' any more" in verdict.faults[0].what
    SealedStore.open(place.root, PRINT, digest)  # which is still read


def test_where_there_is_no_store_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no latent store: plan\.json is missing"):
        verify(tmp_path)


def test_the_verb_names_damage_in_every_store_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (tmp_path / "latents" / name for name in ("aa", "bb"))
    sealed(Place(str(good)))
    sealed(Place(str(bad)))
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(": 4 shards, sealed: whole\n") == 2
    (bad / "64px-1f" / "pooled" / "c.0.0").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{good}: 4 shards, sealed: whole\n" in said
    assert f"{bad}: 4 shards, sealed, 1 damaged\n  64px-1f/pooled/c.0.0 is gone\n" in said
    assert "python -m elastic repair FILE" in said
    assert main(["verify", str(bad), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    (found,) = shown["stores"]
    assert shown["whole"] is found["whole"] is False
    assert found["faults"] == [{"path": f"{bad}/64px-1f/pooled/c.0.0", "what": "is gone"}]


def test_the_verb_refuses_a_folder_without_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is neither a latent store (plan.json) nor a run folder" in capsys.readouterr().err
