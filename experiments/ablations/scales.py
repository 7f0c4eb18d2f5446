"""Setups of the ablations: the paper's (section 3), and smaller ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.ablations.table import Table
from hourglass_jax import ByteTokenizer, DataConfig, ImageTokenizer, OptimizerConfig, TrainConfig
from hourglass_jax.data import letters
from hourglass_jax.ranges import check_choice
from hourglass_jax.run_config import IMAGE_SIZES
from hourglass_jax.training.identity import describe, differences

TEXTS = ("enwik8", "text8")
DATASETS = (*TEXTS, *IMAGE_SIZES, "letters")
SCALES = ("paper", "small", "tiny", "micro")


@dataclass(frozen=True)
class Setup:
    """The configuration that all rows of a table share.

    model: options of HourglassConfig, which a row may override.
    hierarchies: replacements of hierarchies that are too deep for the scale.
    n_valid: sequences of the final evaluation, evenly spaced over the validation data; 0: all of it.
    scaled: the differences from the paper; empty: none.
    """

    model: Mapping[str, Any]
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    hierarchies: Mapping[str, str] = field(default_factory=dict)
    n_valid: int = 0
    scaled: str = ""
    letters: bool = False  # the L#L task, which is generated

    def facts(self) -> dict[str, Any]:
        """Return what a record stores of the setup, as JSON values."""
        data = {name: value for name, value in dataclasses.asdict(self.data).items() if name != "path"}
        facts = {"model": dict(self.model), "data": data, "optimizer": dataclasses.asdict(self.optimizer)}
        return json.loads(json.dumps(facts | {"steps": self.train.steps, "n_valid": self.n_valid}))


def widths(d_model: int, n_heads: int) -> dict[str, int]:
    return {"d_model": d_model, "n_heads": n_heads, "d_ff": 4 * d_model}


BYTES = ByteTokenizer(256)  # the paper's vocabulary: no BOS and EOS
TEXT = DataConfig(path="enwik8", tokenizer="byte", split="enwik8", block_size=2048, batch_size=8)
IMAGES = DataConfig(dataset="cifar10", batch_size=8)
NARROW = widths(64, 2) | {"initialization": "xavier", "max_unrolled_layers": 16}  # 60 characters per parameter
SHALLOW = {"2@1 24@4 2@1": "2@1 8@4 2@1"}

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
    ),
    ("text", "tiny"): Setup(
        widths(128, 4) | {"initialization": "xavier", "max_length": 256},
        replace(TEXT, block_size=256, batch_size=4),
        OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        TrainConfig(steps=2000, eval_interval=1000, eval_batches=8),
        SHALLOW,
        n_valid=512,
    ),
    ("text", "micro"): Setup(
        NARROW | {"max_length": 256},
        replace(TEXT, block_size=256),
        OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
        TrainConfig(steps=10_000, eval_interval=2500, eval_batches=16),
        SHALLOW,
        n_valid=1024,
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
    ),
    ("images", "tiny"): Setup(
        widths(128, 4) | {"initialization": "xavier", "max_length": 768},
        replace(IMAGES, image_size=16, batch_size=1),
        OptimizerConfig(learning_rate=2e-3, warmup_steps=100),
        TrainConfig(steps=2000, eval_interval=1000, eval_batches=32),
        n_valid=128,
    ),
    ("images", "micro"): Setup(
        NARROW | {"max_length": 768},
        replace(IMAGES, image_size=16, batch_size=4),
        OptimizerConfig(learning_rate=3e-3, warmup_steps=200),
        TrainConfig(steps=5000, eval_interval=1250, eval_batches=16),
        n_valid=512,
    ),
}
IMAGENET = {"imagenet32": (64, 470_000), "imagenet64": (8, 300_000)}  # batch size (for 64 our choice) and steps
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
    check_choice("scale", scale, SCALES)
    if dataset == "letters":
        return LETTERS
    if dataset in TEXTS:
        setup = SETUPS["text", scale]
        vocab_size, data = BYTES.vocab_size, setup.data
    else:
        setup = SETUPS["images", scale]
        vocab_size, data = ImageTokenizer.vocab_size, replace(setup.data, dataset=dataset)
    setup = replace(setup, model=setup.model | {"vocab_size": vocab_size}, data=replace(data, path=path))
    if dataset in IMAGENET and scale == "paper":
        batch_size, steps = IMAGENET[dataset]
        setup = replace(
            setup,
            data=replace(setup.data, batch_size=batch_size),
            optimizer=OptimizerConfig(warmup_steps=8000, learning_rate=4e-4),
            train=replace(setup.train, steps=steps),
        )
    return setup


def for_table(setup: Setup, table: Table) -> Setup:
    """Return `setup` for the rows of a table, whose overrides apply at the paper's scale."""
    if setup.letters:
        return setup
    paper = find_setup("enwik8" if setup.data.dataset == "text" else setup.data.dataset, "paper", setup.data.path)
    own = replace(
        paper,
        model=paper.model | table.model,
        optimizer=replace(paper.optimizer, warmup_steps=table.warmup_steps or paper.optimizer.warmup_steps),
        train=replace(paper.train, steps=table.steps or paper.train.steps),
    )
    if setup == paper:
        return own
    used = {row.options["hierarchy"] for row in table.rows if row.options}
    changes = [f"{old} -> {new}" for old, new in setup.hierarchies.items() if old in used]
    return replace(setup, scaled=", ".join([describe(differences(own.facts(), setup.facts())), *changes]))
