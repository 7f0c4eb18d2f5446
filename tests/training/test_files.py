"""Files are what they were or all of what is written, whoever writes and whatever ends it."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hourglass_jax.errors import UsageError
from hourglass_jax.files import is_temporary, optional_output, whole_directory, whole_file, write_whole


def test_many_writers_of_one_file_do_not_collide(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda text: write_whole(tmp_path / "file", text), texts))
            assert (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert is_temporary(Path("a/vocab.json.0a1b2c3d.tmp"), ["vocab.json"])
    assert not is_temporary(Path("a/thesis.0a1b2c3d.tmp"), ["vocab.json"])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_replaced_atomically(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(error), whole_file(path) as file:
        file.write(b"a part")
        file.flush()
        raise error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
    with whole_file(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all"


def test_a_full_disk_is_reported_with_the_file(tmp_path, monkeypatch, caplog):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "file"
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_whole(path, "text")
    for _ in range(2):
        with optional_output(tmp_path):
            write_whole(path, "text")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: cannot be written (No space left on device); the run continues without it"
    ]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(path.read_bytes)
        write_whole(path, "text")
        assert read.result() == b"text" and path.is_fifo()


def test_writing_through_a_symlink_keeps_the_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("file", "directory"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere/directory").mkdir()
    write_whole(tmp_path / "file", "new")
    with whole_directory(tmp_path / "directory") as directory:
        (directory / "part").write_text("new")
    assert (tmp_path / "elsewhere/file").read_text() == (tmp_path / "elsewhere/directory/part").read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "file", "directory", "part"}
    assert (tmp_path / "file").is_symlink() and (tmp_path / "directory").is_symlink()


def test_the_working_directory_itself_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_directory(Path(".")) as directory:
        (directory / "part").write_text("new")
    assert os.listdir() == ["part"]
    with pytest.raises(UsageError, match="exists; choose another"), whole_directory(Path(".")):
        pass
