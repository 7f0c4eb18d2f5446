"""Hooks: code that `fit` calls during training. Curves, progress, profiles and patience are hooks too."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import jax
from absl import logging
from tqdm import tqdm

from hourglass_jax.config import HourglassConfig
from hourglass_jax.files import optional_output
from hourglass_jax.memory import release_memory
from hourglass_jax.ranges import check_choice
from hourglass_jax.training.metrics import CurveWriter

QUIET_SECONDS = 10  # between two plain lines that report only the speed
MAX_SUPPRESSED = 0.01  # fraction of boundaries that may be suppressed without a warning


class Hook:
    """Code that `fit` calls during training; override the methods you need.

    stop: set it to a reason, such as "the loss is below 1", to end training after the current step with a checkpoint
        and an evaluation.

    In a run of several processes each one calls its hooks; all of them must stop at the same step.
    """

    stop: str = ""

    def before_step(self, step: int) -> None:
        """Called before each training step; steps count from 1."""

    def after_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Called after each training step was dispatched; reading a metric waits until it is computed."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with each training record of metrics.jsonl: train_loss, learning_rate, step_seconds, ..."""

    def on_sample(self, step: int, sample: str) -> None:
        """Called in the first process with each text that `fit(sample=...)` returned."""

    def on_checkpoint(self, step: int) -> None:
        """Called after each checkpoint was started; it is written in the background."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with valid_loss in nats, valid_bpc in bits, and with `shorten_factors` valid_bpc_at_K for each K."""

    def on_end(self, error: BaseException | None) -> None:
        """Called once at the end. error: what ended training early, e.g. Interrupted; None if training is complete."""


class WriteCurves(Hook):
    """Append all metrics and samples to the curves of a run."""

    def __init__(self, directory: Path, start_step: int):
        self.curves = CurveWriter(directory, start_step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.curves.write(step, **metrics)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.curves.write(step, **metrics)

    def on_sample(self, step: int, sample: str) -> None:
        self.curves.write_text(step, sample)

    def on_end(self, error: BaseException | None) -> None:
        self.curves.close()


class ShowProgress(Hook):
    """Show loss, speed and samples on the terminal; `unit` names the bits per prediction."""

    def __init__(self, progress: Progress, unit: str):
        self.progress, self.unit = progress, unit

    def after_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self.progress.advance()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        speed = f"{metrics['characters_per_second']:,.0f}"
        figures = {"loss": f"{metrics['train_loss']:.3f}", "tokens/s": speed}
        if rate := metrics.get("boundary_rate"):
            figures["tokens/group"] = f"{1 / rate:.1f}"
        self.progress.show(figures)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.show({f"valid {self.unit}": f"{metrics['valid_bpc']:.3f}"}, now=True)

    def on_sample(self, step: int, sample: str) -> None:
        self.progress.write(f"step {step}: {sample}")

    def on_end(self, error: BaseException | None) -> None:
        self.progress.close()


class Profile(Hook):
    """Write a JAX profile of steps first .. last, as far as this process trains them."""

    def __init__(self, directory: Path, first: int, last: int):
        self.directory, self.first, self.last = directory, first, last
        self.running = False
        self.metrics: Mapping[str, jax.Array] = {}

    def before_step(self, step: int) -> None:
        if self.first <= step <= self.last and not self.running:
            jax.profiler.start_trace(str(self.directory))
            self.running = True

    def after_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self.metrics = metrics
        if step == self.last:
            self.write()

    def on_end(self, error: BaseException | None) -> None:
        self.write()

    def write(self) -> None:
        if self.running:
            jax.block_until_ready(self.metrics)
            with optional_output(self.directory, RuntimeError):
                jax.profiler.stop_trace()
            self.running = False


class Patience(Hook):
    """End training after `patience` evaluations in a row without a lower validation loss; 0: never.

    valid_losses: loss by step, from evaluations before this process resumed the run.
    """

    def __init__(self, patience: int, valid_losses: Mapping[int, float]):
        self.patience, self.valid_losses = patience, dict(valid_losses)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.valid_losses[step] = metrics["valid_loss"]

    @property
    def stop(self) -> str:  # type: ignore[override]
        losses = list(self.valid_losses.values())
        if not 0 < self.patience < len(losses) or min(losses[-self.patience :]) < min(losses[: -self.patience]):
            return ""
        return f"{self.patience} evaluations without a better one"


class WarnOfSuppression(Hook):
    """Warn at the end of training if the rate limit suppresses many learned boundaries."""

    def __init__(self, config: HourglassConfig):
        self.config = config
        self.suppressed: list[float] = []  # fraction of each learned boundary, from the newest record

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        learned = [name for name in metrics if name.startswith("boundary_loss")]
        self.suppressed = [metrics[name.replace("loss", "suppressed")] for name in learned]

    def on_end(self, error: BaseException | None) -> None:
        for suppressed in self.suppressed:
            if suppressed > MAX_SUPPRESSED and not error:
                logging.warning(
                    "%.1f %% of the boundaries are suppressed for lack of room; raise boundary_slack=%s or "
                    "boundary_weight=%s, or choose a smaller factor than that of hierarchy='%s'",
                    100 * suppressed,
                    self.config.boundary_slack,
                    self.config.boundary_weight,
                    self.config.hierarchy,
                )


class ReleaseMemory(Hook):
    """Return memory to the system that compiling an evaluation or a sample has freed."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        release_memory()

    def on_sample(self, step: int, sample: str) -> None:
        release_memory()


class Progress:
    """A progress bar of `total` steps, `initial` of them done, or plain lines if the output cannot redraw a bar.

    mode: bar | plain | auto (bar if stderr is a terminal) | none.
    """

    def __init__(self, total: int, initial: int, mode: str = "auto"):
        check_choice("log", mode, ("auto", "bar", "plain", "none"))
        if mode == "auto":
            redrawn = sys.stderr is not None and sys.stderr.isatty()
            mode = "bar" if redrawn or os.environ.get("TQDM_DISABLE") else "plain"
        self.mode, self.total, self.step = mode, total, initial
        self.figures: dict[str, str] = {}
        self.last_line = time.monotonic()
        # Without `disable`, tqdm obeys TQDM_DISABLE=1.
        hidden = {} if mode == "bar" else {"disable": True}
        self.bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, mininterval=0.5, **hidden)

    def advance(self) -> None:
        self.step += 1
        self.bar.update()

    def show(self, figures: Mapping[str, str], *, now: bool = False) -> None:
        """Show figures until they are replaced; plain lines come every QUIET_SECONDS, or `now`."""
        self.figures |= figures
        self.bar.set_postfix(self.figures, refresh=False)
        if self.mode == "plain" and (now or time.monotonic() - self.last_line >= QUIET_SECONDS):
            self.last_line = time.monotonic()
            shown = ", ".join(f"{name} {value}" for name, value in self.figures.items())
            _write_line(f"step {self.step}/{self.total}: {shown}", sys.stderr)

    def write(self, text: str) -> None:
        """Print a text on standard output."""
        if self.mode != "none":
            with self.bar.external_write_mode(file=sys.stdout):
                _write_line(text, sys.stdout)

    def close(self) -> None:
        self.bar.close()


def _write_line(text: str, stream: TextIO) -> None:
    """Write a line; training continues if the stream is closed or cannot encode the text."""
    with suppress(OSError, ValueError, AttributeError):
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
