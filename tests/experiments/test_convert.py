"""The converter as a user meets it: what it writes, the other launchers read."""

import json

import numpy as np
import pytest
from conftest import light_config, make_model, small_config
from launching import run_forked
from layouts import planes, write_binary

import hourglass_jax as hg
from hourglass_jax.interop import export_safetensors, import_safetensors
from hourglass_jax.interop.parameters import named_parameters

torch = pytest.importorskip("torch")
from original_torch import TOKENS, Malicious, original  # noqa: E402


def succeed(script, *flags, cwd):
    result = run_forked(script, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def same(a, b):
    a, b = named_parameters(a), named_parameters(b)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("convert")
    torch.save({"model_state_dict": original([1, 1, 1, 2]).state_dict()}, home / "model.pth")
    (home / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (home / "text.txt").write_text("abcdefg\n" * 30)
    (home / "haiku.txt").write_text("\n\n".join(["a\nb\nc", "d\ne\nf", "g\nb\na"]) + "\n")
    succeed("convert", "--from=original", "model.pth", "vocab.json", "out/", cwd=home)
    return home


def test_a_converted_model_is_evaluated_generates_and_is_fine_tuned(home):
    model, tokenizer, config = hg.load(home / "out")
    assert config.hierarchy == "1@1 1@2 1@1" and tokenizer.characters == TOKENS[3:]
    evaluated = succeed("evaluate", "--load_model_path=out", "--data_path=text.txt", cwd=home)
    record = json.loads(evaluated.splitlines()[-1])
    assert 0 < record["loss"] < 20
    assert succeed("generate", "--load_model_path=out", "--max_tokens=4", cwd=home).strip()
    flags = [
        "--load_model_path=out",
        "--data_path=haiku.txt",
        "--epochs=1",
        "--batch_size=1",
        "--extend_vocabulary",
        "--out=tuned",
    ]
    succeed("finetune", *flags, "--learning_rate=1e-9", cwd=home)
    before, after = (named_parameters(m) for m in (model, hg.load(home / "tuned")[0]))
    for name in before:  # it started from these weights, and hardly moved
        np.testing.assert_allclose(before[name], after[name], atol=1e-6)


def test_a_run_round_trips_through_safetensors(home):
    succeed("convert", "--to=safetensors", "out", "shared", cwd=home)
    succeed("convert", "--from=safetensors", "shared", "back", cwd=home)
    model, tokenizer, _ = hg.load(home / "back")
    assert same(model, hg.load(home / "out")[0]) and same(model, import_safetensors(home / "shared")[0])
    assert tokenizer.characters == TOKENS[3:]


def test_an_image_model_round_trips_through_safetensors(home, tmp_path):
    config = small_config(vocab_size=hg.ImageTokenizer.vocab_size)
    export_safetensors(make_model(config), hg.ImageTokenizer((4, 4, 3)), tmp_path / "images")
    write_binary(tmp_path / "cifar", planes(8, 32), planes(3, 32))
    succeed("convert", "--from=safetensors", "images", "run", cwd=tmp_path)
    out = succeed("evaluate", "--load_model_path=run", "--data_path=cifar", cwd=tmp_path)
    assert json.loads(out.splitlines()[-1])["bits_per_dim"] > 0


@pytest.mark.parametrize(
    "shape, data", [((24, 24, 3), ("folder", 24)), ((16, 16, 1), ("folder", 16)), ((6, 4, 3), ("folder", 0))]
)
def test_a_model_of_custom_images_round_trips_as_a_folder_model(tmp_path, shape, data):
    config = light_config(vocab_size=hg.ImageTokenizer.vocab_size)
    export_safetensors(make_model(config), hg.ImageTokenizer(shape), tmp_path / "images")
    succeed("convert", "--from=safetensors", "images", "run", cwd=tmp_path)
    _, tokenizer, settings, _ = hg.Run(tmp_path / "run").read()
    assert tokenizer.shape == shape and (settings["data"]["dataset"], settings["data"]["image_size"]) == data
    refused = run_forked("convert", "--from=safetensors", "--dataset=cifar10", "images", "other", cwd=tmp_path)
    assert refused.returncode == 2 and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--from=original", "evil.pth", "vocab.json", "new"], "no code in it was run"),
        (["--from=original", "model.pth", "text.txt", "new"], "not a vocabulary"),
        (["--from=original", "model.pth", "new"], "requires the model's vocabulary"),
        (["--from=original", "model.pth", "vocab.json", "out"], "out: exists"),
        (["--from=pypi", "--shorten_factor=x", "model.pth", "new"], "cannot be read"),
        (["--from=safetensors", "out", "new"], "model.safetensors: no such file"),
        (["--to=safetensors", "nowhere", "new"], "no such directory"),
        (["model.pth", "new"], "give either --from"),
        (
            ["--from=original", "--shorten_factor=2", "model.pth", "vocab.json", "new"],
            "is for --from=pypi, not for",
        ),
        (
            ["--from=safetensors", "out", "vocab.json", "new"],
            "takes no vocabulary, but vocab.json is given",
        ),
        (["--to=safetensors", "--about=vocab.json", "out", "new"], "--about is for --to=package, not for"),
        (["--from=original", "model.pth"], "in this order"),
    ],
)
def test_invalid_usage_raises_one_line_errors_and_writes_nothing(home, flags, message):
    torch.save({"state_dict": {"a": torch.zeros(2)}, "rest": Malicious(home / "trace")}, home / "evil.pth")
    before = sorted(home.iterdir())
    result = run_forked("convert", *flags, cwd=home)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    assert sorted(home.iterdir()) == before
