"""What a configuration costs, before it is built: FLOPs and memory, from its shapes alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from hourglass_jax.checks import check_decodes
from hourglass_jax.config import HourglassConfig
from hourglass_jax.hierarchy import Level
from hourglass_jax.model import HourglassLM, n_parameters
from hourglass_jax.nn.attention.lsh import lsh_pairs
from hourglass_jax.nn.boundaries import BOUNDARIES
from hourglass_jax.nn.groups import FixedGroups
from hourglass_jax.nn.resampling import SHORTENINGS, UPSAMPLINGS, AttentionShortening, AttentionUpsampling
from hourglass_jax.nn.transformer import is_unrolled
from hourglass_jax.ranges import check_range


class Work(NamedTuple):
    """What one position of a level takes part in, counted in vectors."""

    queries: float  # each with an output and a feed-forward
    keys: float  # each with a value
    pairs: float  # of a query and a key it sees
    distances: float  # relative keys, the same for every sequence of a batch
    mixed: float = 0  # d_model x d_model projections of shortening and upsampling, attention aside


def product_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products of a program; of a condition, those of all branches."""
    total = 0
    equation: Any  # JAX types its variables without their shapes
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        repeats = equation.params.get("length", 1)  # of a scan
        total += repeats * sum(map(product_flops, jaxprs_in_params(equation.params)))
    return total


class Resampling(NamedTuple):
    """Shortening by k and upsampling: whether each attends, and what else they project for a group; see `Work`.

    decided: what boundaries project for each position.
    """

    k: int
    down_attends: bool
    up_attends: bool
    mixed: float
    decided: float


NO_RESAMPLING = Resampling(0, False, False, 0, 0)


@functools.cache
def resampling_of(
    shortening: Callable[..., Any],
    upsampling: Callable[..., Any],
    boundaries: Callable[..., Any],
    config: HourglassConfig,
    level: Level,
) -> Resampling:
    """Read off the methods themselves, so that a new one needs no entry here: a call on one group is traced.

    An estimate for a method that looks at other groups in a way of its own, not that of `AttentionShortening` or
    `AttentionUpsampling`: it is counted as if it saw its group alone.
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
    mixing = flops(pool, (1, k, d)) + flops(base, (1, k, d), (1, 1, d))
    rule = nnx.eval_shape(lambda: boundaries(config, level, rngs=nnx.Rngs(0)))
    x, tokens = jax.ShapeDtypeStruct((1, k, d), jnp.float32), jax.ShapeDtypeStruct((1, k), jnp.int32)
    deciding = call_flops(rule, lambda rule, *inputs: rule(*inputs).when, x, tokens)
    return Resampling(k, pool is not down, base is not up, mixing / (2 * d**2), deciding / (2 * d**2 * k))


def call_flops(module: nnx.Module, call: Callable[..., Any], *inputs: jax.ShapeDtypeStruct) -> int:
    """Of call(module, *inputs), which is traced."""
    graph, params = nnx.split(module)
    traced = jax.make_jaxpr(lambda params, *inputs: call(nnx.merge(graph, params), *inputs))
    return product_flops(traced(params, *inputs).jaxpr)


class Seen(NamedTuple):
    """Positions that a query sees on average, distances for which there is a relative key, per query; and queries."""

    positions: float
    distances: float
    length: int

    @classmethod
    def causally(cls, length: int, window: int = 0) -> Seen:
        """Each of `length` queries sees itself and what comes before it, as far as a window of so many allows."""
        width = min(window or length, length)
        return cls(width - width * (width - 1) / (2 * length), width / length, length)

    @classmethod
    def by(cls, config: HourglassConfig, length: int, window: int = 0) -> Seen:
        """As the model has it: causally, or all of them, before and after."""
        return cls.causally(length, window) if config.causal else cls(length, (2 * length - 1) / length, length)


SeenAt = Callable[[Level, int], Seen]  # a level, and the window of its layers or 0


def work_by_level(config: HourglassConfig, seen: SeenAt) -> Iterator[tuple[Level, Work, Work]]:
    """Each level with the work of one of its layers and of its resampling.

    The shortening that feeds a level counts as its own, and so do the keys that it offers to the upsampling.
    """
    methods = SHORTENINGS[config.shortening], UPSAMPLINGS[config.upsampling]
    levels = config.parsed_hierarchy.levels
    above = NO_RESAMPLING  # nothing feeds the tokens
    rules = [BOUNDARIES[name] for name in config.boundaries_by_level]
    for level, inner, rule in zip(levels, (*levels[1:], None), (*rules, None), strict=True):
        layer, rows = seen(level, config.window if level.factor == 1 else 0), seen(level, 0)
        inner_rows = seen(inner, 0) if inner else rows
        below = resampling_of(*methods, rule, config, level) if rule else NO_RESAMPLING
        down_keys = above.k * above.down_attends
        resampling = Work(
            queries=above.down_attends + below.up_attends,
            keys=down_keys + above.up_attends,
            pairs=down_keys * rows.positions + below.up_attends * inner_rows.positions,
            distances=down_keys * rows.distances + below.up_attends * inner_rows.distances,
            mixed=above.mixed + below.decided,
        )
        work = Work(queries=1, keys=1, pairs=layer.positions, distances=layer.distances)
        if config.token_attention == "lsh" and level.factor == 1:  # keys are the queries
            work = Work(queries=1, keys=0.5, pairs=lsh_pairs(config, layer.length), distances=0)
        yield level, work, resampling
        above = below


def position_flops(config: HourglassConfig, seen: SeenAt) -> dict[int, float]:
    """FLOPs of matrix products for one position of each level, by its factor."""
    d, d_heads = config.d_model, config.n_heads * config.head_dim
    relative = config.positions == "relative"

    def flops(work: Work) -> float:
        projected = 2 * work.queries + 2 * work.keys + work.distances * relative
        attention = d_heads * (d * projected + (2 + relative) * work.pairs)
        return 2 * (attention + d * (d * work.mixed + 2 * config.d_ff * work.queries))

    totals = {
        level.factor: (level.pre_layers + level.post_layers) * flops(layer) + flops(resampling)
        for level, layer, resampling in work_by_level(config, seen)
    }
    totals[1] += head_flops(config)
    return totals


def level_lengths(config: HourglassConfig, length: int) -> dict[int, int]:
    """Positions of each level for a sequence of `length` tokens, by its factor.

    Where groups have any length, as many as there is room for, used or not: what a program of fixed shapes computes.
    Raises UsageError for a length below 1.
    """
    check_range("length", length, 1)
    levels = config.parsed_hierarchy.levels
    lengths = {1: length}
    for name, (level, inner) in zip(config.boundaries_by_level, itertools.pairwise(levels), strict=True):
        rule = nnx.eval_shape(lambda name=name, level=level: BOUNDARIES[name](config, level, rngs=nnx.Rngs(0)))
        lengths[inner.factor] = rule.n_groups(lengths[level.factor])
    return lengths


def head_flops(config: HourglassConfig) -> int:
    """Of one token's logits."""
    return 2 * config.d_model * config.vocab_size


def decoding_flops(config: HourglassConfig, length: int) -> dict[int, float]:
    """Floating-point operations of matrix products each time a level runs, by its factor f: once every f tokens.

    With `length` tokens in the cache; the shortening that feeds a level counts as its own, the head as the tokens'.
    So a token costs the sum of flops / factor: the point of the hierarchy. Raises UsageError for a model that sees both
    sides.
    """
    check_decodes(config)
    return position_flops(config, lambda level, window: Seen(min(length / level.factor, window or length), 0, length))


def forward_flops(config: HourglassConfig, length: int) -> dict[int, float]:
    """Floating-point operations of matrix products over one sequence of `length` tokens, by level as its factor.

    Attention counts the pairs that the causal mask, if there is one, and the window leave. Relative keys, which a batch
    shares, count in full, and so does the room for groups of any length; see `level_lengths`.
    """
    positions = level_lengths(config, length)
    flops = position_flops(config, lambda level, window: Seen.by(config, positions[level.factor], window))
    return {f: positions[f] * per_position for f, per_position in flops.items()}


def training_flops(config: HourglassConfig, length: int) -> float:
    """Of a training step for each sequence: three forward passes, as model FLOP utilisation is commonly defined.

    The backward pass is two; what deep stacks and attention compute again is not counted.
    """
    return 3 * sum(forward_flops(config, length).values())


def count_parameters(config: HourglassConfig) -> int:
    """Trainable parameters, embeddings and head included; allocates nothing."""
    return n_parameters(nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0))))


def state_bytes(config: HourglassConfig) -> int:
    """Of the float32 parameters and AdamW's two moments; gradients take a third as much again during a step."""
    return 3 * 4 * count_parameters(config)


def activation_bytes(config: HourglassConfig, length: int, batch: int = 1) -> int:
    """Estimate of the activations that a gradient over [batch, length] tokens needs at its peak.

    A block keeps its input, both norms, queries, keys, values, what attention returns, the sum after it and the
    feed-forward's hidden vector before and after the activation, for GELU its tanh or erf too; attention scores are
    computed again, 64 queries at a time. A stack that `remat` recomputes in full keeps one vector a layer; its
    blocks are computed again, and the largest of them counts once. Around them: the norms of stacks and upsampling,
    relative keys (once a batch) and float32 logits. Left out are dropout's masks, gradients and the copies that the
    compiler makes, so it is a lower bound: XLA:CPU takes 1.0 to 1.9 times as much for a further layer or
    shortening of short sequences, and more for long ones, of which each segment of queries copies its keys.
    """
    d, d_heads = config.d_model, config.n_heads * config.head_dim
    hidden = config.d_ff * (2 if config.activation == "relu" else 3)
    relative = config.positions == "relative"
    kept = recomputed = 0.0  # numbers
    lengths = level_lengths(config, length)

    def seen(level: Level, window: int) -> Seen:
        return Seen.by(config, lengths[level.factor], window)

    for level, layer, resampling in work_by_level(config, seen):
        positions = lengths[level.factor]

        def intermediates(work: Work, key_norms: int, positions: int = positions) -> float:
            vectors = 4 * work.queries + key_norms * work.keys + work.mixed
            heads = 2 * work.queries + 2 * work.keys
            shared = work.distances * d_heads * relative
            return positions * (batch * (vectors * d + heads * d_heads + work.queries * hidden) + shared)

        block = intermediates(layer, key_norms=0)  # keys share the queries' norm; resampling has one for them
        kept += intermediates(resampling, key_norms=1) + positions * batch * 3 * d
        for n_layers in (level.pre_layers, level.post_layers):
            if config.remat_of(unrolled=is_unrolled(config, n_layers)) != "full":
                kept += n_layers * block
            else:
                kept += n_layers * positions * batch * d
                recomputed = max(recomputed, block)
    logits = 4 * batch * length * config.vocab_size
    return round((kept + recomputed) * jnp.dtype(config.dtype).itemsize) + logits


def cache_bytes(config: HourglassConfig, length: int, batch: int = 1) -> int:
    """Of the cache in which `batch` rows of up to `length` tokens decode, a multiple of the total factor."""
    cache = jax.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)).init_cache(batch, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
