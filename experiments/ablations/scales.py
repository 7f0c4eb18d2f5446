"""Setups of the ablations: the paper's (section 3), and smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.ablations.table import Table
from hourglass_jax import ByteTokenizer, DataConfig, ImageTokenizer, OptimizerConfig, TrainConfig
from hourglass_jax.data import letters
from hourglass_jax.ranges import check_choice
from hourglass_jax.run_config import IMAGE_SIZES

TEXTS = ("enwik8", "text8")
DATASETS = (*TEXTS, *IMAGE_SIZES, "letters")
SCALES = ("paper", "small", "tiny", "micro")  # of all tables
GPU = "gpu"  # texts only, for learning curves


@dataclass(frozen=True)
class Setup:
    """The configuration that all rows of a table share.

    model: options of HourglassConfig, which a row may override.
    hierarchies: replacements of hierarchies that are too deep for the scale.
    n_valid: sequences of the final evaluation, evenly spaced over the validation data; 0: all of it.
    scaled: the differences from the paper, a template for `for_table`; empty: none.
    """

    model: Mapping[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    hierarchies: Mapping[str, str] = field(default_factory=dict)
    n_valid: int = 0
    scaled: str = ""
    letters: bool = False  # the L#L task, which is generated
    wide: bool = False  # learning curves are those of `curves.WIDE`


def widths(d_model: int, n_heads: int) -> dict[str, int]:
    return {"d_model": d_model, "n_heads": n_heads, "d_ff": 4 * d_model}


BYTES = ByteTokenizer(256)  # the paper's vocabulary: no BOS and EOS
TEXT = DataConfig(path="enwik8", tokenizer="byte", split="enwik8", block_size=2048, batch_size=8)
IMAGES = DataConfig(dataset="cifar10", batch_size=8)

SETUPS = {
    ("text", "paper"): Setup(
        widths(512, 8) | {"dropout": 0.15, "max_length": 2048},
        TEXT,
        OptimizerConfig(learning_rate=4e-4, warmup_steps=4000),
        TrainConfig(steps=200_000, eval_interval=5000, eval_batches=100),
    ),
    ("text", "small"): Setup(
        widths(256, 8) | {"dtype": "bfloat16", "max_length": 1024},
        replace(TEXT, block_size=1024, batch_size=16),
        OptimizerConfig(learning_rate=1e-3, warmup_steps=300),
        TrainConfig(steps=3000, eval_interval=1000, eval_batches=8),
        n_valid=1024,
        scaled="d_model 256 for {d_model}, sequences of 1,024 for 2,048 (16 for 8 a step), 3,000 steps for {steps:,}, "
        "peak learning rate 1e-3 for 4e-4, no dropout for 0.15, bfloat16",
    ),
    ("text", "tiny"): Setup(
        widths(128, 4) | {"initialization": "xavier", "max_length": 256},
        replace(TEXT, block_size=256, batch_size=4),
        OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        TrainConfig(steps=2000, eval_interval=1000, eval_batches=8),
        hierarchies={"2@1 24@4 2@1": "2@1 8@4 2@1"},
        n_valid=512,
        scaled="d_model 128 for {d_model}, sequences of 256 for 2,048 (4 for 8 a step), 2,000 steps for {steps:,}, "
        "peak learning rate 2e-3 for 4e-4, no dropout for 0.15, Xavier initialization",
    ),
    ("text", "micro"): Setup(  # narrow: two CPU cores reach 60 characters per parameter
        widths(64, 2) | {"initialization": "xavier", "max_length": 256, "max_unrolled_layers": 16},
        replace(TEXT, block_size=256),
        OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
        TrainConfig(steps=10_000, eval_interval=2500, eval_batches=16),
        hierarchies={"2@1 24@4 2@1": "2@1 8@4 2@1"},
        n_valid=1024,
        scaled="d_model 64 for {d_model}, sequences of 256 for 2,048, 10,000 steps for {steps:,}, peak learning rate "
        "3e-3 for 4e-4, no dropout for 0.15, Xavier initialization",
    ),
    ("text", GPU): Setup(  # wide and long enough for a GPU that several processes share
        widths(256, 4) | {"dtype": "bfloat16", "max_length": 1024, "positions": "rotary", "attention": "fused"},
        replace(TEXT, block_size=1024, batch_size=32),
        OptimizerConfig(learning_rate=1e-3, warmup_steps=300),
        TrainConfig(steps=10_000, eval_interval=2500, eval_batches=16),
        n_valid=1024,
        wide=True,
        scaled="d_model 256 for {d_model}, sequences of 1,024 for 2,048 (32 for 8 a step), 10,000 steps for {steps:,}, "
        "peak learning rate 1e-3 for 4e-4, no dropout for 0.15, rotary positions, bfloat16",
    ),
    ("images", "paper"): Setup(
        widths(512, 8) | {"max_length": 3072},
        IMAGES,
        OptimizerConfig(learning_rate=1e-3, warmup_steps=5000),
        TrainConfig(steps=100_000, eval_interval=5000, eval_batches=50),
    ),
    ("images", "small"): Setup(
        widths(256, 8) | {"dtype": "bfloat16", "max_length": 3072},
        replace(IMAGES, batch_size=4),
        OptimizerConfig(learning_rate=1e-3, warmup_steps=300),
        TrainConfig(steps=3000, eval_interval=1000, eval_batches=16),
        n_valid=256,
        scaled="d_model 256 for {d_model}, 4 images for {batch_size} a step, 3,000 steps for {steps:,}, bfloat16",
    ),
    ("images", "tiny"): Setup(
        widths(128, 4) | {"initialization": "xavier", "max_length": 768},
        replace(IMAGES, image_size=16, batch_size=1),
        OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        TrainConfig(steps=2000, eval_interval=1000, eval_batches=32),
        n_valid=128,
        scaled="d_model 128 for {d_model}, images of 16x16 for {side}x{side} (768 numbers for {length:,}; 1 for "
        "{batch_size} a step), 2,000 steps for {steps:,}, peak learning rate 2e-3 for {learning_rate}, Xavier "
        "initialization",
    ),
    ("images", "micro"): Setup(
        widths(64, 2) | {"initialization": "xavier", "max_length": 768, "max_unrolled_layers": 16},
        replace(IMAGES, image_size=16, batch_size=4),
        OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
        TrainConfig(steps=5000, eval_interval=1250, eval_batches=16),
        n_valid=512,
        scaled="d_model 64 for {d_model}, images of 16x16 for {side}x{side} (768 numbers for {length:,}; 4 for "
        "{batch_size} a step), 5,000 steps for {steps:,}, peak learning rate 3e-3 for {learning_rate}, Xavier "
        "initialization",
    ),
}
IMAGENET = {  # batch size (for ImageNet64 our choice), warm-up steps, steps
    ("imagenet32", "paper"): (64, 8000, 470_000),
    ("imagenet64", "paper"): (8, 8000, 300_000),
}
LETTERS = Setup(
    {"vocab_size": letters.TOKENIZER.vocab_size, "d_model": 64, "n_heads": 2, "d_ff": 128, "initialization": "xavier"},
    DataConfig(batch_size=32, block_size=24),
    OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    TrainConfig(steps=300, eval_interval=100, eval_batches=4),
    letters=True,
)


def find_setup(dataset: str, scale: str, path: str = "") -> Setup:
    """Return the setup for `dataset` with its files at `path`. Raises UsageError for unknown names."""
    check_choice("dataset", dataset, DATASETS)
    check_choice("scale", scale, (*SCALES, GPU) if dataset in TEXTS else SCALES)
    if dataset == "letters":
        return LETTERS
    if dataset in TEXTS:
        setup = SETUPS["text", scale]
        vocab_size, data = BYTES.vocab_size, setup.data
    else:
        setup = SETUPS["images", scale]
        vocab_size, data = ImageTokenizer.vocab_size, replace(setup.data, dataset=dataset)
    setup = replace(setup, model=setup.model | {"vocab_size": vocab_size}, data=replace(data, path=path))
    if (dataset, scale) in IMAGENET:
        batch_size, warmup_steps, steps = IMAGENET[dataset, scale]
        setup = replace(
            setup,
            data=replace(setup.data, batch_size=batch_size),
            optimizer=replace(setup.optimizer, warmup_steps=warmup_steps, learning_rate=4e-4),
            train=replace(setup.train, steps=steps),
        )
    return setup


def for_table(setup: Setup, table: Table) -> Setup:
    """Return `setup` for the rows of a table, whose overrides apply at the paper's scale."""
    if setup.letters:
        return setup
    paper = find_setup("enwik8" if setup.data.dataset == "text" else setup.data.dataset, "paper", setup.data.path)
    paper = replace(
        paper,
        model=paper.model | table.model,
        optimizer=replace(paper.optimizer, warmup_steps=table.warmup_steps or paper.optimizer.warmup_steps),
        train=replace(paper.train, steps=table.steps or paper.train.steps),
    )
    if not setup.scaled:
        return paper
    scaled = setup.scaled.format(
        d_model=paper.model["d_model"],
        batch_size=paper.data.batch_size,
        steps=paper.train.steps,
        learning_rate=f"{paper.optimizer.learning_rate:.0e}".replace("e-0", "e-"),
        side=IMAGE_SIZES.get(setup.data.dataset),
        length=3 * IMAGE_SIZES.get(setup.data.dataset, 0) ** 2,
    )
    used = {row.options["hierarchy"] for row in table.rows if row.options}
    scaled += "".join(f", {new} for {old}" for old, new in setup.hierarchies.items() if old in used)
    return replace(setup, scaled=scaled)
