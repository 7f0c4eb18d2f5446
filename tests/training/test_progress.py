"""What a training shows of itself, on whatever it is shown."""

import io
import sys

from hourglass_jax.training.hooks import Progress


class Closed(io.StringIO):
    encoding = "utf-8"

    def write(self, _):
        raise BrokenPipeError


def test_no_sample_that_cannot_be_shown_ends_a_run(monkeypatch, capsys):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    for stream in (narrow, Closed(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        progress = Progress(3, 0, "plain")
        progress.write("俳句 \ud800 é")
        progress.close()
    assert narrow.buffer.getvalue() == b"\\u4ff3\\u53e5 \\ud800 \xe9\n"


def test_plain_lines_where_nothing_redraws_them(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for mode in ("auto", "plain", "none"):
        progress = Progress(600, 99, mode)
        progress.advance()
        progress.show({"loss": "2.5"})  # not so soon
        progress.show({"valid BPC": "3.1"}, now=True)
        progress.close()
        shown = "" if mode == "none" else "step 100/600: loss 2.5, valid BPC 3.1\n"
        assert capsys.readouterr().err == shown
