"""Images that a model samples, and a PNG grid of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from hourglass_jax import HourglassLM, ImageTokenizer, generate
from hourglass_jax.files import whole_file

COLUMNS = 8  # of the grid
GAP = 2  # white pixels between images
SIDE = 64  # pixels; smaller images are enlarged by an integer factor up to this size
BATCH = 32  # images sampled at once, which bounds the memory


def draw_images(
    model: HourglassLM,
    tokenizer: ImageTokenizer,
    given: np.ndarray,
    key: jax.Array,
    *,
    check: Callable[[], None] = lambda: None,
    **sampling: Any,
) -> np.ndarray:
    """Sample images, uint8 [N, H, W, C], that start with the intensities `given`, int [N, G].

    check: called after each token; may raise.
    sampling: options of `generate`.
    """
    prompts = np.pad(given, [(0, 0), (1, 0)], constant_values=tokenizer.bos_id)
    drawn: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        drawn += generate(
            model,
            prompts[start : start + BATCH],
            max_tokens=tokenizer.n_tokens - given.shape[1],
            key=jax.random.fold_in(key, start),
            banned_tokens=[tokenizer.bos_id],
            stream=lambda _: check(),
            max_context=tokenizer.n_tokens + 1,
            **sampling,
        )
    return tokenizer.decode(np.concatenate([given, drawn], axis=1))


def top_halves(tokenizer: ImageTokenizer, images: np.ndarray) -> np.ndarray:
    """Return the intensities of the upper H // 2 rows of uint8 [N, H, W, C]: int32 [N, H // 2 * W * C]."""
    height, width, channels = tokenizer.shape
    return tokenizer.encode(images)[:, : height // 2 * width * channels]


def nothing(n_images: int) -> np.ndarray:
    """Return empty prompts, int32 [N, 0], to sample whole images."""
    return np.zeros((n_images, 0), np.int32)


def save_grid(path: Path, *groups: np.ndarray) -> None:
    """Write a PNG of groups of images, uint8 [N, H, W, 3] each, in rows of `COLUMNS`, alternating between groups."""
    n_images, height, width, _ = groups[0].shape
    scale = max(1, SIDE // max(height, width))
    rows = [group[start : start + COLUMNS] for start in range(0, n_images, COLUMNS) for group in groups]
    down, right = height * scale + GAP, width * scale + GAP
    canvas = np.full((len(rows) * down + GAP, min(n_images, COLUMNS) * right + GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = i * down + GAP, j * right + GAP
            canvas[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    with whole_file(path) as file:
        Image.fromarray(canvas).save(file, format="PNG")
