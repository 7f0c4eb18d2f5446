"""What can be chosen of a model, as a plain frozen dataclass, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.ranges import check_choice, check_range, plain, take_plain_values
from hourglass_jax.registry import BOUNDARIES, SHORTENINGS, UPSAMPLINGS

OF_TOKENS = ("whitespace", "spacelike", "tokens")  # boundaries that are read off the tokens


@dataclass(frozen=True)
class HourglassConfig:
    """Architecture of an `HourglassLM`. The defaults are the paper's enwik8 ablation model `2@1 8@3 2@1` (section 3).

    vocab_size: of the tokens, 0 .. vocab_size - 1.
    hierarchy: the paper's notation, layers@factor with total factors; see `Hierarchy`. Stored normalised.
    d_model, d_ff: numbers in a position's vector, and in a feed-forward's hidden one.
    n_heads: of attention; divides d_model, unless d_head is given.
    d_head: numbers in a head; 0: d_model / n_heads.
    shortening: average | select | linear | attention_average | attention_linear, or another of `registry.SHORTENINGS`.
    upsampling: repeat | smooth | linear | attention | attention_repeat | attention_linear (`registry.UPSAMPLINGS`).
    boundaries: where groups end. fixed (every k positions) | whitespace | spacelike (first of each run of such tokens)
        | tokens (each of `boundary_tokens`) | router | gumbel | entropy (learned), or another of `registry.BOUNDARIES`.
        But for fixed, k is the expected length. For the first shortening; the others are fixed, or each has a name too.
    boundary_tokens: those at which a group ends. None: a vocabulary of 256 or more is read as bytes.
    boundary_slack: groups there is room for, for each that is expected, and four more; ends beyond them are left out.
    boundary_weight: of the losses of learned boundaries, times that of their papers (router 0.03, the others 1).
    positions: relative (Transformer-XL) | rotary | learned (absolute, added to the tokens).
    dropout: probability, of the embedding, attention and both residuals of a block.
    max_length: tokens; bounds learned positions and default caches.
    activation: gelu (tanh form) | gelu_exact (with erf, as PyTorch) | relu.
    qkv_bias: whether the query, key and value projections have biases.
    initialization: of weight matrices, normal (0.02) | xavier (uniform); embeddings have standard deviation 1.
    norm: stack (after every stack and every upsampling, as Trax) | final (before the head only).
    shift: paper (k-1) | original (k, the original project's, one character staler).
    causal: whether a prediction sees the past alone. False: it sees both sides, nothing is shifted, and the last token
        of the vocabulary is the mask, which its tokenizer does not have; see `masking`. There is no decoding then.
    dtype: of the computation, float32 | bfloat16 | float64 (with JAX_ENABLE_X64); parameters stay float32.
    max_unrolled_layers: deeper stacks are one scanned body, so that compile time stays flat; on GPUs those of more than
        twice as many.
    attention: how it is computed; the result is the same. auto (the best that platform, dtype, head size, positions and
        dropout allow) | blocked (jnp, in memory linear in length) | fused (cuDNN's kernel on GPUs, splash attention on
        TPUs; blocked with relative positions or dropout, which they do not know) | kernel (ours in Pallas, with both;
        interpreted on CPUs, for tests) | plain (the formula in jnp alone: for jax.jvp, Hessian-vector products and
        other forward derivatives, which the others have not, nor have boundaries but fixed).
    window: of layers on the tokens (factor 1): each sees its own and the W - 1 tokens before it; 0: all of them. Deeper
        layers and resampling see everything, so a long past is still there, coarser.
    token_attention: of layers on the tokens. full | lsh (Reformer's, section 3.3: linear in length, but not strictly
        causal, and without decoding; see `nn.attention.lsh`). Not with relative positions or a window.
    lsh_chunk, lsh_hashes: positions a chunk of sorted ones, and rounds of hashing.
    remat: what the backward pass computes again, none | dots (all but matrix products) | full (layers) | auto.

    Raises UsageError, one line, for what is out of range or does not fit together.
    """

    vocab_size: int
    hierarchy: str = "2@1 8@3 2@1"
    d_model: int = 512
    n_heads: int = 8
    d_ff: int = 2048
    d_head: int = 0
    shortening: str = "attention_average"
    upsampling: str = "attention_linear"
    boundaries: str = "fixed"
    boundary_tokens: tuple[int, ...] = ()
    boundary_slack: float = 1.5
    boundary_weight: float = 1.0
    positions: str = "relative"
    dropout: float = 0.0
    max_length: int = 2048
    activation: str = "gelu"
    qkv_bias: bool = False
    initialization: str = "normal"
    norm: str = "stack"
    shift: str = "paper"
    causal: bool = True
    dtype: str = "float32"
    max_unrolled_layers: int = 4
    attention: str = "auto"
    window: int = 0
    token_attention: str = "full"
    lsh_chunk: int = 128
    lsh_hashes: int = 2
    remat: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hierarchy", str(Hierarchy.parse(self.hierarchy)))
        take_plain_values(self)
        for name in ("vocab_size", "d_model", "n_heads", "d_ff"):
            check_range(name, getattr(self, name), 1)
        check_range("max_length", self.max_length, 2)
        for name in ("max_unrolled_layers", "d_head", "window"):
            check_range(name, getattr(self, name), 0)
        check_range("dropout", self.dropout, 0.0, 1, open_high=True)
        if not self.d_head and self.d_model % self.n_heads:
            raise UsageError(
                f"n_heads={self.n_heads} does not divide d_model={self.d_model}; choose n_heads so that every "
                "head has the same whole size, or give that size as d_head"
            )
        check_choice("shortening", self.shortening, SHORTENINGS)
        check_choice("upsampling", self.upsampling, UPSAMPLINGS)
        check_choice("positions", self.positions, ("relative", "rotary", "learned"))
        check_choice("activation", self.activation, ("gelu", "gelu_exact", "relu"))
        check_choice("initialization", self.initialization, ("normal", "xavier"))
        check_choice("norm", self.norm, ("stack", "final"))
        check_choice("shift", self.shift, ("paper", "original"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float64"))
        check_choice("attention", self.attention, ("auto", "blocked", "fused", "kernel", "plain"))
        check_choice("remat", self.remat, ("auto", "none", "dots", "full"))
        if self.positions == "rotary" and self.head_dim % 2:
            raise UsageError(f"positions='rotary' needs an even head size, not {self.head_dim}")
        check_choice("token_attention", self.token_attention, ("full", "lsh"))
        for name in ("lsh_chunk", "lsh_hashes"):
            check_range(name, getattr(self, name), 1)
        if self.token_attention == "lsh" and (self.positions == "relative" or self.window):
            what = f"window={self.window}" if self.window else "positions='relative'"
            raise UsageError(f"token_attention='lsh' knows no {what}; choose other positions, and no window")
        self.check_boundaries()
        if not isinstance(self.causal, bool):
            raise UsageError(f"causal={self.causal!r} is unknown; choose True or False")
        if not self.causal:
            self.check_bidirectional()

    def check_bidirectional(self) -> None:
        """Raises UsageError for what has no meaning where a prediction sees both sides."""
        check_range("vocab_size", self.vocab_size, 2)
        for name, fits, choice in (
            ("boundaries", not self.event_levels, "fixed"),
            ("window", not self.window, "0"),
            ("token_attention", self.token_attention == "full", "full"),
            ("shift", self.shift == "paper", "paper, which is none then"),
            ("attention", self.attention in ("auto", "blocked", "plain"), "auto, blocked or plain"),
        ):
            if not fits:
                given = f"{name}={getattr(self, name)!r}"
                raise UsageError(f"causal=False: {given} is for models that see the past alone; choose {choice}")

    def check_boundaries(self) -> None:
        """Raises UsageError where boundaries do not fit the hierarchy, the vocabulary or the resampling methods."""
        if isinstance(self.boundary_tokens, str) or not isinstance(self.boundary_tokens, Iterable):
            raise UsageError(f"boundary_tokens={self.boundary_tokens!r}: give tokens, as a tokenizer encodes them")
        object.__setattr__(self, "boundary_tokens", tuple(map(plain, self.boundary_tokens)))
        check_range("boundary_slack", self.boundary_slack, 1.0)
        check_range("boundary_weight", self.boundary_weight, 0.0)
        names, n_shortenings = str(self.boundaries).split(), len(self.parsed_hierarchy.levels) - 1
        for name in names:
            check_choice("boundaries", name, BOUNDARIES)
        if len(names) not in (1, n_shortenings):
            given = f"boundaries={self.boundaries!r} names {len(names)}, but hierarchy='{self.hierarchy}' shortens"
            raise UsageError(f"{given} {n_shortenings} times; name one, or one for each")
        for token in self.boundary_tokens:
            check_range("boundary_tokens", token, 0, self.vocab_size - 1)
        if not self.event_levels:
            return
        if set(names[1:]) & set(OF_TOKENS):
            raise UsageError(f"boundaries={self.boundaries!r}: only the first shortening can read tokens")
        if names[0] in OF_TOKENS and not self.boundary_tokens and (names[0] == "tokens" or self.vocab_size < 256):
            raise UsageError(
                f"boundaries={names[0]!r} needs boundary_tokens, those at which a group ends, with a vocabulary of "
                f"{self.vocab_size} tokens; only whitespace and spacelike of 256 or more are read as bytes"
            )
        for option, value in (("shortening", self.shortening), ("upsampling", self.upsampling)):
            if "linear" in value:
                raise UsageError(
                    f"{option}={value!r} takes groups of one length, not those of boundaries={self.boundaries!r}; "
                    f"choose {'average' if option == 'shortening' else 'repeat'}, or that with attention"
                )

    @property
    def boundaries_by_level(self) -> tuple[str, ...]:
        """A name for each shortening, outermost first; what is fixed below events is `every` k-th of them."""
        n_shortenings = len(self.parsed_hierarchy.levels) - 1
        names = [*self.boundaries.split(), *["fixed"] * n_shortenings][:n_shortenings]
        n_fixed = next((i for i, name in enumerate(names) if name != "fixed"), n_shortenings)
        return (*names[:n_fixed], *("every" if name == "fixed" else name for name in names[n_fixed:]))

    def ends_by_events(self, factor: int) -> bool:
        """Whether the level of this total factor is shortened in each row's own time."""
        return factor >= self.shared_factor and self.event_levels > 0

    @property
    def event_levels(self) -> int:
        """How many of the shortenings, the innermost ones, make groups in each row's own time."""
        return sum(name != "fixed" for name in self.boundaries_by_level)

    @property
    def shared_factor(self) -> int:
        """K, by which all rows of a batch are shortened at the same time: the total factor, of what is fixed."""
        levels = self.parsed_hierarchy.levels
        return levels[len(levels) - 1 - self.event_levels].factor

    @property
    def head_dim(self) -> int:
        """Numbers in a head's queries, keys and values."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def decodes(self) -> bool:
        """Whether it can generate: no later token moves what an earlier one has made."""
        return self.causal and self.token_attention == "full"

    @property
    def tokenizer_size(self) -> int:
        """Tokens of its tokenizer: all, but for the mask of a model that is not causal, the last one."""
        return self.vocab_size if self.causal else self.vocab_size - 1

    @property
    def position_limit(self) -> float:
        """Longest sequence in tokens: learned positions end at `max_length`, the others never."""
        return self.max_length if self.positions == "learned" else math.inf

    def remat_of(self, *, unrolled: bool) -> str:
        """What `remat` means for a stack: 'auto' recomputes the layers of scanned stacks alone.

        On a CPU the gradient through a plain scan takes longer than that through a rematerialised one.
        """
        chosen = "none" if unrolled else "full"
        return chosen if self.remat == "auto" else self.remat

    @property
    def parsed_hierarchy(self) -> Hierarchy:
        """With its levels and factors."""
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
        """The exact architecture of the PyTorch project this library grew out of.

        Learned absolute positions, ReLU, linear pooling, repeat upsampling, a final norm only, shift by k.
        `factors` are read as its code applies them: each factor multiplies the ones before it. Heads need not divide
        `n_embedding`: its own defaults are 6 heads of 85 in 512.
        """
        options: dict[str, Any] = {
            "hierarchy": str(Hierarchy.from_factors(factors, relative=True)),
            "d_model": n_embedding,
            "n_heads": n_heads,
            "d_head": n_embedding // n_heads,
            "d_ff": 4 * n_embedding,
            "max_length": block_size,
            "shortening": "linear",
            "upsampling": "repeat",
            "positions": "learned",
            "activation": "relu",
            "norm": "final",
            "shift": "original",
        }
        return cls(vocab_size=vocab_size, **(options | overrides))
