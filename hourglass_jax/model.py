"""The Hourglass (Algorithm 1 of the paper) and the language model around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from hourglass_jax.checks import check_key, check_tokens, check_x64
from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Level
from hourglass_jax.nn.cache import Cache, Clock
from hourglass_jax.nn.layers import Dropout, layer_norm, linear, split_key
from hourglass_jax.nn.resampling import SHORTENINGS, UPSAMPLINGS, to_groups
from hourglass_jax.nn.transformer import Stack


def n_parameters(module: nnx.Module | None) -> int:
    """Trainable parameters, of an abstract module too."""
    return 0 if module is None else sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


class Hourglass(nnx.Module):
    """Pre stack, shorten, inner Hourglass, upsample, post stack; at the innermost level a stack alone (Algorithm 1).

    `y = hourglass(x)`: [B, L, D] -> [B, L, D], y[:, t] a function of x[:, :t + 1]. Built of the levels of a hierarchy,
    `Hourglass(config, config.parsed_hierarchy.levels, rngs=rngs)`; vocabulary and embedding are `HourglassLM`'s.
    """

    def __init__(self, config: HourglassConfig, levels: Sequence[Level], *, rngs: nnx.Rngs):
        level, *inner = levels
        self.unit = level.factor
        self.d_model, self.dtype = config.d_model, config.dtype
        self.pre = Stack(config, level.pre_layers, level.factor, rngs=rngs)
        self.inner = Hourglass(config, inner, rngs=rngs) if inner else None
        if inner:
            k = level.shorten_factor
            self.shorten_factor = k
            self.shift = k if config.shift == "original" else k - 1
            self.shorten = SHORTENINGS[config.shortening](config, k, level.factor, rngs=rngs)
            self.upsample = UPSAMPLINGS[config.upsampling](config, k, level.factor, rngs=rngs)
            self.upsample_norm = layer_norm(config, rngs=rngs) if config.norm == "stack" else None
            self.post = Stack(config, level.post_layers, level.factor, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, L, D] -> [B, L, D], for any L; `key` turns dropout on."""
        keys = split_key(key, 5)
        x = self.pre(x, keys[0])
        if self.inner is None:
            return x
        # The shift by k-1 is the smallest that leaks nothing: a group's vector serves all k positions of the
        # group, so it may hold nothing newer than the group's first position.
        short = self.shorten(to_groups(x, self.shorten_factor, self.shift), key=keys[1])
        short = self.inner(short, keys[2])
        up = self.upsample(to_groups(x, self.shorten_factor), short, key=keys[3])
        return self.post(self.add_upsampled(x, up.reshape(x.shape[0], -1, x.shape[2])), keys[4])

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
        up = up[:, : x.shape[1]] if x.ndim == 3 else up
        return x + (up if self.upsample_norm is None else self.upsample_norm(up))

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        """What decoding remembers at this level and below; `max_length` in tokens."""
        cache: dict[str, Any] = {"pre": self.pre.init_cache(batch, max_length)}
        if self.inner is not None:
            cache |= {
                # The outputs of the pre stack that the next group is made of.
                "window": jnp.zeros((batch, self.shift + 1, self.d_model), self.dtype),
                "shorten": self.shorten.init_cache(batch, max_length),
                "inner": self.inner.init_cache(batch, max_length),
                "upsample": self.upsample.init_cache(batch, max_length),
                "post": self.post.init_cache(batch, max_length),
            }
        return cache

    def prefill(self, x: jax.Array, cache: dict[str, Any], start: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """A call on rows [B, L, D] that begin at `start` [B] tokens, with L whole groups, which fills the cache."""
        x, pre = self.pre.prefill(x, cache["pre"], start)
        if self.inner is None:
            return x, {"pre": pre}
        begun = jnp.arange(x.shape[1]) >= start[:, None] // self.unit
        known = jnp.where(begun[..., None], x, 0)  # the shift brings in zeros, not padding
        window = jnp.concatenate([cache["window"], known], axis=1)[:, -self.shift - 1 :]
        short = to_groups(known, self.shorten_factor, self.shift)
        short, shorten = self.shorten.prefill(short, cache["shorten"], start)
        short, inner = self.inner.prefill(short, cache["inner"], start)
        groups = to_groups(x, self.shorten_factor)
        up, upsample = self.upsample.prefill(groups, short, cache["upsample"], start)
        x, post = self.post.prefill(self.add_upsampled(x, up.reshape(x.shape)), cache["post"], start)
        cache = {"pre": pre, "window": window, "shorten": shorten, "inner": inner, "upsample": upsample, "post": post}
        return x, cache

    def step(self, x: jax.Array, cache: dict[str, Any], clock: Clock) -> tuple[jax.Array, dict[str, Any]]:
        """One position, [B, D] -> [B, D]; the first position of a group lets the levels below run once."""
        x, pre = self.pre.step(x, cache["pre"], clock)
        if self.inner is None:
            return x, {"pre": pre}
        window = jnp.concatenate([cache["window"][:, 1:], x[:, None]], axis=1)
        begins_group = clock.time // self.unit % self.shorten_factor == 0
        below = {name: cache[name] for name in ("shorten", "inner", "upsample")}
        below = lax.cond(begins_group, self.step_below, lambda window, below, clock: below, window, below, clock)
        up = self.upsample.step(x, below["upsample"], clock)
        x, post = self.post.step(self.add_upsampled(x, up), cache["post"], clock)
        return x, {"pre": pre, "window": window, "post": post} | below

    def step_below(self, window: jax.Array, cache: dict[str, Any], clock: Clock) -> dict[str, Any]:
        """Shortens the group whose first position is the newest of the window, and runs the inner Hourglass."""
        assert self.inner is not None
        short, shorten = self.shorten.step(window[:, : self.shorten_factor], cache["shorten"], clock)
        short, inner = self.inner.step(short, cache["inner"], clock)
        upsample = self.upsample.receive(short, cache["upsample"], clock)
        return {"shorten": shorten, "inner": inner, "upsample": upsample}


class HourglassLM(nnx.Module):
    """Hourglass language model: `HourglassLM(config, rngs=nnx.Rngs(0))` draws its parameters from the seed 0.

    `logits = model(tokens)`: int [B, L] -> float [B, L, vocab_size], for any L; `logits[:, t]` predicts token t + 1
    from the tokens <= t. `model(tokens, key)` draws dropout from `key`; without a key, or after `model.eval()`, there
    is none.

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

    def __call__(self, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if key is not None:
            check_key(key)
        return self.from_embeddings(self.embed(tokens), key)

    def __repr__(self) -> str:
        c = self.config
        sizes = f"d_model={c.d_model}, n_heads={c.n_heads}, d_ff={c.d_ff}, vocab_size={c.vocab_size}"
        methods = f"{c.shortening} down, {c.upsampling} up, {c.positions} positions"
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
        if length > self.config.position_limit:
            raise UsageError(
                f"{length} tokens, but learned positions end at max_length={self.config.max_length}; give fewer "
                "tokens, or train with positions='relative' or 'rotary'"
            )
        return self.embed_at(tokens, jnp.arange(length))

    def embed_at(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """int [...] -> [..., D]; positions [...] matter where they are learned, those of padding may lie outside."""
        check_x64(self.config)
        x = self.embedding(tokens)
        if self.positions is None:
            return x
        return x + self.positions[jnp.clip(positions, 0, self.config.max_length - 1)].astype(x.dtype)

    def from_embeddings(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """[B, L, D] -> logits [B, L, V], float32 at least."""
        embedding_key, body_key = split_key(key, 2)
        return self.logits(self.hourglass(self.dropout(x, embedding_key), body_key))

    def logits(self, x: jax.Array) -> jax.Array:
        """The Hourglass's output [..., D] -> logits [..., V], float32 at least."""
        logits = self.head(x if self.norm is None else self.norm(x))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def init_cache(self, batch: int, max_length: int, context: int | None = None) -> Cache:
        """Room for `max_length` tokens a row, of which it may see `context` (default: all); multiples of K."""
        check_x64(self.config)
        factor = self.config.parsed_hierarchy.total_factor
        context = max_length if context is None else context
        origin, start = jnp.zeros((2, batch), jnp.int32)  # two buffers, so that a loop may be given both to reuse
        return Cache(
            clock=Clock(jnp.zeros((), jnp.int32), origin, start),
            levels=self.hourglass.init_cache(batch, max_length),
            max_length=max_length,
            context=context,
            factor=factor,
        )

    def prefill(
        self, tokens: jax.Array, start: jax.Array, cache: Cache, origin: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads tokens [B, L] into an empty cache in one pass -> logits [B, L, V], meaningless for padding.

        Row b begins at start[b], or did so at origin[b] <= start[b] and is read from there on. All are multiples of K.
        """
        if not tokens.shape[1]:
            return jnp.zeros((*tokens.shape, self.config.vocab_size)), cache
        clock = Clock(jnp.asarray(tokens.shape[1], jnp.int32), start if origin is None else origin, start)
        x = self.embed_at(tokens, jnp.arange(tokens.shape[1]) - clock.origin[:, None])
        x, levels = self.hourglass.prefill(x, cache.levels, start)
        return self.logits(x), replace(cache, clock=clock, levels=levels)

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token a row, int [B] -> logits [B, V] of the next one. Raises UsageError where the cache is full."""
        tokens = jnp.asarray(check_tokens("tokens", tokens, self.config.vocab_size, "B"))
        cache.check_room(len(tokens))
        clock = cache.now()
        x, levels = self.hourglass.step(self.embed_at(tokens, clock.time - clock.origin), cache.levels, clock)
        return self.logits(x), replace(cache, clock=replace(clock, time=clock.time + 1), levels=levels)
