"""Setups of the ablations, from scales.toml: the paper's (section 3), and smaller ones."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.ablations.table import Table
from hourglass_jax import ByteTokenizer, DataConfig, ImageTokenizer, OptimizerConfig, TrainConfig
from hourglass_jax.data import letters
from hourglass_jax.ranges import check_choice
from hourglass_jax.run_config import IMAGE_SIZES
from hourglass_jax.training.identity import describe, differences

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
    course: str = "narrow"  # of its learning curves, a key of `curves.COURSES`

    def facts(self) -> dict[str, Any]:
        """Return what a record stores of the setup, as JSON values."""
        data = {name: value for name, value in dataclasses.asdict(self.data).items() if name != "path"}
        facts = {"model": dict(self.model), "data": data, "optimizer": dataclasses.asdict(self.optimizer)}
        return json.loads(json.dumps(facts | {"steps": self.train.steps, "n_valid": self.n_valid}))


BYTES = ByteTokenizer(256)  # the paper's vocabulary: no BOS and EOS
TEXT = DataConfig(path="enwik8", tokenizer="byte", split="enwik8")
IMAGES = DataConfig(dataset="cifar10")


def read_setups() -> dict[tuple[str, str], Setup]:
    """Return the setups of scales.toml by kind of data and scale."""
    kinds, setups = {"text": TEXT, "images": IMAGES}, {}
    for kind, scales in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items():
        for scale, fields in scales.items():
            data = replace(kinds[kind], **fields.pop("data"))
            optimizer, train = OptimizerConfig(**fields.pop("optimizer")), TrainConfig(**fields.pop("train"))
            setups[kind, scale] = Setup(data=data, optimizer=optimizer, train=train, **fields)
    return setups


SETUPS = read_setups()
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

    def overridden(setup: Setup) -> Setup:
        optimizer = replace(setup.optimizer, warmup_steps=table.warmup_steps or setup.optimizer.warmup_steps)
        train = replace(setup.train, steps=table.steps or setup.train.steps)
        return replace(setup, model={**setup.model, **table.model}, optimizer=optimizer, train=train)

    paper = find_setup("enwik8" if setup.data.dataset == "text" else setup.data.dataset, "paper", setup.data.path)
    own = overridden(paper)
    if (setup.data, setup.train) == (paper.data, paper.train):  # the recipe may differ
        setup = overridden(setup)
    if setup == own:
        return own
    used = {row.options["hierarchy"] for row in table.rows if row.options}
    changes = [f"{old} -> {new}" for old, new in setup.hierarchies.items() if old in used]
    return replace(setup, scaled=", ".join([describe(differences(own.facts(), setup.facts())), *changes]))
