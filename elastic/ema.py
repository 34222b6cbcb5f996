"""The average of the parameters, sharded like them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.optimizer import Ema, ema_beta


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class EmaWeights:
    """One averaged tensor for each parameter, in the parameter's own sharding."""

    def __init__(self, model: nn.Module, ema: Ema, samples_before: int = 0) -> None:
        self._ema = ema
        self._samples_before = samples_before  # seen by the stages that this one continues
        self._model = model
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    def reset(self, only: frozenset[str] | None = None) -> None:
        """Start over, all or `only` these, from the parameters as they are."""
        for name, parameter in self._model.named_parameters():
            if only is not None and name not in only:
                continue
            local(self.tensors[name]).copy_(local(parameter.detach()))

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Move towards the parameters; `samples` counts the batch just trained on."""
        beta = ema_beta(self._ema, self._samples_before + samples, batch)
        # Nothing is recorded here, so `local` is enough; detaching a sharded tensor costs more.
        parameters = [local(p) for p in self._model.parameters()]
        torch._foreach_lerp_(list(map(local, self.tensors.values())), parameters, 1.0 - beta)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averaged parameters inside this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard = getattr(self._model, "reshard", None)  # absent where nothing is sharded
        if reshard is not None:
            reshard()  # an unsharded copy left by the last forward would hide the exchange
        for name, parameter in self._model.named_parameters():
            mine, average = local(parameter.detach()), local(self.tensors[name])
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)
