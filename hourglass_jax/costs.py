"""FLOPs and memory of a configuration, from shapes; nothing is allocated or compiled."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from hourglass_jax.checks import check_decodes
from hourglass_jax.config import HourglassConfig, LevelConfig
from hourglass_jax.hierarchy import Level
from hourglass_jax.model import HourglassLM, n_parameters
from hourglass_jax.nn.attention.lsh import lsh_pairs
from hourglass_jax.nn.boundaries import BOUNDARIES
from hourglass_jax.nn.groups import FixedGroups
from hourglass_jax.nn.resampling import SHORTENINGS, UPSAMPLINGS, AttentionShortening, AttentionUpsampling
from hourglass_jax.nn.transformer import is_unrolled
from hourglass_jax.ranges import check_range


class Work(NamedTuple):
    """Number of vectors that one position of a level processes, with the sizes of `config`."""

    config: LevelConfig
    queries: float  # each also has an output projection and a feed-forward network
    keys: float  # each also has a value
    pairs: float  # pairs of a query and a visible key
    distances: float  # relative keys, shared by the sequences of a batch
    mixed: float = 0  # d_model x d_model products of other parts of shortening, upsampling and boundaries


def product_flops(jaxpr: Jaxpr) -> int:
    """Count the FLOPs of matrix products in a program, including all branches of conditions."""
    total = 0
    equation: Any  # `jax.extend` declares variables without shapes
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        repeats = equation.params.get("length", 1)  # of a scan
        total += repeats * sum(map(product_flops, jaxprs_in_params(equation.params)))
    return total


class Resampling(NamedTuple):
    """Work of shortening by k, upsampling and boundaries; `Work.mixed` is split by group and position."""

    k: int
    down_attends: bool
    up_attends: bool
    mixed_per_group: float
    mixed_per_position: float


NO_RESAMPLING = Resampling(0, False, False, 0, 0)


@functools.cache
def resampling_of(
    shortening: Callable[..., Any],
    upsampling: Callable[..., Any],
    boundaries: Callable[..., Any],
    config: LevelConfig,
    level: Level,
) -> Resampling:
    """Count the work of resampling methods by tracing a call on one group.

    The result is exact for methods in which groups are independent, and for subclasses of `AttentionShortening` and
    `AttentionUpsampling`. For other methods that combine groups it is an underestimate.
    """
    k = level.shorten_factor

    def build(method: Callable[..., Any]) -> nnx.Module:
        return nnx.eval_shape(lambda: method(config, k, 1, rngs=nnx.Rngs(0)))

    def flops(module: nnx.Module | None, *shapes: tuple[int, ...]) -> int:
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return 0 if module is None else call_flops(module, lambda module, *x: module(*x, FixedGroups(k, k)), *inputs)

    d = config.d_model
    down, up = build(shortening), build(upsampling)
    pool = down.pool if isinstance(down, AttentionShortening) else down
    base = up.base if isinstance(up, AttentionUpsampling) else up
    group_flops = flops(pool, (1, k, d)) + flops(base, (1, k, d), (1, 1, d))
    rule = nnx.eval_shape(lambda: boundaries(config, level, rngs=nnx.Rngs(0)))
    x, tokens = jax.ShapeDtypeStruct((1, k, d), jnp.float32), jax.ShapeDtypeStruct((1, k), jnp.int32)
    boundary_flops = call_flops(rule, lambda rule, *inputs: rule(*inputs).when, x, tokens)
    return Resampling(k, pool is not down, base is not up, group_flops / (2 * d**2), boundary_flops / (2 * d**2 * k))


def call_flops(module: nnx.Module, call: Callable[..., Any], *inputs: jax.ShapeDtypeStruct) -> int:
    """Count the FLOPs of matrix products in call(module, *inputs) by tracing it."""
    graph, params = nnx.split(module)
    traced = jax.make_jaxpr(lambda params, *inputs: call(nnx.merge(graph, params), *inputs))
    return product_flops(traced(params, *inputs).jaxpr)


class Seen(NamedTuple):
    """Average visible positions and relative keys of a query, and the number of queries."""

    positions: float
    distances: float
    length: int

    @classmethod
    def causally(cls, length: int, window: int = 0) -> Seen:
        """Return the averages of causal attention over `length` positions, limited to the newest `window` (0: all)."""
        width = min(window or length, length)
        return cls(width - width * (width - 1) / (2 * length), width / length, length)

    @classmethod
    def by(cls, config: HourglassConfig, length: int, window: int = 0) -> Seen:
        """Return the averages of causal or full attention, as configured."""
        return cls.causally(length, window) if config.causal else cls(length, (2 * length - 1) / length, length)


SeenAt = Callable[[Level, int], Seen]  # maps a level and the window of its layers (0: none)


def work_by_level(config: HourglassConfig, seen: SeenAt) -> Iterator[tuple[Level, Work, list[Work]]]:
    """Yield each level with the work of one layer and of resampling: from the level above, and from the level below.

    The shortening that produces a level, its keys for the upsampling, and the maps between two widths count with that
    level.
    """
    methods = SHORTENINGS[config.shortening], UPSAMPLINGS[config.upsampling]
    levels = config.parsed_hierarchy.levels
    above, outer = NO_RESAMPLING, config.at_level(0)  # tokens are not the result of a shortening
    rules = [BOUNDARIES[name] for name in config.boundaries_by_level]
    for i, (level, inner, rule) in enumerate(zip(levels, (*levels[1:], None), (*rules, None), strict=True)):
        own = config.at_level(i)
        layer, rows = seen(level, own.window), seen(level, 0)
        inner_rows = seen(inner, 0) if inner else rows
        below = resampling_of(*methods, rule, own, level) if rule else NO_RESAMPLING
        down_keys = above.k * above.down_attends
        maps = 2 * own.d_model / outer.d_model if own.d_model != outer.d_model else 0
        produced = Work(
            outer,
            queries=above.down_attends,
            keys=down_keys + above.up_attends,
            pairs=down_keys * rows.positions,
            distances=down_keys * rows.distances,
            mixed=above.mixed_per_group + maps,
        )
        upsampled = Work(
            own,
            queries=below.up_attends,
            keys=0,
            pairs=below.up_attends * inner_rows.positions,
            distances=below.up_attends * inner_rows.distances,
            mixed=below.mixed_per_position,
        )
        work = Work(own, queries=1, keys=1, pairs=layer.positions, distances=layer.distances)
        if config.token_attention == "lsh" and level.factor == 1:  # keys equal queries
            work = Work(own, queries=1, keys=0.5, pairs=lsh_pairs(config, layer.length), distances=0)
        yield level, work, [produced, upsampled]
        above, outer = below, own


def position_flops(config: HourglassConfig, seen: SeenAt) -> dict[int, float]:
    """Return FLOPs of matrix products per position, by the factor of the level."""
    relative = config.positions == "relative"

    def flops(work: Work) -> float:
        d, d_heads = work.config.d_model, work.config.n_heads * work.config.head_dim
        projected = 2 * work.queries + 2 * work.keys + work.distances * relative
        attention = d_heads * (d * projected + (2 + relative) * work.pairs)
        return 2 * (attention + d * (d * work.mixed + 2 * work.config.d_ff * work.queries))

    totals = {
        level.factor: (level.pre_layers + level.post_layers) * flops(layer) + sum(map(flops, resampling))
        for level, layer, resampling in work_by_level(config, seen)
    }
    totals[1] += head_flops(config)
    return totals


def level_lengths(config: HourglassConfig, length: int) -> dict[int, int]:
    """Return the number of positions of each level for `length` tokens, by the factor of the level.

    For variable groups this is the capacity, since compiled programs have fixed shapes. Raises UsageError for a length
    below 1.
    """
    check_range("length", length, 1)
    levels = config.parsed_hierarchy.levels
    lengths = {1: length}
    rules = enumerate(config.boundaries_by_level)
    for (i, name), (level, inner) in zip(rules, itertools.pairwise(levels), strict=True):
        make_rule = partial(BOUNDARIES[name], config.at_level(i), level)
        rule = nnx.eval_shape(lambda make_rule=make_rule: make_rule(rngs=nnx.Rngs(0)))
        lengths[inner.factor] = rule.n_groups(lengths[level.factor])
    return lengths


def head_flops(config: HourglassConfig) -> int:
    """Return the FLOPs of the logits of one token."""
    return 2 * config.at_level(0).d_model * config.vocab_size


def decoding_flops(config: HourglassConfig, length: int) -> dict[int, float]:
    """Return the FLOPs of matrix products in one decoding step of each level, by its factor f.

    length: tokens in the cache.

    A level runs once every f tokens, so the average per token is sum(flops / f). The shortening that produces a level
    counts with it, and the head with the tokens. Raises UsageError for a model without cached decoding.
    """
    check_decodes(config)
    return position_flops(config, lambda level, window: Seen(min(length / level.factor, window or length), 0, length))


def forward_flops(config: HourglassConfig, length: int) -> dict[int, float]:
    """Return FLOPs of matrix products in a forward pass over one sequence of `length` tokens, by factor of the level.

    Attention counts only pairs that the causal mask and the window allow. Relative keys count for each sequence, but a
    batch shares them. Variable groups count with their capacity; see `level_lengths`.
    """
    positions = level_lengths(config, length)
    flops = position_flops(config, lambda level, window: Seen.by(config, positions[level.factor], window))
    return {f: positions[f] * per_position for f, per_position in flops.items()}


def training_flops(config: HourglassConfig, length: int) -> float:
    """Return model FLOPs of a training step per sequence: forward, plus twice as much for backward.

    Recomputation is not counted, as is usual for model FLOP utilization (MFU).
    """
    return 3 * sum(forward_flops(config, length).values())


def count_parameters(config: HourglassConfig) -> int:
    """Count the trainable parameters, including embedding and head."""
    return n_parameters(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))


def state_bytes(config: HourglassConfig) -> int:
    """Return the bytes of float32 parameters and both AdamW moments; gradients add a third during a step."""
    return 3 * 4 * count_parameters(config)


def activation_bytes(config: HourglassConfig, length: int, batch: int = 1) -> int:
    """Estimate the peak bytes of activations for a gradient over [batch, length] tokens; a lower bound.

    A block stores its input, both norms, queries, keys, values, the attention output and the residual sum. The
    feed-forward network stores its hidden vector before and after the activation (for GELU also its tanh or erf).
    Attention scores are recomputed in segments of 64 queries. A rematerialized stack stores one vector per layer, plus
    the largest block once. Also counted: norms of stacks and upsampling, relative keys (once per batch), and float32
    logits.

    Excludes dropout masks, gradients and copies by the compiler. XLA:CPU uses 1.0 to 1.9 times as much for each layer
    or shortening of short sequences. Long sequences use more, since each segment of queries copies its keys.
    """
    relative = config.positions == "relative"
    stored = recomputed = 0.0  # array elements
    lengths = level_lengths(config, length)

    def seen(level: Level, window: int) -> Seen:
        return Seen.by(config, lengths[level.factor], window)

    for level, layer, resampling in work_by_level(config, seen):
        positions = lengths[level.factor]

        def intermediates(work: Work, key_norms: int, positions: int = positions) -> float:
            d, d_heads = work.config.d_model, work.config.n_heads * work.config.head_dim
            hidden = work.config.d_ff * (2 if config.activation == "relu" else 3)
            vectors = 4 * work.queries + key_norms * work.keys + work.mixed
            heads = 2 * work.queries + 2 * work.keys
            shared = work.distances * d_heads * relative
            return positions * (batch * (vectors * d + heads * d_heads + work.queries * hidden) + shared)

        block = intermediates(layer, key_norms=0)  # layers normalize queries and keys together
        d = layer.config.d_model
        stored += sum(intermediates(work, key_norms=1) for work in resampling) + positions * batch * 3 * d
        for n_layers in (level.pre_layers, level.post_layers):
            if config.remat_of(unrolled=is_unrolled(config, n_layers)) != "full":
                stored += n_layers * block
            else:
                stored += n_layers * positions * batch * d
                recomputed = max(recomputed, block)
    logits = 4 * batch * length * config.vocab_size
    return round((stored + recomputed) * jnp.dtype(config.dtype).itemsize) + logits


def cache_bytes(config: HourglassConfig, length: int, batch: int = 1) -> int:
    """Return the bytes of a decoding cache for [batch, length] tokens; `config.shared_factor` must divide `length`."""
    cache = jax.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)).init_cache(batch, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
