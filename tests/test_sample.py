"""Sampling: a first frame, guidance as an input, the null text of the store."""

# B sample, C channel, T frame, H, W latent grid

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from tiny_text import change_weights, tiny_t5_clip
from torch import Tensor

from elastic import sample, sampler
from elastic.cli import main
from elastic.course import sample_request
from elastic.data.decode import to_unit
from elastic.data.encode import FIELDS
from elastic.data.latents import Scale
from elastic.data.store import BucketPlan, LatentStore, StoreSchema
from elastic.errors import InputError, StageBlocked
from elastic.files import write_atomic
from elastic.film import read_mp4
from elastic.folders import LATENT_PINS, RunFolder
from elastic.record import write_record
from elastic.sample import SampleRequest, longest_bucket, make_samples, read_image
from elastic.weights import FINISHED, WEIGHTS, load_weights
from models import DiT, HunyuanVAE, T5Clip, WordHash
from models import t5_clip as text_module
from models.fresh import named_generator
from models.text import TextEmbedding
from stages import AdamW, Bucket, DiffusionStage, Ema, Given, Phase, Plan, Videos

CODEC = HunyuanVAE(channels=4, widths=(4, 4, 8, 8), layers=1, norm_groups=2, weights="none")
STAGE = DiffusionStage(
    name="tiny",
    data=Videos("none.csv"),
    vae=CODEC,
    model=DiT(depth=1, depth_single=0, width=24, heads=2, patch=2, image_condition=True),
    text=WordHash(width=8),
    given=Given(),
    schedule=(Phase(until=40, buckets=(Bucket("32px", frames=5, batch=2),)),),
    optimizer=AdamW(lr=1e-3),
    ema=Ema(halflife=10),
    rate=8.0,
    save_every=8,
    log_every=8,
    evaluate_every=8,
)
CLIPS = longest_bucket(STAGE)
SCALE = Scale((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 1.0, 0.5))
CAPTIONS = ("a red circle", "blue")


def _write(module: torch.nn.Module, path: Path) -> Path:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    drawn = {
        name: 0.2 * torch.randn(shape, generator=named_generator(0, name))
        for name, shape in shapes.items()
    }
    save_file(drawn, path)
    return path


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., SampleRequest]:
    def make(stage: DiffusionStage = STAGE, **more: Any) -> SampleRequest:
        return SampleRequest(
            stage=stage,
            bucket=longest_bucket(stage),
            weights=_write(stage.build(), tmp_path / "dit.safetensors"),
            codec_weights=_write(CODEC.build(), tmp_path / "vae.safetensors"),
            scale=SCALE,
            null=stage.text.null(),
            captions=CAPTIONS,
            folder=tmp_path / "out",
            steps=2,
            **more,
        )

    return make


@pytest.fixture
def conditions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, Tensor | None]]:
    """What the model was conditioned on, call by call."""
    seen = []
    original = sampler.conditioned

    def recorded(model: Any, guidance: float | None, given: Tensor | None) -> Any:
        seen.append((guidance, given))
        return original(model, guidance, given)

    monkeypatch.setattr(sampler, "conditioned", recorded)
    return seen


def _picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.mark.parametrize("name", ["first.png", "first.jpg"])
def test_a_picture_is_given_as_the_first_frame(
    name: str,
    request_for: Callable[..., SampleRequest],
    conditions: list[tuple[float | None, Tensor | None]],
    tmp_path: Path,
) -> None:
    path = _picture(tmp_path / name, (200, 40, 90), size=(64, 48))  # cropped at its sides
    wanted = request_for(image=path)
    assert len(make_samples(wanted)) == 2
    ((guidance, given_BCTHW),) = conditions
    assert guidance is None
    assert given_BCTHW is not None
    assert given_BCTHW.shape == (2, 5, 2, 4, 4)
    assert given_BCTHW[:, 0].unique().tolist() == [0, 1]
    assert (given_BCTHW[:, 0, 0] == 1).all()
    assert not given_BCTHW[:, :, 1].any()
    codec = load_weights(CODEC.build(), wanted.codec_weights)
    colour = to_unit(torch.tensor([200, 40, 90]).view(1, 3, 1, 1, 1)).expand(-1, -1, 1, 32, 32)
    still = SCALE.normalise(codec.encode(colour))
    # A JPEG is a few levels off.
    torch.testing.assert_close(given_BCTHW[:1, 1:, :1], still, rtol=0.05, atol=0.05)


def test_the_picture_decides_what_is_made(
    request_for: Callable[..., SampleRequest], tmp_path: Path
) -> None:
    made: list[np.ndarray[Any, Any]] = []
    red, blue = ((tmp_path / f"{name}.png") for name in ("red", "blue"))
    for image in (
        None,
        _picture(red, (250, 0, 0)),
        _picture(blue, (0, 0, 250)),
        _picture(red, (250, 0, 0)),
    ):
        made.append(read_mp4(make_samples(request_for(image=image, guidance=2.0))[0]).frames_THWC)
    assert np.array_equal(made[1], made[3])
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[1], made[2])


def test_a_model_that_takes_guidance_runs_once_with_it(
    request_for: Callable[..., SampleRequest],
    conditions: list[tuple[float | None, Tensor | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    original = sampler.euler_sample

    def recorded(*arguments: Any, **more: Any) -> Tensor:
        asked.append(more["guidance"])
        return original(*arguments, **more)

    monkeypatch.setattr(sampler, "euler_sample", recorded)
    stage = STAGE.replace(model=STAGE.model.replace(guidance=True))
    make_samples(request_for(stage, guidance=3.5))
    make_samples(request_for(guidance=3.5))
    assert [guidance for guidance, _ in conditions] == [3.5, None]
    assert asked == [1.0, 3.5]


def test_an_image_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    image = _picture(tmp_path / "a.png", (1, 2, 3))
    plain = STAGE.replace(model=STAGE.model.replace(image_condition=False), given=None)
    with pytest.raises(InputError, match=r"'tiny' takes no first frame: .*image_condition=True"):
        read_image(image, plain, CLIPS)
    with pytest.raises(InputError, match=r"'tiny' takes no first frame: .*Given\(head=0\)"):
        read_image(image, STAGE.replace(given=Given(head=0)), CLIPS)
    with pytest.raises(InputError, match="no such file"):
        read_image(tmp_path / "b.png", STAGE, CLIPS)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png.*give a PNG or JPEG file"):
        read_image(tmp_path / "text.png", STAGE, CLIPS)


def test_a_picture_is_resized_to_cover_and_cropped_as_clips_are(tmp_path: Path) -> None:
    pixels = np.zeros((64, 256, 3), np.uint8)
    pixels[:, 96:160] = (10, 200, 30)  # the middle 64 of 256
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    x_CTHW = read_image(tmp_path / "wide.png", STAGE, CLIPS)
    assert x_CTHW.shape == (3, 1, 32, 32)
    assert x_CTHW[:, 0, 16, 16].tolist() == [10, 200, 30]
    assert x_CTHW[:, 0, :, 4:28].flatten(1).unique(dim=1).shape == (3, 1)


def _finished_run(stage: DiffusionStage, root: Path) -> RunFolder:
    folder = RunFolder(root)
    write_atomic(folder.stage(stage.name) / FINISHED, b'{"samples": 40}')
    scale = {"mean": SCALE.mean, "std": SCALE.std}
    pinned = json.dumps({"fingerprint": "f", "scale": scale}).encode()
    write_atomic(folder.stage(stage.name) / LATENT_PINS, pinned)
    return folder


def test_a_request_takes_the_null_text_from_the_latents_and_knows_where_the_encoder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"any")
    text = T5Clip(t5="t5", clip="clip", t5_width=8, pooled=4)
    stage = STAGE.replace(vae=CODEC.replace(weights=str(tmp_path / "vae.safetensors")), text=text)
    folder = _finished_run(stage, tmp_path / "run")
    null = TextEmbedding(torch.arange(24.0).view(3, 8), torch.arange(4.0))
    bucket = BucketPlan(name="32px-5f", shape=(4, 2, 4, 4), sample_ids=(1,))
    schema = StoreSchema(
        fingerprint="f",
        buckets=(bucket,),
        samples_per_shard=1,
        text_tokens=8,
        text_width=8,
        pooled_width=4,
    )
    LatentStore.create(f"{folder.latents}/f", schema).publish_null_text(null)
    monkeypatch.chdir(tmp_path)
    found = sample_request(folder, stage, CAPTIONS, tmp_path / "out")
    assert torch.equal(found.null.embedding_LD, null.embedding_LD)
    assert torch.equal(found.null.pooled_D, null.pooled_D)
    assert found.scale == SCALE
    assert found.stage.text.t5 == str(tmp_path / "t5")
    assert found.text_fields is None


def test_the_text_encoder_must_be_that_of_the_latents_while_they_are_there(
    request_for: Callable[..., SampleRequest], tmp_path: Path
) -> None:
    encoder = tiny_t5_clip(tmp_path / "text")
    made = request_for(STAGE.replace(text=encoder))
    stage = made.stage.replace(vae=CODEC.replace(weights=str(made.codec_weights)))
    folder = _finished_run(stage, tmp_path / "run")
    made.weights.rename(folder.stage("tiny") / WEIGHTS)
    fields = Path(folder.latents, "f", FIELDS)
    write_atomic(fields, json.dumps({"text": encoder.fingerprint_fields()}).encode())
    asked = sample_request(folder, stage, CAPTIONS, tmp_path / "out")
    make_samples(replace(asked, steps=1))
    change_weights(Path(encoder.clip))
    words = (
        r"'tiny': T5Clip\(.*text/clip.* is not the text encoder .*text\.clip: '\w+' -> '\w+'; put"
    )
    with pytest.raises(InputError, match=words):
        make_samples(replace(asked, folder=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    fields.unlink()  # the latents are gone, and with them what could be compared
    make_samples(replace(sample_request(folder, stage, CAPTIONS, tmp_path / "out"), steps=1))


def test_a_text_encoder_that_is_gone_is_bad_input_in_the_request_and_when_sampling(
    request_for: Callable[..., SampleRequest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = tiny_t5_clip(tmp_path / "text")
    made = request_for(STAGE.replace(text=encoder))
    # Another process than the one that embedded the null text has nothing in its memory.
    text_module._load.cache_clear()
    stage = made.stage.replace(vae=CODEC.replace(weights=str(made.codec_weights)))
    folder = _finished_run(stage, tmp_path / "run")
    shutil.rmtree(encoder.t5)
    words = rf"'tiny': text\.t5 '{encoder.t5}': no such folder.*put it back there"
    with pytest.raises(InputError, match=words):
        sample_request(folder, stage, CAPTIONS, tmp_path / "out")
    with pytest.raises(InputError, match=words):
        make_samples(made)
    assert not made.folder.exists()
    write_record(folder, Plan("plan", [stage]))
    assert main(["sample", str(folder.root), "--caption", "a circle"]) == 2
    assert f"restage: stage 'tiny': text.t5 '{encoder.t5}'" in capsys.readouterr().err


def test_latents_that_are_not_finite_are_named_and_nothing_is_written(
    request_for: Callable[..., SampleRequest],
) -> None:
    for guidance in (float("inf"), 1e38):
        asked = request_for(guidance=guidance)
        with pytest.raises(
            StageBlocked, match=r"'tiny': .*'a red circle' are not finite.*guidance"
        ):
            make_samples(asked)
        assert not asked.folder.exists()


@pytest.fixture
def run(request_for: Callable[..., SampleRequest], tmp_path: Path) -> RunFolder:
    """A finished run, of a stage with clips of two lengths."""
    (phase,) = STAGE.schedule
    both = (Bucket("32px", frames=1, batch=2), *phase.buckets)
    made = request_for(STAGE.replace(schedule=(phase.replace(buckets=both),)))
    stage = made.stage.replace(vae=CODEC.replace(weights=str(made.codec_weights)))
    folder = _finished_run(stage, tmp_path / "run")
    made.weights.rename(folder.stage("tiny") / WEIGHTS)
    write_record(folder, Plan("plan", [stage]))
    return folder


def _sampled(run: RunFolder, capsys: pytest.CaptureFixture[str], *flags: object) -> list[Path]:
    asked = ["sample", run.root, "--steps", 1, *flags]
    assert main([str(one) for one in asked]) == 0
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


def _refused(run: RunFolder, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    asked = ["sample", run.root, "--steps", 1, *flags]
    assert main([str(one) for one in asked]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("restage: ")
    assert err.count("\n") == 1
    assert not run.samples("tiny").exists()
    return err


def test_any_bucket_of_the_stage_can_be_sampled_in_and_an_unknown_one_is_told_which_there_are(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    said = _refused(run, capsys, "--caption", "blue", "--bucket", "64px-5f")
    assert "stage 'tiny' has no bucket '64px-5f'; it has 32px-1f, 32px-5f" in said
    for flags, frames in ((("--bucket", "32px-1f"), 1), (("--bucket", "32px-5f"), 5), ((), 5)):
        (path,) = _sampled(run, capsys, "--caption", "blue", *flags)
        assert path == run.samples("tiny") / "asked" / "00.mp4"
        assert read_mp4(path).frames_THWC.shape == (frames, 32, 32, 3)


def test_a_picture_is_no_first_frame_of_a_bucket_of_stills(
    run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = _picture(tmp_path / "a.png", (9, 9, 9))
    flags = ("--caption", "blue", "--image", image, "--bucket", "32px-1f")
    assert "its clips of 1 frames have a single latent frame" in _refused(run, capsys, *flags)


def test_captions_come_from_flags_and_then_from_a_file_line_by_line(
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        sample, "make_samples", lambda request: asked.append(request.captions) or []
    )
    lines, table = tmp_path / "captions.txt", tmp_path / "captions.csv"
    lines.write_bytes("\ufeffa red circle\r\n\r\n  ein gr\u00fcner Kreis \nblue\nblue".encode())
    table.write_text('split,text\ntrain,"a circle, red"\nheld-out,12\n')
    parquet.write_table(pa.table({"path": ["a.mp4"], "text": ["blue"]}), tmp_path / "c.parquet")
    _sampled(run, capsys, "--captions", lines, "--caption", "first")
    _sampled(run, capsys, "--captions", table)
    _sampled(run, capsys, "--captions", tmp_path / "c.parquet")
    assert asked == [
        ("first", "a red circle", "ein gr\u00fcner Kreis", "blue", "blue"),
        ("a circle, red", "12"),
        ("blue",),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, "gone.txt' cannot be read: .*correct the path"),
        (
            "gone.csv",
            None,
            r"gone.csv' does not exist; .* with the column text\): correct the name",
        ),
        ("empty.txt", b" \n\n", "the file holds none; write one a line"),
        ("film.mp4", b"\0\0\0 ftyp\xff\xfe", "not UTF-8 text; write one caption a line, or .*csv"),
        ("latin.txt", "gr\u00fcn".encode("latin-1"), "not UTF-8 text"),
        ("none.csv", b"path,txt\na.mp4,blue\n", "has no column 'text'.*; text must be there"),
        ("rows.csv", b"text\n", "the file holds none"),
    ],
)
def test_captions_that_cannot_be_used_are_named(
    name: str,
    content: bytes | None,
    words: str,
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(words, _refused(run, capsys, "--captions", tmp_path / name))


def test_a_caption_is_needed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no caption: give --caption" in _refused(run, capsys)


def test_a_negative_text_takes_the_place_of_the_null_text(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nulls: list[TextEmbedding] = []
    original = sampler.euler_sample

    def recorded(model: Any, noise: Tensor, text: Any, null: TextEmbedding, **more: Any) -> Tensor:
        nulls.append(null)
        return original(model, noise, text, null, **more)

    monkeypatch.setattr(sampler, "euler_sample", recorded)
    films = []
    for flags in ((), ("--negative", "a grey blur"), ("--negative", "")):
        (path,) = _sampled(run, capsys, "--caption", "a red circle", *flags)
        films.append(read_mp4(path).frames_THWC)
    (blur,) = STAGE.text.encode(["a grey blur"])
    assert torch.equal(nulls[1].embedding_LD, blur.embedding_LD)
    assert torch.equal(nulls[1].pooled_D, blur.pooled_D)
    assert not np.array_equal(films[0], films[1])
    assert np.array_equal(films[0], films[2])


def test_a_negative_text_that_nothing_is_led_away_from_is_refused(
    run: RunFolder, capsys: pytest.CaptureFixture[str], request_for: Callable[..., SampleRequest]
) -> None:
    flags = ("--caption", "blue", "--negative", "grey", "--guidance", 1)
    said = _refused(run, capsys, *flags)
    assert "negative 'grey': stage 'tiny' has no use for it: at guidance 1 nothing" in said
    asked = request_for(STAGE.replace(model=STAGE.model.replace(guidance=True)), negative="grey")
    with pytest.raises(InputError, match=r"takes the strength of guidance.*leave it out"):
        make_samples(asked)


def test_a_negative_text_needs_the_encoder_of_the_latents(
    request_for: Callable[..., SampleRequest], tmp_path: Path
) -> None:
    encoder = tiny_t5_clip(tmp_path / "text")
    asked = request_for(STAGE.replace(text=encoder), negative="grey")
    fields = encoder.fingerprint_fields()
    change_weights(Path(encoder.t5))
    with pytest.raises(InputError, match=r"is not the text encoder that the stage was trained"):
        make_samples(replace(asked, text_fields=fields))
