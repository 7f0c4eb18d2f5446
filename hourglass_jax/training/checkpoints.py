"""Run directories: config.json, the vocabulary, and orbax checkpoints of parameters and optimiser state.

config.json   format version, model configuration, tokenizer (and the shape of its images), the settings of the run
vocab.json    characters and their tokens (character models)
checkpoints/  one folder a step, written by orbax's CheckpointManager and sealed by a manifest
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.files import write_whole
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import ByteTokenizer, CharTokenizer, ImageTokenizer, Tokenizer
from hourglass_jax.training.manifest import MANIFEST, damage, read_manifest, write_manifest
from hourglass_jax.training.sharding import on_one_device

FORMAT_VERSION = 1
CONFIG, VOCABULARY, CHECKPOINTS = "config.json", "vocab.json", "checkpoints"
METRIC = "valid_loss"


def write_run(directory: Path, config: HourglassConfig, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Makes `directory` self-describing. `settings` is what the run was started with, as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, CharTokenizer):
        tokenizer.save(directory / VOCABULARY)
    record = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer.kind,
        "settings": settings,
    }
    if isinstance(tokenizer, ImageTokenizer):
        record["image_shape"] = tokenizer.shape
    write_whole(directory / CONFIG, json.dumps(record, indent=1) + "\n")


def read_run(directory: str | Path) -> tuple[HourglassConfig, Tokenizer, dict[str, Any]]:
    """What `write_run` wrote. Raises UsageError where the directory is not one of this library's."""
    directory = Path(directory)
    path = directory / CONFIG
    if not path.is_file():
        problem = "is not a checkpoint directory of this library (no config.json)"
        raise UsageError(
            f"{directory}: {problem if directory.exists() else 'no such directory'}; "
            "give the directory that pretrain.py or finetune.py wrote"
        )
    try:
        record = json.loads(path.read_text())
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{path}: format version {version}, but this library reads version {FORMAT_VERSION}; "
                "use the library version that wrote it"
            )
        config = HourglassConfig(**record["model"])
        tokenizer = _read_tokenizer(directory, record)
        settings = record["settings"]
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{path}: not a configuration of this library ({error!r})") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"{directory}: the vocabulary has {tokenizer.vocab_size} tokens, but the checkpoint's model has "
            f"{config.vocab_size}; put back the vocab.json the model was trained with"
        )
    return config, tokenizer, settings


def _read_tokenizer(directory: Path, record: dict[str, Any]) -> Tokenizer:
    if record["tokenizer"] == "char":
        return CharTokenizer.load(directory / VOCABULARY)
    if record["tokenizer"] == "image":
        return ImageTokenizer(record["image_shape"])
    return ByteTokenizer(record["model"]["vocab_size"])


class CheckpointStore:
    """Checkpoints of a run by step, each sealed by a manifest; keeps the two latest and the best by validation loss.

    Two, so that there is a whole one while the other is written or found damaged.
    """

    def __init__(self, directory: str | Path, *, for_training: bool = False):
        self.directory = (Path(directory) / CHECKPOINTS).absolute()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), self]),
            cleanup_tmp_directories=for_training,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("params", "opt_state"))
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None

    def sound_step(self, *, best: bool = False) -> int | None:
        """The newest whole step, or the one of lowest validation loss if any was evaluated; None if there is no step.

        Warns of each one passed over. Raises UsageError where there are steps and none is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best:
            steps.sort(key=self._valid_loss)
        for step in steps:
            problem = damage(self.directory / str(step))
            if not problem:
                return step
            logging.warning("checkpoint of step %d is passed over: %s", step, problem)
        if len(steps) == 1 and not (self.directory / str(steps[0]) / MANIFEST).exists():
            return None  # killed between the very first checkpoint and its seal: nothing was saved yet
        if steps:
            raise UsageError(
                f"{self.directory}: all checkpoints are damaged or unfinished (steps {sorted(steps)}); restore them "
                "from a copy, or train anew with --overwrite"
            )
        return None

    def _valid_loss(self, step: int) -> float:
        return read_manifest(self.directory / str(step)).get(METRIC, math.inf)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question, which of the steps to keep: as far as this method goes, the best one."""
        losses = [self._valid_loss(checkpoint.step) for checkpoint in checkpoints]
        return [math.isfinite(loss) and loss == min(losses) for loss in losses]

    def rewind(self, step: int) -> None:
        """Removes the steps after `step`."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def save(self, step: int, params: Any, opt_state: Any = None, valid_loss: float | None = None) -> None:
        """Writes in the background; waits for the save before. Raises UsageError where that one failed.

        Without `opt_state`, the run can be loaded but not gone on with.
        """
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        free = disk_usage(self.directory).free
        if free < needed:
            raise UsageError(
                f"{self.directory}: the checkpoint of step {step} needs {needed / 1e6:,.0f} MB and the disk has "
                f"{free / 1e6:,.0f}; earlier ones are intact: make room and give the same command again"
            )
        items = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        items = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        metrics = {} if valid_loss is None else {METRIC: valid_loss}
        with _explained(step):
            self._manager.save(step, args=items, force=True)
        self._sealing = self._sealer.submit(self._seal, step, metrics)

    def _seal(self, step: int, metrics: dict[str, float]) -> None:
        with _explained(step):
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.directory / str(step), **metrics)

    def restore(self, step: int, **templates: Any) -> dict[str, Any]:
        """The items of `step` named by the keywords; templates give shapes and, as ShapeDtypeStructs, shardings."""
        # Without an explicit sharding orbax would ask for the devices the checkpoint was written on.
        items = {name: ocp.args.StandardRestore(template) for name, template in templates.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in templates}

    def wait(self) -> None:
        """Until the last save is sealed, for all processes: they must agree on which steps are whole."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("the checkpoint is sealed")

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            with suppress(Exception):  # it would raise again what `wait` has raised
                self._manager.close()


@contextmanager
def _explained(step: int) -> Iterator[None]:
    """What goes wrong while a step is written comes as bare exceptions of many kinds."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"the checkpoint of step {step} could not be written ({error}); earlier ones are intact: "
            "make room on the disk and give the same command again"
        ) from error


def load(path: str | Path) -> tuple[HourglassLM, Tokenizer, HourglassConfig]:
    """Any run directory of this library -> (model, tokenizer, config), at the step of lowest validation loss.

    The model is on the first device and in evaluation mode: no dropout until `model.train()`.

    Raises UsageError where `path` is no such directory, holds no whole checkpoint, or does not match its vocabulary.
    """
    config, tokenizer, _ = read_run(path)
    graph, params = nnx.split(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))
    store = CheckpointStore(path) if (Path(path) / CHECKPOINTS).is_dir() else None
    step = store.sound_step(best=True) if store else None
    if store is None or step is None:
        raise UsageError(f"{path}: holds no checkpoint yet; let pretrain.py reach its first evaluation")
    params = store.restore(step, params=on_one_device(params))["params"]
    store.close()
    model = nnx.merge(graph, params)
    model.eval()
    return model, tokenizer, config
