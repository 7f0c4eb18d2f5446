"""Writes token stores (see `store`): any corpus -> tokens, split by document, resumable at any moment.

A store grows in a directory beside its place, OUT.partial, and moves there when it is whole. Its files only grow. A
journal records how long they were when a number of documents was done, so a killed process resumes from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from hourglass_jax.data.corpora import decode_text
from hourglass_jax.data.records import Document, Record, read_document, read_records
from hourglass_jax.data.store import (
    FORMAT_VERSION,
    SPLITS,
    STORE,
    VOCABULARY,
    Store,
    ends_name,
    is_store,
    sha256,
    shard_name,
)
from hourglass_jax.data.workers import parallel_map
from hourglass_jax.errors import UsageError
from hourglass_jax.files import write_whole
from hourglass_jax.ranges import check_literals, check_range, take_plain_values
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer

SHARD_BYTES = 2**30
BATCH_BYTES = 2**22  # of text that a process encodes at once
JOURNAL_BYTES = 2**26  # of text between two entries of the journal
JOURNAL, DIGESTS = "journal.json", "digests"
DIGEST_BYTES = 16

Report = Callable[[int, str], None]  # of the bytes of text that are done, and the file that is read


@dataclass(frozen=True)
class PrepareConfig:
    """What a token store contains.

    field: of the text in each record; a text file is one document.
    id_field: its hash decides the split of a document; empty: the hash of the text does.
    tokenizer: byte | char (the characters of all documents).
    valid_fraction, test_fraction: probability that a document is for validation or test.
    drop_duplicates: keep only the first of several documents with the same text; takes 100 bytes of memory a document.
    """

    field: str = "text"
    id_field: str = ""
    tokenizer: Literal["byte", "char"] = "byte"
    valid_fraction: float = 0.01
    test_fraction: float = 0.01
    drop_duplicates: bool = False

    @property
    def names(self) -> list[str]:
        """The fields to read: of the text and, unless it is the text, of the key."""
        return [self.field, *filter(None, [self.id_field])]

    def __post_init__(self) -> None:
        take_plain_values(self)
        check_literals(self)
        check_range("valid_fraction", self.valid_fraction, 0.0)
        check_range("test_fraction", self.test_fraction, 0.0)
        if self.valid_fraction + self.test_fraction >= 1:
            raise UsageError(
                f"valid_fraction={self.valid_fraction} and test_fraction={self.test_fraction} leave nothing to train "
                "on; their sum must be below 1"
            )


@dataclass(frozen=True)
class Encoded:
    """Documents as tokens [N], one after the other; `lengths`, `n_bytes`, `splits` and `digests` are by document."""

    tokens: np.ndarray
    lengths: np.ndarray
    n_bytes: np.ndarray
    splits: np.ndarray
    digests: list[bytes]
    empty: list[str]  # places of documents without text, which are left out
    n_records: int
    file: str


def encode(records: list[Record], tokenizer: TextTokenizer, config: PrepareConfig) -> Encoded:
    """Encode the documents of records, and choose the split of each by the hash of its key."""
    documents = [read_document(record, config.names) for record in records]
    full = [document for document in documents if document.text.strip()]
    pieces = [tokenizer.encode(in_form_of(tokenizer, document)) for document in full]
    bos, eos = np.array([tokenizer.bos_id]), np.array([tokenizer.eos_id])
    parts = [part for piece in pieces for part in (bos, piece, eos)]
    tokens = np.concatenate([*parts, bos[:0]], dtype=token_type(tokenizer), casting="unsafe")
    digests = [digest(document.text) for document in full]
    keys = [digest(document.key) for document in full] if config.id_field else digests
    chance = np.array([int.from_bytes(key[:8], "little") for key in keys], np.float64) / 2.0**64
    splits = np.searchsorted([config.valid_fraction, config.valid_fraction + config.test_fraction], chance, "right")
    return Encoded(
        tokens,
        lengths=np.array([len(piece) + 2 for piece in pieces], np.int64),
        n_bytes=np.array([len(document.text) for document in full], np.int64),
        splits=np.array([1, 2, 0])[splits],
        digests=digests,
        empty=[document.place for document in documents if not document.text.strip()],
        n_records=len(records),
        file=records[-1].file,
    )


def in_form_of(tokenizer: TextTokenizer, document: Document) -> Any:
    """Return bytes as they are, or text with "\\n" as line ends."""
    return document.text if tokenizer.kind == "byte" else decode_text(document.text, document.place)


def digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def token_type(tokenizer: TextTokenizer) -> np.dtype:
    """Return the smallest type for the tokens. Raises UsageError for a vocabulary that 16 bits cannot number."""
    if tokenizer.vocab_size > 2**16:
        raise UsageError(f"the documents have {tokenizer.vocab_size:,} different characters; choose tokenizer='byte'")
    return np.dtype("<u2" if tokenizer.vocab_size > 2**8 else "<u1")


def characters_of(records: list[Record], names: list[str]) -> tuple[set[str], int, str]:
    """Return the characters of the documents, their bytes, and the file of the last one."""
    characters, n_bytes = set[str](), 0
    for document in (read_document(record, names) for record in records):
        characters.update(decode_text(document.text, document.place))
        n_bytes += len(document.text)
    return characters, n_bytes, records[-1].file


def in_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield lists of records with about BATCH_BYTES of text."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        texts = [record.content] if isinstance(record.content, bytes) else record.content
        size += sum(len(text) for text in texts if isinstance(text, str | bytes)) + 64
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class StoreWriter:
    """The files of a growing store. `add` appends, `save` writes the journal, `finish` moves the store to its place."""

    def __init__(self, out: Path, identity: dict[str, Any], shard_bytes: int):
        """Open OUT.partial; resume if its journal has the same identity, or else start anew."""
        self.out, self.directory = out, out.with_name(f"{out.name}.partial")
        self._identity, self._shard_bytes = identity, shard_bytes
        self._files: dict[str, IO[bytes]] = {}
        self._lengths: dict[str, int] = {}
        self._seen: set[bytes] = set()
        counts = dict.fromkeys(("documents", "tokens", "bytes"), 0)
        self.state: dict[str, Any] = {"records": 0, "bytes": 0, "empty": 0, "first_empty": "", "duplicates": 0}
        self.state |= {"splits": {split: dict(counts) for split in SPLITS}}
        self._open()

    def _open(self) -> None:
        here, journal = self.directory, self.directory / JOURNAL
        if here.exists() and not journal.is_file() and any(here.iterdir()):
            raise UsageError(f"{here}: exists, and no unfinished store is in it; remove it or choose another --out")
        here.mkdir(parents=True, exist_ok=True)
        known = json.loads(journal.read_text(encoding="utf-8")) if journal.is_file() else {}
        kept = [JOURNAL]
        if known.get("identity") == self._identity:
            self.state, self._lengths = known["state"], known["lengths"]
            kept += [VOCABULARY, *self._lengths]
        for path in here.iterdir():
            if path.name not in kept:
                path.unlink() if path.is_file() else shutil.rmtree(path)
        for name, length in self._lengths.items():
            os.truncate(here / name, length)
        if DIGESTS in self._lengths:
            digests = (here / DIGESTS).read_bytes()
            self._seen = {digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)}
        self.save()

    def save(self) -> None:
        """Write all files to the disk, then the journal."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        content = {"identity": self._identity, "state": self.state, "lengths": self._lengths}
        write_whole(self.directory / JOURNAL, json.dumps(content))

    def add(self, encoded: Encoded, *, drop_duplicates: bool) -> None:
        """Append documents to their splits."""
        kept = np.ones(len(encoded.lengths), bool)
        if drop_duplicates:
            for i, key in enumerate(encoded.digests):
                kept[i] = key not in self._seen
                self._seen.add(key)
            self._append(DIGESTS, b"".join(key for key, new in zip(encoded.digests, kept, strict=True) if new))
        for number, split in enumerate(SPLITS):
            chosen = kept & (encoded.splits == number)
            if chosen.any():
                self._add_to(split, encoded, chosen)
        self.state["records"] += encoded.n_records
        self.state["bytes"] += int(encoded.n_bytes.sum())
        self.state["empty"] += len(encoded.empty)
        self.state["first_empty"] = self.state["first_empty"] or next(iter(encoded.empty), "")
        self.state["duplicates"] += int((~kept).sum())

    def _add_to(self, split: str, encoded: Encoded, chosen: np.ndarray) -> None:
        counts, lengths = self.state["splits"][split], encoded.lengths[chosen]
        tokens = encoded.tokens if chosen.all() else encoded.tokens[np.repeat(chosen, encoded.lengths)]
        self._append(ends_name(split), (counts["tokens"] + np.cumsum(lengths)).astype("<i8").data)
        shard_tokens = self._shard_bytes // tokens.itemsize
        while len(tokens):
            number, used = divmod(counts["tokens"], shard_tokens)
            part, tokens = np.split(tokens, [shard_tokens - used])
            self._append(shard_name(split, number), part.data)
            counts["tokens"] += len(part)
        counts["documents"] += len(lengths)
        counts["bytes"] += int(encoded.n_bytes[chosen].sum())

    def _append(self, name: str, content: Any) -> None:
        if name not in self._files:
            self._files[name] = (self.directory / name).open("ab")
        self._lengths[name] = self._lengths.get(name, 0) + self._files[name].write(content)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def remove(self) -> None:
        shutil.rmtree(self.directory)

    def finish(self, tokenizer: TextTokenizer, config: PrepareConfig, sources: list[dict[str, Any]]) -> Store:
        """Write store.json and move the store to its place."""
        self.save()
        here, dtype = self.directory, token_type(tokenizer)
        names = sorted(self._lengths.keys() - {DIGESTS} | {VOCABULARY} & set(os.listdir(here)))
        record = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            "shard_tokens": self._shard_bytes // dtype.itemsize,
            "splits": self.state["splits"],
            "empty": self.state["empty"],
            "first_empty": self.state["first_empty"],
            "duplicates": self.state["duplicates"],
            "settings": dataclasses.asdict(config),
            "sources": sources,
            "sha256": {name: sha256(here / name) for name in names},
        }
        write_whole(here / STORE, json.dumps(record, indent=1) + "\n")
        here.replace(self.out)
        return finished(self.out)


def finished(out: Path) -> Store:
    """Remove what only an unfinished store needs, and open the store."""
    for name in (JOURNAL, DIGESTS):
        (out / name).unlink(missing_ok=True)
    return Store(out)


def prepare(
    files: list[str],
    out: str | Path,
    config: PrepareConfig,
    tokenizer: TextTokenizer | None = None,
    *,
    processes: int = 1,
    report: Report = lambda n_bytes, file: None,
    shard_bytes: int = SHARD_BYTES,
) -> Store:
    """Write a token store of the documents of `files` (see `records`), or resume one; it is the same in any case.

    tokenizer: None: the one of `config`; characters are counted in a pass of their own.
    report: called with the bytes of text that are done since the last call, and the file.

    Raises UsageError, and leaves nothing, for input that `records` rejects and for documents without any text; for an
    `out` that exists, unless it is the store of this call.
    """
    out = Path(out).expanduser()
    sources = [describe(file) for file in files]
    if tokenizer:
        config = dataclasses.replace(config, tokenizer="char" if isinstance(tokenizer, CharTokenizer) else "byte")
    settings = dataclasses.asdict(config)
    if is_store(out) and [Store(out).record[name] for name in ("settings", "sources")] == [settings, sources]:
        store = finished(out)
        if tokenizer is None or vars(tokenizer) == vars(store.tokenizer):
            return store
    if out.exists():
        raise UsageError(f"{out}: exists and is not the store of these files and options; choose another --out")
    identity = {"version": FORMAT_VERSION, "settings": settings, "sources": sources, "shard_bytes": shard_bytes}
    identity["tokenizer"] = tokenizer and {name: value for name, value in vars(tokenizer).items() if name != "_ids"}
    with ExitStack() as stack:
        writer = StoreWriter(out, identity, shard_bytes)
        stack.callback(writer.close)
        try:
            run = stack.enter_context(parallel_map(processes))
            vocabulary = writer.directory / VOCABULARY
            if isinstance(tokenizer, CharTokenizer):
                tokenizer.save(vocabulary)
            elif tokenizer is None and config.tokenizer == "char":
                tokenizer = read_vocabulary(vocabulary, files, config, run, report)
            tokenizer = tokenizer or ByteTokenizer()
            report(writer.state["bytes"], files[0])
            fill(writer, files, config, tokenizer, run, report)
        except UsageError:
            writer.remove()
            raise
        return writer.finish(tokenizer, config, sources)


def describe(file: str) -> dict[str, Any]:
    """Return the path of a source and its size in bytes; a URL has none."""
    return {"path": file} if "://" in file else {"path": file, "bytes": os.path.getsize(file)}


def read_vocabulary(path: Path, files: list[str], config: PrepareConfig, run: Any, report: Report) -> CharTokenizer:
    """Return the vocabulary at `path`; where none is, count the characters of all documents and write it."""
    if not path.is_file():
        characters: set[str] = set()
        batches = in_batches(read_records(files, config.names))
        for found, n_bytes, file in run(partial(characters_of, names=config.names), batches):
            characters |= found
            report(n_bytes, f"{file}, characters")
        CharTokenizer(sorted(characters)).save(path)
    return CharTokenizer.load(path)


def fill(
    writer: StoreWriter, files: list[str], config: PrepareConfig, tokenizer: TextTokenizer, run: Any, report: Report
) -> None:
    """Append the documents that `writer` lacks. Raises UsageError if none has text."""
    records = islice(read_records(files, config.names), writer.state["records"], None)
    saved = writer.state["bytes"]
    for encoded in run(partial(encode, tokenizer=tokenizer, config=config), in_batches(records)):
        writer.add(encoded, drop_duplicates=config.drop_duplicates)
        report(int(encoded.n_bytes.sum()), encoded.file)
        if writer.state["bytes"] - saved >= JOURNAL_BYTES:
            writer.save()
            saved = writer.state["bytes"]
    if not any(counts["documents"] for counts in writer.state["splits"].values()):
        raise UsageError(f"{', '.join(files[:3])}: no document has text; give files with text")
