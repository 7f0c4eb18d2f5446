"""Download enwik8 and text8, with a check of size and SHA-256."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_choice

TIMEOUT = 60  # seconds without data


class Corpus(NamedTuple):
    """A zip archive with one file, which has the name of the corpus; size and SHA-256 of that file."""

    url: str
    n_bytes: int
    sha256: str


CORPORA = {
    "enwik8": Corpus(
        url="http://mattmahoney.net/dc/enwik8.zip",
        n_bytes=100_000_000,
        sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
    "text8": Corpus(
        url="http://mattmahoney.net/dc/text8.zip",
        n_bytes=100_000_000,
        sha256="6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    ),
}


def fetch(name: str, directory: str | Path) -> Path:
    """Return the path of corpus `name` (enwik8 | text8) in `directory`; download it if it is missing.

    Raises UsageError if the download fails or the file differs from the original. A failed or interrupted download
    leaves no file.
    """
    check_choice("corpus", name, CORPORA)
    corpus, path = CORPORA[name], Path(directory).expanduser() / name
    if path.exists():
        if problem := file_problem(path, corpus):
            raise UsageError(f"{path}: differs from the original {name}: {problem}; remove it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system as the target, so that the final rename is atomic.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as temporary:
        archive = Path(temporary) / "archive.zip"
        unpacked = Path(temporary) / name
        try:
            download(corpus.url, archive)
            with zipfile.ZipFile(archive) as opened, opened.open(name) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target)
            problem = file_problem(unpacked, corpus)
        except (OSError, EOFError, KeyError, RuntimeError, HTTPException, zipfile.BadZipFile, zlib.error) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        if problem:
            raise UsageError(
                f"{corpus.url}: download of {name} failed: {problem}; try again, or put the unpacked file at {path}"
            )
        unpacked.replace(path)
    return path


def download(url: str, path: Path) -> None:
    """Download `url` to `path`. Raises OSError if fewer bytes arrive than the server announced."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, path.open("wb") as file:
        shutil.copyfileobj(response, file)
        announced = response.headers["Content-Length"]
    arrived = path.stat().st_size
    if announced is not None and arrived != int(announced):
        raise OSError(f"{arrived:,} of {int(announced):,} bytes arrived")


def file_problem(path: Path, corpus: Corpus) -> str:
    """Return how size or SHA-256 differ from those of the corpus; empty if both agree."""
    n_bytes = path.stat().st_size
    if n_bytes != corpus.n_bytes:
        return f"{n_bytes:,} bytes instead of {corpus.n_bytes:,}"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if sha256 == corpus.sha256 else f"SHA-256 {sha256} instead of {corpus.sha256}"
