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
from jaxtyping import Array, Bool, Float, Int

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
from hourglass_jax.nn.boundaries import InnerStep
from hourglass_jax.nn.cache import Cache, Clock, in_own_time, of_rows, with_rows
from hourglass_jax.nn.groups import Groups
from hourglass_jax.nn.layers import Dropout, at_least_float32, keys_of_rows, linear, normalization, split_key
from hourglass_jax.nn.learned import BOUNDARIES, entropies
from hourglass_jax.nn.ngrams import BEFORE, NgramEmbedding
from hourglass_jax.nn.rates import boundary_terms
from hourglass_jax.nn.resampling import SHORTENINGS, UPSAMPLINGS
from hourglass_jax.nn.transformer import Stack


def n_parameters(module: nnx.Module | None) -> int:
    """Return the number of trainable parameters; works on abstract modules too."""
    return 0 if module is None else sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


class Hourglass(nnx.Module):
    """Pre stack, shorten, inner Hourglass, upsample, post stack; the innermost level is only a stack (Algorithm 1).

    `y = hourglass(x)`: [B, L, D] -> [B, L, D]; y[:, t] depends on x[:, :t + 1] only, unless config.causal is False.
    Constructed from the levels of a hierarchy: `Hourglass(config, config.parsed_hierarchy.levels, rngs=rngs)`.
    `HourglassLM` adds the vocabulary and the embedding.
    """

    def __init__(self, config: HourglassConfig, levels: Sequence[Level], *, rngs: nnx.Rngs):
        level, *inner = levels
        own = config.at_level(-len(levels))
        self.tokens_per_position, self.d_model = level.factor, own.d_model
        self.pre = Stack(own, level.pre_layers, level.factor, rngs=rngs)
        self.inner = Hourglass(config, inner, rngs=rngs) if inner else None
        if self.inner:
            k = level.shorten_factor
            self.boundaries = BOUNDARIES[config.boundaries_by_level[-len(inner)]](own, level, rngs=rngs)
            self.shorten = SHORTENINGS[config.shortening](own, k, level.factor, rngs=rngs)
            self.upsample = UPSAMPLINGS[config.upsampling](own, k, level.factor, rngs=rngs)
            normed = config.norm == "stack" and self.upsample.normed
            self.upsample_norm = normalization(own, rngs=rngs) if normed else None
            self.post = Stack(own, level.post_layers, level.factor, rngs=rngs)
            outer, deeper = own.d_model, self.inner.d_model
            self.to_inner = nnx.identity if outer == deeper else linear(config, outer, deeper, rngs=rngs)
            self.from_inner = nnx.identity if outer == deeper else linear(config, deeper, outer, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        key: Array | None = None,
        tokens: Int[Array, "B L"] | None = None,
        mask: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Transform a sequence of any length L.

        Args:
            key: turns dropout on.
            tokens: required by boundaries that depend on tokens.
            mask: True for positions that are not padding; only if not causal.
        """
        return self.forward(x, key, tokens, mask)[0]

    def forward(
        self,
        x: Float[Array, "B L D"],
        key: Array | None = None,
        tokens: Int[Array, "B L"] | None = None,
        mask: Bool[Array, "B L"] | None = None,
        row_keys: Array | None = None,
    ) -> tuple[Float[Array, "B L D"], list[Groups]]:
        """Return the result of `__call__`, and the groups of each shortening, outermost first.

        `row_keys` [B] seed the noise of learned boundaries, one key per row; default: derived from `key`.
        """
        keys = split_key(key, 5)
        if row_keys is None and key is not None:
            row_keys = keys_of_rows(key, x.shape[0])
        level_input = x
        x = self.pre(x, keys[0], mask)
        if self.inner is None:
            return x, []
        groups = self.boundaries(x, tokens, mask, row_keys=row_keys)
        short = self.shorten(groups.shift_right(x), groups, key=keys[1])
        check_returned(self.shorten, short, (x.shape[0], self.boundaries.n_groups(x.shape[1]), self.d_model))
        short, deeper = self.inner.forward(self.to_inner(short), keys[2], mask=groups.mask, row_keys=row_keys)
        up = self.upsample(x, self.from_inner(short), groups, key=keys[3])
        check_returned(self.upsample, up, x.shape)
        return self.post(self.add_upsampled(x, up), keys[4], mask, level_input), [groups, *deeper]

    def rules(self) -> list[nnx.Module]:
        """Return the boundary rule of each shortening, outermost first."""
        return [] if self.inner is None else [self.boundaries, *self.inner.rules()]

    def __repr__(self) -> str:
        return f"Hourglass({self.notation!r}, d_model={self.d_model}): {n_parameters(self):,} parameters"

    __str__ = __repr__

    @property
    def notation(self) -> str:
        """The hierarchy in the paper's notation, with total factors; an inner Hourglass starts at its own factor."""
        stages = f"{self.pre.n_layers}@{self.tokens_per_position}"
        return (
            stages
            if self.inner is None
            else f"{stages} {self.inner.notation} {self.post.n_layers}@{self.tokens_per_position}"
        )

    def add_upsampled(self, x: jax.Array, up: jax.Array) -> jax.Array:
        """Add the upsampled sequence to the residual around the shortened levels."""
        return x + (up if self.upsample_norm is None else self.upsample_norm(up))

    def init_cache(self, batch: int, max_length: int, context: int) -> dict[str, Any]:
        """Return an empty cache of this level and the deeper ones.

        `max_length`: tokens that fit; `context`: tokens that a row may attend to.
        """
        cache: dict[str, Any] = {"pre": self.pre.init_cache(batch, max_length)}
        if self.inner is not None:
            capacity = self.boundaries.inner_capacity(max_length, context)
            below = {
                "inner": self.inner.init_cache(batch, *capacity),
                "upsample": self.upsample.init_cache(batch, capacity[0]),
            }
            cache |= in_own_time(below) if self.boundaries.own_time else below
            cache |= {
                "boundaries": self.boundaries.init_cache(batch, max_length, context),
                "shorten": self.shorten.init_cache(*self.boundaries.step_template(batch), max_length),
                "post": self.post.init_cache(batch, max_length),
            }
        return cache

    def prefill(
        self, x: jax.Array, cache: dict[str, Any], clock: Clock, tokens: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Process rows [B, L, D] of complete groups, from `clock.start` to `clock.time`, and fill the cache."""
        level_input = x
        x, pre = self.pre.prefill(x, cache["pre"], clock.start)
        if self.inner is None:
            return x, {"pre": pre}
        known, groups, below, boundaries = self.boundaries.prefill(x, tokens, cache["boundaries"], clock)
        short, shorten = self.shorten.prefill(groups.shift_right(known), groups, cache["shorten"], clock.start)
        short, inner = self.inner.prefill(self.to_inner(short), cache["inner"], below)
        up, upsample = self.upsample.prefill(x, self.from_inner(short), groups, cache["upsample"], clock.start)
        x, post = self.post.prefill(self.add_upsampled(x, up), cache["post"], clock.start, level_input)
        parts = (pre, boundaries, shorten, inner, upsample, post)
        return x, dict(zip(("pre", "boundaries", "shorten", "inner", "upsample", "post"), parts, strict=True))

    def step(
        self, x: jax.Array, cache: dict[str, Any], clock: Clock, token: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Decode one position, [B, D] -> [B, D]; the deeper levels run if a group is due here."""
        level_input = x
        x, pre = self.pre.step(x, cache["pre"], clock)
        if self.inner is None:
            return x, {"pre": pre}
        inner_step, boundaries = self.boundaries.step(x, token, cache["boundaries"], clock)
        below = {name: cache[name] for name in ("shorten", "inner", "upsample")}
        if inner_step.gathers:
            short, below["shorten"] = self.shorten.step(inner_step.x, inner_step.groups, below["shorten"], clock)
            inner_step = inner_step._replace(x=short)
        n_due, max_partial_rows = inner_step.due.sum(), self.boundaries.max_partial_rows(len(x))
        if max_partial_rows:  # a separate condition: XLA copies the cache if one of three branches is chosen
            due = (n_due > 0) & (n_due <= max_partial_rows)
            below = lax.cond(due, partial(self.step_rows, inner_step, max_partial_rows), lambda below: below, below)
        below = lax.cond(n_due > max_partial_rows, partial(self.step_below, inner_step), lambda below: below, below)
        up = self.upsample.step(x, inner_step.groups, below["upsample"], clock)
        x, post = self.post.step(self.add_upsampled(x, up), cache["post"], clock, level_input)
        return x, {"pre": pre, "boundaries": boundaries, "post": post} | below

    def step_rows(self, inner_step: InnerStep, n_rows: int, cache: dict[str, Any]) -> dict[str, Any]:
        """Run `step_below` on only `n_rows` rows, which include all due ones."""
        rows = jnp.argsort(~inner_step.due)[:n_rows]
        return with_rows(cache, rows, self.step_below(inner_step.of_rows(rows), of_rows(cache, rows)))

    def step_below(self, inner_step: InnerStep, cache: dict[str, Any]) -> dict[str, Any]:
        """Shorten the groups that are due, and run the inner Hourglass."""
        assert self.inner is not None
        short, shorten = inner_step.x, cache["shorten"]
        if not inner_step.gathers:
            short, shorten = self.shorten.step(inner_step.x, inner_step.groups, shorten, inner_step.clock)
        short, inner = self.inner.step(self.to_inner(short), cache["inner"], inner_step.clock)
        short = self.from_inner(short)
        upsample = self.upsample.receive(short, inner_step.groups, cache["upsample"], inner_step.clock)
        return {"shorten": shorten, "inner": inner, "upsample": upsample}


class HourglassLM(nnx.Module):
    """Hourglass language model: `HourglassLM(config, rngs=nnx.Rngs(0))` initializes parameters with seed 0.

    `logits = model(tokens)`: int [B, L] -> float [B, L, vocab_size], for any L; `logits[:, t]` predicts token t + 1
    from the tokens <= t. `model(tokens, key)` applies dropout, unless `model.eval()` was called.
    With causal=False `logits[:, t]` predicts token t from all tokens; `model(tokens, mask=mask)`, bool [B, L], ignores
    padding, where the mask is False.

    Raises UsageError for more than `max_length` tokens with learned positions, for tokens outside the vocabulary (not
    checked if traced), and for dtype='float64' if JAX has 64-bit types disabled.

    See also `score` (log probabilities), `generate` (samples) and `summary` (sizes and costs by level).
    """

    def __init__(self, config: HourglassConfig, *, rngs: nnx.Rngs):
        self.config = config
        outer = config.at_level(0)
        init = nnx.initializers.normal(1.0)  # as in Trax: the first layers would drown smaller embeddings
        self.embedding = nnx.Embed(
            config.vocab_size, outer.d_model, embedding_init=init, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        learned = config.positions == "learned"
        table_shape = (config.max_length, outer.d_model)
        self.positions = nnx.Param(init(rngs.params(), table_shape, jnp.float32)) if learned else None
        self.ngrams = NgramEmbedding(outer) if config.ngram_sizes else None
        self.dropout = Dropout(config.dropout)
        self.hourglass = Hourglass(config, config.parsed_hierarchy.levels, rngs=rngs)
        self.norm = normalization(outer, rngs=rngs) if config.norm == "final" else None
        self.head = linear(config, outer.d_model, config.vocab_size, rngs=rngs)
        self.head.preferred_element_type = at_least_float32(config.dtype)  # bfloat16 logits would have ties

    def __call__(
        self, tokens: Int[Array, "B L"], key: Array | None = None, *, mask: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        return self.forward(self.embed(tokens, mask), key, jnp.asarray(tokens), mask)[0]

    def forward_with_aux(
        self,
        tokens: Int[Array, "B L"],
        key: Array | None = None,
        weights: Float[Array, "B L"] | None = None,
        *,
        mask: Bool[Array, "B L"] | None = None,
        row_keys: Array | None = None,
    ) -> tuple[Float[Array, "B L V"], Float[Array, ""], dict[str, Array]]:
        """Return the logits, the auxiliary loss of learned boundaries, and statistics of all variable boundaries.

        Add the auxiliary loss to the mean loss in nats. `weights`: the weight of each token in it (default: 1), see
        `nn.rates.boundary_terms`. `row_keys` [B] seed the noise of learned boundaries.
        """
        logits, groups = self.forward(self.embed(tokens, mask), key, jnp.asarray(tokens), mask, row_keys)
        weights = jnp.ones(logits.shape[:2], logits.dtype) if weights is None else jnp.asarray(weights, logits.dtype)
        levels = zip(self.hourglass.rules(), groups, strict=True)
        loss, statistics = boundary_terms(levels, weights, entropies(logits))
        return logits, self.config.boundary_weight * loss, statistics

    def forward(
        self,
        x: Float[Array, "B L D"],
        key: Array | None = None,
        tokens: Int[Array, "B L"] | None = None,
        mask: Bool[Array, "B L"] | None = None,
        row_keys: Array | None = None,
    ) -> tuple[Float[Array, "B L V"], list[Groups]]:
        """Map embedded tokens to logits, float32 at least, and the groups of each shortening, outermost first."""
        if key is not None:
            check_key(key)
        mask = None if mask is None else jnp.asarray(mask)
        embedding_key, body_key = split_key(key, 2)
        x, groups = self.hourglass.forward(self.dropout(x, embedding_key), body_key, tokens, mask, row_keys)
        return self.logits(x), groups

    def __repr__(self) -> str:
        c = self.config
        sizes = f"d_model={c.d_model}, n_heads={c.n_heads}, d_ff={c.d_ff}, vocab_size={c.vocab_size}"
        methods = f"{c.shortening} down, {c.upsampling} up, {c.positions} positions"
        methods += "" if c.causal else ", both ways"
        return f"HourglassLM({c.hierarchy!r}, {sizes}, {methods}): {n_parameters(self):,} parameters"

    __str__ = __repr__

    def reconfigured(self, config: HourglassConfig) -> HourglassLM:
        """Return a model with another configuration that shares these parameters. Raises UsageError unless they fit."""
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
                f"the parameters do not fit the configuration: {name} has the shape {shapes.get(name)} and requires "
                f"{wanted.get(name)}; choose the sizes, methods and vocabulary that they were trained with"
            )
        return nnx.merge(graph, parameters)

    def embed(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Embed tokens, with n-grams and learned positions if configured; `mask` is False for padding."""
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B, L"))
        if mask is not None:  # n-grams exclude padding
            tokens = jnp.where(check_mask(mask, tokens.shape, self.config), tokens.astype(jnp.int32), BEFORE)
        length = tokens.shape[1]
        if not isinstance(length, int):
            check_symbolic_length(self.config)
        if self.positions is not None and length > self.config.max_length:
            raise UsageError(
                f"{length} tokens, but learned positions end at max_length={self.config.max_length}; pass fewer "
                "tokens, or train with positions='relative' or 'rotary'"
            )
        return self.embed_at(tokens, jnp.arange(length)[None])

    def embed_at(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], history: Int[Array, "B n"] | None = None
    ) -> Float[Array, "B L D"]:
        """Embed tokens; learned positions, if configured, are those at `positions`, clipped to 0 .. max_length - 1.

        history: the tokens before them, if any, for n-grams; here and in `tokens`, `BEFORE` stands for padding.
        """
        check_x64(self.config)
        x = self.embedding(jnp.maximum(tokens, 0))
        if self.ngrams is not None:
            x += self.ngrams(tokens, history)
        if self.positions is None:
            return x
        return x + self.positions[jnp.clip(positions, 0, self.config.max_length - 1)].astype(x.dtype)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Map the Hourglass's output to logits, float32 at least, with the configured cap."""
        logits, cap = self.head(x if self.norm is None else self.norm(x)), self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def init_cache(self, batch: int, max_length: int, context: int | None = None) -> Cache:
        """Return an empty cache for `max_length` tokens per row, which attends to `context` of them (default: all).

        Both must be multiples of K, the shared factor; `hg.init_cache` rounds up.
        """
        check_decodes(self.config)
        check_x64(self.config)
        factor = self.config.shared_factor
        context = max_length if context is None else context
        if max_length % factor or context % factor:
            raise UsageError(
                f"max_length={max_length} and context={context} must be multiples of {factor}; use "
                "hg.init_cache, which rounds up"
            )
        origin, start = jnp.zeros((2, batch), jnp.int32)  # two buffers, since a loop donates both
        return Cache(
            clock=Clock(jnp.zeros((), jnp.int32), origin, start),
            levels=self.hourglass.init_cache(batch, max_length, context),
            history=jnp.full((batch, self.config.ngram_history), BEFORE, jnp.int32),
            max_length=max_length,
            context=context,
            factor=factor,
        )

    def prefill(
        self, tokens: jax.Array, start: jax.Array, cache: Cache, origin: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Process tokens [B, L] in one pass and fill an empty cache; returns logits [B, L, V], undefined for padding.

        Row b begins at start[b]; if older tokens were dropped, it began at origin[b] <= start[b]. Raises UsageError
        unless start, origin and L are multiples of K, and for tokens that exceed the cache.
        """
        check_decodes(self.config)
        origin = start if origin is None else origin
        if np.ndim(tokens) == 2 and not np.shape(tokens)[1]:
            return jnp.zeros((*np.shape(tokens), self.config.vocab_size)), cache
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B, L"))
        cache.check_prompts(*tokens.shape, start, origin)
        clock = Clock(jnp.asarray(tokens.shape[1], jnp.int32), jnp.asarray(origin), jnp.asarray(start))
        times = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        known = jnp.where(times < clock.start[:, None], BEFORE, tokens.astype(jnp.int32))
        x = self.embed_at(known, times - clock.origin[:, None], cache.history)
        x, levels = self.hourglass.prefill(x, cache.levels, clock, tokens)
        return self.logits(x), replace(cache, clock=clock, levels=levels).with_history(known)

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Decode one token per row: int [B] -> logits [B, V] of the next. Raises UsageError if the cache is full."""
        check_decodes(self.config)
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B"))
        cache.check_room(len(tokens))
        clock = cache.now()
        x = self.embed_at(tokens[:, None], (clock.time - clock.origin)[:, None], cache.history)[:, 0]
        x, levels = self.hourglass.step(x, cache.levels, clock, tokens)
        cache = cache.with_history(tokens[:, None])
        return self.logits(x), replace(cache, clock=replace(clock, time=clock.time + 1), levels=levels)
