"""Writes token stores (see `store`), resumable at any moment.

A store grows in a directory beside its place, OUT.partial, and moves there when it is whole. Its files only grow. A
journal records how long they were when a number of documents was done, so a killed process resumes from there.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hourglass_jax.data.store import FORMAT_VERSION, SPLITS, STORE, VOCABULARY, Store, ends_name, sha256, shard_name
from hourglass_jax.errors import UsageError
from hourglass_jax.files import is_temporary, try_lock, write_whole
from hourglass_jax.tokenizers import TextTokenizer

SHARD_BYTES = 2**30
JOURNAL, DIGESTS, LOCK = "journal.json", "digests", "lock"
DIGEST_BYTES = 16


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


def token_type(tokenizer: TextTokenizer) -> np.dtype:
    """Return the smallest type for the tokens. Raises UsageError for a vocabulary that 16 bits cannot number."""
    if tokenizer.vocab_size > 2**16:
        raise UsageError(f"the documents have {tokenizer.vocab_size:,} different characters; choose tokenizer='byte'")
    return np.dtype("<u2" if tokenizer.vocab_size > 2**8 else "<u1")


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
        here.mkdir(parents=True, exist_ok=True)
        foreign = [path for path in here.iterdir() if path.name != LOCK and not is_temporary(path, [JOURNAL])]
        if foreign and not journal.is_file():
            raise UsageError(f"{here}: exists, and no unfinished store is in it; remove it or choose another --out")
        self._lock = (here / LOCK).open("a+")
        if not try_lock(self._lock):
            self._lock.close()
            raise UsageError(f"{self.out}: another process prepares this store; wait for it, or stop it")
        known = json.loads(journal.read_text(encoding="utf-8")) if journal.is_file() else {}
        kept = [JOURNAL, LOCK]
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
            file.close()
        self._files.clear()
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
        """Close all files and release the lock."""
        for file in self._files.values():
            file.close()
        self._lock.close()

    def remove(self) -> None:
        shutil.rmtree(self.directory)

    def finish(self, tokenizer: TextTokenizer, origin: dict[str, Any]) -> Store:
        """Write store.json, with the settings and sources of `origin`, and move the store to its place."""
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
            **origin,
            "sha256": {name: sha256(here / name) for name in names},
        }
        write_whole(here / STORE, json.dumps(record, indent=1) + "\n")
        self.close()
        here.replace(self.out)
        return finished(self.out)


def finished(out: Path) -> Store:
    """Remove what only an unfinished store needs, and open the store."""
    for name in (JOURNAL, DIGESTS, LOCK):
        (out / name).unlink(missing_ok=True)
    return Store(out)
