"""Groups of variable length, which end at boundaries that depend on the text.

`EventGroups` holds the groups of full sequences in arrays of static shape; `OpenGroup` is for decoding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.groups import Groups, sum_dtype
from hourglass_jax.nn.transformer import Block


class Decision(NamedTuple):
    """The decision of a boundary rule at each position.

    boundary_mask: whether the position should end a group.
    boundary_prob: its probability, above 1/2 where `boundary_mask` is set, 1 at a row's first position. None if the
        rule is not learned.
    score: the value that `boundary_prob` is computed from.
    """

    boundary_mask: Bool[Array, "B L"]
    boundary_prob: Any = None  # float [B, L]
    score: Any = None  # float [B, L]


class EventGroups(Groups):
    """Groups of variable length: group g holds the positions after boundary g - 1 up to boundary g.

    The arrays have `n_groups` entries. Groups in use come first, so causal attention needs no mask for the unused
    ones. Positions after the last boundary belong to the group in progress, which has no vector yet.

    served: int [B, L], the newest boundary so far, whose vector the position uses; -1: none.
    member: int [B, L], the group that the position belongs to; `n_groups` for padding.
    when: int [B, G], the position of each boundary; the last position for unused groups.
    carry: [B, D] for each call of `total`, the sum over the group in progress.
    """

    def __init__(
        self,
        fires: Bool[Array, "B L"],
        n_groups: int,
        valid: Bool[Array, "B L"] | bool = True,
        decision: Decision | None = None,
    ):
        """`fires` marks boundaries, `valid` the positions that are not padding; `decision` is before the limit."""
        self.fires, self.decision = fires, decision or Decision(fires)
        self.wanted, self.boundary_prob = self.decision.boundary_mask.sum(axis=1), self.decision.boundary_prob
        if self.boundary_prob is not None:
            zero = (self.boundary_prob - lax.stop_gradient(self.boundary_prob))[..., None]  # value 0, derivative 1
            # A boundary at u would exclude the later positions from the group (dynamic pooling).
            self.share = 1 + jnp.cumsum(zero, axis=1) - zero
            self.certainty = 1 + jnp.where(fires[..., None], zero, -zero)
        self.length, self.n_groups = fires.shape[1], n_groups
        so_far = jnp.cumsum(fires, axis=1, dtype=jnp.int32)
        self.served, self.count = so_far - 1, so_far[:, -1]
        self.member = jnp.where(valid, so_far - fires.astype(jnp.int32), n_groups)
        in_progress = valid & (self.member == self.count[:, None])
        self._carry_member = jnp.where(in_progress, 0, 1)
        before = (so_far[:, :, None] <= jnp.arange(n_groups, dtype=jnp.int32)[None, None]).sum(axis=1, dtype=jnp.int32)
        self.when = jnp.minimum(before, fires.shape[1] - 1)
        self.carry = []

    def shift_right(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Return x: a group's vector is used from its last position on."""
        return x

    def select(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        return jnp.take_along_axis(x, self.when[..., None], axis=1)

    def spread(self, z: Float[Array, "B G D"]) -> Float[Array, "B L D"]:
        return spread_rows(z, self.served)

    def last(self, z: Float[Array, "B G D"], old: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return spread_rows(z, self.count[:, None] - 1)[:, 0]

    def total(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        self.carry.append(sum_rows(x, self._carry_member, 1)[:, 0])
        return sum_rows(x, self.member, self.n_groups)

    def attend_to_positions(
        self, block: Block, z: Float[Array, "B G D"], x: Float[Array, "B L D"], *, key: Array | None = None
    ) -> Float[Array, "B G D"]:
        return block.attend_from(z, x, self.when, key=key)[0]

    def attend_to_groups(
        self, block: Block, x: Float[Array, "B L D"], z: Float[Array, "B G D"], *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        return block.attend_from(x, z, self.served, key=key)[0]

    def prefill_to_positions(
        self, block: Block, z: Array, x: Array, cache: KeyValueCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B G D"], KeyValueCache]:
        return block.attend_from(z, x, self.when, start // block.attention.tokens_per_position, cache=cache)

    def prefill_to_groups(
        self, block: Block, x: Array, z: Array, cache: KeyValueCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B L D"], KeyValueCache]:
        return block.attend_from(x, z, self.served, cache=cache)


class OpenGroup(Groups):
    """The group in progress of each row, for one position at a time: x and z are [B, 1, D].

    `carry` holds the sums up to this position, computed from those up to the previous one.
    """

    length = 1

    def __init__(
        self,
        fresh: Bool[Array, " B"],
        due: Bool[Array, " B"],
        serving: Clock | None = None,
        sums: list[Array] | None = None,
        boundary_prob: Float[Array, "B 1"] | None = None,
    ):
        """`fresh`, `due`: whether the previous position, and this one, end a group.

        `serving`: the clock of the boundary whose vector this position uses.
        """
        self.fresh, self.due, self.serving, self.sums, self.boundary_prob = fresh, due, serving, sums, boundary_prob
        self.carry = []

    def with_carry(self, sums: list[Array]) -> OpenGroup:
        return OpenGroup(self.fresh, self.due, self.serving, sums, self.boundary_prob)

    def of_rows(self, rows: Int[Array, " b"]) -> OpenGroup:
        """Select rows [b]."""
        parts = (self.fresh, self.due, self.serving, self.sums, self.boundary_prob)
        return OpenGroup(*jax.tree.map(lambda leaf: leaf[rows], parts))

    def query_clock(self, clock: Clock) -> Clock:
        return clock if self.serving is None else self.serving

    def newest(self, x: Float[Array, "B 1 D"], place: Int[Array, ""]) -> Float[Array, "B D"]:
        return x[:, 0]

    def shift_right(self, x: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
        return x

    def select(self, x: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
        return x

    def spread(self, z: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
        if self.serving is None:
            return z
        return jnp.where((self.serving.time >= self.serving.start)[:, None, None], z, 0)

    def total(self, x: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
        total = x[:, 0].astype(sum_dtype(x))
        if self.sums is not None:
            total += jnp.where(self.fresh[:, None], 0, self.sums[len(self.carry)])
        self.carry.append(total)
        return total[:, None]

    def step_to_positions(
        self, block: Block, z: Float[Array, "B D"], x: Float[Array, "B 1 D"], cache: KeyValueCache, clock: Clock
    ) -> tuple[Float[Array, "B D"], KeyValueCache]:
        """Cache every position; run attention only if a group ends in some row."""
        cache = block.write(x, cache, clock)
        return lax.cond(self.due.any(), lambda: block.step(z, cache=cache, clock=clock)[0], lambda: z), cache


def limit(boundary_mask: Bool[Array, "B L"], room: Int[Array, "... L"]) -> Bool[Array, "B L"]:
    """Drop boundaries so that the positions 0 .. t hold at most room[t] of them; `room` never decreases.

    Their number n[t] = min(n[t-1] + boundary_mask[t], room[t]) depends on the past only, so decoding can follow it. It
    limits the rate along a row, unlike a cap at its end.
    """
    wanted = jnp.cumsum(boundary_mask, axis=1, dtype=jnp.int32)
    spare = lax.cummin(jnp.broadcast_to(room, boundary_mask.shape).astype(jnp.int32) - wanted, axis=1)
    granted = wanted + jnp.minimum(spare, 0)
    return granted > jnp.pad(granted, ((0, 0), (1, 0)))[:, :-1]


def one_hot_product(equation: str, rows: Int[Array, "B L"], n: int, x: Array) -> Array:
    """Multiply x by the matrix [B, L, n] that is 1 at each position's row.

    Unlike a scatter on a GPU, it adds in a fixed order. At n = L / 4 it costs 2 L n D operations, a tenth of a layer's
    at L = 2048.
    """
    hot = jax.nn.one_hot(rows, n, dtype=x.dtype)
    return jnp.einsum(equation, hot, x, precision=lax.Precision.HIGHEST, preferred_element_type=sum_dtype(x))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_rows(x: Float[Array, "B L D"], rows: Int[Array, "B L"], n: int) -> Float[Array, "B n D"]:
    """Sum the positions of each row, in float32 at least; positions with rows outside 0 .. n - 1 are ignored."""
    return one_hot_product("bln,bld->bnd", rows, n, x)


@jax.custom_vjp
def spread_rows(z: Float[Array, "B n D"], rows: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Return z at each position's row; zero for rows outside 0 .. n - 1."""
    inside = (rows >= 0) & (rows < z.shape[1])
    taken = jnp.take_along_axis(z, jnp.clip(rows, 0, z.shape[1] - 1)[..., None], axis=1)
    return jnp.where(inside[..., None], taken, 0)


# The two functions are transposes of each other.
sum_rows.defvjp(
    lambda x, rows, n: (sum_rows(x, rows, n), (rows, jnp.zeros((0,), x.dtype))),
    lambda n, saved, d: (spread_rows(d, saved[0]).astype(saved[1].dtype), None),
)
spread_rows.defvjp(
    lambda z, rows: (spread_rows(z, rows), (rows, jnp.zeros((z.shape[1], 0), z.dtype))),
    lambda saved, d: (sum_rows(d, saved[0], saved[1].shape[0]).astype(saved[1].dtype), None),
)
