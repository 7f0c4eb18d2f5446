"""Prepares token stores (see `store`) of any corpus: read, encode and split documents, in several processes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hourglass_jax.data.corpora import decode_text
from hourglass_jax.data.records import Document, Record, read_document, read_records
from hourglass_jax.data.store import FORMAT_VERSION, VOCABULARY, Store, is_store
from hourglass_jax.data.workers import parallel_map
from hourglass_jax.data.writer import DIGEST_BYTES, SHARD_BYTES, Encoded, StoreWriter, finished, token_type
from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_literals, check_range, take_plain_values
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer

BATCH_BYTES = 2**22  # of text that a process encodes at once
JOURNAL_BYTES = 2**26  # of text between two entries of the journal

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
        return writer.finish(tokenizer, {"settings": settings, "sources": sources})


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
