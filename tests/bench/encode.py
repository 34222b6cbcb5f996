"""Videos to latents: how much of its slower half the whole has, and the store after twenty kills.

Speed: one worker as a Ray task is one, a core for the codec and a process that decodes. Clips a
second of decoding alone (a process that does nothing else), of the codec alone (the pictures are
there), and of the whole, which also embeds text, writes, flushes and commits; in turns. Beside them
seconds of the processor, which other work on the machine does not change: of the encoding process
`busy` is the share of time in which it computes, `codec_of_cpu` what the codec alone takes of that.

Compiled: frames a second of a Video DC-AE's encoder compiled and eager, in turns; on a GPU that of
the published size.

Kills: `python -m elastic encode` on a cluster of its own, whose processes are killed at random by
SIGKILL: one that encodes, one that decodes for it, the raylet, or the driver, which is then given
the same command again. The store is compared, file by file, with that of a run that nobody
disturbed; logs of commits carry the name of their writer and are left out.
"""

import argparse
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import save_file

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figure import record

from elastic.data.assign import assign
from elastic.data.decoders import Wanted, shared_decoders
from elastic.data.encode import EncodeJob, encode_shards, measure_scale, open_store, plan_job
from elastic.data.latents import Encoder, Scale, chunk_size, load_codec
from elastic.data.moving_shapes import write_demo_videos
from elastic.data.probes import probe_all
from elastic.data.schema import shard_file
from elastic.data.table import read_table
from models import DCAE
from models.fresh import fresh_parameters, named_generator

HOME = Path(__file__).resolve().parents[2]
OF_SLOWER, KILLS = 0.85, 20
CLIPS, ROUNDS = 256, 5
MID = DCAE(
    channels=32,
    widths=(16, 32, 64, 64, 128, 128),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(1, 1, 1, 1, 1, 1),
)
# Those that cost most are killed less often, as they are in life.
WEIGHTS = {"a worker": 4, "a decoder": 6, "the raylet": 2, "the driver": 2}
_LATEST_S = 600.0


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 clips, 2 rounds, 3 kills")
    options = parser.parse_args()
    clips, rounds, kills = (64, 2, 3) if options.quick else (CLIPS, ROUNDS, KILLS)
    with tempfile.TemporaryDirectory(prefix="restage-bench-") as temporary:
        folder = Path(temporary)
        os.environ["ENCODE_VIDEOS"] = str(write_demo_videos(folder / "videos", clips=clips).table)
        os.environ["ENCODE_WEIGHTS"] = str(folder / "codec.safetensors")
        write_weights(folder / "codec.safetensors")
        figures = speeds(folder, rounds)
        figures |= {"encoder": compiled(rounds)}
        figures |= killed(folder, kills)
    record(
        "encode",
        figures=figures,
        goal=(
            f"the whole at least {OF_SLOWER} of the slower of its parts; after {KILLS} random "
            "kills the store is the same, byte for byte"
        ),
        holds=figures["of_slower_part"]["median"] >= OF_SLOWER
        and figures["kills"]["differing"] == []
        and figures["kills"]["num"] >= KILLS
        and len(figures["kills"]["of"]) == len(WEIGHTS),
        keep=not options.quick,
    )


def write_weights(path: Path) -> None:
    """Random weights of the codec, as if they were published."""
    from encode_plan import CODEC

    drawn = fresh_parameters(CODEC.build(device="meta"), lambda name: named_generator(0, name))
    save_file(dict(drawn), path)


def speeds(folder: Path, rounds: int) -> dict[str, Any]:
    """Clips a second of each part and of the whole, one after the other in every round."""
    from encode_plan import BUCKET

    torch.set_num_threads(1)
    ways = _ways(_job(folder), folder)
    for way in ways.values():
        way()  # imports, caches, a process that decodes
    found: dict[str, list[Spent]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(spent(way))
    decode, codec, whole = (found[name] for name in ("decode_alone", "codec_alone", "whole"))
    shares = [
        w.clips_per_s / min(d.clips_per_s, c.clips_per_s)
        for d, c, w in zip(decode, codec, whole, strict=True)
    ]
    return {
        "clips_per_s": {n: _spread([one.clips_per_s for one in f]) for n, f in found.items()},
        "frames_per_s": _spread([one.clips_per_s * BUCKET.frames for one in whole]),
        "of_slower_part": _spread(shares),
        "cpu_ms_a_clip": {
            name: {
                "own": _spread([one.own_ms for one in f]),
                "decoders": _spread([one.decoders_ms for one in f]),
            }
            for name, f in found.items()
        },
        "busy": _spread([w.own_ms * w.clips_per_s / 1000 for w in whole]),
        "codec_of_cpu": _spread([c.own_ms / w.own_ms for c, w in zip(codec, whole, strict=True)]),
    }


class Spent(NamedTuple):
    """What one way took: by the clock, and of the processor for each clip."""

    clips_per_s: float
    own_ms: float
    decoders_ms: float


def spent(way: Callable[[], int]) -> Spent:
    """Do it and see."""
    before, began = _cpu_s(), time.perf_counter()
    num = way()
    seconds, after = time.perf_counter() - began, _cpu_s()
    own, decoders = (1000 * (b - a) / num for a, b in zip(before, after, strict=True))
    return Spent(num / seconds, own, decoders)


def _cpu_s() -> tuple[float, float]:
    """Of this process, and of those that it and its fork server have started."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time(), sum(one.user + one.system for one in times)


def compiled(rounds: int) -> dict[str, Any]:
    """Frames a second of an encoder compiled and eager, and how far apart their latents are."""
    is_gpu = torch.cuda.is_available()
    now = time.perf_counter if is_gpu else time.process_time
    encoder = _drawn_encoder(DCAE() if is_gpu else MID, "cuda" if is_gpu else "cpu")
    shape = (3, 32, 256, 256) if is_gpu else (3, 16, 128, 128)
    clips = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(8)]

    def encode(is_compiled: bool) -> torch.Tensor:
        pending = encoder.begin(clips, ends=False, compiled=is_compiled)
        return torch.stack([one.latent_CTHW for one in pending.wait()]).float()

    began = time.perf_counter()
    first = encode(True)
    first_s = time.perf_counter() - began
    eager = encode(False)
    found: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(rounds):
        for name, values in found.items():
            began = now()
            again = encode(name == "compiled")
            values.append(len(clips) * shape[1] / (now() - began))
    return {
        "encoder_parameters": sum(value.numel() for value in encoder.module.encoder.parameters()),
        "frames_per_s": {name: _spread(values) for name, values in found.items()},
        "times": _spread([b / a for a, b in zip(*found.values(), strict=True)]),
        "first_s": round(first_s, 1),
        "share_of_values_that_differ": float((first != eager).float().mean()),
        "most_relative": float((first - eager).abs().max() / eager.abs().max()),
        "same_bits_again": torch.equal(first, again),
    }


def _drawn_encoder(codec: DCAE, device: str) -> Encoder:
    """One whose every layer says something: fresh branches begin with a factor of zero."""
    torch.manual_seed(0)
    module = codec.build()
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.normal_(std=0.5 if name.endswith("norm.weight") else 1 / value[0].numel() ** 0.5)
    scale = Scale((0.0,) * codec.channels, (1.0,) * codec.channels)
    return Encoder(codec, module.to(device), scale)


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 3),
        "all": [round(value, 3) for value in values],
    }


def _job(folder: Path) -> EncodeJob:
    from encode_plan import stage

    weights = Path(os.environ["ENCODE_WEIGHTS"])
    probed = probe_all(read_table(stage.data), folder / "probes.parquet", workers=2)
    members = assign(stage, probed).save(folder / "clips.arrow")
    scale = measure_scale(stage, weights, members)
    return plan_job(stage, weights, scale, members, str(folder / "latents"))


def _ways(job: EncodeJob, folder: Path) -> dict[str, Callable[[], int]]:
    """Each part, and the whole, as a function that returns how many clips it did."""
    from encode_plan import BUCKET, CODEC

    clips = list(job.members.clips[BUCKET.name])
    wanted = [Wanted(c.path, BUCKET.frames, 8.0, BUCKET.height, BUCKET.width) for c in clips]
    size = chunk_size(CODEC)
    pictures = [x for x in shared_decoders(1).decode(wanted, ahead=size) if torch.is_tensor(x)]
    module = load_codec(CODEC, job.weights, job.weights_digest)
    encoder = Encoder(CODEC, module, job.scale)

    def decode_alone() -> int:
        return sum(1 for _ in shared_decoders(1).decode(wanted, ahead=2 * size))

    def codec_alone() -> int:
        for first in range(0, len(pictures), size):
            encoder.begin(pictures[first : first + size], ends=False).wait()
        return len(pictures)

    def whole() -> int:
        began_ns = time.time_ns() - 10**9  # a clock of files may be coarse
        store = open_store(job)
        shards = [shard for shard in store.shard_ids() if shard[0] == BUCKET.name]
        # As many as one task of Ray has; `again`, or what is there would be left as it is.
        encode_shards(job, shards, again=True, decoders=1)
        written = [Path(job.root, shard_file(shard[0], "latent", shard[1])) for shard in shards]
        assert min(path.stat().st_mtime_ns for path in written) > began_ns, "it was not encoded"
        return sum(len(store.planned(shard)) for shard in shards)

    return {"decode_alone": decode_alone, "codec_alone": codec_alone, "whole": whole}


def killed(folder: Path, kills: int) -> dict[str, Any]:
    """Encode once in peace and once under fire; what was killed, and what differs."""
    calm = Encoding(folder / "calm")
    calm.start()
    calm.finish()
    hurt, draw, done = Encoding(folder / "hurt"), random.Random(0), Counter[str]()
    hurt.start()
    while sum(done.values()) < kills:
        time.sleep(draw.uniform(0.2, 3.0))
        if hurt.has_ended():
            if hurt.process.returncode == 0 and not hurt.store_is_sealed():
                raise RuntimeError("it ended well without a store")
            if hurt.store_is_sealed():
                # All is done, and there are kills left: as if half of it had never been done.
                hurt.lose_half(draw)
            hurt.start()
            continue
        what = hurt.kill_one(draw, done)
        if what:
            done[what] += 1
            print(f"killed {what}: {sum(done.values())} of {kills}", file=sys.stderr, flush=True)
    if hurt.has_ended():
        hurt.start()
    hurt.finish()
    one, other = calm.files(), hurt.files()
    differing = sorted(
        name for name in one.keys() | other.keys() if one.get(name) != other.get(name)
    )
    return {
        "kills": {
            "num": sum(done.values()), "of": dict(done), "starts": hurt.num_starts,
            "files": len(one), "differing": differing,
        }
    }  # fmt: skip


class Encoding:
    """`python -m elastic encode` in a folder of its own, again and again."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.num_starts = 0

    def start(self) -> None:
        """Give the command."""
        self.num_starts += 1
        path = f"{HOME}:{HOME / 'tests'}"
        command = [sys.executable, "-m", "elastic", "encode", str(HOME / "tests/encode_plan.py")]
        self.log = open(self.storage.with_suffix(".log"), "ab")  # noqa: SIM115  # of a process
        self.process = subprocess.Popen(
            [*command, "--storage", str(self.storage), "--no-aim"],
            env={**os.environ, "PYTHONPATH": path},
            stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether it is over, well or badly."""
        return self.process.poll() is not None

    def finish(self) -> None:
        """Wait for it, and give the command again where it failed: as a person would."""
        deadline = time.monotonic() + _LATEST_S
        while self.process.wait(max(1.0, deadline - time.monotonic())) != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(self.storage.with_suffix(".log").read_text()[-2000:])
            self.start()

    def kill_one(self, draw: random.Random, done: Counter[str]) -> str:
        """SIGKILL one of its processes; what it was, or nothing if there is none to kill yet.

        A kind that was not killed yet comes before the others.
        """
        kinds: dict[str, list[psutil.Process]] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = " ".join(process.cmdline())
                kind = _kind(process, command)
            except psutil.NoSuchProcess:
                continue
            if kind:
                kinds.setdefault(kind, []).append(process)
        if "a worker" not in kinds:
            return ""
        kinds["the driver"] = [psutil.Process(self.process.pid)]
        names = sorted(kinds.keys() - done.keys()) or sorted(kinds)
        kind = draw.choices(names, [WEIGHTS[name] for name in names])[0]
        draw.choice(kinds[kind]).send_signal(signal.SIGKILL)
        if kind == "the driver":
            self.process.wait()
        return kind

    @property
    def _store(self) -> Path:
        (store,) = (self.storage / "encode" / "latents").iterdir()
        return store

    def store_is_sealed(self) -> bool:
        """Whether all of it is encoded."""
        return (self.storage / "encode" / "latents").exists() and (
            self._store / "zarr.json"
        ).exists()

    def lose_half(self, draw: random.Random) -> None:
        """Remove the seal and a random half of the shards."""
        (self._store / "zarr.json").unlink()
        shards = sorted(self._store.glob("*/latent/c.*"))
        for shard in draw.sample(shards, len(shards) // 2):
            shard.unlink()

    def files(self) -> dict[str, str]:
        """Digest of every file of the store but the logs of its writers."""
        return {
            str(path.relative_to(self._store)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self._store.rglob("*"))
            if path.is_file() and path.suffix != ".jsonl"
        }


def _kind(process: psutil.Process, command: str) -> str:
    if command.startswith("ray::_encode_whole"):
        return "a worker"
    if "/raylet" in command.split(" ")[0]:
        return "the raylet"
    parent = process.parent()
    is_served = parent is not None and "multiprocessing.forkserver" in " ".join(parent.cmdline())
    return "a decoder" if "multiprocessing.forkserver" in command and is_served else ""


if __name__ == "__main__":
    main()
