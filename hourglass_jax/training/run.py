"""A run directory: settings, vocabulary, checkpoints and curves, and a lock for the process that trains.

config.json   format version, model configuration, tokenizer (with the shape of images), settings, and the history
              of changes to the number of steps
vocab.json    characters and their tokens (character models)
checkpoints/  one folder for each step, written by orbax's CheckpointManager and sealed by a manifest
lock          host and id of the process that trains here; locked until that process ends
Also curves (metrics.jsonl, tensorboard/, loss.png), profile/, samples.png and an ablation's result.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from absl import logging
from flax import nnx

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.files import is_temporary, optional_output, try_lock, write_whole
from hourglass_jax.model import HourglassLM
from hourglass_jax.run_config import OptimizerConfig
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, ImageTokenizer, Tokenizer
from hourglass_jax.training.checkpoints import CHECKPOINTS, CheckpointStore
from hourglass_jax.training.identity import describe, differences, identity
from hourglass_jax.training.metrics import CURVES, read_curves
from hourglass_jax.training.optimizer import describe_schedule
from hourglass_jax.training.sharding import on_one_device

FORMAT_VERSION = 1
CONFIG, VOCABULARY, LOCK = "config.json", "vocab.json", "lock"
DIRECTORIES = (CHECKPOINTS, "tensorboard", "profile")
FILES = (VOCABULARY, CURVES, "loss.png", "samples.png", "result.json", LOCK, CONFIG)
STEPS = "train.steps"  # the only setting that may grow

# By directory, not in `Run`: a traceback, as in a notebook, keeps a Run alive and must not keep its lock.
_locks: dict[Path, IO[str]] = {}
_trainers: dict[Path, Run] = {}


class RunBusy(UsageError):
    """Another process trains in the run directory."""


class Record(NamedTuple):
    """Content of config.json and vocab.json; `tokenizer` is None for a run on plain tokens."""

    config: HourglassConfig
    tokenizer: Tokenizer | None
    settings: dict[str, Any]
    history: list[dict[str, Any]]


class Run:
    """A run directory. `Run(path)` writes nothing; `start` creates or resumes a run, `read` returns its settings.

    If several processes train together, only the first one calls `start`.
    """

    def __init__(self, directory: str | Path):
        self._given = Path(directory).expanduser()
        self.directory = self._given.absolute()  # the process may change its directory

    def __str__(self) -> str:
        return str(self._given)

    def __repr__(self) -> str:
        return f"Run({str(self)!r})"

    @property
    def exists(self) -> bool:
        """Whether the directory is a run of any version of this library."""
        try:
            record = json.loads((self.directory / CONFIG).read_text(encoding="utf-8"))
            return {"format_version", "model", "tokenizer"} <= record.keys()
        except (OSError, ValueError, AttributeError):
            return False

    def read(self) -> Record:
        """Return the content of config.json and vocab.json. Raises UsageError unless this is a run of this version."""
        path = self.directory / CONFIG
        if not path.is_file():
            problem = "is not a checkpoint directory of this library (no config.json)"
            raise UsageError(
                f"{self}: {problem if self.directory.exists() else 'no such directory'}; "
                "choose a directory that pretrain.py or finetune.py wrote"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version = record["format_version"]
            if version != FORMAT_VERSION:
                raise UsageError(
                    f"{self}/{CONFIG}: format version {version} is not supported, only {FORMAT_VERSION}; use the "
                    "version of the library that wrote it"
                )
            config = HourglassConfig(**record["model"])
            tokenizer = self._read_tokenizer(record, config)
            settings, history = record["settings"], record.get("history", [])
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(
                f"{self}/{CONFIG}: not a configuration of this library ({error!r}); restore it from a copy"
            ) from error
        if tokenizer and tokenizer.vocab_size != config.tokenizer_size:
            raise UsageError(
                f"{self}: the vocabulary has {tokenizer.vocab_size} tokens, but the model has {config.tokenizer_size}; "
                "restore the vocab.json that it was trained with"
            )
        return Record(config, tokenizer, settings, history)

    def _read_tokenizer(self, record: dict[str, Any], config: HourglassConfig) -> Tokenizer | None:
        if record["tokenizer"] == "char":
            return CharTokenizer.load(self.directory / VOCABULARY)
        if record["tokenizer"] == "image":
            return ImageTokenizer(record["image_shape"])
        return ByteTokenizer(config.tokenizer_size) if record["tokenizer"] == "byte" else None

    def write(self, record: Record) -> None:
        """Write config.json and vocab.json."""
        config, tokenizer, settings, history = record
        self.directory.mkdir(parents=True, exist_ok=True)
        if isinstance(tokenizer, CharTokenizer):
            tokenizer.save(self.directory / VOCABULARY)
        content = {
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(config),
            "tokenizer": tokenizer.kind if tokenizer else None,
            "settings": settings,
            "history": history,
        }
        if isinstance(tokenizer, ImageTokenizer):
            content["image_shape"] = tokenizer.shape
        write_whole(self.directory / CONFIG, json.dumps(content, indent=1) + "\n")

    def start(
        self,
        config: HourglassConfig,
        tokenizer: Tokenizer | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        """Lock the directory, then create the run, or check that an existing run may resume.

        settings: JSON that the run depends on. New names are added to an existing run. The others must be equal, except
            paths, options that affect only speed (see `identity`), and `train.steps`, which may grow.
        overwrite: remove an existing run first, but no other files.
        resume: allow an existing run.

        Raises RunBusy if another process trains here; UsageError for a directory that is not a run, and for a run with
        other settings.
        """
        self.claim()
        try:
            self._start(config, tokenizer, settings or {}, overwrite, resume)
        except BaseException:
            self.release()
            raise

    def _start(
        self,
        config: HourglassConfig,
        tokenizer: Tokenizer | None,
        settings: Mapping[str, Any],
        overwrite: bool,
        resume: bool,
    ) -> None:
        if overwrite:
            self.clear()
        elif self.exists and not resume:
            raise UsageError(f"{self}: contains a run; pass --resume=auto to resume it, or --overwrite to remove it")
        given = {"model": dataclasses.asdict(config)} | json.loads(json.dumps(dict(settings)))
        if overwrite or not self.exists:
            self.write(Record(config, tokenizer, given, history=[]))
            return
        found = self.read()
        if "train" in given and "train" not in found.settings and self.has_checkpoints:
            raise UsageError(
                f"{self}: contains a model without optimizer state, so training cannot resume; start a new run with "
                f"--init_from={self}"
            )
        stored = {"model": dataclasses.asdict(found.config)} | found.settings
        changes = differences(identity({name: stored.get(name) for name in given}), identity(given))
        changes = {name: values for name, values in changes.items() if name.partition(".")[0] in stored}
        if None not in (tokenizer, found.tokenizer) and vars(tokenizer) != vars(found.tokenizer):
            changes["vocabulary"] = (f"{found.config.tokenizer_size} tokens", "another one with other characters")
        steps = changes.get(STEPS, (0, 0))
        if changes.keys() - {STEPS} or steps[0] > steps[1]:
            raise UsageError(
                f"{self}: contains a run with other settings ({describe(changes)}); choose another directory, or "
                "pass --overwrite to remove the run"
            )
        history = found.history + ([self._more_steps(*steps, given)] if changes else [])
        self.write(Record(config, tokenizer or found.tokenizer, stored | given, history))

    def _more_steps(self, old: int, new: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the entry of the history for a larger number of steps."""
        step = 0
        if self.has_checkpoints:
            store = self.checkpoints()
            step = store.sound_step() or 0
            store.close()
        schedule = describe_schedule(OptimizerConfig(**settings["optimizer"]), new) if "optimizer" in settings else ""
        logging.warning("%s: steps raised from %d to %d; schedule from step %d: %s", self, old, new, step, schedule)
        return {"after_step": step, "steps": [old, new], "schedule": schedule}

    def claim(self) -> None:
        """Lock the directory until `release` or the end of this process; further calls have no effect.

        Warns if the file system or the platform has no locks.

        Raises RunBusy if another process holds the lock, and UsageError if the directory contains anything but a run.
        """
        here = self.directory
        if lock := _locks.get(self._key):
            if (here / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(here / LOCK)):
                return
            self.release()  # the directory was replaced; the new one may belong to another process
        if here.exists() and not here.is_dir():
            raise UsageError(f"{self}: is a file; choose another output directory")
        foreign = [path.name for path in here.iterdir() if not _is_first_file(path)] if here.is_dir() else []
        if foreign and not self.exists:
            raise UsageError(
                f"{self}: exists and is not a run of this library (it contains {', '.join(sorted(foreign)[:3])}); "
                "choose another output directory"
            )
        here.mkdir(parents=True, exist_ok=True)
        lock = (here / LOCK).open("a+")
        if not try_lock(lock):
            lock.seek(0)
            holder = lock.read() or "unknown"
            lock.close()
            raise RunBusy(f"{self}: another process trains here ({holder}); wait for it, or stop it")
        with optional_output(here / LOCK):
            lock.truncate(0)
            lock.write(f"{socket.gethostname()}, process {os.getpid()}")
            lock.flush()
        _locks[self._key] = lock

    def release(self) -> None:
        """Release the lock."""
        if lock := _locks.pop(self._key, None):
            with optional_output(Path(lock.name)), lock:
                lock.truncate(0)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Lock the directory for other processes, and for other threads of this process."""
        self.claim()
        if _trainers.setdefault(self._key, self) is not self:
            raise RunBusy(f"{self}: another thread of this process trains here; wait for it")
        try:
            yield
        finally:
            del _trainers[self._key]
            self.release()

    @property
    def _key(self) -> Path:
        return self.directory.resolve()

    def clear(self) -> None:
        """Remove the files of the run except config.json, which identifies a run; warn about other files."""
        for path in list(self.directory.iterdir()):
            if _is_ours(path) and path.name not in (CONFIG, LOCK):
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        kept = sorted(path.name for path in self.directory.iterdir() if not _is_ours(path))
        if kept:
            logging.warning("%s: kept files that are not part of a run: %s", self, ", ".join(kept))

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run has any checkpoint, complete or not."""
        return any(path.name.isdigit() for path in (self.directory / CHECKPOINTS).glob("*"))

    def checkpoints(self, *, for_training: bool = False, keep: int = 2) -> CheckpointStore:
        """Return the `CheckpointStore` of the run."""
        return CheckpointStore(self.directory, for_training=for_training, keep=keep)

    def curves(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, oldest first."""
        return read_curves(self.directory)


def _is_ours(path: Path) -> bool:
    return is_temporary(path, FILES) or path.name in (DIRECTORIES if path.is_dir() else FILES)


def _is_first_file(path: Path) -> bool:
    """Return whether a run that was killed during its start or removal can have this file without config.json."""
    return path.name in (LOCK, VOCABULARY) or is_temporary(path, FILES)


def load_run(path: str | Path, step: int | None = None) -> tuple[HourglassLM, Tokenizer | None, HourglassConfig]:
    """Return (model, tokenizer, config) of a run directory.

    step: the checkpoint to load; see `RuntimeConfig.keep_checkpoints`. Default: the one of lowest validation loss.

    The model is on the first device and in evaluation mode: no dropout until `model.train()`. The tokenizer is None
    for a run on plain tokens.

    Raises UsageError if `path` is not a run directory, has no complete checkpoint (of `step`), or does not match its
    vocabulary.
    """
    run = Run(path)
    config, tokenizer, _, _ = run.read()
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))
    no_checkpoint = UsageError(f"{path}: contains no checkpoint yet; train until the first evaluation")
    if not run.has_checkpoints:
        raise no_checkpoint
    store = run.checkpoints()
    if step is not None:
        store.check(step)
    else:
        step = store.sound_step(best=True)
    if step is None:
        raise no_checkpoint
    params = store.restore(step, params=on_one_device(params))["params"]
    store.close()
    model = nnx.merge(graph, params)
    model.eval()
    return model, tokenizer, config
