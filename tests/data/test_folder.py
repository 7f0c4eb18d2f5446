"""A folder of one's own images: what is read, how it is cut to one size, which are for validation."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from hourglass_jax import DataConfig, UsageError
from hourglass_jax.data.images import load_folder
from hourglass_jax.training.identity import identity

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


def test_gray_images_among_color_images_become_rgb(tmp_path):
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


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".WebP", ".tif", ".TIFF", ".bmp", ".gif", ".ppm"])
def test_lossless_formats_come_back_pixel_for_pixel(tmp_path, suffix):
    """Suffixes in any case, whatever other images there are."""
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(3)]
    for i, image in enumerate(images):
        save(tmp_path / f"{i}{suffix if i else '.png'}", image, **{"lossless": True} if "w" in suffix.lower() else {})
    assert by_content(*load_folder(tmp_path)) == by_content(images)


def test_files_passed_over_are_counted_by_kind_in_one_line(tmp_path, caplog):
    for i in range(3):
        save(tmp_path / f"{i}.png", noise(2, 2))
        (tmp_path / f"{i}.psd").write_text("")
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    load_folder(tmp_path)
    kinds = "3 .psd, 1 no suffix, 1 no regular file"
    assert caplog.messages == [f"{tmp_path}: ignored 5 of 8 files ({kinds})"]


def hidden(alpha, color):
    """RGBA [8, 8]: red, and in the middle the color at `alpha`."""
    image = np.zeros((8, 8, 4), np.uint8)
    image[:] = 255, 0, 0, 255
    image[2:6, 3:7] = *color, alpha
    return image


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize(("background", "level"), [({}, 255), ({"background": 0}, 0), ({"background": 100}, 100)])
def test_colors_under_transparent_pixels_are_not_seen(tmp_path, background, level, size):
    """What looks alike is alike, resized too: nothing hidden bleeds into the edge."""
    for i, color in enumerate([(0, 0, 255), (0, 255, 0), (1, 2, 3)]):
        save(tmp_path / f"{i}.png", hidden(0, color))
    save(tmp_path / "3.webp", hidden(0, (9, 9, 9)), lossless=True, exact=True)
    palette = Image.fromarray(hidden(0, (0, 255, 255))[..., :3]).quantize(2)
    for suffix in ("png", "gif"):
        palette.save(tmp_path / f"palette.{suffix}", transparency=palette.getpixel((4, 4)))
    Image.fromarray(hidden(0, (7, 8, 9))[..., :3]).save(tmp_path / "key.png", transparency=(7, 8, 9))
    save(tmp_path / "opaque.png", hidden(255, (level,) * 3))
    images = np.concatenate(load_folder(tmp_path, size, **background))
    assert len(images) == 8 and (images == images[0]).all()
    if not size:
        np.testing.assert_array_equal(images[0], hidden(255, (level,) * 3)[..., :3])


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    save(tmp_path / "a.png", hidden(51, (0, 100, 0)))
    save(tmp_path / "b.png", hidden(255, (204, 224, 204)))
    a, b = (images[0] for images in load_folder(tmp_path))
    np.testing.assert_array_equal(a, b)


def test_gray_images_with_transparency_stay_gray(tmp_path):
    for i, level in enumerate((0, 100, 200)):
        pixels = np.full((4, 4, 2), (50, 255), np.uint8)
        pixels[1:3, 1:3] = level, 0
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "key.png", transparency=200)
    images = np.concatenate(load_folder(tmp_path))
    assert images.shape == (4, 4, 4, 1) and (images == images[0]).all()
    assert (images[0, 1:3, 1:3] == 255).all() and (images[0, 0] == 50).all()


def test_a_run_that_is_older_than_the_background_is_the_same_run():
    settings = dataclasses.asdict(DataConfig(dataset="folder"))
    older = {name: value for name, value in settings.items() if name != "background"}
    assert identity({"data": older}) == identity({"data": settings})
    assert identity({"data": older}) != identity({"data": settings | {"background": 0}})
    for level in (-1, 256):
        with pytest.raises(UsageError, match=f"background={level}"):
            DataConfig(dataset="folder", background=level)


def test_copies_of_validation_images_are_left_out_of_training(tmp_path, caplog):
    for i in range(40):
        save(tmp_path / f"{i}.png", np.full((2, 2), i, np.uint8))
        shutil.copy(tmp_path / f"{i}.png", tmp_path / f"copy of {i}.png")
    train, valid = (part[:, 0, 0, 0].tolist() for part in load_folder(tmp_path, train_fraction=0.5))
    assert len(valid) == 40 and 0 < len(train) < 40
    assert not set(train) & set(valid) and set(train) | set(valid) == set(range(40))
    [line] = caplog.messages
    assert line.startswith(f"{tmp_path}: {40 - len(train)} of 40 training files excluded")


@pytest.mark.parametrize("make", [shutil.copy, lambda old, new: new.hardlink_to(old)])
def test_one_image_twice_is_refused(tmp_path, make):
    save(tmp_path / "a.png", noise(2, 2))
    make(tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"every training file is a validation file or a copy|1 image files"):
        load_folder(tmp_path)


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
        (lambda path: None, "1 image files (PNG, JPEG, WEBP"),
        (lambda path: path.write_text("no image"), "b.png: not an image, or damaged"),
        (lambda path: save(path, noise(64, 63, 3)), "b.png: is 63x64, but a.png is 64x64; set image_size"),
        (lambda path: save(path, noise(64, 64).astype(np.uint16)), "8 bits per channel"),
        (write_damaged, "b.png: not an image, or damaged"),
    ],
)
def test_unreadable_images_are_reported(tmp_path, write, words):
    save(tmp_path / "a.png", noise(64, 64, 3))
    write(tmp_path / "b.png")
    with pytest.raises(UsageError) as error:
        load_folder(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_photographs_need_a_size(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.png", np.full((300, 400, 3), ord(name), np.uint8))
    with pytest.raises(UsageError, match="sequence of 360,000 tokens"):
        load_folder(tmp_path)
    assert load_folder(tmp_path, 16).train.shape == (1, 16, 16, 3)


def test_a_folder_takes_any_size():
    assert DataConfig(dataset="folder", image_size=17).image_size == 17
    with pytest.raises(UsageError, match="image_size=-1"):
        DataConfig(dataset="folder", image_size=-1)
    with pytest.raises(UsageError, match="no such directory"):
        load_folder("nowhere")
