"""Tables and videos behind URLs: a real S3 API over a socket, from the table to the latents."""

import csv
import io
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from odd_videos import FRAMES, HEIGHT, KINDS, RATE, WIDTH
from s3_server import BUCKET, asked_once, s3_server

from elastic.data.decode import BadVideo, Unreachable, decode_clip
from elastic.data.decoders import Decoders, Wanted, answer
from elastic.data.places import is_there, stamp
from elastic.data.probes import probe_all
from elastic.data.segment import SECOND, Segment
from elastic.data.table import read_table
from elastic.errors import InputError
from stages.videos import Videos

__all__ = ["asked_once", "s3_server"]  # fixtures

# What stands in folders alone is no object, and a name over two lines is none for this server.
_LOCAL = (
    *("folder.mp4", "pipe.mp4", "endless.mp4", "dangling.mp4", "round.mp4"),
    *("playlist.mp4", "script.mp4", "two\nlines.mp4"),
)
FILES = [kind for kind in KINDS if kind.name not in _LOCAL]


@pytest.fixture(scope="module")
def folder(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd files on the disk, and the same behind s3://BUCKET/clips, with a table of each kind."""
    folder = tmp_path_factory.mktemp("odd")
    client = boto3.client("s3", endpoint_url=server)
    for kind in FILES:
        kind.make(folder / kind.name)
        client.upload_file(str(folder / kind.name), BUCKET, f"clips/{kind.name}")
    rows = [{"path": kind.name, "text": "four colours"} for kind in FILES]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["path", "text"])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "clips.csv").write_text(text.getvalue())
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "clips.parquet")
    for table in ("clips.csv", "clips.parquet"):
        client.upload_file(str(folder / table), BUCKET, f"clips/{table}")
    return folder


@pytest.mark.parametrize("table", ["clips.csv", "clips.parquet"])
def test_a_table_behind_a_url_names_the_same_clips(folder: Path, table: str) -> None:
    there = read_table(Videos(f"s3://{BUCKET}/clips/{table}"))
    here = read_table(Videos(str(folder / table)))
    assert there.ids().tolist() == here.ids().tolist()
    assert [clip.path for clip in there] == [f"s3://{BUCKET}/clips/{kind.name}" for kind in FILES]
    mixed = read_table(Videos(str(folder / table), folder=f"s3://{BUCKET}/clips"))
    assert mixed == there


def test_a_folder_behind_a_url_gives_the_clips_of_the_same_folder_here(
    server: str, tmp_path: Path
) -> None:
    client = boto3.client("s3", endpoint_url=server)
    files = {"b.mp4": b"", "b.txt": b"two\n", "in/a.webm": b"", "in/.c.mp4": b"", ".d/e.mp4": b""}
    files |= {"in/a.txt": "\u00e9".encode(), "of.pdf": b""}
    for name, body in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
        client.put_object(Bucket=BUCKET, Key=f"films/{name}", Body=body)
    client.put_object(Bucket=BUCKET, Key="films/folder.mp4/", Body=b"")  # as consoles make them
    client.put_object(Bucket=BUCKET, Key="films-of-others/a.mp4", Body=b"")
    there, here = (read_table(Videos(name)) for name in (f"s3://{BUCKET}/films/", str(tmp_path)))
    assert [clip.path for clip in there] == [
        f"s3://{BUCKET}/films/{name}" for name in ("b.mp4", "in/a.webm")
    ]
    assert [clip.text for clip in there] == ["two", "\u00e9"]
    assert there.ids().tolist() == here.ids().tolist()
    assert there.held_out().tolist() == here.held_out().tolist()
    again = read_table(Videos(f"s3://{BUCKET}/films"))
    assert again == there, "with the slash or without"
    before = stamp(there[0].path)
    client.put_object(Bucket=BUCKET, Key="films/b.mp4", Body=b"longer")
    client.put_object(Bucket=BUCKET, Key="films/c.mp4", Body=b"")
    assert stamp(there[0].path) != before, "what was listed is not taken for what is there"
    assert len(read_table(Videos(f"s3://{BUCKET}/films/"))) == 3


@pytest.mark.usefixtures("folder", "asked_once")
def test_an_empty_folder_behind_a_url_and_a_silent_server_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"'s3://.*/nothing/' holds no clip"):
        read_table(Videos(f"s3://{BUCKET}/nothing/"))
    with pytest.raises(InputError, match=r"'s3://.*/nothing' does not exist"):
        read_table(Videos(f"s3://{BUCKET}/nothing"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for name in ("clips", "clips/"):
        with pytest.raises(InputError, match=r"cannot be (reached|read)"):
            read_table(Videos(f"s3://{BUCKET}/{name}"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_what_is_good_and_what_is_not_is_the_same_behind_a_url(folder: Path) -> None:
    there = probe_all(
        read_table(Videos(f"s3://{BUCKET}/clips/clips.csv")), folder / "probes.parquet", workers=2
    )
    here = probe_all(
        read_table(Videos(str(folder / "clips.csv"))), folder / "local.parquet", workers=2
    )
    assert [there.at(row) for row in range(len(FILES))] == [
        here.at(row) for row in range(len(FILES))
    ]
    assert 25 < there.is_good.sum() < len(FILES) - 10


def test_pictures_are_the_same_behind_a_url(folder: Path) -> None:
    decoders = Decoders(1)
    try:
        for name in ("h264.mp4", "vp9.webm", "turned.mp4", "mpeg2.ts"):
            url = f"s3://{BUCKET}/clips/{name}"
            (x_CTHW,) = decoders.decode([Wanted(url, FRAMES, RATE, HEIGHT, WIDTH)], ahead=1)
            assert isinstance(x_CTHW, torch.Tensor)
            local = decode_clip(str(folder / name), FRAMES, Fraction(RATE), HEIGHT, WIDTH)
            assert torch.equal(x_CTHW, local)
            one = Wanted(url, 2, RATE, HEIGHT, WIDTH, Segment(SECOND // 2, SECOND))
            (x_CTHW,) = decoders.decode([one], ahead=1)
            assert isinstance(x_CTHW, torch.Tensor)
            assert torch.equal(x_CTHW, local[:, RATE // 2 : RATE // 2 + 2]), "from the middle on"
    finally:
        decoders.close()


@pytest.mark.usefixtures("folder")
def test_an_object_that_is_written_again_is_probed_again(server: str) -> None:
    client = boto3.client("s3", endpoint_url=server)
    url = f"s3://{BUCKET}/again.mp4"
    assert stamp(url) is None
    assert not is_there(url)
    client.put_object(Bucket=BUCKET, Key="again.mp4", Body=b"first")
    before = stamp(url)
    assert before == stamp(url)
    client.put_object(Bucket=BUCKET, Key="again.mp4", Body=b"other")
    assert stamp(url) != before


@pytest.mark.usefixtures("folder")
def test_gone_objects_are_bad_files_and_a_silent_server_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BadVideo, match="does not exist"):
        decode_clip(f"s3://{BUCKET}/clips/none.mp4", 1, 8, 32, 32)
    with pytest.raises(InputError, match=r"'s3://.*/none\.csv' does not exist"):
        read_table(Videos(f"s3://{BUCKET}/clips/none.csv"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(Unreachable):
        decode_clip(f"s3://{BUCKET}/clips/h264.mp4", 1, 8, 32, 32)
    with pytest.raises(InputError, match="cannot be reached"):
        read_table(Videos(f"s3://{BUCKET}/clips/clips.csv"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(("status", "is_missing"), [(404, True), (503, False)])
def test_only_a_server_that_says_so_has_lost_a_file(status: int, is_missing: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        do_HEAD = do_GET  # the name that the server looks for

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v.mp4"
        with pytest.raises(BadVideo if is_missing else Unreachable):
            decode_clip(url, 1, 8, 32, 32)
        if is_missing:
            assert stamp(url) is None
        else:
            with pytest.raises(OSError, match="503"):
                stamp(url)
        server.shutdown()


@pytest.mark.usefixtures("folder")
def test_an_error_amid_the_reading_is_the_networks_and_not_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    def lost(self: s3fs.S3File, start: int, end: int) -> bytes:
        raise RuntimeError("the server has gone away")  # as back ends do, of a type of their own

    url = f"s3://{BUCKET}/clips/h264.mp4"
    monkeypatch.setattr(s3fs.S3File, "_fetch_range", lost)
    for use in (answer(url), answer(Wanted(url, FRAMES, RATE, HEIGHT, WIDTH))):
        assert isinstance(use, Unreachable)
        assert "gone away" in str(use)


def test_keys_in_a_url_and_schemes_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a user or key in it") as refused:
        read_table(Videos("s3://KEY:SECRET@bucket/clips.csv"))
    assert "SECRET" not in str(refused.value)
    with pytest.raises(InputError, match="foo://x/y"):
        read_table(Videos("foo://x/y.csv"))
    for url in ("https://h/v.csv?X-Amz-Signature=SECRET", "zip://x.csv::s3://KEY:SECRET@b/z"):
        with pytest.raises(InputError, match="a user or key in it") as refused:
            read_table(Videos(url))
        assert "SECRET" not in str(refused.value)
    with pytest.raises(InputError, match="files inside of other files"):
        read_table(Videos("zip://x.csv::s3://bucket/z"))
    (tmp_path / "clips.csv").write_text("path,text\ns3://KEY:SECRET@b/v.mp4,a clip\n")
    with pytest.raises(InputError, match="row 1: a URL with a user or key") as refused:
        read_table(Videos(str(tmp_path / "clips.csv")))
    assert "SECRET" not in str(refused.value)
