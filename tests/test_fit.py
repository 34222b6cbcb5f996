"""What `plan` says of memory: right against autograd, and refused with what would fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STAGE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from worlds import run_world

from elastic.data.deal import round_sizes
from elastic.errors import InputError
from elastic.fit import GIB, check_fit, kept_for, needed, workers_on
from elastic.memory import HEADROOM, kept_by_codec, kept_per_token, state_memory
from elastic.muon import is_matrix
from elastic.shard import shard
from elastic.world import World
from models import DCAE, DiT, Lpips
from models.dit import MMDiT
from models.recompute import RECOMPUTE, Recompute, is_kept
from stages import (
    AdamW,
    Adversarial,
    AutoencoderStage,
    Bucket,
    DiffusionStage,
    Ema,
    Muon,
    Phase,
    Videos,
    load_plan,
)

TEXT, WIDTH = 32, 64
RECIPES = Path(__file__).parents[1] / "stages" / "recipes"


def kept(module: nn.Module, *inputs: Tensor | None) -> int:
    """Bytes that autograd keeps in one forward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def kept_by_dit(model: MMDiT, dtype: torch.dtype) -> int:
    """The same for two latent frames and some text."""
    side = 8 * model.shape.patch
    text, pooled = torch.randn(1, TEXT, WIDTH).to(dtype), torch.randn(1, WIDTH).to(dtype)
    return kept(model, torch.randn(1, 16, 2, side, side), torch.rand(1), text, None, pooled)


class Saved(TorchDispatchMode):
    """Adds up what operations give that "selective" keeps: autograd does not see where it lies."""

    num_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, inputs: Any = (), named: Any = None
    ) -> Any:
        result = function(*inputs, **(named or {}))
        if is_kept(function, *inputs) is CheckpointPolicy.MUST_SAVE:
            self.num_bytes += (result if isinstance(result, Tensor) else result[0]).nbytes
        return result


def saved_products(model: MMDiT, dtype: torch.dtype) -> int:
    """Bytes of what "selective" keeps in all blocks, besides their inputs."""
    with Saved() as saved:
        kept_by_dit(model.recompute("none"), dtype)
    model.recompute("selective")
    return saved.num_bytes


@pytest.mark.parametrize("ratio", [4.0, 2.5])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_blocks_keep_is_what_autograd_keeps(
    dtype: torch.dtype, recompute: Recompute, ratio: float
) -> None:
    def of(depth: int, single: int) -> tuple[int, float]:
        shape = DiT(depth=depth, depth_single=single, width=256, heads=4, mlp_ratio=ratio)
        model = shape.build(16, WIDTH, WIDTH).to(dtype).recompute(recompute)
        expected = kept_per_token(shape, dtype.itemsize, recompute)
        saved = saved_products(model, dtype) if recompute == "selective" else 0
        return kept_by_dit(model, dtype) + saved, expected

    (few, _), (many, _) = of(1, 1), of(3, 4)
    tokens = 2 * 8 * 8 + TEXT
    one, expected = of(1, 1)[1], of(3, 4)[1]
    assert (many - few) / tokens == pytest.approx(expected - one, rel=0.03)


def test_what_a_codec_keeps_is_what_autograd_keeps() -> None:
    codec = DCAE(
        channels=8,
        widths=(8, 8, 8, 16, 16, 16),
        encoder_depths=(1, 1, 1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1, 1, 1),
        head_width=8,
    )
    x = torch.randn(1, 3, 4, 32, 32)
    real = kept(codec.build(), x)
    on_meta = kept_by_codec(codec.build("meta"), torch.empty(x.shape, device="meta"), "none")
    assert on_meta == pytest.approx(real, rel=0.02)


def _held(world: World, stage: DiffusionStage) -> int:
    model = shard(stage.build(), world)
    return sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]


def test_shards_are_as_large_as_said() -> None:
    said = state_memory(STAGE, STAGE.build(), 2)
    held = run_world(_held, 2, STAGE)
    assert sum(held) == 2 * said.parameters
    assert (said.optimizer, said.average) == (2 * said.parameters, said.parameters)
    assert said.total == 4 * said.parameters


LARGE = STAGE.replace(
    model=DiT(depth=4, depth_single=8, width=1024, heads=8, patch=2),
    schedule=[Phase(until=64, buckets=[Bucket("256px", frames=33, batch=64, micro=16)])],
    optimizer=AdamW(lr=1e-3),
    workers=(2, 8),
    precision="bf16",
)


AUTOENCODER = AutoencoderStage(
    name="ae",
    data=Videos("none.csv"),
    vae=DCAE(channels=128),
    schedule=[Phase(until=8, buckets=[Bucket("256px", frames=32, batch=8, micro=1)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=4),
    save_every=4,
    log_every=2,
    evaluate_every=4,
)


def test_a_stage_that_does_not_fit_is_refused_with_what_would() -> None:
    bucket = LARGE.buckets[0]
    whole = needed(LARGE, LARGE.build(), bucket, 2, "none").total
    check_fit(LARGE, whole / HEADROOM * 1.001)
    with pytest.raises(InputError) as refused:
        check_fit(LARGE, whole / HEADROOM * 0.5)
    said = str(refused.value)
    assert re.search(r"stage 'tiny': bucket '256px-33f' with micro=16 needs [\d.]+ GiB", said)
    assert "recompute='full' and micro=16 fits" in said
    smaller = re.search(r"recompute='none' and micro=(\d+) fits", said)
    assert smaller is not None
    micro = int(smaller[1])
    half = LARGE.replace(schedule=[Phase(until=64, buckets=[bucket.replace(micro=micro)])])
    check_fit(half, whole / HEADROOM * 0.5)
    more = LARGE.replace(schedule=[Phase(until=64, buckets=[bucket.replace(micro=micro + 1)])])
    with pytest.raises(InputError):
        check_fit(more, whole / HEADROOM * 0.5)
    check_fit(LARGE.replace(recompute="full"), whole / HEADROOM * 0.5)


def test_more_workers_are_named_where_no_micro_batch_fits() -> None:
    room = needed(LARGE, LARGE.build(), LARGE.buckets[0], 4, "full").total / HEADROOM
    with pytest.raises(InputError, match=r"recompute='full' and workers=\(4, 8\) fits as it is$"):
        check_fit(LARGE, room * 1.001)
    check_fit(LARGE.replace(workers=(4, 8), recompute="full"), room * 1.001)
    with pytest.raises(InputError, match="nothing fits, whatever micro"):
        check_fit(LARGE, 1e6)


def test_a_round_is_planned_with_no_more_samples_than_a_worker_is_dealt() -> None:
    bucket = Bucket("256px", frames=33, batch=64, micro=16)
    phase, module = Phase(until=64, buckets=[bucket]), LARGE.build()
    stage = LARGE.replace(schedule=[phase], workers=(32, 64))
    for workers, samples in ((32, 2), (64, 1), (4, 16)):
        dealt = max(round_sizes(64, 16, workers, exact=False))
        asked = bucket.replace(micro=dealt)
        assert dealt == samples
        assert needed(stage, module, bucket, workers, "none") == needed(
            stage, module, asked, workers, "none"
        )
    exact = stage.replace(exact=True)  # rounds of which are filled up
    assert needed(exact, module, bucket, 64, "none").total > (
        needed(exact, module, bucket.replace(micro=1), 64, "none").total
    )
    room = needed(stage, module, bucket.replace(micro=2), 32, "none").total / HEADROOM
    check_fit(stage, room * 1.001)


def test_an_autoencoder_that_does_not_fit_is_refused_too() -> None:
    stage = AUTOENCODER
    check_fit(stage, 141 * GIB)
    with pytest.raises(InputError, match=r"micro=1 needs 8.* GiB .*; recompute='full' and micro=1"):
        check_fit(stage, 80 * GIB)
    check_fit(stage.replace(recompute="full"), 80 * GIB)


def test_what_judges_an_autoencoder_is_counted() -> None:
    small = Bucket("64px", frames=4, batch=8, micro=2)
    stage = AUTOENCODER.replace(schedule=[Phase(until=8, buckets=[small])])
    judged = stage.replace(
        perceptual=Lpips(weights="none.safetensors"), adversarial=Adversarial(start=0)
    )
    module, bucket = stage.build(), stage.buckets[0]
    assert isinstance(judged.adversarial, Adversarial)
    critic = sum(p.numel() for p in judged.adversarial.build("meta").parameters())
    more = state_memory(judged, module, 4).total - state_memory(stage, module, 4).total
    assert more == 16 * critic
    kept = [kept_for(each, module, bucket, "none") for each in (stage, judged)]
    # VGG16's first level alone keeps 64 channels of every pixel twice, in fp32.
    assert kept[1] - kept[0] > 2 * 4 * 64 * 64 * 64 * 4 * 2


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_recipe_fits_gpus_of_80_gib(recipe: Path) -> None:
    for stage in load_plan(recipe).stages:
        check_fit(stage, 80 * GIB)


def test_muon_is_planned_with_its_whole_matrices() -> None:
    stage = STAGE.replace(optimizer=Muon(lr=1e-3, matrix_lr=1e-2))
    module = stage.build()
    matrices = sum(p.numel() for p in module.parameters() if is_matrix(p))
    bucket = stage.buckets[0].replace(micro=1)
    need = needed(stage, module, bucket, 64, "none")
    assert need.update >= 4 * 4 * matrices
    assert need.activations == 0, "they are gone by then"


def test_fewer_gpus_than_the_stage_asks_for_are_refused() -> None:
    assert workers_on(LARGE, None) == 2
    assert workers_on(LARGE, 5) == 5
    assert workers_on(LARGE, 100) == 8
    with pytest.raises(InputError, match="it needs 2 and there are 1 GPUs"):
        workers_on(LARGE, 1)
