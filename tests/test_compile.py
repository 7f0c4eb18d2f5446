"""Compiling for machines that are not at hand: targets, advice, pages, errors, and the platforms' own programs."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import POSITIONS, small_config
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from launching import run_forked
from PIL import Image

from experiments.accelerators import pages, report, targets
from experiments.accelerators.advice import cheapest_changes
from experiments.accelerators.program import Program
from experiments.accelerators.report import METHOD, first_line
from experiments.accelerators.sources import NAMES
from experiments.accelerators.step import Compiled, Pretraining, Seconds, asked_bytes, compile_lowered, compile_step
from experiments.accelerators.targets import COMPILERS, find_target, is_installed, known_targets
from experiments.common.sources import read_tokenizer
from hourglass_jax import DataConfig, OptimizerConfig, RuntimeConfig, TrainConfig, UsageError
from hourglass_jax.nn.attention import Attention
from hourglass_jax.nn.attention.choice import IMPLEMENTATIONS
from hourglass_jax.training.sharding import make_mesh


@pytest.mark.parametrize("name", known_targets())
def test_every_target_has_chips_rates_and_what_its_compiler_asks_for(name):
    target = find_target(name)
    for rate in (target.memory, target.bandwidth, target.links, *target.flops.values()):
        assert rate > 1e9
    assert target.flops.keys() >= {"bfloat16", "float32"} and target.chips >= 1
    if target.platform == "gpu":
        text = targets.gpu_description("NVIDIA A", target.compiler)
        assert text.endswith('device_description_str: "NVIDIA A"\n')
        assert text.count("{") == text.count("}") and re.search(r"^  core_count: \d+$", text, re.M)


@pytest.mark.parametrize("name, chips", [("h100", 1), ("8xh100", 8), ("v5e-16", 16), ("v5e-256", 256), ("v5p-128", 64)])
def test_a_name_says_how_many_chips(name, chips):
    assert find_target(name).chips == chips


@pytest.mark.parametrize(
    "name, words",
    [
        ("h300", "'h300' is unknown; choose one of a100, b200, h100"),
        ("3xh100", "h100 comes as 1, 2, 4, 8; h100.toml lists them"),
        ("v5e-17", "v5e comes as 4, 8, 16"),
        ("not a name", "is unknown"),
        ("8xh100-4", "'8xh100-4' is unknown"),
    ],
)
def test_machines_that_there_are_not_are_refused(name, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        find_target(name)


def test_a_file_adds_a_target_and_a_poor_one_says_what_it_lacks(tmp_path, monkeypatch):
    text = (targets.DIRECTORY / "h100.toml").read_text()
    monkeypatch.setattr(targets, "DIRECTORY", tmp_path)
    (tmp_path / "mine.toml").write_text(text.replace("3.35e12", "1e12"))
    assert known_targets() == ["mine"] and find_target("2xmine").bandwidth == 1e12
    for broken, words in (
        (text.replace("links", "rings"), "lacks links"),
        (text + "\n=", "not TOML"),
        ('colour = "red"\n' + text, "knows nothing of colour"),
        (text.replace('"gpu"', '"npu"'), "choose one of gpu, tpu"),
    ):
        (tmp_path / "mine.toml").write_text(broken)
        with pytest.raises(UsageError, match=words):
            find_target("mine")


@pytest.mark.parametrize("name, extra", [("h100", "cuda"), ("v5e-4", "tpu")])
def test_a_missing_compiler_is_one_line_that_says_which_extra(name, extra, monkeypatch):
    monkeypatch.setattr(targets, "is_installed", lambda package: False)
    with pytest.raises(UsageError, match=re.escape(f"pip install -e '.[{extra}]'")):
        find_target(name).devices()


def test_bad_commands_end_with_one_line(tmp_path):
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


def test_a_tokenizer_is_that_of_the_data(tmp_path):
    for name in "ab":
        Image.new("RGB", (6, 4)).save(tmp_path / f"{name}.png")
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


def attempts(peaks):
    """Pretends to compile: the peak by (remat, accumulate, fsdp), and seconds that grow with how much is changed."""
    tried = []

    def attempt(run):
        key = (run.model.remat, run.runtime.accumulate, run.runtime.fsdp)
        tried.append(key)
        seconds = {"auto": 0, "dots": 1, "full": 3}[key[0]] + key[1] / 8 + key[2] / 4
        return Compiled("program", "", Seconds(0, 0, 0), None, peaks(*key)), seconds

    return attempt, tried


def test_the_two_cheapest_changes_that_fit_are_advised():
    def peaks(remat, accumulate, fsdp):
        return {"auto": 30, "dots": 20, "full": 8}[remat] / accumulate + 4 / fsdp

    attempt, tried = attempts(peaks)
    changes = cheapest_changes(tiny_run(), 4, lambda compiled: compiled.peak <= 14, attempt)
    # accumulate=4 is the mildest that fits; no fsdp alone does; remat must be full.
    assert [change.options for change in changes] == [{"accumulate": 4}, {"remat": "full"}]
    assert changes[0].flags == "--runtime.accumulate=4" and changes[0].seconds < changes[1].seconds
    assert ("auto", 2, 1) in tried and ("dots", 1, 1) in tried and ("auto", 1, 4) in tried
    attempt, _ = attempts(peaks)
    [change] = cheapest_changes(tiny_run(), 4, lambda compiled: compiled.peak <= 4, attempt)
    assert change.options == {"remat": "full", "accumulate": 4, "fsdp": 4}  # only all together
    assert cheapest_changes(tiny_run(), 4, lambda compiled: False, attempt) == []


def test_what_a_tpu_compiler_wanted_is_read_from_its_refusal():
    failure = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    assert asked_bytes(failure) == 20.5 * 2**30
    failure = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.90G) exceeds available HBM (15.75G)."
    )
    assert asked_bytes(failure) == 15.9 * 2**30
    assert asked_bytes("INTERNAL: something else") is None


@pytest.fixture(scope="module")
def row():
    jax.config.update("jax_disable_most_optimizations", True)
    target = find_target("h100")
    compiled = compile_step(tiny_run(), target, jax.devices()[:1])
    jax.config.update("jax_disable_most_optimizations", False)
    return {"name": "relative"} | report.summarise(tiny_run(), target, compiled, 1e9) | {"changes": []}


def test_a_row_says_estimate_wherever_it_gives_a_time(row):
    text = report.describe(row)
    for line in text.splitlines():
        if re.search(r"\bms\b", line):
            assert re.search("estimate", line, re.I), line
    assert row["compiles"] and row["fits"] and "GiB a chip at the peak" in text
    figures = row["estimate"]
    assert figures["characters_per_second"] * figures["seconds"] == pytest.approx(16 * 32)
    assert figures["days"] * 86_400 * figures["characters_per_second"] == pytest.approx(1e9)
    assert sum(part["seconds"] for part in figures["breakdown"].values()) == pytest.approx(figures["seconds"])


def test_a_row_that_does_not_fit_or_compile_says_so(row):
    changes = [{"flags": "--runtime.accumulate=2", "options": {}, "peak": 2**30, "seconds": 0.01}]
    too_large = row | {"fits": False, "changes": changes}
    text = report.describe(too_large)
    assert "DOES NOT FIT" in text and "`--runtime.accumulate=2`: 1.00 GiB a chip, 10.0 ms a step (estimate)" in text
    assert "take more chips" in report.describe(too_large | {"changes": []})
    refused = {"compiles": False, "fits": False, "peak_bytes": None, "failure": first_line("INTERNAL: no\nmore")}
    assert "DOES NOT COMPILE for h100: INTERNAL: no" in report.describe(row | refused)


def test_pages_keep_one_row_for_each_name_and_target(row, tmp_path):
    path = tmp_path / "deep" / "mine"
    pages.add_row(path, row)
    pages.add_row(path, row | {"target": "8xh100", "machine": "8 x NVIDIA H100 SXM 80 GB"})
    pages.add_row(path, row | {"fits": False})
    record = json.loads(path.with_suffix(".json").read_text())
    assert [each["target"] for each in record["rows"]] == ["h100", "8xh100"]
    assert record["rows"][0]["fits"] is False
    text = path.with_suffix(".md").read_text()
    assert METHOD in text and text.count("## relative on") == 2 and "| ms a step (estimate) |" in text
    assert path.with_suffix(".png").stat().st_size > 5_000
    assert set(record["rows"][0]["estimate"]["breakdown"]) <= set(NAMES)
    assert str(tmp_path) not in text


# What the platform's own kernels are called in its programs.
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
            unit=1,
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
    program = Program(text)
    calls = [call for body in program.computations.values() for call in body.values() if call.opcode == "custom-call"]
    own = [call for call in calls if any(word in call.text("custom_call_target") for word in KERNELS[target.platform])]
    for name in layers:
        used = any(name in call.text("op_name") for call in own)
        assert used == uses_kernel(attention, name), (name, {call.text("op_name") for call in own})


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
