"""How unlike two clips look: LPIPS, the pyramid, SSIM, each against a slow reference."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import save_file
from tiny import losses_of
from torch import Tensor
from torch.nn import functional

from elastic.data.load import Micro, Samples
from elastic.ema import EmaWeights
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.loop import build_optimizer
from elastic.objective import Reconstructing
from elastic.record import check_unchanged, start_stage
from elastic.state import Progress, TrainState
from models import DCAE, HunyuanVAE
from models.perceptual import Lpips, LpipsModule, Pyramid, check_lpips
from models.reconstruction import ssim_B
from stages import AdamW, AutoencoderStage, Bucket, Ema, Phase, Plan, Videos

# VGG16 as torchvision lists it: the index of each convolution, its input and output channels.
CONVOLUTIONS = (
    (0, 3, 64), (2, 64, 64),
    (5, 64, 128), (7, 128, 128),
    (10, 128, 256), (12, 256, 256), (14, 256, 256),
    (17, 256, 512), (19, 512, 512), (21, 512, 512),
    (24, 512, 512), (26, 512, 512), (28, 512, 512),
)  # fmt: skip
LEVEL_ENDS = (3, 8, 15, 22, 29)  # the ReLU after which each level's features are taken
POOLS = (4, 9, 16, 23)

STAGE = AutoencoderStage(
    name="dc-ae",
    data=Videos("none.csv"),
    vae=DCAE(
        channels=16,
        widths=(8, 8, 8, 16, 16, 16),
        encoder_depths=(0, 1, 1, 1, 1, 1),
        decoder_depths=(0, 1, 1, 1, 1, 1),
        head_width=8,
    ),
    schedule=[Phase(until=8, buckets=[Bucket("32px", frames=4, batch=4)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=8),
    save_every=8,
    log_every=8,
    evaluate_every=8,
)


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drawn_weights() -> dict[str, Tensor]:
    """Random tensors under every key, and one key that is not needed."""
    generator = torch.Generator().manual_seed(3)
    tensors = {"classifier.0.weight": torch.zeros(2)}
    for index, inside, outside in CONVOLUTIONS:
        kernel = torch.randn(outside, inside, 3, 3, generator=generator)
        tensors[f"features.{index}.weight"] = kernel * (2 / (9 * inside)) ** 0.5
        tensors[f"features.{index}.bias"] = 0.1 * torch.randn(outside, generator=generator)
    for level, width in enumerate((64, 128, 256, 512, 512)):
        head = torch.rand(1, width, 1, 1, generator=generator)
        tensors[f"lin{level}.model.1.weight"] = head
    return tensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(drawn_weights(), path)
    return path


def slow_lpips(tensors: dict[str, Tensor], x_CHW: Tensor, y_CHW: Tensor) -> float:
    """Layer by layer as the paper has it, for one frame, in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    a, b = ((frame.double() - shift) / scale for frame in (x_CHW, y_CHW))
    convolutions = [index for index, _, _ in CONVOLUTIONS]
    total = 0.0
    for layer in range(30):
        if layer in convolutions:
            kernel = tensors[f"features.{layer}.weight"].double()
            bias = tensors[f"features.{layer}.bias"].double()
            a, b = (functional.conv2d(x[None], kernel, bias, padding=1)[0] for x in (a, b))
        elif layer in POOLS:
            a, b = (x.unfold(1, 2, 2).unfold(2, 2, 2).amax((3, 4)) for x in (a, b))
        else:
            a, b = a.clamp(min=0), b.clamp(min=0)
        if layer in LEVEL_ENDS:
            unit_a, unit_b = (x / (x.square().sum(0).sqrt() + 1e-10) for x in (a, b))
            head = tensors[f"lin{LEVEL_ENDS.index(layer)}.model.1.weight"].double().flatten()
            total += float(((unit_a - unit_b) ** 2 * head[:, None, None]).sum(0).mean())
    return total


def test_lpips_is_the_mean_over_frames_of_the_published_sum(weights: Path) -> None:
    x_BCTHW, y_BCTHW = clips(2, 3, 2, 32, 48), clips(2, 3, 2, 32, 48, seed=1)
    lpips_B = Lpips(weights=str(weights)).build()(x_BCTHW, y_BCTHW)
    tensors = drawn_weights()
    expected_B = [
        np.mean([slow_lpips(tensors, x_CTHW[:, t], y_CTHW[:, t]) for t in range(2)])
        for x_CTHW, y_CTHW in zip(x_BCTHW, y_BCTHW, strict=True)
    ]
    assert min(expected_B) > 0.01
    torch.testing.assert_close(lpips_B, torch.tensor(expected_B).float(), rtol=1e-4, atol=0)


def test_lpips_is_frozen_and_its_slope_is_finite_where_clips_are_equal(weights: Path) -> None:
    module = Lpips(weights=str(weights)).build()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    x_BCTHW = torch.zeros(1, 3, 1, 32, 32)  # flat: whole features are zero
    y_BCTHW = x_BCTHW.clone().requires_grad_()
    module(x_BCTHW, y_BCTHW).sum().backward()
    assert y_BCTHW.grad is not None
    assert y_BCTHW.grad.isfinite().all()
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, -1.0)  # every ReLU is shut
    y_BCTHW.grad = None
    module(x_BCTHW, y_BCTHW).sum().backward()
    assert y_BCTHW.grad.isfinite().all()


def test_a_file_that_is_not_lpips_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"no such file.*Pyramid\(\)"):
        check_lpips(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        check_lpips(path)
    tensors = drawn_weights()
    missing = {k: v for k, v in tensors.items() if not k.startswith("lin")}
    save_file(missing, path)
    with pytest.raises(ValueError, match=r"5 of 31 tensors are missing, such as lin0\.model\.1"):
        check_lpips(path)
    half = {**tensors, "features.0.bias": torch.zeros(64, dtype=torch.float16)}
    save_file(half, path)
    with pytest.raises(ValueError, match=r"features\.0\.bias is \[64\] F16, not \[64\] F32"):
        Lpips(weights=str(path)).build()


@pytest.mark.parametrize(
    ("size", "nearest"), [("8px", "16x16"), ("8x64", "16x64"), ("64x8", "64x16"), ("16px", None)]
)
def test_clips_too_small_for_lpips_are_refused_with_the_nearest_size(
    size: str, nearest: str | None
) -> None:
    """Those that are taken do go through it."""
    vae = HunyuanVAE(channels=4, widths=(4, 4, 8, 8), layers=1, norm_groups=2)
    schedule = [Phase(until=8, buckets=[Bucket(size, frames=5, batch=4)])]
    small = STAGE.replace(vae=vae, schedule=schedule, perceptual=Pyramid())
    lpips = Lpips(weights="none.safetensors")
    if nearest is None:
        x_BCTHW = clips(1, 3, 1, 16, 16)
        assert small.replace(perceptual=lpips).perceptual == lpips
        assert LpipsModule()(x_BCTHW, -x_BCTHW).isfinite().all()
        return
    words = rf"'dc-ae': schedule\[0\]\.buckets\[0\]: '{size}' is too small .*nearest is '{nearest}'"
    with pytest.raises(ValidationError, match=words):
        small.replace(perceptual=lpips)


def test_lpips_counts_by_its_content_wherever_it_lies(weights: Path, tmp_path: Path) -> None:
    def plan(path: Path) -> Plan:
        return Plan("plan", [STAGE.replace(perceptual=Lpips(weights=str(path)))])

    copy = tmp_path / "copy.safetensors"
    shutil.copy(weights, copy)
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    start_stage(folder, plan(weights).stages[0])
    check_unchanged(folder, plan(copy))
    save_file({**drawn_weights(), "features.0.bias": torch.zeros(64)}, copy)
    with pytest.raises(InputError, match=r"perceptual\.weights_sha256: '\w+' -> '\w+'"):
        check_unchanged(folder, plan(copy))


def test_a_stage_with_either_perceptual_loss_reads_back_from_json() -> None:
    for loss in (Lpips(weights="x.safetensors", weight=0.4), Pyramid(weight=0.4, levels=2), None):
        stage = STAGE.replace(perceptual=loss)
        assert AutoencoderStage.model_validate_json(stage.model_dump_json()) == stage
        dumped = json.loads(json.dumps(stage.model_dump(mode="json")))
        assert AutoencoderStage.model_validate(dumped) == stage


def test_a_worker_without_the_file_ends_the_stage_and_is_not_tried_again(tmp_path: Path) -> None:
    """Ray Train tries again whatever is no InputError."""
    path = tmp_path / "gone.safetensors"
    nothing: Any = None  # no sample is read
    for _ in range(2):
        with pytest.raises(InputError, match=rf"'dc-ae': perceptual: .*'{path}'.*every machine"):
            Reconstructing(STAGE.replace(perceptual=Lpips(weights=str(path))), nothing, nothing)
        path.write_bytes(b"not a file of tensors")


def test_lpips_is_a_part_of_the_loss_and_no_part_of_the_state(weights: Path) -> None:
    stage = STAGE.replace(perceptual=Lpips(weights=str(weights), weight=0.4))
    nothing: Any = None  # no sample is read
    goal = Reconstructing(stage, nothing, nothing)
    model = stage.codec.build()
    bucket, x_BCTHW, ids = stage.buckets[0], clips(2, 3, 4, 32, 32), np.arange(2)
    samples = Samples(x_BCTHW, None, ids, torch.ones(2))
    micro = Micro(0, bucket, samples, np.zeros_like(ids), True, 2)
    losses = losses_of(goal, model, micro)
    distance_B = Lpips(weights=str(weights)).build()(x_BCTHW, model(x_BCTHW).x_BCTHW)
    torch.testing.assert_close(losses.parts_B["loss_perceptual"], 0.4 * distance_B)
    torch.testing.assert_close(losses.model_B, sum(losses.parts_B.values()))
    losses.both_B.sum().backward()
    optimizer = build_optimizer(stage.optimizer, model)
    ema = EmaWeights(model, stage.ema)
    state = TrainState(stage, model, optimizer, ema, Progress(stage.name), goal.critic)
    codec = {name for name, _ in goal.build().named_parameters()}
    assert {name.partition("/")[2] for name in state.tensors()} == codec


def slow_pyramid(x_HW: NDArray[np.float64], levels: int) -> float:
    """The sum of the bands' mean absolute values, block by block."""
    total = 0.0
    for _ in range(levels - 1):
        if min(x_HW.shape) < 2:
            break
        height, width = x_HW.shape
        coarse = np.array(
            [
                [x_HW[i : i + 2, j : j + 2].mean() for j in range(0, width, 2)]
                for i in range(0, height, 2)
            ]
        )
        band = [[x_HW[i, j] - coarse[i // 2, j // 2] for j in range(width)] for i in range(height)]
        total += float(np.abs(band).mean())
        x_HW = coarse
    return total + float(np.abs(x_HW).mean())


@pytest.mark.parametrize("size", [(32, 32), (9, 14), (1, 5)])
def test_the_pyramid_sums_the_mean_absolute_errors_of_its_bands(size: tuple[int, int]) -> None:
    x_BCTHW, y_BCTHW = clips(2, 3, 2, *size), clips(2, 3, 2, *size, seed=1)
    loss_B = Pyramid(levels=4).build()(x_BCTHW, y_BCTHW)
    error = (y_BCTHW - x_BCTHW).double().numpy()
    expected_B = [
        np.mean([slow_pyramid(error[b, c, t], 4) for c in range(3) for t in range(2)])
        for b in range(2)
    ]
    torch.testing.assert_close(loss_B, torch.tensor(expected_B).float(), rtol=1e-5, atol=0)


def test_the_pyramid_has_no_parameters_and_is_zero_for_equal_clips() -> None:
    module = Pyramid().build()
    assert not list(module.parameters())
    assert torch.equal(module(clips(2, 3, 1, 32, 32), clips(2, 3, 1, 32, 32)), torch.zeros(2))


def slow_ssim(x_HW: NDArray[np.float64], y_HW: NDArray[np.float64]) -> float:
    """Place by place, for one channel of one frame with pixels in [0, 1] (Wang et al. 2004)."""
    fitting = min(11, *x_HW.shape)
    window = fitting if fitting % 2 else fitting - 1
    at = np.arange(window) - window // 2
    weights = np.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for i in range(x_HW.shape[0] - window + 1):
        for j in range(x_HW.shape[1] - window + 1):
            x, y = (p[i : i + window, j : j + window] for p in (x_HW, y_HW))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            values.append(
                (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
                / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))
            )  # fmt: skip
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(16, 19), (8, 16), (32, 4)])
def test_ssim_is_the_published_formula_per_frame_and_channel(size: tuple[int, int]) -> None:
    x_BCTHW = clips(2, 3, 2, *size)
    y_BCTHW = x_BCTHW + 0.4 * clips(2, 3, 2, *size, seed=1)  # some beyond [-1, 1]: clamped
    x, y = (p.double().clamp(-1, 1).numpy() / 2 + 0.5 for p in (x_BCTHW, y_BCTHW))
    expected_B = [
        np.mean([slow_ssim(x[b, c, t], y[b, c, t]) for c in range(3) for t in range(2)])
        for b in range(2)
    ]
    assert 0.3 < min(expected_B) < 0.99
    torch.testing.assert_close(
        ssim_B(x_BCTHW, y_BCTHW), torch.tensor(expected_B).float(), rtol=1e-4, atol=0
    )


def test_ssim_of_equal_clips_is_one() -> None:
    torch.testing.assert_close(ssim_B(clips(2, 3, 1, 8, 8), clips(2, 3, 1, 8, 8)), torch.ones(2))
