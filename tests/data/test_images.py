"""Laws of images: reading, averaging, batches, tokens."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    interleaved,
    planes,
    write_binary,
    write_channel_last,
    write_npz,
    write_python2,
    write_python3,
)

from hourglass_jax import DataConfig, ImageTokenizer, UsageError
from hourglass_jax.data.images import image_batches, image_validation, load_images

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
    with pytest.raises(UsageError, match="is not part of an array"):
        load_images(tmp_path / "images", "cifar10")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("attribute", [b"os\nsystem", b"numpy\nload", b"numpy._core.multiarray\nfromfile"])
def test_a_pickle_gets_nothing_but_arrays(tmp_path, attribute):
    write_python2(tmp_path / "images", planes(3, 32), planes(1, 32))
    (tmp_path / "images" / "data_batch_1").write_bytes(b"c" + attribute + b"\n.")
    with pytest.raises(UsageError, match="is not part of an array"):
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
    assert str(path) in str(error.value) and "again" in str(error.value) and "\n" not in str(error.value)


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
    assert "3072]" in str(error.value) or "is not part of an array" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("write", "dataset"), [(write_binary, "cifar10"), (write_python3, "cifar10"), (write_npz, "imagenet32")]
)
def test_a_batch_missing_between_others_is_named(tmp_path, write, dataset):
    write(tmp_path / "images", planes(3, 32), planes(1, 32))
    *_, last = sorted((tmp_path / "images").glob("*data_batch_*"), key=lambda file: (len(file.name), file.name))
    number = last.stem.rpartition("_")[2]
    last.rename(last.with_name(last.name.replace(f"_{number}", f"_{int(number) + 1}")))
    with pytest.raises(UsageError, match=rf"training batch {number} is missing"):
        load_images(tmp_path / "images", dataset)


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(UsageError, match=r"no such directory.*data_batch"):
        load_images(tmp_path / "nowhere", "cifar10")
    write_binary(tmp_path / "images", planes(3, 32), planes(1, 32))
    (tmp_path / "images" / "test_batch.bin").unlink()
    with pytest.raises(UsageError, match=r"no cifar10 images.*test_batch\.bin"):
        load_images(tmp_path / "images", "cifar10")
    with pytest.raises(UsageError, match=r"no imagenet32 images.*val_data\.npz"):
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


def test_image_tokens_round_trip():
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
def test_invalid_image_tokens_raise_errors(refused):
    with pytest.raises(UsageError):
        refused()
