"""A step gives a GPU its work without waiting for what it was given before.

Played on the meta device, which computes nothing: what copies to it from the host, as a list of
numbers becomes a tensor there, would make the host wait for a GPU; what asks for a value of it has
no answer. Copies from pinned memory are none of these, and are not played (elastic/inputs.py).
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from test_gpu import JUDGED, WIDE, Clips
from test_inputs import GIVING
from test_published import SMALL
from tiny import DrawnLatents, objective
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic.data.latents import posterior
from elastic.data.load import Source, rounds_of
from elastic.data.order import batch_at
from elastic.ema import EmaWeights
from elastic.loop import clip_gradients
from elastic.muon import orthogonalise
from elastic.objective import Objective, Reconstructing
from elastic.world import World
from models import DCAE, HunyuanVAE, Tiling
from models.codec import Codec
from models.perceptual import LpipsModule
from stages import AutoencoderStage, DiffusionStage, Stage

META, CPU = torch.device("meta"), torch.device("cpu")
# Torch makes these on the host and copies them, without an operation that a mode could see.
MADE_OF_LISTS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Waited(AssertionError):
    """The host would wait for what the device does."""


class _NoLists(TorchFunctionMode):
    """Raises Waited where a tensor is made of a list."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in MADE_OF_LISTS and made.device == META:
            raise Waited(f"{func.__name__} of {tuple(made.shape)}")
        return made


class _NoCopies(TorchDispatchMode):
    """Raises Waited where an operation takes memory of the host to the device.

    A single value of the host goes along with the operation that takes it.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        host = [tuple(x.shape) for x in tensors if x.device == CPU and (x.ndim or _copies(func))]
        here = [x for x in [*tensors, *tree_leaves(given)] if isinstance(x, Tensor)]
        if host and any(x.device == META for x in here):
            raise Waited(f"{func} of {host}")
        return given


def _copies(func: Any) -> bool:
    return func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def without_waiting(act: Callable[[], object]) -> None:
    """Do it; Waited or torch's own error where a GPU would be waited for."""
    with ExitStack() as modes:
        modes.enter_context(_NoLists())
        modes.enter_context(_NoCopies())
        act()


ON_META = torch.empty(4, 3, device=META)
WAITS: dict[str, Callable[[], object]] = {
    "a list": lambda: ON_META.new_tensor([1.0, 2.0, 3.0]),
    "a copy": lambda: torch.ones(3).to(META),
    "a copy of one value": lambda: torch.ones(()).to(META),
    "an index": lambda: ON_META[torch.tensor([0, 2])],
    "a value": lambda: float(ON_META.sum()),
    "a condition": lambda: bool(ON_META.sum() > 0),
    "a choice": lambda: ON_META[ON_META > 0],
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name: str) -> None:
    with pytest.raises((Waited, RuntimeError)):
        without_waiting(WAITS[name])
    without_waiting(lambda: ON_META * torch.tensor(2.0) + ON_META.new_full((), 127.5))


class Alone(World):
    """A world of one rank that sends nothing."""

    replicas = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values


def _goal(stage: Stage) -> tuple[Objective, Source]:
    if isinstance(stage, DiffusionStage):
        source = DrawnLatents(stage, {bucket.name: 12 for bucket in stage.buckets}, 100)
        return objective(stage), source
    assert isinstance(stage, AutoencoderStage), type(stage)
    clips = Clips(stage, 23, 100)
    return Reconstructing(stage, clips, clips, META), clips


def _update(stage: Stage, exact: bool) -> Callable[[], None]:
    """One round of a stage, and what ends an update but for the optimizer's own step."""
    goal, source = _goal(stage)
    micro = next(iter(rounds_of([batch_at(stage, 0, source.layouts())], source, 0, 1)))
    inputs = goal.inputs(micro, CPU)._each(lambda x: x.to(META))
    model, world = goal.build(), Alone(0, 1, META, cast(Any, None))
    average = EmaWeights(model, stage.ema)

    def update() -> None:
        losses = goal.losses(model, inputs)
        ((losses.both_B * inputs.weight_B).sum() / micro.batch).backward()
        clip_gradients(model, 1.0, world, exact=exact)
        if goal.critic is not None:
            assert goal.critic.clip_gradients(0, world)
        average.update(micro.batch, micro.batch)

    return update


assert JUDGED.adversarial is not None
AT_ONCE = JUDGED.replace(adversarial=JUDGED.adversarial.replace(start=0))
STAGES: dict[str, Stage] = {
    "text": WIDE,
    "guidance": WIDE.replace(model=WIDE.model.replace(guidance=True)),
    "selective": WIDE.replace(recompute="selective"),
    "given": GIVING,
    "judged": AT_ONCE,
    "full": AT_ONCE.replace(recompute="full"),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_an_update_waits_for_nothing(name: str, exact: bool) -> None:
    without_waiting(_update(STAGES[name], exact))


def test_a_perceptual_loss_waits_for_nothing() -> None:
    module = LpipsModule().to(META)
    real, decoded = (torch.empty(2, 3, 2, 64, 96, device=META) for _ in range(2))
    without_waiting(lambda: module(real, decoded.requires_grad_()).sum().backward())


def test_an_update_is_made_orthogonal_without_waiting() -> None:
    without_waiting(lambda: orthogonalise(torch.empty(64, 48, device=META)))


CODECS: dict[str, tuple[Codec, int]] = SMALL | {
    "dc-ae-in-tiles": (
        DCAE(
            channels=16,
            widths=(16, 16, 32, 32, 64, 64),
            encoder_depths=(1, 1, 1, 1, 1, 1),
            decoder_depths=(1, 1, 1, 1, 1, 1),
            head_width=8,
            tiling=Tiling(frames=8, pixels=64, overlap=0.5),
        ),
        16,
    ),
    "hunyuan": (HunyuanVAE(widths=(4, 4, 8, 8), layers=1, norm_groups=2, channels=4), 9),
}


@pytest.mark.filterwarnings("default")  # of diffusers
@pytest.mark.parametrize("name", CODECS)
def test_clips_are_encoded_and_decoded_without_waiting(name: str) -> None:
    codec, frames = CODECS[name]
    module = codec.build(META)

    def there_and_back() -> None:
        with torch.no_grad():
            module.decode(posterior(module, torch.empty(1, 3, frames, 128, 96, device=META)))

    without_waiting(there_and_back)
