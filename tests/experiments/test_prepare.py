"""prepare.py as a process: a store is prepared, trained on and evaluated; killed, it ends as an uninterrupted one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import ENVIRONMENT, EXPERIMENTS, run, run_forked

from experiments.common.recorded import recorded_text
from experiments.common.sources import StoreSource, open_source, read_tokenizer
from hourglass_jax import CharTokenizer, DataConfig, UsageError
from hourglass_jax.data.pipeline import plan_documents
from hourglass_jax.data.prepare import PrepareConfig, prepare
from hourglass_jax.data.store import Store

RNG = np.random.default_rng(0)
WORDS = ["an", "old", "silent", "pond", "a", "frog", "jumps", "into", "the", "naïve", "splash", "日本語"]
SMALL = ["--hierarchy=0@1 1@2 1@1", "--d_model=16", "--n_heads=2", "--d_ff=32", "--block_size=40", "--batch_size=4"]
SMALL += ["--shortening=average", "--upsampling=repeat", "--positions=rotary", "--train.eval_interval=3"]


def write_corpus(path, n_documents, n_words=20):
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_documents):
            text = " ".join(RNG.choice(WORDS, RNG.integers(1, n_words)))
            file.write(json.dumps({"text": text, "id": i}, ensure_ascii=False) + "\n")


def succeed(script, *flags, cwd, start=run_forked):
    result = start(script, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def same(first, second):
    names = {path.name for path in first.iterdir()}
    return names == {path.name for path in second.iterdir()} and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, its store, and a model that was trained on the store."""
    home = tmp_path_factory.mktemp("prepared")
    write_corpus(home / "corpus.jsonl", 300)
    fractions = ["--valid_fraction=0.1", "--test_fraction=0.05"]
    prepared = succeed("prepare", "--data_path=*.jsonl", "--out=data/web", *fractions, cwd=home)
    trained = succeed(
        *("pretrain", *SMALL, "--data_path=data/web", "--data.order=documents", "--steps=6", "--out=run"), cwd=home
    )
    return home, prepared, trained


def test_the_command_says_what_the_store_contains(home):
    home, prepared, _ = home
    store = Store(home / "data/web")
    splits = (store.train, store.valid, store.test)
    counts = [f"{len(part):,} tokens in {len(part.ends):,} documents" for part in splits]
    assert all(count in prepared.stdout for count in counts) and not prepared.stderr
    assert prepared.stdout.endswith("next: python experiments/pretrain.py --data_path=data/web\n")
    assert succeed(*prepared.args, cwd=home).stdout == prepared.stdout  # nothing is left to do


def test_training_says_how_many_tokens_are_lost_and_resumes_from_a_moved_store(home, tmp_path):
    home, _, trained = home
    plan = plan_documents(Store(home / "data/web").train, 40)
    assert plan.n_lost and f"{len(plan.starts):,} windows an epoch: {plan.n_lost:,} (" in trained.stdout
    (tmp_path / "moved").symlink_to(home / "data/web")
    shutil.copytree(home / "run", tmp_path / "run")
    flags = ["--data_path=moved", "--data.order=documents", "--steps=8", "--out=run"]
    resumed = succeed("pretrain", *SMALL, *flags, cwd=tmp_path)
    assert "steps raised from 6 to 8" in resumed.stderr
    with pytest.raises(UsageError, match="a token store has its own validation split"):
        StoreSource(DataConfig(path=str(home / "data/web"), valid_path="x"))


def test_evaluation_counts_the_bytes_of_the_documents(home):
    home, *_ = home
    result = succeed("evaluate", "--load_model_path=run", cwd=home)
    figures = json.loads(result.stdout.splitlines()[-1])
    store = Store(home / "data/web")
    record = store.record["splits"]["valid"]
    assert figures["n_bytes"] == record["bytes"] and figures["n_documents"] == record["documents"]
    assert figures["text"] == "valid of data/web (the training text)"
    succeed("evaluate", "--load_model_path=run", "--per_token=nats.tsv", cwd=home)
    bits = np.loadtxt(home / "nats.tsv", skiprows=1, usecols=3, delimiter="\t", comments=None)
    lengths = np.diff(store.valid.ends, prepend=0) - 2
    assert len(bits) == lengths.sum() and figures["bits_per_byte"] == pytest.approx(bits.mean(), abs=1e-4)
    means = [part.mean() for part in np.split(bits, np.cumsum(lengths)[:-1])]
    assert figures["bits_by_document"] == pytest.approx(np.mean(means), abs=1e-4)
    with pytest.raises(UsageError, match="has the splits train, valid and test"):
        recorded_text(home / "run", str(home / "data/web"), "all")


def test_a_store_of_another_tokenizer_is_named(home, tmp_path):
    home, *_ = home
    store = prepare(
        [str(home / "corpus.jsonl")], tmp_path / "chars", PrepareConfig(tokenizer="char", valid_fraction=0.1)
    )
    with pytest.raises(UsageError, match=r"chars: the token store has another tokenizer \(char, \d+ tokens\) than the"):
        recorded_text(home / "run", str(tmp_path / "chars"), None)
    data = DataConfig(path=str(tmp_path / "chars"), block_size=40)
    with pytest.raises(UsageError, match="prepare it with the model's --tokenizer=char and --vocab_path"):
        open_source(data, tokenizer=CharTokenizer([*"abc"]))
    assert vars(read_tokenizer(data, "")) == vars(store.tokenizer) == vars(open_source(data).tokenizer)
    none = prepare([str(home / "corpus.jsonl")], tmp_path / "none", PrepareConfig(valid_fraction=0))
    with pytest.raises(UsageError, match=r"0 validation tokens are too few .*another --valid_fraction"):
        open_source(DataConfig(path=str(none.directory), block_size=40))


BAD = {
    "a missing field": ["--data_path=a.jsonl", "--field=body", "--out=store"],
    "no output": ["--data_path=a.jsonl"],
    "two tokenizers": ["--data_path=a.jsonl", "--tokenizer=byte", "--vocab_path=vocab.json", "--out=store"],
    "no files": ["--data_path=*.parquet", "--out=store"],
    "all documents held out": ["--data_path=a.jsonl", "--valid_fraction=1", "--out=store"],
}
MESSAGES = {
    "a missing field": r"a.jsonl, record 1: field 'body' is missing; give another field as --field or --id_field",
    "no output": r"--out is missing; give --data_path=DOCUMENTS and --out=DIRECTORY",
    "two tokenizers": r"--vocab_path lists characters, which --tokenizer=byte does not use; leave out one of them",
    "no files": r"\*.parquet: no such file; .*",
    "all documents held out": r"valid_fraction=1.0 and test_fraction=0.01 leave nothing to train on; .*",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name):
    write_corpus(tmp_path / "a.jsonl", 3)
    result = run_forked("prepare", *BAD[name], cwd=tmp_path)
    assert result.returncode == 2 and re.fullmatch(f"prepare.py: error: {MESSAGES[name]}\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_several_processes_write_the_same_store(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 30_000, n_words=60)  # some batches
    flags = ["--data_path=a.jsonl", "--tokenizer=char", "--drop_duplicates"]
    succeed("prepare", *flags, "--out=one", cwd=tmp_path)
    succeed("prepare", *flags, "--out=two", "--processes=2", cwd=tmp_path, start=run)
    assert same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_killed_at_several_moments_ends_with_the_same_store(tmp_path, processes):
    write_corpus(tmp_path / "a.jsonl", 500_000, n_words=120)
    flags = ["--data_path=a.jsonl", "--drop_duplicates", f"--processes={processes}"]
    succeed("prepare", *flags, "--out=whole", cwd=tmp_path, start=run)
    command = [sys.executable, EXPERIMENTS / "prepare.py", *flags, "--out=store"]
    journal = tmp_path / "store.partial/journal.json"
    done = [0]
    for _ in range(5):
        with subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT) as process:
            while process.poll() is None and not (journal.is_file() and records(journal) > done[-1]):
                time.sleep(0.002)
            time.sleep(RNG.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        done.append(records(journal) if journal.is_file() else done[-1])
    assert done[1] > 0 and done == sorted(done)
    succeed("prepare", *flags, "--out=store", cwd=tmp_path, start=run)
    assert same(tmp_path / "whole", tmp_path / "store") and not journal.parent.exists()


def records(journal):
    return json.loads(journal.read_text())["state"]["records"]
