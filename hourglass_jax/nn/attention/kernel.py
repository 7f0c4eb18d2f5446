"""Flash kernels, forward and backward, with relative positions inside the block: in Pallas, for GPUs and TPUs.

Scores never leave the chip: memory grows linearly with length, and with a window a kernel visits the band alone. Each
program has one head and one block of queries, of keys, or of lags, and walks over the blocks that it meets; see
`tiles`. On a CPU the kernels are interpreted: slow, for tests.

To fit one kernel, query slots are further heads of one key head, and the query of a group stands at its last key.
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

from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.tiles import Arrays, Plan, Tile, forward_tile, key_tile, lag_tile, query_tile
from hourglass_jax.nn.platform import n_devices, platform

BLOCKS = {"gpu": 64, "tpu": 128, "cpu": 16}  # query rows of a block, and keys
SMALLEST = 16  # rows of a product on a GPU
LANES = 128  # of a TPU: its arrays are as wide, or a multiple
ROOM = 16 * 2**20  # bytes of a TPU's memory for what a program computes
# For each kernel the products of a tile with blocks of keys or values, and with slabs of relative keys.
PRODUCTS: dict[Callable[..., Any], tuple[int, int]] = {
    forward_tile: (2, 1),
    query_tile: (3, 2),
    key_tile: (4, 1),
    lag_tile: (2, 2),
}


def kernel_attention(
    pattern: Pattern, inputs: Inputs, first: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """-> [B, H, G P, K]. Groups before `first` [B] are padding; `key` turns dropout on."""
    batch, heads, n_queries, size = inputs.q.shape
    slots, groups = pattern.query_slots, n_queries // pattern.query_slots

    def slots_as_heads(q: Any) -> Any:
        if q is None:
            return q
        return q.reshape(batch, heads, groups, slots, size).swapaxes(2, 3).reshape(batch, -1, groups, size)

    r = inputs.r
    if r is not None:
        r = r.swapaxes(0, 1).reshape(heads * slots, -1, size)
    first = jnp.zeros(batch, jnp.int32) if first is None else first.astype(jnp.int32)
    arrays = Arrays(
        q=slots_as_heads(inputs.q),
        k=inputs.k,
        v=inputs.v,
        q_position=slots_as_heads(inputs.q_position),
        r=r,
        rows=jnp.stack([jnp.arange(batch, dtype=jnp.int32), first], axis=1),
        seeds=jnp.zeros(2, jnp.uint32) if key is None else jax.random.bits(key, (2,), jnp.uint32),
    )
    plan = make_plan(pattern if key is not None else pattern._replace(dropout=0.0), heads, groups, size)
    out = _attention(plan, arrays)
    return out.reshape(batch, heads, slots, groups, size).swapaxes(2, 3).reshape(inputs.q.shape)


def make_plan(pattern: Pattern, heads: int, groups: int, size: int) -> Plan:
    name = platform()
    block = BLOCKS[name]
    parts: tuple[int, ...] = (size,)
    if name != "tpu":  # whose products are always that large
        size = round_up(size, SMALLEST)
        parts = tuple(1 << bit for bit in reversed(range(size.bit_length())) if size & (1 << bit))
        block //= pl.next_power_of_2(pattern.key_slots)  # the slab has a row for every key of the block's groups
        block = max(SMALLEST, min(block, pl.next_power_of_2(groups)))
    return Plan(pattern, name, heads, groups, parts, block, -(-groups // block), by_memory=name != "tpu")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, arrays: Arrays) -> jax.Array:
    return _forward(plan, arrays)[0]


def _forward(plan: Plan, arrays: Arrays) -> tuple[jax.Array, Any]:
    padded = pad(plan, arrays)
    log_totals = jax.ShapeDtypeStruct((*padded.q.shape[:3], 1), wide(arrays))
    out, log_total = call(plan, forward_tile, padded, (), plan.n_blocks, like(padded.q), log_totals)
    out = out[:, :, : plan.groups, : arrays.q.shape[3]]
    return out, (arrays, out, log_total)


def _backward(plan: Plan, residuals: Any, d_out: jax.Array) -> tuple[Arrays]:
    arrays, out, log_total = residuals
    padded = pad(plan, arrays)
    correction = (d_out * out).astype(log_total.dtype).sum(-1, keepdims=True)  # probabilities times their gradients
    more = pad_to(d_out, padded.q.shape), log_total, pad_to(correction, log_total.shape)
    batch, heads, _, size = padded.q.shape
    of_keys = jax.ShapeDtypeStruct((batch, heads, *padded.k.shape[2:]), padded.k.dtype)
    d_q = call(plan, query_tile, padded, more, plan.n_blocks, *map(like, (padded.q, padded.q_position)))
    d_k, d_v = call(plan, key_tile, padded, more, plan.n_lags, of_keys, of_keys)
    # Of all query slots together.
    d_k, d_v = (x.reshape(batch, plan.heads, -1, *x.shape[2:]).sum(2) for x in (d_k, d_v))
    d_r = None
    if arrays.r is not None:
        of_slabs = jax.ShapeDtypeStruct((batch, heads, plan.n_lags * plan.slab, size), wide(arrays))
        [slabs] = call(plan, lag_tile, padded, more, plan.n_lags, of_slabs)
        n = plan.n_lags * plan.block
        d_r = add_slabs(plan, slabs.sum(0))[:, n - arrays.r.shape[1] : n]

    def cut(x: jax.Array | None, d_x: Any) -> Any:
        return None if x is None else d_x[tuple(map(slice, x.shape))].astype(x.dtype)

    d_arrays = Arrays(d_q[0], d_k, d_v, d_q[-1], d_r, None, None)
    return (Arrays(*map(cut, arrays[:5], d_arrays[:5]), rows=None, seeds=None),)  # type: ignore[misc]


_attention.defvjp(_forward, _backward)


def wide(arrays: Arrays) -> Any:
    """The type of sums: float32 at least."""
    return jnp.promote_types(arrays.q.dtype, jnp.float32)


def like(x: jax.Array | None) -> jax.ShapeDtypeStruct | None:
    return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)


def call(
    plan: Plan, kernel: Callable[..., Any], arrays: Arrays, more: Any, n: int, *outputs: jax.ShapeDtypeStruct | None
) -> list[jax.Array]:
    """Runs n programs for each head; each sees all of its head's arrays and writes its n-th of every output's rows."""
    heads, simple = arrays.q.shape[1], arrays.r is None and not more
    flat, structure = jax.tree.flatten((arrays, more))
    shapes = [x for x in outputs if x is not None]
    of_keys, of_slabs = PRODUCTS[kernel]
    columns = of_keys * plan.block + (0 if arrays.r is None else of_slabs * plan.slab)
    tile_flops = 2 * plan.n_tiles * plan.block * columns * arrays.q.shape[3]

    def whole(x: jax.Array) -> pl.BlockSpec:
        """What belongs to a head, or all of what belongs to none."""
        if x.ndim < 3:
            return pl.BlockSpec(memory_space=mosaic.SMEM) if plan.platform == "tpu" else pl.BlockSpec()
        if x.ndim == 3:
            return pl.BlockSpec((None, *x.shape[1:]), lambda b, h, i: (h, 0, 0))
        share = heads // x.shape[1]  # query slots of a key head
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, h // share, 0, 0))

    def part(x: jax.ShapeDtypeStruct) -> pl.BlockSpec:
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
        if plan.by_memory and arrays.r is not None:
            written.append(jax.ShapeDtypeStruct((batch, heads, n * plan.block, plan.slab), arrays.q.dtype))
        flops = batch * heads * tile_flops
        moved = sum(x.size * x.dtype.itemsize for x in [*flat, *written])
        return pl.pallas_call(
            body,
            grid=(batch, heads, n),
            in_specs=[whole(x) for x in flat],
            out_specs=[part(x) for x in written],
            out_shape=written,
            compiler_params=compiler_parameters(plan, flat, simple=simple),
            interpret=plan.platform == "cpu",
            name=kernel.__name__,
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
            metadata={"flops": str(flops)},  # of which a GPU's program keeps this alone
        )(*flat)[: len(shapes)]

    return (divided_by_rows(run, flat, shapes) if n_devices() > 1 else run)(*flat)


def divided_by_rows(run: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Callable[..., Any]:
    """`run` on each device's rows of the batch; XLA alone would let every device compute all of them.

    Where a mesh is in use, by its axes; elsewhere XLA asks for a rule, which no TPU's does (jax-ml/jax#38196).
    """
    mesh = jax.sharding.get_abstract_mesh()

    def of_rows(x: Any) -> bool:
        return x.ndim != 3 and x.shape != (2,)  # r and seeds belong to all of them

    if not mesh.empty:
        rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        specs = tuple(rows if of_rows(x) else whole for x in inputs)
        return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)
    numbers = itertools.count()

    if not mesh.empty:
        rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        specs = tuple(rows if of_rows(x) else whole for x in inputs)
        return jax.shard_map(run, in_specs=specs, out_specs=rows, check_vma=False)
    numbers = itertools.count()

    def axes(x: Any) -> str:
        return " ".join(["b"] * of_rows(x) + [f"a{next(numbers)}" for _ in range(x.ndim - of_rows(x))])

    def partition(mesh: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        rows = inputs[0].sharding.spec[:1]
        whole, divided = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), rows))
        return mesh, run, *(tuple(divided if of_rows(x) else whole for x in arrays) for arrays in (outputs, inputs))

    rule = ", ".join(map(axes, inputs)) + " -> " + ", ".join(map(axes, outputs))
    alone = tuple(f"a{i}" for i in range(next(numbers)))
    divided = custom_partitioning(run)
    divided.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=alone)
    return jax.custom_batching.sequential_vmap(divided)


def compiler_parameters(plan: Plan, inputs: Sequence[Any], *, simple: bool) -> Any:
    """On a GPU a kernel has two tiles at a time in its shared memory where they fit; on a TPU two heads' arrays."""
    if plan.platform == "gpu":
        return triton.CompilerParams(num_warps=4, num_stages=2 if simple else 1)
    if plan.platform == "tpu":
        of_head = sum(x.shape[-2] * round_up(x.shape[-1], LANES) * x.dtype.itemsize for x in inputs if x.ndim > 2)
        limit = 2 * of_head + ROOM
        return mosaic.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit)
    return None


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pad_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """With zeros behind, along every axis."""
    return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)])


def pad(plan: Plan, arrays: Arrays) -> Arrays:
    """Whole blocks and whole parts of heads, and of r a row for every lag that a block meets."""
    batch, heads = arrays.q.shape[:2]
    size = sum(plan.parts)
    n = plan.n_lags * plan.block
    q_shape = batch, heads, plan.n_blocks * plan.block, size
    k_shape = batch, plan.heads, n, size
    q_position, r = arrays.q_position, arrays.r
    if q_position is not None and r is not None:
        q_position = pad_to(q_position, q_shape)
        r = jnp.pad(r, [(0, 0), (n - r.shape[1], 0), (0, 0)])
        r = pad_to(r, (heads, n + plan.slab - plan.block, size))
    q, k, v = pad_to(arrays.q, q_shape), pad_to(arrays.k, k_shape), pad_to(arrays.v, k_shape)
    return Arrays(q, k, v, q_position, r, arrays.rows, arrays.seeds)


def add_slabs(plan: Plan, slabs: jax.Array) -> jax.Array:
    """[H, n_lags slab, K] -> [H, n_lags b + slab - b, K], the sum where slabs overlap."""
    heads, _, size = slabs.shape
    n = plan.slab // plan.block
    parts = slabs.reshape(heads, plan.n_lags, n, plan.block, size)
    total = jnp.zeros((heads, plan.n_lags + n - 1, plan.block, size), slabs.dtype)
    for i in range(n):
        total = total.at[:, i : i + plan.n_lags].add(parts[:, :, i])
    return total.reshape(heads, -1, size)
