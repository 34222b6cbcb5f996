"""What `plan` says of the disk, against what a store takes."""

import re
from pathlib import Path

import numpy as np
import pytest

from elastic.checkpoint_store import Keep
from elastic.data.assign import Members, held_out_name
from elastic.data.clips import Clip
from elastic.data.encode import open_store, plan_job
from elastic.data.latents import Scale
from elastic.forecast import forecast, text_bytes
from elastic.forecast_json import forecast_json
from models import DiT, HunyuanVAE, T5Clip, WordHash
from stages import AdamW, Bucket, DiffusionStage, Ema, Given, Phase, Plan, Videos

CAPTIONS = ["a red circle", "one two three four five six seven eight nine", "blue"]
PLAIN = DiffusionStage(
    name="tiny",
    data=Videos("none.csv"),
    vae=HunyuanVAE(channels=4, widths=(4, 4, 8, 8), norm_groups=2, weights="none"),
    model=DiT(depth=1, depth_single=0, width=24, heads=2, patch=2),
    text=WordHash(width=8),
    schedule=(
        Phase(
            until=40,
            buckets=(Bucket("64px", frames=5, batch=4), Bucket("32px", frames=1, batch=4)),
        ),
    ),
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=10),
    save_every=8,
    log_every=8,
    evaluate_every=8,
)
GIVING = PLAIN.replace(model=PLAIN.model.replace(image_condition=True), given=Given())
SAMPLED = GIVING.replace(vae=GIVING.codec.replace(posterior="sample"))


@pytest.mark.parametrize("stage", [PLAIN, GIVING, SAMPLED], ids=["plain", "giving", "sampled"])
def test_latents_are_forecast_to_the_byte(stage: DiffusionStage, tmp_path: Path) -> None:
    rows = "\n".join(f"{number}.mp4,{text}" for number, text in enumerate(CAPTIONS))
    (tmp_path / "table.csv").write_text(f"path,text\n{rows}\n")
    (tmp_path / "weights").write_bytes(b"any")
    clips = [Clip(number, "", text, held_out=False) for number, text in enumerate(CAPTIONS)]
    members = {bucket.name: clips for bucket in stage.buckets}
    members |= {held_out_name(bucket): clips for bucket in stage.buckets}
    scale = Scale((0.0,) * 4, (1.0,) * 4)
    job = plan_job(stage, tmp_path / "weights", scale, Members(members), str(tmp_path))
    schema = open_store(job).schema
    longest = np.array([schema.text_tokens] * len(clips))
    expected = sum(
        int(part.sum())
        for bucket in stage.buckets
        for part in schema.sample_bytes(bucket.name, longest).values()
    )
    assert text_bytes(stage, CAPTIONS) == (16 * 8 + 8) * 2
    stage = stage.replace(data=Videos(str(tmp_path / "table.csv")))
    printed = forecast(Plan("p", [stage]), tmp_path)
    assert f"latents at most {expected / 1024:.3g} KiB" in printed
    assert "of text" not in printed, "how long a caption is decides it"


def test_text_that_is_stored_beside_the_latents_of_a_clip_is_said_in_each_bucket(
    tmp_path: Path,
) -> None:
    stage = PLAIN.replace(text=T5Clip(t5="t5", clip="clip"))
    most = 512 * 4096 * 2 + 768 * 2
    lines = [
        line for line in forecast(Plan("p", [stage]), tmp_path).splitlines() if "batch" in line
    ]
    assert len(lines) == 2
    for line in lines:
        assert re.search(r", [\d.]+ (KiB|B) stored a clip \+ up to 4 MiB of text$", line)
    for one, told in ((stage, most), (PLAIN, None)):
        shown = forecast_json(Plan("p", [one]), tmp_path, None, None, Keep())
        (phase,) = shown["stages"][0]["phases"]
        assert [bucket["text_bytes_a_clip_at_most"] for bucket in phase["buckets"]] == [told] * 2
