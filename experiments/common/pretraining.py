"""Flags of a pretraining run: its configurations and their short names."""

from __future__ import annotations

import dataclasses
import os

from absl import flags

from experiments.common import launcher
from hourglass_jax import (
    DataConfig,
    Hierarchy,
    HourglassConfig,
    OptimizerConfig,
    TrainConfig,
    UsageError,
)
from hourglass_jax.recipes import RECIPES
from hourglass_jax.tokenizers import Tokenizer, boundary_tokens

# Sized so that the built-in corpus trains in about three minutes on two CPU cores.
MODEL = HourglassConfig(
    vocab_size=1,
    hierarchy="1@1 3@3 1@1",
    d_model=192,
    n_heads=6,
    d_ff=768,
    max_length=1024,
    initialization="xavier",
)
DATA = DataConfig(block_size=128, batch_size=16)
OPTIMIZER = OptimizerConfig(learning_rate=4e-3)
TRAIN = TrainConfig(steps=300, eval_interval=100)

OUT = launcher.define_path("out", "runs/pretrain", "Directory of checkpoints, curves and plots.")
INIT_FROM = launcher.define_path(
    "init_from",
    "",
    "Start from the parameters of this run or shipped model; its model options and vocabulary are the defaults.",
)
RECIPE = launcher.define_recipe(
    "modern",
    "Defaults of model and optimizer: modern (Muon and n-grams, see docs/recipes.md) | paper | original. With "
    "--init_from, of the optimizer only.",
)
VOCAB_PATH = launcher.define_path("vocab_path", "", "Use this vocabulary (JSON) instead of the text's own.")
EPOCHS = flags.DEFINE_integer("epochs", None, "With --iter: train for epochs * iter steps.", lower_bound=1)
ITER = flags.DEFINE_integer("iter", None, "Steps per epoch; an evaluation follows each.", lower_bound=1)
flags.DEFINE_alias("model_save_path", "out")

launcher.define_config("model", MODEL, without=("vocab_size",))
launcher.define_config("data", DATA)
launcher.define_config("optimizer", OPTIMIZER)
launcher.define_config("train", TRAIN)
launcher.define_runtime()
launcher.define_allow_unknown()


def parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace(",", " ").split())


def parse_factors(text: str) -> str:
    return str(Hierarchy.from_factors(parse_numbers(text)))


def parse_betas(text: str) -> tuple[float, float]:
    beta1, beta2 = (float(part) for part in text.replace(",", " ").split())
    return beta1, beta2


for _name in ("hierarchy", "shortening", "upsampling", "boundaries", "positions", "activation", "norm"):
    launcher.define_alias(_name, f"model.{_name}", str)
for _name in ("d_model", "n_heads", "d_ff", "window"):
    launcher.define_alias(_name, f"model.{_name}", parse_numbers)
launcher.define_alias("dropout", "model.dropout", float)
launcher.define_alias("factors", "model.hierarchy", parse_factors)
launcher.define_alias("n_embedding", "model.d_model", parse_numbers)
launcher.define_alias("data_path", "data.path", os.path.expanduser)
launcher.define_alias("valid_path", "data.valid_path", os.path.expanduser)
launcher.define_alias("batch_size", "data.batch_size", int)
launcher.define_alias("block_size", "data.block_size", int)
launcher.define_alias("train_val_split", "data.train_fraction", float)
launcher.define_alias("learning_rate", "optimizer.learning_rate", float)
launcher.define_alias("eps", "optimizer.eps", float)
launcher.define_alias("steps", "train.steps", int)
launcher.define_alias("eval_iter", "train.eval_batches", int)
launcher.define_alias("seed", "train.seed", int)
launcher.define_alias("patience", "train.patience", int)
launcher.define_alias("shorten_factors", "train.shorten_factors", parse_numbers)
BETAS = flags.DEFINE_string("betas", None, "Short for --optimizer.beta1 and --optimizer.beta2, e.g. 0.9,0.98.")


def read_model(tokenizer: Tokenizer, base: HourglassConfig | None = None) -> HourglassConfig:
    """Return the configuration from its flags, or `base` with the flags that are given.

    boundary_tokens defaults to the tokenizer's tokens for the chosen boundaries.
    """
    recipe, given = RECIPES[RECIPE.value].model, launcher.given_fields("model")
    options = launcher.read_config("model", dict, {} if base else recipe)
    if base:
        options = dataclasses.asdict(base) | {name: options[name] for name in given}
    if "boundaries" in given and "boundary_tokens" not in given:
        options["boundary_tokens"] = ()
    options["boundary_tokens"] = options["boundary_tokens"] or boundary_tokens(tokenizer, options["boundaries"])
    options["vocab_size"] = tokenizer.vocab_size + (not options["causal"])  # and a mask token
    return HourglassConfig(**options)


def in_tokens_of(tokenizer: Tokenizer, data: DataConfig) -> DataConfig:
    """Return `data` with the options of the tokenizer. Raises UsageError if a flag contradicts them."""
    if data.dataset != "text":
        return data
    own = {"tokenizer": tokenizer.kind, "clean": getattr(tokenizer, "clean", False)}
    for field, (flag, *_) in launcher.given_fields("data").items():
        if field in own and getattr(data, field) != own[field]:
            raise UsageError(f"--{flag}={getattr(data, field)}: the vocabulary's {field} is {own[field]}; leave it out")
    return dataclasses.replace(data, **own)


def read_configs() -> tuple[DataConfig, OptimizerConfig, TrainConfig]:
    betas = {}
    if BETAS.value is not None:
        beta1, beta2 = launcher.parse_flag("betas", BETAS.value, parse_betas)
        betas = {"beta1": beta1, "beta2": beta2}
    schedule: dict[str, int] = {}
    if (EPOCHS.value is None) != (ITER.value is None):
        raise UsageError("--epochs and --iter require each other: epochs * iter steps; or give only --steps")
    if EPOCHS.value is not None:
        schedule = {"steps": EPOCHS.value * ITER.value, "eval_interval": ITER.value}
    for name, fields, options in (("optimizer", betas, "--betas"), ("train", schedule, "--epochs and --iter")):
        for field, names in launcher.given_fields(name).items():
            if field in fields:
                raise UsageError(f"{options} and --{names[0]} both set {name}.{field}; leave out one of them")
    return (
        launcher.read_config("data", DataConfig),
        launcher.read_config("optimizer", OptimizerConfig, RECIPES[RECIPE.value].optimizer, **betas),
        launcher.read_config("train", TrainConfig, **schedule),
    )
