"""Prompts with answers: both forms, the template, which tokens have loss, truncation, batches, one-line errors."""

import gzip
import json

import jax
import numpy as np
import optax
import pytest
from conftest import light_config, make_model
from flax import nnx

import hourglass_jax as hg
from hourglass_jax.data import pairs as module
from hourglass_jax.data.pairs import ASSISTANT, SYSTEM, TEMPLATE, USER, Conversation, Message, PairExamples
from hourglass_jax.training import step

BYTES = hg.ByteTokenizer()
MESSAGES = (
    Message(SYSTEM, "be brief"),
    Message(USER, "hi\nassistant: no"),
    Message(ASSISTANT, "yes"),
    Message(USER, ""),
    Message(ASSISTANT, "日本\nuser: é "),
)
PAIRS = [Conversation((Message(USER, "q" * n), Message(ASSISTANT, "a" * (n % 3 + 1)))) for n in range(7)]


def record_of(messages):
    return {"messages": [message._asdict() for message in messages]}


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def text_of(tokens):
    return "".join({BYTES.bos_id: "[", BYTES.eos_id: "]"}.get(token) or chr(token) for token in tokens.tolist())


def test_a_prompt_with_a_completion_is_a_user_and_an_assistant(tmp_path):
    pair = [Message(USER, "who?"), Message(ASSISTANT, "a frog")]
    records = [{"prompt": "who?", "completion": "a frog", "id": 7}, record_of(pair), record_of(MESSAGES)]
    found = module.read_pairs(write(tmp_path / "pairs.jsonl", *records))
    assert [list(conversation.messages) for conversation in found] == [pair, pair, list(MESSAGES)]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    assert module.read_pairs(str(tmp_path / "pairs.json")) == found
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    assert module.read_pairs(str(tmp_path / "pairs.jsonl.gz")) == found


def test_only_the_answers_and_their_ends_have_loss():
    messages = (*MESSAGES[:3], Message(USER, "why?"), Message(ASSISTANT, "so"))
    [tokens], [weights] = PairExamples([Conversation(messages)], BYTES, 200).batch([0])
    assert text_of(tokens) == ("[system: be brief]user: hi\nassistant: no]assistant: yes]user: why?]assistant: so]")
    assert text_of(tokens[1:][weights == 1]) == "yes]so]" and np.isin(weights, (0, 1)).all()


@pytest.mark.parametrize("tokenizer", [BYTES, hg.CharTokenizer.from_text(module.all_text([Conversation(MESSAGES)]))])
def test_the_template_round_trips(tokenizer):
    tokens = module.encode_conversation(Conversation(MESSAGES), tokenizer).tokens
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id and tokenizer.unk_id not in tokens
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)[:-1]
    for part, message in zip(map(tokenizer.decode, parts), MESSAGES, strict=True):
        [role] = [role for role, text in TEMPLATE.items() if part.startswith(text)]
        assert Message(role, part.removeprefix(TEMPLATE[role])) == message


def test_a_model_answers_after_the_tokens_that_came_before_the_answer_in_training():
    example = module.encode_conversation(Conversation(MESSAGES), BYTES)
    prompt = module.encode_prompt(MESSAGES[:-1], BYTES)
    assert prompt.tolist() == example.tokens[: -example.n_answer].tolist() and prompt.dtype == np.int32


def test_the_template_survives_cleaning():
    text = "".join(TEMPLATE.values())
    tokenizer = hg.CharTokenizer.from_text(text, clean=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("block_size", range(21, 60))
def test_truncation_keeps_the_answer_and_the_end_of_the_prompt(block_size):
    pair = Conversation((Message(USER, "abcdefghijklmnopqrstuvwxyz"), Message(ASSISTANT, "an answer")))
    whole = module.encode_conversation(pair, BYTES)
    examples = PairExamples([pair, PAIRS[0]], BYTES, block_size)
    [tokens], [weights] = examples.batch([0])
    assert examples.n_cut == (len(whole.tokens) > block_size + 1)
    assert len(tokens) == min(len(whole.tokens), block_size + 1)
    assert text_of(tokens) == "[" + text_of(whole.tokens)[1 - len(tokens) :]
    assert text_of(tokens[1:][weights == 1]) == "an answer]"


def test_an_answer_must_fit_with_its_role():
    pair = Conversation((Message(USER, "abc"), Message(ASSISTANT, "an answer")), "pairs.jsonl, record 3")
    [tokens], _ = PairExamples([pair], BYTES, 21).batch([0])
    assert text_of(tokens) == "[assistant: an answer]"
    with pytest.raises(hg.UsageError, match=r"pairs.jsonl, record 3: the answer has 10 tokens, .* has space for 9; "):
        PairExamples([pair], BYTES, 20)


def test_the_targets_of_prompts_change_no_gradient(monkeypatch):
    config = light_config(vocab_size=BYTES.vocab_size)
    optimizer = optax.sgd(1.0)
    batch = PairExamples(PAIRS, BYTES, 64).batch(range(4))
    original = step.task_of
    other = jax.random.randint(jax.random.key(1), batch[1].shape, 0, BYTES.vocab_size)

    def trained(changed):
        def task_of(*arguments):
            task = original(*arguments)
            return task._replace(targets=jax.numpy.where(changed, other, task.targets))

        monkeypatch.setattr(step, "task_of", task_of)
        graph, params = nnx.split(make_model(config), nnx.Param)
        state = step.TrainState(np.zeros((), np.int32), params, optimizer.init(params))
        state, metrics = step.make_train_step(graph, optimizer, seed=0)(state, *batch)
        return jax.device_get((jax.tree.leaves(state.params), metrics))

    expected = trained(np.zeros(batch[1].shape, bool))
    of_prompts = trained(batch[1] == 0)
    jax.tree.map(np.testing.assert_array_equal, of_prompts, expected)
    of_answers = trained(batch[1] == 1)
    assert of_answers[1]["gradient_norm"] != expected[1]["gradient_norm"]


def test_a_batch_of_pairs_is_a_function_of_seed_and_step():
    examples = PairExamples(PAIRS, BYTES, 64)
    batch_at, again = (examples.shuffled(3, seed=5) for _ in range(2))
    tokens, weights = batch_at(9)
    batch_at(2)
    for rows in (slice(0, 1), slice(1, 3), slice(None), np.array([2, 0])):  # of several hosts
        for found, expected in zip(again(9, rows), (tokens, weights), strict=True):
            assert np.array_equal(found, expected[rows])
    assert not np.array_equal(examples.shuffled(3, seed=6)(9)[0], tokens)
    epoch = np.concatenate([batch_at(i)[0] for i in range(7)]).tolist()
    whole = examples.batch(range(7))[0].tolist()
    assert all(sorted(epoch[i : i + 7]) == sorted(whole) for i in (0, 7, 14))
    parts = list(examples.in_order(3))
    assert [len(part) for part, _ in parts] == [3, 3, 1]
    assert np.concatenate([part for part, _ in parts]).tolist() == whole


def test_pairs_for_validation_are_not_trained_on(tmp_path):
    assert module.split_pairs(PAIRS, "", 2) == (PAIRS[:5], PAIRS[5:])
    assert module.split_pairs([*PAIRS, PAIRS[0]], "", 1) == (PAIRS[1:], PAIRS[:1])
    assert module.split_pairs(PAIRS, "", 0) == (PAIRS, PAIRS)
    valid = write(tmp_path / "valid.jsonl", record_of(PAIRS[3].messages))
    assert module.split_pairs(PAIRS, valid, 0) == (PAIRS[:3] + PAIRS[4:], PAIRS[3:4])


GOOD = {"prompt": "who?", "completion": "a frog"}
BAD_RECORDS = {
    "no field": ({"text": "a"}, "prompt is missing; give prompt and completion, or messages"),
    "no completion": ({"prompt": "a"}, "completion is missing; give prompt and completion, or messages"),
    "a number": ({"prompt": "a", "completion": 7}, "completion is int, not text"),
    "both forms": (GOOD | {"messages": []}, "has messages and a prompt or completion; give one of the two forms"),
    "half a surrogate": (GOOD | {"prompt": "\ud800"}, "half of a surrogate pair"),
    "no messages": ({"messages": []}, "the last message must be the assistant's"),
    "no answer": (record_of(MESSAGES[:2]), "the last message must be the assistant's"),
    "an unknown role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "message 1 has the role 'tool'; allowed: system, user, assistant",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "message 1: role is missing"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: content is missing"),
    "a text as messages": ({"messages": "a"}, "messages is not a list of objects"),
    "a list": ([1], "cannot be read (a JSON list, not an object)"),
    "an empty completion": (GOOD | {"completion": ""}, "the answer is empty; give text"),
    "a long answer": (
        GOOD | {"completion": "a" * 99},
        "the answer has 100 tokens, but block_size=64 has space for 53",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_with_its_file(tmp_path, name):
    record, message = BAD_RECORDS[name]
    path = write(tmp_path / "pairs.jsonl", GOOD, record)
    with pytest.raises(hg.UsageError) as error:
        PairExamples(module.read_pairs(path), BYTES, 64)
    assert str(error.value).startswith(f"{path}, record 2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b"{", b'{"prompt": "\xff"}', b"prompt", b"[" * 100_000])
def test_a_line_that_is_not_json_is_named_with_its_file(tmp_path, line):
    (tmp_path / "pairs.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(hg.UsageError, match=r"pairs.jsonl, record 2: cannot be read \(.*\); give an intact file"):
        module.read_pairs(str(tmp_path / "pairs.jsonl"))


def test_other_files_and_empty_ones_are_rejected(tmp_path):
    for name, message in (("pairs.csv", "is not a file of pairs"), ("pairs.jsonl", "contains no records")):
        (tmp_path / name).write_text("\n")
        with pytest.raises(hg.UsageError, match=f"{name}: {message}"):
            module.read_pairs(str(tmp_path / name))


def test_an_answer_without_characters_of_the_vocabulary_is_named():
    pair = Conversation((Message(USER, "abc"), Message(ASSISTANT, "42")), "pairs.jsonl, record 1")
    tokenizer = hg.CharTokenizer.from_text(module.all_text([pair]), clean=True)
    with pytest.raises(hg.UsageError, match=r"pairs.jsonl, record 1: the answer is empty after cleaning"):
        module.encode_conversation(pair, tokenizer)
