"""The whole model in naive float64 NumPy, written from the formulas of the paper, one position at a time."""

import math

import jax
import numpy as np
from flax import nnx


def parameters(model):
    """The model's parameters as nested dicts of float64 arrays."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)


def project(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def norm(p, x):
    if "bias" not in p:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sinusoid(distance, d_model):
    n = (d_model + 1) // 2
    angles = distance / 10_000.0 ** (np.arange(n) / n)
    return np.concatenate([np.sin(angles), np.cos(angles)])[:d_model]


def rotated(x, position):
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position / 10_000.0 ** (np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def attention(p, config, x_q, x_k, positions_q, positions_k, slack, window=math.inf):
    """Query i sees key j where its distance is at least -slack and less than the window; positions in tokens.

    Where it is not causal, it sees all keys.
    """
    slack = slack if config.causal else math.inf
    heads, size = config.n_heads, config.head_dim
    q, k, v = (project(p[n], x).reshape(-1, heads, size) for n, x in (("query", x_q), ("key", x_k), ("value", x_k)))
    if config.qk_norm:
        q, k = norm(p["query_norm"], q), norm(p["key_norm"], k)
    out = np.zeros_like(q)
    for i, h in np.ndindex(len(q), heads):
        seen = [j for j in range(len(k)) if -slack <= positions_q[i] - positions_k[j] < window]
        scores = []
        for j in seen:
            if config.positions == "relative":
                r = project(p["relative"], sinusoid(positions_q[i] - positions_k[j], config.d_model))
                r = r.reshape(heads, size)[h]
                u, bias = p["content_bias"][h], p["position_bias"][h]
                scores.append((q[i, h] + u) @ k[j, h] + (q[i, h] + bias) @ r)
            elif config.positions == "rotary":
                scores.append(rotated(q[i, h], positions_q[i]) @ rotated(k[j, h], positions_k[j]))
            else:
                scores.append(q[i, h] @ k[j, h])
        out[i, h] = softmax(np.array(scores) / np.sqrt(size)) @ v[seen, h]
    return project(p["out"], out.reshape(len(q), -1))


def activation(config, x):
    if config.activation in ("relu", "relu_squared"):
        return np.maximum(x, 0) ** (2 if config.activation == "relu_squared" else 1)
    if config.activation == "swiglu":
        return x / (1 + np.exp(-x))
    if config.activation == "gelu_exact":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def block(p, config, x, positions, memory=None, memory_positions=None, slack=0, window=math.inf):
    queries = norm(p["attention_norm"], x)
    keys = queries if memory is None else norm(p["memory_norm"], memory)
    memory_positions = positions if memory is None else memory_positions
    x = x + attention(p["attention"], config, queries, keys, positions, memory_positions, slack, window)
    p, inputs = p["feed_forward"], norm(p["feed_forward_norm"], x)
    if config.activation == "swiglu":
        hidden = activation(config, project(p["gate"], inputs)) * project(p["up"], inputs)
    else:
        hidden = activation(config, project(p["up"], inputs))
    return x + project(p["down"], hidden)


def stack(p, config, n_layers, x, tokens_per_position, level_input):
    positions = np.arange(len(x)) * tokens_per_position
    window = config.window * tokens_per_position if config.window else math.inf
    for i in range(n_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        if config.input_residual:
            x = layer["input_scales"][0] * x + layer["input_scales"][1] * level_input
        x = block(layer, config, x, positions, window=window)
    return norm(p["norm"], x) if config.norm == "stack" else x


def pool(p, method, shifted, k, config):
    groups = shifted.reshape(-1, k, shifted.shape[1])
    if method == "average":
        return np.stack([sum(group) / k for group in groups])
    if method == "select":
        return groups[:, -1 if config.causal else 0]
    return np.stack([project(p["project"], np.concatenate(list(group))) for group in groups])


def shorten(p, config, x, k, tokens_per_position, shift):
    """x [L, D] -> [ceil(L / k), D]."""
    n_groups = -(-len(x) // k)
    shifted = np.zeros((n_groups * k, x.shape[1]))
    for slot in range(n_groups * k):
        if 0 <= slot - shift < len(x):
            shifted[slot] = x[slot - shift]
    kind, _, base = config.shortening.rpartition("_")
    if not kind:
        return pool(p, base, shifted, k, config)
    pooled = pool(p.get("pool", {}), base, shifted, k, config)
    if not config.causal:
        shifted = x  # without what fills up the last group
    group_positions, slot_positions = (
        np.arange(n_groups) * k * tokens_per_position,
        np.arange(len(shifted)) * tokens_per_position,
    )
    return block(
        p["block"], config, pooled, group_positions, shifted, slot_positions, slack=(k - 1) * tokens_per_position
    )


def spread(p, method, short, k, length):
    if method in ("repeat", "smooth"):  # at given boundaries there is nothing to smooth
        rows = [short[t // k] for t in range(length)]
    else:
        rows = [project(p["project"], short[t // k]).reshape(k, -1)[t % k] for t in range(length)]
    return np.stack(rows)


def upsample(p, config, x, short, k, tokens_per_position):
    kind, _, base = config.upsampling.rpartition("_")
    if not kind and base != "attention":
        return spread(p, base, short, k, len(x))
    queries = x if base == "attention" else x + spread(p.get("base", {}), base, short, k, len(x))
    return block(
        p["block"],
        config,
        queries,
        np.arange(len(x)) * tokens_per_position,
        short,
        np.arange(len(short)) * k * tokens_per_position,
    )


def hourglass(p, config, levels, x):
    level, *inner = levels
    whole, config, level_input = config, config.at_level(-len(levels)), x
    x = stack(p.get("pre", {}), config, level.pre_layers, x, level.factor, level_input)
    if not inner:
        return x
    k = level.shorten_factor
    shift = {"paper": k - 1, "original": k}[config.shift] if config.causal else 0
    short = shorten(p.get("shorten", {}), config, x, k, level.factor, shift)
    short = hourglass(p["inner"], whole, inner, project(p["to_inner"], short) if "to_inner" in p else short)
    short = project(p["from_inner"], short) if "from_inner" in p else short
    up = upsample(p.get("upsample", {}), config, x, short, k, level.factor)
    if config.norm == "stack" and config.upsampling != "smooth":
        up = norm(p["upsample_norm"], up)
    return stack(p.get("post", {}), config, level.post_layers, x + up, level.factor, level_input)


def mixed_bits(symbol, state):
    """A hash of two 32-bit integers, in Python's integers."""
    bits = (symbol % 2**32 * 0x9E3779B9 ^ state) % 2**32
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = (bits ^ bits >> shift) * factor % 2**32
    return bits ^ bits >> 16


def ngram_embeddings(p, config, tokens):
    """The n-grams of a row that ends at each token; -1 stands for the positions before the row."""
    rows = []
    for t in range(len(tokens)):
        row = 0
        for i, size in enumerate(config.ngram_sizes):
            state = size
            for s in range(t - size + 1, t + 1):
                state = mixed_bits(int(tokens[s]) if s >= 0 else -1, state)
            row = row + p["embedding"][i * config.ngram_buckets + state % config.ngram_buckets]
        rows.append(row)
    return np.stack(rows)


def logits(model, tokens):
    """int [L] -> float64 [L, V]."""
    p, config = parameters(model), model.config
    x = p["embedding"]["embedding"][tokens]
    if config.ngram_sizes:
        x = x + ngram_embeddings(p["ngrams"], config, tokens)
    if config.positions == "learned":
        x = x + p["positions"][: len(tokens)]
    x = hourglass(p["hourglass"], config, config.parsed_hierarchy.levels, x)
    if config.norm == "final":
        x = norm(p["norm"], x)
    x = project(p["head"], x)
    return config.logit_softcap * np.tanh(x / config.logit_softcap) if config.logit_softcap else x
