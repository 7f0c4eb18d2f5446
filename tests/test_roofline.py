"""The roofline of compiled programs: operations and bytes by hand, and parts that add up to the whole."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from jax.extend.core import jaxprs_in_params

from experiments.accelerators.program import Program
from experiments.accelerators.roofline import ATTENTION, PRODUCTS, Roofline, total
from experiments.accelerators.sources import COLLECTIVES, NAMES, OTHER
from experiments.accelerators.step import Pretraining, compile_step
from experiments.accelerators.targets import find_target
from experiments.accelerators.work import Work, convolution_pairs, fused_attention_flops
from hourglass_jax import DataConfig, OptimizerConfig, RuntimeConfig, TrainConfig
from hourglass_jax.costs import training_flops
from hourglass_jax.nn.attention.kernel import kernel_attention
from hourglass_jax.nn.attention.pattern import Inputs, Pattern
from hourglass_jax.nn.attention.tiles import Plan

TARGET = find_target("h100")

# As XLA writes programs: a loop of five products, a fusion that cuts a row out and one that writes a row in place,
# a gradient exchanged, an array in a TPU's vector memory.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "train.py"
2 "lib/hourglass_jax/nn/transformer.py"
3 "lib/hourglass_jax/nn/resampling.py"

FunctionNames
1 "step"
2 "FeedForward.on_rows"
3 "AttentionShortening.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5}
2 {file_name_id=2 function_name_id=2 line=7}
3 {file_name_id=3 function_name_id=3 line=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=2 parent_frame_id=4}

%one_row (p: f32[64,32], i: s32[]) -> f32[1,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,32]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,32}
  ROOT %twice = f32[1,32]{1,0} add(%row, %row)
}

%in_place (p: f32[64,32], r: f32[1,32], i: s32[]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %r = f32[1,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %written = f32[64,32]{1,0} dynamic-update-slice(%p, %r, %i, %zero)
}

%body (c: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %c = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[64,32]{1,0} get-tuple-element(%c), index=1
  %w = bf16[32,16]{1,0} constant({...})
  %a = bf16[64,32]{1,0} convert(%x), metadata={op_name="jit(step)/convert" stack_frame_id=2}
  %y = bf16[64,16]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={stack_frame_id=2}
  %row = f32[1,32]{1,0} fusion(%x, %i), kind=kLoop, calls=%one_row, metadata={stack_frame_id=4}
  %new = f32[64,32]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%in_place
  ROOT %t = (s32[], f32[64,32]{1,0}) tuple(%i, %new)
}

%condition (c: (s32[], f32[64,32])) -> pred[] {
  %c = (s32[], f32[64,32]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %n = s32[] constant(0)
  %start = (s32[], f32[64,32]{1,0}) tuple(%n, %x)
  %loop = (s32[], f32[64,32]{1,0}) while(%start), condition=%condition, body=%body, LOOP
  %last = f32[64,32]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[64,32]{1,0} all-reduce(%last), replica_groups={{0,1,2,3}}, to_apply=%add, metadata={stack_frame_id=2}
  ROOT %near = f32[64,32]{1,0:T(8,128)S(1)} copy(%sum)
}
"""
TEXT = TEXT.replace("LOOP", 'backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}')


@pytest.fixture(scope="module")
def by_name():
    return {kernel.name: kernel for kernel in Roofline(TEXT, TARGET).kernels}


def test_flops_bytes_and_launches_are_those_counted_by_hand(by_name):
    assert {name: kernel.launches for name, kernel in by_name.items()} == {
        "a": 5,
        "y": 5,
        "row": 5,
        "new": 5,
        "sum": 1,
        "near": 1,
    }
    assert by_name["y"].flops == 2 * 64 * 16 * 32
    assert by_name["y"].memory_bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert by_name["a"].memory_bytes == (4 + 2) * 64 * 32
    assert by_name["row"].memory_bytes == 4 * (32 + 1 + 32)  # the row that is cut out, not the whole array
    assert by_name["new"].memory_bytes == 4 * (32 + 1 + 32)  # the row that is written, not the whole array
    assert by_name["near"].memory_bytes == 4 * 64 * 32  # what is written stays on the chip


def test_an_all_reduce_sends_as_much_as_a_reduce_scatter_and_an_all_gather(by_name):
    size = 4 * 64 * 32
    assert by_name["sum"].link_bytes == 2 * size * 3 / 4
    parts = [("reduce-scatter", "%last"), ("all-gather", "%shard")]
    assert sum(sent(kind, operand) for kind, operand in parts) == by_name["sum"].link_bytes


def sent(kind, operand, groups="{{0,1,2,3}}", n_devices=8):
    text = f"""ENTRY %main (last: f32[64,32], shard: f32[16,32]) -> f32[64,32] {{
  %last = f32[64,32]{{1,0}} parameter(0)
  %shard = f32[16,32]{{1,0}} parameter(1)
  ROOT %done = f32[64,32]{{1,0}} {kind}({operand}), replica_groups={groups}, to_apply=%add
}}"""
    program = Program(text)
    computation = program.computations["main"]
    return Work(program, n_devices).link_bytes(computation["done"], computation)


def test_groups_are_read_however_they_are_written():
    written = ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "[4,4]<=[2,8]T(1,0)", "mesh['data'=2,'fsdp'=4] {'fsdp'}"]
    assert len({sent("all-reduce", "%last", groups) for groups in written}) == 1
    everyone = {sent("all-reduce", "%last", groups) for groups in ("{}", "mesh['data'=2,'fsdp'=4] {'data','fsdp'}")}
    assert everyone == {2 * 4 * 64 * 32 * 7 / 8}


def test_seconds_are_those_of_what_bounds_a_kernel(by_name):
    product = by_name["y"]
    assert product.bound == "launch" and product.seconds == TARGET.launch
    [fast] = [k for k in Roofline(TEXT, replace(TARGET, launch=0.0)).kernels if k.name == "y"]
    assert fast.bound == "memory" and fast.seconds == product.memory_bytes / TARGET.bandwidth
    slow = replace(TARGET, launch=0.0, flops={"bfloat16": 1e6})
    [slow] = [k for k in Roofline(TEXT, slow).kernels if k.name == "y"]
    assert slow.bound == "products" and slow.seconds == pytest.approx(product.flops / (PRODUCTS * 1e6))
    assert by_name["sum"].seconds == max(by_name["sum"].link_bytes / TARGET.links, TARGET.launch)


def test_sources_are_those_of_the_innermost_call_and_resampling_takes_all_it_calls(by_name):
    sources = {name: kernel.source for name, kernel in by_name.items()}
    assert sources == {
        "a": "feed-forward",
        "y": "feed-forward",
        "row": "resampling",  # a feed-forward inside attention shortening
        "new": OTHER,
        "sum": COLLECTIVES,
        "near": "feed-forward",  # a copy of what was summed
    }


def test_a_loop_whose_length_nobody_states_is_as_long_as_its_counter_says():
    def counted(step, direction):
        text = TEXT.replace("known_trip_count", "unknown")
        for old, lines in (
            (
                "%always = pred[] constant(true)",
                ["%j = s32[] get-tuple-element(%c), index=0", "%end = s32[] constant(5)"],
            ),
            ("%t = ", [f"%one = s32[] constant({step})", "%next = s32[] add(%i, %one)"]),
        ):
            text = text.replace(f"  ROOT {old}", "".join(f"  {line}\n" for line in lines) + f"  ROOT {old}")
        text = text.replace("constant(true)", f"compare(%j, %end), direction={direction}")
        return Roofline(text.replace("tuple(%i, %new)", "tuple(%next, %new)"), TARGET)

    roofline = counted(1, "LT")
    [product] = (kernel for kernel in roofline.kernels if kernel.name == "y")
    assert product.launches == 5 and roofline.unknown_loops == 0
    assert counted(2, "LT").unknown_loops == counted(1, "NE").unknown_loops == 1


def test_a_loop_of_unknown_length_is_said_to_be_one():
    roofline = Roofline(TEXT.replace("known_trip_count", "unknown"), TARGET)
    assert roofline.unknown_loops == 1 and Roofline(TEXT, TARGET).unknown_loops == 0
    assert {kernel.launches for kernel in roofline.kernels} == {1}


@pytest.mark.parametrize("stride, input_step, kernel_step, padding", [(1, 1, 1, 0), (7, 8, 1, 0), (1, 1, 2, 3)])
def test_multiplications_of_a_convolution_are_those_that_meet_an_input(stride, input_step, kernel_step, padding):
    inputs, kernel, batch, features, channels = 8, 8, 3, 5, 2
    dilated = np.zeros((inputs - 1) * input_step + 1)
    dilated[::input_step] = 1
    padded = np.pad(dilated, padding)
    outputs = (len(padded) - (kernel - 1) * kernel_step - 1) // stride + 1
    pairs = sum(
        padded[o * stride + k * kernel_step] for o, k in itertools.product(range(max(outputs, 1)), range(kernel))
        if o * stride + k * kernel_step < len(padded)
    )  # fmt: skip
    window = f"size={kernel} stride={stride} pad={padding}_{padding} lhs_dilate={input_step} rhs_dilate={kernel_step}"
    instruction = SimpleNamespace(
        name="c",
        arrays=[SimpleNamespace(shape=(max(outputs, 1), batch, features))],
        attributes=f"window={{{window}}}, dim_labels=0bf_0io->0bf",
    )
    shapes = (inputs, batch, channels), (kernel, channels, features)
    assert convolution_pairs(instruction, *shapes) == pairs * batch * features * channels


@pytest.mark.parametrize("causal, window", [(False, 0), (True, 0), (True, 3)])
@pytest.mark.parametrize("backward", [False, True])
def test_fused_attention_counts_the_pairs_its_mask_leaves(causal, window, backward):
    n, size = 7, 16
    seen = [(i, j) for i in range(n) for j in range(n) if not causal or (j <= i and (not window or i - j < window))]
    mask = "CAUSAL" if causal else "NO_MASK"
    attributes = f'"intermediate_tensor_shape": {{"dimensions": ["2", "4", "{n}", "{n}"]}}, "mask_type": "{mask}", '
    attributes += f'"sliding_window_length": {window}'
    target = "__cudnn$fmhaSoftmax" + "Backward" * backward
    instruction = SimpleNamespace(name="a", attributes=attributes, text=lambda key: target)
    operands = [[SimpleNamespace(shape=(2, n, 4, size))]] * 3
    expected = 2 * 2 * 4 * size * len(seen) * (5 if backward else 2)
    assert fused_attention_flops(instruction, operands) == expected
    assert ATTENTION < PRODUCTS < 1


def small_run(**options):
    config = small_config(hierarchy="1@1 3@2 1@1", d_model=32, d_ff=64, **options)
    data = DataConfig(block_size=48, batch_size=4)
    return Pretraining(config, data, OptimizerConfig(), TrainConfig(), RuntimeConfig())


@pytest.fixture(scope="module")
def compiled():
    """A training step for this machine's CPU, once with all activations kept and once with none."""
    jax.config.update("jax_disable_most_optimizations", True)
    steps = {remat: compile_step(small_run(remat=remat), TARGET, jax.devices()[:1]) for remat in ("none", "full")}
    jax.config.update("jax_disable_most_optimizations", False)
    return steps


@pytest.mark.slow
def test_the_parts_of_a_training_step_add_up_to_the_whole(compiled):
    roofline = Roofline(compiled["none"].text, TARGET)
    parts, whole = roofline.breakdown(), total(roofline.kernels)
    assert set(NAMES) - {COLLECTIVES, OTHER} <= parts.keys() <= set(NAMES)
    for i in range(len(whole)):
        assert sum(part[i] for part in parts.values()) == pytest.approx(whole[i])
    assert sum(roofline.bounds().values()) == pytest.approx(whole.seconds)
    assert parts[OTHER].flops == 0 and roofline.unknown_loops == 0


@pytest.mark.slow
def test_the_products_of_a_training_step_are_those_of_the_model(compiled):
    run = small_run()
    flops = total(Roofline(compiled["none"].text, TARGET).kernels).flops
    model = run.data.batch_size * training_flops(run.model, run.data.block_size)
    assert model < flops < 1.5 * model  # scores above the diagonal and those computed again come on top
    assert flops < total(Roofline(compiled["full"].text, TARGET).kernels).flops


@pytest.mark.slow
def test_memory_is_divided_without_rest_and_remat_keeps_fewer_activations(compiled):
    memory = {remat: step.memory for remat, step in compiled.items()}
    for step in compiled.values():
        assert step.memory.peak == step.peak and step.fits(TARGET)
        assert not step.fits(replace(TARGET, memory=step.peak))  # a share of a GPU's memory is not the program's
    assert memory["full"].activations < memory["none"].activations
    parameters = memory["none"].parameters
    assert 2 * parameters <= memory["none"].optimiser < 2.1 * parameters


def test_a_product_in_a_scan_counts_as_often_as_it_runs():
    def repeated(x, n):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=n)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    flops = []
    for n in (1, 6):
        text = jax.jit(repeated, static_argnums=1).lower(x, n).compile().as_text()
        flops.append(total(Roofline(text, TARGET).kernels).flops)
    assert flops == [2 * 64**3, 6 * 2 * 64**3]


@pytest.mark.parametrize(
    "groups, block, key_slots, window", [(40, 16, 1, 0), (40, 16, 1, 9), (64, 16, 2, 0), (33, 8, 1, 33)]
)
def test_kernels_state_the_products_of_the_tiles_that_their_mask_leaves(groups, block, key_slots, window):
    n_blocks = -(-groups // block)
    plan = Plan(Pattern(1, key_slots, window=window), "gpu", 2, groups, (64,), block, n_blocks, by_memory=True)
    queries, keys = np.arange(n_blocks * block)[:, None], np.arange(n_blocks * block)
    visible = (keys <= queries) & (not window or queries - keys < window)
    assert plan.n_tiles == visible.reshape(n_blocks, block, -1, block).any((1, 3)).sum()


@pytest.mark.parametrize("relative", [False, True])
def test_kernels_state_the_products_that_they_compute(relative):
    """Of one block, whose loops run once: what they state is the products in their bodies."""
    x, r = jnp.zeros((1, 1, 16, 32)), jnp.zeros((1, 1, 16, 32))
    inputs = Inputs(x, x, x, *((x, r) if relative else ()))
    traced = jax.make_jaxpr(jax.grad(lambda inputs: kernel_attention(Pattern(1, 1), inputs).sum()))(inputs)
    kernels = [each for each in equations(traced.jaxpr) if each.primitive.name == "pallas_call"]
    assert len(kernels) == (4 if relative else 3)
    for kernel in kernels:
        dots = [each for each in equations(kernel.params["jaxpr"]) if each.primitive.name == "dot_general"]
        sizes = [each.invars[0].aval.size * each.outvars[0].aval.shape[-1] for each in dots]
        assert int(kernel.params["metadata"]["flops"]) == 2 * sum(sizes), kernel.params["name"]


def equations(jaxpr):
    """Of a program and of all that it calls."""
    for each in jaxpr.eqns:
        yield each
        for inner in jaxprs_in_params(each.params):
            yield from equations(inner)


@pytest.mark.parametrize(
    "text", ['{"flops": 123, "x": 1}', '"{\\22flops\\22: \\22123\\22}"', '{\\"flops\\": \\"123\\"}']
)
def test_flops_that_a_kernel_states_are_read_however_they_are_quoted(text):
    inside = 'frontend_attributes={kernel_metadata={\n"shape":"{2}"\n}}'  # Pallas on TPUs breaks the line here
    line = f'custom-call(), custom_call_target="tpu_custom_call", {inside}, backend_config={text}'
    program = Program("ENTRY %main () -> f32[2] {\n  ROOT %k = f32[2]{0} " + line + "\n}")
    computation = program.computations["main"]
    assert Work(program).flops(computation["k"], computation) == {"attention": 123}
