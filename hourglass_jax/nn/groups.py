"""What a group of positions is: the verbs that shortening and upsampling are written in, for groups of any kind.

Every hierarchy here is one idea: an event fires at a position, the deeper level takes one step there on a vector made
of positions up to it, and what comes of it serves from that position to the next event. With a fixed factor k events
fire at 0, k, 2k ..., and a group is a row of a reshaped array: `FixedGroups`. Elsewhere they fire where the text says:
`EventGroups`, in arrays whose shapes do not depend on it, and token by token `OpenGroup`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hourglass_jax.errors import UsageError
from hourglass_jax.nn.cache import Clock
from hourglass_jax.nn.layers import at_least_float32

LARGEST_LOGIT = 60.0  # exp of it, times what a network computes, stays finite in float32


def to_groups(x: jax.Array, k: int, shift: int = 0) -> jax.Array:
    """[B, L, D] -> [B, ceil(L / k), k, D], moved right by `shift` positions with zeros entering on the left."""
    batch, length, d_model = x.shape
    groups = -(-length // k)
    if shift or length % k:
        x = jnp.pad(x, ((0, 0), (shift, k), (0, 0)))[:, : groups * k]
    return x.reshape(batch, groups, k, d_model)


class Decision(NamedTuple):
    """What a rule says of each position, all [B, L].

    wants: bool, whether a group is to end there.
    p: float, how likely that was, more than 1/2 where it is so and 1 at a row's first position. None: it was given.
    score: float, what p was made of.
    """

    wants: jax.Array
    p: Any = None
    score: Any = None


class Groups:
    """The verbs. x is [B, L, D], a vector for each position, z [B, G, D], one for each group.

    length: L, where a step of decoding asks.
    rest: what those sums leave behind that decoding goes on from.
    when: int [B or 1, G], the first position that each group's vector serves.
    served: int [B, L], the group whose vector serves each position.
    count, wanted: int [B or 1], how many groups there are, and would be if none had to wait.
    mask, slot_mask: bool [B, G] and [B, G k], which groups, and which positions of them, are seen where all are;
        causally None.
    p: float [B, L], see `Decision`.
    share, certainty: 1, as a [B, L, 1] whose derivative says what a position's p changes: how much of its group each
        position is, and how far it may rely on the vector that serves it (p where an event fires, elsewhere 1 - p).
    """

    length: int
    rest: list[jax.Array]
    due: jax.Array  # bool [B], in a step of decoding: this position ends a group
    when: jax.Array
    served: jax.Array
    count: jax.Array
    wanted: jax.Array
    mask: jax.Array | None = None
    slot_mask: jax.Array | None = None
    p: jax.Array | None = None
    share: jax.Array | int = 1
    certainty: jax.Array | int = 1

    def shift_right(self, x: jax.Array) -> jax.Array:
        """x as shortening takes it: so that a group's vector holds nothing newer than the first position it serves."""
        raise NotImplementedError

    def sum(self, x: jax.Array) -> jax.Array:
        """x -> z, the sum over each group."""
        return self.total(x).astype(x.dtype)

    def mean(self, x: jax.Array, logits: jax.Array | None = None) -> jax.Array:
        """x -> z, the mean of each group; with `logits` [B, L, 1] weighted by their softmax over the group."""
        if logits is None:
            weights = jnp.ones((*x.shape[:2], 1), x.dtype)
        else:
            weights = jnp.exp(jnp.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT).astype(sum_dtype(logits)))
        weights = (weights * self.share).astype(weights.dtype)
        total, weight = self.total(weights * x), self.total(weights)
        return (total / jnp.where(weight > 0, weight, 1)).astype(x.dtype)

    def select(self, x: jax.Array) -> jax.Array:
        """x -> z, the newest position of each group: the one at which its event fires."""
        raise NotImplementedError

    def spread(self, z: jax.Array) -> jax.Array:
        """z -> x: at each position the vector that serves it, zero where there is none yet."""
        raise NotImplementedError

    def slots(self, x: jax.Array) -> jax.Array:
        """x -> [B, G, k, D]. Raises UsageError where groups have no length in common."""
        raise UsageError(
            "this method takes groups of k positions each, which only boundaries='fixed' has; choose another, or write "
            "it with the verbs of nn.groups.Groups"
        )

    def positions(self, slots: jax.Array) -> jax.Array:
        """[B, G, k, D] -> x, without what fills up the last group. Raises UsageError as `slots`."""
        return self.slots(slots)

    def total(self, x: jax.Array) -> jax.Array:
        """As `sum`, in float32 at least."""
        raise NotImplementedError

    def last(self, z: jax.Array, old: jax.Array) -> jax.Array:
        """z -> [B, D], what serves the position after the sequence, unless that begins a group; then `old` will do."""
        raise NotImplementedError

    def after(self, sums: list[jax.Array]) -> Groups:
        """The same in decoding, where the sums up to the position before are `sums`."""
        return self

    def newest(self, x: jax.Array, place: jax.Array) -> jax.Array:
        """x -> [B, D], at the position that decoding is at, the `place` of its sequence."""
        raise NotImplementedError

    def query_clock(self, clock: Clock) -> Clock:
        """The clock by which a position at `clock` asks for vectors of groups."""
        return clock


class FixedGroups(Groups):
    """Groups of k positions each of a sequence of `length`, the last of them not always whole: plain reshapes.

    What is padding, and what fills up the last group, is zero in shortening.
    """

    def __init__(self, k: int, length: int, shift: int = 0, valid: jax.Array | None = None):
        """`valid`: bool [B, L], which positions count, where all are seen; causally None.

        A group counts if any of its positions does.
        """
        self.k, self.length, self.shift, self.rest, self.valid = k, length, shift, [], valid
        if valid is not None:
            slots = self.slots(valid[..., None])[..., 0]
            self.mask, self.slot_mask = slots.any(axis=2), slots.reshape(valid.shape[0], -1)
        self.when = jnp.arange(0, length, k)[None]
        self.count = self.wanted = jnp.full(1, self.when.shape[1])

    def shift_right(self, x: jax.Array) -> jax.Array:
        """Moved by k - 1 (section 2 of the paper) and cut or filled up to whole groups."""
        if self.valid is not None:
            x = jnp.where(self.valid[..., None], x, 0)
        return to_groups(x, self.k, self.shift).reshape(x.shape[0], -1, x.shape[2])

    def sum(self, x: jax.Array) -> jax.Array:
        return self.slots(x).sum(axis=2)

    def mean(self, x: jax.Array, logits: jax.Array | None = None) -> jax.Array:
        if logits is None:
            return self.slots(x).mean(axis=2)
        return (jax.nn.softmax(self.slots(logits), axis=2) * self.slots(x)).sum(axis=2)

    def select(self, x: jax.Array) -> jax.Array:
        return self.slots(x)[:, :, -1 if self.valid is None else 0]  # the first position, where the shift has put it

    def spread(self, z: jax.Array) -> jax.Array:
        return self.positions(jnp.broadcast_to(z[:, :, None], (*z.shape[:2], self.k, z.shape[2])))

    def slots(self, x: jax.Array) -> jax.Array:
        return to_groups(x, self.k)

    def newest(self, x: jax.Array, place: jax.Array) -> jax.Array:
        return x[:, place % self.k]

    def last(self, z: jax.Array, old: jax.Array) -> jax.Array:
        return old

    def positions(self, slots: jax.Array) -> jax.Array:
        return slots.reshape(slots.shape[0], -1, slots.shape[3])[:, : self.length]


class EventGroups(Groups):
    """Groups that end where an event fires: group g is made of the positions after event g - 1, up to event g.

    There is room for `n_groups`; those in use come first, so causal attention over them needs no mask for the rest,
    which nothing reads. Positions after the last event make the group in progress, which has no vector yet.

    served: int [B, L], the newest event so far, whose vector serves the position; -1: none.
    member: int [B, L], the group the position is part of; `n_groups` where it is padding.
    when: int [B, G], where each event fires; the last position for those that never do.
    rest: for each sum taken, that over the group in progress, [B, D]; what decoding goes on from.
    """

    def __init__(
        self, fires: jax.Array, n_groups: int, valid: jax.Array | bool = True, decision: Decision | None = None
    ):
        """bool [B, L]; of positions where `valid` is false none fires and none counts. `decision`: before the limit."""
        self.fires, self.decision = fires, decision or Decision(fires)
        self.wanted, self.p = self.decision.wants.sum(axis=1), self.decision.p
        if self.p is not None:
            nothing = (self.p - lax.stop_gradient(self.p))[..., None]  # but for its derivative
            # An event at u would take the positions after it out of the group (dynamic pooling).
            self.share = 1 + jnp.cumsum(nothing, axis=1) - nothing
            self.certainty = 1 + jnp.where(fires[..., None], nothing, -nothing)
        self.length, self.n_groups = fires.shape[1], n_groups
        so_far = jnp.cumsum(fires, axis=1, dtype=jnp.int32)
        self.served, self.count = so_far - 1, so_far[:, -1]
        self.member = jnp.where(valid, so_far - fires.astype(jnp.int32), n_groups)
        in_progress = valid & (self.member == self.count[:, None])
        self._rest_member = jnp.where(in_progress, 0, 1)
        before = (so_far[:, :, None] <= jnp.arange(n_groups, dtype=jnp.int32)[None, None]).sum(axis=1, dtype=jnp.int32)
        self.when = jnp.minimum(before, fires.shape[1] - 1)
        self.rest: list[jax.Array] = []

    def shift_right(self, x: jax.Array) -> jax.Array:
        """x itself: a group serves from its last position on."""
        return x

    def select(self, x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, self.when[..., None], axis=1)

    def spread(self, z: jax.Array) -> jax.Array:
        return spread_rows(z, self.served)

    def last(self, z: jax.Array, old: jax.Array) -> jax.Array:
        return spread_rows(z, self.count[:, None] - 1)[:, 0]

    def total(self, x: jax.Array) -> jax.Array:
        self.rest.append(sum_rows(x, self._rest_member, 1)[:, 0])
        return sum_rows(x, self.member, self.n_groups)


class OpenGroup(Groups):
    """The group in progress of each row, one position at a time: x and z are [B, 1, D], of this position.

    `rest` has what `EventGroups.rest` has: the sums up to this position, from those up to the one before it.
    """

    length = 1

    def __init__(
        self,
        fresh: jax.Array,
        due: jax.Array,
        serving: Clock | None = None,
        sums: list[jax.Array] | None = None,
        p: jax.Array | None = None,
    ):
        """`fresh`, `due`, bool [B]: the position before this one, and this one, end a group.

        `serving`: at the event whose vector serves this position.
        """
        self.fresh, self.due, self.serving, self.sums, self.p = fresh, due, serving, sums, p
        self.rest: list[jax.Array] = []

    def after(self, sums: list[jax.Array]) -> OpenGroup:
        return OpenGroup(self.fresh, self.due, self.serving, sums, self.p)

    def of_rows(self, rows: jax.Array) -> OpenGroup:
        """Of these rows [b] alone."""
        parts = (self.fresh, self.due, self.serving, self.sums, self.p)
        return OpenGroup(*jax.tree.map(lambda leaf: leaf[rows], parts))

    def query_clock(self, clock: Clock) -> Clock:
        return clock if self.serving is None else self.serving

    def newest(self, x: jax.Array, place: jax.Array) -> jax.Array:
        return x[:, 0]

    def shift_right(self, x: jax.Array) -> jax.Array:
        return x

    def select(self, x: jax.Array) -> jax.Array:
        return x

    def spread(self, z: jax.Array) -> jax.Array:
        if self.serving is None:
            return z
        return jnp.where((self.serving.time >= self.serving.start)[:, None, None], z, 0)

    def total(self, x: jax.Array) -> jax.Array:
        total = x[:, 0].astype(sum_dtype(x))
        if self.sums is not None:
            total += jnp.where(self.fresh[:, None], 0, self.sums[len(self.rest)])
        self.rest.append(total)
        return total[:, None]


def limit(wants: jax.Array, room: jax.Array) -> jax.Array:
    """Which wishes are granted, so that among the positions 0 .. t never more than room[t] are: bool [B, L].

    n[t] = min(n[t-1] + wants[t], room[t]) counts them: a function of what came before, which decoding can follow. So it
    bounds the rate along a row, unlike a cap at its end. `room`, int [L] or [B, L], never decreases.
    """
    wished = jnp.cumsum(wants, axis=1, dtype=jnp.int32)
    spare = lax.cummin(jnp.broadcast_to(room, wants.shape).astype(jnp.int32) - wished, axis=1)
    granted = wished + jnp.minimum(spare, 0)
    return granted > jnp.pad(granted, ((0, 0), (1, 0)))[:, :-1]


def sum_dtype(x: jax.Array) -> np.dtype:
    """Of sums over x: float32 at least."""
    return at_least_float32(x.dtype)


def one_hot_product(equation: str, rows: jax.Array, n: int, x: jax.Array) -> jax.Array:
    """With the matrix [B, L, n] that is 1 at each position's row: no order of additions is left to chance.

    As a scatter would leave it on a GPU. At n = L / 4 it is 2 L n D operations, a tenth of a layer's at L = 2048.
    """
    hot = jax.nn.one_hot(rows, n, dtype=x.dtype)
    return jnp.einsum(equation, hot, x, precision=lax.Precision.HIGHEST, preferred_element_type=sum_dtype(x))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_rows(x: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """x [B, L, D] added up by `rows` [B, L] -> [B, n, D], float32 at least; rows beyond n count nowhere."""
    return one_hot_product("bln,bld->bnd", rows, n, x)


@jax.custom_vjp
def spread_rows(z: jax.Array, rows: jax.Array) -> jax.Array:
    """z [B, n, D], of each position the one of its row -> [B, L, D]; zero for rows outside 0 .. n - 1."""
    inside = (rows >= 0) & (rows < z.shape[1])
    taken = jnp.take_along_axis(z, jnp.clip(rows, 0, z.shape[1] - 1)[..., None], axis=1)
    return jnp.where(inside[..., None], taken, 0)


# Each is the other's transpose.
sum_rows.defvjp(
    lambda x, rows, n: (sum_rows(x, rows, n), (rows, jnp.zeros((0,), x.dtype))),
    lambda n, saved, d: (spread_rows(d, saved[0]).astype(saved[1].dtype), None),
)
spread_rows.defvjp(
    lambda z, rows: (spread_rows(z, rows), (rows, jnp.zeros((z.shape[1], 0), z.dtype))),
    lambda saved, d: (sum_rows(d, saved[0], saved[1].shape[0]).astype(saved[1].dtype), None),
)
