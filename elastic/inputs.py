"""What the model is given for a micro-batch: made ahead of the training, copied beside it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

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

    def to(self, device: torch.device) -> "Inputs":
        """On the device, bf16 widened to fp32 there; neither host nor device waits for it.

        A GPU copies on a stream of its own: call `arrive` before anything is computed with them.
        """
        if device.type != "cuda":
            return self._each(lambda x: _widened(x.to(device)))
        copies = _copies_of(device)
        with torch.cuda.stream(copies):
            moved = self._each(lambda x: _widened(x.pin_memory().to(device, non_blocking=True)))
            return replace(moved, arrived=copies.record_event())

    def arrive(self) -> None:
        """Have what the device is given from now on wait for the copies."""
        if self.arrived is None:
            return
        computing = torch.cuda.current_stream(self.x_BCTHW.device)
        computing.wait_event(self.arrived)
        # Their memory belongs to the stream of the copies, which knows nothing of the computing.
        self._each(lambda x: _used_by(computing, x))

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


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _used_by(stream: torch.cuda.Stream, x: Tensor) -> Tensor:
    x.record_stream(stream)
    return x


@lru_cache(maxsize=1)
def _copies_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
