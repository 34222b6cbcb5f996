"""What a switch from HunyuanVAE to DC-AE gives: training throughput and sampling time of one clip.

The same MMDiT of 2.2 B trains and samples the latents of the same clip on one GPU: HunyuanVAE's
(stride 4x8x8, 16 channels) with patch 2 and DC-AE's (4x32x32, 128 channels) with patch 1. Each runs
as fast as this GPU allows: as many clips an update as fill it, and the recompute policy that keeps
most of what fits. Latents are random
numbers, as a step's time does not depend on them. Published, for 11 B and many GPUs (arXiv
2503.09642, section 4.3.3): 5.2 x the training throughput and more than 10 x the sampling speed.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What lies beside this script is measured, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from figure import record
from mfu import POOLED_WIDTH, SHAPE, TEXT_TOKENS, TEXT_WIDTH, fill, process_group, release, wait

from elastic.kernels import attention, attention_order, compile_blocks
from elastic.loop import build_optimizer, clip_gradients
from elastic.shard import shard
from elastic.world import World
from models import DCAE, HunyuanVAE
from models.codec import Codec
from models.dit import DiT
from models.flow import euler_sample, flow_loss_B
from models.recompute import RECOMPUTE, Recompute
from models.text import TextBatch, TextEmbedding
from stages.optimizer import AdamW

PUBLISHED_TRAINING, PUBLISHED_SAMPLING = 5.2, 10.0
GUIDANCE = 7.5
FULL = 32_768  # tokens an update that leave no part of the GPU idle
WARM_UPS, STEPS, SAMPLING_STEPS = 2, 4, 3
SETUPS: dict[str, tuple[Codec, int]] = {"HunyuanVAE": (HunyuanVAE(), 2), "DC-AE": (DCAE(), 1)}


class Clip(NamedTuple):
    """What is trained and sampled."""

    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.frames}x{self.height}x{self.width}"


CLIPS = (Clip(129, 256, 256), Clip(129, 768, 768))


class Setup:
    """A DiT for one codec's latents of one clip, with its batch on the device."""

    def __init__(self, codec: Codec, shape: DiT, clip: Clip, world: World) -> None:
        self.world, self.shape, self.codec = world, shape, codec
        grid = codec.grid(*clip)
        self.tokens = shape.tokens(grid)
        self.batch = max(1, FULL // self.tokens) if world.device.type == "cuda" else 1
        made = torch.Generator(world.device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=made, device=world.device)

        self.z_BCTHW = normal(self.batch, codec.channels, *grid)
        self.noise_BCTHW = torch.randn_like(self.z_BCTHW)
        self.t_B = torch.full((self.batch,), 0.5, device=world.device)
        text_BLD = normal(self.batch, TEXT_TOKENS, TEXT_WIDTH).bfloat16()
        self.text = TextBatch(text_BLD, None, normal(self.batch, POOLED_WIDTH))
        self.null = TextEmbedding(normal(TEXT_TOKENS, TEXT_WIDTH).bfloat16(), normal(POOLED_WIDTH))

    def model(self, policy: Recompute) -> Any:  # Any: the module is also FSDP's
        """Sharded, with random values, compiled where there is a GPU."""
        module = self.shape.build(
            self.codec.channels, TEXT_WIDTH, POOLED_WIDTH, "meta", self.codec.stride
        )
        model = shard(module.recompute(policy), self.world, "bf16")
        fill(model, self.world.device)
        if self.world.device.type == "cuda":
            compile_blocks(model)
        return model

    def train(self, steps: int) -> dict[str, Any]:
        """Seconds a clip under the first policy that fits, which is the fastest of them."""
        for policy in RECOMPUTE:
            # Released outside of `except`, whose traceback holds the model that did not fit.
            with contextlib.suppress(torch.OutOfMemoryError):
                return {"recompute": policy, "train_s": self._train(policy, steps)}
            release()
        raise MemoryError("an update does not fit this GPU, whatever is computed again")

    def _train(self, policy: Recompute, steps: int) -> float:
        model, settings = self.model(policy), AdamW(lr=1e-5)
        optimizer = build_optimizer(settings, model)

        def update() -> None:
            loss_B = flow_loss_B(model, self.z_BCTHW, self.noise_BCTHW, self.t_B, self.text)
            loss_B.mean().backward()
            clip_gradients(model, settings.max_norm, self.world)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return median_s(update, steps, self.world) / self.batch

    def sample(self, steps: int) -> float:
        """Seconds of one step of guided sampling of one clip."""
        model = self.model("none")

        def walk() -> None:
            euler_sample(
                model,
                self.noise_BCTHW[:1],
                TextBatch(self.text.text_BLD[:1], None, self.text.pooled_BD[:1]),
                self.null,
                steps=steps,
                guidance=GUIDANCE,
                alpha=3.0,
            )

        return median_s(walk, 1, self.world) / steps


def median_s(work: Callable[[], None], times: int, world: World) -> float:
    """Median seconds, after what is compiled is compiled."""
    for _ in range(WARM_UPS):
        work()
    taken = []
    for _ in range(times):
        wait(world)
        began = time.perf_counter()
        work()
        wait(world)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one clip; a tiny one without a GPU")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing after so long")
    asked = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not asked.quick:
        print("switch.py measures a GPU and there is none; --quick runs a tiny model on the CPU")
        return 2
    clips = CLIPS[:1] if asked.quick else CLIPS
    shape = SHAPE
    if not has_gpu:
        clips = (Clip(5, 64, 64),)
        shape = DiT(depth=1, depth_single=1, width=64, heads=2)
    began, figures = time.monotonic(), {}
    with process_group(torch.device("cuda", 0) if has_gpu else torch.device("cpu")) as world:
        for clip in clips:
            each: dict[str, Any] = {}
            for name, (codec, patch) in SETUPS.items():
                if time.monotonic() - began > asked.seconds:
                    continue
                setup = Setup(codec, shape.replace(patch=patch), clip, world)
                with attention(attention_order(world.device)):
                    each[name] = {"tokens": setup.tokens, "batch": setup.batch}
                    each[name] |= setup.train(STEPS)
                    release()
                    each[name]["sample_step_s"] = setup.sample(SAMPLING_STEPS)
                    release()
                print(clip.name, name, json.dumps(each[name]), flush=True)
            if len(each) == len(SETUPS):
                figures[clip.name] = {**each, **ratios(each)}
    last = figures.get(CLIPS[-1].name)
    record(
        "switch",
        figures={
            **figures,
            "published": {"training": PUBLISHED_TRAINING, "sampling": PUBLISHED_SAMPLING},
        },
        goal="at 768 px, 129 frames, DC-AE trains and samples at least 4 times as fast",
        holds=last is not None and last["training"] >= 4 and last["sampling"] >= 4,
        keep=has_gpu and not asked.quick,
    )
    return 0


def ratios(each: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast it goes with DC-AE."""
    old, new = (each[name] for name in SETUPS)
    return {
        "training": round(old["train_s"] / new["train_s"], 2),
        "sampling": round(old["sample_step_s"] / new["sample_step_s"], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
