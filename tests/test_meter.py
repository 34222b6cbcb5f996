"""What the meter refuses, also where norms reach the host later than the update."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_loop import _poisoned
from tiny import STAGE, world_of_one
from torch import Tensor

from elastic import meter as metering
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.meter import Meter, NonFiniteLoss
from elastic.record import check_unchanged, start_stage
from elastic.state import Progress
from stages import Plan, load_plan


class Arrival:
    """Stands in for the event of a GPU after which a copy of the norm has come."""

    def synchronize(self) -> None:
        """It has come."""


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms come later than the update, as from a GPU."""

    def of(norms: dict[str, Tensor], position: int) -> Any:
        return metering._Norms(norms, position, cast(Any, Arrival()))

    monkeypatch.setattr(metering._Norms, "of", of)


@pytest.mark.usefixtures("late")
def test_a_norm_that_comes_late_is_refused_at_the_next_update_with_its_own_position() -> None:
    with world_of_one() as world:
        meter = Meter(STAGE, world, 1, lambda line: None)
        bad, good = torch.tensor(float("nan")), torch.tensor(1.0)
        meter.require_finite({"grad_norm": good}, Progress(STAGE.name, 8))
        meter.require_finite({"grad_norm": bad}, Progress(STAGE.name, 16))
        with pytest.raises(NonFiniteLoss, match="gradient norm nan at 16 samples"):
            meter.require_finite({"grad_norm": good}, Progress(STAGE.name, 24))


@pytest.mark.usefixtures("late")
def test_a_norm_that_comes_late_is_refused_before_anything_is_written_measured_or_saved() -> None:
    with world_of_one() as world:
        progress = Progress(STAGE.name, 16)
        doors: list[Callable[[Meter], object]] = [
            Meter.settle,
            lambda meter: meter.flush(progress),
            lambda meter: meter.evaluated(progress, lambda: pytest.fail("nothing is measured")),
        ]
        for door in doors:
            meter = Meter(STAGE, world, 1, lambda line: pytest.fail("nothing is written"))
            meter.require_finite({"grad_norm": torch.tensor(float("inf"))}, progress)
            with pytest.raises(NonFiniteLoss, match="gradient norm inf at 16 samples"):
                door(meter)


def test_what_is_advised_is_what_a_stage_under_way_may_do(tmp_path: Path) -> None:
    autoencoder = load_plan(Path(__file__).with_name("tiny_plan.py")).stage("dc-ae")
    folder, said = RunFolder(tmp_path), {}
    for stage, name in ((STAGE, "grad_norm"), (autoencoder, "critic_grad_norm")):
        norms, progress = {name: torch.tensor(torch.inf)}, Progress(stage.name, 8)
        with world_of_one() as world:
            meter = Meter(stage, world, 1, lambda line: None)
            with pytest.raises(NonFiniteLoss) as caught:
                meter.require_finite(norms, progress)
        said[stage.name] = str(caught.value)
        start_stage(folder, stage)
        lower = stage.replace(optimizer=stage.optimizer.replace(lr=1e-5))
        with pytest.raises(InputError, match=r"may not change: optimizer\.lr"):
            check_unchanged(folder, Plan("p", [lower]))
        check_unchanged(folder, Plan("p", [lower.replace(name="again")]))
    for message, rate in ((said["tiny"], "optimizer.lr"), (said["dc-ae"], "adversarial.lr")):
        assert f"lower {rate} or optimizer.max_norm and give the stage another name" in message
    assert "`repair FILE` mends them" in said["tiny"]
    assert "repair" not in said["dc-ae"], "it has no latents"


@pytest.mark.usefixtures("late")
def test_an_update_that_is_not_finite_is_in_no_checkpoint_though_its_norm_comes_late(
    tmp_path: Path,
) -> None:
    with world_of_one() as world:
        said, before, after = _poisoned(world, tmp_path)
    assert "gradient norm nan at" in said
    assert before == after
