"""A folder of one's own images: what is read, how it is cut to one size, which are for validation."""

import numpy as np
import pytest
from PIL import Image

from hourglass_jax import DataConfig, UsageError
from hourglass_jax.data.folder import load_folder

RNG = np.random.default_rng(0)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def by_content(*parts):
    return sorted(image.tobytes() for part in parts for image in part)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_pixel_for_pixel(tmp_path, channels):
    images = [noise(5, 4, *[3] * (channels == 3)) for _ in range(7)]
    for i, image in enumerate(images):
        save(tmp_path / f"{'cats' if i % 2 else 'dogs'}" / f"{i}.PNG", image, format="PNG")
    (tmp_path / "dogs" / "notes.txt").write_text("no image")
    (tmp_path / "dogs" / "._0.png").write_text("what macOS leaves")
    train, valid = load_folder(tmp_path, train_fraction=0.6)
    assert (len(train), len(valid)) == (4, 3)
    assert train.shape[1:] == valid.shape[1:] == (5, 4, channels) and train.dtype == np.uint8
    assert by_content(train, valid) == by_content(images)


def test_gray_among_coloured_is_coloured(tmp_path):
    gray, colour = noise(4, 4), noise(4, 4, 3)
    save(tmp_path / "gray.png", gray)
    save(tmp_path / "colour.png", colour)
    assert by_content(*load_folder(tmp_path)) == by_content([gray[..., None].repeat(3, -1), colour])


def test_what_is_shown_is_read(tmp_path):
    """An orientation in the file's metadata, a palette, transparency, and JPEG."""
    turned = np.zeros((8, 16, 3), np.uint8)
    turned[:, :8] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save(tmp_path / "turned.jpg", turned, exif=exif, quality=95)
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8] = 200
    Image.fromarray(upright).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(upright).convert("RGBA").save(tmp_path / "alpha.png")
    for images in load_folder(tmp_path):
        for image in images:
            np.testing.assert_allclose(image.astype(int), upright, atol=3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_middle_square_is_averaged(tmp_path, size):
    wide, high = noise(8, 12, 3), noise(16, 8, 3)
    save(tmp_path / "wide.png", wide)
    save(tmp_path / "high.png", high)
    side = 8 // size
    squares = [wide[:, 2:10], high[4:12]]
    means = [square.reshape(size, side, size, side, 3).mean((1, 3)) for square in squares]
    found = np.concatenate(load_folder(tmp_path, size))
    matched = [min(np.abs(image - mean).max() for mean in means) for image in found.astype(float)]
    assert found.shape == (2, size, size, 3) and max(matched) <= 1  # Pillow rounds after each direction


def test_which_images_are_for_validation_is_a_function_of_their_names(tmp_path):
    for i in range(50):
        save(tmp_path / f"{'a' if i < 25 else 'b'}{i:02}.png", np.full((2, 2), i, np.uint8))
    values = [part[:, 0, 0, 0].tolist() for part in load_folder(tmp_path, train_fraction=0.8)]
    assert list(map(len, values)) == [40, 10] and sorted(values[0] + values[1]) == list(range(50))
    assert values == [sorted(part) for part in values]
    assert {value < 25 for value in values[1]} == {True, False}  # of both classes
    assert values == [part[:, 0, 0, 0].tolist() for part in load_folder(str(tmp_path), train_fraction=0.8)]
    save(tmp_path / "c.png", np.full((2, 2), 50, np.uint8))
    later = set(load_folder(tmp_path, train_fraction=0.8).valid[:, 0, 0, 0].tolist())
    assert len(later - set(values[1]) - {50}) <= 1


def test_what_is_hidden_or_below_it_is_no_image(tmp_path):
    for i, name in enumerate(("a.png", "sub/b.png", ".c.png", ".hidden/d.png", "sub/.hidden/e.png")):
        save(tmp_path / name, np.full((2, 2), i, np.uint8))
    assert sorted(image[0, 0, 0] for part in load_folder(tmp_path) for image in part) == [0, 1]


@pytest.mark.parametrize("seen_as", ["all", "v/../all", "linked"])
def test_a_link_adds_no_image_and_moves_none(tmp_path, seen_as):
    (tmp_path / "v").mkdir()
    (tmp_path / "linked").symlink_to("all")
    for i in range(20):
        save(tmp_path / f"all/v1/{i}.png", np.full((2, 2), i, np.uint8))
    before = load_folder(tmp_path / seen_as)
    (tmp_path / "all/latest").symlink_to("v1")
    for i in range(20):
        (tmp_path / f"all/v1/{i} again.png").symlink_to(f"{i}.png")
    for part, part_before in zip(load_folder(tmp_path / seen_as), before, strict=True):
        np.testing.assert_array_equal(part, part_before)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_parts_have_an_image(tmp_path, fraction):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(2, 2))
    assert sorted(map(len, load_folder(tmp_path, train_fraction=fraction))) == [1, 2]


def write_damaged(path):
    save(path, noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "1 PNG or JPEG files"),
        (lambda path: path.write_text("no image"), "b.png: cannot be read as an image"),
        (lambda path: save(path, noise(64, 63, 3)), "b.png: is 63x64, but a.png is 64x64; give the side"),
        (lambda path: save(path, noise(64, 64).astype(np.uint16)), "8 bits a channel"),
        (write_damaged, "b.png: cannot be read as an image"),
    ],
)
def test_images_that_cannot_be_read_are_told(tmp_path, write, words):
    save(tmp_path / "a.png", noise(64, 64, 3))
    write(tmp_path / "b.png")
    with pytest.raises(UsageError) as error:
        load_folder(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_photographs_need_a_size(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.png", np.zeros((300, 400, 3), np.uint8))
    with pytest.raises(UsageError, match="sequence of 360,000 tokens"):
        load_folder(tmp_path)
    assert load_folder(tmp_path, 16).train.shape == (1, 16, 16, 3)


def test_a_folder_takes_any_size():
    assert DataConfig(dataset="folder", image_size=17).image_size == 17
    with pytest.raises(UsageError, match="image_size=-1"):
        DataConfig(dataset="folder", image_size=-1)
    with pytest.raises(UsageError, match="no such directory"):
        load_folder("nowhere")
