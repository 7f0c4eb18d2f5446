"""Passages of the validation text that repeat the training text."""

import numpy as np
import pytest

from hourglass_jax import DataConfig
from hourglass_jax.data import overlap
from hourglass_jax.data.corpora import load_splits
from hourglass_jax.data.files import warn_once
from hourglass_jax.data.overlap import repeated_share


def letters(n, seed=0, n_letters=26):
    return np.random.default_rng(seed).integers(97, 97 + n_letters, n).astype(np.uint8)


RULE = np.tile(np.frombuffer(b"-" * 79 + b"\n", np.uint8), 100)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize(
    ("train", "valid", "share"),
    [
        (letters(50_000), letters(5000, seed=1), 0.0),
        (letters(50_000), letters(50_000)[40_003:45_003], 1.0),
        (np.tile(letters(700), 50), np.tile(letters(700), 5), 1.0),
        (letters(50_000), np.concatenate([letters(5000, seed=1), letters(50_000)[1:5001]]), 0.5),
        (np.concatenate([RULE, letters(50_000)]), np.concatenate([RULE, letters(5000, seed=1)]), 0.0),
        (letters(3_000_001), letters(3_000_001)[-1000:], 1.0),
        (letters(20_000), letters(20_000)[:126], 0.0),  # too short for a sample
        (letters(63), letters(20_000), 0.0),
    ],
)
def test_the_share_of_repeated_passages_is_found(train, valid, share, dtype):
    assert repeated_share(train.astype(dtype), valid.astype(dtype)) == pytest.approx(share, abs=0.02)


def test_a_long_training_text_is_sampled(monkeypatch):
    monkeypatch.setattr(overlap, "MAX_PIECES", 8)
    text = np.tile(letters(2**16), 64 * 16)
    assert repeated_share(text, text[: 2**16]) > 0.9
    huge = np.broadcast_to(np.uint8(0), 10**13)
    assert repeated_share(huge, huge) == 0.0


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_validation_text_that_repeats_the_training_text_is_told(tmp_path, caplog, tokenizer):
    """Two forms of validation data: the last part of a text, or a copy of that part in another file."""
    once = bytes(letters(3000)).decode()
    texts = {"repeated": once * 5, "once": once, "train": once * 2, "valid": once[500:1500]}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for path, valid_path in (("repeated", ""), ("once", ""), ("train", "valid")):
        caplog.clear()
        valid_path = valid_path and str(tmp_path / valid_path)
        load_splits(DataConfig(path=str(tmp_path / path), valid_path=valid_path, tokenizer=tokenizer, block_size=16))
        assert len(caplog.messages) == (path != "once")
        assert all("100% of sampled" in line for line in caplog.messages)
        warn_once.cache_clear()
