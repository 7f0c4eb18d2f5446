"""A run directory: what it is, who trains in it, its vocabulary, checkpoints and curves. Nobody else reads its files.

config.json   format version, model configuration, tokenizer (and the shape of its images), the settings of the run,
              and its history: where its training was made longer
vocab.json    characters and their tokens (character models)
checkpoints/  one folder a step, written by orbax's CheckpointManager and sealed by a manifest
lock          host and process that train here; held for as long as the process lives
and the curves, metrics.jsonl, tensorboard/ and loss.png, a profile/, samples.png, an ablation's result.json
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
from hourglass_jax.files import is_temporary, optional_output, write_whole
from hourglass_jax.model import HourglassLM
from hourglass_jax.run_config import OptimizerConfig
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, ImageTokenizer, Tokenizer
from hourglass_jax.training.checkpoints import CHECKPOINTS, CheckpointStore
from hourglass_jax.training.identity import described, differences, identity
from hourglass_jax.training.locks import try_lock
from hourglass_jax.training.metrics import CURVES, read_curves
from hourglass_jax.training.optimizer import schedule_in_words
from hourglass_jax.training.sharding import on_one_device

FORMAT_VERSION = 1
CONFIG, VOCABULARY, LOCK = "config.json", "vocab.json", "lock"
DIRECTORIES = (CHECKPOINTS, "tensorboard", "profile")
FILES = (VOCABULARY, CURVES, "loss.png", "samples.png", "result.json", LOCK, CONFIG)
LONGER = "train.steps"  # the one setting that may grow


# Of this process, by directory: an error that keeps a `Run` alive, as in a notebook, does not lock it out.
_locks: dict[Path, IO[str]] = {}
_trainers: dict[Path, Run] = {}


class RunBusy(UsageError):
    """Another process trains in the run directory."""


class Record(NamedTuple):
    """What config.json and vocab.json say; `tokenizer` is None where the run has bare tokens."""

    config: HourglassConfig
    tokenizer: Tokenizer | None
    settings: dict[str, Any]
    history: list[dict[str, Any]]


class Run:
    """`Run("runs/mine")` touches nothing; `start` makes it a run or goes on with one, `read` tells what it is.

    Where processes train together, the first one starts it.
    """

    def __init__(self, directory: str | Path):
        self._given = Path(directory).expanduser()
        self.directory = self._given.absolute()  # wherever the process goes later

    def __str__(self) -> str:
        return str(self._given)

    def __repr__(self) -> str:
        return f"Run({str(self)!r})"

    @property
    def exists(self) -> bool:
        """Whether it reads as a run of this library, of whatever version."""
        try:
            record = json.loads((self.directory / CONFIG).read_text(encoding="utf-8"))
            return {"format_version", "model", "tokenizer"} <= record.keys()
        except (OSError, ValueError, AttributeError):
            return False

    def read(self) -> Record:
        """Raises UsageError where the directory is no run of this library, or one of another version."""
        path = self.directory / CONFIG
        if not path.is_file():
            problem = "is not a checkpoint directory of this library (no config.json)"
            raise UsageError(
                f"{self}: {problem if self.directory.exists() else 'no such directory'}; "
                "give the directory that pretrain.py or finetune.py wrote"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version = record["format_version"]
            if version != FORMAT_VERSION:
                raise UsageError(
                    f"{self}/{CONFIG}: format version {version}, but this library reads version {FORMAT_VERSION}; "
                    "use the library version that wrote it"
                )
            config = HourglassConfig(**record["model"])
            tokenizer = self._read_tokenizer(record, config)
            settings, history = record["settings"], record.get("history", [])
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"{self}/{CONFIG}: not a configuration of this library ({error!r})") from error
        if tokenizer and tokenizer.vocab_size != config.tokenizer_size:
            raise UsageError(
                f"{self}: the vocabulary has {tokenizer.vocab_size} tokens, but the checkpoint's model has "
                f"{config.tokenizer_size}; put back the vocab.json the model was trained with"
            )
        return Record(config, tokenizer, settings, history)

    def _read_tokenizer(self, record: dict[str, Any], config: HourglassConfig) -> Tokenizer | None:
        if record["tokenizer"] == "char":
            return CharTokenizer.load(self.directory / VOCABULARY)
        if record["tokenizer"] == "image":
            return ImageTokenizer(record["image_shape"])
        return ByteTokenizer(config.tokenizer_size) if record["tokenizer"] == "byte" else None

    def write(self, record: Record) -> None:
        """Makes the directory describe itself, with the files that `read` reads."""
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
        """Claims the directory for this process, then makes it a run or finds that it is this one and may go on.

        settings: what the run depends on, as JSON. Those that the run does not have yet are added to it; others must
        be the same but for paths, and `train.steps`, which may grow: the run's history says since when.
        overwrite: removes a run that is there, and of other files none. resume: whether to go on with one.

        Raises UsageError for a directory that is no run, a run with other settings, and RunBusy where another process
        trains.
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
            raise UsageError(f"{self}: holds a run; go on with --resume=auto, or pass --overwrite to remove it")
        asked = {"model": dataclasses.asdict(config)} | json.loads(json.dumps(dict(settings)))
        if overwrite or not self.exists:
            self.write(Record(config, tokenizer, asked, history=[]))
            return
        found = self.read()
        if "train" in asked and "train" not in found.settings and self.has_checkpoints:
            raise UsageError(
                f"{self}: holds a model without the state of a training; start a new run from it, with "
                f"--init_from={self}"
            )
        known = {"model": dataclasses.asdict(found.config)} | found.settings
        changes = differences(identity({name: known.get(name) for name in asked}), identity(asked))
        changes = {name: values for name, values in changes.items() if name.partition(".")[0] in known}
        if None not in (tokenizer, found.tokenizer) and vars(tokenizer) != vars(found.tokenizer):
            changes["vocabulary"] = (f"{found.config.tokenizer_size} tokens", "another one")
        longer = changes.get(LONGER, (0, 0))
        if changes.keys() - {LONGER} or longer[0] > longer[1]:
            raise UsageError(
                f"{self}: holds a run with another configuration ({described(changes)}); choose another "
                "directory, or pass --overwrite to remove it"
            )
        history = found.history + ([self._lengthened(*longer, asked)] if changes else [])
        self.write(Record(config, tokenizer or found.tokenizer, known | asked, history))

    def _lengthened(self, old: int, new: int, asked: dict[str, Any]) -> dict[str, Any]:
        """The history's line about more steps."""
        step = 0
        if self.has_checkpoints:
            store = self.checkpoints()
            step = store.sound_step() or 0
            store.close()
        schedule = schedule_in_words(OptimizerConfig(**asked["optimizer"]), new) if "optimizer" in asked else ""
        logging.warning("%s: %d steps instead of %d; from step %d on: %s", self, new, old, step, schedule)
        return {"after_step": step, "steps": [old, new], "schedule": schedule}

    def claim(self) -> None:
        """Until `release` or the end of this process, however that ends, no other process can; it may be repeated.

        Where the file system or the platform has no locks, that is only a warning.

        Raises RunBusy, a UsageError, where another one has, and UsageError where there is something else than a run.
        """
        here = self.directory
        if lock := _locks.get(self._key):
            if (here / LOCK).exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(here / LOCK)):
                return
            self.release()  # its directory was removed, and what is there now may be another process's
        if here.exists() and not here.is_dir():
            raise UsageError(f"{self}: is a file; choose another output directory")
        strange = [path.name for path in here.iterdir() if not _begins_a_run(path)] if here.is_dir() else []
        if strange and not self.exists:
            raise UsageError(
                f"{self}: exists and is not a run of this library (it holds {', '.join(sorted(strange)[:3])}); "
                "choose another output directory"
            )
        here.mkdir(parents=True, exist_ok=True)
        lock = (here / LOCK).open("a+")
        if not try_lock(lock):
            lock.seek(0)
            who = lock.read() or "its name is not written yet"
            lock.close()
            raise RunBusy(f"{self}: another process trains here ({who}); wait for it, or stop it")
        with optional_output(here / LOCK):
            lock.truncate(0)
            lock.write(f"{socket.gethostname()}, process {os.getpid()}")
            lock.flush()
        _locks[self._key] = lock

    def release(self) -> None:
        """Lets other processes claim it."""
        if lock := _locks.pop(self._key, None):
            with optional_output(Path(lock.name)), lock:
                lock.truncate(0)

    @contextmanager
    def training(self) -> Iterator[None]:
        """For the body no other process, and no other thread of this one, can train here; released after it."""
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
        """Removes what this library wrote, but config.json, by which the rest is known as a run; warns of others."""
        for path in list(self.directory.iterdir()):
            if _is_ours(path) and path.name not in (CONFIG, LOCK):
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        left = sorted(path.name for path in self.directory.iterdir() if not _is_ours(path))
        if left:
            logging.warning("%s: %s stays, being no part of a run", self, ", ".join(left))

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is any."""
        return any(path.name.isdigit() for path in (self.directory / CHECKPOINTS).glob("*"))

    def checkpoints(self, *, for_training: bool = False, keep: int = 2) -> CheckpointStore:
        """See `CheckpointStore`."""
        return CheckpointStore(self.directory, for_training=for_training, keep=keep)

    def curves(self) -> list[dict[str, Any]]:
        """The records of the run, oldest first."""
        return read_curves(self.directory)


def _is_ours(path: Path) -> bool:
    return is_temporary(path, FILES) or path.name in (DIRECTORIES if path.is_dir() else FILES)


def _begins_a_run(path: Path) -> bool:
    """Whether it is all that there may be where a run was killed as it started, or as it was removed."""
    return path.name in (LOCK, VOCABULARY) or is_temporary(path, FILES)


def load_run(path: str | Path, step: int | None = None) -> tuple[HourglassLM, Any, HourglassConfig]:
    """Any run directory of this library -> (model, tokenizer, config), at the step of lowest validation loss.

    step: another step of those that were kept; see `RuntimeConfig.keep_checkpoints`.

    The model is on the first device and in evaluation mode: no dropout until `model.train()`. The tokenizer is None
    for a run of bare tokens.

    Raises UsageError where `path` is no such directory, holds no whole checkpoint or not that of `step`, or does not
    match its vocabulary.
    """
    run = Run(path)
    config, tokenizer, _, _ = run.read()
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))
    nothing = UsageError(f"{path}: holds no checkpoint yet; let pretrain.py reach its first evaluation")
    if not run.has_checkpoints:
        raise nothing
    store = run.checkpoints()
    if step is not None:
        store.check(step)
    else:
        step = store.sound_step(best=True)
    if step is None:
        raise nothing
    params = store.restore(step, params=on_one_device(params))["params"]
    store.close()
    model = nnx.merge(graph, params)
    model.eval()
    return model, tokenizer, config
