"""Models of PyTorch projects give the same logits here, and files that hold something else are refused in one line."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from conftest import forward

import hourglass_jax as hg
from hourglass_jax.interop import from_original, from_pypi
from hourglass_jax.interop.parameters import build_model, named_parameters

torch = pytest.importorskip("torch")
from original_torch import LENGTH, TOKENS, Malicious, original, randomize  # noqa: E402

TEXT = np.random.default_rng(0).integers(0, len(TOKENS), (2, LENGTH))
TWO_LEVELS, THREE_LEVELS = [2, 1, 1, 3], [1, 1, 2, 2, 1, 3]


def logits(torch_model, tokens):
    with torch.no_grad():
        return torch_model(torch.tensor(tokens)).numpy()


def convert(tmp_path, content, tokens=TOKENS, **options):
    torch.save(content, tmp_path / "model.pth")
    vocabulary = {token: i for i, token in enumerate(tokens)} if isinstance(tokens, list) else tokens
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    return from_original(tmp_path / "model.pth", tmp_path / "vocab.json", **options)


def same_parameters(a, b):
    a, b = named_parameters(a), named_parameters(b)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize(
    "factors, hierarchy", [([2, 1], "2@1"), (TWO_LEVELS, "2@1 1@3 2@1"), (THREE_LEVELS, "1@1 2@2 1@6 2@2 1@1")]
)
def test_converted_original_models_give_the_same_logits(tmp_path, factors, hierarchy):
    theirs = original(factors)
    model, tokenizer = convert(tmp_path, theirs.state_dict())
    assert model.config.hierarchy == hierarchy and model.config.n_heads == 3 and tokenizer.clean
    expected = logits(theirs, TEXT)
    for length in (1, 13, LENGTH):
        ours = forward(model, TEXT[:, :length])
        np.testing.assert_allclose(ours, expected[:, :length], atol=1e-5)
        whole = length - length % model.config.parsed_hierarchy.total_factor
        np.testing.assert_allclose(ours[:, :whole], logits(theirs, TEXT[:, :length])[:, :whole], atol=1e-5)


def test_the_original_changes_its_mind_about_an_incomplete_group():
    theirs = original([1, 1, 1, 4])
    assert np.abs(logits(theirs, TEXT)[:, 4] - logits(theirs, TEXT[:, :5])[:, 4]).max() > 1e-2


def test_a_shift_as_in_the_paper_would_give_other_logits(tmp_path):
    theirs = original(TWO_LEVELS)
    model, _ = convert(tmp_path, theirs.state_dict())
    wrong = build_model(dataclasses.replace(model.config, shift="paper"), named_parameters(model), "test")
    assert np.abs(forward(wrong, TEXT) - logits(theirs, TEXT)).max() > 1e-2


def test_biases_of_queries_keys_and_values(tmp_path):
    theirs = original(TWO_LEVELS, bias=True)
    model, _ = convert(tmp_path, theirs.state_dict())
    np.testing.assert_allclose(forward(model, TEXT), logits(theirs, TEXT), atol=1e-5)


LECTURE = [  # names as in a well-known lecture
    ("tokens_embedding", "token_embedding_table"),
    ("position_embedding.pe", "position_embedding_table"),
    ("attn.linear", "sa.proj"),
    ("attn.heads", "sa.heads"),
    (".q.", ".query."),
    (".k.", ".key."),
    (".v.", ".value."),
    ("ffn.sequence", "ffwd.net"),
    ("norm1", "ln1"),
    ("norm2", "ln2"),
]


def respelled(state):
    for old, new in LECTURE:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    tops = {"linear": "lm_head", "norm": "ln_f"}
    return {".".join([tops.get(top := name.split(".")[0], top), *name.split(".")[1:]]): t for name, t in state.items()}


def fused(state, module):
    """With one matrix for queries, keys and values of all heads, as `module` and an ending."""
    fused, parts = {}, {}
    for name, tensor in state.items():
        attention, is_head, rest = name.partition(".heads.")
        if not is_head:
            fused[name] = tensor
        elif not rest.endswith("tril"):
            head, projection, leaf = rest.split(".")
            parts.setdefault(f"{attention}.{module}{leaf}", {})["qkv".index(projection), int(head)] = tensor
    return fused | {name: torch.cat([part[key] for key in sorted(part)]) for name, part in parts.items()}


def test_other_spellings_convert_to_the_same_parameters(tmp_path):
    state = original(TWO_LEVELS, bias=True).state_dict()
    model, _ = convert(tmp_path, state)
    for spelling in (
        {
            "model_state_dict": state,
            "hyperparameters": {"n_heads": 3},
            "optimizer_state_dict": {"state": {}},
            "epoch": 2,
        },
        respelled(state),
        {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ):
        assert same_parameters(model, convert(tmp_path, spelling)[0])
    for module in ("in_proj_", "c_attn."):
        assert same_parameters(model, convert(tmp_path, fused(state, module), n_heads=3)[0])
    with pytest.raises(hg.UsageError, match="n_heads=6 does not divide the 15 outputs"):
        convert(tmp_path, fused(state, "c_attn."))  # 6 is the project's default


def test_biases_that_are_nowhere_are_zero(tmp_path):
    state = {name: tensor for name, tensor in original(TWO_LEVELS).state_dict().items() if not name.endswith("bias")}
    biases = {name: x for name, x in named_parameters(convert(tmp_path, state)[0]).items() if name.endswith("bias")}
    assert len(biases) == 3 * 5 + 3 and not any(x.any() for x in biases.values())


def test_every_form_of_the_vocabulary_and_one_without_bos(tmp_path):
    state = original([1, 1]).state_dict()
    forms = [
        {str(i): token for i, token in enumerate(TOKENS)},
        {"clean": True, "vocabulary": dict(zip(TOKENS, range(11), strict=True))},
    ]
    for form in (TOKENS, *forms):
        assert convert(tmp_path, state, form)[1].characters == TOKENS[3:]
    early = original([1, 1], vocab_size=10)
    model, tokenizer = convert(tmp_path, early.state_dict(), ["<EOS>", "<UNK>", *"abcdefg\n"])
    assert tokenizer.encode("a").tolist() == [3] and model.config.vocab_size == 11
    text = np.where(TEXT >= 2, TEXT + 1, TEXT) % 11
    ours = np.asarray(forward(model, np.where(text == 2, 0, text)))
    expected = logits(early, np.where(text > 2, text - 1, 0 * text + (text == 1)))
    np.testing.assert_allclose(np.delete(ours, 2, axis=-1), expected, atol=1e-5)
    assert (ours[..., 2] < -99).all()


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        (TOKENS[:-1], "has 10 tokens, but .* 11"),
        (["<BOS>", *TOKENS[:2], *TOKENS[3:]], "first tokens must be <EOS>, <UNK>, <BOS>"),
        ({token: 2 * i for i, token in enumerate(TOKENS)}, "0 to 10, each once"),
        ({"a": 1.5}, "ids must be integers"),
        ("abc", "neither an object nor a list"),
        ({"vocabulary": TOKENS[:-1]}, "has 10 tokens, but .* 11"),
        ({"vocabulary": None}, "neither an object nor a list"),
    ],
)
def test_invalid_vocabularies_raise_errors(tmp_path, vocabulary, message):
    with pytest.raises(hg.UsageError, match=message) as error:
        convert(tmp_path, original([1, 1]).state_dict(), vocabulary)
    assert "\n" not in str(error.value)


POOLING = next(name for name in original([1, 1, 1, 2]).state_dict() if "linearProjection.weight" in name)


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state | {"extra.weight": torch.zeros(2)}, "unknown parameters: extra.scale"),
        (without("norm.weight"), "lacks norm.scale"),
        (without("tokens_embedding.weight"), "lacks embedding.embedding; contains"),
        (without("hourglass.pre_layer.1.norm1.weight"), "lacks hourglass.pre.layers.1.attention_norm.scale"),
        (without("hourglass.pre_layer.0.attn.heads.1.k.weight"), r"attention\.heads\.1\.key\.weight"),
        (lambda state: state | {"linear.weight": torch.zeros(11, 3)}, r"head.kernel is float32\(3, 11\), not .*16, 11"),
        (lambda state: state | {"hourglass.pre_layer.1.norm1.bias": torch.zeros(3)}, r"shapes: \(16,\), \(3,\)"),
        (lambda state: state | {"ln_f.weight": torch.zeros(16)}, "ln_f.weight is a second norm.weight"),
        (lambda state: state | {POOLING: torch.zeros(16, 8)}, "shorten.project.kernel has 8 inputs"),
        (lambda state: state | {"hourglass.pre_layer.0.attn.qkv.weight": torch.tensor(1.0)}, r"attn.qkv|attention\.q"),
        (lambda state: {"epoch": 3}, "no state dict"),
        (lambda state: {"a": torch.zeros(2)}, "not a supported model"),
    ],
)  # fmt: skip
def test_unexpected_tensors_raise_errors_that_name_them(tmp_path, change, message):
    with pytest.raises(hg.UsageError, match=message) as error:
        convert(tmp_path, change(original(TWO_LEVELS).state_dict()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", [None, torch.zeros(1, 16), torch.zeros(10)])
def test_a_vocabulary_without_bos_needs_a_whole_head(tmp_path, head):
    state = without("linear.weight")(original([1, 1]).state_dict())
    state |= {"tokens_embedding.weight": torch.zeros(10, 16)} | ({} if head is None else {"linear.weight": head})
    with pytest.raises(hg.UsageError, match=r"lacks head.kernel of shape \[16, 10\]"):
        convert(tmp_path, state, [token for token in TOKENS if token != "<BOS>"])


def test_parameters_and_other_hyperparameters_are_read_as_well(tmp_path):
    model = original([1, 1])
    torch.save({"state_dict": dict(model.named_parameters()), "hyperparameters": None}, tmp_path / "model.pth")
    (tmp_path / "vocab.json").write_text(json.dumps(TOKENS))
    converted, _ = from_original(tmp_path / "model.pth", tmp_path / "vocab.json")
    np.testing.assert_allclose(forward(converted, TEXT % 11), logits(model, TEXT % 11), atol=1e-4)


def test_a_checkpoint_file_runs_no_code_and_damage_raises_an_error(tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "rest": Malicious(trace)}, path)
    whole = path.read_bytes()
    alone = pickle.dumps(Malicious(trace), protocol=2)
    for content in (whole, whole[: len(whole) // 2], b"", alone):
        path.write_bytes(content)
        with pytest.raises(hg.UsageError, match="no code in it was run") as error:
            from_original(path, tmp_path / "vocab.json")
        assert "\n" not in str(error.value) and not trace.exists()
    pickle.loads(alone).close()
    assert trace.exists()  # which shows that it would have been run


def test_a_head_count_that_the_tensors_contradict(tmp_path):
    for n_heads in (2, 0):
        with pytest.raises(hg.UsageError, match=rf"n_heads={n_heads}, but .* 3 heads"):
            convert(tmp_path, original([1, 1]).state_dict(), n_heads=n_heads)


def peer(depth, shorten_factor, **options):
    package = pytest.importorskip("hourglass_transformer_pytorch.hourglass_transformer_pytorch")
    package.math = __import__(
        "math"
    )  # which it uses without importing it, at lengths that are no multiple of its factor
    sizes = {"num_tokens": 256, "dim": 16, "max_seq_len": LENGTH, "heads": 3, "dim_head": 5, "attn_resampling": False}
    return randomize(package.HourglassTransformerLM(depth=depth, shorten_factor=shorten_factor, **(sizes | options)))


def convert_peer(tmp_path, model, **options):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    return from_pypi(tmp_path / "model.pth", **({"n_heads": 3} | options))


@pytest.mark.parametrize(
    "depth, shorten_factor, method, hierarchy",
    [
        (2, None, "naive", "2@1"),
        ((2, 1, 0), 4, "naive", "2@1 1@4 0@1"),
        ((1, (0, 2, 1), 1), (2, 3), "linear", "1@1 0@2 2@6 1@2 1@1"),
        ((0, (1, 1, 0), 1), 2, "naive", "0@1 1@2 1@4 0@2 1@1"),
    ],
)
def test_converted_pypi_models_give_the_same_logits(tmp_path, depth, shorten_factor, method, hierarchy):
    theirs = peer(depth, shorten_factor, updown_sample_type=method)
    model, tokenizer = convert_peer(tmp_path, theirs, shorten_factor=shorten_factor or ())
    assert model.config.hierarchy == hierarchy and tokenizer.kind == "byte"
    for length in (1, 13, LENGTH):
        np.testing.assert_allclose(forward(model, TEXT[:, :length]), logits(theirs, TEXT[:, :length]), atol=1e-5)


@pytest.mark.parametrize("method", ["naive", pytest.param("linear", marks=pytest.mark.slow)])
def test_logits_of_the_pypi_package_where_it_is_not_causal(tmp_path, method):
    """With a mask token beside its own, which is never predicted; a last group that is not whole included."""
    theirs = peer((1, 1, 1), 3, causal=False, updown_sample_type=method)
    model, tokenizer = convert_peer(tmp_path, theirs, shorten_factor=3, causal=False)
    assert (tokenizer.vocab_size, model.config.vocab_size) == (256, 257)
    found, expected = np.asarray(forward(model, TEXT[:, :13])), logits(theirs, TEXT[:, :13])
    np.testing.assert_allclose(found[..., :256], expected, atol=1e-5)
    assert found[..., 256].max() < found[..., :256].min() - 50
    causal, _ = convert_peer(tmp_path, theirs, shorten_factor=3)
    assert np.abs(forward(causal, TEXT[:, :13]) - expected).max() > 1e-2


def test_gelu_in_its_tanh_form_would_give_other_logits(tmp_path):
    theirs = peer(2, None)
    model, _ = convert_peer(tmp_path, theirs)
    wrong = build_model(dataclasses.replace(model.config, activation="gelu"), named_parameters(model), "test")
    assert np.abs(forward(wrong, TEXT) - logits(theirs, TEXT)).max() > 1e-4


@pytest.mark.parametrize(
    "depth, options, given, message",
    [
        ((1, 1, 1), {"attn_resampling": True}, {"shorten_factor": 2}, "attention resampling"),
        ((1, 1, 1), {}, {}, "give the shorten_factor"),
        ((1, 1, 1), {}, {"shorten_factor": 2, "n_heads": 8}, "n_heads=8 does not divide the 15"),
        ((1, 1, 1), {}, {"shorten_factor": 2.5}, "whole number"),
        ((1, 1, 1), {}, {"shorten_factor": (2, 7)}, "shortens 1 times"),
        (2, {}, {"shorten_factor": 4}, "shortens 0 times"),
        (
            (1, 1, 1),
            {"updown_sample_type": "linear"},
            {"shorten_factor": 5},
            "shorten_factor=5, but .* has 2",
        ),
        ((1, 1, 1), {"num_tokens": 11}, {"shorten_factor": 2}, "bytes: 256 tokens, but .* has 11"),
    ],
)
def test_what_the_pypi_package_has_and_this_library_has_not(tmp_path, depth, options, given, message):
    with pytest.raises(hg.UsageError, match=message) as error:
        convert_peer(tmp_path, peer(depth, 2 if isinstance(depth, tuple) else None, **options), **given)
    assert "\n" not in str(error.value)
