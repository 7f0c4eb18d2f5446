"""One's own texts, haiku and images through the launchers, on small models that have learned nothing yet."""

import ast
import dataclasses
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx
from launching import run_forked
from PIL import Image

import hourglass_jax as hg
from experiments.common.characters import check_characters
from experiments.common.recorded import recorded_text
from experiments.common.sources import HaikuSource
from hourglass_jax.data.corpora import load_tokens
from hourglass_jax.data.files import FileChanged
from hourglass_jax.data.pipeline import consecutive_windows, training_batches
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.identity import fingerprint
from hourglass_jax.training.run import Record, Run
from hourglass_jax.training.trainer import fit

TEXT = "the quick brown fox jumps over a lazy dog.\nfive wizards mix jugs of quartz, pink vow!\n" * 12
SPLIT = int(0.9 * len(TEXT))
METHODS = {"hierarchy": "1@1 1@2 1@1", "shortening": "average", "upsampling": "repeat", "positions": "rotary"}


def write_model(directory, path, **options):
    """A run directory as pretraining on the text at `path` leaves it."""
    data = hg.DataConfig(path=path, block_size=32, batch_size=4, **options)
    tokens, tokenizer = load_tokens(data)
    config = small_config(vocab_size=tokenizer.vocab_size, **METHODS)
    settings = {"data": dataclasses.asdict(data), "text_fingerprint": fingerprint(tokens)}
    Run(directory).write(Record(config, tokenizer, settings, []))
    store = CheckpointStore(directory, for_training=True)
    store.save(1, nnx.state(make_model(config)), {"count": np.zeros(1)})
    store.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with texts, haiku and models of some of the texts."""
    home = tmp_path_factory.mktemp("own")
    texts = {
        "text": TEXT,
        "moved": TEXT,
        "gone": TEXT,
        "changed": TEXT,
        "flat": TEXT.replace("\n", " "),
        "bytes": "naïve café, 日本語: an old pond. " * 40,
        "chinese": "日本語の古い池。" * 20,
        "mixed": TEXT + "a naïve fox\n",
        "held_out": "a naïve dög jumps over a naïve fox.\n" * 3,
    }
    for name, text in texts.items():
        (home / f"{name}.txt").write_text(text, encoding="utf-8")
    (home / "haiku.txt").write_text("\n".join(f"an old fox {i * 'a'}\nquick jumps\nover a dog" for i in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in ("text", "flat", "gone", "changed"):
            write_model(home / name, f"{name}.txt")
        write_model(home / "bytes", "bytes.txt", tokenizer="byte")
    (home / "gone.txt").unlink()
    characters = hg.CharTokenizer.load(home / "text" / "vocab.json").characters
    hg.CharTokenizer(characters[::-1]).save(home / "other.json")
    (home / "changed.txt").write_text(TEXT + "a fox\n")
    shutil.copytree(home / "text", home / "strange")
    record = json.loads((home / "strange" / "config.json").read_text())
    (home / "strange" / "config.json").write_text(json.dumps(record | {"settings": {}}))
    return home


COMMANDS = {
    "own": ("evaluate", "--load_model_path=text", "--per_token=own.tsv"),
    "moved": ("evaluate", "--load_model_path=text", "--data_path=moved.txt"),
    "changed": ("evaluate", "--load_model_path=changed"),
    "another": ("evaluate", "--load_model_path=text", "--data_path=mixed.txt,held_out.txt"),
    "allowed": ("evaluate", "--load_model_path=text", "--data_path=chinese.txt", "--allow_unknown"),
    "known_part": ("evaluate", "--load_model_path=text", "--data_path=mixed.txt", "--split=train"),
    "bytes": ("evaluate", "--load_model_path=bytes", "--per_token=bytes.tsv"),
    "haiku": ("finetune", "--load_model_path=text", "--data_path=haiku.txt", "--out=haiku"),
    "extended": (
        *("finetune", "--load_model_path=text", "--format=text", "--data_path=mixed.txt", "--valid_path=held_out.txt"),
        *("--extend_vocabulary", "--epochs=1", "--out=extended"),
    ),
    "photos": (
        *("pretrain", "--data.dataset=folder", "--data_path=photos", "--data.image_size=4", "--steps=2"),
        *("--hierarchy=0@1 1@3 1@1", "--d_model=16", "--n_heads=2", "--d_ff=32", "--batch_size=4", "--out=photo_model"),
        *("--shortening=average", "--upsampling=repeat", "--positions=rotary"),
    ),
    "own_haiku": ("evaluate", "--load_model_path=haiku", "--batch_size=3"),
    "own_extended": ("evaluate", "--load_model_path=extended"),
    "own_photos": ("evaluate", "--load_model_path=photo_model"),
    "completed": (
        "generate",
        "--load_model_path=photo_model",
        "--gen_mode=complete",
        "--num_samples=2",
        "--out=completed.png",
    ),
}
AFTER = {"own_haiku": "haiku", "own_extended": "extended", "own_photos": "photos", "completed": "photos"}

# Which slow tests alone ask for.
RARE = ("photos", "own_photos", "completed", "haiku", "own_haiku", "extended", "own_extended")


@pytest.fixture(scope="module")
def results(home, tmp_path_factory):
    """results(name): what a command printed, once it has ended; two run at a time."""
    (home / "photos").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (6 + i % 3, 8, 3), np.uint8)
        Image.fromarray(pixels).save(home / "photos" / f"{i}.{'png' if i % 2 else 'jpg'}")
    pending = {}

    def launch(name):
        if name in AFTER:
            pending[AFTER[name]].result()
        script, *flags = COMMANDS[name]
        cwd = tmp_path_factory.mktemp("cwd")
        for path in home.iterdir():
            (cwd / path.name).symlink_to(path)
        result = run_forked(script, *flags, cwd=cwd)
        assert result.returncode == 0, result.stderr
        for path in cwd.iterdir():
            if not path.is_symlink():
                shutil.move(path, home)
        return result

    def begin(name):
        if name in AFTER:
            begin(AFTER[name])
        if name not in pending:
            pending[name] = pool.submit(launch, name)
        return pending[name]

    with ThreadPoolExecutor(2) as pool:
        for name in COMMANDS:
            if name not in RARE:
                begin(name)
        yield lambda name: begin(name).result()


def figures(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_a_model_is_evaluated_on_the_rest_of_its_own_text(results):
    """Found where it was, or given from another place."""
    for name, path in (("own", "text.txt"), ("moved", "moved.txt")):
        assert f"| valid of {path} (the training text)\n" in results(name).stdout
        assert figures(results(name))["n_characters"] == len(TEXT) - SPLIT - 1
        assert figures(results(name))["n_unknown"] == 0 and not results(name).stderr
    assert figures(results("own"))["loss"] == pytest.approx(figures(results("moved"))["loss"], rel=1e-5)


def test_a_changed_text_is_reported(results):
    assert "changed.txt: changed after the model was trained on it" in results("changed").stderr
    assert "| valid of changed.txt\n" in results("changed").stdout


def test_another_text_is_read_whole(results):
    assert "| all of mixed.txt,held_out.txt\n" in results("another").stdout
    assert figures(results("another"))["n_unknown"] == 10


def test_unknown_characters_are_those_of_the_split_that_is_read(results):
    assert figures(results("known_part"))["n_unknown"] == 0 and not results("known_part").stderr
    [warning] = results("another").stderr.splitlines()
    share, characters = r"10 of 1,\d\d\d characters \(0\.\d+ %\)", "'ï' 7 times, 'ö' 3 times"
    assert re.search(f"{share} are not in the vocabulary .* {characters}$", warning)
    assert figures(results("allowed"))["n_unknown"] == 160 and "'い' 20 times" in results("allowed").stderr


@pytest.mark.parametrize("name", ["own", "bytes"])
def test_the_surprise_of_each_character_is_a_line(home, results, name):
    found = figures(results(name))
    header, *lines = (home / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == ["position", "character", "nats", "bits"]
    positions, characters, nats, bits = zip(*(line.split("\t") for line in lines), strict=True)
    assert list(map(int, positions)) == list(range(1, len(lines) + 1))
    if name == "own":
        assert "".join(ast.literal_eval(f"'{character}'") for character in characters) == TEXT[SPLIT + 1 :]
    else:
        whole = (home / "bytes.txt").read_bytes()
        predicted = b"".join(ast.literal_eval(f"b'{character}'") for character in characters)
        assert predicted == whole[int(0.9 * len(whole)) + 1 :]
    nats, bits = (np.array(column, float) for column in (nats, bits))
    assert nats.mean() == pytest.approx(found["loss"], abs=1e-5)
    np.testing.assert_allclose(bits, nats / math.log(2), atol=2e-6)


def test_byte_and_character_models_report_their_own_units(home, results):
    found = figures(results("bytes"))
    whole = (home / "bytes.txt").read_bytes()
    predicted = whole[int(0.9 * len(whole)) + 1 :]
    assert found["n_bytes"] == len(predicted) > found["n_characters"] == len(predicted.decode(errors="ignore"))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert found["bpc"] * found["n_characters"] == pytest.approx(found["bits_per_byte"] * found["n_bytes"])
    assert f"bits/byte {found['bits_per_byte']:.4f} | BPC {found['bpc']:.4f}" in results("bytes").stdout


@pytest.mark.slow
def test_sixty_haiku_get_a_whole_schedule(home, results):
    assert "57 haiku to train on, 3 held back, 100 steps (112 epochs, warm-up 10 steps)" in results("haiku").stdout
    records = [json.loads(line) for line in (home / "haiku" / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    assert max(rates) > 0.9 * 3e-4 and rates[-1] < 0.1 * 3e-4


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "evaluated"), [("haiku", "own_haiku"), ("extended", "own_extended")])
def test_a_fine_tuned_model_is_evaluated_as_its_training_ended(results, trained, evaluated):
    [figure] = re.findall(r"validation: loss (\S+)", results(trained).stdout)
    assert figures(results(evaluated))["loss"] == pytest.approx(float(figure), abs=1e-3)


@pytest.mark.slow
def test_a_vocabulary_is_extended_by_both_texts(home, results):
    assert "all of held_out.txt" in results("own_extended").stdout
    old, new = (json.loads((home / name / "vocab.json").read_text())["vocabulary"] for name in ("text", "extended"))
    assert new == old | {"ï": len(old), "ö": len(old) + 1}
    assert figures(results("own_extended"))["n_unknown"] == 0
    record = json.loads((home / "extended" / "config.json").read_text())["settings"]
    assert record["format"] == "text" and record["data"]["block_size"] == 32  # as in pretraining


@pytest.mark.slow
def test_a_folder_of_images_is_learned_evaluated_and_completed(home, results):
    assert "18 images to train on, 2 for validation" in results("photos").stdout
    found = figures(results("own_photos"))
    assert found["n_dims"] == 2 * 4 * 4 * 3 and found["split"] == "valid"
    assert f"bits/dim {found['bits_per_dim']:.3f}" in results("photos").stdout
    assert results("completed").stdout.startswith("2 images")  # all that there are for validation
    assert (home / "completed.png").read_bytes().startswith(b"\x89PNG")


BAD_INPUT = [
    (
        ("evaluate", "--load_model_path=gone"),
        "the training text cannot be read; give a text as --data_path (gone.txt",
    ),
    (("evaluate", "--load_model_path=strange"), "no record of its training text"),
    (("evaluate", "--load_model_path=text", "--data_path=chinese.txt"), "160 of 160 characters (100 %)"),
    (("evaluate", "--load_model_path=text", "--protocol=sliding", "--step=5000"), "step=5000"),
    (("evaluate", "--load_model_path=text", "--split=test"), "'test' is empty"),
    (("finetune", "--load_model_path=text", "--data_path=chinese.txt", "--format=text"), "--extend_vocabulary"),
    (("finetune", "--load_model_path=flat", "--data_path=haiku.txt"), "has no newline"),
    (("finetune", "--load_model_path=text", "--data_path=haiku.txt", "--epochs=0"), "epochs=0"),
    (("finetune", "--load_model_path=text", "--data_path=text.txt", "--valid_path=no.txt", "--format=text"), "no.txt"),
    (
        ("finetune", "--load_model_path=text", "--data_path=text.txt", "--valid_path=./text.txt", "--format=text"),
        "every",
    ),
    (
        ("finetune", "--load_model_path=text", "--data_path=haiku.txt", "--valid_path=./haiku.txt"),
        "all training haiku",
    ),
    (("pretrain", "--data_path=text.txt,text.txt", "--valid_path=moved.txt"), "text.txt,text.txt: every training file"),
    (("pretrain", "--vocab_path=text/vocab.json", "--data_path=chinese.txt", "--block_size=16"), "--allow_unknown"),
    (("pretrain", "--vocab_path=other.json", "--init_from=text", "--data_path=text.txt"), "for another vocabulary"),
    (("pretrain", "--valid_path=chinese.txt", "--data_path=text.txt", "--block_size=16"), "chinese.txt: 160 of 160"),
    (("pretrain", "--valid_path=chinese.txt", "--data.split=enwik8"), "valid_path"),
    (("pretrain", "--data.dataset=folder", "--data_path=empty"), "empty"),
]


@pytest.mark.parametrize(("command", "words"), BAD_INPUT)
def test_invalid_data_options_raise_one_line_errors(home, tmp_path, command, words):
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "empty").mkdir()
    script, *flags = command
    result = run_forked(script, *flags, "--out=new" if script != "evaluate" else "--batch_size=4", cwd=tmp_path)
    assert result.returncode == 2 and not (tmp_path / "new").exists()
    [line] = result.stderr.splitlines()
    assert line.startswith(f"{script}.py: error: ") and words in line, line


@pytest.mark.parametrize("change", ["shortened", "overwritten", "replaced"])
def test_a_text_changed_in_place_ends_training_with_its_last_step_saved(tmp_path, change):
    """A text that is replaced by rename changes nothing."""
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode() * 50)
    os.utime(path, (0, 0))
    data = hg.DataConfig(path=str(path), tokenizer="byte", block_size=16, batch_size=4)
    tokens = load_tokens(data)[0]
    read = training_batches(tokens, data, seed=0)

    def batch_at(step, rows=slice(None)):
        if step == 7 and change == "shortened":
            os.truncate(path, 1000)
        if step == 7 and change == "overwritten":
            with path.open("r+b") as file:
                file.write(b"other")
        if step == 7 and change == "replaced":
            (tmp_path / "new").write_bytes(b"other")
            os.replace(tmp_path / "new", path)
        return read(step, rows)

    def train():
        return fit(
            make_model(small_config(vocab_size=258, **METHODS)),
            batch_at,
            consecutive_windows(np.array(tokens[:200]), 16, 4),
            tmp_path / "run",
            optimizer_config=hg.OptimizerConfig(warmup_steps=1),
            train_config=hg.TrainConfig(steps=10, eval_interval=5),
            runtime_config=hg.RuntimeConfig(log="none"),
        )

    if change == "replaced":
        train()
        return
    with pytest.raises(FileChanged, match=r"text: was changed in place .*; step \d is saved in .*run$") as error:
        train()
    store = Run(tmp_path / "run").checkpoints()
    step = store.sound_step()
    # Batches are read ahead by two threads: one may still be at an earlier step.
    assert step <= 7 and f"step {step} is saved" in str(error.value)
    store.close()


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_run_finds_its_own_text_without_the_validation_file(tmp_path, caplog, tokenizer):
    texts = {"books/a.txt": TEXT, "books/held.txt": TEXT[::-1], "books/c.txt": TEXT[:100]}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    valid_path = str(tmp_path / "books" / "held.txt")
    write_model(tmp_path / "run", str(tmp_path / "books"), tokenizer=tokenizer, valid_path=valid_path)
    for split, text in (("train", f"{TEXT}\n{TEXT[:100]}"), ("valid", TEXT[::-1])):
        part = recorded_text(tmp_path / "run", "", split)
        assert len(part.tokens) == len(text) and part.text == (text if tokenizer == "char" else "")
    assert not any("has changed" in line for line in caplog.messages)


def test_a_run_goes_on_with_the_haiku_for_validation_that_it_began_with(tmp_path):
    train, tokenizer = ["an old fox\njumps\nagain"], hg.ByteTokenizer()
    settings = [
        HaikuSource(train, valid, tokenizer, form="haiku", batch_size=1).fingerprint | {"valid_path": f"{i}.txt"}
        for i, valid in enumerate((["a dog\nsleeps\non"], ["a dog\nsleeps\non"], ["a dog\nwakes\nup"]))
    ]
    for given in settings[:2]:  # wherever they lie
        Run(tmp_path).start(small_config(vocab_size=258), tokenizer, given)
    with pytest.raises(hg.UsageError, match="valid_fingerprint"):
        Run(tmp_path).start(small_config(vocab_size=258), tokenizer, settings[2])


@pytest.mark.parametrize("n_unknown", [0, 1, 9, 10, 11, 50])
def test_a_tenth_of_unknown_characters_is_the_limit(n_unknown):
    tokenizer = hg.CharTokenizer("ab")
    text = "x" * n_unknown + "ab" * 45 + "a" * (10 - n_unknown)
    assert check_characters(text, tokenizer, "it", allow_unknown=True) == n_unknown
    if n_unknown <= 10:
        assert check_characters(text, tokenizer, "it") == n_unknown
    else:
        with pytest.raises(hg.UsageError, match=rf"it: {n_unknown} of {len(text)} .* 'x' {n_unknown} times"):
            check_characters(text, tokenizer, "it")


def test_cleaned_texts_are_counted_as_they_are_cleaned():
    tokenizer = hg.CharTokenizer("ab", clean=True)
    assert check_characters("ÁB日本語" * 3 + "c", tokenizer, "it", allow_unknown=True) == 1
    assert check_characters("日本語", hg.ByteTokenizer(), "it") == 0
