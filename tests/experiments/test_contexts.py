"""What more context gives: the same characters are asked for at each, and only what a model sees changes the answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_model
from launching import MICRO, run_forked

import hourglass_jax as hg
from experiments.ablations import contexts
from experiments.ablations.scales import find_setup
from experiments.common.reports import rerender
from hourglass_jax import HourglassConfig, UsageError
from hourglass_jax.training.signals import Signals

SIZES = {"vocab_size": 256, "d_model": 16, "n_heads": 2, "d_ff": 32, "max_length": 64}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    path = tmp_path_factory.mktemp("contexts") / "text"
    path.write_bytes(np.random.default_rng(0).integers(97, 123, 20_000, np.uint8).tobytes())
    found = find_setup("enwik8", "micro", str(path))
    return replace(found, data=replace(found.data, split="fraction"), n_valid=20)


def test_contexts_double_up_to_the_model_s_length():
    assert contexts.contexts(256) == [12, 24, 48, 96, 192] and contexts.contexts(36) == [12]
    with pytest.raises(UsageError, match="sequences of 35 characters are too short for 12 of context and 24 after it"):
        contexts.contexts(35)


def test_every_context_scores_the_same_characters(setup):
    samples = [contexts.sample(setup, context) for context in (12, 24, 96)]
    for context, tokens in zip((12, 24, 96), samples, strict=True):
        assert tokens.shape == (20, context + contexts.N_SCORED + 1)
        assert (tokens[:, -37:] == samples[0]).all()
    with pytest.raises(UsageError, match="2,000 validation characters, but contexts of 192 require 2,160"):
        contexts.sample(setup, 192)


def test_bits_equal_those_of_single_rows(setup):
    model, tokens = make_model(HourglassConfig(hierarchy="1@1", **SIZES)), contexts.sample(setup, 24)[:3]
    naive = [-np.asarray(hg.score(model, row[None]))[0, 24:].astype(np.float64).mean() / np.log(2) for row in tokens]
    np.testing.assert_allclose(contexts.bits(model, tokens), naive, rtol=1e-5)


@pytest.mark.parametrize(("hierarchy", "gains"), [("2@1", False), ("1@1 1@3 0@1", True)])
def test_only_a_model_with_that_context_gains(setup, hierarchy, gains):
    """Two layers of five tokens see eight back; shortened layers see everything."""
    model = make_model(HourglassConfig(hierarchy=hierarchy, window=5, **SIZES))
    shortest, *further = contexts.readings(model, 64, setup, Signals())
    assert shortest["context"] == 12 and shortest["gain"] == 0 and len(further) == 1
    for each in further:
        assert each["bits"] == pytest.approx(shortest["bits"] - each["gain"])
        assert (abs(each["gain"]) > 1e-4 and each["standard_error"] > 1e-4) == gains


def test_measurements_are_kept_until_repeated_and_are_drawn(setup, tmp_path):
    path, config = tmp_path / "contexts-text", HourglassConfig(hierarchy="1@1", **SIZES)

    def measured(**seeds):
        models = {name: lambda seed=seed: (make_model(config, seed), 64) for name, seed in seeds.items()}
        contexts.measure(models, setup, path, "text", Signals())
        return json.loads((tmp_path / "contexts-text.json").read_text())["models"]

    first, second = measured(one=0)["one"], measured(two=1)["two"]
    assert measured(three=0) == {"one": first, "two": second, "three": first} and first != second
    assert measured(one=1) == {"one": second, "two": second, "three": first}
    first = second
    with pytest.raises(UsageError, match=r"other settings \(places: 20 -> 30\); remove it"):
        contexts.measure({}, replace(setup, n_valid=30), path, "text", Signals())
    (tmp_path / "contexts-text.png").unlink()
    rerender(path, contexts.render, contexts.draw, "Said once.")
    text = (tmp_path / "contexts-text.md").read_text()
    assert "Said once." in text and f"| one | {first[0]['bits']:.3f} | " in text
    assert (tmp_path / "contexts-text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_trained_rows_are_measured_by_the_launcher(tmp_path):
    (tmp_path / "plugin.py").write_text(MICRO.replace("block_size=24", "block_size=36"))
    (tmp_path / "books").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 1000)
    common = ("--plugin=plugin.py", "--data_path=books", "--scale=micro", "--seeds=1")
    assert run_forked("ablate", *common, "--table=1", "--rows=4@1", cwd=tmp_path).returncode == 0
    flags = ("--results=results", "--contexts")
    measured = run_forked("ablate", *common, *flags, "--pretrained=books", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    record = json.loads((tmp_path / "results/contexts-books-micro.json").read_text())
    assert {name: len(model) for name, model in record["models"].items()} == {"4@1, seed 0": 1, "books (shipped)": 6}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "contains no finished row of table 1 with checkpoints"),
        (("--report",), "there are no results yet"),
        (("--pretrained=novels",), "'novels'"),
        (("--dataset=cifar10",), "--contexts requires a text"),
        (("--dry_run",), "--dry_run is for --table and --curves and --lengths, not for --contexts"),
    ],
)
def test_invalid_context_options_raise_one_line_errors(tmp_path, flags, words):
    result = run_forked("ablate", "--contexts", "--scale=micro", "--data_path=books", *flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())
