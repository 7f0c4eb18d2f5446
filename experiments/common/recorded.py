"""The data that a run was trained on, from its recorded settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.common.sources import HaikuSource, open_store, read_images, text_name
from hourglass_jax import DataConfig, UsageError
from hourglass_jax.data.corpora import MIN_VALID, load_text, load_tokens, split_tokens
from hourglass_jax.data.haiku import load_haiku, usable_haiku, without_held_out
from hourglass_jax.data.images import ImageSplits
from hourglass_jax.data.store import is_store
from hourglass_jax.tokenizers import TextTokenizer, clean
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.run import Run


class Part(NamedTuple):
    """A split of a text: its tokens [N], its characters ("" for bytes), its name, and the `ends` of documents."""

    tokens: np.ndarray
    text: str
    name: str
    ends: np.ndarray | None = None


def recorded_data(settings: Mapping[str, Any]) -> DataConfig:
    """Return the data of a run with these settings, or of the run that it was fine-tuned from."""
    while "data" not in settings and "pretrained_settings" in settings:
        settings = settings["pretrained_settings"]
    return DataConfig(**settings.get("data", {}))


def recorded_text(run: str | Path, path: str, split: str | None) -> Part:
    """Return a split of the text at `path`; if that is empty, of the run's own text.

    split: all | train | valid | test, divided as in the run; None: valid for the run's own text, all for another text.

    Raises UsageError if the run has no text of its own, or that text cannot be read.
    """
    _, tokenizer, settings, _ = Run(run).read()
    data = recorded_data(settings)
    if not path and "text_fingerprint" not in settings:
        raise UsageError(f"{run}: has no record of its training text; give a text as --data_path")
    given = dataclasses.replace(data, path=path or data.path, valid_path="" if path else data.valid_path)
    if is_store(given.path):
        return stored_part(given.path, tokenizer, split or "valid", settings)
    try:
        tokens, _ = load_tokens(given, tokenizer)
    except UsageError as error:
        if path:
            raise
        raise UsageError(f"{run}: the training text cannot be read; give a text as --data_path ({error})") from error
    own = fingerprint(tokens) == settings.get("text_fingerprint")
    if not own and not path:
        logging.warning("%s: changed after the model was trained on it", text_name(data.path))
    mine = own or not path
    split = split or ("valid" if mine else "all")
    apart = data.valid_path if mine else ""
    if apart and split == "valid":
        return recorded_text(run, apart, "all")
    name = f"{split} of {text_name(given.path)}{' (the training text)' if own else ''}"
    text = load_text(given.path, given.valid_path) if tokenizer.kind == "char" else ""
    text = clean(text) if getattr(tokenizer, "clean", False) else text
    if split != "all" and not (apart and split == "train"):
        tokens = getattr(split_tokens(tokens, given), split)
        text = getattr(split_tokens(text, given), split) if text else ""
    if not len(tokens):
        raise UsageError(f"split={split!r} is empty: the model's text was split by {data.split!r}; use split='valid'")
    return Part(tokens, text, name)


def stored_part(path: str, tokenizer: TextTokenizer, split: str, settings: Mapping[str, Any]) -> Part:
    """Return a split of a token store. Raises UsageError for split='all', an empty split, and another tokenizer."""
    store = open_store(path, tokenizer)
    if split == "all":
        raise UsageError(f"{path}: a token store has the splits train, valid and test; give one as --split")
    tokens = getattr(store, split)
    if len(tokens) < MIN_VALID:
        raise UsageError(f"{path}: split={split!r} has no documents; choose another split")
    own = " (the training text)" * (store.fingerprint == settings.get("text_fingerprint"))
    return Part(tokens[:], "", f"{split} of {path}{own}", tokens.ends)


def haiku_parts(settings: Mapping[str, Any], tokenizer: TextTokenizer) -> tuple[list[str], list[str]]:
    """Return the haiku of training and of validation. Raises UsageError if the settings have no record of them."""
    if "held_back" not in settings:
        raise UsageError("the model has no record of haiku; give a model that finetune.py trained on haiku")
    paths = [settings["data_path"], *filter(None, [settings.get("valid_path")])]
    train, *valid = (usable_haiku(load_haiku(path), tokenizer, settings["block_size"]) for path in paths)
    n_held_back = settings["held_back"]
    train, held_out = (train, valid[0]) if valid else (train[:-n_held_back], train[-n_held_back:])
    return without_held_out(train, held_out), held_out


def recorded_haiku(run: str | Path) -> HaikuSource:
    """Return the haiku that `run` was fine-tuned on."""
    _, tokenizer, settings, _ = Run(run).read()
    form, batch_size = settings["format"], settings["batch_size"]
    source = HaikuSource(
        *haiku_parts(settings, tokenizer), tokenizer, form=form, batch_size=batch_size, allow_unknown=True
    )
    if any(settings.get(name, found) != found for name, found in source.fingerprint.items()):
        logging.warning("%s: changed after the model was trained on them", settings["data_path"] or "the haiku")
    return source


def recorded_images(run: str | Path, path: str) -> ImageSplits:
    """Return the images at `path`, or the run's own. Raises UsageError for another image shape."""
    _, tokenizer, settings, _ = Run(run).read()
    data = recorded_data(settings)
    images = read_images(dataclasses.replace(data, path=path or data.path))
    if images.train.shape[1:] != tokenizer.shape:
        raise UsageError(
            f"{path or data.path}: the images are {list(images.train.shape[1:])}, but the model's are "
            f"{list(tokenizer.shape)}; give images of that size and number of channels"
        )
    return images
