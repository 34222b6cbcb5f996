"""Bad input gets one message and exit code 2, and nothing is written; help has examples."""

import errno
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from elastic.cli import main, make_parser, with_videos
from elastic.data.moving_shapes import write_demo_videos
from elastic.errors import InputError
from elastic.folders import RunFolder
from elastic.forecast import forecast
from elastic.output import READER_GONE
from elastic.record import check_unchanged, start_stage, write_record
from stages import AutoencoderStage, Plan, Videos
from stages.plan import load_plan

PLAN = Path(__file__).with_name("tiny_plan.py")
VERBS = (
    *("plan", "encode", "train", "sample", "export", "status", "report", "dashboard", "doctor"),
    *("demo", "verify", "repair", "completion", "submit", "stop"),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_videos(tmp_path_factory.mktemp("videos"), clips=20).table


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a verb that must be refused; its one message."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("restage: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def variant(tmp_path: Path, old: str, new: str) -> Path:
    """The tiny plan with one mistake in it."""
    text = PLAN.read_text()
    assert old in text
    path = tmp_path / "mistaken_plan.py"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("schedule=[Phase(until=48", "shedule=[Phase(until=48", ["did you mean 'schedule'"]),
        ('Bucket("32px", frames=5, batch=4', 'Bucket("32px", frames=6, batch=4', ["6 frames", "5"]),
        ('Bucket("32px", frames=5, batch=4', 'Bucket("44px", frames=5, batch=4', ["44 px"]),
        ("vae=hunyuan_vae,", "vae=hunyuan_va,", ["hunyuan_va", "did you mean 'hunyuan_vae'"]),
        ("[hunyuan_vae, hunyuan_dit, dc", "[hunyuan_dit, dc", ["'hunyuan-vae'", "does not come"]),
        ("until=48", "until=50", ["50", "nearest is 48"]),
        ('name="dc-ae",', 'name="../dc-ae",', ["../dc-ae"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_stage_file_is_named_and_nothing_is_written(
    old: str,
    new: str,
    words: list[str],
    tmp_path: Path,
    storage: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refusal(capsys, "train", variant(tmp_path, old, new), "--storage", storage)
    for word in words:
        assert word in message
    assert not storage.exists()


def test_a_missing_stage_file_is_named(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.py" in refusal(capsys, "train", "none.py", "--storage", storage)
    assert not storage.exists()


def test_a_missing_video_folder_is_named(
    videos: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(
        capsys, "train", PLAN, "--videos", "nowhere", "--captions", videos, "--storage", storage
    )
    assert "nowhere" in message
    assert not storage.exists()


def test_captions_without_the_column_name_the_columns_that_are_there(
    tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("path,txt\na.mp4,a circle\n")
    message = refusal(
        capsys, "train", PLAN, "--videos", tmp_path, "--captions", table, "--storage", storage
    )
    assert "text" in message
    assert "txt" in message
    assert not storage.exists()


def test_captions_without_videos_are_refused(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "train", PLAN, "--captions", "c.csv", "--storage", storage)
    assert "--videos" in message


def test_videos_without_captions_are_a_folder_with_captions_beside(
    videos: Path, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clip that has none has the null text: the latents are as many and no smaller."""
    named = ("--videos", str(videos.parent), "--captions", str(videos))
    for flags in (named, named[:2]):
        assert main(["plan", str(PLAN), *flags, "--storage", str(storage)]) == 0
        assert "latents at most" in capsys.readouterr().out
    message = refusal(capsys, "train", PLAN, "--videos", tmp_path, "--storage", storage)
    assert "holds no clip" in message


def test_a_storage_that_cannot_be_written_is_named(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file where the folder should be: it refuses root too, unlike a mode.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    message = refusal(
        capsys, "train", PLAN, "--videos", videos.parent, "--captions", videos,
        "--storage", blocked,
    )  # fmt: skip
    assert str(blocked) in message
    assert blocked.read_text() == ""


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "ray://127.0.0.1:1", "host:0"])
def test_a_ray_address_is_host_and_port(
    address: str, videos: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(
        capsys, "train", PLAN, "--videos", videos.parent, "--captions", videos,
        "--storage", storage, "--ray-address", address,
    )  # fmt: skip
    assert address in message
    assert "HOST:PORT" in message
    assert not storage.exists()


def test_a_ray_address_where_nothing_listens_is_refused_at_once(
    videos: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    message = refusal(
        capsys, "train", PLAN, "--videos", videos.parent, "--captions", videos,
        "--storage", storage, "--ray-address", f"127.0.0.1:{port}",
    )  # fmt: skip
    assert "nothing answers" in message
    assert not storage.exists()


def test_a_folder_that_holds_none_of_the_clips_is_refused(
    videos: Path, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--videos", tmp_path, "--captions", videos, "--storage", storage)
    for verb in ("train", "encode", "plan"):
        message = refusal(capsys, verb, PLAN, *arguments)
        assert str(tmp_path / "00000.mp4") in message
    assert not storage.exists()


def test_weights_that_are_not_there_are_named_before_anything_starts(
    videos: Path, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.py"
    vae = "HunyuanVAE(widths=(4, 4, 8, 8), norm_groups=2, channels=4, weights='gone.safetensors')"
    text = PLAN.read_text().replace("vae=hunyuan_vae", f"vae={vae}")
    path.write_text(text.replace("[hunyuan_vae, hunyuan_dit, dc_ae, dc_ae_dit]", "[hunyuan_dit]"))
    message = refusal(
        capsys, "train", path, "--videos", videos.parent, "--captions", videos, "--storage", storage
    )
    assert "'gone.safetensors': no such file" in message
    assert not storage.exists()


def test_a_text_encoder_that_is_not_there_is_named_before_anything_starts(
    videos: Path, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.py"
    text = PLAN.read_text().replace("import DCAE, DiT", "import DCAE, T5Clip, DiT")
    path.write_text(text.replace("WordHash(width=16)", "T5Clip(t5='gone', clip='gone')"))
    message = refusal(
        capsys, "train", path, "--videos", videos.parent, "--captions", videos, "--storage", storage
    )
    assert "stage 'hunyuan-dit': text.t5 'gone': no such folder" in message
    assert not storage.exists()


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-0.5", "three"])
def test_a_guidance_that_is_no_finite_strength_is_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["sample", "run", "--caption", "a circle", "--guidance", value])
    assert leaving.value.code == 2
    assert f"--guidance: '{value}': must be a finite number, 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"schema": 1, "started": {}}'])
def test_a_damaged_record_is_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(text)
    assert "run.json" in refusal(capsys, "status", tmp_path)


def test_a_plan_is_the_same_whether_its_table_is_named_from_here_or_from_the_root(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(videos.parent.parent)
    plan = load_plan(PLAN)
    folder = RunFolder(tmp_path / "run")
    started = with_videos(plan, Videos(str(videos)))
    write_record(folder, started)
    for stage in started.stages:
        start_stage(folder, stage)
    check_unchanged(folder, with_videos(plan, Videos(os.path.relpath(videos))))
    with pytest.raises(InputError, match=r"data.table: .* -> .*other\.csv"):
        check_unchanged(folder, with_videos(plan, Videos("other.csv")))


def test_a_plan_on_a_table_behind_a_url_is_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    plan = with_videos(load_plan(PLAN), Videos("s3://bucket/clips.csv", folder="s3://bucket/in/"))
    write_record(folder, plan)
    for stage in plan.stages:
        start_stage(folder, stage)
    monkeypatch.chdir(tmp_path)
    check_unchanged(folder, plan)


def test_a_storage_url_is_refused_rather_than_taken_for_a_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "s3://bucket/runs" in refusal(capsys, "plan", PLAN, "--storage", "s3://bucket/runs")


@pytest.mark.parametrize("verb", ["status", "report"])
def test_a_folder_that_holds_no_run_is_named(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(tmp_path) in refusal(capsys, verb, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_setting_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RESTAGE_CPUS", "none")
    assert "RESTAGE_CPUS" in refusal(capsys, "plan", PLAN)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        make_parser().parse_args([verb, "--help"])
    assert leaving.value.code == 0
    assert f"python -m elastic {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_told_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    for word, near in (("trian", "did you mean 'train'?"), ("x", "it has completion, dashboard, ")):
        with pytest.raises(SystemExit) as leaving:
            main([word, str(PLAN)])
        assert leaving.value.code == 2
        assert f"there is no verb '{word}'; {near}" in capsys.readouterr().err


def test_the_version_is_said_with_those_of_torch_and_ray_and_torch_is_not_imported() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "elastic", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told = [f"{name} {version(name)}" for name in ("restage", "torch", "ray")]
    assert done.stdout.splitlines() == [", ".join([*told, f"Python {platform.python_version()}"])]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "elastic.versions" in imported
    assert "torch" not in imported


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_verb_whose_reader_goes_ends_without_a_word_as_other_tools_do(
    unbuffered: str, storage: Path
) -> None:
    """Unbuffered the verb itself fails to print, else what it printed cannot be given out."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "elastic", "plan", str(PLAN), "--storage", str(storage)],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_a_pipe_that_breaks_elsewhere_is_a_failure_like_any_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(plan: Plan, flags: object, settings: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    reader, writer = os.pipe()
    monkeypatch.setattr(sys.stdout, "fileno", lambda: writer, raising=False)
    monkeypatch.setattr("elastic.plan_text.print_plan", breaks)
    assert main(["plan", str(PLAN)]) == 1
    assert "restage: failed: [Errno 32] Broken pipe" in capsys.readouterr().err
    os.close(reader)
    assert main(["plan", str(PLAN)]) == READER_GONE
    assert capsys.readouterr().err == ""
    os.close(writer)


def test_plan_writes_nothing_and_says_what_would_happen(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(PLAN), "--storage", str(storage)]) == 0
    out = capsys.readouterr().out
    for word in ("hunyuan-vae", "tokens", "parameters", "checkpoint", "32px-5f"):
        assert word in out
    assert not storage.exists()


def test_plan_says_which_losses_a_stage_has_and_from_when_on() -> None:
    text = forecast(load_plan(PLAN), Path(os.devnull))
    assert "0.5 pyramid of 4 bands" in text
    stage = load_plan(PLAN).stage("dc-ae")
    assert isinstance(stage, AutoencoderStage)
    assert stage.adversarial is not None
    count = sum(p.numel() for p in stage.adversarial.build().parameters())
    assert "from 16 samples on + 0.05 hinge loss of a video discriminator" in text
    assert f"{count:,} parameters, whole on every worker" in text


def test_lpips_weights_that_cannot_be_used_are_named_before_anything_starts(
    videos: Path, tmp_path: Path, storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(tmp_path, "Pyramid(weight=0.5)", 'Lpips(weights="none.safetensors")')
    path.write_text(path.read_text().replace("import DCAE,", "import DCAE, Lpips,"))
    message = refusal(
        capsys, "train", path, "--videos", videos.parent, "--captions", videos, "--storage", storage
    )
    for word in ("stage 'dc-ae': perceptual", "none.safetensors", "no such file"):
        assert word in message
    assert not storage.exists()


def test_a_changed_discriminator_of_a_started_stage_is_refused(tmp_path: Path) -> None:
    plan = load_plan(PLAN)
    stage = plan.stage("dc-ae")
    assert isinstance(stage, AutoencoderStage)
    assert stage.adversarial is not None
    folder = RunFolder(tmp_path)
    start_stage(folder, stage)
    check_unchanged(folder, Plan("tiny", [stage]))
    changes = {
        r"adversarial.weight: 0\.05 -> 0\.1": {
            "adversarial": stage.adversarial.replace(weight=0.1)
        },
        r"adversarial: .* -> None": {"adversarial": None},
        r"perceptual: .* -> None": {"perceptual": None},
    }
    for message, change in changes.items():
        with pytest.raises(InputError, match=message):
            check_unchanged(folder, Plan("tiny", [stage.replace(**change)]))


def test_deep_compression_leaves_a_quarter_of_the_tokens() -> None:
    demo = load_plan(PLAN.parent.parent / "stages" / "recipes" / "demo.py")
    text = forecast(demo, Path(os.devnull))
    assert "latent 16x5x4x4, 20 tokens" in text  # four a latent frame
    assert "latent 128x4x1x1, 4 tokens" in text  # one a latent frame


def test_the_guide_to_stage_files_is_a_stage_file_that_fits_64_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (PLAN.parent.parent / "stages" / "README.md").read_text()
    path = tmp_path / "guide.py"
    path.write_text(guide.split("```python\n")[1].split("```")[0])
    plan = load_plan(path)
    starts = {type(stage.init).__name__ for stage in plan.stages}
    assert starts == {"Fresh", "Continue", "KeepTrunk", "Align", "FromFile"}
    for_gpus = ["--gpus", "64", "--gpu-memory", "80"]
    assert main(["plan", str(path), "--storage", str(tmp_path / "runs"), *for_gpus]) == 0
    out = capsys.readouterr().out
    assert "7. from-flux (DiffusionStage, to do)" in out
    assert "worth a look" not in out


def test_the_stage_file_of_the_readme_is_one_that_fits_160_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (PLAN.parent.parent / "README.md").read_text()
    path = tmp_path / "readme_plan.py"
    path.write_text(readme.split("```python\n")[1].split("```")[0])
    for_gpus = ["--gpus", "160", "--gpu-memory", "80"]
    assert main(["plan", str(path), "--storage", str(tmp_path / "runs"), *for_gpus]) == 0
    out = capsys.readouterr().out
    assert "11,891,571,840" in out
    assert "worth a look" not in out
