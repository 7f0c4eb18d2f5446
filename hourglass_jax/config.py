"""What can be chosen, as plain frozen dataclasses, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.ranges import check_choice as check_choice
from hourglass_jax.ranges import check_range as check_range
from hourglass_jax.registry import BOUNDARIES, SHORTENINGS, UPSAMPLINGS

MAX_SEED = 2**63 - 1  # what a key of JAX is made of fits 64 bits with a sign
OF_TOKENS = ("whitespace", "spacelike", "tokens")  # boundaries that are read off the tokens
IMAGE_SIZES = {"cifar10": 32, "imagenet32": 32, "imagenet64": 64}  # side of a data set's images, in pixels
FOLDER = "folder"  # the data set of one's own images


def check_image_size(dataset: str, image_size: int) -> None:
    """Raises unless images of `dataset` can be averaged down to this side; 0 leaves them as they are."""
    if dataset == FOLDER:
        check_range("image_size", image_size, 0)
        return
    size = IMAGE_SIZES[dataset]
    check_range("image_size", image_size, 0, size)
    if image_size and size % image_size:
        raise UsageError(f"image_size={image_size} does not divide the side {size} of {dataset}'s images")


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
    boundary_slack: groups there is room for, for each that is expected; what comes too early waits.
    boundary_weight: of the losses of learned boundaries, times that of their papers (router 0.03, the others 1).
    positions: relative (Transformer-XL) | rotary | learned (absolute, added to the tokens).
    dropout: probability, of the embedding, attention and both residuals of a block.
    max_length: tokens; bounds learned positions and default caches.
    activation: gelu (tanh form) | gelu_exact (with erf, as PyTorch) | relu.
    qkv_bias: whether the query, key and value projections have biases.
    initialization: of weight matrices, normal (0.02) | xavier (uniform); embeddings have standard deviation 1.
    norm: stack (after every stack and every upsampling, as Trax) | final (before the head only).
    shift: paper (k-1) | original (k, the original project's, one character staler).
    dtype: of the computation, float32 | bfloat16 | float64 (with JAX_ENABLE_X64); parameters stay float32.
    max_unrolled_layers: deeper stacks are one scanned body, so that compile time stays flat; on GPUs those of more than
        twice as many.
    attention: how it is computed; the result is the same. auto (the best that platform, dtype, head size, positions and
        dropout allow) | blocked (jnp, in memory linear in length) | fused (cuDNN's kernel on GPUs, splash attention on
        TPUs; blocked with relative positions or dropout, which they do not know) | kernel (ours in Pallas, with both;
        interpreted on CPUs, for tests) | plain (the formula in jnp alone: for jax.jvp, Hessian-vector products and
        other forward derivatives, which the others have not).
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
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # from a computation, which JSON would not take
                object.__setattr__(self, name, value.item())
        for name in ("vocab_size", "d_model", "n_heads", "d_ff"):
            check_range(name, getattr(self, name), 1)
        check_range("max_length", self.max_length, 2)
        for name in ("max_unrolled_layers", "d_head", "window"):
            check_range(name, getattr(self, name), 0)
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout!r} is out of range; it must be at least 0 and below 1")
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

    def check_boundaries(self) -> None:
        """Raises UsageError where boundaries do not fit the hierarchy, the vocabulary or the resampling methods."""
        object.__setattr__(self, "boundary_tokens", tuple(int(token) for token in self.boundary_tokens))
        check_range("boundary_slack", self.boundary_slack, 1.0)
        check_range("boundary_weight", self.boundary_weight, 0.0)
        names, n_shortenings = self.boundaries.split(), len(self.parsed_hierarchy.levels) - 1
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


@dataclass(frozen=True)
class DataConfig:
    """Which text or images, and how they are cut into batches. Images have their own order, split and length.

    path: a UTF-8 text file, a directory of .txt files, a pattern such as "books/*.txt", or several of these with commas
        between, joined in the order of their names; any files where `tokenizer` is byte; the images' directory; empty:
        the built-in corpus.
    dataset: text | cifar10 | imagenet32 | imagenet64 | folder (PNG and JPEG files).
    image_size: averages images down to this side in pixels, which divides their own; 0: as stored. Images of a folder
        are first cut to squares, and take any side.
    tokenizer: char | byte.
    clean: lower-case, strip accents, keep "\\n !&'$,-.:;?" and a-z (characters only).
    block_size: tokens a training window; images have their own length.
    batch_size: windows or images a step.
    order: random (windows start anywhere) | epochs (consecutive windows, each once an epoch).
    split: fraction (by train_fraction, no test) | enwik8 (90M train, 5M validation, 5M test).
    train_fraction: the rest is for validation, of a text or a folder.
    valid_path: another text for validation, given as `path` is; then all of `path` is for training.
    """

    path: str = ""
    dataset: str = "text"
    image_size: int = 0
    tokenizer: str = "char"
    clean: bool = False
    block_size: int = 128
    batch_size: int = 16
    order: str = "random"
    split: str = "fraction"
    train_fraction: float = 0.9
    valid_path: str = ""

    def __post_init__(self) -> None:
        check_choice("dataset", self.dataset, ("text", *IMAGE_SIZES, FOLDER))
        if self.dataset != "text":
            check_image_size(self.dataset, self.image_size)
        if self.dataset in IMAGE_SIZES:
            object.__setattr__(self, "block_size", 3 * (self.image_size or IMAGE_SIZES[self.dataset]) ** 2)
        if self.dataset == "text" and self.image_size:
            raise UsageError(f"image_size={self.image_size} is for images; choose them by dataset")
        if self.valid_path and (self.dataset != "text" or self.split != "fraction"):
            other = f"dataset={self.dataset!r}" if self.dataset != "text" else f"split={self.split!r}"
            raise UsageError(f"valid_path={self.valid_path!r}: {other} has a validation split; leave out one of them")
        check_choice("tokenizer", self.tokenizer, ("char", "byte"))
        check_choice("order", self.order, ("random", "epochs"))
        check_choice("split", self.split, ("fraction", "enwik8"))
        check_range("block_size", self.block_size, 1)
        check_range("batch_size", self.batch_size, 1)
        if not 0 < self.train_fraction < 1:
            raise UsageError(f"train_fraction={self.train_fraction!r} is out of range; it must be between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule; the defaults are the paper's (section 3): no weight decay, no clipping.

    learning_rate: the peak.
    schedule: cosine (to 0) | inverse_sqrt | constant, after the warm-up.
    warmup_steps: from 0 to the peak, linearly.
    decay_steps: the last ones of the training, over which the rate of any schedule falls to 0, linearly.
    beta1, beta2, eps: Adam's.
    weight_decay: of the matrices of linear layers alone; see `training.optimizer.is_decayed`.
    clip_norm: of the gradient of all parameters that are trained; 0: no clipping.
    train_only: modules that are trained, with commas between, as "hourglass.post,head"; the others stay as they are,
        and have no optimizer state. Empty: all.
    """

    learning_rate: float = 4e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    train_only: str = ""

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, ("cosine", "inverse_sqrt", "constant"))
        check_range("learning_rate", self.learning_rate, 0.0, open_low=True)
        check_range("eps", self.eps, 0.0, open_low=True)
        for name in ("warmup_steps", "decay_steps"):
            check_range(name, getattr(self, name), 0)
        for name in ("weight_decay", "clip_norm"):
            check_range(name, getattr(self, name), 0.0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r} is out of range; it must be at least 0 and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look.

    steps: batches.
    eval_interval: steps between evaluations, each with a checkpoint.
    eval_batches: batches an evaluation during training, evenly spaced; the last one reads the whole split.
    patience: evaluations in a row without a better one after which training ends early; 0: it never does.
    seed: of initialisation, order and dropout.
    shorten_factors: one of them is drawn each step (section 4.1); none: the hierarchy's own.
    """

    steps: int = 1000
    eval_interval: int = 200
    eval_batches: int = 20
    patience: int = 0
    seed: int = 0
    shorten_factors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "eval_interval", "eval_batches"):
            check_range(name, getattr(self, name), 1)
        check_range("patience", self.patience, 0)
        check_range("seed", self.seed, 0, MAX_SEED)
        for factor in self.shorten_factors:
            check_range("shorten_factors", factor, 2)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how watched a run is. None of it changes what is learned: it may differ when a run goes on.

    data: devices among which a batch is divided; -1: all that fsdp leaves.
    fsdp: devices among which parameters and optimiser state are divided, and the batch too.
    accumulate: parts a batch is taken in, one after another, to save memory.
    checkpoint_interval: steps between checkpoints beside those of each evaluation; 0: none.
    keep_checkpoints: the latest that are kept, 2 at least, beside the best one; 0: all.
    sample_interval: steps between samples during training; 0: none.
    profile_steps: first:last steps to profile, e.g. 10:12; empty: none.
    log: bar | plain (lines) | none | auto: a bar on a terminal, lines elsewhere.
    """

    data: int = -1
    fsdp: int = 1
    accumulate: int = 1
    checkpoint_interval: int = 0
    keep_checkpoints: int = 2
    sample_interval: int = 0
    profile_steps: str = ""
    log: str = "auto"

    def __post_init__(self) -> None:
        for name in ("fsdp", "accumulate"):
            check_range(name, getattr(self, name), 1)
        for name in ("checkpoint_interval", "sample_interval", "keep_checkpoints"):
            check_range(name, getattr(self, name), 0)
        if self.keep_checkpoints == 1:
            raise UsageError("keep_checkpoints=1 leaves none while the next is written; give 2 or more, or 0 for all")
        check_choice("log", self.log, ("auto", "bar", "plain", "none"))
        if self.data != -1:
            check_range("data", self.data, 1)
        self.profiled  # noqa: B018 - read for its check

    @property
    def profiled(self) -> tuple[int, int]:
        """First and last step to profile; (0, 0) for none."""
        if not self.profile_steps:
            return 0, 0
        first, colon, last = self.profile_steps.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UsageError(f"profile_steps={self.profile_steps!r}: give the first and last step, e.g. 10:12")
        return int(first), int(last)
