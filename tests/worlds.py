"""Worlds of several ranks on this machine: spawned processes, gloo, a rendezvous by file.

A process that has played a rank waits for the next world: to start it and to import torch takes
seconds. It gets the environment of the moment, and is always the same rank: torch remembers for a
mesh which part of it is its own.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

DEADLINE_S = 180.0


class Rank(NamedTuple):
    """A process that plays one rank, of one world after another, and the way to it."""

    process: Any
    pipe: Connection


_waiting: dict[int, Rank] = {}  # by rank; they end with this process


def run_world(
    function: Callable[..., Any], size: int, *arguments: Any, is_fresh: bool = False
) -> list[Any]:
    """Call a module-level function as `function(world, *arguments)` on every rank; their results.

    The first failure ends all ranks and is raised with the rank's own traceback. `is_fresh` ranks
    have done nothing before, for tests that measure or break a process.
    """
    ranks = [(None if is_fresh else _waiting.pop(n, None)) or _start() for n in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, rank in enumerate(ranks):
                rank.pipe.send((folder, number, size, dict(os.environ), function, arguments))
            results = _collect([rank.pipe for rank in ranks])
        except BaseException:
            _end(ranks)
            raise
    if is_fresh:
        _end(ranks)
    else:
        _waiting.update(enumerate(ranks))
    return results


def _start() -> Rank:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return Rank(process, here)


def _end(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
        rank.pipe.close()


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


def _serve(pipe: Connection) -> None:
    """Play one rank after another, until one fails or the parent has gone."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    home = os.getcwd()
    while True:
        try:
            folder, rank, size, environment, function, arguments = pipe.recv()
        except EOFError:
            return
        os.chdir(home)
        os.environ.clear()
        os.environ.update(environment | {"OMP_NUM_THREADS": "1"})
        try:
            pipe.send(("result", _play(folder, rank, size, function, arguments)))
        except BaseException:
            # Sent to the parent, which raises it and ends this process.
            pipe.send(("error", traceback.format_exc()))
            raise


def _play(
    folder: str, rank: int, size: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    import torch.distributed as dist

    from elastic.world import World

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    result = function(World.current(), *arguments)
    dist.destroy_process_group()
    return result
