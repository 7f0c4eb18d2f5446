"""Compilation for other machines: targets, memory, advice, errors, and the platforms' own programs."""

import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from conftest import POSITIONS, small_config
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from launching import run_forked
from PIL import Image

from experiments.accelerators import report, targets
from experiments.accelerators.report import Change, cheapest_changes, describe_changes
from experiments.accelerators.step import Compiled, Pretraining, compile_lowered, compile_step, required_bytes
from experiments.accelerators.targets import COMPILERS, find_target, is_installed, known_targets
from experiments.common.sources import read_tokenizer
from hourglass_jax import DataConfig, OptimizerConfig, RuntimeConfig, TrainConfig, UsageError
from hourglass_jax.costs import count_parameters, training_flops
from hourglass_jax.nn.attention import Attention
from hourglass_jax.nn.attention.choice import IMPLEMENTATIONS
from hourglass_jax.training.sharding import make_mesh


@pytest.mark.parametrize("name", known_targets())
def test_every_target_has_chips_rates_and_a_description_for_its_compiler(name):
    target = find_target(name)
    assert all(rate > 1e9 for rate in (target.memory, *target.flops.values()))
    assert target.flops.keys() >= {"bfloat16", "float32"} and target.chips >= 1
    if target.platform == "gpu":
        text = targets.gpu_description("NVIDIA A", target.compiler)
        assert text.endswith('device_description_str: "NVIDIA A"\n')
        assert text.count("{") == text.count("}") and re.search(r"^  core_count: \d+$", text, re.M)


@pytest.mark.parametrize("name, chips", [("h100", 1), ("8xh100", 8), ("v5e-16", 16), ("v5e-256", 256), ("v5p-128", 64)])
def test_a_target_name_gives_the_number_of_chips(name, chips):
    assert find_target(name).chips == chips


@pytest.mark.parametrize(
    "name, words",
    [
        ("h300", "'h300' is unknown; choose one of a100, b200, h100"),
        ("3xh100", "h100 is available as 1, 2, 4, 8; choose one, or add a size to h100.toml"),
        ("v5e-17", "v5e is available as 4, 8, 16"),
        ("not a name", "is unknown"),
        ("8xh100-4", "'8xh100-4' is unknown"),
    ],
)
def test_unknown_targets_raise(name, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        find_target(name)


def test_a_file_adds_a_target_and_an_invalid_file_raises_a_one_line_error(tmp_path, monkeypatch):
    text = (targets.DIRECTORY / "h100.toml").read_text()
    monkeypatch.setattr(targets, "DIRECTORY", tmp_path)
    (tmp_path / "mine.toml").write_text(text.replace("989e12", "1e12"))
    assert known_targets() == ["mine"] and find_target("2xmine").flops["bfloat16"] == 1e12
    for broken, words in (
        (text.replace("memory =", "size ="), "lacks fields memory"),
        (text + "\n=", "not TOML"),
        ('colour = "red"\n' + text, "unknown fields colour"),
        (text.replace('"gpu"', '"npu"'), "choose one of gpu, tpu"),
    ):
        (tmp_path / "mine.toml").write_text(broken)
        with pytest.raises(UsageError, match=words):
            find_target("mine")


@pytest.mark.parametrize("name, extra", [("h100", "cuda"), ("v5e-4", "tpu")])
def test_a_missing_compiler_raises_a_one_line_error_that_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(targets, "is_installed", lambda package: False)
    with pytest.raises(UsageError, match=re.escape(f"pip install -e '.[{extra}]'")):
        find_target(name).devices()


def test_invalid_commands_end_with_one_line(tmp_path):
    for flags, words in (
        (["--target=h300"], "is unknown"),
        (["--target=h100", "--shorten_factors=2,3"], "several programs"),
        (["--target=h100", "--shortening=sum"], "shortening='sum' is unknown"),
        (["--target=h100", "--init_from=nowhere"], "nowhere: no such directory"),
        (["--target=h100", "--init_from=books", "--d_model=64"], "do not fit"),
        ([], "--target"),
    ):
        result = run_forked("compile", *flags, cwd=tmp_path)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_the_tokenizer_is_that_of_the_data(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (6, 4), name).save(tmp_path / f"{name}.png")
    (tmp_path / "text.txt").write_text("abc")
    folder = read_tokenizer(DataConfig(dataset="folder", path=str(tmp_path), image_size=4, train_fraction=0.5), "")
    assert (folder.shape, folder.n_tokens) == ((4, 4, 3), 48)
    for options, shape in (({}, (32, 32, 3)), ({"image_size": 16}, (16, 16, 3))):
        assert read_tokenizer(DataConfig(dataset="cifar10", **options), "").shape == shape
    assert read_tokenizer(DataConfig(tokenizer="byte"), "").kind == "byte"
    assert read_tokenizer(DataConfig(path=str(tmp_path / "text.txt")), "").characters == [*"abc"]


def tiny_run(batch_size=16, **options):
    model = small_config(hierarchy="1@1 1@2 1@1", d_model=32, d_ff=64, **options)
    return Pretraining(
        model, DataConfig(block_size=32, batch_size=batch_size), OptimizerConfig(), TrainConfig(), RuntimeConfig()
    )


def compile_as(peaks):
    """Return a stand-in for the compiler, with the peak of (remat, accumulate, fsdp), and the list of its calls."""
    tried = []

    def compile_run(run):
        key = (run.model.remat, run.runtime.accumulate, run.runtime.fsdp)
        tried.append(key)
        return Compiled("program", "", 0, {}, peaks(*key) * 2**30)

    return compile_run, tried


def test_the_two_cheapest_changes_that_fit_are_advised():
    def peaks(remat, accumulate, fsdp):
        return {"auto": 180, "dots": 120, "full": 48}[remat] / accumulate + 24 / fsdp

    target = find_target("4xh100")  # 75 GiB a chip
    compile_run, tried = compile_as(peaks)
    changes = cheapest_changes(tiny_run(), target, compile_run)
    # accumulate=4 is the mildest that fits; no fsdp alone fits; remat has to be full.
    assert [change.options for change in changes] == [{"accumulate": 4}, {"remat": "full"}]
    assert changes[0].peak == 69 * 2**30 and "`--runtime.accumulate=4`" in describe_changes(changes)
    assert tried == [("auto", 2, 1), ("auto", 4, 1), ("auto", 1, 2), ("auto", 1, 4), ("dots", 1, 1), ("full", 1, 1)]
    compile_run, _ = compile_as(lambda *key: 3 * peaks(*key))
    [change] = cheapest_changes(tiny_run(), target, compile_run)
    assert change.options == {"accumulate": 4, "fsdp": 4, "remat": "full"}  # only combined
    assert cheapest_changes(tiny_run(), target, lambda run: Compiled("", "no", 0, {}, None)) == []


def test_the_memory_that_a_tpu_compiler_requires_is_read_from_its_error():
    failure = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert required_bytes(failure) == 20.5 * 2**30
    failure = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.90G) exceeds available HBM (15.75G)."
    )
    assert required_bytes(failure) == 15.9 * 2**30
    assert required_bytes("INTERNAL: something else") is None


@pytest.fixture(scope="module")
def compiled():
    """A training step compiled for this machine's CPU."""
    jax.config.update("jax_disable_most_optimizations", True)
    step = compile_step(tiny_run(), find_target("h100"), jax.devices()[:1])
    jax.config.update("jax_disable_most_optimizations", False)
    return step


def test_memory_is_divided_without_rest(compiled):
    memory, target = compiled.memory, find_target("h100")
    assert sum(memory.values()) == compiled.peak and compiled.fits(target)
    assert not compiled.fits(replace(target, memory=compiled.peak))  # a part of a GPU's memory is not the program's
    assert memory["parameters"] == 4 * count_parameters(tiny_run().model)
    assert 2 * memory["parameters"] <= memory["optimizer"] < 2.1 * memory["parameters"]
    assert memory["batch"] == 4 * (16 * 33 + 16 * 32) and memory["activations and temporaries"] > 0


def test_times_are_the_model_s_flops_at_two_shares_of_the_peak(compiled):
    run, target = tiny_run(), find_target("8xh100")
    flops = 16 * training_flops(run.model, 32)
    assert report.step_seconds(run, target, 0.4) == pytest.approx(flops / (0.4 * 8 * target.flops["float32"]))
    text = report.describe(run, target, compiled, 1e9)
    rate = 16 * 32 / report.step_seconds(run, target, 1.0)
    assert f"| 100% | 0.00 | {rate:,.0f} | {1e9 / rate / 86_400:.2g} |" in text and "\n| 40% |" in text
    assert " and fits." in text and f"| peak | {compiled.peak / 2**30:.2f} |" in text


def test_a_step_that_does_not_fit_or_compile_is_reported(compiled):
    run, target = tiny_run(), find_target("h100")
    too_large = replace(compiled, peak=target.memory)
    assert "DOES NOT FIT" in report.describe(run, target, too_large, 1)
    refused = Compiled("", "INTERNAL: no\nmore", 0, {}, 2**40)
    assert "DOES NOT FIT: the step requires 1024.00 GiB" in report.describe(run, target, refused, 1)
    assert "DOES NOT COMPILE for h100: INTERNAL: no\n" in report.describe(run, target, replace(refused, peak=None), 1)
    text = describe_changes([Change({"accumulate": 2, "remat": "full"}, 2**30)])
    assert "- `--runtime.accumulate=2 --model.remat=full`: 1.00 GiB per chip" in text
    assert "use more chips" in describe_changes([])


# Names of the platform's own kernels in its programs.
KERNELS = {"gpu": ("fmha", "triton"), "tpu": ("tpu_custom_call",)}
# Query slots, key slots and window of a level's layers, of local ones, of shortening and of upsampling.
LAYERS = [(1, 1, 0), (1, 1, 32), (1, 2, 0), (2, 1, 0)]


def devices_of(name):
    target = find_target(name)
    packages, extra = COMPILERS[target.platform]
    if not any(map(is_installed, packages)):
        pytest.skip(f"needs the extra [{extra}]")
    return target, target.devices()


@pytest.mark.slow
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["h100", "v5e-4"])
def test_every_attention_compiles_for_every_platform_as_the_platforms_own_program(name, attention):
    """With every position and window, forward and backward, in one program, in which each layer has its name."""
    target, devices = devices_of(name)
    options = {"d_model": 128, "n_heads": 2, "dtype": "bfloat16", "attention": attention}
    layers = {
        f"{positions}-{query_slots}-{key_slots}-{window}": Attention(
            small_config(positions=positions, window=window, **options),
            tokens_per_position=1,
            query_slots=query_slots,
            key_slots=key_slots,
            rngs=nnx.Rngs(0),
        )
        for positions, (query_slots, key_slots, window) in itertools.product(POSITIONS, LAYERS)
    }

    def loss(x):
        total = 0.0
        for name, layer in layers.items():
            queries, keys = (x[:, : 80 * n].reshape(1, 80, n, 128) for n in (layer.query_slots, layer.key_slots))
            with jax.named_scope(name):
                total += layer(queries, keys).astype(jnp.float32).sum()
        return total

    mesh = make_mesh(RuntimeConfig(), devices[:1])
    x = jax.ShapeDtypeStruct((1, 160, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = compile_lowered(jax.jit(jax.grad(loss)).lower(x)).as_text()
    calls = re.findall(r'custom_call_target="([^"]*)".*?op_name="([^"]*)"', text)
    own = {name for kernel, name in calls if any(word in kernel for word in KERNELS[target.platform])}
    for name in layers:
        assert any(name in scope for scope in own) == uses_kernel(attention, name), (name, own)


def uses_kernel(attention, name):
    return attention == "kernel" or (attention == "fused" and not name.startswith("relative"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8xh100", "v5e-4"])
def test_a_step_on_several_devices_compiles_with_our_kernels(name):
    target, devices = devices_of(name)
    sizes = {"d_model": 128, "n_heads": 2, "d_ff": 128, "max_length": 160, "dtype": "bfloat16"}
    model = small_config(hierarchy="1@1 1@2 1@1", attention="kernel", window=32, **sizes)
    data = DataConfig(block_size=160, batch_size=len(devices))
    run = Pretraining(model, data, OptimizerConfig(), TrainConfig(), RuntimeConfig())
    compiled = compile_step(run, target, devices)
    assert any(word in compiled.text for word in KERNELS[target.platform]), compiled.failure
