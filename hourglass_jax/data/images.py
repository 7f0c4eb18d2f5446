"""Image data sets, or a folder of images, as uint8 [N, H, W, C] with C = 1 or 3; batches of pixels.

A row is BOS, then the pixels in raster order; a pixel is red, green, blue, or one gray value. With shorten factor 3
each group of a color image is one pixel, since the shift by k - 1 leaves only BOS in the first group.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from hourglass_jax.data.files import files_of_kind, unique_files
from hourglass_jax.data.overlap import without_copies
from hourglass_jax.data.pipeline import Batch, BatchAt, LazyBatches, Rows, shuffled_order
from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_choice
from hourglass_jax.run_config import IMAGE_SIZES, check_image_size
from hourglass_jax.tokenizers import ImageTokenizer

CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: label and image
# Names that a pickled array refers to. Any other name could run code.
ARRAY_PARTS = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # names in Pillow
# Pillow's modes of 8 bits per channel.
GRAY_MODES, COLOR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
MAX_PIXELS = 256 * 256  # without image_size: longer sequences are rarely intended


class ImageSplits(NamedTuple):
    """Images uint8 [N, H, W, C], in the order of their files."""

    train: np.ndarray
    valid: np.ndarray


class Layout(NamedTuple):
    """File layout of a data set: its usual folder, patterns of file names, and a function that reads one file."""

    folder: str
    train: str
    valid: str
    read: Callable[[Path], np.ndarray]


def load_images(path: str | Path, dataset: str, image_size: int = 0) -> ImageSplits:
    """Read cifar10 (binary or Python version), imagenet32 or imagenet64 (npz batches).

    path: the directory of the unpacked files, or its parent.
    image_size: side in pixels after averaging; must divide the stored side. 0: as stored.

    The validation split is the test batch of CIFAR-10, or val_data. Raises UsageError for missing or damaged files.
    """
    check_choice("dataset", dataset, IMAGE_SIZES)
    size = IMAGE_SIZES[dataset]
    check_image_size(dataset, image_size)
    *files, read = find_files(Path(os.path.expanduser(path)), dataset)

    def parts(paths: list[Path]) -> Iterator[np.ndarray]:
        for file in paths:
            yield box_average(channel_last(read(file), size, file), image_size or size)

    return ImageSplits(*(stack(parts(paths)) for paths in files))


def find_files(path: Path, dataset: str) -> tuple[list[Path], list[Path], Callable[[Path], np.ndarray]]:
    """Return training files, validation files, and a function that reads one of them."""
    for layout in LAYOUTS[dataset]:
        for directory in (path, path / layout.folder):
            # Shorter names first: batch 10 comes after batch 9.
            train, valid = (
                sorted(directory.glob(pattern), key=lambda file: (len(file.name), file.name))
                for pattern in (layout.train, layout.valid)
            )
            if train and valid:
                check_numbering(train)
                return train, valid, layout.read
    expected = ", or ".join(f"{layout.train} and {layout.valid}" for layout in LAYOUTS[dataset])
    problem = f"the directory has no {dataset} images" if path.is_dir() else "no such directory"
    raise UsageError(f"{path}: {problem}; give the directory with the unpacked files {expected}")


def check_numbering(files: list[Path]) -> None:
    """Raise UsageError if a batch number is missing."""
    names = [file.stem.rpartition("_")[2] for file in files]
    numbers = {int(name) for name in names if name.isdecimal()}
    for number in range(min(numbers, default=0), max(numbers, default=0)):
        if number not in numbers:
            raise UsageError(f"{files[0].parent}: training batch {number} is missing; unpack the archive again")


def read_binary(path: Path) -> np.ndarray:
    """Read the images of a file of the binary version of CIFAR-10: uint8 [N, 3072]."""
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % CIFAR_RECORD:
        raise UsageError(
            f"{path}: {len(raw):,} bytes, not a multiple of {CIFAR_RECORD} (one record); unpack the archive again"
        )
    return raw.reshape(-1, CIFAR_RECORD)[:, 1:]


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler for NumPy arrays and Python literals only, so that a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name in NumPy 1
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")
        return super().find_class(module, name)


def read_pickle(path: Path) -> np.ndarray:
    """Read a file of the Python version of CIFAR-10: a pickled dictionary with the images under b"data"."""
    with explain_errors(path, "a CIFAR-10 batch"), path.open("rb") as file:
        return ArrayUnpickler(file, encoding="bytes").load()[b"data"]


def read_npz(path: Path) -> np.ndarray:
    """Read a file of downsampled ImageNet: npz with the images under "data"."""
    with explain_errors(path, "an npz file"), np.load(path, allow_pickle=False) as arrays:
        return arrays["data"]


@contextmanager
def explain_errors(path: Path, kind: str) -> Iterator[None]:
    """Convert exceptions to UsageError; damaged files raise many types."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{path}: not {kind}, or damaged ({reason}); download or unpack it again") from error


_CIFAR10 = (
    Layout("cifar-10-batches-bin", "data_batch_*.bin", "test_batch.bin", read_binary),
    Layout("cifar-10-batches-py", "data_batch_[0-9]", "test_batch", read_pickle),
)
LAYOUTS = {"cifar10": _CIFAR10} | {
    name: (Layout(name, "train_data_batch_*.npz", "val_data.npz", read_npz),) for name in ("imagenet32", "imagenet64")
}


def channel_last(data: Any, size: int, path: Path) -> np.ndarray:
    """Convert color planes uint8 [N, 3 * size * size] to [N, size, size, 3], which is also accepted."""
    shape, dtype = getattr(data, "shape", ()), getattr(data, "dtype", type(data).__name__)
    if dtype == np.uint8 and np.size(data):
        if shape[1:] == (size, size, 3):
            return data
        if shape[1:] == (3 * size * size,):
            return data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    raise UsageError(
        f"{path}: the images are {dtype} {list(shape)}, not uint8 [N, {3 * size * size}] or [N, {size}, {size}, 3]; "
        f"give the data set of {size}x{size} images"
    )


def box_average(images: np.ndarray, size: int) -> np.ndarray:
    """Average square blocks of pixels: uint8 [N, H, H, 3] -> uint8 [N, size, size, 3]; halves are rounded up."""
    side = images.shape[1] // size
    if side == 1:
        return images
    total = images.reshape(-1, size, side, size, side, 3).sum((2, 4), np.uint32)
    return ((total + side * side // 2) // (side * side)).astype(np.uint8)


def stack(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate arrays in place, so that memory never contains a large data set twice."""
    parts = iter(parts)
    images = np.array(next(parts), order="C")
    for part in parts:
        n_before = len(images)
        images.resize((n_before + len(part), *images.shape[1:]), refcheck=False)
        images[n_before:] = part
    return images


def load_folder(
    path: str | Path, image_size: int = 0, train_fraction: float = 0.9, background: int = 255
) -> ImageSplits:
    """Read the images in a folder and its subfolders: [N, H, W, 1] if all are gray, otherwise [N, H, W, 3].

    Supports FORMATS, and reads the first frame of animations. Copies of validation images are excluded from training.

    image_size: side in pixels, to which the central square of each image is resized. 0: as stored; requires images of
        equal size.
    train_fraction: share of training images; each split has at least one. A hash of its relative path decides the split
        of an image, so that splits mix classes and barely change when images are added.
    background: gray level behind transparent pixels, 0 to 255.

    Raises UsageError for fewer than two images, damaged images and different sizes.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; give a directory of image files ({', '.join(FORMATS)})")
    files = unique_files(files_of_kind(folder, image_suffixes()))
    if len(files) < 2:
        raise UsageError(
            f"{folder}: {len(files)} image files ({', '.join(FORMATS)}); training and validation require one each"
        )
    hashed = sorted(files, key=lambda file: name_hash(file.relative_to(folder)))
    n_train = min(max(int(len(files) * train_fraction), 1), len(files) - 1)
    train, valid = sorted(hashed[:n_train]), sorted(hashed[n_train:])
    train = without_copies(train, valid, folder)
    images, row = read_images(files, image_size, background), {file: i for i, file in enumerate(files)}
    return ImageSplits(*(images[[row[file] for file in part]] for part in (train, valid)))


def image_suffixes() -> set[str]:
    """Return the file name suffixes of FORMATS, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def name_hash(name: Path) -> bytes:
    return hashlib.sha256(name.as_posix().encode("utf-8", "surrogateescape")).digest()


def read_images(files: list[Path], image_size: int, background: int) -> np.ndarray:
    """Read files to uint8 [N, H, W, C]."""
    sizes, gray = zip(*map(inspect, files), strict=True)
    for file, size in zip(files, sizes, strict=True):
        if not image_size and size != sizes[0]:
            raise UsageError(
                f"{file}: is {size[0]}x{size[1]}, but {files[0].name} is {sizes[0][0]}x{sizes[0][1]}; "
                "set image_size to resize all images"
            )
    width, height = (image_size, image_size) if image_size else sizes[0]
    channels = 1 if all(gray) else 3
    if not image_size and width * height > MAX_PIXELS:
        raise UsageError(
            f"{files[0].parent}: an image of {width}x{height} is a sequence of {width * height * channels:,} tokens; "
            "set image_size to a smaller side"
        )
    images = np.empty((len(files), height, width, channels), np.uint8)
    for i, file in enumerate(files):
        with explain_errors(file, "an image"), Image.open(file) as opened:
            image = opaque(ImageOps.exif_transpose(opened), background).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
            images[i] = np.asarray(image).reshape(images.shape[1:])
    return images


def opaque(image: Image.Image, background: int) -> Image.Image:
    """Composite an image that has transparency on a gray background."""
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))


def inspect(file: Path) -> tuple[tuple[int, int], bool]:
    """Return (width, height) as displayed, and whether the image is gray, from the header of the file."""
    with explain_errors(file, "an image"), Image.open(file) as image:
        mode = image.mode
        rotated = image.getexif().get(0x0112, 1) >= 5  # orientations that swap width and height
        size = image.size[::-1] if rotated else image.size
    if mode not in GRAY_MODES + COLOR_MODES:
        raise UsageError(f"{file}: Pillow's mode {mode!r} is not supported; give images of 8 bits per channel")
    return size, mode in GRAY_MODES


def image_batches(images: np.ndarray, batch_size: int, seed: int) -> BatchAt:
    """Return batches of images, reshuffled each epoch."""
    order = shuffled_order(len(images), seed)

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        return image_rows(images[order(step * batch_size + np.arange(batch_size)[rows])])

    return batch_at


def image_validation(images: np.ndarray, batch_size: int) -> LazyBatches:
    """Return all images once, in order; the last batch may be smaller."""
    steps = range(-(-len(images) // batch_size))
    return LazyBatches(lambda step: image_rows(images[step * batch_size : (step + 1) * batch_size]), steps)


def image_rows(images: np.ndarray) -> Batch:
    """Convert uint8 [B, H, W, C] to tokens int32 [B, H*W*C + 1], BOS first, and weights [B, H*W*C] of 1."""
    pixels = images.reshape(len(images), -1)
    tokens = np.pad(pixels.astype(np.int32), [(0, 0), (1, 0)], constant_values=ImageTokenizer.bos_id)
    return tokens, np.ones(pixels.shape, np.float32)
