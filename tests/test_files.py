"""Files are what they were or all of what is written, whoever writes and whatever ends it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hourglass_jax.files import is_temporary, whole_file, write_whole


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
def test_a_file_is_what_it_was_until_all_is_written(tmp_path, error):
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


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(path.read_bytes)
        write_whole(path, "text")
        assert read.result() == b"text" and path.is_fifo()
