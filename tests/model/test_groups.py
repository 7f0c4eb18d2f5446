"""The verbs of groups against loops in NumPy, one event at a time, and against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hourglass_jax import UsageError
from hourglass_jax.nn.event_groups import EventGroups, OpenGroup, limit, spread_rows, sum_rows
from hourglass_jax.nn.groups import FixedGroups, to_groups

RNG = np.random.default_rng(0)
B, L, G, D = 3, 17, 6, 4
FIRES = RNG.random((B, L)) < 0.3
FIRES[:, 0] = [True, False, True]
X = RNG.normal(size=(B, L, D))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def members(fires):
    """The positions of each group that an event has ended, and those of the group in progress."""
    groups, group = [], []
    for t, fire in enumerate(fires):
        group.append(t)
        if fire:
            groups.append(group)
            group = []
    return groups, group


def by_group(function, fires, x, n_groups):
    """Row by row, function(x of a group's positions) for the groups there are, zero for the others."""
    out = np.zeros((len(x), n_groups, x.shape[2]))
    for b, row in enumerate(fires):
        for g, positions in enumerate(members(row)[0][:n_groups]):
            out[b, g] = function(x[b, positions])
    return out


def granted(wants, room):
    """`limit` as a loop."""
    n, out = 0, []
    for want, most in zip(wants, room, strict=True):
        fires = want and n < most
        n += fires
        out.append(fires)
    return out


def test_the_limit_is_the_loop_and_never_exceeded_and_nothing_where_there_is_room():
    wants, more = (RNG.random((600, 30)) < RNG.random((600, 1)) for _ in range(2))
    room = np.cumsum(more, axis=1) + RNG.integers(0, 3, (600, 1))
    fires = np.asarray(limit(wants, room))
    np.testing.assert_array_equal(fires, [granted(*row) for row in zip(wants, room, strict=True)])
    assert (np.cumsum(fires, axis=1) <= room).all()
    np.testing.assert_array_equal(limit(wants, np.full(30, 99)), wants)


def test_the_limit_is_a_rate_and_no_cap_at_the_end():
    wants, room = np.ones((1, 40), bool), np.arange(40) // 4 + 2
    fires = np.asarray(limit(wants, room))[0]
    assert fires[:20].sum() == room[19] and fires[20:].sum() == room[39] - room[19]
    later = wants.copy()
    later[:, 25:] = False
    np.testing.assert_array_equal(np.asarray(limit(later, room))[0, :25], fires[:25])  # a function of what came before


def test_sum_mean_and_select_of_groups_are_those_of_the_loop():
    groups = EventGroups(jnp.asarray(FIRES), G + 3)
    logits = RNG.normal(size=(B, L, 1))
    for ours, function, x in (
        (groups.sum(X), lambda rows: rows.sum(0), X),
        (groups.mean(X), lambda rows: rows.mean(0), X),
        (groups.select(X), lambda rows: rows[-1], X),
        (
            groups.mean(X, logits=logits),
            lambda rows: (rows[:, :D] * np.exp(rows[:, D:])).sum(0) / np.exp(rows[:, D:]).sum(),
            np.concatenate([X, logits], axis=2),
        ),
    ):
        theirs = np.zeros((B, G + 3, D))
        for b, row in enumerate(FIRES):
            for g, positions in enumerate(members(row)[0]):
                theirs[b, g] = function(x[b, positions])
        live = np.arange(G + 3) < np.asarray(groups.count)[:, None]
        np.testing.assert_allclose(np.asarray(ours)[live], theirs[live], atol=1e-14)
        assert np.isfinite(np.asarray(ours)).all()


def test_a_vector_serves_from_its_event_to_the_next_and_dead_ones_nobody():
    groups = EventGroups(jnp.asarray(FIRES), G + 3)
    z = RNG.normal(size=(B, G + 3, D))
    served = np.cumsum(FIRES, axis=1) - 1
    expected = np.where(served[..., None] >= 0, np.take_along_axis(z, np.maximum(served, 0)[..., None], 1), 0)
    np.testing.assert_array_equal(groups.spread(z), expected)
    dead = np.arange(G + 3) >= np.asarray(groups.count)[:, None]
    np.testing.assert_array_equal(groups.spread(np.where(dead[..., None], 1e9, z)), expected)
    np.testing.assert_array_equal(groups.last(z, None), expected[:, -1])


def test_groups_of_one_position_change_nothing():
    groups = EventGroups(jnp.ones((B, L), bool), L)
    for same in (groups.mean(X), groups.sum(X), groups.select(X), groups.spread(X)):
        np.testing.assert_array_equal(same, X)


@partial(jax.jit, static_argnums=0)
def verbs(make, fires, x, z=None, valid=True):
    """Results of the verbs of the groups that `make` returns, and what they leave to the next tokens."""
    groups = make(fires, valid)
    results = {name: getattr(groups, name)(x) for name in ("sum", "mean", "select")}
    results |= {"carry": getattr(groups, "carry", None), "count": getattr(groups, "count", None)}
    return results if z is None else results | {"spread": groups.spread(z)}


@pytest.mark.parametrize("k", [2, 3, 4])
def test_events_at_every_kth_position_are_the_fixed_groups(k):
    length = 4 * k + 1
    x = RNG.normal(size=(2, length, D))
    fires = np.broadcast_to(np.arange(length) % k == 0, (2, length))
    z = RNG.normal(size=(2, 5, D))

    def fixed_groups(shift):
        groups = FixedGroups(k, length, shift)
        return verbs(lambda *_: groups, None, np.asarray(groups.shift_right(x)), z)

    events, fixed = verbs(lambda fires, _: EventGroups(fires, 5), fires, x, z), fixed_groups(k - 1)
    np.testing.assert_allclose(events["mean"][:, 1:], fixed["mean"][:, 1:], atol=1e-14)
    # Group 0 has one position; the fixed one divides by k all the same.
    np.testing.assert_allclose(events["mean"][:, 0], k * fixed["mean"][:, 0], atol=1e-14)
    np.testing.assert_allclose(events["sum"], fixed["sum"], atol=1e-14)
    np.testing.assert_array_equal(events["select"], fixed["select"])
    np.testing.assert_array_equal(events["spread"], fixed["spread"])
    # As the original project shifts, by k, a group is that of the events at k - 1, 2k - 1, ..., one token later.
    fires = np.broadcast_to(np.arange(length) % k == k - 1, (2, length))
    later, by_k = verbs(lambda fires, _: EventGroups(fires, 4), fires, x, z[:, 1:]), fixed_groups(k)
    np.testing.assert_allclose(later["mean"], by_k["mean"][:, 1:], atol=1e-14)
    assert np.abs(later["spread"] - by_k["spread"])[:, k - 1 :: k].max() > 0.1


def test_fixed_groups_are_the_rows_of_a_reshaped_array():
    groups = FixedGroups(4, L)
    np.testing.assert_array_equal(groups.slots(X), to_groups(X, 4))
    np.testing.assert_array_equal(groups.positions(groups.slots(X)), X)
    logits = RNG.normal(size=(B, L, 1))
    weights = jax.nn.softmax(to_groups(logits, 4), axis=2)
    np.testing.assert_allclose(groups.mean(X, logits=logits), (weights * to_groups(X, 4)).sum(2), atol=1e-14)


def test_padding_on_either_side_counts_nowhere():
    valid = (np.arange(L) >= [[3], [0], [5]]) & (np.arange(L) < [[L], [9], [12]])
    make = lambda fires, valid: EventGroups(fires, G, valid)  # noqa: E731
    padded = verbs(make, FIRES & valid, X, valid=valid)
    for b, row in enumerate(valid):
        alone = verbs(make, FIRES[b : b + 1, row], X[b : b + 1, row], valid=np.ones((1, row.sum()), bool))
        n = int(alone["count"][0])
        assert int(padded["count"][b]) == n
        for verb in ("sum", "mean", "select"):
            np.testing.assert_allclose(padded[verb][b, :n], alone[verb][0, :n], atol=1e-14)
    np.testing.assert_allclose(padded["carry"][0][1], X[1, members(FIRES[1, :9])[1]].sum(0), atol=1e-14)


@pytest.mark.parametrize("cut", [0, 5, 11])
def test_a_group_in_progress_has_the_sums_of_the_whole_sequence(cut):
    """Position by position, after what a pass over the first `cut` leaves behind."""
    logits = RNG.normal(size=(B, L, 1))

    def pool(groups, x, logits):
        z = groups.mean(x) + groups.mean(x, logits=logits) + groups.sum(x) + groups.select(x)
        return z, groups.carry

    of_events = jax.jit(lambda fires, *inputs: pool(EventGroups(fires, L), *inputs))
    of_step = jax.jit(lambda fresh, ends, sums, *inputs: pool(OpenGroup(fresh, ends, sums=sums), *inputs))
    whole = np.asarray(of_events(FIRES, X, logits)[0])
    fresh, sums = np.ones(B, bool), None
    if cut:
        fresh, sums = FIRES[:, cut - 1], of_events(FIRES[:, :cut], X[:, :cut], logits[:, :cut])[1]
    for t in range(cut, L):
        z, sums = of_step(fresh, FIRES[:, t], sums, X[:, t : t + 1], logits[:, t : t + 1])
        for b in np.flatnonzero(FIRES[:, t]):
            np.testing.assert_allclose(z[b, 0], whole[b, FIRES[b, :t].sum()], atol=1e-13)
        fresh = FIRES[:, t]


def test_sums_and_copies_by_row_have_each_others_derivatives():
    rows = jnp.asarray(RNG.integers(-1, G + 1, (B, L)))
    hot = jax.nn.one_hot(rows, G)
    z = RNG.normal(size=(B, G, D))

    def dense_sum(x):
        return jnp.einsum("blg,bld->bgd", hot, x)

    def dense_spread(z):
        return jnp.einsum("blg,bgd->bld", hot, z)

    for ours, dense, x in (
        (lambda x: sum_rows(x, rows, G), dense_sum, X),
        (lambda z: spread_rows(z, rows), dense_spread, z),
    ):
        weights = RNG.normal(size=dense(x).shape)
        np.testing.assert_allclose(ours(x), dense(x), atol=1e-14)
        gradients = [jax.vjp(f, jnp.asarray(x))[1](weights)[0] for f in (ours, dense)]
        np.testing.assert_allclose(*gradients, atol=1e-13)


def test_later_positions_move_no_group_by_a_bit():
    groups = EventGroups(jnp.asarray(FIRES), L)
    for s in range(1, L):
        fires, x = FIRES.copy(), X.astype(np.float32)
        before = np.asarray(groups.mean(jnp.asarray(x)))
        fires[:, s:], x[:, s:] = RNG.random((B, L - s)) < 0.5, 1e6
        after = np.asarray(EventGroups(jnp.asarray(fires), L).mean(jnp.asarray(x)))
        for b in range(B):
            n = FIRES[b, :s].sum()
            np.testing.assert_array_equal(before[b, :n], after[b, :n])


def test_groups_of_any_length_have_no_slots():
    groups = EventGroups(jnp.asarray(FIRES), G)
    for ask in (lambda: groups.slots(X), lambda: groups.positions(X)):
        with pytest.raises(UsageError, match="requires groups of equal length"):
            ask()
