"""What the log says of speed: counts right against torch's own, and the same on any world."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import STAGE, Turn, in_turn, train, world_of_one
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from worlds import run_world

from elastic import meter as metering
from elastic.data.load import Micro, Samples
from elastic.device_peaks import memory_peak, peak_of
from elastic.goodput import account_of
from elastic.journal import Metric
from elastic.speed import speed_lines
from elastic.summary import History
from elastic.workload import (
    codec_flops,
    dit_flops,
    model_flops,
    useful_tokens,
    video_tokens,
    workload,
)
from models import DCAE, DiT
from models.text import TextBatch
from stages import AdamW, AutoencoderStage, Bucket, Ema, Phase, Videos

CLIP = STAGE.buckets[0]
AUTOENCODER = AutoencoderStage(
    name="ae",
    data=Videos("none.csv"),
    vae=DCAE(
        channels=8,
        widths=(8, 8, 8, 16, 16, 16),
        encoder_depths=(1, 1, 1, 1, 1, 1),
        decoder_depths=(1, 1, 1, 1, 1, 1),
        head_width=8,
    ),
    schedule=[Phase(until=8, buckets=[Bucket("32px", frames=4, batch=8)])],
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=4),
    save_every=4,
    log_every=2,
    evaluate_every=4,
)


def micro_of(real: list[bool]) -> Micro:
    """A micro-batch in which these samples count."""
    ids = np.arange(len(real))
    samples = Samples(torch.zeros(len(real)), None, ids, torch.tensor(real).float())
    return Micro(0, CLIP, samples, ids, True, len(real))


@given(drawn=st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=6))
def test_padding_and_samples_of_no_weight_are_computed_and_of_no_use(
    drawn: list[tuple[bool, int]],
) -> None:
    real, lengths = [is_real for is_real, _ in drawn], [length for _, length in drawn]
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    text = TextBatch(torch.zeros(*mask_BL.shape, 8), mask_BL, torch.zeros(len(drawn), 8))
    work = workload(STAGE, micro_of(real), text)
    video = video_tokens(STAGE, CLIP)
    assert work.computed == len(drawn) * (video + max(lengths))
    kept = [length for is_real, length in drawn if is_real]
    assert list(work.lengths) == kept
    assert useful_tokens(STAGE, CLIP, Counter(kept)) == sum(video + n for n in kept)
    assert model_flops(STAGE, CLIP, Counter(kept)) == sum(dit_flops(STAGE, CLIP, n) for n in kept)
    whole = workload(STAGE, micro_of(real), text._replace(mask_BL=None))
    assert set(whole.lengths) <= {max(lengths)}, "without a mask every token is real"


@pytest.mark.parametrize("text", [1, 40, 200])
@pytest.mark.parametrize(
    "shape",
    [
        DiT(depth=2, depth_single=4, width=96, heads=4, patch=2),
        DiT(depth=0, depth_single=6, width=64, heads=2, patch=1, mlp_ratio=2.5),
        DiT(depth=5, depth_single=0, width=128, heads=2, patch=2, qkv_bias=False),
    ],
    ids=["both", "single", "double"],
)
def test_training_flops_agree_with_pytorchs_counter(shape: DiT, text: int) -> None:
    stage = STAGE.replace(model=shape)
    bucket = Bucket("64px", frames=9, batch=4)
    model = stage.build().to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    t, h, w = stage.codec.grid(bucket.frames, bucket.height, bucket.width)
    z_BCTHW = torch.randn(1, stage.codec.channels, t, h, w)
    width = stage.text.width
    # The counter does not know the CPU's fused attention; the plain one is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        inputs = torch.randn(1, text, width), None, torch.randn(1, stage.text.pooled_width)
        model(z_BCTHW, torch.rand(1), *inputs).sum().backward()
    assert dit_flops(stage, bucket, text) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_codecs_flops_are_those_of_three_forward_passes() -> None:
    bucket = AUTOENCODER.buckets[0]
    codec = AUTOENCODER.vae.build()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        codec(torch.randn(1, 3, bucket.frames, bucket.height, bucket.width))
    assert codec_flops(AUTOENCODER, bucket) == 3 * counter.get_total_flops() > 0


def test_any_world_counts_the_same_flops_and_says_what_it_wastes(tmp_path: Path) -> None:
    turns = [Turn(size, train, (tmp_path / str(size), 8)) for size in (1, 2, 3)]
    results = run_world(in_turn, 3, tmp_path, turns)[0]
    counted, shares = [], []
    for size, attempt in enumerate(results, 1):
        lines = [line["values"] for line in attempt.lines if not line["context"]]
        # Both are rates over the same seconds.
        counted.append([x["flops_per_device"] * size / x["samples_per_s"] for x in lines])
        shares.append([x["useful_tokens"] for x in lines])
        for x in lines:
            assert x["tokens_per_s_per_worker"] == pytest.approx(x["tokens_per_s"] / size)
            assert 0 <= x["data_wait"] <= 1
            assert x["memory_peak"] > 1e8, "a process that has imported torch"
            assert "mfu" not in x, "nobody knows the peak of a CPU"
    assert counted[1] == pytest.approx(counted[0], rel=1e-9)
    assert counted[2] == pytest.approx(counted[0], rel=1e-9)
    most = max(dit_flops(STAGE, bucket, 3) for bucket in STAGE.buckets)
    least = min(dit_flops(STAGE, bucket, 1) for bucket in STAGE.buckets)
    assert all(least <= each <= most for each in counted[0])
    assert all(0 < share < 1 for share in shares[0]), "captions of several lengths are padded"
    # Batches of 5 in micro-batches of 2 are 3 rounds on one rank, and 4 with a filler on two.
    assert shares[1][0] < shares[0][0]


def test_mfu_is_of_the_peaks_of_all_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metering, "peak_flops", lambda device: 4e9)
    with world_of_one() as world:
        lines = [one["values"] for one in train(world, tmp_path, 8).lines if not one["context"]]
    assert lines
    for values in lines:
        assert values["mfu"] == pytest.approx(values["flops_per_device"] / 4e9)


NAMES = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H200": 989.4,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA L40S": 362.05,
    "NVIDIA B200": 2250.0,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA A1000": None,
    "NVIDIA GeForce RTX 3060": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_peak_is_known_or_not_invented(name: str) -> None:
    found = peak_of(name)
    assert (found and found / 1e12) == NAMES[name]


def test_the_memory_peak_is_what_was_taken_at_most() -> None:
    with world_of_one() as world:
        before = memory_peak(world.device)
        block = torch.ones(100_000_000, dtype=torch.float32)
        held = memory_peak(world.device)
        del block
        assert held >= 4e8
        # The kernel adds its counts up now and then, so they are a few pages off.
        assert memory_peak(world.device) == pytest.approx(held, rel=0.01)
        assert held >= before


@given(rates=st.lists(st.integers(1, 10**6), min_size=1, max_size=9))
def test_status_shows_the_medians_of_the_newest_attempt(rates: list[int]) -> None:
    metrics: list[Metric] = [
        {
            "wall": float(number),
            "stage": "dit",
            "attempt": attempt,
            "world": attempt,
            "position": 10 * attempt + number,
            "context": {},
            "values": {"tokens_per_s": rate, "memory_peak": rate * 2**20, "loss": None},
        }
        for attempt, found in ((1, [7 * 10**7]), (2, rates))
        for number, rate in enumerate(found)
    ]
    (line,) = speed_lines(History([], metrics, account_of([]), []))
    median, most = float(np.median(rates)), max(rates) / 2**10
    assert line == f"speed of dit on 2: {median:,.0f} tokens/s, {most:,.2f} GiB at most"
