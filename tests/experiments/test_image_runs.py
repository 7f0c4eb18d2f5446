"""Models of images: the launchers, pictures, run directories."""

import json
import math
import shlex
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx
from launching import run_forked
from layouts import planes, write_binary
from PIL import Image

from experiments.common.pictures import draw_images, save_grid, top_halves
from hourglass_jax import CharTokenizer, ImageTokenizer, UsageError, load
from hourglass_jax.data.images import load_images
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.run import Record, Run

TINY = ["--hierarchy=0@1 1@3 1@1", "--d_model=16", "--n_heads=2", "--d_ff=32", "--batch_size=4", "--steps=4"]
TINY += ["--sample_interval=2", "--shortening=linear", "--upsampling=linear", "--model.ngram_buckets=64", "--out=run"]


def small_source(directory):
    """Few images of CIFAR-10's form in `directory`; a flag makes them 8x8."""
    write_binary(directory, planes(8, 32), planes(3, 32, seed=1))
    return ["--data.dataset=cifar10", f"--data_path={directory.name}", "--data.image_size=8"]


def succeed(script, *flags, cwd):
    result = run_forked(script, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with images, a tiny model trained on them, and what the launchers printed, as script.log."""
    home = tmp_path_factory.mktemp("images")
    stdout = succeed("pretrain", *small_source(home / "small"), *TINY, cwd=home)
    (home / "pretrain.log").write_text(stdout)
    [line] = [line for line in stdout.splitlines() if line.startswith("next: ")]
    _, script, *flags = shlex.split(line.removeprefix("next: "))
    commands = {Path(script).stem: [*flags, "--out=completed.png"], "evaluate": ["--load_model_path=run"]}
    with ThreadPoolExecutor(2) as pool:
        for script, result in {s: pool.submit(succeed, s, *flags, cwd=home) for s, flags in commands.items()}.items():
            (home / f"{script}.log").write_text(result.result())
    return home


def grid(path, n_columns):
    """The images of a grid, uint8 [rows, columns, 64, 64, 3]."""
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        pixels = np.asarray(picture)
    n_rows = (len(pixels) - 2) // 66
    assert pixels.shape == (66 * n_rows + 2, 66 * n_columns + 2, 3)
    tiles = pixels[2:, 2:].reshape(n_rows, 66, n_columns, 66, 3).swapaxes(1, 2)
    assert (tiles[:, :, 64:] == 255).all() and (tiles[:, :, :, 64:] == 255).all()
    return tiles[:, :, :64, :64]


def test_pretraining_on_images_reports_bits_per_dim_and_draws(home):
    stdout = (home / "pretrain.log").read_text()
    assert "bits/dim" in stdout and "BPC" not in stdout and "8 images to train on, 3 for validation" in stdout
    records = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "sample" in records[0] and [record["valid_bpc"] for record in records if "valid_bpc" in record]
    originals, completed, new = grid(home / "run" / "samples.png", 3)
    images = load_images(home / "small", "cifar10", 8).valid
    assert (originals == images.repeat(8, 1).repeat(8, 2)).all()
    assert (completed[:, :32] == originals[:, :32]).all() and (completed[:, 32:] != originals[:, 32:]).any()
    assert (new[:, :32] != originals[:, :32]).any()


def test_a_run_of_images_loads_with_their_shape(home):
    model, tokenizer, config = load(home / "run")
    assert isinstance(tokenizer, ImageTokenizer) and tokenizer.shape == (8, 8, 3)
    assert config.vocab_size == model.config.vocab_size == 257


def test_evaluation_of_images_is_in_bits_per_dim(home):
    words, figures = (home / "evaluate.log").read_text().splitlines()
    figures = json.loads(figures)
    assert math.isclose(figures["bits_per_dim"], figures["loss"] / math.log(2), rel_tol=1e-6)
    assert figures["n_dims"] == 3 * 192 and words.endswith("3 images")
    figure = f"bits/dim {figures['bits_per_dim']:.4f}"
    assert figure in words and figure in (home / "pretrain.log").read_text()


def test_the_printed_next_command_completes_images(home):
    originals, completed = grid(home / "completed.png", 3)
    assert (completed[:, :32] == originals[:, :32]).all() and (completed[:, 32:] != originals[:, 32:]).any()
    assert (home / "generate.log").read_text() == "3 images, each below its original -> completed.png\n"


def test_a_grid_has_rows_of_eight_from_each_group_in_turn(tmp_path):
    first = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    second = 255 - first
    save_grid(tmp_path / "grid", first, second)
    tiles = grid(tmp_path / "grid", 8)[:, :, ::4, ::4]
    assert (tiles[:2] == [first[:8], second[:8]]).all() and (tiles[2:, 0] == [first[8], second[8]]).all()
    assert (tiles[2:, 1:] == 255).all()


def test_completions_keep_the_top_half_and_learned_positions_suffice():
    tokenizer = ImageTokenizer((3, 2, 3))
    model = make_model(small_config(vocab_size=257, positions="learned", max_length=tokenizer.n_tokens + 1))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 2, 3), np.uint8)
    images[1:] = images[0]
    completed = draw_images(model, tokenizer, top_halves(tokenizer, images), jax.random.key(0))
    assert completed.dtype == np.uint8 and completed.shape == images.shape
    assert (completed[:, :1] == images[:, :1]).all() and len({image.tobytes() for image in completed}) == 3


BAD_INPUT = [
    ("pretrain", ["--data_path=nowhere"], "nowhere"),
    ("pretrain", ["--data_path=empty"], "data_batch_*.bin"),
    ("pretrain", ["--data_path=cut"], "a multiple of 3073"),
    ("pretrain", ["--data_path=small", "--data.image_size=5"], "image_size=5"),
    ("pretrain", ["--data_path=small", "--data.dataset=imagenet32"], "val_data.npz"),
    ("pretrain", ["--data_path=small", "--data.dataset=mnist"], "mnist"),
    ("pretrain", ["--data_path=small", "--data.dataset=text"], "image_size=8"),
    ("pretrain", ["--data_path=small", "--vocab_path=vocab.json"], "--vocab_path"),
    ("pretrain", ["--data_path=small", "--positions=learned", "--model.max_length=192"], "max_length"),
    ("pretrain", ["--data_path=other"], "image_fingerprints"),
    ("finetune", ["--load_model_path=run"], "model of images"),
    ("generate", ["--load_model_path=run", "--gen_mode=prompt", "--prompt=a"], "model of images"),
    ("generate", ["--load_model_path=run", "--max_tokens=5"], "model of images"),
    ("generate", ["--load_model_path=run", "--gen_mode=complete", "--data_path=nowhere"], "nowhere"),
    ("generate", ["--load_model_path=text", "--gen_mode=complete"], "model of text"),
    ("generate", ["--load_model_path=text", "--out=new.png"], "model of text"),
    ("generate", ["--load_model_path=bare"], "bare: the run has no tokenizer"),
    ("pretrain", ["--init_from=bare", "--data_path=small"], "bare: the run has no tokenizer"),
    ("convert", ["--to=safetensors", "bare", "new"], "bare: the run has no tokenizer"),
    ("evaluate", ["--load_model_path=run", "--split=test"], "split"),
    ("evaluate", ["--load_model_path=run", "--block_size=5"], "block_size"),
    ("evaluate", ["--load_model_path=run", "--data_path=cut"], "a multiple of 3073"),
]


@pytest.fixture(scope="module")
def bad_inputs(home):
    """`home` with damaged and other images and two untrained runs, of text and of bare tokens; results, two at once."""
    (home / "empty").mkdir()
    write_binary(home / "cut", planes(3, 32), [bytes(3000)])
    write_binary(home / "other", planes(8, 32, seed=2), planes(3, 32, seed=1))
    tokenizer = CharTokenizer("ab")
    config = small_config(vocab_size=tokenizer.vocab_size)
    for name, its_tokenizer in (("text", tokenizer), ("bare", None)):
        Run(home / name).write(Record(config, its_tokenizer, {}, []))
        store = CheckpointStore(home / name, for_training=True)
        store.save(1, nnx.split(make_model(config))[1], {"count": np.zeros(1)})
        store.close()

    def launch(script, flags):
        source = ["--data.dataset=cifar10", "--data.image_size=8", *TINY] if script == "pretrain" else []
        with tempfile.TemporaryDirectory() as cwd:
            for path in home.iterdir():
                (Path(cwd) / path.name).symlink_to(path)
            return run_forked(script, *source, *flags, cwd=cwd)

    with ThreadPoolExecutor(2) as pool:
        yield {(script, *flags): pool.submit(launch, script, flags) for script, flags, _ in BAD_INPUT}


@pytest.mark.parametrize(("script", "flags", "words"), BAD_INPUT)
def test_invalid_image_options_raise_one_line_errors(bad_inputs, script, flags, words):
    result = bad_inputs[script, *flags].result()
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: ") and words in lines[0], result.stderr


def test_an_old_run_directory_still_loads(tmp_path):
    tokenizer = CharTokenizer("ab")
    config = small_config(vocab_size=tokenizer.vocab_size)
    Run(tmp_path).write(Record(config, tokenizer, {"data": {"tokenizer": "char"}}, []))
    record = json.loads((tmp_path / "config.json").read_text())
    assert "image_shape" not in record and record["format_version"] == 1
    assert Run(tmp_path).read().tokenizer.characters == ["a", "b"]


def test_a_recorded_shape_must_fit(tmp_path):
    Run(tmp_path).write(Record(small_config(vocab_size=257), ImageTokenizer((2, 4, 3)), {}, []))
    assert Run(tmp_path).read().tokenizer.shape == (2, 4, 3)
    record = json.loads((tmp_path / "config.json").read_text())
    for shape in ([2, 4], None, "243"):
        (tmp_path / "config.json").write_text(json.dumps(record | {"image_shape": shape}))
        with pytest.raises(UsageError):
            Run(tmp_path).read()
