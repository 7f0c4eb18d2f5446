"""Fine-tuning on pairs, and answers with generate.py --chat: one prompt, many prompts, a conversation."""

import io
import json
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import light_config, make_model
from flax import nnx
from launching import run_forked

import hourglass_jax as hg
from experiments import generate as launcher
from hourglass_jax.data.pairs import ASSISTANT, SYSTEM, TEMPLATE, USER, Message, encode_prompt
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.run import Record, Run

BYTES = hg.ByteTokenizer()
NOUNS = "pond frog moon snow crow rain leaf wind tree hill star lake deer reed boat gate lamp bell road moss".split()  # noqa: SIM905
PAIRS = [(f"what is {noun}?", f"{noun[::-1]}, {NOUNS[7 * i % 20]}.") for i, noun in enumerate(NOUNS)]
PAIRS[3] = ("日本\nuser: é", "naïve\nassistant: ")  # text as in the template
CHAT_SETTINGS = {"format": "pairs", "template": TEMPLATE, "block_size": 64}
SEPARATOR = "-" * 20 + "\n"


def write_model(directory, tokenizer=BYTES, settings=CHAT_SETTINGS, **options):
    """A run directory with a model of random weights."""
    model = make_model(light_config(vocab_size=tokenizer.vocab_size, **options))
    Run(directory).write(Record(model.config, tokenizer, settings, []))
    store = CheckpointStore(directory)
    store.save(1, nnx.state(model, nnx.Param))
    store.close()
    return directory


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))


def finetune(home, *options):
    flags = ["--load_model_path=base", "--format=pairs", "--data_path=pairs.jsonl", "--batch_size=20", *options]
    return run_forked("finetune", *flags, cwd=home)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with pairs, and a model that was trained on them until it knew them."""
    home = tmp_path_factory.mktemp("chat")
    write_model(home / "base", settings={}, hierarchy="0@1 1@2 1@1", d_model=48, d_ff=96)
    write_pairs(home / "pairs.jsonl", PAIRS)
    result = finetune(home, *OVERFIT, "--out=tuned")
    assert result.returncode == 0, result.stderr
    (home / "log").write_text(result.stdout)
    return home


OVERFIT = ["--validation_fraction=0", "--epochs=80", "--learning_rate=1e-2", "--log=none"]


@pytest.fixture
def generate(capsys, monkeypatch):
    def generate(run, *options, lines=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        with flagsaver.flagsaver():
            flags.FLAGS(["generate.py", f"--load_model_path={run}", *options])
            launcher.main([])
        return capsys.readouterr().out

    return generate


def test_an_overfitted_model_answers_all_prompts_exactly(home, generate):
    assert (home / "log").read_text().startswith("20 pairs to train on, 20 for validation, 80 steps")
    for prompt, answer in PAIRS:
        assert generate(home / "tuned", "--chat", f"--prompt={prompt}") == f"{answer}\n"


def test_each_line_of_a_file_is_a_conversation_of_its_own(home, generate, tmp_path):
    pairs = PAIRS[:3]
    (tmp_path / "prompts").write_text("".join(f"{prompt}\n" for prompt, _ in pairs))
    out = generate(home / "tuned", "--chat", f"--prompt_file={tmp_path / 'prompts'}", "--each_line")
    assert out.split(SEPARATOR) == [f"{answer}\n" for _, answer in pairs]
    assert generate(home / "tuned", "--chat", lines=f"\n{PAIRS[0][0]}\n".encode()) == f"{PAIRS[0][1]}\n"


def test_the_same_command_resumes_and_evaluation_is_on_the_pairs(home):
    again = finetune(home, *OVERFIT, "--out=tuned")
    assert again.returncode == 0 and "bits/byte 0.0" in again.stdout
    assert Run(home / "tuned").read().settings["template"] == TEMPLATE
    result = run_forked("evaluate", "--load_model_path=tuned", cwd=home)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["n_bytes"] == sum(len(answer.encode()) + 1 for _, answer in PAIRS) and figures["loss"] < 0.1


def test_cut_prompts_are_counted_and_the_vocabulary_is_extended(tmp_path):
    write_model(tmp_path / "base", hg.CharTokenizer.from_text("abc"))
    write_pairs(tmp_path / "pairs.jsonl", [("a" * 99, "!")] + [("c" * n, "b") for n in range(20)])
    flags = ["--extend_vocabulary", "--block_size=45", "--epochs=1", "--log=none", "--out=cut"]
    result = finetune(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    cut = "1 cut at the beginning of the prompt to fit block_size=45, 1 steps"
    assert result.stdout.startswith(f"20 pairs to train on, 1 for validation, {cut}")
    assert "next: python experiments/generate.py --load_model_path=cut --chat" in result.stdout
    characters = Run(tmp_path / "cut").read().tokenizer.characters
    assert set(characters) == set("abc!" + "".join(TEMPLATE.values()))


def reply(run, messages, number=0, temperature=0.0):
    model, tokenizer, _ = hg.load(run)
    [tokens] = hg.generate(
        model,
        [encode_prompt(messages, tokenizer)],
        max_tokens=12,
        key=jax.random.fold_in(jax.random.key(0), number),
        temperature=temperature,
        stop_token=tokenizer.eos_id,
        banned_tokens=[tokenizer.unk_id, tokenizer.bos_id],
    )
    return tokenizer.decode(tokens)


def test_lines_of_standard_input_are_one_conversation(tmp_path, generate):
    characters = hg.CharTokenizer.from_text("".join(TEMPLATE.values()) + "hello?\n")
    run = write_model(tmp_path / "run", characters, CHAT_SETTINGS | {"block_size": 400})
    options = ["--chat", "--max_tokens=12", "--temperature=1", f"--raw_out={tmp_path / 'out'}", "--system=a s"]
    shown = generate(run, *options, lines=b"hello\n\nu r\r\nso?")
    messages = [Message(SYSTEM, "a s")]
    for number, text in enumerate(["hello", "u r", "so?"]):
        messages.append(Message(USER, text))
        messages.append(Message(ASSISTANT, reply(run, messages, number, temperature=1.0)))
    answers = [message.content for message in messages if message.role == ASSISTANT]
    assert shown == "".join(f"{answer}\n" for answer in answers) and len(set(answers)) == 3
    assert (tmp_path / "out").read_text() == "".join(answers)
    assert generate(run, *options, lines=b"hello") == f"{answers[0]}\n"


def test_a_long_conversation_is_cut_at_its_beginning(tmp_path, generate, caplog):
    run = write_model(tmp_path / "run")
    model, tokenizer, _ = hg.load(run)
    with flagsaver.flagsaver():
        flags.FLAGS(["generate.py", f"--load_model_path={run}"])
        for n in (5, 100):
            whole = encode_prompt([Message(USER, "x" * n + "y")], tokenizer)
            tokens = launcher.chat_tokens(model, tokenizer, [Message(USER, "x" * n + "y")])
            assert tokens.tolist() == [whole[0], *whole[1:][-63:]] and len(tokens) <= 64
            assert ("longer than 64 tokens" in caplog.text) == (n == 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--system=a", "--prompt=a"], "--system requires --chat"),
        (["--chat", "--num_samples=2"], "--num_samples requires a prompt"),
        (["--chat", "--prompt_file={home}/latin"], "latin: not UTF-8 at byte 1"),
        (["--chat"], "standard input: not UTF-8 at byte 0"),
        (["--chat", "--prompt=a", "--load_model_path={home}/plain"], "was not fine-tuned on pairs"),
        (["--chat", "--load_model_path={home}/plain"], "was not fine-tuned on pairs"),
    ],
)
def test_invalid_chats_raise_one_line_errors(tmp_path, generate, options, message):
    (tmp_path / "latin").write_bytes(b"a\xe9")
    write_model(tmp_path / "plain", settings={})
    run = write_model(tmp_path / "run")
    options = [option.format(home=tmp_path) for option in options]
    with pytest.raises(hg.UsageError, match=message):
        generate(run, *options, lines=b"\xff\n")


GOOD = [("a", "b")] * 2
LONG = [("a", "b"), ("a", "b" * 99)]
BAD = {
    "no file": (GOOD, ["--data_path="], "--format=pairs requires --data_path; give JSON Lines"),
    "no completion": ([("a", "b"), ("a", None)], [], "pairs.jsonl, record 2: completion is missing"),
    "a long answer": (LONG, ["--block_size=64"], "pairs.jsonl, record 2: the answer has 100 tokens"),
    "one pair": (GOOD[:1], [], "pairs.jsonl: no pairs are left to train on, 1 are for validation"),
    "the same for both": (GOOD, ["--valid_path=pairs.jsonl"], "all training pairs are also for validation"),
    "no validation haiku": (GOOD, ["--format=haiku", "--validation_fraction=0"], "validation_fraction=0.0 is out of"),
    "no colon": (LONG, ["--load_model_path=letters"], "the model's vocabulary lacks ':', which the template of pairs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name):
    pairs, options, message = BAD[name]
    write_model(tmp_path / "base")
    write_model(tmp_path / "letters", hg.CharTokenizer.from_text("user assistant system"))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    result = finetune(tmp_path, *options, "--out=new")
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith(f"finetune.py: error: {message}"), line
    assert not (tmp_path / "new").exists()
