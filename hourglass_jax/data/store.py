"""Token stores: the documents of a corpus as memory-mapped tokens, split for training, validation and test.

store.json          format version, tokenizer, counts of each split, sources, settings, checksums
vocab.json          characters and their tokens (character tokenizers)
train-00000.bin     tokens, uint8 or uint16 little-endian; all shards of a split but the last have `shard_tokens`
train.ends          position behind the last token of each document, int64 little-endian
Each document begins with BOS and ends with EOS. `experiments/prepare.py` writes stores.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from hourglass_jax.data.files import MappedBytes
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, TextTokenizer

FORMAT_VERSION = 1
STORE, VOCABULARY = "store.json", "vocab.json"
SPLITS = ("train", "valid", "test")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def ends_name(split: str) -> str:
    return f"{split}.ends"


def is_store(path: str | Path) -> bool:
    """Return whether the directory is a token store of any version."""
    return (Path(path).expanduser() / STORE).is_file()


class StoredTokens:
    """Tokens of a split, a read-only array [N]: slices and integer arrays give arrays in memory.

    ends: int64 [D], the position behind the last token of each document; memory-mapped, as the tokens are.
    """

    ndim = 1

    def __init__(self, shards: list[np.ndarray], shard_tokens: int, ends: np.ndarray, dtype: np.dtype):
        self._shards, self._shard_tokens = shards, shard_tokens
        self.ends, self.dtype = ends, dtype
        self.shape = (sum(map(len, shards)),)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._between(start, stop)
            index = np.arange(start, stop, step)
        positions = np.asarray(index)
        positions = np.where(positions < 0, positions + len(self), positions)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"positions {positions.min()} .. {positions.max()} of {len(self)} tokens")
        numbers, offsets = np.divmod(positions, self._shard_tokens)
        found = np.empty(positions.shape, self.dtype)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = self._shards[number][offsets[here]]
        return found if positions.ndim else found[()]

    def _between(self, start: int, stop: int) -> np.ndarray:
        parts = [np.empty(0, self.dtype)]
        while start < stop:
            number, offset = divmod(start, self._shard_tokens)
            part = self._shards[number][offset : offset + stop - start]
            parts.append(np.asarray(part))
            start += len(part)
        return np.concatenate(parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class Store:
    """A token store, read-only. `train`, `valid` and `test` are `StoredTokens`.

    Raises UsageError for a directory without a store, a newer format, or missing tokens.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser()
        if not is_store(directory):
            raise UsageError(f"{directory}: is not a token store; write one with experiments/prepare.py")
        try:
            self.record = json.loads((self.directory / STORE).read_text(encoding="utf-8"))
            if self.record["format_version"] != FORMAT_VERSION:
                raise UsageError(
                    f"{directory}: is a token store of format version {self.record['format_version']}, not "
                    f"{FORMAT_VERSION}; use the version of the library that wrote it"
                )
            self.dtype = np.dtype(self.record["dtype"]).newbyteorder("<")
            self.tokenizer = self._read_tokenizer()
            self.train, self.valid, self.test = map(self._open, SPLITS)
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"{directory}: the token store is damaged ({error!r}); prepare it again") from error

    def _read_tokenizer(self) -> TextTokenizer:
        if self.record["tokenizer"] == ByteTokenizer.kind:
            return ByteTokenizer(self.record["vocab_size"])
        return CharTokenizer.load(self.directory / VOCABULARY)

    def _map(self, name: str, dtype: np.dtype, n_items: int) -> np.ndarray:
        path = self.directory / name
        found = path.stat().st_size if path.is_file() else 0
        if found != n_items * dtype.itemsize:
            raise UsageError(f"{path}: has {found:,} bytes, not {n_items * dtype.itemsize:,}; prepare the store again")
        return MappedBytes(path).view(dtype)

    def _open(self, split: str) -> StoredTokens:
        counts, shard_tokens = self.record["splits"][split], self.record["shard_tokens"]
        n_tokens, ends_type = counts["tokens"], np.dtype("<i8")
        if not n_tokens:
            return StoredTokens([], shard_tokens, np.empty(0, ends_type), self.dtype)
        sizes = [min(shard_tokens, n_tokens - first) for first in range(0, n_tokens, shard_tokens)]
        shards = [self._map(shard_name(split, i), self.dtype, size) for i, size in enumerate(sizes)]
        ends = self._map(ends_name(split), ends_type, counts["documents"])
        return StoredTokens(shards, shard_tokens, ends, self.dtype)

    @property
    def fingerprint(self) -> str:
        """Digest of the checksums, which identifies the tokens."""
        checksums = json.dumps(self.record["sha256"], sort_keys=True)
        return hashlib.sha256(checksums.encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Raise UsageError if a file differs from its checksum."""
        for name, expected in self.record["sha256"].items():
            if sha256(self.directory / name) != expected:
                raise UsageError(f"{self.directory / name}: differs from its checksum; prepare the store again")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
