"""What the model is given: drawn from the samples alone, widened without loss, made by the reader.

Copies beside the computation need a GPU; those cases are skipped without one.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny import CLIP, STAGE, STILL, DrawnLatents, losses_of
from torch import Tensor, nn

from elastic.data.load import Micro, Round, Samples, Stream, rounds_of
from elastic.data.order import batch_at
from elastic.inputs import Inputs, on_device
from elastic.objective import FlowMatching
from elastic.workload import Workload
from elastic.world import World
from models.fresh import fresh_parameters, named_generator
from models.text import TextBatch
from stages.given import Given

COUNTS = {CLIP: 23, STILL: 17}
CPU = torch.device("cpu")
GIVING = STAGE.replace(
    model=STAGE.model.replace(image_condition=True),
    given=Given(none=0.25, head=0.25, tail=0.25, loop=0.25),
)


class Stored(DrawnLatents):
    """Latents, stills and text that are bf16, as in a store; or the same values as fp32."""

    is_widened = False

    def fetch_all(self, rounds: Iterable[Round]) -> Iterator[Samples]:
        for samples in super().fetch_all(rounds):
            yield _each(samples, self._stored)

    def _stored(self, x: Tensor) -> Tensor:
        rounded = x.bfloat16() if x.is_floating_point() else x
        return rounded.float() if self.is_widened and x.is_floating_point() else rounded


def _each(samples: Samples, act: Callable[[Tensor], Tensor]) -> Samples:
    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else act(x)

    text = samples.text
    assert text is not None
    return replace(
        samples,
        x_BCTHW=act(samples.x_BCTHW),
        text=TextBatch(act(text.text_BLD), of(text.mask_BL), act(text.pooled_BD)),
        given_BCTHW=of(samples.given_BCTHW),
    )


def _objective(stage: Any, is_widened: bool) -> FlowMatching:
    source = Stored(stage, COUNTS, 100)
    source.is_widened = is_widened
    return FlowMatching(stage, source, source, stage.text.null())


def _model(stage: Any) -> nn.Module:
    model = stage.build("cpu")
    drawn = fresh_parameters(model, lambda name: named_generator(0, name))
    with torch.no_grad():
        for name, value in drawn:
            model.get_parameter(name).copy_(value + 0.02)  # no layer starts at zero
    return cast(nn.Module, model)


@pytest.mark.parametrize("stage", [STAGE, GIVING], ids=["plain", "given"])
def test_samples_as_they_are_stored_have_the_losses_of_their_widened_values(stage: Any) -> None:
    model, losses = _model(stage), []
    for is_widened in (False, True):
        goal = _objective(stage, is_widened)
        micros = list(rounds_of([batch_at(stage, 0, COUNTS)], goal.source, 0, 1))
        assert micros[0].samples.x_BCTHW.dtype == (torch.float32 if is_widened else torch.bfloat16)
        losses.append(torch.cat([losses_of(goal, model, micro).model_B for micro in micros]))
    assert torch.equal(*losses)
    assert losses[0].dtype == torch.float32


def test_what_training_is_given_is_made_by_the_thread_that_reads() -> None:
    goal, threads = _objective(STAGE, False), []

    def ready(micro: Micro) -> Inputs:
        threads.append(threading.current_thread().name)
        return goal.inputs(micro, CPU)

    world = World(0, 1, CPU, cast(Any, None))
    stream = Stream(STAGE, goal.source, world, 0, ready)
    step = stream.step(0)
    stream.close()
    assert set(threads) == {"stream"}
    for inputs in step.micros:
        again = goal.inputs(inputs.micro, CPU)
        assert torch.equal(cast(Tensor, inputs.noise_BCTHW), cast(Tensor, again.noise_BCTHW))
        assert torch.equal(cast(Tensor, inputs.t_B), cast(Tensor, again.t_B))
        assert inputs.x_BCTHW.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_beside_the_computation_are_whole_when_they_are_used() -> None:
    device, made = torch.device("cuda"), torch.Generator().manual_seed(0)
    busy = torch.randn(4096, 4096, device=device)
    ready, sums, said = [], [], []
    for number in range(64):
        # Sizes come again, so that memory is used again while earlier work may still want it.
        x_BCTHW = torch.randn(2, 4, 8, 64, 64 * (1 + number % 3), generator=made).bfloat16()
        said.append(x_BCTHW.double().sum())
        inputs = Inputs(cast(Any, None), Workload(0, ()), x_BCTHW, torch.ones(2))
        ready.append(inputs.ready_for(device))
    for inputs in on_device(ready, device):
        busy = busy @ busy / 64
        sums.append(inputs.x_BCTHW.double().sum())
        assert inputs.x_BCTHW.dtype == torch.float32
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(said))


def test_nothing_is_copied_where_the_model_is_on_the_cpu() -> None:
    x_BCTHW, weight_B = torch.randn(1, 2, 1, 2, 2), torch.ones(1)
    inputs = Inputs(cast(Any, None), Workload(0, ()), x_BCTHW, weight_B).ready_for(CPU)
    assert inputs.x_BCTHW.data_ptr() == x_BCTHW.data_ptr()
    assert list(on_device([inputs], CPU)) == [inputs]
    assert np.shares_memory(inputs.weight_B.numpy(), weight_B.numpy())
