"""Model configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.ranges import check_choice, check_literals, check_range, plain, take_plain_values
from hourglass_jax.recipes import RECIPES
from hourglass_jax.registry import BOUNDARIES, SHORTENINGS, UPSAMPLINGS

OF_TOKENS = ("whitespace", "spacelike", "tokens")  # boundaries that depend on tokens
BY_LEVEL = ("d_model", "n_heads", "d_ff", "window")  # options that may differ between levels


@dataclass(frozen=True)
class HourglassConfig:
    """Model configuration: a validated, frozen dataclass. Defaults: the paper's enwik8 ablation model (section 3).

    vocab_size: number of tokens; they are 0 .. vocab_size - 1.
    hierarchy: the paper's notation, layers@factor with total factors; see `Hierarchy`. Stored in normalized form.
    d_model, d_ff: width of a position's vector and of the hidden layer of feed-forward networks. These and n_heads are
        one number, or one for each level, outermost first. Shortening and upsampling have the width of the outer level;
        linear maps lead into and out of a level of another width.
    n_heads: attention heads; must divide d_model unless d_head is given.
    d_head: width of a head; 0: d_model / n_heads.
    shortening: average | select | linear | attention_average | attention_linear, or a key of `registry.SHORTENINGS`.
    upsampling: repeat | smooth | linear | attention | attention_repeat | attention_linear, or a key of
        `registry.UPSAMPLINGS`.
    boundaries: where groups end. fixed (every k positions) | whitespace | spacelike (first of each run of such tokens)
        | tokens (each of `boundary_tokens`) | router | gumbel | entropy (learned), or a key of `registry.BOUNDARIES`.
        Except for fixed, k is the expected group length. One name sets the first shortening and leaves the others
        fixed; several names, separated by spaces, set one for each shortening.
    boundary_tokens: tokens that end a group. Empty: a vocabulary of 256 or more is treated as bytes.
    boundary_slack: allowed groups for each expected one, plus four; boundaries beyond this limit are dropped.
    boundary_weight: scales the losses of learned boundaries, which have their papers' weights (router 0.03, others 1).
    positions: relative (Transformer-XL) | rotary | learned (absolute, added to the embeddings).
    dropout: probability, applied to embeddings, attention weights and both residual branches of a block.
    max_length: tokens; limits learned positions and sets the default cache size.
    activation: gelu (tanh form) | gelu_exact (with erf, as in PyTorch) | relu | relu_squared | swiglu (gated by another
        projection; its hidden layer has 2/3 d_ff units, so that the number of parameters is the same).
    normalization: layer (mean and variance, with bias) | rms (root mean square, without bias).
    qk_norm: whether to normalize each head's queries and keys by their root mean square, with learned scales.
    residual_init: of the layers that end a residual branch. random (as other kernels) | zero.
    input_residual: whether each layer's input is a x + b x0 with learned scalars a, b (1 and 0 at first), where x0 is
        the input of the level.
    logit_softcap: c of the capped logits, c tanh(logits / c); 0: no cap.
    ngram_sizes: sizes of byte n-grams (BLT), e.g. (2, 3, 4). The n-grams that end at a token are hashed into tables of
        embeddings, zero at first, and added to the token's embedding. Empty: none. See `nn.ngrams`.
    ngram_buckets: rows of the table of each size.
    qkv_bias: whether query, key and value projections have biases.
    initialization: distribution of kernels. normal (deviation 0.02) | xavier (uniform). Embeddings have deviation 1.
    norm: stack (after each stack and each upsampling, as in Trax) | final (before the head only).
    shift: paper (k - 1) | original (k, as in the original project: one position more than causality requires).
    causal: if False, predictions depend on both sides, and nothing is shifted. The last token of the vocabulary is the
        mask token, which exists only in the model; see `objective`. Such a model cannot generate.
    dtype: of computation, float32 | bfloat16 | float64 (requires JAX_ENABLE_X64); parameters stay float32.
    max_unrolled_layers: deeper stacks are scanned, so that compile time stays constant. The limit doubles on GPUs.
    attention: implementation; all give the same result. auto (the best for platform, dtype, head size, positions and
        dropout) | blocked (jnp, memory linear in length) | fused (cuDNN on GPUs, splash attention on TPUs; falls back
        to blocked with relative positions or dropout) | kernel (Pallas, supports both; interpreted on CPUs, for
        tests) | plain (the formula in jnp, the only one that supports forward-mode derivatives) | biased, stored
        (experiments with relative positions on GPUs).
    window: layers on the tokens (factor 1) attend to the W newest tokens; 0: all. Deeper layers and resampling attend
        to everything, so the distant past remains visible at lower resolution. Several numbers, one for each level,
        limit deeper layers to as many of their own positions.
    token_attention: of layers on the tokens. full | lsh (Reformer's, section 3.3: linear in length, but not strictly
        causal, and without decoding; see `nn.attention.lsh`). lsh excludes relative positions and windows.
    lsh_chunk, lsh_hashes: positions per chunk after sorting by hash, and the number of hash rounds.
    remat: what the backward pass recomputes: none | dots (all but matrix products) | full (layers) | auto (full for
        scanned stacks, otherwise none).

    Raises UsageError for values out of range and for options that exclude each other.
    """

    vocab_size: int
    hierarchy: str = "2@1 8@3 2@1"
    d_model: int | tuple[int, ...] = 512
    n_heads: int | tuple[int, ...] = 8
    d_ff: int | tuple[int, ...] = 2048
    d_head: int = 0
    shortening: str = "attention_average"
    upsampling: str = "attention_linear"
    boundaries: str = "fixed"
    boundary_tokens: tuple[int, ...] = ()
    boundary_slack: float = 1.5
    boundary_weight: float = 1.0
    positions: Literal["relative", "rotary", "learned"] = "relative"
    dropout: float = 0.0
    max_length: int = 2048
    activation: Literal["gelu", "gelu_exact", "relu", "relu_squared", "swiglu"] = "gelu"
    normalization: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    residual_init: Literal["random", "zero"] = "random"
    input_residual: bool = False
    logit_softcap: float = 0.0
    ngram_sizes: tuple[int, ...] = ()
    ngram_buckets: int = 16_384
    qkv_bias: bool = False
    initialization: Literal["normal", "xavier"] = "normal"
    norm: Literal["stack", "final"] = "stack"
    shift: Literal["paper", "original"] = "paper"
    causal: bool = True
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    max_unrolled_layers: int = 4
    attention: Literal["auto", "blocked", "fused", "kernel", "plain", "biased", "stored"] = "auto"
    window: int | tuple[int, ...] = 0
    token_attention: Literal["full", "lsh"] = "full"
    lsh_chunk: int = 128
    lsh_hashes: int = 2
    remat: Literal["auto", "none", "dots", "full"] = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hierarchy", str(Hierarchy.parse(self.hierarchy)))
        take_plain_values(self)
        check_literals(self)
        for name in BY_LEVEL:
            if isinstance(size := getattr(self, name), tuple) and len(size) == 1:
                object.__setattr__(self, name, size[0])
        check_range("vocab_size", self.vocab_size, 1)
        check_range("max_length", self.max_length, 2)
        for name in ("max_unrolled_layers", "d_head"):
            check_range(name, getattr(self, name), 0)
        check_range("dropout", self.dropout, 0.0, 1, open_high=True)
        check_range("logit_softcap", self.logit_softcap, 0.0)
        self.check_sizes()
        self.check_ngrams()
        check_choice("shortening", self.shortening, SHORTENINGS)
        check_choice("upsampling", self.upsampling, UPSAMPLINGS)
        for name in ("lsh_chunk", "lsh_hashes"):
            check_range(name, getattr(self, name), 1)
        windowed = any(self.by_level("window"))
        if self.token_attention == "lsh" and (self.positions == "relative" or windowed):
            what = f"window={self.window}" if windowed else "positions='relative'"
            raise UsageError(
                f"token_attention='lsh' does not support {what}; choose positions='rotary' or 'learned', window=0"
            )
        self.check_boundaries()
        for name in ("causal", "qk_norm", "input_residual"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r} is not a bool; choose True or False")
        if not self.causal:
            self.check_bidirectional()

    def check_sizes(self) -> None:
        """Raise UsageError for sizes out of range, or that do not fit the levels or each other."""
        n_levels = len(self.parsed_hierarchy.levels)
        for name in BY_LEVEL:
            sizes = self.by_level(name)
            for size in sizes:
                check_range(name, size, 0 if name == "window" else 1)
            if len(sizes) != n_levels:
                raise UsageError(
                    f"{name}={getattr(self, name)} has {len(sizes)} numbers, but hierarchy='{self.hierarchy}' has "
                    f"{n_levels} levels; give one number, or one for each level, outermost first"
                )
        for d_model, n_heads in zip(self.by_level("d_model"), self.by_level("n_heads"), strict=True):
            if not self.d_head and d_model % n_heads:
                raise UsageError(
                    f"n_heads={n_heads} does not divide d_model={d_model}; choose another n_heads, or set d_head"
                )
            if self.positions == "rotary" and (head_dim := self.d_head or d_model // n_heads) % 2:
                raise UsageError(f"positions='rotary' requires an even head size, not {head_dim}")

    def check_ngrams(self) -> None:
        """Raise UsageError for n-grams of fewer than two tokens, repeated sizes, and tables without rows."""
        if not isinstance(self.ngram_sizes, tuple):
            raise UsageError(f"ngram_sizes={self.ngram_sizes!r} is not a tuple; give sizes, e.g. (2, 3, 4)")
        for size in self.ngram_sizes:
            check_range("ngram_sizes", size, 2)
        if len(set(self.ngram_sizes)) < len(self.ngram_sizes):
            raise UsageError(f"ngram_sizes={self.ngram_sizes} repeats a size; give each size once")
        check_range("ngram_buckets", self.ngram_buckets, 1)

    def check_bidirectional(self) -> None:
        """Raise UsageError for options that require causal=True."""
        check_range("vocab_size", self.vocab_size, 2)
        for name, fits, choice in (
            ("boundaries", not self.event_levels, "fixed"),
            ("window", not any(self.by_level("window")), "0"),
            ("token_attention", self.token_attention == "full", "full"),
            ("shift", self.shift == "paper", "paper, which then shifts nothing"),
            ("attention", self.attention in ("auto", "blocked", "plain"), "auto, blocked or plain"),
        ):
            if not fits:
                given = f"{name}={getattr(self, name)!r}"
                raise UsageError(f"causal=False does not support {given}; choose {choice}")

    def check_boundaries(self) -> None:
        """Raise UsageError for boundaries that do not fit the hierarchy, the vocabulary or the resampling methods."""
        if isinstance(self.boundary_tokens, str) or not isinstance(self.boundary_tokens, Iterable):
            raise UsageError(
                f"boundary_tokens={self.boundary_tokens!r} is not a list of tokens; encode them with the tokenizer"
            )
        object.__setattr__(self, "boundary_tokens", tuple(map(plain, self.boundary_tokens)))
        check_range("boundary_slack", self.boundary_slack, 1.0)
        check_range("boundary_weight", self.boundary_weight, 0.0)
        names, n_shortenings = str(self.boundaries).split(), len(self.parsed_hierarchy.levels) - 1
        for name in names:
            check_choice("boundaries", name, BOUNDARIES)
        if len(names) not in (1, n_shortenings):
            given = f"boundaries={self.boundaries!r} has {len(names)} names, but hierarchy='{self.hierarchy}' shortens"
            raise UsageError(f"{given} {n_shortenings} times; give one name, or one for each shortening")
        for token in self.boundary_tokens:
            check_range("boundary_tokens", token, 0, self.vocab_size - 1)
        if not self.event_levels:
            return
        if set(names[1:]) & set(OF_TOKENS):
            raise UsageError(f"boundaries={self.boundaries!r}: only the first shortening can depend on tokens")
        if names[0] in OF_TOKENS and not self.boundary_tokens and (names[0] == "tokens" or self.vocab_size < 256):
            raise UsageError(
                f"boundaries={names[0]!r} requires boundary_tokens with a vocabulary of {self.vocab_size} tokens; "
                "only whitespace and spacelike have a default, for vocabularies of 256 or more, treated as bytes"
            )
        for option, value in (("shortening", self.shortening), ("upsampling", self.upsampling)):
            if "linear" in value:
                raise UsageError(
                    f"{option}={value!r} requires groups of equal length, unlike boundaries={self.boundaries!r}; "
                    f"choose {'average' if option == 'shortening' else 'repeat'}, or the same with attention"
                )

    @property
    def boundaries_by_level(self) -> tuple[str, ...]:
        """The rule of each shortening, outermost first; fixed becomes `every` below variable boundaries."""
        n_shortenings = len(self.parsed_hierarchy.levels) - 1
        names = [*self.boundaries.split(), *["fixed"] * n_shortenings][:n_shortenings]
        n_fixed = next((i for i, name in enumerate(names) if name != "fixed"), n_shortenings)
        return (*names[:n_fixed], *("every" if name == "fixed" else name for name in names[n_fixed:]))

    def ends_by_events(self, factor: int) -> bool:
        """Return whether variable boundaries shorten the level of this total factor."""
        return factor >= self.shared_factor and self.event_levels > 0

    @property
    def event_levels(self) -> int:
        """Number of shortenings with variable boundaries; these are the innermost ones."""
        return sum(name != "fixed" for name in self.boundaries_by_level)

    @property
    def shared_factor(self) -> int:
        """K: the total factor of the fixed shortenings; decoding aligns the rows of a batch to multiples of it."""
        levels = self.parsed_hierarchy.levels
        return levels[len(levels) - 1 - self.event_levels].factor

    def by_level(self, name: str) -> tuple[int, ...]:
        """Return an option of BY_LEVEL for each level, outermost first; a single window is that of the tokens."""
        value = getattr(self, name)
        if isinstance(value, tuple):
            return value
        deeper = 0 if name == "window" else value
        return (value, *[deeper] * (len(self.parsed_hierarchy.levels) - 1))

    def at_level(self, index: int) -> LevelConfig:
        """Return the configuration of the modules of a level, outermost first: sizes are single numbers."""
        return LevelConfig(**(vars(self) | {name: self.by_level(name)[index] for name in BY_LEVEL}))

    @property
    def ngram_history(self) -> int:
        """Number of tokens before a token on which its embedding depends."""
        return max(self.ngram_sizes, default=1) - 1

    @property
    def decodes(self) -> bool:
        """Whether the model supports cached decoding: no prediction depends on later tokens."""
        return self.causal and self.token_attention == "full"

    @property
    def tokenizer_size(self) -> int:
        """Vocabulary size of the tokenizer, which excludes the mask token of a model with causal=False."""
        return self.vocab_size if self.causal else self.vocab_size - 1

    @property
    def position_limit(self) -> float:
        """Longest supported sequence in tokens: `max_length` with learned positions, otherwise infinite."""
        return self.max_length if self.positions == "learned" else math.inf

    def remat_of(self, *, unrolled: bool) -> str:
        """Resolve `remat` for a stack: 'auto' recomputes the layers of scanned stacks only.

        On a CPU the gradient of a plain scan takes longer than that of a rematerialized one.
        """
        chosen = "none" if unrolled else "full"
        return chosen if self.remat == "auto" else self.remat

    @property
    def parsed_hierarchy(self) -> Hierarchy:
        """The hierarchy with its levels and factors."""
        return Hierarchy.parse(self.hierarchy)

    @classmethod
    def original_project(
        cls,
        *,
        vocab_size: int,
        factors: Sequence[int] = (3, 1, 8, 4),
        n_embedding: int = 512,
        n_heads: int = 6,
        block_size: int = 256,
        **overrides: Any,
    ) -> HourglassConfig:
        """Return the exact architecture of the PyTorch project that this library grew out of.

        Learned absolute positions, ReLU, linear pooling, repeat upsampling, a final norm only, shift by k. As in its
        code, each factor multiplies the ones before it. `n_heads` need not divide `n_embedding`: the defaults are 6
        heads of width 85 in 512.
        """
        options: dict[str, Any] = {
            "hierarchy": str(Hierarchy.from_factors(factors, relative=True)),
            "d_model": n_embedding,
            "n_heads": n_heads,
            "d_head": n_embedding // n_heads,
            "d_ff": 4 * n_embedding,
            "max_length": block_size,
        }
        return cls(vocab_size=vocab_size, **{**RECIPES["original"].model, **options, **overrides})

    @classmethod
    def modern(cls, *, vocab_size: int, **options: Any) -> HourglassConfig:
        """Return a configuration with the modern recipe's methods, see `recipes.RECIPES`; `options` override them.

        Train it with `OptimizerConfig(optimizer="muon")`.
        """
        return cls(vocab_size=vocab_size, **{**RECIPES["modern"].model, **options})


@dataclass(frozen=True)
class LevelConfig(HourglassConfig):
    """The configuration of the modules of one level, see `HourglassConfig.at_level`: sizes are single numbers."""

    d_model: int = 512
    n_heads: int = 8
    d_ff: int = 2048
    window: int = 0

    @property
    def head_dim(self) -> int:
        """Width of a head's queries, keys and values."""
        return self.d_head or self.d_model // self.n_heads
