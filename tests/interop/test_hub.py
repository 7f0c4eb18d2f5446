"""Models on the Hub, against a server with its paths: what is uploaded loads by name, and nothing else is read."""

import importlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import light_config, make_model, small_config
from hub_server import serving
from launching import run_forked

import hourglass_jax as hg
from experiments.common import launcher
from hourglass_jax.interop.card import CARD
from hourglass_jax.interop.parameters import named_parameters
from hourglass_jax.model import n_parameters

pytest.importorskip("huggingface_hub")
TOKENIZER = hg.CharTokenizer("abcdefgh", clean=True)
CLIENT = "huggingface_hub"


def remove_client():
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == CLIENT}


@pytest.fixture
def fresh_client(monkeypatch):
    """Return a function that sets variables of the environment, which huggingface_hub reads when it is imported."""
    before = remove_client()

    def reset(**environment):
        remove_client()
        for name, value in ({"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment).items():
            monkeypatch.setenv(name, str(value))

    yield reset
    remove_client()
    sys.modules.update(before)


@pytest.fixture
def hub(tmp_path, fresh_client):
    with serving() as hub:
        fresh_client(HF_ENDPOINT=hub.endpoint, HF_HOME=tmp_path / "cache", HF_TOKEN="hf_test")
        yield hub


def saved(directory, seed=0, tokenizer=TOKENIZER):
    """Save a model, and return (its parameters, its files)."""
    model = make_model(light_config(vocab_size=tokenizer.vocab_size), seed)
    hg.save(directory, model, tokenizer)
    return named_parameters(model), {path.name: path.read_bytes() for path in directory.iterdir()}


def same(model, parameters):
    return all((leaf == parameters[name]).all() for name, leaf in named_parameters(model).items())


def refusal(*arguments, **options):
    with pytest.raises(hg.UsageError) as error:
        hg.load(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_repository_loads_by_name_and_revision(hub, tmp_path):
    (old, files), (new, new_files) = saved(tmp_path / "old"), saved(tmp_path / "new", seed=1)
    commit = hub.push("user/name", files, "v1")
    hub.push("user/name", new_files)
    model, tokenizer, config = hg.load("hf:user/name")
    assert same(model, new) and not same(model, old)
    assert tokenizer.characters == TOKENIZER.characters and config == model.config
    for name, revision in (("hf:user/name", "v1"), ("hf:user/name", commit), ("hf:user/name@v1", None)):
        assert same(hg.load(name, revision=revision)[0], old)
    assert same(launcher.load_origin("hf:user/name@v1")[0], old)


def test_a_loaded_repository_needs_no_network(hub, tmp_path):
    parameters, files = saved(tmp_path / "saved")
    commit = hub.push("user/name", files)
    hg.load("hf:user/name")
    hub.requests.clear()
    hg.load("hf:user/name", revision=commit)
    assert hub.requests == []
    hg.load("hf:user/name")
    assert not any(path.startswith("/large") for path in hub.requests)  # nothing is downloaded again
    hub.shutdown()
    hub.server_close()
    assert same(hg.load("hf:user/name")[0], parameters)


def test_files_are_of_one_revision_even_if_main_moves(hub, tmp_path):
    (old, files), (_, new_files) = saved(tmp_path / "old"), saved(tmp_path / "new", seed=1)
    hub.push("user/name", files)

    def sent(content):
        if content == files["config.json"]:
            hub.push("user/name", new_files)
        return content

    hub.sent = sent
    assert same(hg.load("hf:user/name")[0], old)


def test_only_the_three_files_of_a_model_are_downloaded_and_none_is_executed(hub, tmp_path):
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    _, files = saved(tmp_path / "saved")
    code = f"import os; os.mkdir({str(trace)!r})".encode()
    evil = {"pytorch_model.bin": pickle.dumps(Evil()), "modeling.py": code, "hourglass_jax.py": code}
    hub.push("user/name", files | evil)
    hg.load("hf:user/name")
    snapshots = (tmp_path / "cache").rglob("snapshots/*/*")
    assert {path.name for path in snapshots} == {"config.json", "model.safetensors", "vocab.json"}
    hub.push("user/name", files | {"model.safetensors": evil["pytorch_model.bin"]})
    assert "not a safetensors file, or damaged" in refusal("hf:user/name")
    assert not trace.exists()
    pickle.loads(evil["pytorch_model.bin"])  # the control
    assert trace.exists()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("hf:user/other", {}, "no such repository"),
        ("hf:user/name", {"revision": "v2"}, "config.json, revision v2: no such revision; give a branch"),
        ("hf:user/name@v2", {}, "no such revision"),
        ("hf:user/name@v1", {"revision": "v1"}, "leave it out"),
        ("hf:user/empty", {}, "config.json: a file is missing; give a repository with the files that hg.save writes"),
        ("hf:user/half", {}, "model.safetensors"),
        ("hf:user/foreign", {}, "not a model of this library"),
        ("hf:a/b/c", {}, "give hf:user/name"),
        ("hf:", {}, "give hf:user/name"),
        ("runs/x", {"revision": "v1"}, "revision='v1' is only for hf:user/name"),
        ("hf:user/name", {"step": 3}, "leave out step=3"),
    ],
)
def test_what_cannot_be_loaded_raises_one_line_errors(hub, tmp_path, name, options, message):
    _, files = saved(tmp_path / "saved")
    hub.push("user/name", files, "v1")
    hub.push("user/empty", {"README.md": b""})
    hub.push("user/half", {"config.json": files["config.json"]})
    hub.push("user/foreign", files | {"config.json": b'{"model_type": "gpt2"}'})
    assert message in refusal(name, **options)


def test_without_network_or_extra_one_line_says_so(hub, tmp_path, fresh_client, monkeypatch):
    hub.push("user/name", saved(tmp_path / "saved")[1])
    fresh_client(HF_HUB_OFFLINE="1")
    assert "not in the cache, and the Hub cannot be reached" in refusal("hf:user/name")
    monkeypatch.setitem(sys.modules, CLIENT, None)
    assert "pip install -e '.[hub]'" in refusal("hf:user/name")
    hg.load(tmp_path / "saved")  # a directory requires neither


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "vocab.json"])
def test_a_file_damaged_in_the_cache_is_noticed_and_mended_as_the_error_says(hub, tmp_path, damaged):
    parameters, files = saved(tmp_path / "saved")
    hub.push("user/name", files)
    hg.load("hf:user/name")
    [path] = (tmp_path / "cache").rglob(f"snapshots/*/{damaged}")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    message = refusal("hf:user/name")
    assert f"{damaged}" in message and "damaged; remove" in message
    Path(re.search("remove (.+), and", message)[1]).unlink()
    assert same(hg.load("hf:user/name")[0], parameters)


def test_a_file_damaged_on_the_way_is_noticed(hub, tmp_path):
    hub.push("user/name", saved(tmp_path / "saved")[1])
    hub.sent = lambda content: content.replace(b"1", b"2")
    assert "damaged; remove" in refusal("hf:user/name")


@pytest.mark.parametrize(
    "tokenizer, options, result",
    [
        (TOKENIZER, {}, "new"),
        (hg.ByteTokenizer(), {"causal": False, "vocab_size": 259}, "logits"),
        (hg.ImageTokenizer((4, 4, 3)), {}, "logits"),
        (None, {}, "logits"),
    ],
    ids=["text", "bidirectional", "images", "tokens"],
)
def test_the_usage_example_of_a_card_runs(tmp_path, tokenizer, options, result):
    config = light_config(**({"vocab_size": tokenizer.vocab_size if tokenizer else 11} | options))
    hg.save(tmp_path / "shared", make_model(config), tokenizer)
    card = (tmp_path / "shared" / CARD).read_text()
    [example] = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    names = {}
    exec(example.replace("hf:USER/shared", str(tmp_path / "shared")), names)
    assert len(names[result]) and ("text-generation" in card) == (result == "new")


def test_a_card_has_the_metadata_sizes_and_figures(tmp_path):
    ModelCard = importlib.import_module(CLIENT).ModelCard
    model = make_model(small_config(vocab_size=258))
    evaluation = hg.evaluate(model, np.arange(100) % 200, block_size=32)
    hg.save(tmp_path / "shared", model, hg.ByteTokenizer(), license="apache-2.0", evaluation=evaluation)
    card = ModelCard.load(tmp_path / "shared" / CARD)
    assert (card.data.library_name, card.data.license) == ("hourglass_jax", "apache-2.0")
    assert card.data.pipeline_tag == "text-generation" and "jax" in card.data.tags
    assert f"bits/byte {evaluation.bits_per_character:.4f} | 99 predictions" in card.content
    assert f"`{model.config.hierarchy}`: {n_parameters(model):,} parameters, a vocabulary of 258 bytes" in card.content
    hg.save(tmp_path / "plain", model)
    plain = ModelCard.load(tmp_path / "plain" / CARD)
    assert plain.data.license is None and "Evaluation" not in plain.content


@pytest.mark.launchers
def test_the_upload_command_takes_a_saved_directory_and_launchers_load_it_by_name(hub, tmp_path):
    parameters, files = saved(tmp_path / "saved", tokenizer=hg.ByteTokenizer())
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "user/name", tmp_path / "saved"]
    uploaded = subprocess.run(command, capture_output=True, text=True)
    assert uploaded.returncode == 0, uploaded.stderr
    assert hub.find("user/name", "main")[1] == files and "/api/validate-yaml" in hub.requests
    assert same(hg.load("hf:user/name")[0], parameters)
    environment = {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_HOME")}
    result = run_forked("generate", "--load_model_path=hf:user/name", "--max_tokens=5", cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    result = run_forked("evaluate", "--load_model_path=hf:user/other", cwd=tmp_path, **environment)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "no such repository" in result.stderr
