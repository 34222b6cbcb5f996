"""A run folder as a driver would leave it, written in a second: four stages and their faults."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from elastic.data.moving_shapes import render
from elastic.film import write_mp4
from elastic.journal import EVENTS, METRICS, Journal

HOSTILE = "<script>alert('x')</script>\"&lt;@@BODY@@"
T0 = 1_800_000_000.0


class Machines:
    """Writes the journals that a driver would write, with a clock of its own."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.events = Journal(run_dir / EVENTS)
        self.metrics = Journal(run_dir / METRICS)
        self.now = T0
        self.attempt = 0

    def event(self, kind: str, after: float = 1.0, **fields: Any) -> None:
        self.now += after
        line = {"stage": None, "position": None, "attempt": self.attempt, "world": None}
        self.events.append(wall=self.now, kind=kind, **{**line, "reason": "", **fields})

    def start(self, stage: str, position: int, world: int, after: float = 4.0) -> None:
        self.attempt += 1
        self.event("start", after, stage=stage, position=position, world=world)

    def steps(self, stage: str, begin: int, end: int, world: int, top: float, psnr: bool) -> None:
        """Log every 20 samples at 4 samples a second for each worker; wait for a tenth of it."""
        for position in range(begin + 20, end + 1, 20):
            seconds = 20 / (4 * world)
            self.now += seconds
            loss = 0.2 + top * math.exp(-position / 150)
            overall = {"loss": loss, "lr": 1e-3, "grad_norm": 1.0, "data_wait": 0.1}
            overall |= {"samples_per_s": 20 / seconds, "tokens_per_s": 999.0}
            # A stage without PSNR is a DiT's, whose loss is known by level of noise.
            by_level = {} if psnr else {f"loss_t{k}": loss * (8 - k) / 4 for k in range(8)}
            for context, values in (
                ({"bucket": "64px-17f"}, {"loss": loss}),
                ({"bucket": "64px-1f"}, {"loss": loss / 2}),
                ({}, overall | by_level),
            ):
                self.metric(stage, position, world, context, values)
            if position % 100 == 0:
                held_out = {"loss": loss * 1.1} | (
                    {"psnr": 30 - 10 * loss, "ssim": 1 - loss} if psnr else by_level
                )
                self.metric(stage, position, world, {"subset": "held_out"}, held_out)

    def metric(
        self, stage: str, position: int, world: int, context: dict[str, str], values: dict[str, Any]
    ) -> None:
        self.metrics.append(
            wall=self.now,
            stage=stage,
            attempt=self.attempt,
            position=position,
            world=world,
            context=context,
            values=values,
            order_digest="00",
        )

    def preview(self, stage: str, position: int, captions: list[str], colour: str) -> None:
        folder = self.run_dir / "samples" / stage / str(position)
        folder.mkdir(parents=True)
        paths = [folder / f"{number:02d}.mp4" for number in range(len(captions))]
        for number, path in enumerate(paths):
            film_THWC = render("circle", colour, "right", "quickly", (64, 64), 17, 8, number)
            write_mp4(path, film_THWC, 8)
        told = [str(path.relative_to(self.run_dir)) for path in paths]
        self.event(
            "preview", 2.0, stage=stage, position=position, paths=told, captions=captions,
            seconds=2.0,
        )  # fmt: skip

    def finish(
        self, stage: str, position: int, captions: list[str], colour: str, is_pair: bool = False
    ) -> None:
        self.event("publish", 2.0, stage=stage, position=position, path="x", seconds=2.0)
        self.event("stage_end", 0.0, stage=stage, position=position)
        paths = []
        folder = self.run_dir / "samples" / stage.replace("/", "_")[:20]
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(captions)):
            film_THWC = render("circle", colour, "right", "quickly", (64, 64), 17, 8, number)
            if is_pair:  # a clip and what a codec gives back of it
                film_THWC = np.concatenate([film_THWC, film_THWC // 2], axis=2)
            path = folder / f"{number}.mp4"
            write_mp4(path, film_THWC, 8)
            paths.append(str(path.relative_to(self.run_dir)))
        self.event("sample", 5.0, stage=stage, position=position, paths=paths, captions=captions)


def write_run(
    run_dir: Path, second: str = "dit-hunyuan", captions: list[str] | None = None
) -> None:
    """Four stages: a crash at 260 of 400 in the second, a resize from 2 to 3 in the fourth."""
    captions = captions or [f"a red circle moving right quickly, number {i}" for i in range(4)]
    write_record(run_dir, second)
    m = Machines(run_dir)
    m.event("run_start", 0.0, gpus=True)
    m.event("stage_start", stage="hunyuan-vae")
    m.start("hunyuan-vae", 0, 2)
    m.steps("hunyuan-vae", 0, 400, 2, 3.0, psnr=True)
    m.finish("hunyuan-vae", 400, captions, "red", is_pair=True)

    m.event("stage_start", stage=second)
    m.event("encode_start", 0.0, stage=second)
    m.event("encode_end", 20.0, stage=second, clips=640, quarantined=5, seconds=20.0)
    m.start(second, 0, 2)
    m.steps(second, 0, 200, 2, 1.0, psnr=False)
    m.event("publish", 1.0, stage=second, position=200, path="x", seconds=1.0)
    m.steps(second, 200, 260, 2, 1.0, psnr=False)
    m.event("fault_injected", 0.5, stage=second, what="kill -9 of worker 1")
    m.event("crash", 0.5, stage=second, reason="worker 1 died: signal 9")
    m.start(second, 200, 2, after=6.0)
    m.steps(second, 200, 400, 2, 1.0, psnr=False)
    m.finish(second, 400, captions, "blue")

    m.event("stage_start", stage="dc-ae")
    m.start("dc-ae", 0, 2)
    m.steps("dc-ae", 0, 200, 2, 3.0, psnr=True)
    m.finish("dc-ae", 200, captions, "green", is_pair=True)

    m.event("stage_start", stage="dit-dc-ae")
    m.start("dit-dc-ae", 0, 2)
    m.steps("dit-dc-ae", 0, 100, 2, 1.0, psnr=False)
    m.event("capacity", 0.5, nodes=2)
    m.event("resize_requested", 0.5, stage="dit-dc-ae", world_from=2, world_to=3, reason="2 -> 3")
    m.event("publish", 1.0, stage="dit-dc-ae", position=100, path="x", seconds=1.0)
    m.start("dit-dc-ae", 100, 3, after=5.0)
    m.steps("dit-dc-ae", 100, 200, 3, 1.0, psnr=False)
    m.preview("dit-dc-ae", 200, captions[:2], "white")
    m.steps("dit-dc-ae", 200, 300, 3, 1.0, psnr=False)
    m.preview("dit-dc-ae", 300, captions[:2], "green")
    m.steps("dit-dc-ae", 300, 400, 3, 1.0, psnr=False)
    m.finish("dit-dc-ae", 400, captions, "yellow")
    m.event("run_end", 0.0)


def write_record(run_dir: Path, second: str) -> None:
    """run.json, and what the stages wrote about their starts and ends."""
    vae, dit = {"name": "hunyuan-vae", "init": {"seed": 0}}, {"name": second, "model": {"patch": 2}}
    stages = [
        vae,
        {**dit, "init": {"seed": 1}},
        {"name": "dc-ae", "init": {"seed": 2}},
        {"name": "dit-dc-ae", "model": {"patch": 1}, "init": {"stage": dit, "warmup_samples": 0}},
    ]
    run = {"schema": 2, "plan": "demo", "versions": {"torch": "2.13.0", "evil": HOSTILE}}
    (run_dir / "run.json").write_text(json.dumps({**run, "definition": {"stages": stages}}))
    totals: list[dict[str, Any]] = [{"new": {"tensors": 180, "parameters": 790_531}}] * 3
    totals.append({"loaded": {"parameters": 700_000}, "new": {"parameters": 531}})
    for stage, total, policy in zip(stages, totals, ["Fresh"] * 3 + ["KeepTrunk"], strict=True):
        folder = run_dir / "stages" / str(stage["name"])
        if stage["name"] == HOSTILE:
            continue  # holds slashes: no stage of a plan is called so
        folder.mkdir(parents=True)
        (folder / "init.json").write_text(json.dumps({"policy": policy, "totals": total}))
        (folder / "finished.json").write_text(json.dumps({"weights_sha256": f"5a{len(policy)}"}))
        if "model" in stage:
            pin = {"fingerprint": "f1f1", "digest": "d1d1", "weights_sha256": "c0dec"}
            (folder / "latents.json").write_text(json.dumps(pin))
