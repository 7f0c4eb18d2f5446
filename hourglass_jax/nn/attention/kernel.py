"""Flash attention in Pallas for GPUs and TPUs, forward and backward, with the relative positions of `plain`'s formula.

Scores stay on the chip, so memory grows linearly with length. With a window, a kernel visits only blocks in the window.
Each program computes one block of queries, keys or lags of one head, in a loop over the other blocks; see `tiles`. On a
CPU the kernels are interpreted, which is slow and meant for tests.

Query slots become additional heads of one key head; the keys of each key slot are contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from hourglass_jax.errors import UsageError
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.tiles import (
    Arrays,
    Plan,
    Tile,
    forward_tile,
    key_tile,
    lag_tile,
    query_tile,
    stored_query_tile,
)
from hourglass_jax.nn.layers import at_least_float32
from hourglass_jax.nn.platform import n_devices, platform

BLOCKS = {"gpu": 64, "tpu": 128, "cpu": 16}  # queries and keys in a block
SMALLEST = 16  # smallest dimension of a matrix product on a GPU
LANES = 128  # a TPU pads the last axis to a multiple of this
ROOM = 16 * 2**20  # bytes of a TPU's VMEM for intermediate values
# Block products: per tile without relative positions, per tile with them, and extra ones per program with them.
PRODUCTS: dict[Callable[..., Any], tuple[int, int, int]] = {
    forward_tile: (2, 3, 0),
    query_tile: (3, 5, 1),
    key_tile: (4, 6, 0),
    lag_tile: (0, 6, 0),
    stored_query_tile: (3, 0, 0),
}


def kernel_attention(
    pattern: Pattern, inputs: Inputs, first: Int[Array, " B"] | None = None, key: Array | None = None
) -> Float[Array, "B H GP K"]:
    """Compute attention; groups before `first` are padding. `key` turns dropout on.

    Raises UsageError for a symbolic batch size.
    """
    return run_kernels(_attention, pattern, inputs, first, key)


def run_kernels(
    attention: Callable[[Plan, Arrays], jax.Array], pattern: Pattern, inputs: Inputs, first: Any, key: Any
) -> Float[Array, "B H GP K"]:
    """Compute `kernel_attention` by `attention`, a function of the kernels' inputs."""
    batch, heads, n_queries, size = inputs.q.shape
    if not isinstance(batch, int):
        raise UsageError("attention='kernel' requires a fixed batch size; export with one, or with another attention")
    groups = n_queries // pattern.query_slots
    plan = make_plan(pattern if key is not None else pattern._replace(dropout=0.0), heads, groups, size)
    q, q_position = (slots_apart(plan, x, pattern.query_slots) for x in (inputs.q, inputs.q_position))
    k, v = (slots_apart(plan, x, pattern.key_slots) for x in (inputs.k, inputs.v))
    r = slots_apart(plan, inputs.r, pattern.key_slots, in_front=True)
    first = jnp.zeros(batch, jnp.int32) if first is None else first.astype(jnp.int32)
    arrays = Arrays(
        q=merge(q, 1),
        k=merge(k, 2),
        v=merge(v, 2),
        q_position=merge(q_position, 1),
        r=None if r is None else merge(merge(r.swapaxes(0, 1), 0), 1),
        rows=jnp.stack([jnp.arange(batch, dtype=jnp.int32), first], axis=1),
        seeds=jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32),
    )
    out = attention(plan, arrays).reshape(q.shape)[:, :, :, :groups, :size]
    return out.swapaxes(2, 3).reshape(inputs.q.shape)


def make_plan(pattern: Pattern, heads: int, groups: int, size: int) -> Plan:
    """Return the kernels' static parameters on this platform; `size` is the head dimension."""
    name = platform()
    block = BLOCKS[name]
    parts: tuple[int, ...] = (size,)
    if name != "tpu":  # on a TPU all matrix products are at least that large
        size = round_up(size, SMALLEST)
        parts = tuple(1 << bit for bit in reversed(range(size.bit_length())) if size & (1 << bit))
        block = max(SMALLEST, min(block, pl.next_power_of_2(groups)))
    return Plan(pattern, name, heads, groups, parts, block, -(-groups // block), by_memory=name != "tpu")


def slots_apart(plan: Plan, x: jax.Array | None, slots: int, *, in_front: bool = False) -> Any:
    """[..., N S, K] -> [..., S, G, K], zero-padded to whole blocks and to the plan's head dimension."""
    if x is None:
        return None
    *lead, rows, size = x.shape
    x = x.reshape(*lead, rows // slots, slots, size).swapaxes(-3, -2)
    more = plan.n_blocks * plan.block - rows // slots
    of_rows = (more, 0) if in_front else (0, more)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [of_rows, (0, sum(plan.parts) - size)])


def merge(x: Any, axis: int) -> Any:
    """Merge `axis` with the next one."""
    return x if x is None else x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, arrays: Arrays) -> jax.Array:
    return _forward(plan, arrays)[0]


def _forward(plan: Plan, arrays: Arrays) -> tuple[jax.Array, Any]:
    log_totals = jax.ShapeDtypeStruct((*arrays.q.shape[:3], 1), wide(arrays))
    out, log_total = call(plan, forward_tile, arrays, (), plan.n_blocks, like(arrays.q), log_totals)
    return out, (arrays, out, log_total)


def _backward(plan: Plan, residuals: Any, d_out: jax.Array) -> tuple[Arrays]:
    arrays, out, log_total = residuals
    batch, heads, _, size = arrays.q.shape
    correction = (d_out * out).astype(log_total.dtype).sum(-1, keepdims=True)  # sum of weight * d_weight over keys
    more, n_keys = (d_out, log_total, correction), plan.n_blocks * plan.pattern.key_slots
    of_keys = jax.ShapeDtypeStruct((batch, heads, *arrays.k.shape[2:]), arrays.k.dtype)
    d_q = call(plan, query_tile, arrays, more, plan.n_blocks, *map(like, (arrays.q, arrays.q_position)))
    d_k, d_v = call(plan, key_tile, arrays, more, n_keys, of_keys, of_keys)
    # Sum over the query slots that share a key head.
    d_k, d_v = (x.reshape(batch, plan.heads, -1, *x.shape[2:]).sum(2) for x in (d_k, d_v))
    d_q_position = d_r = None
    if arrays.r is not None:
        of_pairs = jax.ShapeDtypeStruct((batch, heads, 2 * arrays.r.shape[1], size), wide(arrays))
        [pairs] = call(plan, lag_tile, arrays, more, n_keys, of_pairs)
        d_q_position, d_r = d_q[1], add_pairs(plan, pairs.sum(0)).astype(arrays.r.dtype)
    return (Arrays(d_q[0], d_k, d_v, d_q_position, d_r, None, None),)


_attention.defvjp(_forward, _backward)


def wide(arrays: Arrays) -> Any:
    """Return the dtype of sums: float32 or wider."""
    return at_least_float32(arrays.q.dtype)


def like(x: jax.Array | None) -> jax.ShapeDtypeStruct | None:
    return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)


def call(
    plan: Plan,
    kernel: Callable[..., Any],
    arrays: Arrays,
    more: Any,
    n: int,
    *outputs: jax.ShapeDtypeStruct | None,
    in_place: bool = False,
) -> list[jax.Array]:
    """Run n programs for each head; each reads all arrays of its head and writes one n-th of each output's rows.

    in_place: the last output overwrites `arrays.logits`, as `Tile.memory`.
    """
    heads, relative = arrays.q.shape[1], arrays.r is not None
    flat, structure = jax.tree.flatten((arrays, more))
    shapes = [x for x in outputs if x is not None]
    slots, (alone, with_lags, besides) = plan.pattern.key_slots, PRODUCTS[kernel]
    products = plan.n_tiles * with_lags + plan.n_blocks * besides if relative else plan.n_tiles * alone
    head_flops = slots * products * 2 * plan.block**2 * arrays.q.shape[3]

    def whole(x: jax.Array) -> pl.BlockSpec:
        """Return the spec of an input: all of one head's rows, or the whole array if it has no heads."""
        if x.ndim < 3:
            return pl.BlockSpec(memory_space=mosaic.SMEM) if plan.platform == "tpu" else pl.BlockSpec()
        if x.ndim == 3:
            return pl.BlockSpec((None, *x.shape[1:]), lambda b, h, i: (h, 0, 0))
        share = heads // x.shape[1]  # query slots that share a key head
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, h // share, 0, 0))

    def part(x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """Return the spec of an output: program i writes the i-th part of the rows."""
        return pl.BlockSpec((None, None, x.shape[2] // n, x.shape[3]), lambda b, h, i: (b, h, i, 0))

    def body(*refs: Any) -> None:
        given, more = jax.tree.unflatten(structure, refs[: len(flat)])
        results = kernel(Tile(plan, given, refs[-1]), *more)
        for ref, result in zip(refs[len(flat) :], results, strict=False):
            if isinstance(result, tuple):
                for columns, part in zip(plan.columns, result, strict=True):
                    ref[:, columns] = part.astype(ref.dtype)
            else:
                ref[...] = result

    def run(*flat: Any) -> list[jax.Array]:
        batch = flat[0].shape[0]
        written = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in shapes]
        if plan.by_memory and relative:
            written.append(jax.ShapeDtypeStruct((batch, heads, n * plan.block, 4 * plan.block), arrays.q.dtype))
        flops = batch * heads * head_flops
        moved = sum(x.size * x.dtype.itemsize for x in [*flat, *written])
        return pl.pallas_call(
            body,
            grid=(batch, heads, n),
            in_specs=[whole(x) for x in flat],
            out_specs=[part(x) for x in written],
            out_shape=written,
            input_output_aliases={len(jax.tree.leaves(arrays)) - 1: len(written) - 1} if in_place else {},
            compiler_params=compiler_parameters(plan, flat, simple=not relative and not more),
            interpret=plan.platform == "cpu",
            name=kernel.__name__,
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        )(*flat)[: len(shapes)]

    return (sharded_by_rows(run, flat, shapes) if n_devices() > 1 else run)(*flat)


def sharded_by_rows(run: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[..., Any]:
    """Return `run` sharded over the batch; by default XLA would compute the whole batch on every device.

    With a mesh, the batch is sharded over all axes. Otherwise a custom sharding rule applies, which TPUs do not support
    (jax-ml/jax#38196).
    """
    mesh = jax.sharding.get_abstract_mesh()

    def has_rows(x: Any) -> bool:
        return x.ndim != 3 and x.shape != (2,)  # all rows share r and the seeds

    if not mesh.empty:
        rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        specs = tuple(rows if has_rows(x) else whole for x in inputs)
        return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)
    numbers = itertools.count()

    def axes(x: Any) -> str:
        return " ".join(["b"] * has_rows(x) + [f"a{next(numbers)}" for _ in range(x.ndim - has_rows(x))])

    def partition(mesh: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        rows = inputs[0].sharding.spec[:1]
        whole, divided = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), rows))
        return mesh, run, *(tuple(divided if has_rows(x) else whole for x in arrays) for arrays in (outputs, inputs))

    rule = ", ".join(map(axes, inputs)) + " -> " + ", ".join(map(axes, outputs))
    alone = tuple(f"a{i}" for i in range(next(numbers)))
    divided = custom_partitioning(run)
    divided.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=alone)
    return jax.custom_batching.sequential_vmap(divided)


def compiler_parameters(plan: Plan, inputs: Sequence[Any], *, simple: bool) -> Any:
    """Return Pallas parameters: two pipeline stages on a GPU if they fit, room for two heads' arrays on a TPU."""
    if plan.platform == "gpu":
        return triton.CompilerParams(num_warps=4, num_stages=2 if simple else 1)
    if plan.platform == "tpu":
        of_head = sum(x.shape[-2] * round_up(x.shape[-1], LANES) * x.dtype.itemsize for x in inputs if x.ndim > 2)
        limit = 2 * of_head + ROOM
        return mosaic.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit)
    return None


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def add_pairs(plan: Plan, pairs: jax.Array) -> jax.Array:
    """[H, S n_blocks 2 b, K] -> [H, S G, K]; adds each pair's second block to the next pair's first."""
    heads, _, size = pairs.shape
    pairs = pairs.reshape(heads, plan.pattern.key_slots, plan.n_blocks, 2, plan.block, size)
    second = jnp.pad(pairs[:, :, :-1, 1], [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0)])
    return (pairs[:, :, :, 0] + second).reshape(heads, -1, size)
