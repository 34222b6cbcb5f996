"""What a worker holds at each moment of an update, besides what it always has.

FSDP2 gathers the root, which is all that no layer has for itself, for the whole of an update, and
a layer's own parameters when it computes and again for the way back. A gathered group is there
twice for a while: as the message of all ranks, and as parameters. What is not there at once is
never added up here: the most is a maximum over moments. tests/bench/memory.py counts it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

FP32 = 4


class Layer(NamedTuple):
    """One of those that compute in turn, and the bytes of what is computed in it."""

    parameters: int
    is_apart: bool  # gathered for itself; else it is a part of the root
    kept: float  # for the backward pass
    inner: float  # more while it computes: what is computed again later
    backward: float  # gradients of its inner values, on the way back

    def of(self, micro: int) -> "Layer":
        """The same for so many samples at a time."""
        kept, inner, backward = (micro * size for size in self[2:])
        return self._replace(kept=kept, inner=inner, backward=backward)


class Sums(NamedTuple):
    """How parameters are gathered, and gradients summed."""

    width: int  # bytes of a gathered value
    holders: int  # workers that hold the parameters together
    rounds: int  # of an update, on each worker
    each_round: bool  # exchanged then, so that no gradient waits whole
    is_ordered: bool  # exact: those of all ranks come

    @property
    def carried(self) -> float:
        """Bytes a parameter of the gradients of earlier rounds: whole, unless all were sent."""
        if self.rounds == 1:
            return 0.0
        return FP32 / self.holders if self.each_round else FP32

    @property
    def fresh(self) -> float:
        """Bytes a parameter of a round's own gradients; fp32 ones are added where the sum lies."""
        in_place = self.rounds > 1 and not self.each_round and self.width == FP32
        return 0.0 if in_place else self.width

    @property
    def exchange(self) -> float:
        """Bytes a parameter when gradients are sent: the message, and what comes of it.

        What a worker alone has passes through both too.
        """
        return FP32 + FP32 / self.holders + (FP32 if self.is_ordered else 0)

    def message(self, parameters: int) -> float:
        """Bytes of a group as it is gathered, before it is parameters."""
        return self.width * parameters if self.holders > 1 else 0.0


class Moment(NamedTuple):
    """Bytes that a worker holds at one moment."""

    gathered: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gathered + self.gradients + self.activations


def most(layers: Sequence[Layer], root: int, sums: Sums) -> Moment:
    """The moment of an update's last round at which most is held; `root` counts its parameters."""
    both = (*_forward(layers, root, sums), *_backward(layers, root, sums))
    return max(both, key=lambda moment: moment.total)


def _forward(layers: Sequence[Layer], root: int, sums: Sums) -> Iterator[Moment]:
    whole, kept, message = sums.width * root, 0.0, sums.message(root)
    count = root + sum(layer.parameters for layer in layers if layer.is_apart)
    carried = sums.carried * count
    for layer in layers:
        own = sums.width * layer.parameters if layer.is_apart else 0.0
        if layer.is_apart:
            # A message stays until the parameters of the next one are there.
            before, message = message, sums.message(layer.parameters)
            yield Moment(whole + before + message + own, carried, kept)
        kept += layer.kept
        # The last layer's message goes when the root has ended: with most activations.
        yield Moment(whole + own + message, carried, kept + layer.inner)


def _backward(layers: Sequence[Layer], root: int, sums: Sums) -> Iterator[Moment]:
    whole, kept = sums.width * root, sum(layer.kept for layer in layers)
    waiting = [layer.parameters for layer in layers if layer.is_apart]
    gradients = sums.carried * (root + sum(waiting))
    sent = 0.0  # the last message of gradients: it stays until the next one is made
    for layer in reversed(layers):
        own, fresh = 0.0, sums.fresh * layer.parameters
        if layer.is_apart:
            own = sums.width * waiting.pop()
            yield Moment(whole + sums.message(layer.parameters) + own, gradients + sent, kept)
        # The next layer's message is on its way while this one computes. Gradients of parameters
        # come as activations go.
        held = whole + own + (sums.message(waiting[-1]) if waiting else 0.0)
        inner = layer.inner + layer.backward
        yield Moment(held, gradients + sent, kept + inner)
        kept -= layer.kept
        yield Moment(held, gradients + sent + fresh, kept + layer.backward)
        if not layer.is_apart:
            gradients += fresh  # the root's are sent last, together
            continue
        going = sums.exchange * layer.parameters
        yield Moment(held - own, gradients + fresh + going, kept)
        sent = float(FP32 * layer.parameters)
        gradients += (FP32 / sums.holders - sums.carried) * layer.parameters
    rest = root - sum(layer.parameters for layer in layers if not layer.is_apart)
    gradients += sums.fresh * rest
    yield Moment(whole, gradients + sent, kept)
    yield Moment(0.0, gradients + sums.exchange * root, kept)
