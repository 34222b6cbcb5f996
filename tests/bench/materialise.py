"""Peak memory of a rank while a DiT of a thousand million parameters gets its values.

On worlds of 1, 2 and 4 gloo ranks: built on meta, sharded, then started from fresh parameters, or
filled from a bf16 file whose rotary rows have to be reordered. Counted is the growth of the
resident memory over what imports and the process group had taken.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

# What lies beside this script is measured, whatever is installed; worlds.py is in tests/.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import worlds
from figure import record

from elastic.ema import local
from elastic.shard import initialise, shard
from elastic.tensor_file import TensorWriter
from elastic.weight_source import fill, open_weights
from elastic.world import World
from models.dit import DiT

FULL = DiT(depth=6, depth_single=14, width=1536, heads=12)
QUICK = DiT(depth=2, depth_single=4, width=768, heads=6)
WORLDS = (1, 2, 4)
SHARDS_ALLOWED, BLOCKS_ALLOWED = 1.3, 1


def status_bytes(field: str) -> int:
    """A line of /proc/self/status: VmRSS is what is resident, VmHWM the most since the reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def materialise(world: World, shape: DiT, file: str | None) -> dict[str, float]:
    """What one rank took at most, and how long."""
    # Modules that the first sharding imports, and the threads of the backend, are no parameters.
    warm_up = shard(DiT(depth=1, depth_single=0, width=6, heads=1).build(device="meta"), world)
    initialise(warm_up, 0, "warm-up")
    Path("/proc/self/clear_refs").write_text("5")
    before, began = status_bytes("VmRSS"), time.monotonic()
    model = shard(shape.build(device="meta"), world)
    if file is None:
        initialise(model, 0, "bench")
    else:
        source = open_weights(Path(file), shape, rotary="half-split")
        for name, parameter in model.named_parameters():
            fill(parameter, source, name)
    seconds = time.monotonic() - began
    held = sum(local(p.detach()).nbytes for p in model.parameters())
    return {
        "peak": status_bytes("VmHWM") - before,
        "end": status_bytes("VmRSS") - before,
        "shard": held,
        "seconds": seconds,
    }


def write_file(shape: DiT, path: Path) -> None:
    """Random bf16 weights under our names, one tensor at a time."""
    shapes = {name: tuple(p.shape) for name, p in shape.build(device="meta").named_parameters()}
    writer = TensorWriter(path, shapes, torch.bfloat16, {})
    writer.open()
    for name in writer.names:
        writer.append(torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-1, 1))
    writer.publish()


def largest_block_bytes(shape: DiT) -> int:
    """The fp32 bytes of the largest block."""
    model = shape.build(device="meta")
    blocks = (*model.double_blocks, *model.single_blocks)
    return max(sum(p.nbytes for p in block.parameters()) for block in blocks)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(shape: DiT, size: int, file: str | None, repeats: int) -> dict[str, object]:
    """Peaks of all ranks of a few runs, against the goal."""
    runs = [
        r
        for _ in range(repeats)
        for r in worlds.run_world(materialise, size, shape, file, is_fresh=True)
    ]
    block = largest_block_bytes(shape)
    over = [r["peak"] - SHARDS_ALLOWED * r["shard"] - BLOCKS_ALLOWED * block for r in runs]
    return {
        "world": size,
        "values": "fresh" if file is None else "file",
        "shard_mb": round(max(r["shard"] for r in runs) / 1e6, 1),
        "block_mb": round(block / 1e6, 1),
        "peak_mb": {k: round(v / 1e6, 1) for k, v in spread([r["peak"] for r in runs]).items()},
        "over_shard_mb": {
            k: round(v / 1e6, 1) for k, v in spread([r["peak"] - r["shard"] for r in runs]).items()
        },
        "seconds": {k: round(v, 2) for k, v in spread([r["seconds"] for r in runs]).items()},
        "holds": max(over) <= 0,
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a hundred million parameters, once")
    quick = parser.parse_args().quick
    shape, repeats = (QUICK, 1) if quick else (FULL, 3)
    worlds.DEADLINE_S = 900.0
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        write_file(shape, file)
        for size in WORLDS:
            for source in (None, str(file)):
                figures.append(measure(shape, size, source, repeats))
                print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
    parameters = sum(p.numel() for p in shape.build(device="meta").parameters())
    record(
        "materialise",
        figures={"parameters": parameters, "measured": figures},
        goal=f"peak of every rank at most {SHARDS_ALLOWED} x its shard + one block",
        holds=all(figure["holds"] for figure in figures),
        keep=not quick,
    )


if __name__ == "__main__":
    main()
