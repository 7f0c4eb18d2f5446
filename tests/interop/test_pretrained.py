"""Weights that come with the package: what is stored is the model in bfloat16, once, and every one has its card."""

import json

import jax
import numpy as np
import pytest
from conftest import forward, make_model, small_config
from flax import nnx
from launching import run_forked

import hourglass_jax as hg
from experiments.common import launcher
from hourglass_jax.interop.parameters import named_parameters
from hourglass_jax.pretrained import CARD, SHIPPED, pretrained_names, save_pretrained
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.run import Record

CONFIG = small_config(vocab_size=258, hierarchy="1@1 1@2 1@1")
TOKENS = hg.ByteTokenizer().encode("an old pond")[None]
SETTINGS = {"data": {"path": "/home/someone/books/,/data/b.txt"}, "format": "prompt"}
ABOUT = "A tiny one.\n\n## Data\n\na\n\n## License\n\nb\n\n## Training\n\nc\n\n## Not good for\n\nd\n"
MAX_BYTES = 6_000_000


def tuned():
    """As `make_model(CONFIG)`, but for the head."""
    model = make_model(CONFIG)
    model.head.kernel[...] = model.head.kernel[...] * 1.5
    return model


def rounded(model):
    """Its parameters to the nearest bfloat16."""
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params))


@pytest.fixture
def weights(tmp_path):
    for name, model, base in (("books", make_model(CONFIG), None), ("haiku", tuned(), "books")):
        record = Record(CONFIG, hg.ByteTokenizer(), SETTINGS, [])
        save_pretrained(model, record, f"# {name}\n\n{ABOUT}\n## Figures\n", tmp_path / name, base=base)
    return tmp_path


def size(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def check_weights(directory):
    """What must hold of every directory of weights, shipped or not."""
    assert pretrained_names(directory) == sorted(path.name for path in directory.glob("*"))
    assert size(directory) <= MAX_BYTES
    for name in pretrained_names(directory):
        model, tokenizer, config = hg.load_pretrained(name, directory=directory)
        assert config.vocab_size == tokenizer.vocab_size
        assert np.isfinite(forward(model, tokenizer.encode("an old pond")[None])).all()
        card = (directory / name / CARD).read_text()
        assert card.startswith(f"# {name}\n")
        for section in ("## Data", "## License", "## Training", "## Not good for", "## Figures"):
            assert section in card.splitlines(), (name, section)
        assert "/" not in json.dumps(hg.Run(directory / name).read().settings)


def test_shipped_weights_are_complete_and_small():
    check_weights(SHIPPED)


def test_a_training_begins_with_a_shipped_model_by_its_name_unless_a_directory_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, tokenizer, settings = launcher.load_origin("books")
    expected = nnx.state(hg.load_pretrained("books")[0])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), expected)
    assert tokenizer.kind == "byte" and settings == hg.Run(SHIPPED / "books").read().settings
    (tmp_path / "books").mkdir()
    with pytest.raises(hg.UsageError, match="books: "):
        launcher.load_origin("books")


def test_the_check_of_what_is_shipped_passes_and_fails_as_it_must(weights):
    check_weights(weights)
    card = weights / "haiku" / CARD
    text = card.read_text()
    card.write_text(text.replace("## License", ""))
    with pytest.raises(AssertionError, match="License"):
        check_weights(weights)
    card.write_text(text + "x" * MAX_BYTES)
    with pytest.raises(AssertionError):
        check_weights(weights)


def test_the_logits_are_those_of_the_rounded_parameters(weights):
    for name, model in (("books", make_model(CONFIG)), ("haiku", tuned())):
        loaded, _, config = hg.load_pretrained(name, directory=weights)
        assert config == CONFIG
        logits = forward(loaded, TOKENS)
        np.testing.assert_array_equal(logits, forward(rounded(model), TOKENS))
        np.testing.assert_allclose(logits, forward(model, TOKENS), rtol=0.05, atol=0.05 * np.abs(logits).max())
        assert (logits != forward(model, TOKENS)).any()  # the control: it was rounded


def test_a_fine_tuned_model_holds_what_changed_alone(weights):
    n_head = tuned().head.kernel[...].size
    assert 2 * n_head < (weights / "haiku" / "model.safetensors").stat().st_size < 2 * n_head + 500
    (weights / "books" / "model.safetensors").unlink()
    with pytest.raises(hg.UsageError, match="named 'books'; available models: haiku"):
        hg.load_pretrained("haiku", directory=weights)


def test_a_base_has_no_parameters_of_its_own(weights):
    """What the model has and its base has not is stored, and comes back."""
    one, other = (small_config(vocab_size=258, hierarchy=hierarchy) for hierarchy in ("1@1", CONFIG.hierarchy))
    record = Record(one, hg.ByteTokenizer(), {}, [])
    with pytest.raises(hg.UsageError, match=r"base='books' has hourglass\.inner\..*, which this model lacks"):
        save_pretrained(make_model(one), record, "", weights / "plain", base="books")
    assert not (weights / "plain").exists()
    save_pretrained(make_model(one), record, "", weights / "plain")
    save_pretrained(make_model(other), Record(other, hg.ByteTokenizer(), {}, []), "", weights / "more", base="plain")
    model, _, _ = hg.load_pretrained("more", directory=weights)
    assert forward(model, TOKENS).tobytes() == forward(rounded(make_model(other)), TOKENS).tobytes()


def test_a_directory_may_lie_in_the_home_directory(weights, monkeypatch):
    monkeypatch.setenv("HOME", str(weights))
    assert pretrained_names("~") == ["books", "haiku"]
    save_pretrained(tuned(), Record(CONFIG, None, SETTINGS, []), "", "~/other", base="books")
    assert hg.load_pretrained("other", directory="~")[2] == CONFIG


def test_unknown_names_and_damaged_files_raise_one_line_errors(weights):
    with pytest.raises(hg.UsageError, match="named 'sonnets'; available models: books, haiku") as error:
        hg.load_pretrained("sonnets", directory=weights)
    assert "\n" not in str(error.value)
    path = weights / "books" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(hg.UsageError, match="damaged"):
        hg.load_pretrained("books", directory=weights)
    with pytest.raises(hg.UsageError, match="exists"):
        save_pretrained(tuned(), Record(CONFIG, hg.ByteTokenizer(), {}, []), "", weights / "haiku")


def test_shipped_settings_contain_no_machine_paths(weights):
    settings = hg.Run(weights / "books").read().settings
    assert settings == {"data": {"path": "books,b.txt"}, "format": "prompt"}


@pytest.mark.launchers
def test_a_run_becomes_a_model_of_the_package(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    hg.Run(tmp_path / "run").write(Record(CONFIG, hg.ByteTokenizer(), {"data": {"path": "a"}}, []))
    store.save(0, nnx.state(make_model(CONFIG), nnx.Param))
    store.close()
    (tmp_path / "about.md").write_text(ABOUT)
    (tmp_path / "test.json").write_text(json.dumps({"summary": "bits/byte 1.7512 | test", "command": "python e.py"}))
    flags = ["--to=package", "--about=about.md", "run", "weights/books"]
    result = run_forked("convert", *flags, cwd=tmp_path)
    assert result.returncode == 2 and "requires figures" in result.stderr
    result = run_forked("convert", "--evaluations=test.json", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_weights(tmp_path / "weights")
    assert "bits/byte 1.7512 | test" in (tmp_path / "weights" / "books" / CARD).read_text()
    model, _, _ = hg.load_pretrained("books", directory=tmp_path / "weights")
    before, after = named_parameters(rounded(make_model(CONFIG))), named_parameters(model)
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.launchers
def test_a_haiku_is_written_from_its_first_line(tmp_path):
    result = run_forked("generate", "--pretrained=haiku", "--prompt=an old silent pond", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, *more = result.stdout.splitlines()
    assert first == "an old silent pond" and 1 <= len(more) <= 3 and all(more)


@pytest.mark.launchers
@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("generate", ["--pretrained=sonnets"], "no pretrained model is named 'sonnets'"),
        ("evaluate", ["--pretrained=sonnets"], "no pretrained model is named 'sonnets'"),
        ("finetune", ["--pretrained=books", "--load_model_path=run"], "both given"),
    ],
)
def test_launchers_reject_invalid_pretrained_options_in_one_line(tmp_path, script, flags, message):
    result = run_forked(script, *flags, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
