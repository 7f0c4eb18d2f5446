"""Import PyTorch checkpoints of two projects, with equal logits.

`from_original`: the project that this library grew out of. `from_pypi`: the package hourglass-transformer-pytorch.

Both rename the tensors of a state dict by a table of (pattern, replacement), applied in order to each name. The results
are this library's names, but with PyTorch's endings and one tensor per layer, such as
`hourglass.inner.pre.layers.3.attention.query.weight`. Attention may also have a matrix per head,
`attention.heads.2.query`, or for several projections, `attention.qkv`. A tensor whose name becomes empty is dropped.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hourglass_jax.config import HourglassConfig
from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.interop.parameters import build_model, listed
from hourglass_jax.model import HourglassLM
from hourglass_jax.ranges import check_range
from hourglass_jax.tokenizers import CLEAN_CHARACTERS, ByteTokenizer, CharTokenizer, Tokenizer

Tensors = dict[str, np.ndarray]
Table = Sequence[tuple[str, str]]

STATE_KEYS = ("model_state_dict", "state_dict", "model", "net", "weights")
FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}  # concatenated along the outputs
HEADS = re.compile(r"(.*\.attention\.heads)\.(\d+)\.(.*)")
LAYERS = re.compile(r"(.*\.layers)\.(\d+)\.(.*)")
ORIGINAL_HEADS = 6  # default of the original project
NEVER = -100.0  # logit bias of tokens that the checkpoint lacks

# The names of the original project first, then other common spellings.
ORIGINAL_NAMES = (
    (r"^(module\.|_orig_mod\.)+", ""),
    (r".*\.(tril|mask)$", ""),  # buffers
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
PYPI_NAMES = (
    (r"^(module\.|_orig_mod\.)+", ""),
    (r"^net\.", ""),  # from its AutoregressiveWrapper
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


def from_original(
    path: str | Path, vocab_path: str | Path, *, n_heads: int | None = None
) -> tuple[HourglassLM, CharTokenizer]:
    """Convert the original project's .pth file and vocab.json to (model, tokenizer).

    Logits are equal except in an incomplete last group, where the project drops some inputs until the group is full.
    `n_heads` is required only for fused attention heads. Raises UsageError for files of other models.
    """
    state, other = read_state_dict(path)
    named = rename(state, ORIGINAL_NAMES, path)
    hyperparameters = other.get("hyperparameters")
    if not isinstance(hyperparameters, Mapping):
        hyperparameters = {}
    counted = count_heads(named)
    if n_heads is not None and counted and n_heads != counted:
        raise UsageError(f"n_heads={n_heads}, but {path} has matrices for {counted} heads; leave n_heads out")
    if n_heads is None:
        n_heads = counted or hyperparameters.get("n_heads", ORIGINAL_HEADS)
    tensors = assemble(named, path)
    sizes = infer_sizes(tensors, n_heads, (), path)
    tokens = read_vocabulary(vocab_path)
    if len(tokens) != sizes["vocab_size"]:
        raise UsageError(
            f"{vocab_path} has {len(tokens)} tokens, but {path} has {sizes['vocab_size']}; give the vocabulary of this "
            "checkpoint"
        )
    if "<BOS>" not in tokens:
        tokens.insert(CharTokenizer.SPECIALS.index("<BOS>"), "<BOS>")
        tensors = _with_bos(tensors, path)
    sizes["vocab_size"] = len(tokens)
    config = HourglassConfig.original_project(**sizes, dropout=hyperparameters.get("dropout", 0.0))
    return build_model(config, tensors, path, add_biases=True), make_tokenizer(tokens, vocab_path)


def from_pypi(
    path: str | Path,
    vocab_path: str | Path | None = None,
    *,
    n_heads: int = 8,
    shorten_factor: int | Sequence[int] = (),
    causal: bool = True,
) -> tuple[HourglassLM, Tokenizer]:
    """Convert a state dict of hourglass-transformer-pytorch's HourglassTransformerLM to (model, tokenizer).

    vocab_path: JSON of characters; default: the 256 tokens are bytes.
    n_heads, shorten_factor, causal: as in its constructor; weights do not contain them. Linear resampling does not
        require `shorten_factor`.

    With causal=False the model gets a mask token (see `objective`), and shortening ignores padding, unlike in the
    package.

    Raises UsageError for attention resampling, which differs from this library's, and for files of other models.
    """
    state, _ = read_state_dict(path)
    if any(".attn_resampling_" in name for name in state):
        raise UsageError(
            f"{path}: attention resampling within a group is not supported; give a model with attn_resampling=False"
        )
    tensors = assemble(rename(state, PYPI_NAMES, path), path)
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
    tokenizer = make_tokenizer(read_vocabulary(vocab_path), vocab_path) if vocab_path else ByteTokenizer(256)
    if tokenizer.vocab_size != config.tokenizer_size:
        raise UsageError(
            f"{vocab_path or 'bytes'}: {tokenizer.vocab_size} tokens, but {path} has {config.tokenizer_size}; give the "
            "vocabulary of this checkpoint"
        )
    return build_model(config, tensors, path), tokenizer


def _with_bos(tensors: Tensors, path: str | Path) -> Tensors:
    """Add <BOS>, which early versions lack. It copies the embedding of <EOS>, which started their texts."""
    eos, bos = CharTokenizer.SPECIALS.index("<EOS>"), CharTokenizer.SPECIALS.index("<BOS>")
    embedding, kernel = tensors["embedding.embedding"], tensors.get("head.kernel")
    if kernel is None or kernel.shape != embedding.T.shape:
        raise UsageError(f"{path}: not a supported model, lacks head.kernel of shape {list(embedding.T.shape)}")
    bias = tensors.get("head.bias", np.zeros(kernel.shape[1], kernel.dtype))
    return tensors | {
        "embedding.embedding": np.insert(embedding, bos, embedding[eos], axis=0),
        "head.kernel": np.insert(kernel, bos, 0, axis=1),
        "head.bias": np.insert(bias, bos, NEVER),
    }


def _with_mask(tensors: Tensors) -> Tensors:
    """Append a mask token, with the mean embedding and a logit so low that it is never predicted."""
    larger = {
        "embedding.embedding": lambda x: np.concatenate([x, x.mean(0, keepdims=True)]),
        "head.kernel": lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]),
        "head.bias": lambda x: np.pad(x, [(0, 1)], constant_values=NEVER),
    }
    return tensors | {name: f(tensors[name]) for name, f in larger.items() if name in tensors}


def read_state_dict(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a .pth file without running code from it; return tensors (floats as float32) and the other contents.

    The file is a state dict, or a dictionary with a state dict under one of `STATE_KEYS`. Raises UsageError for other
    contents, damaged files, and files that require their own code.
    """
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{error}; pip install -e '.[torch]'") from None
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; give a .pth file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many types
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise UsageError(
            f"{path}: contains more than weights, or is damaged; no code in it was run ({reason})"
        ) from None

    def is_state(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(map(torch.is_tensor, value.values()))

    def to_numpy(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().to_dense()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    other = {}
    if not is_state(content):
        keys = [key for key in STATE_KEYS if isinstance(content, Mapping) and is_state(content.get(key))]
        if not keys:
            raise UsageError(f"{path}: no state dict, neither at the top nor under {', '.join(STATE_KEYS)}")
        other = {key: value for key, value in content.items() if key != keys[0]}
        content = content[keys[0]]
    return {str(name): to_numpy(tensor) for name, tensor in content.items()}, other


def rename(state: Mapping[str, np.ndarray], table: Table, source: object) -> Tensors:
    """Rename tensors by a table; names that match no pattern stay. Raises UsageError if two get the same name."""
    named: Tensors = {}
    for original, tensor in state.items():
        name = original
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        if name in named:
            raise UsageError(f"{source}: {original} is a second {name}; remove one of them")
        if name:
            named[name] = tensor
    return named


def count_heads(named: Tensors) -> int | None:
    """Count the heads per layer; None if heads do not have separate matrices."""
    numbers = [int(match[2]) for match in map(HEADS.fullmatch, named) if match]
    return max(numbers) + 1 if numbers else None


def assemble(named: Tensors, source: object) -> Tensors:
    """Convert renamed tensors to this library's parameters: join heads, split fused projections, stack layers.

    Raises UsageError if a layer lacks a tensor of its stack, or has another shape.
    """
    named = _gather(named, HEADS, np.concatenate, source)
    named = {name.replace(".heads.", "."): tensor for name, tensor in named.items()}
    named = {name: part for item in named.items() for name, part in _split(*item)}
    return _gather(dict(_to_flax(*item) for item in named.items()), LAYERS, np.stack, source)


def _gather(
    named: Tensors, pattern: re.Pattern[str], join: Callable[[list[np.ndarray]], np.ndarray], source: object
) -> Tensors:
    """Join tensors whose names differ only in the number that `pattern` finds, in the order of that number."""
    parts: dict[tuple[str, str], dict[int, np.ndarray]] = defaultdict(dict)
    counts: dict[str, int] = defaultdict(int)  # by the part of the name before the number
    joined = {}
    for name, tensor in named.items():
        if match := pattern.fullmatch(name):
            before, number, after = match[1], int(match[2]), match[3]
            parts[before, after][number] = tensor
            counts[before] = max(counts[before], number + 1)
        else:
            joined[name] = tensor
    for (before, after), numbered in parts.items():
        if missing := set(range(counts[before])) - numbered.keys():
            raise UsageError(f"{source}: lacks {listed(f'{before}.{number}.{after}' for number in missing)}")
        if len(shapes := {part.shape for part in numbered.values()}) > 1:
            raise UsageError(f"{source}: {before}.*.{after} have different shapes: {listed(map(str, shapes))}")
        joined[f"{before}.{after}"] = join([numbered[number] for number in sorted(numbered)])
    return joined


def _split(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Split a fused projection; return other tensors as they are."""
    module, _, leaf = name.rpartition(".")
    prefix, _, fused = module.rpartition(".")
    parts = FUSED.get(fused, ())
    if not parts or not tensor.ndim or len(tensor) % len(parts):
        return [(name, tensor)]
    return [(f"{prefix}.{part}.{leaf}", x) for part, x in zip(parts, np.split(tensor, len(parts)), strict=True)]


def _to_flax(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """Convert a `weight` to the scale of a norm, or to a linear kernel: [out, in] in PyTorch, [in, out] in Flax."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return name, tensor
    return (f"{module}.kernel", tensor.T) if tensor.ndim == 2 else (f"{module}.scale", tensor)


def infer_sizes(tensors: Tensors, n_heads: int, shorten_factors: Sequence[int], source: object) -> dict[str, Any]:
    """Infer fields of `HourglassConfig` from the shapes of parameters.

    shorten_factors: of methods without parameters, outermost first, each relative to the level above. Linear pooling
        does not require them.

    Raises UsageError for tensors of other models.
    """

    def shape(name: str, n_axes: int = 2) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != n_axes:
            raise UsageError(f"{source}: not a supported model, lacks {name}; contains {listed(tensors)}")
        return tensors[name].shape

    vocab_size, d_model = shape("embedding.embedding")
    prefixes = ["hourglass"]
    while any(name.startswith(f"{prefixes[-1]}.inner.") for name in tensors):
        prefixes.append(f"{prefixes[-1]}.inner")
    factors = [1]
    for i, prefix in enumerate(prefixes[:-1]):
        pooling = f"{prefix}.shorten.project.kernel"
        if pooling in tensors:
            factor, rest = divmod(shape(pooling)[0], d_model)
            if factor < 2 or rest:
                raise UsageError(
                    f"{source}: {pooling} has {shape(pooling)[0]} inputs, not a multiple (2 or more) of {d_model}"
                )
            if i < len(shorten_factors) and factor != shorten_factors[i]:
                raise UsageError(f"shorten_factor={shorten_factors[i]}, but {pooling} of {source} has {factor}")
            factors.append(factors[-1] * factor)
        elif i < len(shorten_factors):
            factors.append(factors[-1] * shorten_factors[i])
        else:
            raise UsageError(f"{source}: the weights do not contain the factor of {prefix}; give the shorten_factor")

    def stages(stack: str, count: int) -> list[tuple[int, int]]:
        names = [f"{prefix}.{stack}.layers.attention_norm.scale" for prefix in prefixes[:count]]
        return [(len(tensors.get(name, ())), factor) for name, factor in zip(names, factors, strict=False)]

    down, up = stages("pre", len(prefixes)), stages("post", len(prefixes) - 1)
    stack = next((name.partition(".layers.")[0] for name in tensors if ".layers." in name), "hourglass.pre")
    d_heads = shape(f"{stack}.layers.attention.query.kernel", 3)[-1]
    if n_heads < 1 or d_heads % n_heads:
        raise UsageError(f"n_heads={n_heads} does not divide the {d_heads} outputs of query projections in {source}")
    return {
        "vocab_size": vocab_size,
        "hierarchy": str(Hierarchy((*down, *up[::-1]))),
        "d_model": d_model,
        "n_heads": n_heads,
        "d_head": d_heads // n_heads,
        "d_ff": shape(f"{stack}.layers.feed_forward.up.kernel", 3)[-1],
        "max_length": shape("positions")[0],
        "qkv_bias": any(name.endswith(("query.bias", "key.bias", "value.bias")) for name in tensors),
    }


def read_vocabulary(path: str | Path) -> list[str]:
    """Read tokens in the order of their ids from JSON: token to id, id to token, or a list of tokens.

    Raises UsageError for other contents, and for ids with gaps.
    """
    try:
        ids = _ids(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{path}: not a vocabulary ({error}); give a JSON object from token to id") from error
    if sorted(ids.values()) != list(range(len(ids))):
        raise UsageError(f"{path}: ids are not 0 to {len(ids) - 1}, each once; give the vocabulary as it was saved")
    return sorted(ids, key=ids.__getitem__)


def _ids(record: Any) -> dict[str, int]:
    if isinstance(record, list):
        return {token: i for i, token in enumerate(record) if isinstance(token, str)}
    if not isinstance(record, dict):
        raise ValueError("neither an object nor a list")
    if "vocabulary" in record:  # the format of CharTokenizer
        return _ids(record["vocabulary"])
    if all(isinstance(token, str) for token in record.values()):
        return {token: int(i) for i, token in record.items()}
    if not all(isinstance(i, int) for i in record.values()):
        raise ValueError("ids must be integers")
    return record


def make_tokenizer(tokens: list[str], path: str | Path) -> CharTokenizer:
    """Return the tokenizer of a vocabulary. Raises UsageError unless it starts with <EOS>, <UNK>, <BOS>."""
    specials, characters = tuple(tokens[:3]), tokens[3:]
    if specials != CharTokenizer.SPECIALS:
        raise UsageError(f"{path}: the first tokens must be {', '.join(CharTokenizer.SPECIALS)}, not {specials}")
    return CharTokenizer(characters, clean=set(characters) <= set(CLEAN_CHARACTERS))
