"""Worlds of several ranks on this machine: spawned processes, gloo, a rendezvous by file."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

DEADLINE_S = 180.0


def run_world(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Call a module-level function as `function(world, *arguments)` on every rank; their results.

    The first failure ends all ranks and is raised with the rank's own traceback.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[tuple[Any, Connection]] = []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(there, folder, rank, size, function, arguments), daemon=True
            )
            process.start()
            there.close()
            ranks.append((process, here))
        try:
            return _collect([pipe for _, pipe in ranks])
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], timeout=DEADLINE_S)
        if not ready:
            raise TimeoutError(f"{len(pipes) - len(results)} ranks silent for {DEADLINE_S:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if kind == "error":
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[pipe] = value
    return [results[pipe] for pipe in pipes]


def _rank(
    pipe: Connection,
    folder: str,
    rank: int,
    size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from elastic.world import World

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        pipe.send(("result", function(World.current(), *arguments)))
        dist.destroy_process_group()
    except BaseException:
        # Sent to the parent, which raises it; this process ends either way.
        pipe.send(("error", traceback.format_exc()))
        raise
