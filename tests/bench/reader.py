"""Samples a second and processor time of one: our reader of a latent store, and what people use.

The same latents lie on a local disk in every format: 1.1 MB each (256 px, 129 frames, HunyuanVAE)
and 9.7 MB each (768 px). A sample ends in a buffer of the caller's, as a place in a batch is: ours
reads into it, what a peer returns is copied there. One thread. In random order, and in windows
(shards in random order, one after the other), where formats that can only be read from front to
back take part. Files are in the page cache, so this is what software costs; the limit is a copy
from one place in memory to another. Readers take turns, round by round. Ours compares the CRC-32C
of a sample when a process reads it for the first time: `ours, first time` has them all like that.

`batches` is what a training loop gets: batches of 8 in random order, read ahead of the loop in the
way that each has for it: ours by the threads of a rank's stream, Streaming and safetensors by
torch's `DataLoader` with one process or two, whose processor time is counted too. There a batch
goes through memory that processes share; ours is read to where it stays.

Peers need `pip install tensorstore mosaicml-streaming webdataset`; one that is not there is left
out, and then the goal does not hold.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zarr
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figure import record

from elastic.data.ahead import read_ahead
from elastic.data.store import BucketPlan, LatentStore, Sample, SealedStore, StoreSchema
from elastic.heap import keep_freed_memory

BUCKET = "bench"
SHAPES = {"1.1 MB": ((16, 33, 32, 32), 256, 16), "9.7 MB": ((16, 33, 96, 96), 64, 8)}
OF_MEMCPY, OF_STREAMING = 0.7, 3.0
BATCH = 8
Order = list[int]
Read = Callable[[Order], Iterator[Tensor]]  # samples of an order, one by one, in any memory


class Latents:
    """Random latents of one shape, and every format that they are written in."""

    def __init__(self, folder: Path, shape: tuple[int, ...], count: int, per_shard: int) -> None:
        self.folder, self.shape, self.count, self.per_shard = folder, shape, count, per_shard
        made = np.random.default_rng(0)
        size = int(np.prod(shape))
        self.out = torch.empty(shape, dtype=torch.bfloat16)
        # Noise, as latents nearly are: what it is matters to the packed reader alone.
        self.bits_NV: NDArray[np.uint16] = np.empty((count, size), np.uint16)
        for row_V in self.bits_NV:
            drawn_V = torch.from_numpy(made.standard_normal(size, np.float32)).bfloat16()
            row_V[:] = drawn_V.view(torch.uint16).numpy()

    def tensor(self, index: int) -> Tensor:
        """One sample."""
        return torch.from_numpy(self.bits_NV[index]).view(torch.bfloat16).view(self.shape)

    def store(self, name: str = "store", packed: bool = False) -> Path:
        """Our store, which zarr and tensorstore read too."""
        root = self.folder / name
        c, t, h, w = self.shape
        plan = BucketPlan(name=BUCKET, shape=(c, t, h, w), sample_ids=tuple(range(self.count)))
        schema = StoreSchema(
            fingerprint="bench",
            buckets=(plan,),
            packed=packed,
            samples_per_shard=self.per_shard,
            text_tokens=8,
            text_width=8,
            pooled_width=8,
        )
        store = LatentStore.create(root, schema)
        text_LD, pooled_P = torch.zeros(8, 8).bfloat16(), torch.zeros(8).bfloat16()
        for bucket, shard in store.missing():
            ids = store.planned((bucket, shard))
            samples = [Sample(n, self.tensor(n), text_LD, pooled_P) for n in ids]
            store.write_shard(bucket, shard, samples)
        store.seal()
        return root


def memcpy(latents: Latents) -> Read:
    """The limit: from memory to memory."""

    def read(order: Order) -> Iterator[Tensor]:
        for index in order:
            yield latents.tensor(index)

    return read


def ours(latents: Latents, always: bool = False, name: str = "store") -> Read:
    """Our reader, into one buffer of the caller's; checks what it reads for the first time."""
    store, out = SealedStore.open(latents.folder / name, "bench"), latents.out

    def read(order: Order) -> Iterator[Tensor]:
        if always:
            store.forget_checks()
        for index in order:
            store.read(BUCKET, index, out)
            yield out

    return read


def ours_first(latents: Latents) -> Read:
    """The same where every sample is read for the first time."""
    return ours(latents, always=True)


def ours_packed(latents: Latents) -> Read:
    """The same where the store is packed."""
    latents.store("packed", packed=True)
    return ours(latents, name="packed")


def zarr_python(latents: Latents) -> Read:
    """zarr-python on our store."""
    array: Any = zarr.open_array(latents.folder / "store" / BUCKET / "latent", mode="r")

    def read(order: Order) -> Iterator[Tensor]:
        for index in order:
            yield torch.from_numpy(array[index]).view(torch.bfloat16)

    return read


def tensorstore(latents: Latents) -> Read:
    """tensorstore on our store, without a cache of its own."""
    module: Any = importlib.import_module("tensorstore")
    path = str(latents.folder / "store" / BUCKET / "latent")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    array = module.open(spec, open=True, read=True).result()

    def read(order: Order) -> Iterator[Tensor]:
        for index in order:
            yield torch.from_numpy(array[index].read().result()).view(torch.bfloat16)

    return read


def streaming(latents: Latents) -> Read:
    """MosaicML Streaming's shards, by index."""
    module: Any = importlib.import_module("streaming")
    out = str(latents.folder / "mds")
    if not os.path.exists(out):
        limit = latents.bits_NV[0].nbytes * latents.per_shard + 4096
        with module.MDSWriter(out=out, columns={"x": "bytes"}, size_limit=limit) as writer:
            for index in range(latents.count):
                writer.write({"x": latents.bits_NV[index].tobytes()})
    data = module.StreamingDataset(local=out, remote=None, shuffle=False, batch_size=1)

    def read(order: Order) -> Iterator[Tensor]:
        for index in order:
            yield torch.frombuffer(data[index]["x"], dtype=torch.bfloat16).view(latents.shape)

    return read


def webdataset(latents: Latents) -> Read:
    """WebDataset's tar files, which are read from front to back."""
    module: Any = importlib.import_module("webdataset")
    folder = latents.folder / "tar"
    if not folder.exists():
        folder.mkdir()
        for first in range(0, latents.count, latents.per_shard):
            with module.TarWriter(str(folder / f"{first // latents.per_shard:05}.tar")) as writer:
                for index in range(first, min(first + latents.per_shard, latents.count)):
                    bits = latents.bits_NV[index].tobytes()
                    writer.write({"__key__": f"{index:08}", "x.bin": bits})

    def read(order: Order) -> Iterator[Tensor]:
        shards = dict.fromkeys(index // latents.per_shard for index in order)
        urls = [str(folder / f"{shard:05}.tar") for shard in shards]
        for sample in module.WebDataset(urls, shardshuffle=False, empty_check=False):
            yield torch.frombuffer(sample["x.bin"], dtype=torch.bfloat16).view(latents.shape)

    return read


def safetensors(latents: Latents) -> Read:
    """A safetensors file for each sample."""
    folder = latents.folder / "safetensors"
    if not folder.exists():
        folder.mkdir()
        for index in range(latents.count):
            save_file({"x": latents.tensor(index)}, folder / f"{index}.safetensors")

    def read(order: Order) -> Iterator[Tensor]:
        for index in order:
            yield load_file(folder / f"{index}.safetensors")["x"]

    return read


READERS: dict[str, Callable[[Latents], Read]] = {
    "memcpy": memcpy,
    "ours": ours,
    "ours, first time": ours_first,
    "ours, packed": ours_packed,
    "zarr-python": zarr_python,
    "tensorstore": tensorstore,
    "streaming": streaming,
    "webdataset": webdataset,
    "safetensors": safetensors,
}
FRONT_TO_BACK = ("webdataset",)


def orders(latents: Latents, seed: int) -> dict[str, Order]:
    """Every sample once: at random, and shard by shard."""
    draw = random.Random(seed)
    at_random = list(range(latents.count))
    draw.shuffle(at_random)
    shards = list(range(-(-latents.count // latents.per_shard)))
    draw.shuffle(shards)
    k = latents.per_shard
    windows = [n for s in shards for n in range(s * k, min((s + 1) * k, latents.count))]
    return {"random": at_random, "windows": windows}


def measure(latents: Latents, rounds: int) -> dict[str, Any]:
    """Seconds and processor seconds of a sample, by order and reader; readers take turns."""
    latents.store()
    readers: dict[str, Read] = {}
    left_out: dict[str, str] = {}
    for name, make in READERS.items():
        try:
            readers[name] = make(latents)
            first = list(range(latents.per_shard))  # opens what is opened once; and checks
            for index, found in zip(first, readers[name](first), strict=True):
                assert torch.equal(found, latents.tensor(index)), f"{name} reads another sample"
        except ImportError as error:
            left_out[name] = str(error)
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for turn in range(rounds):
        for order_name, order in orders(latents, turn).items():
            names = [n for n in readers if order_name == "windows" or n not in FRONT_TO_BACK]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                wall, cpu = time.perf_counter(), time.process_time()
                for found in readers[name](order):
                    if found is not latents.out:
                        latents.out.copy_(found)
                spent = (time.perf_counter() - wall, time.process_time() - cpu)
                taken.setdefault(order_name, {}).setdefault(name, []).append(spent)
    return {
        "orders": {
            order: {name: row(spent, latents) for name, spent in by_name.items()}
            for order, by_name in taken.items()
        },
        "left_out": left_out,
    }


class _Kept(Dataset[Tensor]):
    """Samples by index, as torch's loader wants them; Streaming's bytes or safetensors' files."""

    def __init__(self, latents: Latents, name: str) -> None:
        self._shape = latents.shape
        self._files = latents.folder / "safetensors" if name == "safetensors" else None
        if name == "streaming":
            module: Any = importlib.import_module("streaming")
            mds = str(latents.folder / "mds")
            self._data = module.StreamingDataset(local=mds, shuffle=False, batch_size=1)

    def __getitem__(self, index: int) -> Tensor:
        if self._files is not None:
            return load_file(self._files / f"{index}.safetensors")["x"]
        bits = torch.frombuffer(self._data[index]["x"], dtype=torch.bfloat16)
        return bits.view(self._shape)


def our_batches(latents: Latents) -> Read:
    """Our reader, ahead by as many threads as pay."""
    store = SealedStore.open(latents.folder / "store", "bench")

    def read(order: Order) -> Iterator[Tensor]:
        cuts = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
        for found in read_ahead(lambda cut: store.read_batch(BUCKET, cut), cuts, 4):
            yield found.latents_BCTHW

    return read


def loader_of(name: str, workers: int) -> Callable[[Latents], Read]:
    """torch's loader with so many processes, which stay from round to round."""

    def make(latents: Latents) -> Read:
        sampler: list[list[int]] = []
        data = _Kept(latents, name)
        loader: DataLoader[Tensor] = DataLoader(
            data, batch_sampler=sampler, num_workers=workers, persistent_workers=True
        )

        def read(order: Order) -> Iterator[Tensor]:
            sampler[:] = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
            yield from loader

        return read

    return make


LOADERS: dict[str, Callable[[Latents], Read]] = {
    "ours": our_batches,
    **{
        f"{name}, {workers} process{'es' * (workers > 1)}": loader_of(name, workers)
        for name in ("streaming", "safetensors")
        for workers in (1, 2)
    },
}


class _Turn:
    """A loader in a process of its own, as it is in training."""

    def __init__(self, name: str, latents: Latents) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        about = (latents.folder, latents.shape, latents.count, latents.per_shard)
        self._process = spawn.Process(target=_serve, args=(name, *about, theirs))
        self._process.start()
        theirs.close()
        self._pipe.recv()  # two of Streaming that start at once take each other's shared memory

    def take(self, order: Order) -> tuple[float, float]:
        """Read them; seconds, and processor seconds of all its processes."""
        self._pipe.send(order)
        spent: tuple[float, float] = self._pipe.recv()
        return spent

    def end(self) -> None:
        """Have it end."""
        self._pipe.send(None)
        self._process.join()


def _serve(
    name: str, folder: Path, shape: tuple[int, ...], count: int, per_shard: int, pipe: Any
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    if name == "ours":
        keep_freed_memory()  # as a training process of ours does
    latents = Latents(folder, shape, count, per_shard)
    read = LOADERS[name](latents)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), cpu_of_all()
        firsts = [found[0, 0, 0, 0].clone() for found in read(order)]
        pipe.send((time.perf_counter() - wall, cpu_of_all() - cpu))
        for number, row_W in enumerate(firsts):
            expected = latents.tensor(order[number * BATCH])[0, 0, 0]
            assert torch.equal(row_W, expected), f"{name} reads another sample"


def cpu_of_all() -> float:
    """Processor seconds of this process and of those that it started, also while they run."""
    own = psutil.Process()
    spent = 0.0
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[:2])
    return spent


def measure_batches(latents: Latents, rounds: int) -> dict[str, Any]:
    """Seconds and processor seconds of a sample that comes in a batch; loaders take turns."""
    has_streaming = importlib.util.find_spec("streaming") is not None
    names = [name for name in LOADERS if has_streaming or not name.startswith("streaming")]
    turns = {}
    taken: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        turns[name] = _Turn(name, latents)
        turns[name].take(orders(latents, 0)["random"])  # opens files, starts processes, checks
    for number in range(rounds):
        order = orders(latents, number)["random"]
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken.setdefault(name, []).append(turns[name].take(order))
    for turn in turns.values():
        turn.end()
    return {name: row(spent, latents) for name, spent in taken.items()}


def row(spent: list[tuple[float, float]], latents: Latents) -> dict[str, Any]:
    """Medians of one reader, and its spread."""
    per_s = sorted(latents.count / wall for wall, _ in spent)
    cpu_us = statistics.median(cpu for _, cpu in spent) / latents.count * 1e6
    return {
        "samples_per_s": round(statistics.median(per_s), 1),
        "range": [round(per_s[0], 1), round(per_s[-1], 1)],
        "gb_per_s": round(statistics.median(per_s) * latents.bits_NV[0].nbytes / 1e9, 2),
        "cpu_us": round(cpu_us, 1),
    }


def shares(figures: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Samples a second of ours over a copy's, and over Streaming's (in batches its better one)."""
    of_memcpy, of_streaming = {}, {}
    for size, found in figures.items():
        compared = {**found["orders"], "batches": found["batches"]}
        for how, rows in compared.items():
            ours = rows["ours"]["samples_per_s"]
            if "memcpy" in rows:
                of_memcpy[f"{size}, {how}"] = round(ours / rows["memcpy"]["samples_per_s"], 2)
            theirs = [
                r["samples_per_s"] for name, r in rows.items() if name.startswith("streaming")
            ]
            if theirs:
                of_streaming[f"{size}, {how}"] = round(ours / max(theirs), 2)
    return of_memcpy, of_streaming


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sets, two rounds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    # Peers give bytes, which nobody writes to here.
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    figures: dict[str, Any] = {}
    for name, (shape, count, per_shard) in SHAPES.items():
        with tempfile.TemporaryDirectory(prefix="restage-bench-") as folder:
            size = count // 8 if asked.quick else count
            latents = Latents(Path(folder), shape, size, per_shard)
            figures[name] = measure(latents, 2 if asked.quick else 7)
            figures[name]["batches"] = measure_batches(latents, 2 if asked.quick else 7)
            print(name, json.dumps(figures[name]), flush=True)
    of_memcpy, of_streaming = shares(figures)
    record(
        "reader",
        figures={**figures, "of_memcpy": of_memcpy, "of_streaming": of_streaming},
        goal=(
            f"ours reads at least {OF_MEMCPY} x what memcpy copies in each order, and in batches "
            f"{OF_STREAMING} x what Streaming reads"
        ),
        holds=bool(of_streaming)
        and min(of_memcpy.values()) >= OF_MEMCPY
        and min(of_streaming[f"{size}, batches"] for size in SHAPES) >= OF_STREAMING,
        keep=not asked.quick,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
