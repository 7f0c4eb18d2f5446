"""Data sources of the commands (text, haiku, images): batches, size, and samples of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from experiments.common.characters import check_characters
from experiments.common.launcher import banned_tokens
from experiments.common.pictures import COLUMNS, draw_images, nothing, save_grid, top_halves
from hourglass_jax import CharTokenizer, DataConfig, HourglassConfig, HourglassLM, ImageTokenizer, UsageError, generate
from hourglass_jax.checks import check_decodes
from hourglass_jax.data.corpora import Splits, load_splits, load_text, load_tokens, shortage
from hourglass_jax.data.haiku import make_examples
from hourglass_jax.data.images import ImageSplits, image_batches, image_validation, load_folder, load_images
from hourglass_jax.data.overlap import warn_of_repeats
from hourglass_jax.data.pairs import TEMPLATE, Conversation, PairExamples, Template, all_text
from hourglass_jax.data.pipeline import (
    BatchAt,
    LazyBatches,
    all_examples,
    consecutive_windows,
    plan_documents,
    shuffled_examples,
    training_batches,
    without_targets,
)
from hourglass_jax.data.store import Store, is_store
from hourglass_jax.files import optional_output
from hourglass_jax.objective import corrupt
from hourglass_jax.run_config import FOLDER, IMAGE_SIZES
from hourglass_jax.tokenizers import ByteTokenizer, TextTokenizer, Tokenizer
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.signals import Signals

GAP = "_"  # shown in place of a masked token
UNITS = {"char": "BPC", "byte": "bits/byte"}
Sampler = Callable[[HourglassLM], str]


def unit_of(unit: str, config: HourglassConfig) -> str:
    """Return the unit of bits per prediction; the predictions of a bidirectional model are masked tokens."""
    return unit if config.causal else f"masked {unit}"


class TextSource:
    """Windows of a text, encoded by `tokenizer` or in the text's own vocabulary."""

    next_command: tuple[str, ...] = ("finetune",)

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer | None = None, *, allow_unknown: bool = False):
        tokens, (self.train, self.valid, _), self.tokenizer = load_splits(config, tokenizer)
        texts = [(config.path, config.valid_path)] * (tokenizer is not None)
        for path, held_out in texts + [(config.valid_path, "")] * bool(config.valid_path):
            if self.tokenizer.kind == "char":
                text = load_text(path, held_out)
                check_characters(text, self.tokenizer, text_name(path), allow_unknown=allow_unknown)
        self.unit = UNITS[self.tokenizer.kind]
        self.config = config
        self.n_positions = config.block_size
        self.n_examples = (len(self.train) - 1) // config.block_size  # per epoch
        self.fingerprint = {"text_fingerprint": fingerprint(tokens)}
        if config.valid_path:
            self.fingerprint["valid_fingerprint"] = fingerprint(self.valid)
        self.size = f"{len(self.train):,} tokens to train on, {len(self.valid):,} for validation"

    def batches(self, seed: int) -> BatchAt:
        return training_batches(self.train, self.config, seed)

    def validation(self) -> LazyBatches:
        return consecutive_windows(self.valid, self.config.block_size, self.config.batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """Return a heading and a function that samples text."""
        if not config.causal:
            return make_filler(self.tokenizer, np.array(self.valid[: self.n_positions]), seed)
        prompt = np.array(self.valid[: int(min(32, config.position_limit / 2))])
        sample = make_sampler(self.tokenizer, prompt, 200, seed, signals)
        return f"{self.tokenizer.decode(prompt)!r} continues:\n", sample


class StoreSource(TextSource):
    """Windows of a token store, in the store's own tokens. Validation does not count BOS and EOS."""

    def __init__(self, config: DataConfig, tokenizer: TextTokenizer | None = None):
        store = open_store(config.path, tokenizer)
        if config.valid_path or config.split != "fraction":
            raise UsageError(
                f"{config.path}: a token store has its own validation split; leave out --valid_path and --data.split"
            )
        self.train, self.valid, self.tokenizer = store.train, store.valid, store.tokenizer
        if problem := shortage(Splits(store.train, store.valid, store.test), config):
            raise UsageError(
                f"{config.path}: {problem}; prepare it with more documents or another --valid_fraction, or give a "
                "smaller block_size"
            )
        warn_of_repeats(self.train, self.valid, config.path)
        self.unit = UNITS[self.tokenizer.kind]
        self.config = config
        self.n_positions = config.block_size
        self.n_examples = (len(self.train) - 1) // config.block_size
        self.fingerprint = {"text_fingerprint": store.fingerprint}
        documents = [len(part.ends) for part in (self.train, self.valid)]
        self.size = (
            f"{len(self.train):,} tokens in {documents[0]:,} documents to train on, {len(self.valid):,} in "
            f"{documents[1]:,} for validation"
        )
        if config.order == "documents":
            starts, n_lost, n_repeated = plan_documents(self.train, config.block_size)
            self.n_examples = len(starts)
            lost, repeated = (f"{n:,} ({n / len(self.train):.1%})" for n in (n_lost, n_repeated))
            self.size += f"; {len(starts):,} windows an epoch: {lost} tokens lost, {repeated} in two windows"

    def validation(self) -> LazyBatches:
        return without_targets(super().validation(), (self.tokenizer.bos_id, self.tokenizer.eos_id))


def open_store(path: str, tokenizer: TextTokenizer | None) -> Store:
    """Open a token store. Raises UsageError if it has another tokenizer."""
    store = Store(path)
    if tokenizer is not None and vars(tokenizer) != vars(store.tokenizer):
        raise UsageError(
            f"{path}: the token store has another tokenizer ({store.tokenizer.kind}, {store.tokenizer.vocab_size} "
            f"tokens) than the model ({tokenizer.kind}, {tokenizer.vocab_size} tokens); prepare it with the model's "
            f"--tokenizer={tokenizer.kind}{' and --vocab_path' * (tokenizer.kind == 'char')}"
        )
    return store


def open_text(config: DataConfig, tokenizer: TextTokenizer | None = None, *, allow_unknown: bool = False) -> TextSource:
    """Return the source of a text or a token store."""
    if is_store(config.path):
        return StoreSource(config, tokenizer)
    return TextSource(config, tokenizer, allow_unknown=allow_unknown)


class HaikuSource:
    """Haiku, one per example; with form 'prompt' the loss excludes the first line."""

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
                "the model's vocabulary has no newline, which haiku require; pretrain on a text "
                "with newlines, or pass --extend_vocabulary"
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
        """Return the held-back haiku, each once."""
        return self.part("valid", self.batch_size)

    def part(self, split: str, batch_size: int) -> LazyBatches:
        """Return the haiku of 'train' or 'valid', each once."""
        return all_examples(getattr(self, split), batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """Return a heading and a function that samples a haiku, up to <EOS>."""
        given = f"{self.first_line}\n" if self.first_line else ""
        prompt = np.concatenate([[self.tokenizer.bos_id], self.tokenizer.encode(given)])
        sample = make_sampler(self.tokenizer, prompt, 250, seed, signals, ends=True)
        return "\n", lambda model: given + sample(model)


class PairSource:
    """Prompts with answers, or conversations; the loss covers the answers only."""

    next_command = ("generate", "--chat")

    def __init__(
        self,
        train: list[Conversation],
        valid: list[Conversation],
        tokenizer: TextTokenizer,
        *,
        block_size: int,
        batch_size: int,
        template: Template = TEMPLATE,
        allow_unknown: bool = False,
    ):
        if unknown := tokenizer.unknown("".join(template.values())):
            raise UsageError(
                f"the model's vocabulary lacks {', '.join(map(repr, unknown))}, which the template of pairs requires; "
                "pass --extend_vocabulary"
            )
        check_characters(all_text(train + valid), tokenizer, "the pairs", allow_unknown=allow_unknown)
        self.train = PairExamples(train, tokenizer, block_size, template)
        self.valid = self.train if valid is train else PairExamples(valid, tokenizer, block_size, template)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.unit = UNITS[tokenizer.kind]
        self.n_examples = len(train)
        example = self.valid.examples[-1]
        self.prompt = example.tokens[: -example.n_answer]
        self.fingerprint = {
            "text_fingerprint": fingerprint(self.train.tokens),
            "valid_fingerprint": fingerprint(self.valid.tokens),
        }
        self.size = f"{len(train):,} pairs to train on, {len(valid):,} for validation"
        if n_cut := sum(part.n_cut for part in {self.train, self.valid}):
            self.size += f", {n_cut:,} cut at the beginning of the prompt to fit block_size={block_size}"

    def batches(self, seed: int) -> BatchAt:
        return self.train.shuffled(self.batch_size, seed)

    def validation(self) -> LazyBatches:
        return self.part("valid", self.batch_size)

    def part(self, split: str, batch_size: int) -> LazyBatches:
        """Return the pairs of 'train' or 'valid', each once."""
        return getattr(self, split).in_order(batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """Return a heading and a function that samples an answer to the last prompt for validation."""
        sample = make_sampler(self.tokenizer, self.prompt, 250, seed, signals, ends=True)
        return f"{self.tokenizer.decode(self.prompt)[-100:]!r} continues:\n", sample


class ImageSource:
    """Images, one per sequence."""

    unit = "bits/dim"
    next_command = ("generate", "--gen_mode=complete", f"--num_samples={COLUMNS}")

    def __init__(self, config: DataConfig):
        self.train, self.valid = read_images(config)
        self.config = config
        self.tokenizer = ImageTokenizer(self.train.shape[1:])
        self.n_positions = self.tokenizer.n_tokens + 1  # BOS too
        self.fingerprint = {"image_fingerprints": [fingerprint(part) for part in (self.train, self.valid)]}
        self.size = f"{len(self.train):,} images to train on, {len(self.valid):,} for validation"

    def batches(self, seed: int) -> BatchAt:
        return image_batches(self.train, self.config.batch_size, seed)

    def validation(self) -> LazyBatches:
        return image_validation(self.valid, self.config.batch_size)

    def sampler(self, config: HourglassConfig, seed: int, directory: Path, signals: Signals) -> tuple[str, Sampler]:
        """Return a heading and a function that writes samples.png: images, their completions, and new images."""
        images, path = self.valid[:COLUMNS], directory / "samples.png"

        def sample(model: HourglassLM) -> str:
            completed, new = (
                draw_images(model, self.tokenizer, given, jax.random.key(seed), check=signals.check)
                for given in (top_halves(self.tokenizer, images), nothing(len(images)))
            )
            with optional_output(path):
                save_grid(path, images, completed, new)
            return f"{path} (images, the same completed from their top halves, new ones)"

        return "", where_it_decodes(sample)


def open_source(
    config: DataConfig, vocab_path: str = "", tokenizer: Tokenizer | None = None, *, allow_unknown: bool = False
) -> TextSource | ImageSource:
    """Return the source of `config`. A text uses `tokenizer`, the vocabulary at `vocab_path`, or its own characters.

    Raises UsageError if `tokenizer` and the vocabulary differ.
    """
    kind = tokenizer.kind if tokenizer else config.tokenizer
    if vocab_path and (config.dataset != "text" or kind == "byte"):
        option = "--data.tokenizer=byte" if config.dataset == "text" else f"--data.dataset={config.dataset}"
        raise UsageError(f"--vocab_path lists characters, which {option} does not use; leave out one of them")
    if config.dataset != "text":
        return ImageSource(config)
    if vocab_path:
        chosen = CharTokenizer.load(vocab_path)
        if tokenizer is not None and vars(tokenizer) != vars(chosen):
            raise UsageError(
                f"--vocab_path={vocab_path}: the initial parameters are for another vocabulary; leave it out"
            )
        tokenizer = chosen
    return open_text(config, tokenizer, allow_unknown=allow_unknown)


def read_tokenizer(data: DataConfig, vocab_path: str) -> Tokenizer:
    """Return the tokenizer of `data`; reads the data only for a text's characters or a folder's image size."""
    if data.dataset == FOLDER:
        return ImageTokenizer(read_images(data)[0].shape[1:])
    if data.dataset != "text":
        side = data.image_size or IMAGE_SIZES[data.dataset]
        return ImageTokenizer((side, side, 3))
    if is_store(data.path):
        return Store(data.path).tokenizer
    if data.tokenizer == "byte":
        return ByteTokenizer()
    return CharTokenizer.load(Path(vocab_path)) if vocab_path else load_tokens(data)[1]


def text_name(path: str) -> str:
    return path or "the built-in text"


def read_images(config: DataConfig) -> ImageSplits:
    """Return the images of `config`."""
    if config.dataset == FOLDER:
        return load_folder(config.path, config.image_size, config.train_fraction, config.background)
    return load_images(config.path, config.dataset, config.image_size)


def make_filler(tokenizer: TextTokenizer, text: np.ndarray, seed: int) -> tuple[str, Callable[[HourglassLM], str]]:
    """Return a heading with gaps in `text`, int [L], and a function that fills them with a bidirectional model."""
    mask_token = tokenizer.vocab_size
    [chosen] = np.asarray(corrupt(text[None], jax.random.key(seed), mask_token)[1])
    read = np.where(chosen, mask_token, text)[None]

    def fill(model: HourglassLM) -> str:
        [logits] = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, read))
        return tokenizer.decode(np.where(chosen, logits[:, :mask_token].argmax(-1), text))

    first, *others = np.split(text, np.flatnonzero(chosen))  # each of the others starts with a gap
    gapped = GAP.join([tokenizer.decode(first), *(tokenizer.decode(piece[1:]) for piece in others)])
    return f"{gapped!r} is filled in:\n", fill


def make_sampler(
    tokenizer: Tokenizer, prompt: np.ndarray, max_tokens: int, seed: int, signals: Signals, *, ends: bool = False
) -> Callable[[HourglassLM], str]:
    """Return a function that samples text after `prompt`, up to <EOS> if `ends`; a signal interrupts it."""

    def sample(model: HourglassLM) -> str:
        [tokens] = generate(
            model,
            [prompt],
            max_tokens=int(min(max_tokens, model.config.position_limit - len(prompt))),
            key=jax.random.key(seed),
            temperature=0.8,
            stop_token=tokenizer.eos_id if ends else None,
            banned_tokens=banned_tokens(tokenizer, ends=ends),
            stream=lambda _: signals.check(),
        )
        return tokenizer.decode(tokens)

    return where_it_decodes(sample)


def where_it_decodes(sample: Callable[[HourglassLM], str]) -> Callable[[HourglassLM], str]:
    """Return a function like `sample` that, for a model without decoding, returns the reason."""

    def sample_or_reason(model: HourglassLM) -> str:
        try:
            check_decodes(model.config)
        except UsageError as reason:
            return f"(none: {reason})"
        return sample(model)

    return sample_or_reason
