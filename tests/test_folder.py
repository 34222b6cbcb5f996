"""A folder in place of a table: which files are taken, their order, ids and captions."""

import os
import random
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_videos import KINDS

from elastic.data import folder as folder_module
from elastic.data import places
from elastic.data.clips import Clip, sample_id
from elastic.data.folder import SUFFIXES
from elastic.data.table import check_videos, read_table
from elastic.errors import InputError
from stages.videos import Videos


def _make(folder: Path, files: dict[str, str]) -> Videos:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Videos(f"{folder}/")


def test_a_folder_gives_the_clips_that_a_table_of_its_names_would(tmp_path: Path) -> None:
    names = {"b.mp4": "two", "a/z.JPG": "one", "a.webm": "", "a/y.mkv": "three\nlines"}
    files = dict.fromkeys(names, "")
    files |= {"b.txt": "two\n", "a/z.TXT": "\ufeff one ", "a/y.txt": "three\nlines\n"}
    files |= {"z.txt": "of nothing", "read.me": "", "captions.csv": "path,text\n"}
    videos = _make(tmp_path / "clips", files)
    clips = read_table(videos)
    assert [clip.text for clip in clips] == [names[name] for name in sorted(names)]
    rows = "".join(f'{name},"{names[name]}"\n' for name in sorted(names))
    (tmp_path / "table.csv").write_text(f"path,text\n{rows}")
    assert clips == read_table(
        Videos(str(tmp_path / "table.csv"), folder=str(tmp_path / "clips"))
    ), "sample ids, paths and the held-out part"
    assert clips == read_table(Videos(str(tmp_path / "clips"))), "with the slash or without"
    assert clips == read_table(videos, tmp_path / "spilled.arrow")


@settings(max_examples=40, deadline=None)
@given(
    names=st.sets(
        st.tuples(st.sampled_from("abAB19"), st.sampled_from("xyXY\u00e9 "), st.sampled_from("12"))
    )
)
def test_order_and_ids_do_not_depend_on_how_the_folder_was_filled(
    names: set[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = [f"{one}/{two}{three}.mp4" for one, two, three in names]
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("filled")
        some = sorted([*files, "always.mp4"])
        random.Random(seed).shuffle(some)
        found.append(read_table(_make(folder, dict.fromkeys(some, ""))))
    assert [clip.sample_id for clip in found[0]] == [
        sample_id(name) for name in sorted([*files, "always.mp4"])
    ]
    assert found[0].ids().tolist() == found[1].ids().tolist()
    assert found[0].held_out().tolist() == found[1].held_out().tolist()


def test_a_start_lists_a_folder_and_reads_no_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million clips in a bucket that would be a million requests at each start."""
    videos = _make(tmp_path, {"a.mp4": "", "a.txt": "one"})

    def refuse(path: str) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(places, "open_read", refuse)
    check_videos(videos)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(InputError, match="holds no clip"):
        check_videos(videos)


def test_one_in_so_many_is_held_out_as_of_a_table(tmp_path: Path) -> None:
    videos = _make(tmp_path, {f"{number}.mp4": "" for number in range(200)})
    held_out = [clip for clip in read_table(videos.replace(held_out_every=4)) if clip.held_out]
    assert 25 < len(held_out) < 75
    assert all(clip.sample_id % 4 == 0 for clip in held_out)


def test_hidden_files_are_left_out_and_links_are_followed_once(tmp_path: Path) -> None:
    videos = _make(
        tmp_path / "clips", {"a.mp4": "", "in/b.mp4": "", ".c.mp4": "", ".trash/d.mp4": ""}
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.mp4").touch()
    os.symlink(tmp_path / "elsewhere", tmp_path / "clips" / "in" / "far")
    os.symlink(tmp_path / "clips", tmp_path / "clips" / "in" / "round")
    os.symlink(tmp_path / "clips" / "in", tmp_path / "clips" / "in" / "itself")
    os.symlink(tmp_path / "nowhere", tmp_path / "clips" / "gone.mp4")
    paths = [clip.path for clip in read_table(videos)]
    assert [os.path.relpath(path, tmp_path / "clips") for path in paths] == [
        *("a.mp4", "gone.mp4", "in/b.mp4", "in/far/e.mp4"),
    ]


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    _make(tmp_path / "clips", {"in/a.mp4": ""})
    os.symlink(tmp_path / "clips", tmp_path / "link")
    assert read_table(Videos(str(tmp_path / "link"))) == [
        Clip(sample_id("in/a.mp4"), str(tmp_path / "link/in/a.mp4"), "", held_out=False)
    ]


def test_every_kind_of_file_that_can_be_used_is_taken() -> None:
    used = {PurePosixPath(kind.name).suffix for kind in KINDS if not kind.reason}
    assert len(used) > 10
    assert used - {""} <= SUFFIXES


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no clip: none of its 0 files"),
        ({"notes.pdf": "", "b.txt": "", ".c.mp4": ""}, "none of its 2 files"),
        ({"in/t.parquet": "", "in/t.csv": ""}, r"none of its 2 .*or is '.*/in/t\.csv' the table"),
        ({"a.mp4": "", "a.txt": "x" * 66_000}, r"a\.txt' is longer than 65,536 bytes"),
    ],
)
def test_a_folder_that_cannot_be_used_gets_one_message(
    files: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    with pytest.raises(InputError, match=words):
        read_table(_make(tmp_path / "clips", files))


def test_what_is_no_folder_and_a_folder_for_a_folder_are_refused(tmp_path: Path) -> None:
    videos = _make(tmp_path / "clips", {"a.mp4": ""})
    with pytest.raises(InputError, match="none' does not exist"):
        read_table(Videos(f"{tmp_path}/none/"))
    with pytest.raises(InputError, match="is a file"):
        read_table(Videos(f"{tmp_path}/clips/a.mp4/"))
    with pytest.raises(InputError, match="is a folder itself"):
        read_table(videos.replace(folder=str(tmp_path)))


def test_names_and_captions_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    videos = _make(tmp_path, {"a.mp4": ""})
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt' cannot be read as UTF-8"):
        read_table(videos)
    (tmp_path / "a.txt").unlink()
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))).touch()
    with pytest.raises(InputError, match=r"caf\\udce9\.mp4' is not UTF-8"):
        read_table(videos)


def test_a_part_that_cannot_be_listed_is_not_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = _make(tmp_path, {"a.mp4": "", "in/b.mp4": ""})
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"cannot be read: .*Permission denied"):
        read_table(videos)


def test_a_large_folder_is_read_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "ROWS", 3)
    files = {f"{number}.{kind}": f"{number}" for number in range(8) for kind in ("mp4", "txt")}
    clips = read_table(_make(tmp_path, files))
    assert [clip.text for clip in clips] == [str(number) for number in range(8)]
