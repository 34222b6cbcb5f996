"""The places that a latent store may lie in, for tests that hold in all of them."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3_server import BUCKET


class Place:
    """A folder or a URL, and hands to damage what lies there."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._fs, self._path = fsspec.core.url_to_fs(root, use_listings_cache=False)

    def below(self, name: str) -> "Place":
        """A place inside of it."""
        return Place(f"{self.root}/{name}")

    def names(self) -> list[str]:
        """Every file."""
        found = self._fs.find(self._path)
        return sorted(path.removeprefix(f"{self._path}/") for path in found)

    def read(self, name: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self._path}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self._path}/{name}", data)

    def remove(self, name: str) -> None:
        self._fs.rm_file(f"{self._path}/{name}")

    def flip(self, name: str, at: int, mask: int) -> None:
        data = bytearray(self.read(name))
        data[at] ^= mask
        self.write(name, bytes(data))

    def logs(self) -> dict[str, bytes]:
        """The files of the commit log."""
        return {name: self.read(name) for name in self.names() if name.endswith(".jsonl")}


@pytest.fixture(scope="module", name="bucket")
def a_bucket(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A prefix of a bucket on an S3 server; copies of what is there stay with the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("copies")))
        patch.setattr("tempfile.tempdir", None)
        yield Place(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture(params=["folder", "bucket"], name="place")
def a_place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """A folder of this machine, and one behind a URL of which no copies are here."""
    if request.param == "folder":
        return Place(str(tmp_path / "store"))
    bucket: Place = request.getfixturevalue("bucket")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return bucket.below(uuid.uuid4().hex)
