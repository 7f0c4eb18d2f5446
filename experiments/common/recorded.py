"""What a run was trained on, found again by what it recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.common.sources import HaikuSource, read_images, text_name
from hourglass_jax import DataConfig, UsageError
from hourglass_jax.data.corpora import load_text, load_tokens, split_tokens
from hourglass_jax.data.haiku import load_haiku, usable_haiku, without_held_out
from hourglass_jax.data.images import ImageSplits
from hourglass_jax.tokenizers import TextTokenizer, clean
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.run import Run


class Part(NamedTuple):
    """A split of a text: its tokens [N], the characters they stand for ("" where they are bytes), and its name."""

    tokens: np.ndarray
    text: str
    name: str


def recorded_data(settings: Mapping[str, Any]) -> DataConfig:
    """The data of a run with these settings; where it recorded none, those of the run it was fine-tuned from."""
    while "data" not in settings and "pretrained_settings" in settings:
        settings = settings["pretrained_settings"]
    return DataConfig(**settings.get("data", {}))


def recorded_text(run: str | Path, path: str, split: str | None) -> Part:
    """A split of the text at `path`, or where that is empty, of the run's own.

    split: all | train | valid | test, cut as in the run; None: valid of its own text, wherever that lies, and all of
        another. Raises UsageError where the run has no text of its own, or it is gone.
    """
    _, tokenizer, settings, _ = Run(run).read()
    data = recorded_data(settings)
    if not path and "text_fingerprint" not in settings:
        raise UsageError(f"{run}: records no text that it was trained on; give one as --data_path")
    given = dataclasses.replace(data, path=path or data.path, valid_path="" if path else data.valid_path)
    try:
        tokens, _ = load_tokens(given, tokenizer)
    except UsageError as error:
        if path:
            raise
        raise UsageError(f"{run}: its own text cannot be read, give it or another as --data_path: {error}") from error
    own = fingerprint(tokens) == settings.get("text_fingerprint")
    if not own and not path:
        logging.warning("%s: has changed since the model was trained on it", text_name(data.path))
    mine = own or not path
    split = split or ("valid" if mine else "all")
    apart = data.valid_path if mine else ""
    if apart and split == "valid":
        return recorded_text(run, apart, "all")
    name = f"{split} of {text_name(given.path)}{', which the model was trained on' if own else ''}"
    text = load_text(given.path, given.valid_path) if tokenizer.kind == "char" else ""
    text = clean(text) if getattr(tokenizer, "clean", False) else text
    if split != "all" and not (apart and split == "train"):
        tokens = getattr(split_tokens(tokens, given), split)
        text = getattr(split_tokens(text, given), split) if text else ""
    if not len(tokens):
        raise UsageError(f"split={split!r} is empty: the model's text was split by {data.split!r}; use 'valid'")
    return Part(tokens, text, name)


def haiku_parts(settings: Mapping[str, Any], tokenizer: TextTokenizer) -> tuple[list[str], list[str]]:
    """The haiku that a run with these settings was fine-tuned on, and those for validation.

    Raises UsageError where it recorded none, as one that was converted.
    """
    if "held_back" not in settings:
        raise UsageError("the model records no haiku that it was fine-tuned on; give one that finetune.py wrote")
    paths = [settings["data_path"], *filter(None, [settings.get("valid_path")])]
    train, *valid = (usable_haiku(load_haiku(path), tokenizer, settings["block_size"]) for path in paths)
    n_held_back = settings["held_back"]
    train, held_out = (train, valid[0]) if valid else (train[:-n_held_back], train[-n_held_back:])
    return without_held_out(train, held_out), held_out


def recorded_haiku(run: str | Path) -> HaikuSource:
    """The haiku that `run` was fine-tuned on."""
    _, tokenizer, settings, _ = Run(run).read()
    form, batch_size = settings["format"], settings["batch_size"]
    source = HaikuSource(
        *haiku_parts(settings, tokenizer), tokenizer, form=form, batch_size=batch_size, allow_unknown=True
    )
    if any(settings.get(name, found) != found for name, found in source.fingerprint.items()):
        logging.warning("%s: have changed since the model was trained on them", settings["data_path"] or "the haiku")
    return source


def recorded_images(run: str | Path, path: str) -> ImageSplits:
    """The images at `path`, or where that is empty, those that `run` was trained on; raises UsageError for others."""
    _, tokenizer, settings, _ = Run(run).read()
    data = recorded_data(settings)
    images = read_images(dataclasses.replace(data, path=path or data.path))
    if images.train.shape[1:] != tokenizer.shape:
        raise UsageError(
            f"{path or data.path}: the images are {list(images.train.shape[1:])}, but the model's are "
            f"{list(tokenizer.shape)}; give images of the same size and colours"
        )
    return images
