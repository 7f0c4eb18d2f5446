"""Groups of positions: the operations that shortening and upsampling use, for fixed and for variable length.

At each boundary the deeper level consumes one pooled vector; its output is used until the next boundary. With a fixed
factor k there are boundaries at 0, k, 2k ..., and a group is a row of a reshaped array: `FixedGroups`. Boundaries that
depend on the text make groups of variable length, see `nn.event_groups`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hourglass_jax.errors import UsageError
from hourglass_jax.nn.cache import Clock, KeyValueCache
from hourglass_jax.nn.layers import at_least_float32
from hourglass_jax.nn.transformer import Block

LARGEST_LOGIT = 60.0  # its exponential times an activation is finite in float32


def shift_right(x: Float[Array, "B L D"], n: int) -> Float[Array, "B L D"]:
    """Shift x right by n positions and insert zeros on the left (section 2 of the paper).

    The vector of a group is added to all k positions, so it must not depend on positions after the first one.
    n = k - 1 is the smallest shift that guarantees this; with k - 2, a position would depend on the next one.
    """
    return jnp.pad(x, ((0, 0), (n, 0), (0, 0)))[:, : x.shape[1]]


def to_groups(x: Float[Array, "B L D"], k: int) -> Float[Array, "B G k D"]:
    """Split a sequence into G = ceil(L / k) groups of k positions; zeros fill the last one."""
    batch, length, d_model = x.shape
    groups = -(-length // k)
    if length % k:
        x = jnp.pad(x, ((0, 0), (0, groups * k - length), (0, 0)))
    return x.reshape(batch, groups, k, d_model)


def sum_dtype(x: Array) -> np.dtype:
    """Return the dtype of sums over x: float32 at least."""
    return at_least_float32(x.dtype)


class Groups:
    """Operations on groups; x [B, L, D] has a vector for each position, z [B, G, D] one for each group.

    length: L of one step of decoding.
    carry: the sums over the group in progress, from which decoding continues.
    due: bool [B], in a step of decoding: whether this position ends a group.
    when: int [B or 1, G], the first position that uses each group's vector.
    served: int [B, L], the group whose vector each position uses.
    count, wanted: int [B or 1], the number of groups, and the number without the limit on boundaries.
    mask, slot_mask: bool [B, G] and [B, G k], the groups and positions to attend to if not causal; otherwise None.
    boundary_prob: float [B, L], see `nn.event_groups.Decision`.
    share, certainty: 1, or [B, L, 1] of value 1 whose derivatives pass gradients to `boundary_prob`: how much a
        position contributes to its group, and how much it relies on the vector that it uses.
    """

    length: int
    carry: list[Array]
    due: Bool[Array, " B"]
    when: Int[Array, "B G"]
    served: Int[Array, "B L"]
    count: Int[Array, " B"]
    wanted: Int[Array, " B"]
    mask: Bool[Array, "B G"] | None = None
    slot_mask: Bool[Array, "B Gk"] | None = None
    boundary_prob: Float[Array, "B L"] | None = None
    share: Array | int = 1
    certainty: Array | int = 1

    def shift_right(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Shift x so that a group's vector depends on no position after the first one that uses it."""
        raise NotImplementedError

    def sum(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        """Return the sum over each group."""
        return self.total(x).astype(x.dtype)

    def mean(self, x: Float[Array, "B L D"], logits: Float[Array, "B L 1"] | None = None) -> Float[Array, "B G D"]:
        """Return the mean of each group, weighted by the softmax of `logits` over the group if given."""
        if logits is None:
            weights = jnp.ones((*x.shape[:2], 1), x.dtype)
        else:
            weights = jnp.exp(jnp.clip(logits, -LARGEST_LOGIT, LARGEST_LOGIT).astype(sum_dtype(logits)))
        weights = (weights * self.share).astype(weights.dtype)
        total, weight = self.total(weights * x), self.total(weights)
        return (total / jnp.where(weight > 0, weight, 1)).astype(x.dtype)

    def select(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        """Return the newest vector of each group, at its boundary."""
        raise NotImplementedError

    def spread(self, z: Float[Array, "B G D"]) -> Float[Array, "B L D"]:
        """Return the group vector that each position uses; zero before the first boundary."""
        raise NotImplementedError

    def slots(self, x: Float[Array, "B L D"]) -> Float[Array, "B G k D"]:
        """Split x into groups of equal length. Raises UsageError for groups of variable length."""
        raise UsageError(
            "this method requires groups of equal length, which boundaries='fixed' makes; choose another method, or "
            "write it with the operations of nn.groups.Groups"
        )

    def positions(self, slots: Float[Array, "B G k D"]) -> Float[Array, "B L D"]:
        """Undo `slots`. Raises UsageError for groups of variable length."""
        return self.slots(slots)

    def total(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        """Return the sum over each group, in float32 at least, and append that of the group in progress to `carry`."""
        raise NotImplementedError

    def last(self, z: Float[Array, "B G D"], old: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Return the vector that the next position uses; `old` if that position receives a new one."""
        raise NotImplementedError

    def with_carry(self, sums: list[Array]) -> Groups:
        """Return the groups of a decoding step that continues from the sums up to the previous position."""
        return self

    def newest(self, x: Float[Array, "B n D"], place: Int[Array, ""]) -> Float[Array, "B D"]:
        """Return the vector of the decoded position, which has index `place` in its sequence."""
        raise NotImplementedError

    def query_clock(self, clock: Clock) -> Clock:
        """Return the clock for attention from a position at `clock` to group vectors."""
        return clock

    def attend_to_positions(
        self, block: Block, z: Float[Array, "B G D"], x: Float[Array, "B L D"], *, key: Array | None = None
    ) -> Float[Array, "B G D"]:
        """Attention shortening: each group's z queries the shifted positions x of groups up to its own."""
        raise NotImplementedError

    def attend_to_groups(
        self, block: Block, x: Float[Array, "B L D"], z: Float[Array, "B G D"], *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        """Attention upsampling: each position's x queries the group vectors z up to the one that it uses."""
        raise NotImplementedError

    def prefill_to_positions(
        self, block: Block, z: Array, x: Array, cache: KeyValueCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B G D"], KeyValueCache]:
        """`attend_to_positions` for rows that begin at token `start`; fills the cache."""
        raise NotImplementedError

    def prefill_to_groups(
        self, block: Block, x: Array, z: Array, cache: KeyValueCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B L D"], KeyValueCache]:
        """`attend_to_groups` for rows that begin at token `start`; fills the cache."""
        raise NotImplementedError

    def step_to_positions(
        self, block: Block, z: Float[Array, "B D"], x: Float[Array, "B n D"], cache: KeyValueCache, clock: Clock
    ) -> tuple[Float[Array, "B D"], KeyValueCache]:
        """`attend_to_positions` in one step of decoding, with new positions x."""
        raise NotImplementedError


class FixedGroups(Groups):
    """Groups of k positions in a sequence of `length`, by reshaping; shortening fills the last group with zeros."""

    def __init__(self, k: int, length: int, shift: int = 0, valid: Bool[Array, "B L"] | None = None):
        """`valid`: the positions that are not padding, if not causal. A group is valid if any of its positions is."""
        self.k, self.length, self.shift, self.carry, self.valid = k, length, shift, [], valid
        if valid is not None:
            slots = self.slots(valid[..., None])[..., 0]
            self.mask, self.slot_mask = slots.any(axis=2), slots.reshape(valid.shape[0], -1)
        self.when = jnp.arange(0, length, k, dtype=jnp.int32)[None]
        self.count = self.wanted = jnp.full(1, self.when.shape[1], jnp.int32)

    def shift_right(self, x: Float[Array, "B L D"]) -> Float[Array, "B Gk D"]:
        """Shift as in section 2 of the paper; the result has complete groups."""
        if self.valid is not None:
            x = jnp.where(self.valid[..., None], x, 0)
        return shift_right(self.slots(x).reshape(x.shape[0], -1, x.shape[2]), self.shift)

    def sum(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        return self.slots(x).sum(axis=2)

    def mean(self, x: Float[Array, "B L D"], logits: Float[Array, "B L 1"] | None = None) -> Float[Array, "B G D"]:
        if logits is None:
            return self.slots(x).mean(axis=2)
        return (jax.nn.softmax(self.slots(logits), axis=2) * self.slots(x)).sum(axis=2)

    def select(self, x: Float[Array, "B L D"]) -> Float[Array, "B G D"]:
        return self.slots(x)[:, :, -1 if self.valid is None else 0]  # a shift moves the first to the end

    def spread(self, z: Float[Array, "B G D"]) -> Float[Array, "B L D"]:
        return self.positions(jnp.broadcast_to(z[:, :, None], (*z.shape[:2], self.k, z.shape[2])))

    def slots(self, x: Float[Array, "B L D"]) -> Float[Array, "B G k D"]:
        return to_groups(x, self.k)

    def positions(self, slots: Float[Array, "B G k D"]) -> Float[Array, "B L D"]:
        return slots.reshape(slots.shape[0], -1, slots.shape[3])[:, : self.length]

    def newest(self, x: Float[Array, "B n D"], place: Int[Array, ""]) -> Float[Array, "B D"]:
        return x[:, place % self.k]

    def last(self, z: Float[Array, "B G D"], old: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return old

    def attend_to_positions(
        self, block: Block, z: Float[Array, "B G D"], x: Float[Array, "B L D"], *, key: Array | None = None
    ) -> Float[Array, "B G D"]:
        return block(z[:, :, None], self.slots(x), mask=self.slot_mask, key=key)[:, :, 0]

    def attend_to_groups(
        self, block: Block, x: Float[Array, "B L D"], z: Float[Array, "B G D"], *, key: Array | None = None
    ) -> Float[Array, "B L D"]:
        return self.positions(block(self.slots(x), z[:, :, None], mask=self.mask, key=key))

    def prefill_to_positions(
        self, block: Block, z: Array, x: Array, cache: KeyValueCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B G D"], KeyValueCache]:
        z, cache = block.prefill(z[:, :, None], self.slots(x), cache=cache, start=start)
        return z[:, :, 0], cache

    def prefill_to_groups(
        self, block: Block, x: Array, z: Array, cache: KeyValueCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B L D"], KeyValueCache]:
        x, cache = block.prefill(self.slots(x), z[:, :, None], cache=cache, start=start)
        return self.positions(x), cache

    def step_to_positions(
        self, block: Block, z: Float[Array, "B D"], x: Float[Array, "B k D"], cache: KeyValueCache, clock: Clock
    ) -> tuple[Float[Array, "B D"], KeyValueCache]:
        return block.step(z, x, cache=cache, clock=clock)
