"""Checkpoints of the PyTorch project that this library grew out of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.interop.parameters import build_model
from hourglass_jax.interop.renaming import Tensors, assemble, count_heads, rename
from hourglass_jax.interop.shapes import infer_sizes
from hourglass_jax.interop.torch_files import read_state_dict
from hourglass_jax.interop.vocabulary import make_tokenizer, read_vocabulary
from hourglass_jax.model import HourglassLM
from hourglass_jax.tokenizers import CharTokenizer

N_HEADS = 6  # its default, where neither the tensors nor the file's hyperparameters tell
NEVER = -100.0  # logit of a token that was not there in training

# The project's own names first, then other common spellings; a further one is one more alternative or line.
NAMES = (
    (r"^(module\.|_orig_mod\.)+", ""),
    (r".*\.(tril|mask)$", ""),  # no parameters
    (r"^(tokens?_embedding(_table)?|wte|tok_emb)\.weight$", "embedding.embedding"),
    (r"^(positions?_embedding(_table)?(\.pe)?|wpe|pos_emb)(\.weight)?$", "positions"),
    (r"^(norm|ln_f)\.", "norm."),
    (r"^(linear|lm_head)\.", "head."),
    (r"(?<=hourglass)\.hourglass\b", ".inner"),
    (r"\.(pre|post)_(layers?|blocks)\.", r".\1.layers."),
    (r"\.(linearProjection|linear_pooling|linear_projection)\.", ".shorten.project."),
    (r"\.(norm1|ln1|ln_1)\.", ".attention_norm."),
    (r"\.(norm2|ln2|ln_2)\.", ".feed_forward_norm."),
    (r"\.(attn|sa)\.", ".attention."),
    (r"\.(q|to_q|q_proj)\.(?=\w+$)", ".query."),
    (r"\.(k|to_k|k_proj)\.(?=\w+$)", ".key."),
    (r"\.(v|to_v|v_proj)\.(?=\w+$)", ".value."),
    (r"\.attention\.(c_attn|qkv|to_qkv|in_proj)\.(?=\w+$)", ".attention.qkv."),
    (r"\.attention\.in_proj_(?=\w+$)", ".attention.qkv."),
    (r"\.attention\.(linear|proj|c_proj|out_proj)\.", ".attention.out."),
    (r"\.(ffn|ffwd|mlp)(\.sequence|\.net)?\.(0|c_fc)\.", ".feed_forward.up."),
    (r"\.(ffn|ffwd|mlp)(\.sequence|\.net)?\.(2|c_proj)\.", ".feed_forward.down."),
)


def from_original(
    path: str | Path, vocab_path: str | Path, *, n_heads: int | None = None
) -> tuple[HourglassLM, CharTokenizer]:
    """The project's .pth file and vocab.json -> (model, tokenizer), with the same logits.

    Except in a last incomplete group, of which the project leaves out some inputs: its logits there change when the
    text grows to a multiple of the factor. Here they are at once what they then become.
    `n_heads` is needed only where one matrix serves all heads. Raises UsageError for files that hold something else.
    """
    state, rest = read_state_dict(path)
    named = rename(state, NAMES, path)
    hyperparameters = rest.get("hyperparameters")
    if not isinstance(hyperparameters, Mapping):
        hyperparameters = {}
    counted = count_heads(named)
    if n_heads is not None and counted and n_heads != counted:
        raise UsageError(f"n_heads={n_heads}, but {path} has matrices for {counted} heads a layer")
    if n_heads is None:
        n_heads = counted or hyperparameters.get("n_heads", N_HEADS)
    tensors = assemble(named, path)
    sizes = infer_sizes(tensors, n_heads, (), path)
    tokens = read_vocabulary(vocab_path)
    if len(tokens) != sizes["vocab_size"]:
        raise UsageError(
            f"{vocab_path} has {len(tokens)} tokens, but {path} {sizes['vocab_size']}; they do not belong together"
        )
    if "<BOS>" not in tokens:
        tokens.insert(CharTokenizer.SPECIALS.index("<BOS>"), "<BOS>")
        tensors = _with_bos(tensors, path)
    sizes["vocab_size"] = len(tokens)
    config = HourglassConfig.original_project(**sizes, dropout=hyperparameters.get("dropout", 0.0))
    return build_model(config, tensors, path, add_biases=True), make_tokenizer(tokens, vocab_path)


def _with_bos(tensors: Tensors, path: str | Path) -> Tensors:
    """Early versions had no <BOS> and began texts with <EOS>: it starts as that one's copy, and is never predicted."""
    eos, bos = CharTokenizer.SPECIALS.index("<EOS>"), CharTokenizer.SPECIALS.index("<BOS>")
    embedding, kernel = tensors["embedding.embedding"], tensors.get("head.kernel")
    if kernel is None or kernel.shape != embedding.T.shape:
        raise UsageError(f"{path}: lacks head.kernel of shape {list(embedding.T.shape)}; it is no such model")
    bias = tensors.get("head.bias", np.zeros(kernel.shape[1], kernel.dtype))
    return tensors | {
        "embedding.embedding": np.insert(embedding, bos, embedding[eos], axis=0),
        "head.kernel": np.insert(kernel, bos, 0, axis=1),
        "head.bias": np.insert(bias, bos, NEVER),
    }
