"""The launchers as a user meets them: subprocesses, files, exit codes, one-line errors."""

import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import EXPERIMENTS, README, ROOT, run, run_forked

WORDS = "the quick brown fox jumps over a lazy dog while five wizards mix jugs of quartz pink vow"
TINY = ["--hierarchy=0@1 1@2 1@1", "--shortening=average", "--upsampling=repeat"]
TINY += ["--d_model=32", "--n_heads=2", "--d_ff=64", "--block_size=32", "--model.ngram_buckets=64"]
TINY += ["--batch_size=4", "--steps=30", "--train.eval_interval=15", "--optimizer.warmup_steps=5"]


def succeed(script, *flags, cwd, launch=run_forked):
    result = launch(script, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def contents(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def sentences(n_characters):
    rng, text = random.Random(0), ""
    while len(text) < n_characters:
        sentence = " ".join(rng.choices(WORDS.split(), k=rng.randint(4, 12)))
        text += sentence.capitalize() + rng.choice([". ", "? ", '!" ', ", it's said.\n"])
    return text


def printed_command(stdout):
    """The script and flags of the 'next:' line, as a shell reads them."""
    [line] = [line for line in stdout.splitlines() if line.startswith("next: ")]
    python, script, *flags = shlex.split(line.removeprefix("next: "))
    assert python == "python" and Path(script).parent.name == "experiments"
    return Path(script).stem, flags


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A directory with a text, haiku, a tiny model pretrained on the text and two fine-tuned from it."""
    home = tmp_path_factory.mktemp("launchers")
    (home / "text.txt").write_text(sentences(20_000))
    rng = random.Random(1)
    poems = ["\n".join(" ".join(rng.choices(WORDS.split(), k=4)) for _ in range(3)) for _ in range(40)]
    poems.append('"it\'s late," says the fox\nfive wizards mix\nquartz jugs')
    (home / "haiku.txt").write_text("\n\n".join(poems) + "\n")
    pretrained = succeed("pretrain", *TINY, "--data_path=text.txt", cwd=home, launch=run)
    (home / "pretrained.log").write_text(pretrained.stdout)
    with ThreadPoolExecutor(2) as pool:
        for form, result in {form: pool.submit(finetune, home, form) for form in ("haiku", "prompt")}.items():
            (home / f"{form}.log").write_text(result.result().stdout)
    return home


def finetune(home, form):
    flags = ["--data_path=haiku.txt", "--epochs=1", f"--format={form}", f"--out=runs/{form}"]
    return succeed("finetune", *flags, cwd=home)


@pytest.mark.parametrize("name", ["pretrain", "haiku", "prompt"])
def test_a_run_writes_its_outputs(home, name):
    out = home / "runs" / name
    assert json.loads((out / "config.json").read_text())["model"]["hierarchy"] == "0@1 1@2 1@1"
    assert "<EOS>" in json.loads((out / "vocab.json").read_text())["vocabulary"]
    assert any((out / "checkpoints").iterdir())
    assert any((out / "tensorboard").iterdir())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for curve in ("train_loss", "valid_loss"):
        values = [record[curve] for record in records if curve in record]
        assert values and all(map(math.isfinite, values))


@pytest.mark.slow
def test_more_epochs_make_a_run_longer(home, tmp_path):
    """Though that many alone would have another warm-up, and evaluations further apart."""
    shutil.copytree(home / "runs/prompt", tmp_path / "longer")
    prompts = ["--data_path=haiku.txt", "--format=prompt"]
    succeed("finetune", *prompts, "--epochs=20", f"--out={tmp_path}/longer", cwd=home)
    record = json.loads((tmp_path / "longer/config.json").read_text())
    train = record["settings"]["train"]
    assert (train["steps"], train["eval_interval"], record["history"][0]["steps"]) == (20, 1, [1, 20])


@pytest.mark.parametrize(("log", "script"), [("pretrained", "finetune"), ("haiku", "generate"), ("prompt", "generate")])
def test_a_run_prints_figures_a_sample_and_the_next_command(home, log, script):
    stdout = (home / f"{log}.log").read_text()
    for word in ("loss", "perplexity", "BPC", "sample"):
        assert word in stdout
    assert f"next: python experiments/{script}.py --load_model_path=runs/" in stdout


@pytest.mark.parametrize("form", ["haiku", "prompt"])
def test_the_printed_next_command_runs(home, form):
    script, flags = printed_command((home / f"{form}.log").read_text())
    stdout = succeed(script, *flags, "--max_tokens=8", cwd=home).stdout
    assert form == "haiku" or stdout.startswith('"it\'s late," says the fox\n')


def test_samples_are_a_function_of_the_seed(home):
    def sample(seed):
        flags = ["--load_model_path=runs/haiku", "--num_samples=2", "--max_tokens=40", f"--seed={seed}"]
        return succeed("generate", *flags, cwd=home).stdout

    with ThreadPoolExecutor(2) as pool:
        first, again, other = pool.map(sample, [1, 1, 2])
    assert first == again != other
    one, two = first.split("-" * 20 + "\n")
    assert one != two


def test_greedy_text_goes_on_from_the_prompt_whatever_the_seed(home):
    def sample(seed):
        flags = ["--load_model_path=runs/pretrain", "--gen_mode=prompt", "--prompt=The fox", "--temperature=0"]
        return succeed("generate", *flags, "--max_tokens=20", f"--seed={seed}", cwd=home).stdout

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(sample, [0, 1])
    assert first == other and first.startswith("The fox")
    assert len("The fox") < len(first.removesuffix("\n")) <= len("The fox") + 20


def test_unknown_characters_of_a_prompt_give_one_warning(home):
    flags = ["--load_model_path=runs/pretrain", "--gen_mode=prompt", "--prompt=日 fox 日", "--max_tokens=8"]
    [warning] = succeed("generate", *flags, cwd=home).stderr.splitlines()
    assert warning.count("日") == 1


def test_evaluation_ends_with_its_figures_as_json(home):
    result = succeed("evaluate", "--data_path=text.txt", "--split=valid", "--report=valid", cwd=home)
    figures = json.loads(result.stdout.splitlines()[-1])
    record = json.loads((home / "valid.json").read_text())
    assert figures.items() <= record.items() and record["summary"] in (home / "valid.md").read_text()
    assert "--report=valid" in record["command"]
    assert math.isclose(figures["bpc"], figures["loss"] / math.log(2), rel_tol=1e-6)
    assert math.isclose(figures["perplexity"], math.exp(figures["loss"]), rel_tol=1e-6)
    n_tokens = len((home / "text.txt").read_text())
    assert figures["n_characters"] == n_tokens - int(0.9 * n_tokens) - 1
    assert 1 < figures["bpc"] < 7


def test_sliding_windows_give_more_context_to_as_many_characters(home):
    sliding = ["--protocol=sliding", "--window=64", "--step=8"]
    flags = ["--data_path=text.txt", "--split=valid"]
    with ThreadPoolExecutor(2) as pool:
        both = ["--block_size=8"], sliding
        results = pool.map(lambda protocol: succeed("evaluate", *flags, *protocol, cwd=home), both)
    consecutive, overlapping = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    assert overlapping["n_characters"] == consecutive["n_characters"]
    assert overlapping["loss"] < consecutive["loss"]


@pytest.mark.parametrize(
    "script, flag", [("generate", "--max_tokens=8"), ("evaluate", "--split=valid"), ("generate", "--help")]
)
def test_a_closed_pipe_is_no_error(home, script, flag):
    result = run_forked(script, "--load_model_path=runs/pretrain", flag, cwd=home, closed_pipe=True)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_run_whose_output_is_closed_trains_to_its_end_and_prints_that_it_is_saved(home, tmp_path):
    shutil.copy(home / "text.txt", tmp_path)
    flags = [*TINY, "--data_path=text.txt", "--sample_interval=10"]
    result = run_forked("pretrain", *flags, cwd=tmp_path, closed_pipe=True)
    assert result.returncode == 141
    assert "pretrain.py: the output was closed; the run is saved in runs/pretrain\n" in result.stderr
    assert "Error" not in result.stderr and (tmp_path / "runs/pretrain/checkpoints/30/MANIFEST.json").exists()


def test_the_wheel_holds_the_library_alone_and_a_checkout_the_launchers_too(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hourglass_jax", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    build = "from setuptools import build_meta as b; b.build_wheel('wheel'); b.build_editable('editable')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    [wheel], [editable] = (list((tmp_path / kind).glob("*.whl")) for kind in ("wheel", "editable"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hourglass_jax"}
    assert {"hourglass_jax/py.typed", "hourglass_jax/data/haiku.txt"} <= set(names)
    [finder] = [name for name in zipfile.ZipFile(editable).namelist() if name.endswith("finder.py")]
    assert str(tmp_path / "experiments") in zipfile.ZipFile(editable).read(finder).decode()


def copy_of_run(home, directory):
    """`directory` with the text and a copy of the pretrained run."""
    shutil.copy(home / "text.txt", directory)
    shutil.copytree(home / "runs" / "pretrain", directory / "runs" / "pretrain")
    return directory / "runs" / "pretrain"


def test_the_same_command_again_keeps_a_finished_run_wherever_its_files_lie_now(home, tmp_path):
    out = copy_of_run(home, tmp_path)
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    before = (out / "metrics.jsonl").read_text()
    flags = ["--data_path=~/moved.txt", "--out=~/runs/pretrain/"]
    result = run_forked("pretrain", *TINY, *flags, cwd=home, HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    stdout = result.stdout
    assert (out / "metrics.jsonl").read_text() == before
    [figures, again] = [
        log.split("validation: ")[1].split(" (")[0] for log in ((home / "pretrained.log").read_text(), stdout)
    ]
    assert figures == again


DOCUMENTED = README + (EXPERIMENTS / "pretrain.py").read_text()
PRETRAININGS = re.findall(r"^python experiments/pretrain.py (.*--data_path=book.txt.*)$", DOCUMENTED, re.M)


@pytest.mark.parametrize("flags", PRETRAININGS)
def test_the_pretraining_of_a_book_as_documented_is_a_model(tmp_path, flags):
    assert len(PRETRAININGS) == 2
    (tmp_path / "book.txt").write_text("an old pond " * 400)
    result = run_forked("pretrain", *shlex.split(flags), "--accumulate=3", cwd=tmp_path)  # refused after the model
    assert result.returncode == 2 and "accumulate=3" in result.stderr, result.stderr


@pytest.mark.slow
def test_overwrite_replaces_a_run_of_another_configuration(home, tmp_path):
    out = copy_of_run(home, tmp_path)
    succeed("pretrain", *TINY, "--data_path=text.txt", "--steps=2", "--overwrite", cwd=tmp_path)
    assert json.loads((out / "config.json").read_text())["settings"]["train"]["steps"] == 2
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [2, 2]


@pytest.mark.slow
def test_a_run_starts_from_the_parameters_and_vocabulary_of_another(home, tmp_path):
    (tmp_path / "other.txt").write_text("the lazy dog jumps. " * 200)
    flags = [f"--init_from={home / 'runs' / 'pretrain'}", "--data_path=other.txt", "--block_size=32", "--steps=1"]
    succeed("pretrain", *flags, "--dropout=0.1", "--learning_rate=1e-30", "--optimizer.warmup_steps=0", cwd=tmp_path)
    begun, base = (json.loads((at / "runs/pretrain/config.json").read_text()) for at in (tmp_path, home))
    assert begun["model"] == base["model"] | {"dropout": 0.1}
    assert begun["settings"]["init_from"]["settings"] == base["settings"]
    assert (tmp_path / "runs/pretrain/vocab.json").read_text() == (home / "runs/pretrain/vocab.json").read_text()
    [first] = [json.loads(line) for line in (tmp_path / "runs/pretrain/metrics.jsonl").open() if "train_loss" in line]
    assert first["train_loss"] < 3.4  # 3.32; a new one would be at 3.6


@pytest.mark.slow
def test_options_of_the_original_project_mean_what_they_meant_there(home, tmp_path):
    flags = ["--factors=1,1,1,2", "--n_embedding=32", "--n_heads=2", "--d_ff=64", "--dropout=0.1", "--batch_size=4"]
    flags += ["--block_size=24", "--epochs=2", "--iter=2", "--eval_iter=1", "--learning_rate=0.002"]
    flags += ["--betas=0.8,0.9", "--eps=1e-7", "--train_val_split=0.8", f"--data_path={home / 'text.txt'}"]
    succeed("pretrain", *flags, "--model_save_path=out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    given = {
        "model": {"hierarchy": "1@1 1@2 1@1", "d_model": 32, "n_heads": 2, "d_ff": 64, "dropout": 0.1},
        "data": {"batch_size": 4, "block_size": 24, "train_fraction": 0.8},
        "train": {"steps": 4, "eval_interval": 2, "eval_batches": 1},
        "optimizer": {"learning_rate": 0.002, "beta1": 0.8, "beta2": 0.9, "eps": 1e-7},
    }
    for part, options in given.items():
        assert options.items() <= record["settings"][part].items(), part


@pytest.mark.slow
def test_max_length_bounds_learned_positions_only(home, tmp_path):
    flags = ["--steps=2", "--model.max_length=16", "--positions=relative", f"--data_path={home / 'text.txt'}"]
    assert "sample: " in succeed("pretrain", *TINY, *flags, cwd=tmp_path).stdout


def test_a_text_with_unknown_characters_raises_an_error(home, tmp_path):
    out = copy_of_run(home, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("z", "Z"))  # as many characters, another vocabulary
    before = contents(out)
    result = run_forked("pretrain", *TINY, "--data_path=text.txt", cwd=tmp_path)
    assert result.returncode != 0 and contents(out) == before


PRETRAIN = [
    ("not_down", ["--hierarchy=1@1 1@2"], "must return to factor 1"),
    ("not_mirrored", ["--hierarchy=1@1 1@2 1@4 1@1"], "up and come down"),
    ("not_dividing", ["--hierarchy=1@1 1@2 1@3 1@2 1@1"], "2 does not divide the next factor 3"),
    ("no_layers", ["--hierarchy=0@1 0@2 0@1"], "at least one layer"),
    ("unreadable_hierarchy", ["--hierarchy=1@1\n1@x"], "layers@factor"),
    ("shortening", ["--shortening=mean"], "attention_average"),
    ("upsampling", ["--upsampling=copy"], "attention_linear"),
    ("positions", ["--positions=sine"], "rotary"),
    ("n_heads", ["--n_heads=3"], "n_heads=3 does not divide d_model=32"),
    ("missing_file", ["--data_path=nowhere.txt"], "nowhere.txt"),
    ("empty_file", ["--data_path=empty.txt"], "no text"),
    ("short_text", ["--data_path=short.txt"], "block_size=32"),
    ("invalid_utf8", ["--data_path=latin.txt"], "byte 9 (line 2"),
    ("missing_vocabulary", ["--vocab_path=nowhere.json"], "nowhere.json"),
    ("dropout", ["--dropout=1.5"], "dropout"),
    ("learning_rate", ["--learning_rate=-1"], "learning_rate"),
    ("batch_size", ["--batch_size=0"], "batch_size"),
    ("batch_size_word", ["--batch_size=foo"], "batch_size"),
    ("nested_word", ["--train.steps=foo"], "steps"),
    ("nested_unknown", ["--model.nonsense=1"], "nonsense"),
    ("unknown_flag", ["--nonsense=1"], "nonsense"),
    ("stray_argument", ["text.txt"], "text.txt"),
    ("odd_factors", ["--factors=3,1,8"], "pairs"),
    ("factor_words", ["--factors=a,b"], "factors"),
    ("one_beta", ["--betas=0.9"], "betas"),
    ("epochs_alone", ["--epochs=2"], "--iter"),
    ("epochs_and_steps", ["--epochs=2", "--iter=3"], "--epochs and --iter and --train.eval_interval both set"),
    ("two_hierarchies", ["--factors=2,1,1,2"], "--hierarchy and --factors give different values of model.hierarchy"),
    ("two_widths", ["--model.d_model=64"], "--model.d_model and --d_model give different values"),
    (
        "factors_of_linear",
        ["--shorten_factors=2,3", "--upsampling=linear"],
        "parameters that depend on the shorten factor",
    ),
    ("trains_nothing", ["--optimizer.train_only=hed"], "hed"),
    ("short_positions", ["--positions=learned", "--model.max_length=16"], "max_length"),
    ("other_sizes", ["--init_from=run", "--out=new", "--d_model=64"], "do not fit"),
    ("default_sizes", ["--init_from=run", "--out=new", "--hierarchy=1@1 3@3 1@1"], "do not fit"),
    ("other_tokens", ["--init_from=run", "--out=new", "--data.tokenizer=byte"], "the vocabulary's tokenizer is char"),
    ("other_cleaning", ["--init_from=run", "--out=new", "--data.clean=true"], "the vocabulary's clean is False"),
    ("one_checkpoint", ["--keep_checkpoints=1", "--out=new"], "keep_checkpoints=1"),
    ("seed", ["--seed=9223372036854775808"], "seed"),
    ("foreign_out", ["--out=foreign", "--overwrite"], "not a run"),
    ("never_again", ["--out=run", "--resume=never"], "--overwrite"),
    ("another_configuration", ["--out=run", "--learning_rate=0.5"], "learning_rate"),
    ("another_split", ["--out=run", "--valid_path=short.txt", "--steps=99"], "first_batch_fingerprint"),
    ("no_fraction", ["--data.train_fraction=nan"], "train_fraction=nan is out of range"),
]
OTHERS = [
    ("generate", ["--load_model_path=run", "--temperature=-1"], "temperature"),
    ("generate", ["--load_model_path=run", "--top_p=2"], "top_p"),
    ("generate", ["--load_model_path=run", "--max_tokens=0"], "max_tokens"),
    ("generate", ["--load_model_path=run", "--max_tokens=3000000000"], "max_tokens"),
    ("generate", ["--load_model_path=run", "--raw_out=nowhere/new"], "the directory nowhere does not exist"),
    ("generate", ["--load_model_path=run", "--gen_mode=prompt"], "--prompt"),
    ("generate", ["--load_model_path=run", "--seed=9223372036854775808"], "seed"),
    ("finetune", ["--load_model_path=run", "--seed=9223372036854775808"], "seed"),
    ("finetune", ["--load_model_path=run", "--data_path=short.txt"], "three lines"),
    ("finetune", ["--load_model_path=run", "--data_path=text.txt", "--format=sonnet"], "format"),
    ("finetune", ["--load_model_path=run", "--data_path=text.txt", "--format=text", "--block_size=0"], "block_size=0"),
    ("evaluate", ["--load_model_path=run", "--data_path=nowhere.txt"], "nowhere.txt"),
    ("evaluate", ["--load_model_path=run", "--split=half"], "split"),
    ("evaluate", ["--load_model_path=run", "--data_path=text.txt", "--protocol=sliding", "--step=5000"], "step"),
] + [
    (script, [f"--load_model_path={directory}"], words)
    for script in ("generate", "finetune", "evaluate")
    for directory, words in [("nowhere", "nowhere"), ("foreign", "config.json"), ("mismatched", "vocab")]
]
CASES = [pytest.param("pretrain", [*TINY, "--data_path=text.txt", *flags], words, id=i) for i, flags, words in PRETRAIN]
CASES += [pytest.param(*case, id=f"{case[0]}-{case[1][-1]!s}".replace("\n", " ")) for case in OTHERS]


@pytest.fixture
def bad_input(home, tmp_path):
    """A directory with texts, a run, and files that are not what they seem."""
    shutil.copy(home / "text.txt", tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short\nto train on\n")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo c\xe9 three\n" * 100)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("not a run")
    for name in ("run", "mismatched"):
        shutil.copytree(home / "runs" / "pretrain", tmp_path / name)
    record = json.loads((tmp_path / "mismatched" / "vocab.json").read_text())
    record["vocabulary"]["日"] = len(record["vocabulary"])
    (tmp_path / "mismatched" / "vocab.json").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.parametrize(("script", "flags", "words"), CASES)
def test_invalid_options_raise_one_line_errors_and_change_nothing(bad_input, script, flags, words):
    before = contents(bad_input)
    result, after = run_forked(script, *flags, cwd=bad_input), contents(bad_input)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{script}.py: error: ") and words in lines[0]
    assert after == before


def test_the_picture_of_a_hierarchy(tmp_path):
    assert run_forked("figures/hourglass", "--text=an old pond", cwd=tmp_path).returncode == 0
    assert (tmp_path / "hourglass.png").read_bytes().startswith(b"\x89PNG")
    nested = run_forked("figures/hourglass", "--hierarchy=1@1 1@2 1@4 1@2 1@1", "--out=nested.png", cwd=tmp_path)
    assert nested.returncode == 2 and "one shortening" in nested.stderr
    assert not (tmp_path / "nested.png").exists()
