"""Orbax checkpoints of parameters and optimizer state, each sealed by a manifest of checksums.

Orbax restores an array with a flipped bit silently, and does not recognize a step whose removal was interrupted. The
manifest is written last: a directory without one is incomplete, one that does not match it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from hourglass_jax.errors import UsageError
from hourglass_jax.files import write_whole

CHECKPOINTS = "checkpoints"  # the folder in a run directory
MANIFEST = "MANIFEST.json"
METRIC = "valid_loss"
FULL = ("No space left", "File too large", "quota", "RESOURCE_EXHAUSTED")  # errors that report a full disk


class CheckpointStore:
    """Checkpoints of a run by step, each sealed by a manifest; keeps the latest and the one of lowest validation loss.

    keep: number of latest checkpoints to keep; at least 2, so that one is complete while the next is written; 0: all.
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
        """Return the newest complete step, or with `best` the one of lowest validation loss.

        Returns None if there is no step, or only one that was never sealed. Warns about each damaged or incomplete
        step. Raises UsageError if all steps are damaged or incomplete.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best:
            steps.sort(key=self._valid_loss)
        for step in steps:
            problem = damage(self.directory / str(step))
            if not problem:
                return step
            logging.warning("skipping the checkpoint of step %d: %s", step, problem)
        if len(steps) == 1 and not (self.directory / str(steps[0]) / MANIFEST).exists():
            return None  # the process was killed before its first checkpoint was sealed
        if steps:
            raise UsageError(
                f"{self.directory}: all checkpoints are damaged or incomplete (steps {sorted(steps)}); restore them "
                "from a copy, or train again with --overwrite"
            )
        return None

    def check(self, step: int) -> None:
        """Raise UsageError unless there is a complete checkpoint of `step`."""
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            available = ", ".join(map(str, steps)) or "none"
            raise UsageError(f"{self.directory}: no checkpoint of step {step}; available steps: {available}")
        if problem := damage(self.directory / str(step)):
            raise UsageError(
                f"{self.directory}: the checkpoint of step {step} is not usable ({problem}); choose another step"
            )

    def evaluated(self, step: int) -> bool:
        """Return whether the checkpoint of `step` has a validation loss."""
        return math.isfinite(self._valid_loss(step))

    def _valid_loss(self, step: int) -> float:
        return read_manifest(self.directory / str(step)).get(METRIC, math.inf)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Select the checkpoint of lowest validation loss; orbax calls this as a preservation policy."""
        losses = [self._valid_loss(checkpoint.step) for checkpoint in checkpoints]
        return [math.isfinite(loss) and loss == min(losses) for loss in losses]

    def rewind(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def save(self, step: int, params: Any, opt_state: Any = None, valid_loss: float | None = None) -> None:
        """Write a checkpoint in the background, after the previous one. Raises UsageError if the previous one failed.

        A checkpoint without `opt_state` can be loaded, but training cannot resume from it.
        """
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        free = disk_usage(self.directory).free
        if free < needed:
            raise UsageError(
                f"{self.directory}: the checkpoint of step {step} requires {needed / 1e6:,.0f} MB, but the disk has "
                f"{free / 1e6:,.0f} MB left; earlier checkpoints are intact: free disk space and run the same command "
                "again"
            )
        items = {"params": params} | ({} if opt_state is None else {"opt_state": _unmasked(opt_state)})
        items = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        with _explained(step):
            self._manager.save(step, args=items, force=True)
        self._sealing.append(self._sealer.submit(self._seal, step, {} if valid_loss is None else {METRIC: valid_loss}))

    def set_valid_loss(self, step: int, valid_loss: float) -> None:
        """Add the validation loss to the checkpoint of `step` as soon as it is sealed."""
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
        """Return the items of `step` named by the keywords.

        A template is a tree of jax.ShapeDtypeStruct with shardings; without these, orbax requires the devices that
        wrote the checkpoint.
        """
        items = {name: ocp.args.StandardRestore(_unmasked(template)) for name, template in templates.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {
            name: jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(restored[name]))
            for name, template in templates.items()
        }

    def wait(self) -> None:
        """Wait until the last checkpoint is sealed, in all processes: they must agree on the complete steps."""
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
            with suppress(Exception):  # it would raise the error of `wait` again
                self._manager.close()


def _unmasked(tree: Any) -> Any:
    """Return the tree without optax's MaskedState wrappers, which checkpoints of early versions do not have."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedState)

    return jax.tree.map(lambda node: node.inner_state if is_masked(node) else node, tree, is_leaf=is_masked)


@contextmanager
def _explained(step: int) -> Iterator[None]:
    """Convert the exceptions of a failed write, which have many types, to UsageError."""
    try:
        yield
    except Exception as error:
        full = any(words.lower() in str(error).lower() for words in FULL)
        raise UsageError(
            f"the checkpoint of step {step} could not be written ({str(error) or type(error).__name__}); earlier "
            f"checkpoints are intact: {'free disk space and ' if full else ''}run the same command again"
        ) from error


def write_manifest(directory: Path, **facts: Any) -> None:
    """Seal `directory` with the SHA-256 of each file, and `facts` as JSON."""
    write_whole(directory / MANIFEST, json.dumps({"files": _checksums(directory), **facts}, indent=1))


def add_facts(directory: Path, **facts: Any) -> None:
    """Add `facts` to the manifest of a sealed directory."""
    if manifest := read_manifest(directory):
        write_whole(directory / MANIFEST, json.dumps(manifest | facts, indent=1))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest; empty if the directory is not sealed."""
    try:
        return json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}


def damage(directory: Path) -> str:
    """Return the problem of a sealed directory; empty if it is intact."""
    expected = read_manifest(directory).get("files")
    if not isinstance(expected, dict):
        return "it is incomplete"
    found = _checksums(directory)
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if changed := [name for name in sorted(expected) if expected[name] != found[name]]:
        return f"{changed[0]} has changed since it was written"
    return ""


def _checksums(directory: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            with path.open("rb") as file:
                checksums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums
