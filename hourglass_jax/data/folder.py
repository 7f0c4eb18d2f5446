"""A folder of one's own images as uint8 [N, H, W, C]."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hourglass_jax.data.images import ImageSplits, explained
from hourglass_jax.data.listing import each_once, files_of_kind
from hourglass_jax.data.overlap import without_copies
from hourglass_jax.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # Pillow's names
GRAY, COLOURED = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes of 8 bits a channel
MAX_PIXELS = 256 * 256  # of images that are taken as they are: longer sequences are no accident only if asked for


def load_folder(
    path: str | Path, image_size: int = 0, train_fraction: float = 0.9, background: int = 255
) -> ImageSplits:
    """The images in a folder and the folders in it; [N, H, W, 1] where all are gray, else [N, H, W, 3].

    Reads files of FORMATS, of animations the first frame. Copies of validation images are left out of training.

    image_size: cuts the middle square out of each and averages it down (or enlarges it) to this side; 0: as they are,
        which takes images of one size.
    train_fraction: the rest is for validation, at least one. A hash of its name in the folder decides which an image
        is: no class or series falls to one side, and images that come later move no others, but those at the border.
    background: the gray level from 0 to 255 behind transparent pixels.

    Raises UsageError where there are fewer than two images, one is damaged, or their sizes differ.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; give one with image files ({', '.join(FORMATS)})")
    files = each_once(files_of_kind(folder, image_suffixes()))
    if len(files) < 2:
        raise UsageError(
            f"{folder}: {len(files)} image files ({', '.join(FORMATS)}); training and validation take at least one each"
        )
    drawn = sorted(files, key=lambda file: name_hash(file.relative_to(folder)))
    n_train = min(max(int(len(files) * train_fraction), 1), len(files) - 1)
    train, valid = sorted(drawn[:n_train]), sorted(drawn[n_train:])
    train = without_copies(train, valid, folder)
    images, row = read_images(files, image_size, background), {file: i for i, file in enumerate(files)}
    return ImageSplits(*(images[[row[file] for file in part]] for part in (train, valid)))


def image_suffixes() -> set[str]:
    """The file name suffixes of FORMATS, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def name_hash(name: Path) -> bytes:
    return hashlib.sha256(name.as_posix().encode("utf-8", "surrogateescape")).digest()


def read_images(files: list[Path], image_size: int, background: int) -> np.ndarray:
    """-> uint8 [N, H, W, C], in the order of the files."""
    sizes, gray = zip(*map(inspect, files), strict=True)
    for file, size in zip(files, sizes, strict=True):
        if not image_size and size != sizes[0]:
            raise UsageError(
                f"{file}: is {size[0]}x{size[1]}, but {files[0].name} is {sizes[0][0]}x{sizes[0][1]}; "
                "give the side that all should have as image_size"
            )
    width, height = (image_size, image_size) if image_size else sizes[0]
    channels = 1 if all(gray) else 3
    if not image_size and width * height > MAX_PIXELS:
        raise UsageError(
            f"{files[0].parent}: an image of {width}x{height} is a sequence of {width * height * channels:,} tokens; "
            "give a smaller side as image_size"
        )
    images = np.empty((len(files), height, width, channels), np.uint8)
    for i, file in enumerate(files):
        with explained(file, "an image"), Image.open(file) as opened:
            image = opaque(ImageOps.exif_transpose(opened), background).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (width, height), Image.Resampling.BOX)
            images[i] = np.asarray(image).reshape(images.shape[1:])
    return images


def opaque(image: Image.Image, background: int) -> Image.Image:
    """Composite an image with transparency on a gray level: what lies under transparent pixels is not shown."""
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA"))


def inspect(file: Path) -> tuple[tuple[int, int], bool]:
    """Width and height as shown, and whether the image is gray; reads no more of the file than that."""
    with explained(file, "an image"), Image.open(file) as image:
        mode = image.mode
        turned = image.getexif().get(0x0112, 1) >= 5  # the orientations that swap the sides
        size = image.size[::-1] if turned else image.size
    if mode not in GRAY + COLOURED:
        raise UsageError(f"{file}: its pixels are of the kind {mode!r}; give images with 8 bits a channel")
    return size, mode in GRAY
