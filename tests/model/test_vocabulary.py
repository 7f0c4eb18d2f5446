"""A model whose vocabulary is extended says of the old characters what it said before."""

import numpy as np
import pytest
from conftest import MODERN, forward, make_model, small_config
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.tokenizers import boundary_tokens
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.run import Record, Run
from hourglass_jax.transfer import extend_vocabulary


def small_model(tokenizer, **options):
    methods = {"hierarchy": "1@1 1@2 1@1", "shortening": "average", "upsampling": "repeat", "positions": "learned"}
    return make_model(small_config(vocab_size=tokenizer.vocab_size, **methods, **options))


@pytest.mark.parametrize("options", [{}, MODERN["ngrams"]], ids=["plain", "ngrams"])
def test_extended_vocabulary_keeps_old_logits(tmp_path, options):
    tokenizer = hg.CharTokenizer("abcde")  # with the specials as many as other sizes of the model
    model = small_model(tokenizer, norm="final", d_model=8, max_length=8, **options)
    for change_mode in (model.train, model.eval):
        change_mode()
        extended, longer = extend_vocabulary(model, tokenizer, "bead 日x日")
        assert extended.dropout.deterministic == model.dropout.deterministic
    assert longer.characters == [*"abcde", " ", "x", "日"]
    assert (longer.eos_id, longer.unk_id, longer.bos_id) == (tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id)
    assert extended.config.vocab_size == longer.vocab_size == 11
    tokens = np.random.default_rng(0).integers(0, 8, (2, 8))
    old, new = np.asarray(forward(model, tokens)), np.asarray(forward(extended, tokens))
    np.testing.assert_array_equal(new[..., :8], old)
    np.testing.assert_allclose(new[..., 8:], np.repeat(old.mean(-1, keepdims=True), 3, -1), atol=1e-5)
    rows, mean = (np.asarray(table.embedding.embedding[...]) for table in (extended, model))
    np.testing.assert_allclose(rows[8:], np.repeat(mean.mean(0, keepdims=True), 3, 0), atol=1e-6)
    assert model.config.vocab_size == tokenizer.vocab_size == 8  # what was given is as it was

    Run(tmp_path).write(Record(extended.config, longer, {}, []))
    store = CheckpointStore(tmp_path, for_training=True)
    store.save(1, nnx.state(extended))
    store.close()
    loaded, again, _ = hg.load(tmp_path)
    assert again.characters == longer.characters
    tokens = longer.encode("bad日x")[None]
    np.testing.assert_array_equal(forward(loaded, tokens), forward(extended, tokens))


@pytest.mark.parametrize("boundaries, longer", [("whitespace", (0, 2, 7, 8)), ("spacelike", (0, 2, 7, 8, 10))])
def test_extended_vocabulary_updates_default_boundary_tokens(boundaries, longer):
    tokenizer = hg.CharTokenizer("abcd ")
    own = boundary_tokens(tokenizer, boundaries)
    for given, expected in ((own, longer), ((3,), (3,))):
        model = small_model(tokenizer, boundaries=boundaries, boundary_tokens=given)
        extended, vocabulary = extend_vocabulary(model, tokenizer, "a\td x—")
        assert vocabulary.characters == [*"abcd ", "\t", "x", "—"]
        assert extended.config.boundary_tokens == expected


def test_the_tokenizer_of_another_model_raises_an_error():
    model = small_model(hg.CharTokenizer("abcd"))
    with pytest.raises(hg.UsageError, match="the tokenizer has 6 tokens, but the model has 7"):
        extend_vocabulary(model, hg.CharTokenizer("abc"), "abcd")


def test_extending_by_known_characters_changes_nothing():
    tokenizer = hg.CharTokenizer("abc", clean=True)
    model = small_model(tokenizer)
    assert extend_vocabulary(model, tokenizer, "Càb日") == (model, tokenizer)  # as it is cleaned, all is known
    tokenizer = hg.ByteTokenizer()
    model = small_model(tokenizer)
    assert extend_vocabulary(model, tokenizer, "日") == (model, tokenizer)
