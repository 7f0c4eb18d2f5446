"""Laws of images: reading, averaging, batches, tokens, completions; and the launchers on them."""

import json
import math
import pickle
import random
import shlex
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_model, small_config
from flax import nnx
from launching import ENVIRONMENT, run, run_forked
from PIL import Image

from experiments.pictures import draw_images, save_grid, top_halves
from hourglass_jax import CharTokenizer, DataConfig, ImageTokenizer, UsageError, load
from hourglass_jax.data.images import image_batches, image_validation, load_images
from hourglass_jax.training.checkpoints import CheckpointStore, read_run, write_run

TINY = ["--hierarchy=0@1 1@3 1@1", "--d_model=16", "--n_heads=2", "--d_ff=32", "--batch_size=4", "--steps=4"]
TINY += ["--sample_interval=2", "--shortening=linear", "--upsampling=linear", "--out=run"]


def planes(n_images, size, seed=0):
    """Images as the data sets store them: n rows of bytes, all of red, then green, then blue."""
    rng = random.Random(seed)
    return [rng.randbytes(3 * size * size) for _ in range(n_images)]


def interleaved(images, size):
    """What reading them must give, one byte after another."""
    n_pixels = size * size
    return [[image[c * n_pixels + p] for p in range(n_pixels) for c in range(3)] for image in images]


def short(content):
    """The pickle opcode of Python 2's str, by which the official files hold bytes."""
    return b"U" + bytes([len(content)]) + content


def python2_pickle(images, module=b"numpy.core.multiarray"):
    """A batch of CIFAR-10's Python version as its authors wrote it: protocol 2, by hand."""
    data = b"".join(images)
    array = b"c" + module + b"\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    state = b"(K\x01" + b"K" + bytes([len(images)]) + b"M\x00\x0c\x86" + dtype + b"\x89"
    state += b"T" + len(data).to_bytes(4, "little") + data + b"tb"
    labels = short(b"labels") + b"](" + b"K\x07" * len(images) + b"e"
    return b"\x80\x02}(" + labels + short(b"data") + array + state + b"u."


def write_binary(directory, train, valid):
    directory.mkdir(parents=True)
    for name, images in {"data_batch_1": train[:2], "data_batch_2": train[2:], "test_batch": valid}.items():
        (directory / f"{name}.bin").write_bytes(b"".join(b"\x07" + image for image in images))


def write_python2(directory, train, valid):
    directory.mkdir(parents=True)
    for name, images in {"data_batch_1": train[:2], "data_batch_2": train[2:], "test_batch": valid}.items():
        (directory / name).write_bytes(python2_pickle(images))


def write_python3(directory, train, valid):
    directory.mkdir(parents=True)
    for name, images in {"data_batch_1": train[:2], "data_batch_2": train[2:], "test_batch": valid}.items():
        data = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), -1).copy()
        (directory / name).write_bytes(pickle.dumps({b"labels": [7] * len(images), b"data": data}, protocol=4))


def write_npz(directory, train, valid, shape=(-1,)):
    """Batches 9 and 10: the order of the numbers is not that of the names."""
    directory.mkdir(parents=True)
    for name, images in {"train_data_batch_9": train[:2], "train_data_batch_10": train[2:], "val_data": valid}.items():
        data = np.frombuffer(b"".join(images), np.uint8).reshape(len(images), *shape)
        np.savez(directory / f"{name}.npz", data=data, labels=np.arange(len(images)), mean=np.zeros(3))


def write_channel_last(directory, train, valid):
    """The same pixels, in the order in which they are read."""
    size = round((len(train[0]) / 3) ** 0.5)
    write_npz(directory, *(list(map(bytes, interleaved(part, size))) for part in (train, valid)), (size, size, 3))


LAYOUTS = [
    pytest.param(write_binary, "cifar10", 32, "cifar-10-batches-bin", id="binary"),
    pytest.param(write_python2, "cifar10", 32, "cifar-10-batches-py", id="python2"),
    pytest.param(write_python3, "cifar10", 32, "cifar-10-batches-py", id="python3"),
    pytest.param(write_npz, "imagenet32", 32, "imagenet32", id="imagenet32"),
    pytest.param(write_npz, "imagenet64", 64, "imagenet64", id="imagenet64"),
    pytest.param(write_channel_last, "imagenet32", 32, "imagenet32", id="channel_last"),
]


@pytest.mark.parametrize(("write", "dataset", "size", "folder"), LAYOUTS)
def test_every_layout_gives_the_same_pixels(tmp_path, write, dataset, size, folder):
    train, valid = planes(5, size), planes(2, size, seed=1)
    write(tmp_path / folder, train, valid)
    for path in (tmp_path, tmp_path / folder):
        splits = load_images(path, dataset)
        for images, stored in zip(splits, (train, valid), strict=True):
            assert images.dtype == np.uint8 and images.shape == (len(stored), size, size, 3)
            assert images.flags.c_contiguous and images.reshape(len(stored), -1).tolist() == interleaved(stored, size)


def test_a_known_pixel_lands_at_its_row_column_and_channel(tmp_path):
    image = bytearray(3072)
    image[1024 + 5 * 32 + 7] = 200  # green, row 5, column 7
    write_binary(tmp_path / "images", [bytes(3072), bytes(image)] * 2, [bytes(3072)])
    train, valid = load_images(str(tmp_path / "images"), "cifar10")
    assert np.argwhere(train).tolist() == [[1, 5, 7, 1], [3, 5, 7, 1]] and train.max() == 200 and not valid.any()


@pytest.mark.parametrize("size", [1, 8, 16, 32])
def test_smaller_images_are_means_of_squares(tmp_path, size):
    write_binary(tmp_path / "images", planes(3, 32), planes(1, 32, seed=1))
    stored, averaged = (load_images(tmp_path / "images", "cifar10", n) for n in (0, size))
    side = 32 // size
    for images, small in zip(stored, averaged, strict=True):
        assert small.dtype == np.uint8 and small.shape == (len(images), size, size, 3)
        for i, y, x, c in np.ndindex(small.shape):
            mean = images[i, y * side : (y + 1) * side, x * side : (x + 1) * side, c].mean()
            assert small[i, y, x, c] == np.floor(mean + 0.5)


def test_white_stays_white(tmp_path):
    write_npz(tmp_path / "images", [b"\xff" * 3 * 64 * 64] * 3, [b"\xff" * 3 * 64 * 64])
    assert (load_images(tmp_path / "images", "imagenet64", 1).train == 255).all()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, protocol):
    write_python2(tmp_path / "images", planes(3, 32), planes(1, 32))
    content = pickle.dumps({b"data": Bomb(tmp_path / "exploded")}, protocol)
    (tmp_path / "images" / "data_batch_2").write_bytes(content)
    with pytest.raises(UsageError, match="no array needs"):
        load_images(tmp_path / "images", "cifar10")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("attribute", [b"os\nsystem", b"numpy\nload", b"numpy._core.multiarray\nfromfile"])
def test_a_pickle_gets_nothing_but_arrays(tmp_path, attribute):
    write_python2(tmp_path / "images", planes(3, 32), planes(1, 32))
    (tmp_path / "images" / "data_batch_1").write_bytes(b"c" + attribute + b"\n.")
    with pytest.raises(UsageError, match="no array needs"):
        load_images(tmp_path / "images", "cifar10")


DAMAGES = {
    "cut": lambda content: content[:-1],
    "cut_short": lambda content: content[:100],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("write", "file"), [(write_binary, "test_batch.bin"), (write_python2, "test_batch"), (write_npz, "val_data.npz")]
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, write, file, damage):
    write(tmp_path / "images", planes(3, 32), planes(1, 32))
    path = tmp_path / "images" / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UsageError) as error:
        load_images(tmp_path / "images", "imagenet32" if write is write_npz else "cifar10")
    assert str(path) in str(error.value) and "anew" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((2, 3072), np.float32),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((2, 12288), np.uint8),
        np.zeros((0, 3072), np.uint8),
        np.zeros(3072, np.uint8),
        np.uint8(0),
        "text",
        None,
    ],
)
@pytest.mark.parametrize("dataset", ["cifar10", "imagenet32"])
def test_other_than_images_of_the_right_shape_are_refused(tmp_path, dataset, data):
    write = write_npz if dataset == "imagenet32" else write_python3
    write(tmp_path / "images", planes(3, 32), planes(1, 32))
    if dataset == "imagenet32":
        np.savez(tmp_path / "images" / "val_data.npz", data="" if data is None else data)
    else:
        (tmp_path / "images" / "test_batch").write_bytes(pickle.dumps({b"data": data}, protocol=3))
    with pytest.raises(UsageError) as error:
        load_images(tmp_path / "images", dataset)
    assert "3072]" in str(error.value) or "no array needs" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(UsageError, match=r"no such directory.*data_batch"):
        load_images(tmp_path / "nowhere", "cifar10")
    write_binary(tmp_path / "images", planes(3, 32), planes(1, 32))
    (tmp_path / "images" / "test_batch.bin").unlink()
    with pytest.raises(UsageError, match=r"holds no cifar10 images.*test_batch\.bin"):
        load_images(tmp_path / "images", "cifar10")
    with pytest.raises(UsageError, match=r"holds no imagenet32 images.*val_data\.npz"):
        load_images(tmp_path / "images", "imagenet32")


@pytest.mark.parametrize("size", [-1, 5, 33, 64])
def test_sizes_that_do_not_divide_are_refused(tmp_path, size):
    for refused in (
        lambda: load_images(tmp_path, "cifar10", size),
        lambda: DataConfig(dataset="cifar10", image_size=size),
    ):
        with pytest.raises(UsageError, match=f"image_size={size}"):
            refused()


def test_the_configuration_takes_the_length_of_its_images():
    assert DataConfig(dataset="cifar10", block_size=5).block_size == 3072
    assert DataConfig(dataset="imagenet64").block_size == 12288
    assert DataConfig(dataset="imagenet64", image_size=8).block_size == 192
    assert DataConfig(block_size=5).block_size == 5
    with pytest.raises(UsageError, match="dataset"):
        DataConfig(image_size=8)
    with pytest.raises(UsageError, match="imagenet64"):
        DataConfig(dataset="mnist")


def numbered(n_images, size=2):
    """Images told apart by their first pixel."""
    images = np.random.default_rng(0).integers(0, 256, (n_images, size, size, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(n_images)
    return images


def test_a_row_is_bos_and_the_pixels():
    images = numbered(10)
    tokens, weights = image_batches(images, 4, seed=0)(0)
    assert tokens.dtype == np.int32 and tokens.shape == (4, 13) and (tokens[:, 0] == 256).all()
    assert weights.dtype == np.float32 and weights.shape == (4, 12) and (weights == 1).all()
    assert (tokens[:, 1:] == images[tokens[:, 1]].reshape(4, -1)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_holds_each_image_once(seed):
    batch_at = image_batches(numbered(12), 5, seed)
    seen = np.concatenate([batch_at(step)[0][:, 1] for step in range(12)])  # five epochs
    epochs = seen.reshape(5, 12)
    assert (np.sort(epochs) == np.arange(12)).all() and len({tuple(epoch) for epoch in epochs}) == 5


def test_batches_are_functions_of_seed_and_step_and_rows_of_them():
    images = numbered(12)
    batch_at, again, other = (image_batches(images, 5, seed) for seed in (0, 0, 1))
    for step in (7, 0, 3):
        tokens, weights = again(step)
        assert (batch_at(step)[0] == tokens).all()
        for rows in (slice(1, 3), np.array([4, 0])):
            part = batch_at(step, rows)
            assert (part[0] == tokens[rows]).all() and (part[1] == weights[rows]).all()
    assert any((batch_at(step)[0] != other(step)[0]).any() for step in range(3))


@pytest.mark.parametrize("batch_size", [1, 5, 12, 20])
def test_validation_reads_every_image_once_in_order(batch_size):
    images = numbered(12)
    batches = image_validation(images, batch_size)
    tokens = np.concatenate([tokens for tokens, _ in batches])
    assert tokens[:, 1].tolist() == list(range(12)) and sum(weights.sum() for _, weights in batches) == images.size


def test_tokens_of_images_come_back():
    tokenizer = ImageTokenizer((2, 4, 3))
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3), np.uint8)
    for batch in (images, images[0], images[None]):
        tokens = tokenizer.encode(batch)
        assert tokens.dtype == np.int32 and tokens.shape == (*batch.shape[:-3], 24)
        assert (tokenizer.decode(tokens) == batch).all() and tokenizer.decode(tokens).dtype == np.uint8
    assert tokenizer.encode(images[0]).tolist() == images[0].ravel().tolist()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (257, 256, None, None)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: ImageTokenizer((2, 2)),
        lambda: ImageTokenizer((2, 0, 3)),
        lambda: ImageTokenizer((2, 2, 3)).encode(np.zeros((2, 3, 2), np.uint8)),
        lambda: ImageTokenizer((2, 2, 3)).encode(np.zeros((2, 2, 3))),
        lambda: ImageTokenizer((2, 2, 3)).decode(np.zeros(11, int)),
        lambda: ImageTokenizer((2, 2, 3)).decode(np.full(12, 256)),
    ],
)
def test_what_is_no_image_is_refused(refused):
    with pytest.raises(UsageError):
        refused()


def small_source(directory):
    """Few images of CIFAR-10's form in `directory`; a flag makes them 8x8."""
    write_binary(directory, planes(8, 32), planes(3, 32, seed=1))
    return ["--data.dataset=cifar10", f"--data_path={directory.name}", "--data.image_size=8"]


def succeed(script, *flags, cwd):
    result = run(script, *flags, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with images, a tiny model trained on them, and what the launchers printed, as script.log."""
    home = tmp_path_factory.mktemp("images")
    ENVIRONMENT["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
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


def test_completions_keep_the_top_half_and_learned_positions_suffice(quick_compile):
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
    ("pretrain", ["--data_path=cut"], "3073-byte records"),
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
    ("evaluate", ["--load_model_path=run", "--split=test"], "split"),
    ("evaluate", ["--load_model_path=run", "--block_size=5"], "block_size"),
    ("evaluate", ["--load_model_path=run", "--data_path=cut"], "3073-byte records"),
]


@pytest.fixture(scope="module")
def bad_inputs(home):
    """`home` with damaged and other images and a run of a text model without training; the results, two at a time."""
    (home / "empty").mkdir()
    write_binary(home / "cut", planes(3, 32), [bytes(3000)])
    write_binary(home / "other", planes(8, 32, seed=2), planes(3, 32, seed=1))
    tokenizer = CharTokenizer("ab")
    config = small_config(vocab_size=tokenizer.vocab_size)
    write_run(home / "text", config, tokenizer, {})
    model = make_model(config)
    store = CheckpointStore(home / "text", for_training=True)
    store.save(1, nnx.split(model)[1], {"count": np.zeros(1)})
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
def test_bad_input_gets_one_line(bad_inputs, script, flags, words):
    result = bad_inputs[script, *flags].result()
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: ") and words in lines[0], result.stderr


def test_an_old_run_directory_still_loads(tmp_path):
    tokenizer = CharTokenizer("ab")
    write_run(tmp_path, small_config(vocab_size=tokenizer.vocab_size), tokenizer, {"data": {"tokenizer": "char"}})
    record = json.loads((tmp_path / "config.json").read_text())
    assert "image_shape" not in record and record["format_version"] == 1
    assert read_run(tmp_path)[1].characters == ["a", "b"]


def test_a_recorded_shape_must_fit(tmp_path):
    write_run(tmp_path, small_config(vocab_size=257), ImageTokenizer((2, 4, 3)), {})
    assert read_run(tmp_path)[1].shape == (2, 4, 3)
    record = json.loads((tmp_path / "config.json").read_text())
    for shape in ([2, 4], None, "243"):
        (tmp_path / "config.json").write_text(json.dumps(record | {"image_shape": shape}))
        with pytest.raises(UsageError):
            read_run(tmp_path)
