"""What `fetch` gives back is the true corpus, and what fails leaves nothing behind."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from launching import ENVIRONMENT, EXPERIMENTS

from hourglass_jax import UsageError
from hourglass_jax.data import downloads

CONTENT = np.random.default_rng(0).integers(97, 123, 50_000, np.uint8).tobytes()


@pytest.fixture
def offer(monkeypatch, tmp_path):
    """offer(url=None, content=CONTENT, member="enwik8") -> the archive, which `fetch` then takes for enwik8's."""

    def offer(url=None, content=CONTENT, member="enwik8"):
        archive = tmp_path / "archive.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(member, content)
        corpus = downloads.Corpus(url or archive.as_uri(), len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setitem(downloads.CORPORA, "enwik8", corpus)
        return archive

    return offer


@pytest.fixture
def serve():
    """serve(body, announced, status=200) -> the address that answers with `body` or what it returns.

    `announced` is the Content-Length.
    """
    servers = []

    def serve(body, announced, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                if announced is not None:
                    self.send_header("Content-Length", str(announced))
                self.end_headers()
                self.wfile.write(body() if callable(body) else body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/enwik8.zip"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(directory):
    with pytest.raises(UsageError) as error:
        downloads.fetch("enwik8", directory)
    message = str(error.value)
    assert "\n" not in message and str(directory / "enwik8") in message
    return message


def test_a_good_download_is_unpacked_into_place(offer, tmp_path):
    offer()
    path = downloads.fetch("enwik8", tmp_path / "new" / "data")
    assert path == tmp_path / "new" / "data" / "enwik8" and path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_good_download_over_http(offer, serve, tmp_path):
    body = offer().read_bytes()
    offer(url=serve(body, len(body)))
    assert downloads.fetch("enwik8", tmp_path / "data").read_bytes() == CONTENT


def test_an_existing_good_file_needs_no_network(offer, tmp_path, monkeypatch):
    offer().unlink()
    (tmp_path / "enwik8").write_bytes(CONTENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    for directory in (tmp_path, "~"):
        assert downloads.fetch("enwik8", directory) == tmp_path / "enwik8"


@pytest.mark.parametrize(("content", "words"), [(CONTENT[:-1], "49,999 bytes"), (b"#" + CONTENT[1:], "SHA-256")])
def test_an_existing_bad_file_raises_an_error_and_is_kept(offer, tmp_path, content, words):
    offer()
    (tmp_path / "enwik8").write_bytes(content)
    message = refusal(tmp_path)
    assert words in message and "remove it" in message
    assert (tmp_path / "enwik8").read_bytes() == content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"content": CONTENT[:-1]}, "49,999 bytes instead of 50,000"),
        ({"content": b"#" + CONTENT[1:]}, "SHA-256"),
        ({"member": "other"}, "enwik8"),
        ({"url": "http://127.0.0.1:9/enwik8.zip"}, "refused"),
    ],
)
def test_a_wrong_download_leaves_nothing(offer, tmp_path, options, words):
    offer(**options)
    assert words in refusal(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("told", [True, False], ids=["length told", "length not told"])
@pytest.mark.parametrize("cut", [0, 1, 100, 20_000])
def test_a_truncated_download_leaves_nothing(offer, serve, tmp_path, cut, told):
    body = offer().read_bytes()
    offer(url=serve(body[:cut], len(body) if told else None))
    message = refusal(tmp_path / "data")
    assert not told or f"{cut:,} of {len(body):,} bytes arrived" in message
    assert list((tmp_path / "data").iterdir()) == []


def test_a_damaged_archive_leaves_nothing(offer, tmp_path):
    archive = offer()
    damaged = bytearray(archive.read_bytes())
    damaged[1000] ^= 0xFF
    archive.write_bytes(damaged)
    refusal(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_server_error_raises_an_error(offer, serve, tmp_path):
    offer(url=serve(b"gone", 4, status=404))
    assert "404" in refusal(tmp_path / "data")


def test_an_interrupted_download_leaves_nothing(offer, monkeypatch, tmp_path):
    def interrupted(url, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    offer()
    monkeypatch.setattr(downloads, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        downloads.fetch("enwik8", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


PLUGIN = """
import signal
from hourglass_jax.data import downloads

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may lack
downloads.CORPORA["enwik8"] = downloads.Corpus("{url}", 0, "")
"""


@pytest.mark.launchers
def test_ctrl_c_in_a_launcher_s_download_is_one_line_and_leaves_nothing(serve, tmp_path):
    asked, answer = threading.Event(), threading.Event()

    def silence():
        asked.set()
        answer.wait(60)
        return b""

    (tmp_path / "plugin.py").write_text(PLUGIN.format(url=serve(silence, 1000)))
    command = [sys.executable, EXPERIMENTS / "ablate.py", "--table=1", "--plugin=plugin.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    answer.set()
    assert process.returncode == 130 and stderr == "ablate.py: error: interrupted\n"
    assert list((tmp_path / "data").iterdir()) == []


def test_unknown_corpora_are_refused(tmp_path):
    with pytest.raises(UsageError, match="enwik8, text8"):
        downloads.fetch("enwik7", tmp_path)


@pytest.mark.parametrize("error", [EOFError(), KeyError(), NotImplementedError("compression type 99")])
def test_every_failure_is_one_even_without_words(tmp_path, monkeypatch, error):
    def fail(url, path):
        raise error

    monkeypatch.setattr(downloads, "download", fail)
    with pytest.raises(UsageError, match=rf"download of enwik8 failed: .*({type(error).__name__}|type 99)"):
        downloads.fetch("enwik8", tmp_path)
    assert not any(tmp_path.iterdir())
