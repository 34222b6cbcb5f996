"""Memory of the parts of the latent path, with a thousand rows in the table and with a million.

Each part is a process of its own, as in a run: the driver that reads the table and probes each file
(`probe`), or takes the probes from their cache, assigns and pins (`pin`); the driver that plans the
store; a worker that encodes the last shard; a rank that trains on videos and looks at a few clips.
A million files are not made: what the disk and the decoders would say of them is there at once, and
who decodes is given the one film that there is. Pages of mapped files are not counted, which can be
had back at any time. A reader of latents is measured in test_store.py.
"""

import argparse
import csv
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from figure import record
from safetensors.torch import save_file

from elastic.data import probes
from elastic.data.assign import assign, load_members
from elastic.data.decode import decode_clip
from elastic.data.decoders import Decoders, shared_decoders
from elastic.data.encode import encode_shards, open_store, plan_job
from elastic.data.latents import Scale
from elastic.data.moving_shapes import write_demo_videos
from elastic.data.places import Stamp
from elastic.data.probe import probe
from elastic.data.probes import probe_all
from elastic.data.sources import VideoSource
from elastic.data.store import LatentStore
from elastic.data.table import read_table
from models.fresh import fresh_parameters, named_generator

HOME = Path(__file__).resolve().parents[2]
FEW, MANY = 1_000, 1_000_000
WORKER_MB, DRIVER_BYTES = 32.0, 500.0  # more with MANY than with FEW; a row
PARTS = ("probe", "pin", "plan", "encode", "train")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a thousand and ten thousand rows")
    parser.add_argument("--part", choices=PARTS, help="of one process: what it does")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(watched(options.part, options.folder)))
        return
    many = 10_000 if options.quick else MANY
    found: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as temporary:
        videos = write_demo_videos(Path(temporary) / "videos", clips=4)
        film = sorted(videos.folder.glob("*.mp4"))[0]
        for rows in (FEW, many):
            folder = Path(temporary) / str(rows)
            folder.mkdir()
            prepare(folder, film, rows)
            for part in PARTS:
                command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
                environment = {**os.environ, **variables(folder)}
                done = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                found[part][str(rows)] = json.loads(done.stdout.splitlines()[-1])
    more = {part: round(mb[str(many)]["mb"] - mb[str(FEW)]["mb"], 1) for part, mb in found.items()}
    a_row = {part: round(1e6 * more[part] / (many - FEW), 1) for part in PARTS[:3]}
    record(
        "rows",
        figures={"rows": [FEW, many], "peak": found, "more_mb": more, "bytes_a_row": a_row},
        goal=(
            f"workers take at most {WORKER_MB:.0f} MB more with {MANY:,} rows than with {FEW:,}, "
            f"the driver at most {DRIVER_BYTES:.0f} bytes a row"
        ),
        holds=max(more["encode"], more["train"]) <= WORKER_MB
        and max(a_row.values()) <= DRIVER_BYTES,
        keep=not options.quick,
    )


def variables(folder: Path) -> dict[str, str]:
    """What tests/encode_plan.py reads."""
    return {
        "ENCODE_VIDEOS": str(folder / "captions.csv"),
        "ENCODE_WEIGHTS": str(folder / "codec.safetensors"),
        "PYTHONPATH": f"{HOME}:{HOME / 'tests'}",
    }


def prepare(folder: Path, film: Path, rows: int) -> None:
    """A table of films that are not there, one that is, and weights of the codec."""
    from encode_plan import CODEC

    (folder / "v.mp4").write_bytes(film.read_bytes())
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text"))
        writer.writerows(
            (f"films/{row}.mp4", f"clip {row}: a red circle moves to the left over a blue floor")
            for row in range(rows)
        )
    drawn = fresh_parameters(CODEC.build(device="meta"), lambda name: named_generator(0, name))
    save_file(dict(drawn), folder / "codec.safetensors")


def watched(part: str, folder: Path) -> dict[str, float]:
    """Do one part; its peak memory in MB, and its seconds."""
    began, over, seen = time.monotonic(), threading.Event(), [own_mb()]

    def look() -> None:
        while not over.wait(0.02):
            seen.append(own_mb())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        run(part, folder)
    finally:
        over.set()
        looking.join()
    return {"mb": round(max(seen), 1), "s": round(time.monotonic() - began, 1)}


def _answer_at_once(film: Path) -> None:
    """Have every file look like the one that there is."""
    from encode_plan import BUCKET

    known = probe(str(film))
    x_CTHW = decode_clip(str(film), BUCKET.frames, 8.0, BUCKET.height, BUCKET.width)
    answers: dict[tuple[object, str], Callable[..., Any]] = {
        (probes, "stamp"): lambda path: Stamp(9, 9),
        (Decoders, "probe"): lambda self, paths: (known for _ in paths),
        (Decoders, "decode"): lambda self, wanted, ahead: (x_CTHW for _ in wanted),
        (Decoders, "answers"): lambda self, wanted, *more: (x_CTHW.numpy() for _ in wanted),
    }
    for (place, name), function in answers.items():
        setattr(place, name, function)


def run(part: str, folder: Path) -> None:
    """Do one part, as the course does it."""
    from encode_plan import BUCKET, CODEC, stage

    _answer_at_once(folder / "v.mp4")
    if part in ("probe", "pin"):
        clips = read_table(stage.data, folder / ".table.arrow")
        probed = probe_all(clips, folder / "probes.parquet", workers=1)
        if part == "pin":
            assign(stage, probed).save(folder / "clips.arrow")
    elif part == "plan":
        members = load_members(folder / "clips.arrow")
        scale = Scale((0.0,) * CODEC.channels, (1.0,) * CODEC.channels)
        job = plan_job(stage, folder / "codec.safetensors", scale, members, str(folder / "latents"))
        open_store(job)
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
    elif part == "encode":
        job = pickle.loads((folder / "job.pickle").read_bytes())
        shards = LatentStore.open(job.root).shard_ids()
        encode_shards(job, [max(shard for shard in shards if shard[0] == BUCKET.name)])
    else:
        members, decoders = load_members(folder / "clips.arrow"), shared_decoders(1)
        source = VideoSource(stage, members, held_out=False, decoders=decoders)
        count = source.counts()[BUCKET.name]
        rows = [np.array([first]) for first in range(0, count, max(1, count // 20))]
        for row, _ in zip(rows, source.fetch_all((BUCKET, row) for row in rows), strict=True):
            source.sample_ids(BUCKET, row)


def own_mb() -> float:
    """Memory that is this process's own: pages of mapped files can be had back at any time."""
    status = Path("/proc/self/status").read_text()
    (kb,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
    return int(kb) / 1000


if __name__ == "__main__":
    main()
