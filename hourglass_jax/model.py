"""The Hourglass (Algorithm 1 of the paper) and the language model around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hourglass_jax.checks import (
    check_decodes,
    check_key,
    check_mask,
    check_returned,
    check_symbolic_length,
    check_tokens,
    check_x64,
)
from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Level
from hourglass_jax.nn.boundaries import Turn
from hourglass_jax.nn.cache import Cache, Clock, in_own_time, of_rows, with_rows
from hourglass_jax.nn.groups import Groups
from hourglass_jax.nn.layers import Dropout, at_least_float32, keys_of_rows, layer_norm, linear, split_key
from hourglass_jax.nn.learned import BOUNDARIES, entropies
from hourglass_jax.nn.rates import boundary_terms
from hourglass_jax.nn.resampling import SHORTENINGS, UPSAMPLINGS
from hourglass_jax.nn.transformer import Stack


def n_parameters(module: nnx.Module | None) -> int:
    """Trainable parameters, of an abstract module too."""
    return 0 if module is None else sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


class Hourglass(nnx.Module):
    """Pre stack, shorten, inner Hourglass, upsample, post stack; at the innermost level a stack alone (Algorithm 1).

    `y = hourglass(x)`: [B, L, D] -> [B, L, D], y[:, t] a function of x[:, :t + 1], not causal of all x. Built of the
    levels of a hierarchy, `Hourglass(config, config.parsed_hierarchy.levels, rngs=rngs)`; vocabulary and embedding are
    `HourglassLM`'s.
    """

    def __init__(self, config: HourglassConfig, levels: Sequence[Level], *, rngs: nnx.Rngs):
        level, *inner = levels
        self.unit, self.d_model = level.factor, config.d_model
        self.pre = Stack(config, level.pre_layers, level.factor, rngs=rngs)
        self.inner = Hourglass(config, inner, rngs=rngs) if inner else None
        if inner:
            k = level.shorten_factor
            self.boundaries = BOUNDARIES[config.boundaries_by_level[-len(inner)]](config, level, rngs=rngs)
            self.shorten = SHORTENINGS[config.shortening](config, k, level.factor, rngs=rngs)
            self.upsample = UPSAMPLINGS[config.upsampling](config, k, level.factor, rngs=rngs)
            normed = config.norm == "stack" and self.upsample.normed
            self.upsample_norm = layer_norm(config, rngs=rngs) if normed else None
            self.post = Stack(config, level.post_layers, level.factor, rngs=rngs)

    def __call__(
        self, x: jax.Array, key: jax.Array | None = None, tokens: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """[B, L, D] -> [B, L, D], for any L; `key` turns dropout on, `tokens` are for boundaries that ask for them.

        mask: bool [B, L], the positions that are no padding; where it is not causal.
        """
        return self.with_groups(x, key, tokens, mask)[0]

    def with_groups(
        self,
        x: jax.Array,
        key: jax.Array | None = None,
        tokens: jax.Array | None = None,
        mask: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Groups]]:
        """As a call, and the groups that each shortening makes, outermost first.

        row_keys: a key for each row [B], of which boundaries draw their noise; default: from `key`.
        """
        keys = split_key(key, 5)
        if row_keys is None and key is not None:
            row_keys = keys_of_rows(key, x.shape[0])
        x = self.pre(x, keys[0], mask)
        if self.inner is None:
            return x, []
        groups = self.boundaries(x, tokens, mask, row_keys=row_keys)
        short = self.shorten(groups.shift_right(x), groups, key=keys[1])
        check_returned(self.shorten, short, (x.shape[0], self.boundaries.n_groups(x.shape[1]), self.d_model))
        short, deeper = self.inner.with_groups(short, keys[2], mask=groups.mask, row_keys=row_keys)
        up = self.upsample(x, short, groups, key=keys[3])
        check_returned(self.upsample, up, x.shape)
        return self.post(self.add_upsampled(x, up), keys[4], mask), [groups, *deeper]

    def groups(self, x: jax.Array, tokens: jax.Array | None = None) -> list[Groups]:
        """Those that each shortening makes of a sequence [B, L, D], outermost first."""
        return self.with_groups(x, tokens=tokens)[1]

    def rules(self) -> list[nnx.Module]:
        """The boundaries of each shortening, outermost first."""
        return [] if self.inner is None else [self.boundaries, *self.inner.rules()]

    def __repr__(self) -> str:
        return f"Hourglass({self.notation!r}, d_model={self.d_model}): {n_parameters(self):,} parameters"

    __str__ = __repr__

    @property
    def notation(self) -> str:
        """The paper's, with total factors: of an inner Hourglass too."""
        stages = f"{self.pre.n_layers}@{self.unit}"
        return stages if self.inner is None else f"{stages} {self.inner.notation} {self.post.n_layers}@{self.unit}"

    def add_upsampled(self, x: jax.Array, up: jax.Array) -> jax.Array:
        """The residual across the bottleneck."""
        return x + (up if self.upsample_norm is None else self.upsample_norm(up))

    def init_cache(self, batch: int, max_length: int, context: int) -> dict[str, Any]:
        """What decoding remembers at this level and below; `max_length` and the `context` a row may see in tokens."""
        cache: dict[str, Any] = {"pre": self.pre.init_cache(batch, max_length)}
        if self.inner is not None:
            reach = self.boundaries.reach(max_length, context)
            below = {
                "inner": self.inner.init_cache(batch, *reach),
                "upsample": self.upsample.init_cache(batch, reach[0]),
            }
            cache |= in_own_time(below) if self.boundaries.own_time else below
            cache |= {
                "boundaries": self.boundaries.init_cache(batch, max_length, context),
                "shorten": self.shorten.init_cache(*self.boundaries.example(batch), max_length),
                "post": self.post.init_cache(batch, max_length),
            }
        return cache

    def prefill(
        self, x: jax.Array, cache: dict[str, Any], clock: Clock, tokens: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """A call on rows [B, L, D] from `clock.start` to `clock.time`, with L whole groups, which fills the cache."""
        x, pre = self.pre.prefill(x, cache["pre"], clock.start)
        if self.inner is None:
            return x, {"pre": pre}
        known, groups, below, boundaries = self.boundaries.prefill(x, tokens, cache["boundaries"], clock)
        short, shorten = self.shorten.prefill(groups.shift_right(known), groups, cache["shorten"], clock.start)
        short, inner = self.inner.prefill(short, cache["inner"], below)
        up, upsample = self.upsample.prefill(x, short, groups, cache["upsample"], clock.start)
        x, post = self.post.prefill(self.add_upsampled(x, up), cache["post"], clock.start)
        parts = (pre, boundaries, shorten, inner, upsample, post)
        return x, dict(zip(("pre", "boundaries", "shorten", "inner", "upsample", "post"), parts, strict=True))

    def step(
        self, x: jax.Array, cache: dict[str, Any], clock: Clock, token: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """One position, [B, D] -> [B, D]; where its group gets its vector the levels below run once."""
        x, pre = self.pre.step(x, cache["pre"], clock)
        if self.inner is None:
            return x, {"pre": pre}
        turn, boundaries = self.boundaries.step(x, token, cache["boundaries"], clock)
        below = {name: cache[name] for name in ("shorten", "inner", "upsample")}
        if turn.gathers:
            short, below["shorten"] = self.shorten.step(turn.x, turn.groups, below["shorten"], clock)
            turn = turn._replace(x=short)
        n_due, few = turn.due.sum(), self.boundaries.few(len(x))
        if few:  # a condition of its own: where one of three ways is chosen, XLA copies the cache
            due = (n_due > 0) & (n_due <= few)
            below = lax.cond(due, partial(self.step_few, turn, few), lambda below: below, below)
        below = lax.cond(n_due > few, partial(self.step_below, turn), lambda below: below, below)
        up = self.upsample.step(x, turn.groups, below["upsample"], clock)
        x, post = self.post.step(self.add_upsampled(x, up), cache["post"], clock)
        return x, {"pre": pre, "boundaries": boundaries, "post": post} | below

    def step_few(self, turn: Turn, n_rows: int, cache: dict[str, Any]) -> dict[str, Any]:
        """`step_below` for a batch of `n_rows`, among them all whose turn it is."""
        rows = jnp.argsort(~turn.due)[:n_rows]
        return with_rows(cache, rows, self.step_below(turn.of_rows(rows), of_rows(cache, rows)))

    def step_below(self, turn: Turn, cache: dict[str, Any]) -> dict[str, Any]:
        """Shortens the group whose turn it is, and runs the inner Hourglass."""
        assert self.inner is not None
        short, shorten = turn.x, cache["shorten"]
        if not turn.gathers:
            short, shorten = self.shorten.step(turn.x, turn.groups, shorten, turn.clock)
        short, inner = self.inner.step(short, cache["inner"], turn.clock)
        upsample = self.upsample.receive(short, turn.groups, cache["upsample"], turn.clock)
        return {"shorten": shorten, "inner": inner, "upsample": upsample}


class HourglassLM(nnx.Module):
    """Hourglass language model: `HourglassLM(config, rngs=nnx.Rngs(0))` draws its parameters from the seed 0.

    `logits = model(tokens)`: int [B, L] -> float [B, L, vocab_size], for any L; `logits[:, t]` predicts token t + 1
    from the tokens <= t. `model(tokens, key)` draws dropout from `key`; without a key, or after `model.eval()`, there
    is none. With causal=False `logits[:, t]` are for token t, from all tokens; `model(tokens, mask=mask)`, bool [B, L],
    from those where it is True: the others are padding.

    Raises UsageError for more than `max_length` tokens with learned positions, for tokens outside the vocabulary,
    unless they are traced, and for dtype='float64' where JAX has it switched off.

    `score` has log probabilities, `generate` samples, `summary` shows what the levels have and cost.
    """

    def __init__(self, config: HourglassConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(1.0)  # as in Trax: a smaller token would drown in what the first layers add
        self.embedding = nnx.Embed(
            config.vocab_size, config.d_model, embedding_init=init, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        learned = config.positions == "learned"
        table_shape = (config.max_length, config.d_model)
        self.positions = nnx.Param(init(rngs.params(), table_shape, jnp.float32)) if learned else None
        self.dropout = Dropout(config.dropout)
        self.hourglass = Hourglass(config, config.parsed_hierarchy.levels, rngs=rngs)
        self.norm = layer_norm(config, rngs=rngs) if config.norm == "final" else None
        self.head = linear(config, config.d_model, config.vocab_size, rngs=rngs)
        self.head.preferred_element_type = at_least_float32(config.dtype)  # bfloat16 would tie logits

    def __call__(self, tokens: jax.Array, key: jax.Array | None = None, *, mask: jax.Array | None = None) -> jax.Array:
        return self.read(tokens, key, mask)[0]

    def with_losses(
        self,
        tokens: jax.Array,
        key: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """As a call; what learned boundaries add to the mean loss in nats, float []; and figures of all events.

        `weights` [B, L]: how much each token counts there (default: 1). See `nn.rates.boundary_terms`.
        `row_keys` [B]: of which boundaries draw their noise, row by row (default: from `key`).
        """
        logits, groups = self.read(tokens, key, mask, row_keys)
        weights = jnp.ones(logits.shape[:2]) if weights is None else jnp.asarray(weights)
        levels = zip(self.hourglass.rules(), groups, strict=True)
        loss, figures = boundary_terms(levels, weights, entropies(logits))
        return logits, self.config.boundary_weight * loss, figures

    def read(
        self,
        tokens: jax.Array,
        key: jax.Array | None,
        mask: jax.Array | None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Groups]]:
        """A call, and the groups that each shortening makes, outermost first."""
        if key is not None:
            check_key(key)
        return self.with_groups(self.embed(tokens), key, jnp.asarray(tokens), mask, row_keys)

    def __repr__(self) -> str:
        c = self.config
        sizes = f"d_model={c.d_model}, n_heads={c.n_heads}, d_ff={c.d_ff}, vocab_size={c.vocab_size}"
        methods = f"{c.shortening} down, {c.upsampling} up, {c.positions} positions"
        methods += "" if c.causal else ", both ways"
        return f"HourglassLM({c.hierarchy!r}, {sizes}, {methods}): {n_parameters(self):,} parameters"

    __str__ = __repr__

    def reconfigured(self, config: HourglassConfig) -> HourglassLM:
        """The same parameters, shared and not copied, in another configuration; raises UsageError unless they fit."""
        other = nnx.eval_shape(lambda: HourglassLM(config, rngs=nnx.Rngs(0)))
        other.eval() if self.dropout.deterministic else other.train()
        graph, needed = nnx.split(other)
        parameters = nnx.state(self)
        shapes, wanted = (
            {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
            for state in (parameters, needed)
        )
        if shapes != wanted:
            [*_, name] = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
            raise UsageError(
                f"the parameters do not fit the configuration: {name} has the shape {shapes.get(name)} and would need "
                f"{wanted.get(name)}; choose the sizes, methods and vocabulary they were trained with"
            )
        return nnx.merge(graph, parameters)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [B, L] -> [B, L, D], learned positions included."""
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B, L"))
        length = tokens.shape[1]
        if not isinstance(length, int):
            check_symbolic_length(self.config)
        if self.positions is not None and length > self.config.max_length:
            raise UsageError(
                f"{length} tokens, but learned positions end at max_length={self.config.max_length}; give fewer "
                "tokens, or train with positions='relative' or 'rotary'"
            )
        return self.embed_at(tokens, jnp.arange(length)[None])

    def embed_at(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int [...] -> [..., D]; positions [...] matter where they are learned, those of padding may lie outside."""
        check_x64(self.config)
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        return x + self.positions[jnp.clip(positions, 0, self.config.max_length - 1)].astype(x.dtype)

    def from_embeddings(self, x: jax.Array, key: jax.Array | None = None, tokens: jax.Array | None = None) -> jax.Array:
        """[B, L, D] -> logits [B, L, V], float32 at least; `tokens` [B, L] where boundaries are read off them."""
        return self.with_groups(x, key, tokens)[0]

    def with_groups(
        self,
        x: jax.Array,
        key: jax.Array | None,
        tokens: jax.Array | None,
        mask: jax.Array | None = None,
        row_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Groups]]:
        """As `from_embeddings`, and the groups that each shortening makes, outermost first."""
        if mask is not None:
            mask = jnp.asarray(check_mask(mask, x.shape[:2], self.config))
        embedding_key, body_key = split_key(key, 2)
        x = self.dropout(x, embedding_key)
        x, groups = self.hourglass.with_groups(x, body_key, tokens, mask, row_keys)
        return self.logits(x), groups

    def logits(self, x: jax.Array) -> jax.Array:
        """The Hourglass's output [..., D] -> logits [..., V], float32 at least."""
        return self.head(x if self.norm is None else self.norm(x))

    def init_cache(self, batch: int, max_length: int, context: int | None = None) -> Cache:
        """Room for `max_length` tokens a row, of which it may see `context` (default: all); multiples of K."""
        check_decodes(self.config)
        check_x64(self.config)
        factor = self.config.shared_factor
        context = max_length if context is None else context
        if max_length % factor or context % factor:
            raise UsageError(
                f"max_length={max_length} and context={context} must be multiples of {factor}, the groups' length; use "
                "hg.init_cache, which rounds up"
            )
        origin, start = jnp.zeros((2, batch), jnp.int32)  # two buffers, so that a loop may be given both to reuse
        return Cache(
            clock=Clock(jnp.zeros((), jnp.int32), origin, start),
            levels=self.hourglass.init_cache(batch, max_length, context),
            max_length=max_length,
            context=context,
            factor=factor,
        )

    def prefill(
        self, tokens: jax.Array, start: jax.Array, cache: Cache, origin: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads tokens [B, L] into an empty cache in one pass -> logits [B, L, V], meaningless for padding.

        Row b begins at start[b], or did so at origin[b] <= start[b] and is read from there on. All are multiples of K,
        L too; raises UsageError where they are not, and for tokens without a place in the cache.
        """
        check_decodes(self.config)
        origin = start if origin is None else origin
        if np.ndim(tokens) == 2 and not np.shape(tokens)[1]:
            return jnp.zeros((*np.shape(tokens), self.config.vocab_size)), cache
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B, L"))
        cache.check_prompts(*tokens.shape, start, origin)
        clock = Clock(jnp.asarray(tokens.shape[1], jnp.int32), jnp.asarray(origin), jnp.asarray(start))
        x = self.embed_at(tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] - clock.origin[:, None])
        x, levels = self.hourglass.prefill(x, cache.levels, clock, tokens)
        return self.logits(x), replace(cache, clock=clock, levels=levels)

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token a row, int [B] -> logits [B, V] of the next one. Raises UsageError where the cache is full."""
        check_decodes(self.config)
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B"))
        cache.check_room(len(tokens))
        clock = cache.now()
        x, levels = self.hourglass.step(self.embed_at(tokens, clock.time - clock.origin), cache.levels, clock, tokens)
        return self.logits(x), replace(cache, clock=replace(clock, time=clock.time + 1), levels=levels)
