"""Laws of groups that end by events, each with what breaks it: their past, their row, one position each, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import event_config, forward, learned_config, make_model, tokens_of
from flax import nnx
from test_boundaries import ATTENTION, LooksAhead, largest_difference

from hourglass_jax.inspection import boundaries_of_rows, count_groups
from hourglass_jax.model import Hourglass
from hourglass_jax.nn.boundaries import Boundaries
from hourglass_jax.registry import BOUNDARIES


def check_events_follow_their_past(model, length=24):
    """An event is the same whatever token comes after it, and however much of the text."""
    text = tokens_of(length, seed=2)
    changed = np.where(np.eye(length, dtype=bool), (text + 3) % 11, text)
    whole, *others = boundaries_of_rows(model, np.concatenate([text[None], changed]))
    for s, other in enumerate(others):
        np.testing.assert_array_equal(other[:, :s], whole[:, :s])
    assert any((other != whole).any() for other in others)
    for n in (1, 2, 13):
        np.testing.assert_array_equal(boundaries_of_rows(model, text[None, :n])[0], whole[:, :n])


LIMITED = event_config(boundaries="tokens", boundary_tokens=range(7), boundary_slack=1.0, hierarchy="1@1 1@6 1@1")
NESTED = {"hierarchy": "1@1 0@2 1@4 0@2 1@1"}


@pytest.mark.parametrize(
    "config",
    [
        event_config(),
        LIMITED,
        learned_config("router router", **NESTED),
        pytest.param(learned_config("gumbel"), marks=pytest.mark.slow),
        pytest.param(learned_config("entropy"), marks=pytest.mark.slow),
    ],
    ids=lambda config: config.boundaries,
)
def test_boundaries_depend_only_on_past_tokens(config):
    model = make_model(config)
    check_events_follow_their_past(model)
    if config == LIMITED:  # where many find no room
        assert count_groups(model, tokens_of((4, 24))).suppressed > 0.2


def test_a_rule_that_looks_ahead_moves_earlier_boundaries(monkeypatch):
    monkeypatch.setitem(BOUNDARIES, "ahead", LooksAhead)
    with pytest.raises(AssertionError):
        check_events_follow_their_past(make_model(event_config(boundaries="ahead")))


def test_boundaries_in_padding_change_the_logits(request):
    """The control of decoding beside others, of prompts that are padded on the left."""
    model = make_model(event_config())
    assert largest_difference(model) < 1e-5
    request.getfixturevalue("forgotten_padding")
    assert largest_difference(model) > 1e-3


def flat(hourglass, x):
    """The Hourglass without resampling."""
    x = hourglass.pre(x)
    return hourglass.post(x + hourglass.upsample_norm(hourglass.inner(x)))


@pytest.mark.parametrize("shortening", ["select", "average"])
def test_groups_of_one_token_make_the_deeper_level_a_plain_stack(shortening):
    """The control: not where one token ends no group."""
    tokens = jnp.asarray(tokens_of((2, 13)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 13, 16)), jnp.float32)
    for listed, same in ((range(11), True), (range(10), False)):
        options = {"boundaries": "tokens", "boundary_tokens": listed, "boundary_slack": 2.0, "shortening": shortening}
        hourglass = make_model(event_config(hierarchy="1@1 1@2 1@1", **options)).hourglass
        difference = nnx.jit(lambda hourglass: jnp.abs(hourglass(x, tokens=tokens) - flat(hourglass, x)).max())
        assert (difference(hourglass) < 1e-5) == same


class Recorded(Boundaries):
    """Events that were decided before: at the places in `table`, bool [B, L]."""

    table = np.random.default_rng(0).random((5, 64)) < 0.4

    def fires(self, here, before):
        return jnp.take_along_axis(jnp.asarray(self.table), jnp.maximum(here.place, 0), axis=1)


FEW = [
    ("0@1 1@3 1@1", {"shortening": "average", "upsampling": "repeat"}),
    pytest.param("0@1 1@3 1@1", ATTENTION | {"positions": "rotary"}, marks=pytest.mark.slow),
    pytest.param(
        "1@1 0@2 1@4 0@2 0@1",
        {"boundaries": "router router", "shortening": "select", "upsampling": "smooth"},
        marks=pytest.mark.slow,
    ),
]


def test_partial_row_steps_cover_at_most_half_a_batch():
    six, two, fixed = (
        make_model(event_config(hierarchy=hierarchy, **options)).hourglass.boundaries
        for hierarchy, options in (("0@1 1@6 0@1", {}), ("0@1 1@2 0@1", {}), ("0@1 1@6 0@1", {"boundaries": "fixed"}))
    )
    assert [six.max_partial_rows(batch) for batch in (7, 8, 16, 32)] == [0, 3, 6, 11]
    assert not any(rule.max_partial_rows(batch) for rule in (two, fixed) for batch in (8, 16, 32))


@pytest.mark.parametrize("hierarchy, options", FEW)
def test_partial_row_steps_equal_full_batch_steps(hierarchy, options, monkeypatch):
    """Of five rows one or two, at every shortening; where others than those are taken it is noticed."""
    monkeypatch.setattr(Boundaries, "max_partial_rows", lambda self, batch: 2)
    step_rows, taken = Hourglass.step_rows, []
    monkeypatch.setattr(
        Hourglass, "step_rows", lambda self, *given: [taken.append(given[1]), step_rows(self, *given)][1]
    )
    with jax.enable_x64(True):
        model = make_model(event_config(hierarchy=hierarchy, dtype="float64", **options))
        assert largest_difference(model) < 1e-12 and set(taken) == {2}
        argsort = jnp.argsort
        monkeypatch.setattr(jnp, "argsort", lambda quiet: argsort(~quiet))
        jax.clear_caches()
        assert largest_difference(model) > 1e-6


def test_bfloat16_cached_logits_equal_full_forward_for_recorded_boundaries(monkeypatch):
    monkeypatch.setitem(BOUNDARIES, "recorded", Recorded)
    options = {"boundaries": "recorded", "dtype": "bfloat16", "boundary_slack": 3.0}
    model = make_model(event_config(**options))
    assert largest_difference(model) < 0.05
    whole = forward(model, tokens_of((5, 31)))
    monkeypatch.setattr(Recorded, "table", np.roll(Recorded.table, 1, axis=1))
    others = forward(make_model(event_config(**options | {"max_length": 65})), tokens_of((5, 31)))  # traced anew
    assert np.abs(others - whole).max() > 0.2 * np.abs(whole).max()


@pytest.mark.parametrize("boundaries", ["router", "gumbel"])
def test_boundary_decisions_are_computed_in_float32(boundaries):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 40, 16)), jnp.bfloat16)
    rules = (
        make_model(learned_config(boundaries, dtype=dtype)).hourglass.boundaries for dtype in ("bfloat16", "float32")
    )
    decide = nnx.jit(lambda rule: rule(x).decision)
    coarse, fine = map(decide, rules)
    assert coarse.score.dtype == coarse.boundary_prob.dtype == jnp.float32
    np.testing.assert_array_equal(coarse.score, fine.score)
