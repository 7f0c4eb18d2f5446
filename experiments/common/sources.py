"""What the launchers learn from, a text, haiku or images: batches, size, and how a model's samples are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments.common import launcher
from experiments.common.filling import make_filler
from experiments.common.pictures import COLUMNS, draw_images, nothing, save_grid, top_halves
from experiments.common.vocabulary import check_characters
from hourglass_jax import CharTokenizer, DataConfig, HourglassConfig, HourglassLM, ImageTokenizer, UsageError
from hourglass_jax.data.corpora import load_splits, load_text, load_tokens
from hourglass_jax.data.folder import load_folder
from hourglass_jax.data.haiku import make_examples
from hourglass_jax.data.images import ImageSplits, image_batches, image_validation, load_images
from hourglass_jax.data.pipeline import (
    BatchAt,
    LazyBatches,
    all_examples,
    consecutive_windows,
    shuffled_examples,
    training_batches,
)
from hourglass_jax.files import optional_output
from hourglass_jax.run_config import FOLDER, IMAGE_SIZES
from hourglass_jax.tokenizers import ByteTokenizer, TextTokenizer, Tokenizer
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.signals import Signals

UNITS = {"char": "BPC", "byte": "bits/byte"}
Sampler = Callable[[HourglassLM], str]


def unit_of(unit: str, config: HourglassConfig) -> str:
    """What bits a prediction are called, where it may be of masked tokens."""
    return unit if config.causal else f"masked {unit}"


class TextSource:
    """A text in windows, in its own characters or those of `tokenizer`."""

    next_command: tuple[str, ...] = ("finetune",)

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer | None = None, *, allow_unknown: bool = False):
        tokens, (self.train, self.valid, _), self.tokenizer = load_splits(config, tokenizer)
        for path in [config.path] * (tokenizer is not None) + [config.valid_path] * bool(config.valid_path):
            if self.tokenizer.kind == "char":
                check_characters(load_text(path), self.tokenizer, text_name(path), allow_unknown=allow_unknown)
        self.unit = UNITS[self.tokenizer.kind]
        self.config = config
        self.n_positions = config.block_size
        self.n_examples = (len(self.train) - 1) // config.block_size  # an epoch
        self.fingerprint = {"text_fingerprint": fingerprint(tokens)}
        if config.valid_path:
            self.fingerprint["valid_fingerprint"] = fingerprint(self.valid)
        self.size = f"{len(self.train):,} tokens to train on, {len(self.valid):,} for validation"

    def batches(self, seed: int) -> BatchAt:
        return training_batches(self.train, self.config, seed)

    def validation(self) -> LazyBatches:
        return consecutive_windows(self.valid, self.config.block_size, self.config.batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """A heading of the samples, and the function that makes one."""
        if not config.causal:
            return make_filler(self.tokenizer, self.valid[: self.n_positions], seed)
        prompt = self.valid[: int(min(32, config.position_limit / 2))]
        sample = launcher.make_sampler(self.tokenizer, prompt, 200, seed, signals)
        return f"{self.tokenizer.decode(prompt)!r} goes on:\n", sample


class HaikuSource:
    """Haiku, each an example of its own; with form 'prompt' the first line is given and carries no loss."""

    def __init__(
        self,
        train: list[str],
        valid: list[str],
        tokenizer: TextTokenizer,
        *,
        form: str,
        batch_size: int,
        allow_unknown: bool = False,
    ):
        if tokenizer.unknown("\n"):
            raise UsageError(
                "the model's vocabulary has no line end, so it can write no haiku of three lines; pretrain on a text "
                "with lines, or pass --extend_vocabulary"
            )
        check_characters("\n".join(train + valid), tokenizer, "the haiku", allow_unknown=allow_unknown)
        self.train, self.valid = (make_examples(part, tokenizer, form) for part in (train, valid))
        self.tokenizer, self.form, self.batch_size = tokenizer, form, batch_size
        self.unit = UNITS[tokenizer.kind]
        self.n_examples = len(train)
        self.first_line = valid[-1].split("\n")[0] if form == "prompt" else ""
        parts = {"text_fingerprint": self.train, "valid_fingerprint": self.valid}
        self.fingerprint = {name: fingerprint(tokens) for name, (tokens, _) in parts.items()}
        self.size = f"{len(train):,} haiku to train on, {len(valid):,} held back"
        self.next_command = ("generate", "--gen_mode=scratch")
        if self.first_line:
            self.next_command = ("generate", "--gen_mode=prompt", f"--prompt={self.first_line}")

    def batches(self, seed: int) -> BatchAt:
        return shuffled_examples(self.train, self.batch_size, seed)

    def validation(self) -> LazyBatches:
        """The held-back haiku, once."""
        return all_examples(self.valid, self.batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """As of a text; a sample ends by itself, and begins with the first line where that is given."""
        given = f"{self.first_line}\n" if self.first_line else ""
        prompt = np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(given)])
        sample = launcher.make_sampler(self.tokenizer, prompt, 250, seed, signals, ends=True)
        return "\n", lambda model: given + sample(model)


class ImageSource:
    """Images, each a sequence of its own."""

    unit = "bits/dim"
    next_command = ("generate", "--gen_mode=complete", f"--num_samples={COLUMNS}")

    def __init__(self, config: DataConfig):
        self.train, self.valid = read_images(config)
        self.config = config
        self.tokenizer = ImageTokenizer(self.train.shape[1:])
        self.n_positions = self.tokenizer.n_tokens + 1  # BOS too, and `generate` counts the last new token
        self.fingerprint = {"image_fingerprints": [fingerprint(part) for part in (self.train, self.valid)]}
        self.size = f"{len(self.train):,} images to train on, {len(self.valid):,} for validation"

    def batches(self, seed: int) -> BatchAt:
        return image_batches(self.train, self.config.batch_size, seed)

    def validation(self) -> LazyBatches:
        return image_validation(self.valid, self.config.batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """As of a text; a sample is a picture in `directory`: images, their completions, and new images."""
        images, path = self.valid[:COLUMNS], directory / "samples.png"

        def sample(model: HourglassLM) -> str:
            completed, new = (
                draw_images(model, self.tokenizer, given, jax.random.key(seed), check=signals.check)
                for given in (top_halves(self.tokenizer, images), nothing(len(images)))
            )
            with optional_output(path):
                save_grid(path, images, completed, new)
            return f"{path} (images, the same completed from their top halves, new ones)"

        return "", launcher.where_it_decodes(sample)


def open_source(
    config: DataConfig, vocab_path: str = "", tokenizer: Tokenizer | None = None, *, allow_unknown: bool = False
) -> TextSource | ImageSource:
    """What `config` asks for; a text in the tokens of `tokenizer`, of the vocabulary at `vocab_path`, or in its own.

    Raises UsageError where both are given and differ.
    """
    kind = tokenizer.kind if tokenizer else config.tokenizer
    if vocab_path and (config.dataset != "text" or kind == "byte"):
        option = "--data.tokenizer=byte" if config.dataset == "text" else f"--data.dataset={config.dataset}"
        raise UsageError(f"--vocab_path lists characters, but {option} has none; give one of the two")
    if config.dataset != "text":
        return ImageSource(config)
    if vocab_path:
        chosen = CharTokenizer.load(vocab_path)
        if tokenizer is not None and vars(tokenizer) != vars(chosen):
            raise UsageError(f"--vocab_path={vocab_path}: the parameters are for another vocabulary; leave it out")
        tokenizer = chosen
    return TextSource(config, tokenizer, allow_unknown=allow_unknown)


def read_tokenizer(data: DataConfig, vocab_path: str) -> Tokenizer:
    """Of what `data` asks for; only characters' own vocabulary and a folder need the data itself."""
    if data.dataset == FOLDER:
        return ImageTokenizer(read_images(data)[0].shape[1:])
    if data.dataset != "text":
        side = data.image_size or IMAGE_SIZES[data.dataset]
        return ImageTokenizer((side, side, 3))
    if data.tokenizer == "byte":
        return ByteTokenizer()
    return CharTokenizer.load(Path(vocab_path)) if vocab_path else load_tokens(data)[1]


def text_name(path: str) -> str:
    return path or "the built-in text"


def read_images(config: DataConfig) -> ImageSplits:
    """The images that `config` names."""
    if config.dataset == FOLDER:
        return load_folder(config.path, config.image_size, config.train_fraction)
    return load_images(config.path, config.dataset, config.image_size)
