"""Boundaries that are learned: their formulas in NumPy, where gradient reaches them, causality, decoding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import learned_config, make_model, tokens_of
from flax import nnx
from test_boundaries import largest_difference

import hourglass_jax as hg
from hourglass_jax.nn.event_groups import Decision, EventGroups, OpenGroup
from hourglass_jax.nn.layers import keys_of_rows
from hourglass_jax.nn.learned import RouterBoundaries, binomial_loss, entropies, ratio_loss, spikes
from hourglass_jax.nn.rates import boundary_terms
from hourglass_jax.nn.resampling import SmoothUpsampling
from hourglass_jax.registry import BOUNDARIES, UPSAMPLINGS

RNG = np.random.default_rng(0)
B, L, G, D = 3, 17, 8, 16
FIRES = RNG.random((B, L)) < 0.4
FIRES[:, 0] = True
P = np.where(FIRES, RNG.uniform(0.5, 1, (B, L)), RNG.uniform(0, 0.5, (B, L)))
P[:, 0] = 1
SERVED = np.cumsum(FIRES, axis=1) - 1


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def groups_of(fires, p):
    return EventGroups(fires, G, True, Decision(fires, p))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


decide = nnx.jit(lambda rule, x, keys=None: rule(x, row_keys=keys).decision)


# The formulas


def routed(x, query, key):
    """p of H-Net's router, one position at a time."""
    p = np.ones(x.shape[:2])
    for b, t in np.ndindex(p.shape):
        if t:
            q, k = x[b, t - 1] @ query, x[b, t] @ key
            p[b, t] = (1 - q @ k / np.sqrt(q @ q) / np.sqrt(k @ k)) / 2
    return p


def test_router_and_its_loss_gradient_equal_the_formula(float64):
    config = learned_config(dtype="float64")
    rule = make_model(config).hourglass.boundaries
    kernels = [np.asarray(part.kernel[...], np.float64) for part in (rule.query, rule.key)]
    x = np.random.default_rng(0).normal(size=(2, 9, D))
    decision, p = decide(rule, jnp.asarray(x)), routed(x, *kernels)
    np.testing.assert_allclose(decision.boundary_prob, p, atol=1e-12)
    np.testing.assert_array_equal(decision.boundary_mask, p > 0.5)
    assert 4 < decision.boundary_mask.sum() < 14

    def loss(x):
        return boundary_terms([(rule, rule(x))], jnp.ones((2, 9)), jnp.zeros((2, 9)))[0]

    fired, likely = (p > 0.5).mean(), p.mean()
    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert float(value) == pytest.approx(0.03 * 1.5 * (2 * fired * likely + (1 - fired) * (1 - likely)))
    slope = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-6
        slope[at] = (routed(x + step, *kernels).mean() - routed(x - step, *kernels).mean()) / 2e-6
    np.testing.assert_allclose(gradient, 0.03 * 1.5 * (3 * fired - 1) * slope, atol=1e-9)


def test_an_untrained_router_puts_no_boundary_between_parallel_neighbors():
    config = learned_config()
    rule = nnx.jit(lambda: RouterBoundaries(config, config.parsed_hierarchy.levels[0], rngs=nnx.Rngs(0)))()
    x = np.repeat(RNG.normal(size=(1, 4, D)), 3, axis=1) * RNG.uniform(1, 2, (1, 12, 1))
    x[:, 6:9] = -x[:, 3:6]
    np.testing.assert_allclose(
        decide(rule, jnp.asarray(x, jnp.float32)).boundary_prob[0, np.array([1, 2, 4, 5, 6, 7, 8])],
        [0, 0, 0, 0, 1, 0, 0],
        atol=1e-6,
    )


def test_smoothing_and_its_derivatives_equal_the_recurrence(float64):
    z, weights = RNG.normal(size=(B, G, D)), RNG.normal(size=(B, L, D))
    smooth = SmoothUpsampling(learned_config(), 3, 1, rngs=nnx.Rngs(0))

    def up(z, p):
        return smooth(None, z, groups_of(FIRES, p))

    averages, expected = np.zeros((B, G, D)), np.zeros((B, L, D))
    d_z, d_p = np.zeros((B, G, D)), np.zeros((B, L))
    for b in range(B):
        when = np.flatnonzero(FIRES[b])
        average = np.zeros(D)
        for g, t in enumerate(when):
            average = averages[b, g] = P[b, t] * z[b, g] + (1 - P[b, t]) * average
        expected[b] = averages[b, SERVED[b]]
        certainty = (weights[b] * expected[b]).sum(-1)  # of the factor 1, straight through
        d_p[b] = np.where(FIRES[b], certainty, -certainty)
        flowing = np.zeros(D)
        for g, t in reversed(list(enumerate(when))):
            flowing += weights[b, SERVED[b] == g].sum(0)
            before = averages[b, g - 1] if g else 0
            d_z[b, g], d_p[b, t] = P[b, t] * flowing, d_p[b, t] + flowing @ (z[b, g] - before)
            flowing = (1 - P[b, t]) * flowing
    np.testing.assert_allclose(jax.jit(up)(z, P), expected, atol=1e-13)
    backward = jax.jit(lambda z, p: jax.vjp(up, z, p)[1](weights))
    for ours, theirs in zip(backward(z, P), (d_z, d_p), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_smoothing_at_certain_boundaries_equals_repeating(float64):
    z = RNG.normal(size=(B, G, D))
    smooth = SmoothUpsampling(learned_config(), 3, 1, rngs=nnx.Rngs(0))
    up = jax.jit(lambda z, p: smooth(None, z, groups_of(FIRES, p)))
    repeated = jax.jit(lambda z: groups_of(FIRES, None).spread(z))(z)
    for p in (None, FIRES * 1.0):
        np.testing.assert_array_equal(up(z, p), repeated)
    dead = np.arange(G) >= FIRES.sum(1)[:, None]
    ups = [up(values, P) for values in (z, np.where(dead[..., None], 1e9, z))]
    assert dead.any() and np.abs(ups[0] - repeated).max() > 0.1
    np.testing.assert_array_equal(*ups)


def test_mean_pooling_gradient_equals_the_formula(float64):
    """Dynamic pooling's derivative: (sum of what comes after it in its group - (j - u) mean) / n."""
    x, weights = RNG.normal(size=(B, L, D)), RNG.normal(size=(B, G, D))
    expected = np.zeros((B, L))
    for b in range(B):
        begin = 0
        for g, end in enumerate(np.flatnonzero(FIRES[b])):
            rows = x[b, begin : end + 1]
            for u in range(begin, end):
                after = x[b, u + 1 : end + 1].sum(0) - (end - u) * rows.mean(0)
                expected[b, u] = weights[b, g] @ after / len(rows)
            begin = end + 1
    pool = jax.jit(lambda p: groups_of(FIRES, p).mean(x))
    gradient = jax.grad(lambda p: (weights * pool(p)).sum())(jnp.asarray(P))
    np.testing.assert_allclose(gradient, expected, atol=1e-12)  # exactly 0 where there is an event, and after the last
    np.testing.assert_array_equal(pool(P), pool(None))


def test_boundary_losses_equal_their_formulas_and_have_the_right_minimum(float64):
    assert float(ratio_loss(0.25, 0.25, 4)) == 1
    for fired, likely in ((0.25, 0.9), (0.4, 0.1), (0.1, 0.3)):
        slope = jax.grad(lambda likely, fired=fired: ratio_loss(fired, likely, 4))(likely)
        assert float(slope) == pytest.approx(4 / 3 * (4 * fired - 1), abs=1e-12)

    def by_hand(count, n, prior):
        return -(math.log(math.comb(n, count)) + count * math.log(prior) + (n - count) * math.log(1 - prior)) / n

    counts, n = np.array([3, 60, 100]), 200
    expected = np.mean([by_hand(count, n, 0.3) for count in counts])
    assert float(binomial_loss(jnp.asarray(counts), jnp.full(3, n), 0.3)) == pytest.approx(expected)
    slopes = 3 * jax.grad(binomial_loss)(jnp.asarray(counts, float), jnp.full(3, n), 0.3)
    logits = np.log(counts / (n - counts)) - np.log(0.3 / 0.7)
    np.testing.assert_allclose(slopes, logits / n, atol=1e-3)

    logits = RNG.normal(size=(2, 9, 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(jax.jit(entropies)(logits), entropy, atol=1e-12)
    higher = [[all(row[t] > row[s] for s in range(max(t - 2, 0), t)) for t in range(9)] for row in entropy]
    np.testing.assert_array_equal(jax.jit(spikes)(jnp.asarray(entropy)), higher)
    rule = make_model(learned_config("entropy", dtype="float64")).hourglass.boundaries
    x = jnp.asarray(RNG.normal(size=(2, 9, D)))
    likely = sigmoid(np.asarray(decide(rule, x).score))
    crossed = -np.where(higher, np.log(likely), np.log(1 - likely))
    loss = nnx.jit(lambda rule, x: rule.loss(rule(x), jnp.ones((2, 9)), entropy))
    assert float(loss(rule, x)) == pytest.approx(crossed[:, 1:].mean())


def test_boundary_loss_gradients_equal_the_formula(float64):
    rng, weights = np.random.default_rng(1), (np.arange(L) < [[L], [9], [12]]).astype(float)
    score, entropy = rng.normal([[-2], [0], [2]], 1, (B, L)), rng.random((B, L))

    def gradient(name):
        rule = make_model(learned_config(name, dtype="float64")).hourglass.boundaries

        def loss(score):
            decision = Decision(score > 0, rule.probability(score), score)
            return rule.loss(EventGroups(FIRES, G, True, decision), jnp.asarray(weights), jnp.asarray(entropy))

        return jax.jit(jax.grad(loss))(jnp.asarray(score))

    counted = weights * (np.arange(L) > 0)
    pushed = counted * (sigmoid(score) - np.asarray(spikes(jnp.asarray(entropy)))) / counted.sum()
    np.testing.assert_allclose(gradient("entropy"), pushed, atol=1e-12)
    counts, n = ((score > 0) * weights).sum(1), weights.sum(1)
    slopes = jax.grad(binomial_loss)(jnp.asarray(counts), jnp.asarray(n), 1 / 3)[:, None]
    p = sigmoid(score / 0.5)
    np.testing.assert_allclose(gradient("gumbel"), slopes * weights * p * (1 - p) / 0.5, atol=1e-12)
    assert (slopes < 0).any() and (slopes > 0).any()  # too few events in one row, too many in another


def test_deeper_boundary_metrics_count_existing_groups(float64):
    """With room for more, which a whole sequence of the deeper level has, and tokens that do not count."""
    inner = RNG.random((B, G)) < 0.5
    weights = (np.arange(L) < [[L], [9], [12]]).astype(float)
    _, figures = boundary_terms([(None, groups_of(FIRES, P)), (None, groups_of(inner, None))], weights, weights)
    rows = [FIRES[b, weights[b] > 0] for b in range(B)]
    below = [inner[b, : row.sum()] for b, row in enumerate(rows)]
    assert float(figures["boundary_rate"]) == pytest.approx(np.concatenate(rows).mean())
    assert float(figures["boundary_spread"]) == pytest.approx(np.std([row.mean() for row in rows]))
    assert float(figures["boundary_rate_2"]) == pytest.approx(np.concatenate(below).mean())
    wanted = EventGroups(FIRES, G, True, Decision(np.ones((B, L), bool)))
    suppressed = boundary_terms([(None, wanted)], np.ones((B, L)), weights)[1]["boundary_suppressed"]
    assert float(suppressed) == pytest.approx(1 - FIRES.mean())


# Where gradient reaches the decisions


class NormedSmooth(SmoothUpsampling):
    normed = True


def score_gradients(config):
    """Of a random projection of the output, by each position's score; and where events fire."""
    hourglass = make_model(config).hourglass
    x, weights = np.random.default_rng(1).normal(size=(2, 2, 24, D))
    kind = type(hourglass.boundaries)
    score = kind.score

    @jax.jit
    def gradient(probe):
        def projection(probe):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kind, "score", lambda self, here, before: score(self, here, before) + probe)
                y, [groups] = hourglass.forward(x)
            return (weights * y).sum(), groups.fires

        return jax.grad(projection, has_aux=True)(probe)

    gradients, fires = map(np.asarray, gradient(jnp.zeros((2, 24))))
    assert 6 < fires.sum() < 40
    return np.abs(gradients), fires


def test_gradients_reach_every_boundary_decision(float64, monkeypatch):
    options = {"hierarchy": "0@1 1@3 0@1", "dtype": "float64"}
    routed, fires = score_gradients(learned_config(**options))
    assert (routed[:, 1:] > 1e-6).all() and not routed[:, 0].any()  # at a row's first position nothing is decided
    monkeypatch.setitem(UPSAMPLINGS, "smooth", NormedSmooth)  # scale is what a norm does not see
    normed, fires = score_gradients(learned_config(**options))
    assert np.median(normed[~fires]) < 1e-4 * np.median(routed[~fires])
    pooled, fires = score_gradients(learned_config("gumbel", shortening="average", upsampling="repeat", **options))
    finished = np.cumsum(fires[:, ::-1], axis=1)[:, ::-1] > 0
    assert (pooled[finished & ~fires] > 1e-9).all() and pooled[fires | ~finished].max() < 1e-12
    supervised, _ = score_gradients(learned_config("entropy", shortening="average", **options))
    assert not supervised.any()


def test_boundary_noise_requires_a_key_and_depends_on_row_and_position():
    config = learned_config("gumbel")
    rule = make_model(config).hourglass.boundaries
    x, keys = jnp.asarray(RNG.normal(size=(6, 400, D)), jnp.float32), keys_of_rows(jax.random.key(1), 6)
    plain, drawn = (decide(rule, x, k) for k in (None, keys))
    np.testing.assert_array_equal(plain.boundary_mask[:, 1:], plain.score[:, 1:] > 0)
    part = decide(rule, x[3:0:-1, :100], keys[3:0:-1])
    np.testing.assert_allclose(part.score, drawn.score[3:0:-1, :100], atol=1e-5)
    noise = np.asarray(drawn.score - plain.score)
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert np.mean(noise) == pytest.approx(0, abs=0.1) and np.std(noise) == pytest.approx(math.pi / 3**0.5, rel=0.05)
    likely = sigmoid(np.asarray(plain.score))
    assert np.mean(drawn.boundary_mask[:, 1:]) == pytest.approx(likely.mean(), abs=0.05)
    rule.eval()
    np.testing.assert_array_equal(decide(rule, x, keys).score, plain.score)


def test_each_level_draws_independent_noise():
    config = learned_config("gumbel gumbel", hierarchy="0@1 0@2 1@4 0@2 0@1")
    outer, inner = make_model(config).hourglass.rules()
    keys, score = keys_of_rows(jax.random.key(0), 2), jnp.zeros((2, 50))
    assert not np.isclose(outer.noise(keys, score), inner.noise(keys, score)).any()


# Causality and decoding

GRID = [
    ("1@1 1@3 1@1", {"boundaries": "router", "boundary_slack": 1.0}),
    *(
        pytest.param(hierarchy, options, marks=pytest.mark.slow)
        for hierarchy, options in [
            ("0@1 1@3 1@1", {"boundaries": "entropy", "shortening": "attention_average", "upsampling": "attention"}),
            ("1@1 0@2 1@4 0@2 0@1", {"boundaries": "router router", "positions": "rotary"}),
            ("1@1 1@3 1@1", {"boundaries": "router", "dropout": 0.5, "norm": "final", "shortening": "average"}),
            ("1@1 1@2 1@6 0@2 1@1", {"boundaries": "gumbel", "shortening": "average", "upsampling": "repeat"}),
            ("1@1 1@2 1@6 0@2 1@1", {"boundaries": "fixed router", "positions": "learned"}),
            ("1@1 1@2 1@6 0@2 1@1", {"boundaries": "gumbel entropy", "upsampling": "attention"}),
            ("0@1 1@2 0@4 1@8 1@4 0@2 1@1", {"boundaries": "router gumbel router"}),
        ]
    ),
]


@nnx.jit
def group_counts(model, tokens):
    return [groups.count for groups in model.hourglass.forward(model.embed(tokens), tokens=tokens)[1]]


@pytest.mark.parametrize("hierarchy, options", GRID)
def test_learned_boundaries_are_causal_and_cached_logits_equal_full_forward(hierarchy, options):
    hg.check_causality(make_model(learned_config(hierarchy=hierarchy, **options)))
    with jax.enable_x64(True):
        model = make_model(learned_config(hierarchy=hierarchy, dtype="float64", **options))
        assert largest_difference(model) < 1e-12
        counts = group_counts(model, jnp.asarray(tokens_of((5, 31))))
        assert any(np.ptp(np.asarray(count)) for count in counts)  # rows are at phases of their own


@pytest.mark.slow
@pytest.mark.parametrize("hierarchy, options", GRID)
def test_float32_cached_logits_equal_full_forward_away_from_ties(hierarchy, options):
    model = make_model(learned_config(hierarchy=hierarchy, **options))
    assert largest_difference(model) < 1e-5


class LooksAhead(RouterBoundaries):
    """Without derivatives: in its decisions alone."""

    def score(self, here, before):
        ahead = here._replace(x=jnp.roll(here.x, -1, axis=1))
        return jax.lax.stop_gradient(super().score(ahead, here))


def test_a_router_that_looks_ahead_fails_the_causality_check(monkeypatch):
    monkeypatch.setitem(BOUNDARIES, "ahead", LooksAhead)
    model = make_model(learned_config("ahead", hierarchy="0@1 1@3 0@1"))
    assert not np.triu(hg.causality.influence(model, tokens_of(13)), k=1).any()
    with pytest.raises(hg.CausalityError, match="depends on the later token"):
        hg.check_causality(model)


def test_the_newest_average_goes_on_from_the_one_before(float64):
    """Event by event, as decoding takes them."""
    smooth = SmoothUpsampling(learned_config(dtype="float64"), 3, 1, rngs=nnx.Rngs(0))
    z = RNG.normal(size=(1, G, D))
    whole = np.asarray(jax.jit(lambda z: smooth.averages(z, groups_of(FIRES[:1], P[:1])))(z))
    cache = smooth.init_cache(1, 99)

    @jax.jit
    def receive(z, p, cache):
        group = OpenGroup(jnp.ones(1, bool), jnp.ones(1, bool), boundary_prob=p)
        clock = hg.nn.cache.Clock(jnp.zeros(1, int), jnp.zeros(1, int), jnp.zeros(1, int), jnp.ones(1, bool))
        return smooth.receive(z, group, cache, clock)

    for g, t in enumerate(np.flatnonzero(FIRES[0])[:G]):
        cache = receive(z[:, g], P[:1, t : t + 1], cache)
        np.testing.assert_allclose(cache, whole[:, g], atol=1e-13)
