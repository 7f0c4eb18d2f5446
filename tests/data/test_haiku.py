"""Haiku: parsing, selection, and examples for fine-tuning."""

from importlib import resources

import numpy as np
import pytest

from hourglass_jax import CharTokenizer, UsageError
from hourglass_jax.data.haiku import (
    is_haiku,
    load_haiku,
    make_examples,
    parse_haiku,
    usable_haiku,
    without_held_out,
)


@pytest.mark.parametrize("text", ["a\nb\nc\nd\ne\nf", "a\nb\nc\n\nd\ne\nf\n", "\n\n a \nb\n c\n \n\nd\ne\nf\n\n"])
def test_haiku_are_three_lines_each(text):
    assert parse_haiku(text, "it") == ["a\nb\nc", "d\ne\nf"]


@pytest.mark.parametrize("text", ["", "\n \n", "a\nb", "a\nb\nc\n\nd\ne", "a\nb\n\nc\nd\ne\nf"])
def test_other_than_three_lines_are_no_haiku(text):
    with pytest.raises(UsageError, match="poems\\.txt"):
        parse_haiku(text, "poems.txt")


def test_packaged_haiku_are_many_different_and_whole():
    haiku = load_haiku("")
    assert len(haiku) >= 300
    assert len(set(haiku)) == len(haiku)
    assert all(len(poem.split("\n")) == 3 and all(poem.split("\n")) for poem in haiku)
    assert all(map(is_haiku, haiku))
    raw = (resources.files("hourglass_jax.data") / "haiku.txt").read_text(encoding="utf-8")
    blocks = raw.strip().split("\n\n")
    assert len(blocks) == 1 or blocks == haiku


@pytest.mark.parametrize("text", ["", "a\nb", "a\nb\nc\n", "a\n \nc", "a\nb\nc\nd"])
def test_malformed_haiku_raise_errors(text):
    assert not is_haiku(text)


def test_haiku_that_do_not_fit_or_are_empty_once_cleaned_are_left_out():
    tokenizer = CharTokenizer.from_text("abc def", clean=True)
    haiku = ["a\nb\nc", "a\n123\nc", "abc\ndef\n" + "a" * 20]
    assert usable_haiku(haiku, tokenizer, block_size=16) == haiku[:1]
    assert usable_haiku(haiku[2:], tokenizer, block_size=29) == haiku[2:]  # 30 tokens with BOS and EOS


def test_haiku_for_validation_are_left_out_of_training():
    assert without_held_out(["a", "b", "a", "c"], ["a", "d"]) == ["b", "c"]
    assert without_held_out([], ["a"]) == []
    with pytest.raises(UsageError, match="all training haiku"):
        without_held_out(["a", "a"], ["a"])


def test_examples_end_at_their_eos_and_prompts_carry_no_loss():
    tokenizer = CharTokenizer.from_text("ab\n")
    haiku = ["a\nb\nab", "ab\nab\nab"]
    for form, first in (("haiku", [1, 1]), ("prompt", [3, 4])):
        tokens, weights = make_examples(haiku, tokenizer, form)
        assert tokens.shape == (2, 10) and tokens[0, 0] == tokenizer.bos_id
        counted = [np.flatnonzero(row) + 1 for row in weights]
        assert [c[0] for c in counted] == first
        assert [row[c[-1]] for row, c in zip(tokens, counted, strict=True)] == [tokenizer.eos_id] * 2
        assert [c[-1] for c in counted] == [7, 9]
