"""What the shapes of parameters tell of the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hourglass_jax.errors import UsageError
from hourglass_jax.hierarchy import Hierarchy
from hourglass_jax.interop.parameters import listed
from hourglass_jax.interop.renaming import Tensors


def infer_sizes(tensors: Tensors, n_heads: int, shorten_factors: Sequence[int], source: object) -> dict[str, Any]:
    """Fields of `HourglassConfig` for a model with learned positions.

    Shortening factors are read from linear pooling; without, from `shorten_factors`, outermost first, each relative to
    the level above. Raises UsageError where the tensors are of no such model.
    """

    def shape(name: str, n_axes: int = 2) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != n_axes:
            raise UsageError(f"{source}: is no such model, it lacks {name}; it holds {listed(tensors)}")
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
                    f"{source}: {pooling} takes {shape(pooling)[0]} numbers, not two or more vectors of {d_model}"
                )
            if i < len(shorten_factors) and factor != shorten_factors[i]:
                raise UsageError(
                    f"shorten_factor={shorten_factors[i]}, but {pooling} of {source} takes {factor} vectors"
                )
            factors.append(factors[-1] * factor)
        elif i < len(shorten_factors):
            factors.append(factors[-1] * shorten_factors[i])
        else:
            raise UsageError(f"{source}: nothing in it tells by how much {prefix} shortens; give the shorten_factor")

    def stages(stack: str, count: int) -> list[tuple[int, int]]:
        names = [f"{prefix}.{stack}.layers.attention_norm.scale" for prefix in prefixes[:count]]
        return [(len(tensors.get(name, ())), factor) for name, factor in zip(names, factors, strict=False)]

    down, up = stages("pre", len(prefixes)), stages("post", len(prefixes) - 1)
    stack = next((name.partition(".layers.")[0] for name in tensors if ".layers." in name), "hourglass.pre")
    d_heads = shape(f"{stack}.layers.attention.query.kernel", 3)[-1]
    if n_heads < 1 or d_heads % n_heads:
        raise UsageError(
            f"n_heads={n_heads} does not divide the {d_heads} outputs of the query projections in {source}"
        )
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
