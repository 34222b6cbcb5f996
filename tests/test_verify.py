"""Verifying a latent store names every damage and nothing else; repair redoes only that."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import PRINT, _fill, _schema, _write

from elastic.cli import main
from elastic.data.store import LatentStore, SealedStore
from elastic.data.verify import FIELDS, verify
from elastic.errors import InputError
from models.text import WordHash

ABSENT = frozenset({102})
STANDS_FOR = {"codec": "test", "rate": 8}  # the fields of PRINT


def sealed(root: Path) -> tuple[LatentStore, str]:
    """A finished store with one clip that could not be encoded, and its digest."""
    store = LatentStore.create(root, _schema())
    (root / FIELDS).write_text(json.dumps(STANDS_FOR, indent=1))
    _fill(store, ABSENT)
    store.publish_null_text(WordHash(width=6).null())
    return store, store.seal()


def contents(root: Path) -> dict[str, bytes]:
    """Every file but the commit logs, which have the name of their writer."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_whole_store_has_no_fault(tmp_path: Path) -> None:
    store, _ = sealed(tmp_path)
    seen: list[tuple[int, int]] = []
    verdict = verify(tmp_path, lambda done, total: seen.append((done, total)))
    assert verdict.is_whole, verdict.faults
    assert verdict.num_shards == len(store.shard_ids()) == 4
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_named_and_repaired_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("store")
    store, digest = sealed(root)
    before = contents(root)
    name = data.draw(st.sampled_from(sorted(n for n in before if not n.startswith("plan"))))
    damage(root / name, data)
    verdict = verify(root)
    if name == "zarr.json" and not (root / name).exists():
        assert not verdict.is_sealed, "a store without a seal is not finished"
        assert verdict.faults == []
    elif name == FIELDS and not (root / name).exists():
        assert verdict.is_whole, "nothing is read from it"
    else:
        assert {str(fault.path.relative_to(root)) for fault in verdict.faults} == {name}
        assert not verdict.is_whole
    # What repair does: damaged shards are made again, and all is sealed and described anew.
    assert len(verdict.shards) <= 1
    for shard in verdict.shards:
        _write(store, shard, ABSENT)
    if verdict.lost_null_text:
        store.publish_null_text(WordHash(width=6).null())
    (root / FIELDS).write_text(json.dumps(STANDS_FOR, indent=1))
    assert store.seal() == digest
    assert contents(root) == before
    assert verify(root).is_whole


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_plan_is_said_and_nothing_is_judged_by_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("store")
    sealed(root)
    name = data.draw(st.sampled_from(["plan.json", "plan-32px-5f.i64", "plan-64px-1f.i64"]))
    damage(root / name, data)
    with pytest.raises(InputError, match=r"is damaged|plan\.json is missing"):
        verify(root)


def damage(path: Path, data: st.DataObject) -> None:
    """Flip a bit of a file, cut it off somewhere, or remove it."""
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "gone"]))
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:at])
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)


def test_every_damage_is_named_with_its_sample(tmp_path: Path) -> None:
    sealed(tmp_path)
    latent = tmp_path / "32px-5f" / "latent" / "c.1.0.0.0.0"
    damaged = bytearray(latent.read_bytes())
    sample_bytes = 2 * 4 * 2 * 3 * 5
    damaged[0] ^= 1
    damaged[2 * sample_bytes] ^= 1
    damaged[-1] ^= 1
    latent.write_bytes(damaged)
    text = tmp_path / "64px-1f" / "text" / "c.0.0.0"
    text.unlink()
    said = [f"{fault.path.name}: {fault.what}" for fault in verify(tmp_path).faults]
    assert [line.partition(" has CRC")[0] for line in said] == [
        "c.1.0.0.0.0: latent of sample 104",
        "c.1.0.0.0.0: latent of sample 106",
        "c.1.0.0.0.0: the index of its latent is damaged",
        "c.0.0.0: is gone",
    ]


def test_a_store_that_is_not_finished_is_not_whole_and_not_damaged(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path, _schema())
    _write(store, ("32px-5f", 0))
    verdict = verify(tmp_path)
    assert not verdict.is_whole
    assert not verdict.is_sealed
    assert verdict.faults == []
    assert verdict.missing == [("32px-5f", 1), ("32px-5f", 2), ("64px-1f", 0)]


def test_lost_commit_lines_of_a_sealed_store_are_damage(tmp_path: Path) -> None:
    _, digest = sealed(tmp_path)
    for log in tmp_path.glob("manifest-*.jsonl"):
        log.unlink()
    verdict = verify(tmp_path)
    assert len(verdict.shards) == verdict.num_shards
    assert "has no line for shard 0 of '32px-5f' any more" in verdict.faults[0].what
    SealedStore.open(tmp_path, PRINT, digest)  # which is still read


def test_where_there_is_no_store_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no latent store: plan\.json is missing"):
        verify(tmp_path)


def test_the_verb_names_damage_in_every_store_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (tmp_path / "latents" / name for name in ("aa", "bb"))
    sealed(good)
    sealed(bad)
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(": 4 shards, sealed: whole\n") == 2
    (bad / "64px-1f" / "pooled" / "c.0.0").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{good}: 4 shards, sealed: whole\n" in said
    assert f"{bad}: 4 shards, sealed, 1 damaged\n  64px-1f/pooled/c.0.0 is gone\n" in said
    assert "python -m elastic repair FILE" in said
    assert main(["verify", str(bad), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["whole"] is False
    assert found["faults"] == [{"path": f"{bad}/64px-1f/pooled/c.0.0", "what": "is gone"}]


def test_the_verb_refuses_a_folder_without_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is neither a latent store (plan.json) nor a run folder" in capsys.readouterr().err
