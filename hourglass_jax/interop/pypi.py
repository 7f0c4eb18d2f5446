"""Weights of HourglassTransformerLM of the PyPI package hourglass-transformer-pytorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.interop.original import NEVER
from hourglass_jax.interop.parameters import build_model
from hourglass_jax.interop.renaming import Tensors, assemble, rename
from hourglass_jax.interop.shapes import infer_sizes
from hourglass_jax.interop.torch_files import read_state_dict
from hourglass_jax.interop.vocabulary import make_tokenizer, read_vocabulary
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range
from hourglass_jax.tokenizers import ByteTokenizer, Tokenizer

NAMES = (
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^net\.", ""),  # of its AutoregressiveWrapper
    (r"^token_emb\.weight$", "embedding.embedding"),
    (r"^pos_emb\.weight$", "positions"),
    (r"^to_logits\.", "head."),
    (r"^transformer\.norm(_out)?\.", "norm."),
    (r"^transformer\.", "hourglass."),
    (r"\.valley_transformer\b", ".inner"),
    (r"\.(pre|post)_transformer\.", r".\1."),
    (r"^(hourglass(\.inner)*)\.layers\.", r"\1.pre.layers."),
    (r"\.downsample\.proj\.", ".shorten.project."),
    (r"\.upsample\.proj\.", ".upsample.project."),
    (r"(\.layers\.\d+)\.0\.norm\.", r"\1.attention_norm."),
    (r"(\.layers\.\d+)\.0\.fn\.to_q\.", r"\1.attention.query."),
    (r"(\.layers\.\d+)\.0\.fn\.to_kv\.", r"\1.attention.kv."),
    (r"(\.layers\.\d+)\.0\.fn\.to_out\.", r"\1.attention.out."),
    (r"(\.layers\.\d+)\.1\.norm\.", r"\1.feed_forward_norm."),
    (r"(\.layers\.\d+)\.1\.fn\.0\.", r"\1.feed_forward.up."),
    (r"(\.layers\.\d+)\.1\.fn\.3\.", r"\1.feed_forward.down."),
)


def from_pypi(
    path: str | Path,
    vocab_path: str | Path | None = None,
    *,
    n_heads: int = 8,
    shorten_factor: int | Sequence[int] = (),
    causal: bool = True,
) -> tuple[HourglassLM, Tokenizer]:
    """A .pth file with the model's state dict -> (model, tokenizer); the logits are the same.

    `n_heads`, `shorten_factor` (unless resampling is linear) and `causal` are arguments of its constructor that weights
    do not tell. Without a vocabulary of characters, 256 tokens are bytes. A model that is not causal gets a mask token
    beside its own, see `objective`; its padding is zero in shortening, too, which it is not in the package. Raises
    UsageError for attention resampling, which this library does otherwise, and for files that hold something else.
    """
    state, _ = read_state_dict(path)
    if any(".attn_resampling_" in name for name in state):
        raise UsageError(
            f"{path}: has attention resampling, in which a group sees itself alone; here it sees all groups before it "
            "too, so there is no equal; convert models with attn_resampling=False"
        )
    tensors = assemble(rename(state, NAMES, path), path)
    n_factors = max(name.count(".inner") for name in tensors)
    factors = list(shorten_factor) if isinstance(shorten_factor, Sequence) else [shorten_factor] * max(n_factors, 1)
    for factor in factors:
        check_range("shorten_factor", factor, 2)
    if len(factors) not in (0, n_factors):
        raise UsageError(f"shorten_factor={factors}: {path} shortens {n_factors} times; give one factor for each")
    sizes = infer_sizes(tensors, n_heads, factors, path)
    if not causal:
        tensors = _with_mask(tensors)
        sizes["vocab_size"] += 1
    linear = "hourglass.shorten.project.kernel" in tensors
    config = HourglassConfig(
        **sizes,
        shortening="linear" if linear else "average",
        upsampling="linear" if linear else "repeat",
        positions="learned",
        activation="gelu_exact",
        norm="final",
        causal=causal,
    )
    return build_model(config, tensors, path), _tokenizer(vocab_path, config.tokenizer_size, path)


def _with_mask(tensors: Tensors) -> Tensors:
    """With a mask token after the others: it starts as their mean, and is never predicted."""
    longer = {
        "embedding.embedding": lambda x: np.concatenate([x, x.mean(0, keepdims=True)]),
        "head.kernel": lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]),
        "head.bias": lambda x: np.pad(x, [(0, 1)], constant_values=NEVER),
    }
    return tensors | {name: f(tensors[name]) for name, f in longer.items() if name in tensors}


def _tokenizer(vocab_path: str | Path | None, vocab_size: int, path: str | Path) -> Tokenizer:
    tokenizer = make_tokenizer(read_vocabulary(vocab_path), vocab_path) if vocab_path else ByteTokenizer(256)
    if tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"{vocab_path or 'bytes'}: {tokenizer.vocab_size} tokens, but {path} has {vocab_size}; give the vocabulary "
            "that it was trained with"
        )
    return tokenizer
