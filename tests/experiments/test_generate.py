"""generate.py on models of random weights: where prompts come from, where a sample starts and ends, and its bytes."""

import codecs
import io
import itertools
import os
import signal
import string
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import light_config, make_model
from flax import nnx

import hourglass_jax as hg
from experiments import generate as launcher
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.run import Record, Run
from hourglass_jax.training.signals import Signals

CHARACTERS, BYTES, OLD_BYTES = (
    hg.CharTokenizer.from_text(string.ascii_lowercase + " \n."),
    hg.ByteTokenizer(),
    hg.ByteTokenizer(256),
)


def write_model(directory, tokenizer, **settings):
    model = make_model(light_config(d_model=8, vocab_size=tokenizer.vocab_size), scale=10.0)
    Run(directory).write(Record(model.config, tokenizer, settings, []))
    store = CheckpointStore(directory)
    store.save(1, nnx.state(model, nnx.Param))
    store.close()
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return {
        "char": write_model(home / "char", CHARACTERS),
        "byte": write_model(home / "byte", BYTES),
        "old": write_model(home / "old", OLD_BYTES),
        "image": write_model(home / "image", hg.ImageTokenizer((2, 2, 3))),
    }


@pytest.fixture
def generate(capsys):
    def generate(run, *options):
        with flagsaver.flagsaver():
            length = [] if run.name == "image" else ["--max_tokens=30"]
            flags.FLAGS(["generate.py", f"--load_model_path={run}", *length, *options])
            launcher.main([])
        return capsys.readouterr().out

    return generate


PROMPT = "--gen_mode=prompt"


def test_a_file_or_standard_input_is_a_prompt_as_it_is_but_for_its_last_line_end(runs, generate, tmp_path, monkeypatch):
    expected = generate(runs["char"], PROMPT, "--prompt=ab\nc")
    (tmp_path / "prompt.txt").write_text("ab\nc\n")
    assert generate(runs["char"], PROMPT, f"--prompt_file={tmp_path / 'prompt.txt'}") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\r\nc")))
    assert generate(runs["char"], PROMPT, "--prompt_file=-") == expected
    assert expected.startswith("ab\nc")


def test_the_last_line_end_of_a_prompt_in_bytes_may_have_two(runs, generate, tmp_path):
    expected = generate(runs["byte"], PROMPT, "--prompt=ab\r\nc")
    for end in (b"", b"\n", b"\r\n"):
        (tmp_path / "prompt.txt").write_bytes(b"ab\r\nc" + end)
        assert generate(runs["byte"], PROMPT, f"--prompt_file={tmp_path / 'prompt.txt'}") == expected


def test_each_line_of_a_file_may_be_a_prompt(runs, generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n\nc\r\n")
    options = ["--temperature=0", "--num_samples=2"]
    stdout = generate(runs["char"], PROMPT, f"--prompt_file={tmp_path / 'prompts.txt'}", "--each_line", *options)
    samples = stdout.split("-" * 20 + "\n")
    alone = [generate(runs["char"], PROMPT, f"--prompt={prompt}", "--temperature=0") for prompt in ("ab", "c")]
    assert samples == [alone[0], alone[0], alone[1], alone[1]]


def test_bytes_of_prompts_and_samples_are_unchanged(runs, generate, tmp_path):
    prompt, out = bytes(range(256)), tmp_path / "out"
    (tmp_path / "prompt").write_bytes(prompt)
    for run, tokenizer in (("byte", BYTES), ("old", OLD_BYTES)):
        options = ["--temperature=1", f"--prompt_file={tmp_path / 'prompt'}"]
        stdout = generate(runs[run], PROMPT, *options, f"--raw_out={out}")
        model, loaded, _ = hg.load(runs[run])
        assert loaded.vocab_size == tokenizer.vocab_size
        [tokens] = hg.generate(
            model,
            [np.frombuffer(prompt, np.uint8)],
            max_tokens=30,
            key=jax.random.fold_in(jax.random.key(0), 0),
            stop_token=tokenizer.eos_id,
            banned_tokens=[tokenizer.bos_id],
        )
        assert out.read_bytes() == bytes(tokens.tolist()) and max(out.read_bytes()) > 127
        assert stdout == (prompt.decode("utf-8", "replace") + out.read_bytes().decode("utf-8", "replace") + "\n")


def test_a_sample_ends_before_the_first_text_to_stop_at(runs, generate, tmp_path):
    out = tmp_path / "out"
    prompt = [PROMPT, "--prompt=ab", "--temperature=3"]
    samples = [generate(runs["char"], *prompt, f"--seed={seed}")[len("ab") : -1] for seed in range(4)]
    seed = max(range(4), key=lambda seed: len(samples[seed]))  # others may end by themselves
    free = samples[seed]
    assert len(free) >= 18
    for stops in ([free[9:12]], [free[15:18], free[5:7]], [free[0]], ["no such"]):
        stop = [f"--stop={stop}" for stop in stops]
        stdout = generate(runs["char"], *prompt, f"--seed={seed}", *stop, f"--raw_out={out}")
        expected = free[: min([free.find(stop) for stop in stops if stop in free], default=len(free))]
        assert stdout == f"ab{expected}\n" and out.read_text() == expected


@pytest.mark.parametrize("text", ["one END two", "oneEN", "ENDEND", "日本 END", "EEND.", "no"])
def test_however_a_text_comes_what_is_shown_is_what_comes_before_the_stop(text, capsys):
    stops = ["END", ".."]
    expected = text.split("END")[0]
    tokens = BYTES.encode(text)
    for cut in itertools.combinations(range(len(tokens) + 1), 2):
        sample = launcher.Sample(BYTES, stops, Signals())
        try:
            for part in np.split(tokens, cut):
                sample.take([part])
            assert "END" not in text
        except launcher.StopText:
            assert "END" in text
        assert sample.finish() == expected.encode()
        assert capsys.readouterr().out == expected + "\n"


def test_from_nothing_a_sample_starts_with_what_was_trained():
    def start(tokenizer, form="text"):
        return launcher.prompt_tokens(tokenizer, b"", form).tolist()

    for tokenizer in (CHARACTERS, BYTES, OLD_BYTES):
        assert start(tokenizer) == tokenizer.encode("\n").tolist()
        assert start(tokenizer, "haiku") == [tokenizer.bos_id]
    for characters, first in (("xy z", " "), ("xyz", "x")):
        tokenizer = hg.CharTokenizer.from_text(characters)
        assert start(tokenizer) == tokenizer.encode(first).tolist() != [tokenizer.unk_id]
        assert start(tokenizer, "haiku") == [tokenizer.bos_id]


@pytest.mark.parametrize(
    "run, options, message",
    [
        ("char", [PROMPT, "--prompt=a", "--prompt_file=b"], "requires one prompt"),
        ("char", ["--gen_mode=scratch", "--prompt_file=b"], "--prompt_file does not apply to --gen_mode=scratch"),
        ("char", [PROMPT, "--prompt=a", "--each_line"], "--each_line requires --prompt_file"),
        ("char", [PROMPT, "--prompt_file={home}/empty"], "contains no prompt"),
        ("char", [PROMPT, "--prompt_file={home}/latin"], "latin: not UTF-8 at byte 1 .line 1"),
        ("char", [PROMPT, "--prompt=a\ud800"], "surrogate"),
        ("char", ["--stop=\ud800"], "surrogate"),
        ("char", ["--stop="], "--stop is empty"),
        ("image", ["--stop=a"], "--stop does not apply"),
        ("image", ["--raw_out=out"], "--raw_out does not apply"),
    ],
)
def test_invalid_options_raise_one_line_errors(runs, generate, tmp_path, run, options, message):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"a\xe9")
    with pytest.raises(hg.UsageError, match=message) as error:
        generate(runs[run], *(option.format(home=tmp_path) for option in options))
    assert "\n" not in str(error.value)


def test_a_rejected_command_keeps_the_existing_output_file(runs, generate, tmp_path):
    (tmp_path / "out").write_bytes(b"before")
    with pytest.raises(hg.UsageError):
        generate(runs["char"], "--top_p=2", f"--raw_out={tmp_path / 'out'}")
    assert (tmp_path / "out").read_bytes() == b"before"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_has_come_and_is_no_success(runs, generate, tmp_path, monkeypatch, capsys, number):
    whole = generate(runs["char"], "--temperature=3", "--seed=1")[:-1]
    take = launcher.Sample.take

    def signalled(sample, new):
        take(sample, new)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(launcher.Sample, "take", signalled)
    with pytest.raises(SystemExit) as end:
        generate(runs["char"], "--temperature=3", "--seed=1", "--num_samples=3", f"--raw_out={tmp_path / 'out'}")
    shown, error = capsys.readouterr()
    assert end.value.code == 128 + number and error.count("\n") == 1 and f"stopped by {number.name}" in error
    assert (
        shown == (tmp_path / "out").read_text() + "\n"
        and 0 < len(shown) - 1 < len(whole)
        and whole.startswith(shown[:-1])
    )


def test_a_prompt_that_is_empty_after_cleaning_raises_an_error(tmp_path, generate, caplog):
    run = write_model(tmp_path / "clean", hg.CharTokenizer.from_text("hello world\n", clean=True))
    with pytest.raises(hg.UsageError, match=r"'日本語42'.* is empty after cleaning"):
        generate(run, PROMPT, "--prompt=日本語42")
    generate(run, PROMPT, "--prompt=HéLLo")
    assert not caplog.records
    generate(run, PROMPT, "--prompt=hello 42")
    assert "'2', '4'" in caplog.text


def test_a_file_that_is_missing_is_named(runs, generate, tmp_path):
    with pytest.raises(OSError, match="nowhere"):  # which the launchers print in one line
        generate(runs["char"], PROMPT, f"--prompt_file={tmp_path / 'nowhere'}")


def test_a_split_character_waits_for_its_rest(capsys):
    sample = launcher.Sample(BYTES, [], Signals())
    first, second = BYTES.encode("é")
    sample.take([[first]])
    assert capsys.readouterr().out == ""
    sample.take([[second]])
    assert capsys.readouterr().out == codecs.decode(bytes([first, second]), "utf-8")
