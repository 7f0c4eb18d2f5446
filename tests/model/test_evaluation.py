"""The sliding-window protocol scores every token but the first once, in its own context."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward, make_model, small_config

import hourglass_jax as hg
from hourglass_jax.data.pipeline import sliding_windows
from hourglass_jax.evaluation import accuracy, evaluate_batches

# Texts longer and shorter than a window, with and without a shorter last step, one token more and less than fits.
SIZES = [(50, 12, 5), (53, 12, 12), (13, 12, 3), (14, 12, 3), (7, 12, 4), (2, 12, 1), (29, 8, 1)]


@pytest.fixture(scope="module")
def model():
    return make_model(small_config())


def text(length):
    return np.random.default_rng(length).integers(0, 11, length)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length, window, step", SIZES)
def test_windows_predict_every_token_but_the_first_once(length, window, step, batch_size):
    predicted, tokens = [], np.arange(1, length + 1)  # 0 is padding
    for windows, weights in sliding_windows(tokens, window, step, batch_size):
        assert windows.shape == (batch_size, window + 1) and weights.shape == (batch_size, window)
        predicted.extend(windows[:, 1:][weights == 1])
    assert predicted == list(range(2, length + 1))


def naive_loss(model, tokens, window, step):
    """Prediction by prediction: which tokens it sees, and its loss in float64."""
    losses = []
    for target in range(1, len(tokens)):
        start = max(-(-(target - window) // step), 0) * step
        seen = tokens[start:target]
        padded = jnp.zeros((1, window), int).at[0, : len(seen)].set(seen)  # padding comes later
        logits = np.asarray(forward(model, padded)[0, len(seen) - 1], np.float64)
        losses.append(np.log(np.exp(logits).sum()) - logits[tokens[target]])
    return np.mean(losses)


@pytest.mark.parametrize("length, window, step", SIZES)
def test_sliding_loss_equals_the_loss_of_single_predictions(model, length, window, step):
    tokens = text(length)
    result = hg.evaluate_sliding(model, tokens, window=window, step=step, batch_size=2)
    assert result.n_characters == length - 1
    assert result.loss == pytest.approx(naive_loss(model, tokens, window, step), rel=1e-5)


def test_sliding_by_the_whole_window_equals_evaluate(model):
    tokens = text(60)
    consecutive = hg.evaluate(model, tokens, block_size=12, batch_size=1)
    assert hg.evaluate_sliding(model, tokens, window=12, step=12) == consecutive
    assert abs(hg.evaluate_sliding(model, tokens, window=12, step=4).loss - consecutive.loss) > 1e-3


def test_sliding_windows_of_mapped_text_are_lazy(tmp_path):
    path = tmp_path / "text"
    n_tokens, window, step = 5_000_000, 4096, 128
    path.write_bytes(bytes(range(250)) * (n_tokens // 250))
    batches = sliding_windows(np.memmap(path, np.uint8, mode="r"), window, step, 1)
    assert len(batches) == 1 + -(-(n_tokens - 1 - window) // step)
    windows, weights = batches[len(batches) - 1]
    remainder = (n_tokens - 1 - window) % step
    assert weights.sum() == remainder and windows[0, window - step + remainder] == 249


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, "window=0 is out of range"),
        ({"window": 12, "step": 0}, "step=0 is out of range"),
        ({"window": 12, "step": 13}, "at least 1 and at most 12"),
        ({"window": 12, "step": 4, "batch_size": 0}, "batch_size=0"),
        ({"window": 65, "step": 4}, "window=65 is longer than the learned positions, max_length=64"),
        ({"tokens": text(1)}, "at least 2"),
    ],
)
def test_invalid_windows_raise_one_line_errors(options, message):
    model = make_model(small_config(positions="learned"))
    with pytest.raises(hg.UsageError, match=message) as error:
        hg.evaluate_sliding(model, **({"tokens": text(100), "window": 64, "step": 4} | options))
    assert "\n" not in str(error.value)


def test_windows_up_to_the_learned_positions_are_scored():
    model = make_model(small_config(positions="learned"))
    assert jnp.isfinite(hg.evaluate_sliding(model, text(100), window=64, step=8).loss)


def test_accuracy_is_the_weighted_share_of_likeliest_tokens_that_are_right(model):
    rng = np.random.default_rng(3)
    batches = [(rng.integers(0, 11, (n, 9)), rng.random((n, 8)).astype(np.float32)) for n in (9, 20)]
    right = [np.asarray(forward(model, tokens[:, :-1])).argmax(-1) == tokens[:, 1:] for tokens, _ in batches]
    share = sum((hits * weights).sum() for hits, (_, weights) in zip(right, batches, strict=True))
    assert share > 0 and accuracy(model, batches) == pytest.approx(share / sum(weights.sum() for _, weights in batches))


@pytest.mark.parametrize("weights", [None, 0])
def test_evaluating_no_predictions_raises_an_error(weights):
    model = make_model(small_config())
    batches = [] if weights is None else [(np.zeros((2, 9), np.int32), np.full((2, 8), weights, np.float32))]
    for measure in (evaluate_batches, accuracy):
        with pytest.raises(hg.UsageError, match="nothing to predict"):
            measure(model, batches)
