"""What pretrain.py learns from, a text or images: batches, size, and how a model's samples are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from experiments.common import launcher
from experiments.common.pictures import COLUMNS, draw_images, nothing, save_grid, top_halves
from hourglass_jax import CharTokenizer, DataConfig, HourglassLM, ImageTokenizer, UsageError
from hourglass_jax.data.corpora import load_tokens, split_tokens
from hourglass_jax.data.images import ImageSplits, image_batches, image_validation, load_images
from hourglass_jax.data.pipeline import BatchAt, LazyBatches, consecutive_windows, training_batches
from hourglass_jax.tokenizers import TextTokenizer
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.run import Run
from hourglass_jax.training.signals import Signals

Sampler = Callable[[HourglassLM], str]


class TextSource:
    """A text in windows."""

    unit = "BPC"
    next_command = ("finetune",)

    def __init__(self, config: DataConfig, vocabulary: TextTokenizer | None = None):
        tokens, self.tokenizer = load_tokens(config, vocabulary)
        self.train, self.valid, _ = split_tokens(tokens, config)
        self.config = config
        self.n_positions = config.block_size
        self.fingerprint = {"text_fingerprint": fingerprint(tokens)}
        self.size = f"{len(self.train):,} tokens to train on, {len(self.valid):,} for validation"

    def batches(self, seed: int) -> BatchAt:
        return training_batches(self.train, self.config, seed)

    def validation(self) -> LazyBatches:
        return consecutive_windows(self.valid, self.config.block_size, self.config.batch_size)

    def sampler(self, position_limit: float, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """A heading of the samples, and the function that makes one."""
        prompt = self.valid[: int(min(32, position_limit / 2))]
        sample = launcher.make_sampler(self.tokenizer, prompt, 200, seed, signals)
        return f"{self.tokenizer.decode(prompt)!r} goes on:\n", sample


class ImageSource:
    """Images, each a sequence of its own."""

    unit = "bits/dim"
    next_command = ("generate", "--gen_mode=complete", f"--num_samples={COLUMNS}")

    def __init__(self, config: DataConfig):
        self.train, self.valid = load_images(config.path, config.dataset, config.image_size)
        self.config = config
        self.tokenizer = ImageTokenizer(self.train.shape[1:])
        self.n_positions = self.tokenizer.n_tokens + 1  # BOS too, and `generate` counts the last new token
        self.fingerprint = {"image_fingerprints": [fingerprint(part) for part in (self.train, self.valid)]}
        self.size = f"{len(self.train):,} images to train on, {len(self.valid):,} for validation"

    def batches(self, seed: int) -> BatchAt:
        return image_batches(self.train, self.config.batch_size, seed)

    def validation(self) -> LazyBatches:
        return image_validation(self.valid, self.config.batch_size)

    def sampler(self, position_limit: float, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """As of a text; a sample is a picture in `directory`: images, their completions, and new images."""
        images, path = self.valid[:COLUMNS], directory / "samples.png"

        def sample(model: HourglassLM) -> str:
            completed, new = (
                draw_images(model, self.tokenizer, given, jax.random.key(seed), check=signals.check)
                for given in (top_halves(self.tokenizer, images), nothing(len(images)))
            )
            save_grid(path, images, completed, new)
            return f"{path} (images, the same completed from their top halves, new ones)"

        return "", sample


def open_source(config: DataConfig, vocab_path: str) -> TextSource | ImageSource:
    """What `config` asks for; a text in the vocabulary at `vocab_path`, or where that is empty, in its own."""
    if vocab_path and (config.dataset != "text" or config.tokenizer == "byte"):
        option = "--data.tokenizer=byte" if config.dataset == "text" else f"--data.dataset={config.dataset}"
        raise UsageError(f"--vocab_path lists characters, but {option} has none; give one of the two")
    if config.dataset != "text":
        return ImageSource(config)
    return TextSource(config, CharTokenizer.load(Path(vocab_path)) if vocab_path else None)


def recorded_data(run: str) -> DataConfig:
    """What the model in run directory `run` was pretrained on."""
    settings = Run(run).read().settings
    return DataConfig(**settings.get("pretrained_settings", settings)["data"])


def recorded_images(run: str, path: str) -> ImageSplits:
    """The images that `run` was trained on, at `path`, or where that is empty, where they were."""
    data = recorded_data(run)
    return load_images(path or data.path, data.dataset, data.image_size)
