"""Memory: a rank holds its part of the parameters, and little more while they come and go."""

from pathlib import Path

import pytest
from bench.materialise import (
    BLOCKS_ALLOWED,
    SHARDS_ALLOWED,
    largest_block_bytes,
    materialise,
    status_bytes,
    write_file,
)
from worlds import run_world

from elastic.shard import initialise, shard
from elastic.state import Progress
from elastic.weights import export
from elastic.world import World
from models.dit import DiT

# 31 million parameters in small blocks: the part of one of two ranks is 62 MB, a block 9 MB.
SHAPE = DiT(depth=0, depth_single=14, width=384, heads=4)


def allowed(shard_bytes: float) -> float:
    return SHARDS_ALLOWED * shard_bytes + BLOCKS_ALLOWED * largest_block_bytes(SHAPE)


@pytest.mark.parametrize("from_file", [False, True])
def test_a_rank_that_gets_its_values_holds_little_more_than_its_part(
    from_file: bool, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    write_file(SHAPE, file)
    for rank in run_world(materialise, 2, SHAPE, str(file) if from_file else None, is_fresh=True):
        assert rank["peak"] <= allowed(rank["shard"])
        assert rank["peak"] >= rank["shard"], "the measure misses what is certainly there"


def test_the_measure_sees_a_rank_that_holds_everything() -> None:
    """The control: alone, a rank holds twice the part of one of two."""
    (alone,) = run_world(materialise, 1, SHAPE, None, is_fresh=True)
    assert alone["peak"] > allowed(alone["shard"] / 2)


def _export_growth(world: World, folder: str) -> int:
    model = shard(SHAPE.build(device="meta"), world)
    initialise(model, 0, "written")
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    export(model, Path(folder), Progress(stage="written"), world)
    return status_bytes("VmHWM") - before


def test_finished_weights_are_never_whole_on_one_rank(tmp_path: Path) -> None:
    growths = run_world(_export_growth, 2, str(tmp_path), is_fresh=True)
    whole = sum(p.nbytes for p in SHAPE.build(device="meta").parameters())
    assert max(growths) < whole / 3
