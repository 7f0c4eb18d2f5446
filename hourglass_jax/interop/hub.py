"""Models on the Hugging Face Hub: `hf:user/name` is a repository with the files that `interop.safetensors.save` writes.

A repository is data: only JSON and safetensors files are downloaded, and nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path

from hourglass_jax.errors import UsageError
from hourglass_jax.interop.safetensors import WEIGHTS
from hourglass_jax.training.run import CONFIG, VOCABULARY, Run

PREFIX = "hf:"
PROBLEMS = {  # by the name of an exception of huggingface_hub, or of its base
    "HFValidationError": "not a repository and a revision; give hf:user/name or hf:user/name@revision",
    "RevisionNotFoundError": "no such revision; give a branch, a tag or a commit",
    "LocalEntryNotFoundError": "not in the cache, and the Hub cannot be reached; check the network",
    "EntryNotFoundError": "a file is missing; give a repository with the files that hg.save writes",
    "RepositoryNotFoundError": "no such repository, or no access to it; check its name, or run `hf auth login`",
}
HASHES = {40: hashlib.sha1, 64: hashlib.sha256}  # of git and of large files, by the length of the digest


def local_path(path: str | Path, revision: str | None = None) -> Path:
    """Return `path`, or a local copy of the repository that `hf:user/name` or `hf:user/name@revision` names.

    revision: a branch, tag or commit; default: main. Downloads are cached. Without a network, the cache is used.

    Raises UsageError without huggingface_hub, for an unknown repository or revision, for a repository without the files
    of a model, for damaged files, and if the files are neither cached nor reachable.
    """
    name = str(path)
    repository, _, given = name.removeprefix(PREFIX).partition("@")
    if revision is not None and (given or not name.startswith(PREFIX)):
        raise UsageError(f"{name}: revision={revision!r} is only for hf:user/name; leave it out")
    if not name.startswith(PREFIX):
        return Path(path)
    config = fetch(name, repository, CONFIG, revision or given or None)
    if not Run(config.parent).exists:
        raise UsageError(f"{name}: not a model of this library; give a repository with the files that hg.save writes")
    commit = config.parent.name  # so that all files are of one revision
    fetch(name, repository, WEIGHTS, commit)
    if json.loads(config.read_text(encoding="utf-8"))["tokenizer"] == "char":
        fetch(name, repository, VOCABULARY, commit)
    return config.parent


def fetch(name: str, repository: str, file: str, revision: str | None) -> Path:
    """Return the path of a file in the cache, and download it if it is not there. Errors start with `name`."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UsageError(f"{name}: {error}; pip install -e '.[hub]'") from None
    at = f"{name}, {file}" + (f", revision {revision}" if revision else "")
    try:
        path = Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # its HTTP client, and with it the types, depend on the release
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in PROBLEMS]
        reason = PROBLEMS[kinds[0]] if kinds else str(error).strip().partition("\n")[0] or repr(error)
        raise UsageError(f"{at}: {reason}") from error
    check_whole(path, at)
    return path


def check_whole(path: Path, name: str) -> None:
    """Raise UsageError if a file in the cache is damaged: it is a link, whose target is named by the content's hash."""
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    if len(expected) not in HASHES:  # no links on this platform
        return
    digest = HASHES[len(expected)](b"blob %d\0" % path.stat().st_size if len(expected) == 40 else b"")
    with path.open("rb") as content:
        for chunk in iter(partial(content.read, 1 << 20), b""):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise UsageError(f"{name}: damaged; remove {path.resolve()}, and run this again")
