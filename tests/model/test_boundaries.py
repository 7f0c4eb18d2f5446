"""Groups that end where the text says: rules, causality where it is decided, decoding in each row's own time."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import event_config, forward, make_model, run_cached, small_config, tokens_of
from flax import nnx
from launching import run_forked

import hourglass_jax as hg
from hourglass_jax import generation
from hourglass_jax.costs import forward_flops, level_lengths
from hourglass_jax.inspection import count_groups
from hourglass_jax.nn import boundaries
from hourglass_jax.nn.boundaries import SPACELIKE, WHITESPACE, Boundaries
from hourglass_jax.prompts import AlignedPrompts
from hourglass_jax.registry import BOUNDARIES
from hourglass_jax.tokenizers import boundary_tokens

KEY = jax.random.key(0)


# Where events fire


def events_of(config, tokens):
    model = make_model(config)
    x = jnp.zeros((*tokens.shape, config.d_model))
    served = nnx.jit(lambda rule: rule(x, jnp.asarray(tokens)).served)(model.hourglass.boundaries)
    return np.diff(np.asarray(served), axis=1, prepend=-1) > 0


def test_whitespace_and_spacelike_bytes_match_their_definitions():
    text = "A  tab\tand two\n\n  lines, 3_4 (ﬁn): à\N{NO-BREAK SPACE}é 日本."
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]
    assert set(WHITESPACE) == {*b" \t\n\r\v\f", 256, 257}

    def is_spacelike(b):
        return b < ord("0") or ord("9") < b < ord("A") or ord("Z") < b < ord("a") or ord("z") < b < 0x80 or b >= 0xC0

    assert set(SPACELIKE) == {b for b in range(256) if is_spacelike(b)} | {256, 257}
    for name, members in (("whitespace", WHITESPACE), ("spacelike", SPACELIKE)):
        config = event_config(vocab_size=256, boundaries=name, boundary_tokens=(), boundary_slack=3.0)
        listed = np.isin(tokens[0], members)
        expected = listed & ~np.append(False, listed[:-1])
        expected[0] = True  # a row begins with an event
        np.testing.assert_array_equal(events_of(config, tokens)[0], expected)
        assert 5 < expected.sum() < len(expected) / 2
        assert max(make_model(config).hourglass.boundaries.tokens) < 256  # of those, `check_causality` makes texts


def test_listed_tokens_fire_until_capacity_is_reached():
    tokens = np.array([[5, 1, 1, 2, 7, 1, 8, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0]])
    free = events_of(event_config(boundaries="tokens", boundary_slack=3.0), tokens)[0]
    np.testing.assert_array_equal(free, np.isin(tokens[0], (0, 1, 2)) | (np.arange(17) == 0))
    for slack in (1e9, float("inf")):
        [granted] = events_of(event_config(boundaries="tokens", boundary_slack=slack), tokens)
        np.testing.assert_array_equal(granted, free)
    limited = events_of(event_config(boundaries="tokens", boundary_slack=1.0, hierarchy="0@1 1@6 1@1"), tokens)[0]
    assert limited.sum() == 17 // 6 + boundaries.SPARE < free.sum()
    np.testing.assert_array_equal(limited[:5], free[:5])


# Every k-th position

run_hourglass = nnx.jit(lambda hourglass, x: hourglass(x))


@pytest.mark.parametrize("shortening", ["select", "average"])
def test_boundaries_at_every_kth_token_equal_fixed_groups(shortening):
    options = {"hierarchy": "0@1 1@3 1@1", "norm": "final", "shortening": shortening, "boundary_tokens": ()}
    x = np.random.default_rng(0).normal(size=(2, 14, 16)).astype(np.float32)
    models = [make_model(event_config(boundaries=name, **options)) for name in ("every", "fixed")]
    x[:, 0] = 0  # the mean of group 0: of one position here, of k there
    every, fixed = (run_hourglass(model.hourglass, x) for model in models)
    np.testing.assert_allclose(every, fixed, atol=1e-6)
    x[:, 0] = 1
    every, fixed = (run_hourglass(model.hourglass, x) for model in models)
    assert (np.abs(every - fixed).max() < 1e-6) == (shortening == "select")


# Causality, where it is decided


class LooksAhead(Boundaries):
    def fires(self, here, before):
        return jnp.isin(jnp.roll(here.token, -1, axis=1), jnp.arange(3))


class BatchTopK(Boundaries):
    def fires(self, here, before):
        score = jnp.sin(here.token * 7.0)
        return score >= jnp.sort(score.reshape(-1))[-score.size // 3]


class NextRow(Boundaries):
    def fires(self, here, before):
        return jnp.isin(jnp.roll(here.token, 1, axis=0), jnp.arange(3))


class WholeSequenceThreshold(Boundaries):
    def fires(self, here, before):
        score = jnp.sin(here.token * 7.0)
        return score > score.mean(axis=1, keepdims=True)


class LengthAware(Boundaries):
    def fires(self, here, before):
        return here.place % (2 + here.token.shape[1] % 5) == 0


@pytest.mark.parametrize(
    "rule, message",
    [
        (LooksAhead, "depends on the later token"),
        (BatchTopK, "depends on (the later token|another row)"),
        (NextRow, "depends on another row"),
        (WholeSequenceThreshold, "depends on the later token"),
        (LengthAware, "differs between texts of"),
    ],
)
def test_a_rule_that_reads_the_future_fails_the_causality_check(rule, message, monkeypatch):
    monkeypatch.setitem(BOUNDARIES, "leaky", rule)
    model = make_model(event_config(boundaries="leaky", hierarchy="0@1 1@3 0@1"))
    assert not np.triu(hg.causality.influence(model, tokens_of(13)), k=1).any()
    with pytest.raises(hg.CausalityError, match=message):
        hg.check_causality(model)


CROWDED = {"boundary_tokens": range(7), "boundary_slack": 1.0}  # more want to end a group than there is room for
GRID = [
    ("0@1 1@3 1@1", {"boundaries": "whitespace"}),
    pytest.param(
        "0@1 2@3 1@1",
        {"boundaries": "spacelike", "shortening": "select", "positions": "rotary"},
        marks=pytest.mark.slow,
    ),
    ("1@1 1@3 0@1", {"boundaries": "tokens", "positions": "learned", "norm": "final"} | CROWDED),
    pytest.param(  # and every third of those
        "1@1 1@2 1@6 0@2 1@1", {"boundaries": "tokens", "shortening": "select"}, marks=pytest.mark.slow
    ),
    ("1@1 0@2 1@4 1@2 0@1", {"boundaries": "fixed every", "positions": "rotary"}),
    ("1@1 1@3 0@1", {"shortening": "attention_average", "upsampling": "attention_repeat", "dropout": 0.5}),
    pytest.param(
        "0@1 1@2 1@6 0@2 1@1",
        {"shortening": "attention_average", "upsampling": "attention", "positions": "rotary"},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("hierarchy, options", GRID)
def test_predictions_with_boundaries_pass_the_causality_check(hierarchy, options):
    hg.check_causality(make_model(event_config(hierarchy=hierarchy, **options)))


# Decoding


def largest_difference(model, length=31):
    """Between cached and full logits of rows with prompts cut anywhere, relative to the largest logit."""
    factor = model.config.shared_factor
    cuts = (1, 2, 5, 13, 20)
    tokens = tokens_of((len(cuts), length))
    aligned = AlignedPrompts.align([row[:n] for row, n in zip(tokens, cuts, strict=True)], factor, 100 * factor)
    full = np.asarray(forward(model, tokens))
    passed, stepped = (np.asarray(x) for x in run_cached(model, aligned.prefix, aligned.start, tokens))
    differences = []
    for row, start in enumerate(aligned.start):
        n_read = aligned.prefix.shape[1] - start
        cached = np.concatenate([passed[row, start:], stepped[row, : length - n_read]])
        differences.append(np.abs(cached - full[row]).max())
    return max(differences) / np.abs(full).max()


@pytest.mark.parametrize("hierarchy, options", GRID)
def test_cached_logits_equal_full_forward_at_any_row_phase(hierarchy, options):
    with jax.enable_x64(True):
        assert largest_difference(make_model(event_config(hierarchy=hierarchy, dtype="float64", **options))) < 1e-12


def test_a_cache_with_other_boundaries_gives_other_logits(monkeypatch):
    model = make_model(event_config(boundaries="tokens", boundary_tokens=range(7), boundary_slack=1.0))
    assert largest_difference(model) < 1e-5
    step = Boundaries.step

    def generous(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(boundaries, "SPARE", 99)
            return step(self, *arguments)

    monkeypatch.setattr(Boundaries, "step", generous)
    jax.clear_caches()
    assert largest_difference(model) > 1e-3


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 0, 9, 1, 2, 8, 8]]


@pytest.fixture(scope="module")
def model():
    return make_model(event_config(hierarchy="0@1 1@3 1@1", max_length=200))


def test_greedy_tokens_are_the_argmax_of_full_forward(model):
    for prompt, new in zip(PROMPTS, hg.generate(model, PROMPTS, max_tokens=20, key=KEY, temperature=0.0), strict=True):
        text = np.zeros((1, 32), int)  # padding comes later
        text[0, : len(prompt) + 20] = [*prompt, *new]
        likeliest = np.asarray(forward(model, text)[0].argmax(-1))
        np.testing.assert_array_equal(new, likeliest[len(prompt) - 1 : len(prompt) + 19])


ATTENTION = {"shortening": "attention_average", "upsampling": "attention_repeat"}


LEARNED = {"boundaries": "router", "shortening": "select", "upsampling": "smooth"}


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({"positions": "rotary"} | ATTENTION, LEARNED))]
)
def test_rows_in_a_batch_equal_rows_alone_beyond_the_context(options):
    model = make_model(event_config(hierarchy="0@1 1@3 1@1", **options))
    prompts = [*PROMPTS, tokens_of(100)]  # the last one is longer than the context
    options = {"max_tokens": 200, "key": KEY, "max_context": 30}
    together = hg.generate(model, prompts, **options, stream=lambda new: None)
    for prompt, row in zip(prompts[1:], together[1:], strict=True):
        assert len(row) == 200
        np.testing.assert_array_equal(row, hg.generate(model, [prompt], **options)[0])


def test_cache_growth_leaves_generated_tokens_unchanged(model, monkeypatch):
    options = {"max_tokens": 100, "key": KEY, "stream": lambda new: None}
    whole = hg.generate(model, PROMPTS, **options)
    monkeypatch.setattr(generation, "MIN_CACHE", 48)
    for row, grown in zip(whole, hg.generate(model, PROMPTS, **options), strict=True):
        np.testing.assert_array_equal(row, grown)


def test_a_long_generation_recompiles_nothing_and_keeps_memory_constant(model):
    programs = (generation._extend, generation._drop, generation._grow, generation._prefill)
    sizes, arrays = [], []

    def observe(new):
        sizes.append([program._cache_size() for program in programs])
        arrays.append(sum(array.nbytes for array in jax.live_arrays()))

    [text] = hg.generate(model, PROMPTS[:1], max_tokens=1000, key=KEY, max_context=120, stream=observe)
    assert len(text) == 1000
    settled = 200 // generation.STREAM_BLOCK
    assert sizes[settled] == sizes[-1] and arrays[settled] == arrays[-1]


def test_one_program_serves_all_texts(model):
    traces = []

    @jax.jit
    def logits(tokens):
        traces.append(tokens)
        return model(tokens)

    for tokens in (np.zeros((2, 20), int), np.full((2, 20), 5), tokens_of((2, 20))):
        assert np.isfinite(logits(tokens)).all()
    assert len(traces) == 1


def test_group_ends_returns_the_boundaries_of_each_level():
    model = make_model(event_config(hierarchy="0@1 1@2 1@6 0@2 1@1"))
    tokens = np.array([5, 1, 6, 7, 0, 0, 8, 2, 9, 1, 10, 2, 2])
    first = np.isin(np.arange(13), [0, 1, 4, 7, 9, 11])
    every_third = np.isin(np.arange(13), [0, 7])
    np.testing.assert_array_equal(hg.group_ends(model, tokens), [first, every_third])
    fixed = make_model(small_config(hierarchy="0@1 1@2 1@6 0@2 1@1"))
    np.testing.assert_array_equal(hg.group_ends(fixed, tokens), [np.arange(13) % k == 0 for k in (2, 6)])
    assert hg.group_ends(make_model(small_config(hierarchy="1@1")), tokens).shape == (0, 13)


def test_count_groups_includes_suppressed_boundaries():
    rows = np.array([[5, 1, 1, 2, 7, 1, 8, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0], [5] * 17])
    options = {"boundaries": "tokens", "boundary_slack": 1.0, "hierarchy": "0@1 1@6 1@1"}
    counts = count_groups(make_model(event_config(**options)), rows)
    assert counts == (34, 2 + boundaries.SPARE + 1, 14 + 1) and counts.suppressed == 1 - 7 / 15


# Configurations


@pytest.mark.parametrize(
    "options, message",
    [
        ({"boundary_tokens": ()}, "boundaries='whitespace' requires boundary_tokens"),
        (
            {"boundaries": "tokens", "boundary_tokens": (), "vocab_size": 300},
            "boundaries='tokens' requires boundary_tokens",
        ),
        ({"boundary_tokens": (11,)}, "boundary_tokens=11 is out of range"),
        ({"boundaries": "spaces"}, "boundaries='spaces' is unknown; choose one of fixed, whitespace"),
        ({"boundaries": "whitespace fixed"}, "has 2 names, but hierarchy='1@1 1@3 1@1' shortens 1 times"),
        ({"boundaries": "fixed whitespace", "hierarchy": "1@1 1@2 1@4 1@2 1@1"}, "only the first shortening can"),
        ({"shortening": "linear"}, "shortening='linear' requires groups of equal length"),
        ({"upsampling": "linear"}, "upsampling='linear' requires groups of equal length"),
        ({"boundary_slack": 0.5}, "boundary_slack=0.5 is out of range"),
    ],
)
def test_invalid_combinations_raise_one_line_errors(options, message):
    with pytest.raises(hg.UsageError, match=message):
        event_config(**options)


def test_configs_round_trip_through_json_and_costs_follow_group_capacity():
    config = event_config(hierarchy="1@1 1@2 1@6 0@2 1@1")
    assert hg.HourglassConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert config.boundaries_by_level == ("whitespace", "every") and config.shared_factor == 1
    fixed = dataclasses.replace(config, boundaries="fixed")
    model, tokens = make_model(config), jnp.asarray(tokens_of((1, 48)))
    outer, inner = nnx.eval_shape(
        lambda: [groups.when for groups in model.hourglass.forward(jnp.zeros((1, 48, 16)), tokens=tokens)[1]]
    )
    assert level_lengths(config, 48) == {1: 48, 2: outer.shape[1], 6: inner.shape[1]}
    assert level_lengths(fixed, 48) == {1: 48, 2: 24, 6: 8}
    assert forward_flops(config, 48)[1] == forward_flops(fixed, 48)[1]
    roomy, room = (forward_flops(dataclasses.replace(config, boundary_slack=s), 480)[2] for s in (1.5, 1.0))
    assert roomy > 1.4 * room
    assert dataclasses.replace(fixed, boundaries="fixed every").shared_factor == 2


def test_boundary_tokens_lists_the_boundary_characters_of_a_vocabulary():
    tokenizer = hg.CharTokenizer.from_text("an é,\n3.")
    for name, characters in (("whitespace", "\n "), ("spacelike", "\n ,.")):
        listed = boundary_tokens(tokenizer, name)
        assert {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.encode(characters)} == set(listed)
    assert boundary_tokens(tokenizer, "fixed") == boundary_tokens(hg.ByteTokenizer(), "whitespace") == ()
    with pytest.raises(hg.UsageError, match="requires text, not images"):
        boundary_tokens(hg.ImageTokenizer((2, 2, 3)), "whitespace")


TINY = ["--hierarchy=1@1 1@3 1@1", "--d_model=16", "--n_heads=2", "--d_ff=16", "--block_size=24", "--batch_size=4"]
TINY += ["--steps=2", "--data_path=text.txt", "--shortening=average", "--upsampling=repeat"]


@pytest.mark.launchers
@pytest.mark.slow
def test_launchers_train_and_generate_with_boundaries(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 20)
    result = run_forked("pretrain", *TINY, "--boundaries=whitespace", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "causal: yes, groups of 4." in result.stdout
    result = run_forked("generate", "--load_model_path=runs/pretrain", "--max_tokens=20", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    given = ["--load_model_path=runs/pretrain", "--data_path=text.txt", "--split=all"]
    result = run_forked("evaluate", *given, "--boundaries=cuts.tsv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    header, *lines = (tmp_path / "cuts.tsv").read_text().splitlines()
    assert header == "position\tcharacter\tlevels" and len(lines) == 43 * 20 - 1
    for i, line in enumerate(lines):
        position, character, levels = line.split("\t")
        assert int(position) == i and int(levels) == (character == " " or i % 24 == 0)
    result = run_forked("evaluate", *given[:1], "--window=24", cwd=tmp_path)
    assert result.returncode == 2 and "--window does not apply to consecutive windows" in result.stderr
    result = run_forked("figures/cuts", *given[:1], "--text=a lazy dog jumps", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "cuts.json").read_text())["ends"] == {
        "fixed": [0, 3, 6, 9, 12, 15],
        "whitespace": [0, 1, 6, 10],
    }
    assert (tmp_path / "cuts.png").read_bytes().startswith(b"\x89PNG")
    assert run_forked("pretrain", *TINY, "--hierarchy=1@1", "--out=plain", cwd=tmp_path).returncode == 0
    result = run_forked("figures/cuts", "--load_model_path=plain", "--out=none", cwd=tmp_path)
    assert result.returncode == 2 and "has no shortening" in result.stderr
    assert not list(tmp_path.glob("none*"))


@pytest.mark.launchers
@pytest.mark.parametrize(
    "text, options, line",
    [
        pytest.param("abcdefg" * 99, ["--boundaries=whitespace"], "end no group in", marks=pytest.mark.slow),
        ("a b c d " * 99, ["--boundaries=whitespace", "--shortening=linear"], "requires groups of equal length"),
        ("a b c d " * 99, ["--boundaries=tokens"], "boundaries='tokens' requires boundary_tokens"),
    ],
)
def test_launchers_reject_invalid_boundary_options_in_one_line(text, options, line, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    result = run_forked("pretrain", *TINY, *options, cwd=tmp_path)
    assert result.returncode == 2 and line in result.stderr.splitlines()[-1]
