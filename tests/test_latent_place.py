"""The setting `latents`: where it puts stores, what it refuses, and that it stays noted."""

import json
import shutil
import uuid
from pathlib import Path

import pytest
from s3_server import s3_server  # noqa: F401  # a fixture
from store_places import Place, a_bucket, a_place  # noqa: F401  # fixtures

from elastic.cli import main
from elastic.errors import InputError
from elastic.folders import LATENT_PINS, LATENTS_AT, RunFolder
from elastic.latent_place import settle_latents


def _run(home: Path) -> RunFolder:
    folder = RunFolder(home / "plan")
    folder.root.mkdir(parents=True)
    return folder


def _pin(folder: RunFolder) -> None:
    pin = folder.stage("dit") / LATENT_PINS
    pin.parent.mkdir(parents=True)
    pin.write_text(json.dumps({"fingerprint": "f"}))


def test_without_the_setting_latents_lie_in_the_run_folder(tmp_path: Path) -> None:
    folder = _run(tmp_path)
    settle_latents(folder, None)
    assert folder.latents == str(folder.root / "latents")


def test_the_setting_puts_them_elsewhere_and_later_commands_need_it_no_more(
    place: Place, tmp_path: Path
) -> None:
    folder = _run(tmp_path)
    settle_latents(folder, place.root)
    assert folder.latents == f"{place.root}/plan/latents"
    _pin(folder)
    for setting in (None, place.root):
        settle_latents(folder, setting)
        assert folder.latents == f"{place.root}/plan/latents"


def test_another_run_is_refused_the_same_place(place: Place, tmp_path: Path) -> None:
    first, second = _run(tmp_path / "a"), _run(tmp_path / "b")
    settle_latents(first, place.root)
    with pytest.raises(InputError, match=f"holds the latents of {first.root}; give another"):
        settle_latents(second, place.root)
    settle_latents(second, None)
    assert second.latents == str(second.root / "latents"), "what was refused is not used later"
    settle_latents(first, place.root)


def test_a_place_is_not_changed_under_a_stage_that_has_latents(
    place: Place, tmp_path: Path
) -> None:
    folder = _run(tmp_path)
    _pin(folder)
    with pytest.raises(InputError, match=rf"stage 'dit' has its latents in {folder.root}/latents"):
        settle_latents(folder, place.root)
    assert folder.latents == str(folder.root / "latents")


def test_what_the_refusal_says_to_write_lets_copied_latents_be_used(
    place: Place, tmp_path: Path
) -> None:
    folder = _run(tmp_path)
    _pin(folder)
    with pytest.raises(InputError) as caught:
        settle_latents(folder, place.root)
    note = str(caught.value).split("write ")[1].split(" into ")[0]
    (folder.root / LATENTS_AT).write_text(note)
    settle_latents(folder, place.root)
    assert folder.latents == f"{place.root}/plan/latents"


def test_a_place_that_was_never_used_may_be_changed(place: Place, tmp_path: Path) -> None:
    folder = _run(tmp_path)
    settle_latents(folder, str(tmp_path / "first"))
    settle_latents(folder, place.root)
    assert folder.latents == f"{place.root}/plan/latents"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("", "latents '': empty"),
        ("nosuch://bucket", "latents 'nosuch://bucket': Protocol not known"),
        ("s3://key:secret@bucket/x", "would end up in logs"),
    ],
)
def test_a_setting_that_cannot_be_used_is_said_before_anything_starts(
    setting: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", "none.py", "--storage", str(tmp_path), "--latents", setting]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_verify_takes_a_url_and_follows_a_run_to_its_bucket(
    bucket: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_verify import sealed

    place, folder = bucket.below(uuid.uuid4().hex), _run(tmp_path)
    settle_latents(folder, place.root)
    store = Place(f"{folder.latents}/aa")
    sealed(store)
    whole = f"{store.root}: 4 shards, sealed: whole\n"
    for given in (str(folder.root), store.root, f"{place.root}/plan"):
        assert main(["verify", given]) == 0
        assert capsys.readouterr().out == whole
    store.flip("64px-1f/latent/c.0.0.0.0.0", 0, 1)
    assert main(["verify", str(folder.root)]) == 1
    assert "64px-1f/latent/c.0.0.0.0.0 latent of sample 7 has CRC" in capsys.readouterr().out
    shutil.rmtree(folder.root)
    assert main(["verify", str(folder.root)]) == 2
