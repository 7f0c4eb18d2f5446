"""Token stores: the same from every format, resumable, split by document, read like an array."""

import bz2
import csv
import functools
import gzip
import http.server
import itertools
import json
import lzma
import sys
import threading
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hourglass_jax import CharTokenizer, UsageError
from hourglass_jax.data import prepare as preparing
from hourglass_jax.data import writer as writing
from hourglass_jax.data.corpora import load_text, text_files
from hourglass_jax.data.prepare import PrepareConfig, prepare
from hourglass_jax.data.records import corpus_files
from hourglass_jax.data.store import SPLITS, Store

RNG = np.random.default_rng(0)
WORDS = ["pond", "frog", 'a "quoted" word', "comma, here", "naïve", "日本語", "two\nlines", "\ttab", "\\n"]
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 30))) + f" {i}" for i in range(60)]
TEXTS[7] = ""
SPLIT = PrepareConfig(valid_fraction=0.2, test_fraction=0.1)


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_txt(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i:03d}.txt").write_bytes(text.encode())


def write_csv(path, texts, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])


def table(texts):
    return pa.table({"id": range(len(texts)), "text": texts})


def write_zst(path, content):
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)


def write_arrow_file(path, texts):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=9)


FORMATS = {
    "texts": write_txt,
    "a.jsonl": lambda path, texts: path.write_bytes(json_lines(texts)),
    "bom.jsonl": lambda path, texts: path.write_bytes(b"\xef\xbb\xbf" + json_lines(texts).replace(b"\n", b"\r\n\r\n")),
    "a.json": lambda path, texts: path.write_text(json.dumps([{"text": text} for text in texts], indent=1)),
    "a.jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(json_lines(texts))),
    "a.jsonl.bz2": lambda path, texts: path.write_bytes(bz2.compress(json_lines(texts))),
    "a.jsonl.xz": lambda path, texts: path.write_bytes(lzma.compress(json_lines(texts))),
    "a.jsonl.zst": lambda path, texts: write_zst(path, json_lines(texts)),
    "a.csv": write_csv,
    "a.tsv": lambda path, texts: write_csv(path, texts, "\t"),
    "a.parquet": lambda path, texts: pq.write_table(table(texts), path, row_group_size=9),
    "large.parquet": lambda path, texts: pq.write_table(
        table(texts).cast(pa.schema([("id", pa.int64()), ("text", pa.large_string())])), path
    ),
    "a.arrow": write_arrow_file,
    "saved": lambda path, texts: datasets.Dataset.from_dict({"text": texts}).save_to_disk(path, num_shards=3),
}


def content(directory):
    """The bytes of a store's files, and its record without the paths of the sources."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    record = json.loads(found.pop("store.json"))
    return found, {name: value for name, value in record.items() if name not in ("sources", "first_empty")}


def documents(tokens, tokenizer):
    """The texts of a split; each lies between BOS and EOS."""
    parts = np.split(tokens[:], tokens.ends[:-1])
    assert all(part[0] == tokenizer.bos_id and part[-1] == tokenizer.eos_id for part in parts)
    return [tokenizer.decode(part) for part in parts]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(preparing, "BATCH_BYTES", 1500)
    monkeypatch.setattr(preparing, "JOURNAL_BYTES", 3000)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(TEXTS))
    return [str(path)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    home = tmp_path_factory.mktemp("reference")
    (home / "a.jsonl").write_bytes(json_lines(TEXTS))
    return {
        kind: prepare([str(home / "a.jsonl")], home / kind, replace(SPLIT, tokenizer=kind), shard_bytes=500)
        for kind in ("byte", "char")
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_store(tmp_path, reference, name):
    FORMATS[name](tmp_path / name, TEXTS)
    for kind, expected in reference.items():
        files = corpus_files(str(tmp_path / name))
        store = prepare(files, tmp_path / kind, replace(SPLIT, tokenizer=kind), shard_bytes=500)
        assert content(store.directory) == content(expected.directory)


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_a_store_contains_every_document_once_in_order(reference, kind):
    store = reference[kind]
    parts = {split: documents(getattr(store, split), store.tokenizer) for split in SPLITS}
    assert all(parts.values()) and store.record["empty"] == 1 and store.record["first_empty"].endswith(", record 8")
    full = [text for text in TEXTS if text]
    assert sorted(itertools.chain(*parts.values())) == sorted(full)
    assert all(part == sorted(part, key=full.index) for part in parts.values())
    assert store.train.dtype == {"byte": np.uint16, "char": np.uint8}[kind]
    for split, part in parts.items():
        counts = store.record["splits"][split]
        assert (counts["documents"], counts["bytes"]) == (len(part), sum(len(text.encode()) for text in part))
    store.verify()


def test_the_split_of_a_document_depends_on_its_text_or_id_alone(tmp_path, reference):
    def split_of(texts, config):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_bytes(json_lines(texts))
        store = prepare([str(path)], path.with_suffix(""), config)
        return {text: split for split in SPLITS for text in documents(getattr(store, split), store.tokenizer)[:]}

    by_text = split_of(TEXTS, SPLIT)
    assert split_of(TEXTS[:0:-1], SPLIT).items() <= by_text.items()
    by_id = replace(SPLIT, id_field="id")
    shouted = split_of([text.upper() for text in TEXTS], by_id)
    assert shouted == {text.upper(): split for text, split in split_of(TEXTS, by_id).items()}


def test_ids_are_the_same_in_every_format(tmp_path):
    config = replace(SPLIT, id_field="id")
    stores = []
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.arrow"):
        FORMATS[name](tmp_path / name, TEXTS)
        stores.append(prepare([str(tmp_path / name)], tmp_path / f"{name} store", config))
    named = pa.table({"id": [str(i) for i in range(len(TEXTS))], "text": TEXTS})
    pq.write_table(named, tmp_path / "named.parquet")
    stores.append(prepare([str(tmp_path / "named.parquet")], tmp_path / "named", config))
    assert all(content(store.directory) == content(stores[0].directory) for store in stores)
    (tmp_path / "none.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b"}\n')
    with pytest.raises(UsageError, match=r"none.jsonl, record 2: field 'id' is missing; give another field"):
        prepare([str(tmp_path / "none.jsonl")], tmp_path / "none", config)


def test_duplicates_are_dropped_on_request(tmp_path, corpus):
    (tmp_path / "twice.jsonl").write_bytes(json_lines(TEXTS * 2))
    twice = [str(tmp_path / "twice.jsonl")]
    once = prepare(corpus, tmp_path / "once", SPLIT)
    dropped = prepare(twice, tmp_path / "dropped", replace(SPLIT, drop_duplicates=True))
    assert dropped.record["duplicates"] == 59 and dropped.record["sha256"] == once.record["sha256"]
    assert len(prepare(twice, tmp_path / "kept", SPLIT).train) == 2 * len(once.train)


class Killed(Exception):
    """Stands for a kill, which leaves whatever is on the disk."""


@pytest.mark.parametrize("kind", ["byte", "char"])
@pytest.mark.parametrize("moment", [0, 1, 2, 3, 4, 6, 9, 12])
def test_a_store_killed_and_prepared_again_is_the_same(tmp_path, moment, kind):
    (tmp_path / "twice.jsonl").write_bytes(json_lines(TEXTS * 2))
    arguments = [str(tmp_path / "twice.jsonl")], replace(SPLIT, tokenizer=kind, drop_duplicates=True)
    whole = prepare(arguments[0], tmp_path / "whole", arguments[1], shard_bytes=500)
    calls = []

    def killed(n_bytes, file):
        calls.append(n_bytes)
        if len(calls) > moment:
            raise Killed

    with pytest.raises(Killed):
        prepare(arguments[0], tmp_path / "store", arguments[1], shard_bytes=500, report=killed)
    assert not (tmp_path / "store").exists()
    again = []
    report = lambda n_bytes, file: again.append(n_bytes)  # noqa: E731
    store = prepare(arguments[0], tmp_path / "store", arguments[1], shard_bytes=500, report=report)
    assert content(store.directory) == content(whole.directory)
    assert not (tmp_path / "store.partial").exists()
    if moment >= 9:
        assert again[0] > 0  # what was whole is kept


def test_a_store_killed_while_it_is_finished_is_the_same(tmp_path, corpus, monkeypatch):
    whole = prepare(corpus, tmp_path / "whole", replace(SPLIT, drop_duplicates=True))
    out = tmp_path / "store"

    move = writing.Path.replace

    def killed_before(path, target):
        if path.name == "store.partial":
            raise Killed
        return move(path, target)

    def killed_after(_):
        raise Killed

    for owner, name, killed in ((writing.Path, "replace", killed_before), (writing, "finished", killed_after)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, killed)
            prepare(corpus, out, replace(SPLIT, drop_duplicates=True))
        assert out.exists() == (name == "finished")
    prepare(corpus, out, replace(SPLIT, drop_duplicates=True))
    assert content(out) == content(whole.directory)


def test_two_processes_do_not_prepare_one_store(tmp_path, corpus):
    def second(n_bytes, file):
        with pytest.raises(UsageError, match="another process prepares this store; wait for it"):
            prepare(corpus, tmp_path / "store", SPLIT)

    store = prepare(corpus, tmp_path / "store", SPLIT, report=second)
    assert [path.name for path in tmp_path.glob("store*")] == ["store"] and not (store.directory / "lock").exists()
    (tmp_path / "killed.partial").mkdir()  # before the first journal
    (tmp_path / "killed.partial" / "journal.json.0123abcd.tmp").write_text("{")
    prepare(corpus, tmp_path / "killed", SPLIT)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"mine.partial: exists, and no unfinished store is in it"):
        prepare(corpus, tmp_path / "mine", SPLIT)
    assert (tmp_path / "mine.partial" / "letter.txt").read_text() == "dear"


def test_other_options_start_anew(tmp_path, corpus):
    def killed(n_bytes, file):
        if n_bytes:
            raise Killed

    (tmp_path / "other.txt").write_text("zzz 狐")
    chars = replace(SPLIT, tokenizer="char")
    with pytest.raises(Killed):
        prepare([*corpus, str(tmp_path / "other.txt")], tmp_path / "store", chars, report=killed)
    store = prepare(corpus, tmp_path / "store", chars)
    assert content(store.directory) == content(prepare(corpus, tmp_path / "whole", chars).directory)
    with pytest.raises(UsageError, match="exists and is not the store of these files and options"):
        prepare(corpus, tmp_path / "store", replace(SPLIT, valid_fraction=0.5))


BAD = {
    "cut.jsonl": (json_lines(TEXTS)[:-9], r"cut.jsonl, record 60: cannot be read \(Unterminated string"),
    "cut.json": (b'[{"text": "a"}, {"te', r"cut.json, record 2: cannot be read"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', r"list.jsonl, record 2: cannot be read \(a JSON list, not an object\)"),
    "no_field.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', r"no_field.jsonl, record 2: field 'text' is missing"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 7}\n', r"number.jsonl, record 2: field 'text' is int, not text"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"half.jsonl, record 2: .*surrogate"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "na\xefve"}\n', r"latin.jsonl, record 2: .*utf-8"),
    "latin.txt": (b"na\xefve", r"latin.txt, record 1: not UTF-8 at byte 2 \(0xef\)"),
    "latin.csv": (b"text\na\nna\xefve\n", r"latin.csv, record 2: not UTF-8 at byte 2"),
    "quote.csv": (b'text\na\n"b\n', r"quote.csv, record 2: cannot be read"),
    "short.csv": (b"id,text\n1,a\n2\n", r"short.csv, record 2: field 'text' is missing"),
    "body.csv": (b"id,body\n1,a\n", r"body.csv: no column 'text', only id, body"),
    "cut.jsonl.gz": (gzip.compress(json_lines(TEXTS))[:-9], r"cut.jsonl.gz, record \d+: cannot be read"),
    "cut.jsonl.xz": (lzma.compress(json_lines(TEXTS))[:-20], r"cut.jsonl.xz, record \d+: cannot be read"),
    "no.parquet": (b"no parquet file", r"no.parquet, record 1: cannot be read"),
    "blank.jsonl": (b'{"text": " "}\n', r"blank.jsonl: no document has text"),
    "none.jsonl": (b"", r"none.jsonl: no document has text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        prepare([str(tmp_path / name)], tmp_path / "store", PrepareConfig())
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_truncated_zst_file_is_named(tmp_path):
    """fsspec's reader returns a truncated text without an error."""
    write_zst(tmp_path / "a.jsonl.zst", json_lines(TEXTS))
    whole = (tmp_path / "a.jsonl.zst").read_bytes()
    for length in (len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"a.jsonl.zst, record \d+: cannot be read \(Truncated"):
            prepare([str(tmp_path / "a.jsonl.zst")], tmp_path / "store", PrepareConfig())


def test_columns_of_tables_are_checked(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "body.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "number.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    pq.write_table(pa.table({"text": pa.array([b"a", b"\xff"]).cast(pa.binary())}), tmp_path / "latin.parquet")
    for name, message in (
        ("body", r"body.parquet: no column 'text', only body, id"),
        ("number", r"number.parquet, record 1: field 'text' is int, not text"),
        ("null", r"null.parquet, record 2: field 'text' is missing"),
        ("latin", r"latin.parquet, record 2: not UTF-8 at byte 0 \(0xff\)"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare([str(tmp_path / f"{name}.parquet")], tmp_path / "store", PrepareConfig())


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    write_zst(tmp_path / "a.jsonl.zst", json_lines(TEXTS))
    pq.write_table(table(TEXTS), tmp_path / "a.parquet")
    for name in ("pyarrow", "pyarrow.parquet", "fsspec"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in (tmp_path / "a.parquet", tmp_path / "a.jsonl.zst", "http://localhost/a.jsonl"):
        with pytest.raises(UsageError, match=r"requires \w+; install it with pip install 'hourglass_jax\[data\]'"):
            prepare([str(name)], tmp_path / "store", PrepareConfig())


def test_a_damaged_or_newer_store_is_named(tmp_path, corpus):
    store = prepare(corpus, tmp_path / "store", SPLIT)
    path, shard = store.directory / "store.json", store.directory / "train-00000.bin"
    record, tokens = path.read_text(), shard.read_bytes()
    shard.write_bytes(tokens[:-2] + b"aa")
    with pytest.raises(UsageError, match=r"train-00000.bin: differs from its checksum"):
        Store(store.directory).verify()
    shard.write_bytes(tokens[:-2])
    with pytest.raises(UsageError, match=r"train-00000.bin: has [\d,]+ bytes, not [\d,]+"):
        Store(store.directory)
    path.write_text(record.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UsageError, match="format version 2, not 1; use the version of the library"):
        Store(store.directory)
    path.write_text(record[:99])
    with pytest.raises(UsageError, match="the token store is damaged"):
        Store(store.directory)
    with pytest.raises(UsageError, match="is not a token store"):
        Store(tmp_path)


def test_a_store_is_not_a_text(tmp_path, reference):
    path = str(reference["char"].directory)
    for read in (text_files, load_text, corpus_files):
        with pytest.raises(UsageError, match=r"is a token store, .*; give text files"):
            read(path)


def test_a_given_vocabulary_is_kept(tmp_path, corpus):
    tokenizer = CharTokenizer([*"abcdefgh"])
    store = prepare(corpus, tmp_path / "store", replace(SPLIT, tokenizer="char"), tokenizer)
    assert vars(store.tokenizer) == vars(tokenizer) and tokenizer.unk_id in store.train[:]
    with pytest.raises(UsageError, match="exists and is not the store"):
        prepare(corpus, tmp_path / "store", replace(SPLIT, tokenizer="char"), CharTokenizer([*"xyz"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 0.6, "test_fraction": 0.4}, "their sum must be below 1"),
        ({"valid_fraction": -0.1}, "valid_fraction=-0.1 is out of range"),
        ({"tokenizer": "word"}, "choose one of byte, char"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        PrepareConfig(**options)


def test_files_are_read_over_http(tmp_path, reference):
    served = tmp_path / "served"
    served.mkdir()
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        FORMATS[name](served / name, TEXTS)
    handler = functools.partial(QuietHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            store = prepare(corpus_files(url), tmp_path / name, SPLIT, shard_bytes=500)
            assert content(store.directory) == content(reference["byte"].directory)
        with pytest.raises(UsageError, match=r"none.jsonl, record 1: cannot be read"):
            prepare([f"http://127.0.0.1:{server.server_port}/none.jsonl"], tmp_path / "none", SPLIT)
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
