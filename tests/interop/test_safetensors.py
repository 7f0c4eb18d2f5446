"""Models come back from safetensors bit for bit, and damaged or other directories are refused in one line."""

import json

import numpy as np
import pytest
from conftest import MODERN, NESTED, RESAMPLINGS, forward, make_model, small_config
from safetensors.numpy import load_file, save_file

import hourglass_jax as hg
from hourglass_jax.interop import export_safetensors, import_safetensors
from hourglass_jax.interop.parameters import named_parameters
from hourglass_jax.pretrained import SHIPPED

TOKENIZER = hg.CharTokenizer("abcdefgh", clean=True)
KERNEL = "hourglass.inner.pre.layers.attention.query.kernel"


METHODS = [*RESAMPLINGS, pytest.param("average", "attention", id="modern")]


@pytest.mark.parametrize("shortening, upsampling", METHODS)
def test_every_method_round_trips_bit_for_bit(tmp_path, request, shortening, upsampling):
    modern = "modern" in request.node.name
    options = MODERN["together"] if modern else {"hierarchy": NESTED}
    config = small_config(shortening=shortening, upsampling=upsampling, **options)
    model = make_model(config)
    export_safetensors(model, TOKENIZER, tmp_path / "shared")
    back, tokenizer, back_config = import_safetensors(tmp_path / "shared")
    assert back_config == back.config == config
    assert (tokenizer.characters, tokenizer.clean) == (TOKENIZER.characters, True)
    before, after = named_parameters(model), named_parameters(back)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


@pytest.mark.core
def test_the_logits_are_the_same(tmp_path):
    model = make_model(small_config(vocab_size=258, positions="learned", norm="final"))
    export_safetensors(model, hg.ByteTokenizer(), tmp_path / "shared")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    back, tokenizer, _ = import_safetensors(tmp_path / "shared")
    tokens = tokenizer.encode("an old pond")[None]
    np.testing.assert_array_equal(forward(model, tokens), forward(back, tokens))


@pytest.fixture
def shared(tmp_path):
    export_safetensors(make_model(small_config()), TOKENIZER, tmp_path / "shared")
    return tmp_path / "shared"


def test_a_saved_model_loads_with_its_tokenizer_bit_for_bit(tmp_path):
    model = make_model(small_config())
    hg.save(tmp_path / "saved", model, TOKENIZER)
    back, tokenizer, config = hg.load(tmp_path / "saved")
    before, after = named_parameters(model), named_parameters(back)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert config == model.config and tokenizer.characters == TOKENIZER.characters


def test_a_model_of_bare_tokens_is_saved_without_a_tokenizer(tmp_path):
    hg.save(tmp_path / "saved", make_model(small_config()))
    _, tokenizer, _ = hg.load(tmp_path / "saved")
    assert tokenizer is None


def test_a_saved_model_has_no_other_steps_and_is_not_overwritten(tmp_path):
    hg.save(tmp_path / "saved", make_model(small_config()), TOKENIZER)
    with pytest.raises(hg.UsageError, match="leave out step=100"):
        hg.load(tmp_path / "saved", step=100)
    with pytest.raises(hg.UsageError, match="exists"):
        hg.save(tmp_path / "saved", make_model(small_config()), TOKENIZER)


@pytest.mark.parametrize("name", ["books", "haiku"])  # haiku holds only what differs from books
def test_load_reads_the_directory_of_a_pretrained_model(name):
    model, tokenizer, _ = hg.load(SHIPPED / name)
    expected = named_parameters(hg.load_pretrained(name)[0])
    assert all(found.tobytes() == expected[name].tobytes() for name, found in named_parameters(model).items())
    assert tokenizer.kind == "byte"


def test_exported_files_are_readable_by_others(shared):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in shared.iterdir())


def test_nothing_of_the_training_is_exported(shared):
    assert json.loads((shared / "config.json").read_text())["settings"] == {}


@pytest.mark.parametrize("vocab_size", [256, 258])
def test_byte_vocabularies_with_and_without_tokens_for_the_specials_come_back(tmp_path, vocab_size):
    tokenizer = hg.ByteTokenizer(vocab_size)
    export_safetensors(make_model(small_config(vocab_size=vocab_size)), tokenizer, tmp_path / "shared")
    _, back, config = import_safetensors(tmp_path / "shared")
    assert (back.vocab_size, back.bos_id, back.eos_id) == (config.vocab_size, tokenizer.bos_id, tokenizer.eos_id)


def test_images_and_sizes_from_numpy_come_back(tmp_path):
    model = make_model(small_config(vocab_size=np.int64(257)))
    export_safetensors(model, hg.ImageTokenizer((4, 4, 3)), tmp_path / "images")
    back, tokenizer, _ = import_safetensors(tmp_path / "images")
    assert tokenizer.shape == (4, 4, 3) and back.config == model.config


def test_an_export_takes_no_tokenizer_of_another_size_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "shared.tmp").mkdir()
    with pytest.raises(hg.UsageError, match="258 tokens, but the model has 11"):
        export_safetensors(make_model(small_config()), hg.ByteTokenizer(), tmp_path / "shared")
    with pytest.raises(hg.UsageError, match="tokenizer is None"):
        export_safetensors(make_model(small_config()), None, tmp_path / "shared")
    export_safetensors(make_model(small_config()), TOKENIZER, tmp_path / "shared")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared", "shared.tmp"]


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(shared, monkeypatch):
    model = make_model(small_config())
    with pytest.raises(hg.UsageError, match="exists"):
        export_safetensors(model, TOKENIZER, shared)

    def no_room(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(hg.Run, "write", no_room)
    with pytest.raises(OSError, match="no space"):
        export_safetensors(model, TOKENIZER, shared.parent / "other")
    assert list(shared.parent.iterdir()) == [shared]


@pytest.mark.core
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(KERNEL), f"lacks {KERNEL}"),
        (lambda tensors: tensors.update(extra=np.zeros(2)), "unknown parameters: extra"),
        (lambda tensors: tensors.update({KERNEL: np.zeros((1, 16, 8), np.float32)}), f"{KERNEL} is float32.1, 16, 8."),
        (lambda tensors: tensors.update({KERNEL: np.zeros((1, 16, 16))}), f"{KERNEL} is float64"),
    ],
)
def test_unexpected_tensors_raise_errors_that_name_them(shared, change, message):
    tensors = load_file(shared / "model.safetensors")
    change(tensors)
    save_file(tensors, shared / "model.safetensors")
    with pytest.raises(hg.UsageError, match=message) as error:
        import_safetensors(shared)
    assert "\n" not in str(error.value)


def test_damaged_and_missing_files_raise_errors(shared):
    weights = shared / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"x" * 1000):
        weights.write_bytes(content)
        with pytest.raises(hg.UsageError, match="not a safetensors file, or damaged"):
            import_safetensors(shared)
    weights.unlink()
    with pytest.raises(hg.UsageError, match=r"model\.safetensors: no such file"):
        import_safetensors(shared)
    with pytest.raises(hg.UsageError, match=r"no config\.json"):
        import_safetensors(shared.parent)
