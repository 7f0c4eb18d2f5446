"""Orbax checkpoints of parameters and optimiser state, sealed by checksums."""

from __future__ import annotations

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
from jax.experimental import multihost_utils

from hourglass_jax.errors import UsageError
from hourglass_jax.training.manifest import MANIFEST, add_facts, damage, read_manifest, write_manifest

CHECKPOINTS = "checkpoints"  # their folder in a run directory
METRIC = "valid_loss"
FULL = ("No space left", "File too large", "quota", "RESOURCE_EXHAUSTED")  # what a failed write says of a full disk


class CheckpointStore:
    """Checkpoints of a run by step, each sealed by a manifest; keeps the latest and the best by validation loss.

    keep: how many of the latest; at least two, so that there is a whole one while the other is written or found
    damaged; 0: all.
    """

    def __init__(self, directory: str | Path, *, for_training: bool = False, keep: int = 2):
        self.directory = (Path(directory) / CHECKPOINTS).absolute()
        policies = ocp.checkpoint_managers
        latest = policies.LatestN(keep or None)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([latest, self]),
            cleanup_tmp_directories=for_training,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("params", "opt_state"))
        self._for_training = for_training
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: list[Future[None]] = []

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

    def check(self, step: int) -> None:
        """Raises UsageError unless there is a whole checkpoint of `step`."""
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise UsageError(f"{self.directory}: no checkpoint of step {step}; there are {kept}")
        if problem := damage(self.directory / str(step)):
            raise UsageError(f"{self.directory}: the checkpoint of step {step} cannot be used: {problem}")

    def evaluated(self, step: int) -> bool:
        """Whether the checkpoint of `step` has a validation loss."""
        return math.isfinite(self._valid_loss(step))

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
        with _explained(step):
            self._manager.save(step, args=items, force=True)
        self._sealing.append(self._sealer.submit(self._seal, step, {} if valid_loss is None else {METRIC: valid_loss}))

    def set_valid_loss(self, step: int, valid_loss: float) -> None:
        """Adds to the checkpoint of `step` what its evaluation found, once that is sealed."""
        if jax.process_index() == 0:
            self._sealing.append(self._sealer.submit(self._add_facts, step, {METRIC: valid_loss}))

    def _add_facts(self, step: int, metrics: dict[str, float]) -> None:
        with _explained(step):
            add_facts(self.directory / str(step), **metrics)

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
        sealing, self._sealing = self._sealing, []
        for done in sealing:
            done.result()
        if self._for_training and jax.process_count() > 1:
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
        full = any(words.lower() in str(error).lower() for words in FULL)
        raise UsageError(
            f"the checkpoint of step {step} could not be written ({str(error) or type(error).__name__}); earlier ones "
            f"are intact: {'make room on the disk and ' if full else ''}give the same command again"
        ) from error
