"""Files written past the page cache hold what was written, whole blocks or not."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from elastic.direct_file import DirectFile

MIB = 2**20


@pytest.mark.parametrize("sizes", [(), (1,), (4096,), (8 * MIB,), (100, 8 * MIB, 5 * MIB + 3, 7)])
@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_a_file_holds_the_bytes_in_their_order(
    tmp_path: Path, sizes: tuple[int, ...], folder: str
) -> None:
    root = tmp_path if folder == "disk" else Path("/dev/shm")
    path = root / f"direct-file-{os.getpid()}"
    parts = [os.urandom(size) for size in sizes]
    try:
        with DirectFile(path) as file:
            for part in parts:
                assert file.write(memoryview(part)) == len(part)
        assert path.read_bytes() == b"".join(parts)
    finally:
        path.unlink()


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_the_kernel_takes_in_part_is_written_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, data = os.write, os.urandom(8 * MIB + 10)
    monkeypatch.setattr(os, "write", lambda file, part: write(file, part[:MIB]))
    with DirectFile(tmp_path / "file") as file:
        file.write(memoryview(data))
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_refuses_direct_writes_late_is_written_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    write, data = os.write, os.urandom(16 * MIB + 10)

    def picky(file: int, part: memoryview) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(refused, os.strerror(refused))
        return write(file, part)

    path = tmp_path / "file"
    file = DirectFile(path)
    fcntl.fcntl(file._file, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
    monkeypatch.setattr(os, "write", picky)
    with file:
        if refused == errno.EIO:
            with pytest.raises(OSError, match="Input/output"):
                file.write(memoryview(data))
            return
        file.write(memoryview(data))
    assert path.read_bytes() == data
