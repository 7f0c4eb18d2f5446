"""Which parameters are trained, by the names of their modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from hourglass_jax.errors import UsageError

Filter = Callable[[Sequence[Any], Any], bool]  # of a parameter's path and value, as Flax has them


def ALL(path: Sequence[Any], value: Any) -> bool:
    """Every parameter."""
    return True


def trained_parameters(params: nnx.State, train_only: str) -> Filter:
    """Whether a parameter is trained: where its path begins with one of the names in `train_only`, or that is empty.

    train_only: paths of modules, as "hourglass.post,head"; the layers of a stack lie in one array and go together.
    Raises UsageError for a name without parameters.
    """
    if not train_only:
        return ALL
    paths = [tuple(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    chosen = [tuple(name.strip().split(".")) for name in train_only.split(",")]
    for name in chosen:
        if not any(_within(path, name) for path in paths):
            modules = sorted({".".join(path[: max(1, min(len(path) - 1, 3))]) for path in paths})
            raise UsageError(
                f"train_only: no parameters in {'.'.join(name)!r}; give modules with commas between, of "
                f"{', '.join(modules)}, or what holds or is held by these"
            )
    return lambda path, _: any(_within(tuple(map(str, path)), name) for name in chosen)


def _within(path: tuple[str, ...], module: tuple[str, ...]) -> bool:
    return path[: len(module)] == module
