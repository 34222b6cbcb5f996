"""Several sources with weights: the share of each, its epochs, and what is pinned of them."""

import json
import re
import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import CLIP, STAGE, STILL

from elastic.cli import main
from elastic.data.assign import Members, assign, held_out_name, load_members
from elastic.data.clips import Clip, Clips, sample_id
from elastic.data.deal import deal
from elastic.data.decoders import shared_decoders
from elastic.data.mix import BLOCK, deal_sources, quotas, used_before
from elastic.data.order import Layout, batch_at, first_of, layout_of
from elastic.data.permutation import Permutation, WindowedPermutation
from elastic.data.probe import Probe
from elastic.data.probes import Probed
from elastic.data.sources import VideoSource
from elastic.data.table import read_table, read_tables
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.record import check_unchanged, read_plan, start_stage, write_record
from models.fresh import named_seed
from stages import AdamW, Bucket, DiffusionStage, Mix, Phase, Plan, Videos, Windows
from stages.explain import explain

MIX = Mix((Videos("films.parquet"), 0.7), (Videos("stock/"), 0.2), (Videos("own.csv"), 0.1))
MIXED = STAGE.replace(data=MIX)
LAYOUTS = {CLIP: layout_of([11, 40, 3]), STILL: layout_of([5, 1, 19])}

weights = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=6)
shares = weights.map(lambda found: _mix(found).shares)


def _mix(found: list[float]) -> Mix:
    return Mix(*((Videos(f"{number}.csv"), weight) for number, weight in enumerate(found)))


def _one_bucket(batch: int, num_batches: int, data: Mix, **changes: object) -> DiffusionStage:
    bucket = Bucket("32px", frames=5, batch=batch)
    schedule = [Phase(until=batch * num_batches, buckets=(bucket,))]
    return STAGE.replace(schedule=schedule, optimizer=AdamW(lr=1e-3), data=data, **changes)


class Seen(NamedTuple):
    """What was drawn of a bucket, in order: the source, and which of its samples, how often."""

    source: int
    index: int
    epoch: int


def _walk(stage: DiffusionStage, layouts: dict[str, Layout]) -> dict[str, list[Seen]]:
    """All samples of a stage by bucket, one batch after another."""
    seen: dict[str, list[Seen]] = {name: [] for name in layouts}
    position = 0
    while position < stage.budget:
        plan = batch_at(stage, position, layouts)
        layout = layouts[plan.bucket.name]
        firsts = [extent.first for (extent,) in layout]
        # Of several that begin at one place, all but the last are empty.
        sources = np.searchsorted(firsts, plan.indices, side="right") - 1
        for source, index, epoch in zip(sources, plan.indices, plan.epochs, strict=True):
            assert 0 <= index - firsts[source] < layout[source][0].size
            seen[plan.bucket.name].append(Seen(int(source), int(index), int(epoch)))
        position += plan.bucket.batch
    return seen


def _slow(stage: DiffusionStage, bucket: Bucket, layout: Layout, count: int) -> list[Seen]:
    """The first samples of a bucket's stream as one would deal them with lists and fractions."""
    numbers = [number for number, (extent,) in enumerate(layout) if extent.size]
    total = sum(stage.data.shares[number] for number in numbers)
    parts = [stage.data.shares[number] / total for number in numbers]
    turns: list[int] = []
    used = [0] * len(layout)
    for block in range(-(-count // BLOCK)):
        here = []
        for place in range(block * BLOCK, (block + 1) * BLOCK):
            left, rest = place, Fraction(1)
            for number, share in enumerate(parts):
                own = (share / rest).limit_denominator(2**30)
                taken, then = (int(own * n + Fraction(1, 2)) for n in (left, left + 1))
                if then > taken or number == len(parts) - 1:
                    here.append(number)
                    break
                left, rest = left - taken, rest - share
        key = named_seed("mix", stage.seed, stage.name, bucket.name)
        draws = [_splitmix(block * BLOCK + place + key) for place in range(BLOCK)]
        turns += [here[place] for place in sorted(range(BLOCK), key=draws.__getitem__)]
    seen = []
    for turn in turns[:count] if len(numbers) > 1 else [0] * count:
        source = numbers[turn]
        first, size, _ = layout[source][0]
        epoch, within = divmod(used[source], size)
        used[source] += 1
        key_parts = ("order", stage.seed, stage.name, bucket.name, f"source {source}", epoch)
        windows = stage.order
        order = (
            WindowedPermutation(size, windows, *key_parts)
            if windows
            else Permutation(size, *key_parts)
        )
        seen.append(Seen(source, first + int(order(np.array([within]))[0]), epoch))
    return seen


def _splitmix(x: int) -> int:
    mask = 2**64 - 1
    x = ((x & mask) ^ ((x & mask) >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


sizes = st.lists(st.integers(1, 30), min_size=6, max_size=6)
some_empty = st.tuples(sizes, st.sets(st.integers(0, 5), max_size=3)).map(
    lambda drawn: [0 if k in drawn[1] and k else n for k, n in enumerate(drawn[0])]
)


@settings(deadline=None, max_examples=60)
@given(found=weights, sizes=some_empty, batch=st.integers(1, 50), windows=st.booleans())
def test_the_order_is_that_of_a_slow_and_obvious_way(
    found: list[float], sizes: list[int], batch: int, windows: bool
) -> None:
    order = Windows(run=8, mixed=8) if windows else None
    stage = _one_bucket(batch, 5, _mix(found), order=order)
    layout = layout_of(sizes[: len(found)])
    assert _walk(stage, {CLIP: layout})[CLIP] == _slow(
        stage, stage.buckets[0], layout, stage.budget
    )


def test_each_sample_comes_once_an_epoch_of_its_source_through_phases_and_buckets() -> None:
    for name, seen in _walk(MIXED, LAYOUTS).items():
        assert {one.source for one in seen} == {0, 1, 2}
        for number, ((first, size, _),) in enumerate(LAYOUTS[name]):
            own = [one for one in seen if one.source == number]
            assert [one.epoch for one in own] == [turn // size for turn in range(len(own))]
            for start in range(0, len(own) - size + 1, size):
                epoch = sorted(one.index for one in own[start : start + size])
                assert epoch == list(range(first, first + size))


def _off(parts: tuple[Fraction, ...]) -> list[Fraction]:
    """How far a source's count may be off its share at the end of a block: it is rounded."""
    off, rest, found = Fraction(0), Fraction(1), list[Fraction]()
    for share in parts[:-1]:
        own = share / rest
        found.append(own * off + Fraction(1, 2))
        off, rest = (1 - own) * off + Fraction(1, 2), rest - share
    return [*found, off]


@settings(deadline=None, max_examples=60)
@given(parts=shares, first=st.integers(0, 10**12), count=st.integers(1, 2000))
def test_of_any_stretch_each_source_has_its_share_to_within_a_few(
    parts: tuple[Fraction, ...], first: int, count: int
) -> None:
    dealt = deal_sources(parts, first, count, "key")
    for number, share in enumerate(parts):
        own = np.cumsum(dealt.source == number)
        wanted = np.arange(1, count + 1) * float(share)
        # Twice the bound at the ends of blocks, and what one block can put off at either end.
        most = 2 * float(_off(parts)[number]) + 2 * BLOCK * float(share * (1 - share)) + 2
        assert np.abs(own - wanted).max() <= most


@settings(deadline=None, max_examples=30)
@given(parts=shares, blocks=st.integers(0, 10**11))
def test_up_to_the_end_of_a_block_shares_are_rounded_counts(
    parts: tuple[Fraction, ...], blocks: int
) -> None:
    place = blocks * BLOCK
    used = used_before(parts, place, "key")
    assert sum(used) == place
    for number, share in enumerate(parts):
        # A share is taken as a fraction of 2^30 at most.
        assert abs(used[number] - place * share) <= _off(parts)[number] + Fraction(place, 2**29)


@settings(deadline=None)
@given(parts=shares, first=st.integers(0, 10**6), count=st.integers(1, 200))
def test_what_comes_before_a_place_is_what_was_dealt(
    parts: tuple[Fraction, ...], first: int, count: int
) -> None:
    before, after = (used_before(parts, place, "key") for place in (first, first + count))
    dealt = deal_sources(parts, first, count, "key")
    for number in range(len(parts)):
        ranks = dealt.rank[dealt.source == number]
        assert ranks.tolist() == list(range(before[number], after[number]))


def test_places_side_by_side_are_not_always_of_the_same_sources() -> None:
    """Of two sources alike one rank of two would be dealt one source alone, if they took turns."""
    source = deal_sources((Fraction(1, 2), Fraction(1, 2)), 0, 16_000, "key").source
    at_even = int(source[::2].sum())
    assert abs(at_even - 4000) < 5 * 4000**0.5
    other = deal_sources((Fraction(1, 2), Fraction(1, 2)), 0, 16_000, "another").source
    assert 0.4 < (source == other).mean() < 0.6


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_batch_of_a_mix_is_the_same_on_any_number_of_workers(world: int) -> None:
    position = 0
    while position < MIXED.budget:
        plan = batch_at(MIXED, position, LAYOUTS)
        dealt = [deal(plan.bucket.batch, plan.bucket.micro, rank, world) for rank in range(world)]
        turns = zip(*dealt, strict=True)
        seen = [plan.indices[offsets[:real]] for turn in turns for offsets, real in turn]
        assert np.array_equal(np.concatenate(seen), plan.indices)
        again = batch_at(MIXED, position, LAYOUTS)
        assert np.array_equal(again.indices, plan.indices)
        position += plan.bucket.batch


@pytest.mark.parametrize("windows", [None, Windows()])
def test_a_batch_of_a_thousand_million_samples_of_a_mix_costs_no_time_and_no_memory(
    windows: Windows | None,
) -> None:
    stage = _one_bucket(10_080, 400_000, MIX, order=windows)
    layouts = {CLIP: layout_of([700_000_000, 299_999_000, 1000])}
    position = 10_080 * 312_345
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        plan = batch_at(stage, position, layouts)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    try:
        batch_at(stage, position, layouts)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counts = np.histogram(plan.indices, [0, 700_000_000, 999_999_000, 10**9])[0]
    assert np.abs(counts - [7056, 2016, 1008]).max() <= BLOCK
    assert len(np.unique(plan.indices[plan.indices < 999_999_000])) == counts[0] + counts[1]
    assert plan.epochs.max() == 312_345 * 1008 // 1000 + 1
    assert min(seconds) < 0.05  # the best of five: other work on the machine is not its cost
    assert peak_bytes < 40 * 8 * 10_080


@settings(deadline=None)
@given(parts=shares, sizes=sizes, most=st.integers(0, 200))
def test_a_fixed_set_has_shares_as_far_as_there_are_samples(
    parts: tuple[Fraction, ...], sizes: list[int], most: int
) -> None:
    sizes = [0, *sizes][: len(parts)]  # a source may have no held-out clip
    taken = quotas(parts, sizes, most)
    assert sum(taken) == min(most, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(taken, sizes, strict=True))
    if all(count < size for count, size in zip(taken, sizes, strict=True)):
        for number, share in enumerate(parts):
            assert abs(taken[number] - most * share) <= _off(parts)[number]


def test_a_single_source_has_the_first_of_its_held_out_clips() -> None:
    assert first_of((Fraction(1),), layout_of([23]), 7).tolist() == list(range(7))
    assert first_of((Fraction(1),), layout_of([5]), 7).tolist() == list(range(5))
    thirds = (Fraction(2, 3), Fraction(1, 3))
    assert first_of(thirds, layout_of([10, 10]), 6).tolist() == [0, 1, 2, 3, 10, 11]
    assert first_of(thirds, layout_of([10, 1]), 6).tolist() == [0, 1, 2, 3, 4, 10]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mix(), "0 sources: a mix has two or more"),
        (lambda: Mix((Videos("a.csv"), 0.7)), "1 sources: a mix has two or more"),
        (lambda: Mix((Videos("a.csv"), 0.7), (Videos("b.csv"), 0)), "greater than 0"),
        (lambda: Mix((Videos("a.csv"), 0.7), (Videos("b.csv"), -1.0)), "greater than 0"),
        (lambda: Mix((Videos("a.csv"), 0.7), (Videos("b.csv"), float("nan"))), "finite|greater"),
        (lambda: Mix((Videos("a.csv"), 1.0), (Videos("a.csv"), 2.0)), "'a.csv' is there twice"),
        (lambda: Mix((Videos("a.csv"), 1.0), (Videos("b.csv"), 1e-7)), "'b.csv' gets 1e-07 of"),
        (lambda: Mix(Videos("a.csv"), Videos("b.csv")), "is no source with its weight"),  # type: ignore[arg-type]
        (lambda: Mix((Videos("a.csv"), 1.0), ("b.csv", 1.0)), "'b.csv'.* is no source with its"),  # type: ignore[arg-type]
        (lambda: Mix((Videos("a.csv"), 1.0), (Videos("b.csv"), 1.0), wieghts=3), "wieghts"),
        (lambda: STAGE.replace(data="clips.csv"), "'clips.csv' is no source of clips"),
    ],
)  # fmt: skip
def test_a_mix_that_makes_no_sense_is_refused(make: object, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make()  # type: ignore[operator]
    message = explain(caught.value)
    assert re.search(words, message), message
    assert message.count(";") <= 2, "one message, not one for each branch of a union"


@settings(deadline=None, max_examples=30)
@given(found=weights)
def test_a_plan_with_a_mix_reads_back_from_json_as_it_was(found: list[float]) -> None:
    stage = STAGE.replace(data=_mix(found))
    plan = Plan("mixed", [stage])
    again = Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json"))))
    assert again == plan
    assert again.stages[0].data.shares == stage.data.shares
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_shares_are_exactly_what_was_written() -> None:
    assert MIX.shares == (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))
    assert _mix([2, 1]).shares == (Fraction(2, 3), Fraction(1, 3))
    assert Videos("a.csv").shares == (Fraction(1),)


def test_a_mix_that_has_started_may_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "run")
    plan = Plan("mixed", [MIXED])
    write_record(folder, plan)
    start_stage(folder, MIXED)
    check_unchanged(folder, plan)
    assert read_plan(folder) == plan
    parts = [(videos.replace(table=str(tmp_path / videos.table)), part.weight)
             for videos, part in zip(MIX.sources, MIX.parts, strict=True)]  # fmt: skip
    check_unchanged(folder, Plan("mixed", [MIXED.replace(data=Mix(*parts))]))
    other = Mix(*zip(MIX.sources, (0.6, 0.3, 0.1), strict=True))
    with pytest.raises(InputError, match=r"data.parts\[0\].weight: 0.7 -> 0.6"):
        check_unchanged(folder, Plan("mixed", [MIXED.replace(data=other)]))


def _tables(folder: Path) -> Mix:
    """Two tables whose paths are alike."""
    for name, count in (("films", 30), ("stock", 12)):
        rows = "".join(f"{number}.mp4,{name} {number}\n" for number in range(count))
        (folder / name).mkdir()
        (folder / name / "t.csv").write_text(f"path,text\n{rows}")
    return Mix((Videos(f"{folder}/films/t.csv"), 0.5), (Videos(f"{folder}/stock/t.csv"), 0.5))


def test_clips_of_the_same_name_in_two_sources_are_two(tmp_path: Path) -> None:
    mix = _tables(tmp_path)
    films, stock = read_tables(mix)
    alone = [read_table(videos) for videos in mix.sources]
    assert films == alone[0], "the first source is what it is without the mix"
    assert len(set(films.ids().tolist()) | set(stock.ids().tolist())) == 42
    for mixed, own in zip(stock, alone[1], strict=True):
        assert mixed._replace(sample_id=0) == own._replace(sample_id=0), "held out as without"
    assert read_tables(mix, tmp_path / "spilled.arrow") == [films, stock]
    assert stock[3].sample_id == sample_id(f"1\0{sample_id('3.mp4')}"), "wherever the tables lie"
    (tmp_path / "stock" / "t.csv").write_text("path,text\n")
    for spill in (None, tmp_path / "spilled.arrow"):
        with pytest.raises(InputError, match=r"stock/t\.csv' has no rows"):
            read_tables(mix, spill)


def _probed(tables: list[Clips], short: set[str]) -> Probed:
    """Every clip fills every bucket but those that are short, of which one is none at all."""
    clips = Clips.joined(tables)
    known = {}
    for clip in clips:
        frames = 1 if any(name in clip.path for name in short) else 100
        known[clip.sample_id] = Probe(frames, Fraction(24), 64, 64, 0, frames / 24)
    return Probed.of(clips, known)


def test_members_know_how_many_of_them_are_of_which_source(tmp_path: Path) -> None:
    tables = read_tables(_tables(tmp_path))
    stage = STAGE.replace(data=_tables_of(tables, tmp_path))
    probed = _probed(tables, {"films/1.mp4", "films/2.mp4", "stock/4.mp4"})
    assigned = assign(stage, probed, [len(table) for table in tables])
    members = assigned.save(tmp_path / "clips.arrow")
    for again in (members, load_members(tmp_path / "clips.arrow")):
        for name, clips in again.clips.items():
            each = [sum(source in clip.path for clip in clips) for source in ("films", "stock")]
            assert again.sizes(name) == each
            assert sum(each) == len(clips)
    assert len(members.clips[STILL]) > len(members.clips[CLIP])
    source = VideoSource(stage, members, held_out=False, decoders=shared_decoders(1))
    assert source.layouts()[CLIP] == layout_of(members.sizes(CLIP))
    lines = list(assigned.lines(stage, probed))
    assert f"films/t.csv, {members.sizes(CLIP)[1]} of" in lines[0]


def _tables_of(tables: list[Clips], folder: Path) -> Mix:
    return Mix((Videos(f"{folder}/films/t.csv"), 0.5), (Videos(f"{folder}/stock/t.csv"), 0.5))


def test_the_share_of_a_source_without_a_clip_in_a_bucket_goes_to_the_others(
    tmp_path: Path,
) -> None:
    """Pictures have a share of the bucket of stills, and none of that of clips."""
    mix = _tables(tmp_path)
    tables = read_tables(mix)
    stage = STAGE.replace(data=mix)
    probed = _probed(tables, {"stock/"})
    assigned = assign(stage, probed, [len(table) for table in tables])
    members = assigned.save(tmp_path / "clips.arrow")
    assert members.sizes(CLIP)[1] == 0
    assert members.sizes(STILL)[1] > 0
    lines = {line.split(":")[0]: line for line in assigned.lines(stage, probed)}
    assert "0 of" in lines[CLIP]
    assert "t.csv, whose share the others have)" in lines[CLIP]
    assert "whose share" not in lines[STILL]
    decoders = shared_decoders(1)  # nothing is decoded
    layouts = VideoSource(stage, members, held_out=False, decoders=decoders).layouts()
    seen = _walk(stage, layouts)
    assert {one.source for one in seen[CLIP]} == {0}
    counts = Counter(one.source for one in seen[STILL])
    assert abs(counts[0] - counts[1]) <= BLOCK


def test_a_source_without_a_clip_in_any_bucket_is_named(tmp_path: Path) -> None:
    mix = _tables(tmp_path)
    tables = read_tables(mix)
    stage = STAGE.replace(data=mix, schedule=[STAGE.schedule[1].replace(until=308)])
    with pytest.raises(InputError, match=r"stock/t\.csv' has no train clip for any bucket"):
        assign(stage, _probed(tables, {"stock/"}), [len(table) for table in tables])


def test_members_of_one_source_are_pinned_as_before(tmp_path: Path) -> None:
    clips = [Clip(number, "v", "", held_out=number < 2) for number in range(9)]
    probed = _probed([Clips.of(clips)], set())
    members = assign(STAGE, probed).save(tmp_path / "clips.arrow")
    assert members.sources == {}
    assert members.sizes(CLIP) == [7]
    assert Members({CLIP: clips}).sizes(CLIP) == [9]


def test_a_selection_is_taken_from_each_source(tmp_path: Path) -> None:
    tables = read_tables(_tables(tmp_path))
    stage = STAGE.replace(data=_tables_of(tables, tmp_path))
    members = assign(stage, _probed(tables, set()), [len(t) for t in tables]).save(tmp_path / "c")
    some = members.some(CLIP, stage.data.shares, 8)
    assert Counter("films" in clip.path for clip in some) == {True: 4, False: 4}
    held_out = members.some(held_out_name(STAGE.buckets[0]), stage.data.shares, 100)
    assert len(held_out) == len(members.clips[held_out_name(STAGE.buckets[0])])


def test_plan_prints_the_sources_with_their_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(__file__).with_name("tiny_plan.py").read_text()
    old = 'Videos(os.environ.get("TINY_VIDEOS", "captions.csv"))'
    new = "Mix((Videos('films.csv'), 3), (Videos('stock/'), 1))"
    assert old in text
    path = tmp_path / "mixed.py"
    path.write_text(text.replace(old, new).replace("    Fresh,\n", "    Fresh,\n    Mix,\n"))
    assert main(["plan", str(path), "--storage", str(tmp_path / "runs")]) == 0
    assert "data        0.75 films.csv, 0.25 stock/\n" in capsys.readouterr().out
