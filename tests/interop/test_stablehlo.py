"""Exported programs give the library's scores and greedy texts in a process that cannot import the library."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import event_config, light_config, make_model, small_config, tokens_of
from launching import run_forked

import hourglass_jax as hg
from hourglass_jax.interop.stablehlo import export_stablehlo

pytest.importorskip("flatbuffers")
N_NEW = 20
# As in docs/interop.md, without the library and what it requires besides JAX.
READER = """
import sys
for name in ("hourglass_jax", "experiments", "flax", "optax", "orbax", "safetensors"):
    sys.modules[name] = None

import json
from pathlib import Path
import jax
import numpy as np
from jax import export

directory, n_new = Path(sys.argv[1]), int(sys.argv[2])
given = dict(np.load(directory / "given.npz"))
parameters = dict(np.load(directory / "parameters.npz"))
programs = json.loads((directory / "programs.json").read_text())
files = {name: (directory / f"{name}.jax").read_bytes() for name in programs}
calls = {name: jax.jit(export.deserialize(file).call) for name, file in files.items()}

results = {"scores": calls["score"](parameters, given["tokens"])}
if "step" in calls:
    cache, texts = calls["start"](), []
    assert [output["name"] for output in programs["start"]["outputs"]] == [f"cache.{name}" for name in cache]
    length = given["prompts"].shape[1]
    for t in range(length + n_new - 1):
        token = given["prompts"][:, t] if t < length else texts[-1]
        logits, cache = calls["step"](parameters, token, cache)
        texts.append(logits.argmax(-1).astype("int32"))
    results["texts"] = np.stack(texts[-n_new:], axis=1)
np.savez(directory / "results.npz", **results)
"""


def read(directory, **given):
    """Run the programs in a process without the library; return `scores` of tokens, and `texts` after prompts."""
    np.savez(directory / "given.npz", **given)
    command = [sys.executable, "-c", READER, directory, str(N_NEW)]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(np.load(directory / "results.npz"))


CONFIGS = [
    pytest.param(light_config(positions="learned", ngram_sizes=(2, 3), ngram_buckets=13), id="any length"),
    pytest.param(event_config(hierarchy="0@1 1@3 1@1", max_length=30), id="events"),
    pytest.param(small_config(), id="attention", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_programs_equal_the_library_in_a_process_that_has_jax_alone(tmp_path, config):
    model = make_model(config, seed=2, scale=20.0)
    export_stablehlo(tmp_path / "programs", model, batch=2)
    tokens, prompts = tokens_of((3, 31)).astype(np.int32), tokens_of((2, 5)).astype(np.int32)
    found = read(tmp_path / "programs", tokens=tokens, prompts=prompts)
    np.testing.assert_allclose(found["scores"], hg.score(model, tokens), rtol=1e-4, atol=1e-4)
    texts = hg.generate(model, list(prompts), max_tokens=N_NEW, key=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(found["texts"], texts)
    assert len({*found["texts"].ravel()}) > 1  # the control: greedy texts vary


def test_programs_name_their_inputs_and_outputs_in_order(tmp_path):
    export_stablehlo(tmp_path / "programs", make_model(light_config()), max_length=20)
    programs = json.loads((tmp_path / "programs" / "programs.json").read_text())
    parameters = sorted(np.load(tmp_path / "programs" / "parameters.npz").keys())
    caches = [output["name"] for output in programs["start"]["outputs"]]
    assert [x["name"] for x in programs["step"]["inputs"]] == [
        *(f"parameters.{p}" for p in parameters),
        "tokens",
        *caches,
    ]
    assert [x["name"] for x in programs["step"]["outputs"]] == ["logits", *caches]
    assert programs["score"]["inputs"][-1] == {"name": "tokens", "shape": ["b", "l"], "dtype": "int32"}
    assert programs["score"]["outputs"] == [{"name": "log_probabilities", "shape": ["b", "l - 1"], "dtype": "float32"}]


def test_a_model_that_does_not_decode_has_only_its_score(tmp_path):
    model = make_model(light_config(token_attention="lsh", lsh_chunk=4, positions="rotary", max_length=20))
    tokens = tokens_of((2, 21)).astype(np.int32)
    export_stablehlo(tmp_path / "programs", model)
    assert sorted(path.stem for path in (tmp_path / "programs").glob("*.jax")) == ["score"]
    np.testing.assert_allclose(read(tmp_path / "programs", tokens=tokens)["scores"], hg.score(model, tokens), atol=1e-4)


def test_what_cannot_be_exported_raises_errors_and_writes_nothing(tmp_path, monkeypatch):
    with pytest.raises(hg.UsageError, match="causal=False"):
        export_stablehlo(tmp_path / "programs", make_model(light_config(causal=False)))
    with pytest.raises(hg.UsageError, match="11"):
        export_stablehlo(tmp_path / "programs", make_model(light_config()), hg.ByteTokenizer())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as without the extra
    with pytest.raises(hg.UsageError, match=r"pip install -e '\.\[stablehlo\]'"):
        export_stablehlo(tmp_path / "programs", make_model(light_config()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launchers
def test_the_command_writes_the_programs_of_a_saved_model(tmp_path):
    hg.save(tmp_path / "saved", make_model(light_config(vocab_size=258)), hg.ByteTokenizer())
    result = run_forked("convert", "--to=stablehlo", "saved", "programs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = {"score.jax", "start.jax", "step.jax", "programs.json", "parameters.npz", "config.json"}
    assert {path.name for path in (tmp_path / "programs").iterdir()} == files
    assert hg.Run(tmp_path / "programs").read().tokenizer.kind == "byte"
