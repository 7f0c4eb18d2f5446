"""Image data sets as uint8 [N, H, W, C], of 3 channels or 1, and the batches that training reads from them.

A row is BOS and then the pixels in raster order, each as red, green, blue, or gray. With shortening by 3 a group of
colours is exactly one pixel: the shift by k-1 leaves BOS alone in the first group.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hourglass_jax.data.pipeline import Batch, BatchAt, LazyBatches, Rows, shuffled_order
from hourglass_jax.errors import UsageError
from hourglass_jax.ranges import check_choice
from hourglass_jax.run_config import IMAGE_SIZES, check_image_size
from hourglass_jax.tokenizers import ImageTokenizer

CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label and an image
# All that a pickled array needs. Whatever else a pickle asks for could run code.
ARRAY_PARTS = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ImageSplits(NamedTuple):
    """Images uint8 [N, H, W, C] in the order of their files."""

    train: np.ndarray
    valid: np.ndarray


class Layout(NamedTuple):
    """How a data set lies on disk: its usual folder, patterns of file names, and what reads one file."""

    folder: str
    train: str
    valid: str
    read: Callable[[Path], np.ndarray]


def load_images(path: str | Path, dataset: str, image_size: int = 0) -> ImageSplits:
    """The images of cifar10 (binary or Python version), imagenet32 or imagenet64 (npz batches).

    path: the directory that holds the unpacked files, or the one that holds the data set's usual folder.
    image_size: averages square blocks of pixels down to images of this side, which must divide the stored one;
        0: as stored.

    The test batch, or val_data, is the validation split. Raises UsageError where files are missing or damaged.
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
    """Training files, validation files, and what reads one of them."""
    for layout in LAYOUTS[dataset]:
        for directory in (path, path / layout.folder):
            # The shorter name first, so that batch 10 comes after batch 9.
            train, valid = (
                sorted(directory.glob(pattern), key=lambda file: (len(file.name), file.name))
                for pattern in (layout.train, layout.valid)
            )
            if train and valid:
                check_numbering(train)
                return train, valid, layout.read
    expected = ", or ".join(f"{layout.train} and {layout.valid}" for layout in LAYOUTS[dataset])
    problem = f"holds no {dataset} images" if path.is_dir() else "no such directory"
    raise UsageError(f"{path}: {problem}; give the directory with the unpacked files {expected}")


def check_numbering(files: list[Path]) -> None:
    """Raises UsageError where a numbered batch between others is missing."""
    names = [file.stem.rpartition("_")[2] for file in files]
    numbers = {int(name) for name in names if name.isdecimal()}
    for number in range(min(numbers, default=0), max(numbers, default=0)):
        if number not in numbers:
            raise UsageError(f"{files[0].parent}: training batch {number} is missing; unpack the images anew")


def read_binary(path: Path) -> np.ndarray:
    """CIFAR-10's binary version: records of a label and an image -> uint8 [N, 3072]."""
    raw = np.fromfile(path, np.uint8)
    if not len(raw) or len(raw) % CIFAR_RECORD:
        raise UsageError(
            f"{path}: {len(raw):,} bytes are no whole number of {CIFAR_RECORD}-byte records; unpack the file anew"
        )
    return raw.reshape(-1, CIFAR_RECORD)[:, 1:]


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and Python's own plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # NumPy 1's name for it
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)


def read_pickle(path: Path) -> np.ndarray:
    """CIFAR-10's Python version: a pickled dictionary with the images under b"data"."""
    with explained(path, "a CIFAR-10 batch"), path.open("rb") as file:
        return ArrayUnpickler(file, encoding="bytes").load()[b"data"]


def read_npz(path: Path) -> np.ndarray:
    """A batch of downsampled ImageNet: an npz file with the images under "data"."""
    with explained(path, "an npz file"), np.load(path, allow_pickle=False) as arrays:
        return arrays["data"]


@contextmanager
def explained(path: Path, kind: str) -> Iterator[None]:
    """What goes wrong in a damaged pickle or archive comes as exceptions of many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{path}: cannot be read as {kind} ({reason}); unpack or download it anew") from error


_CIFAR10 = (
    Layout("cifar-10-batches-bin", "data_batch_*.bin", "test_batch.bin", read_binary),
    Layout("cifar-10-batches-py", "data_batch_[0-9]", "test_batch", read_pickle),
)
LAYOUTS = {"cifar10": _CIFAR10} | {
    name: (Layout(name, "train_data_batch_*.npz", "val_data.npz", read_npz),) for name in ("imagenet32", "imagenet64")
}


def channel_last(data: Any, size: int, path: Path) -> np.ndarray:
    """uint8 [N, 3 * size * size], one colour plane after another, or [N, size, size, 3] -> [N, size, size, 3]."""
    shape, dtype = getattr(data, "shape", ()), getattr(data, "dtype", type(data).__name__)
    if dtype == np.uint8 and np.size(data):
        if shape[1:] == (size, size, 3):
            return data
        if shape[1:] == (3 * size * size,):
            return data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    raise UsageError(
        f"{path}: the images are {dtype} {list(shape)}, but must be uint8 [N, {3 * size * size}] or "
        f"[N, {size}, {size}, 3]; give the data set of {size}x{size} images"
    )


def box_average(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, H, H, 3] -> uint8 [N, size, size, 3]: the mean of each square of pixels, rounded, halves up."""
    side = images.shape[1] // size
    if side == 1:
        return images
    total = images.reshape(-1, size, side, size, side, 3).sum((2, 4), np.uint32)
    return ((total + side * side // 2) // (side * side)).astype(np.uint8)


def stack(parts: Iterable[np.ndarray]) -> np.ndarray:
    """One array of all the parts, which grows in place: no second copy of a large data set is ever in memory."""
    parts = iter(parts)
    images = np.array(next(parts), order="C")
    for part in parts:
        n_before = len(images)
        images.resize((n_before + len(part), *images.shape[1:]), refcheck=False)
        images[n_before:] = part
    return images


def image_batches(images: np.ndarray, batch_size: int, seed: int) -> BatchAt:
    """Each image once an epoch, every epoch in another order."""
    order = shuffled_order(len(images), seed)

    def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
        return image_rows(images[order(step * batch_size + np.arange(batch_size)[rows])])

    return batch_at


def image_validation(images: np.ndarray, batch_size: int) -> LazyBatches:
    """All images once, in their order; the last batch may be smaller."""
    steps = range(-(-len(images) // batch_size))
    return LazyBatches(lambda step: image_rows(images[step * batch_size : (step + 1) * batch_size]), steps)


def image_rows(images: np.ndarray) -> Batch:
    """uint8 [B, H, W, C] -> tokens int32 [B, H*W*C + 1], BOS first, and weights [B, H*W*C] of one."""
    pixels = images.reshape(len(images), -1)
    tokens = np.pad(pixels.astype(np.int32), [(0, 0), (1, 0)], constant_values=ImageTokenizer.bos_id)
    return tokens, np.ones(pixels.shape, np.float32)
