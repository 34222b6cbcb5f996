"""What the model is given for a micro-batch: made ahead of the training, copied beside it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor

from elastic.data.load import Micro
from elastic.workload import Workload
from models.text import TextBatch


@dataclass(frozen=True)
class Inputs:
    """Tensors of a micro-batch; what a stage does not need is None."""

    micro: Micro
    work: Workload
    x_BCTHW: Tensor
    weight_B: Tensor
    noise_BCTHW: Tensor | None = None
    t_B: Tensor | None = None
    text: TextBatch | None = None
    given_BCTHW: Tensor | None = None
    arrived: torch.cuda.Event | None = None
    """When the copies are there; None: they are."""

    def ready_for(self, device: torch.device) -> "Inputs":
        """As a reading thread leaves them: where a GPU can fetch them from, or all as fp32."""
        if device.type == "cuda":
            return self._each(Tensor.pin_memory)
        return self._each(_widened)

    def _copied(self, device: torch.device) -> "Inputs":
        """On the GPU when `arrived` says so, by its stream of copies; nobody waits for it."""
        copies = _copies_of(device)
        with torch.cuda.stream(copies):
            moved = self._each(lambda x: x.to(device, non_blocking=True))
            return replace(moved, arrived=copies.record_event())

    def _arriving(self) -> "Inputs":
        """As fp32, when what the GPU was given before has been done and the copies are there."""
        assert self.arrived is not None, "nothing was copied"
        computing = torch.cuda.current_stream(self.x_BCTHW.device)
        computing.wait_event(self.arrived)
        # Their memory belongs to the stream of the copies, which knows nothing of the computing.
        return replace(self._each(lambda x: _widened(_used_by(computing, x))), arrived=None)

    def _each(self, act: Callable[[Tensor], Tensor]) -> "Inputs":
        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else act(x)

        text = self.text
        if text is not None:
            text = TextBatch(act(text.text_BLD), of(text.mask_BL), act(text.pooled_BD))
        return replace(
            self,
            x_BCTHW=act(self.x_BCTHW),
            weight_B=act(self.weight_B),
            noise_BCTHW=of(self.noise_BCTHW),
            t_B=of(self.t_B),
            text=text,
            given_BCTHW=of(self.given_BCTHW),
        )


def on_device(rounds: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """What a reading thread has made ready, one after the other on the device.

    Those of the next round are copied beside the computation with one. Then two are there, and for
    a moment before it the ones of the round that has ended, whose activations are gone.
    """
    if device.type != "cuda":
        yield from rounds
        return
    left = iter(rounds)
    coming = [one._copied(device) for one in islice(left, 1)]
    while coming:
        here = coming.pop()._arriving()
        coming = [one._copied(device) for one in islice(left, 1)]
        yield here


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _used_by(stream: torch.cuda.Stream, x: Tensor) -> Tensor:
    x.record_stream(stream)
    return x


@lru_cache(maxsize=1)
def _copies_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
