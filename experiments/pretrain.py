"""Pretrains a character-level Hourglass on a text file or the built-in corpus, or a pixel-level one on images.

python experiments/pretrain.py
python experiments/pretrain.py --data_path=book.txt --factors=3,1,8,4 --d_model=512 --n_heads=8 --out=runs/book
python experiments/pretrain.py --data.dataset=cifar10 --data_path=cifar-10-batches-bin --out=runs/cifar10
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from absl import flags
from flax import nnx

from experiments.common import launcher
from experiments.common.sources import open_source
from hourglass_jax import (
    DataConfig,
    Hierarchy,
    HourglassConfig,
    HourglassLM,
    OptimizerConfig,
    TrainConfig,
    UsageError,
    check_causality,
)
from hourglass_jax.model import n_parameters
from hourglass_jax.training.metrics import plot_curves
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import fit

# Sized so that the built-in corpus trains in about two minutes on two CPU cores.
MODEL = HourglassConfig(
    vocab_size=1,
    hierarchy="1@1 3@3 1@1",
    d_model=192,
    n_heads=6,
    d_ff=768,
    max_length=1024,
    initialization="xavier",
)
DATA = DataConfig(block_size=128, batch_size=8)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)
TRAIN = TrainConfig(steps=600, eval_interval=100)

OUT = flags.DEFINE_string("out", "runs/pretrain", "Directory for checkpoints, curves and plots.")
VOCAB_PATH = flags.DEFINE_string("vocab_path", "", "Use this vocabulary (JSON) instead of the text's own.")
EPOCHS = flags.DEFINE_integer("epochs", None, "With --iter: train for epochs * iter steps.", lower_bound=1)
ITER = flags.DEFINE_integer("iter", None, "Steps an epoch; an evaluation follows each.", lower_bound=1)
flags.DEFINE_alias("model_save_path", "out")

launcher.define_config("model", MODEL, without=("vocab_size",))
launcher.define_config("data", DATA)
launcher.define_config("optimizer", OPTIMIZER)
launcher.define_config("train", TRAIN)
launcher.define_runtime()


def parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace(",", " ").split())


def parse_factors(text: str) -> str:
    return str(Hierarchy.from_factors(parse_numbers(text)))


def parse_betas(text: str) -> tuple[float, float]:
    beta1, beta2 = (float(part) for part in text.replace(",", " ").split())
    return beta1, beta2


for _name in ("hierarchy", "shortening", "upsampling", "positions", "activation", "norm"):
    launcher.define_alias(_name, f"model.{_name}", str)
for _name in ("d_model", "n_heads", "d_ff", "window"):
    launcher.define_alias(_name, f"model.{_name}", int)
launcher.define_alias("dropout", "model.dropout", float)
launcher.define_alias("factors", "model.hierarchy", parse_factors)
launcher.define_alias("n_embedding", "model.d_model", int)
launcher.define_alias("data_path", "data.path", str)
launcher.define_alias("batch_size", "data.batch_size", int)
launcher.define_alias("block_size", "data.block_size", int)
launcher.define_alias("train_val_split", "data.train_fraction", float)
launcher.define_alias("learning_rate", "optimizer.learning_rate", float)
launcher.define_alias("eps", "optimizer.eps", float)
launcher.define_alias("steps", "train.steps", int)
launcher.define_alias("eval_iter", "train.eval_batches", int)
launcher.define_alias("seed", "train.seed", int)
launcher.define_alias("shorten_factors", "train.shorten_factors", parse_numbers)
BETAS = flags.DEFINE_string("betas", None, "Short for --optimizer.beta1 and --optimizer.beta2, e.g. 0.9,0.98.")


def read_configs() -> tuple[DataConfig, OptimizerConfig, TrainConfig]:
    betas = {}
    if BETAS.value is not None:
        beta1, beta2 = launcher.parse_flag("betas", BETAS.value, parse_betas)
        betas = {"beta1": beta1, "beta2": beta2}
    schedule = {}
    if (EPOCHS.value is None) != (ITER.value is None):
        raise UsageError("--epochs and --iter go together: epochs * iter steps; or give --steps alone")
    if EPOCHS.value is not None:
        schedule = {"steps": EPOCHS.value * ITER.value, "eval_interval": ITER.value}
    return (
        launcher.read_config("data", DataConfig),
        launcher.read_config("optimizer", OptimizerConfig, **betas),
        launcher.read_config("train", TrainConfig, **schedule),
    )


def main(_: list[str]) -> None:
    with Signals() as signals:
        pretrain(signals)


def pretrain(signals: Signals) -> None:
    started = time.perf_counter()
    runtime = launcher.read_runtime()
    data, optimizer, train = read_configs()
    source = open_source(data, VOCAB_PATH.value)
    config = launcher.read_config("model", HourglassConfig, vocab_size=source.tokenizer.vocab_size)
    if source.n_positions > config.position_limit:
        raise UsageError(
            f"sequences of {source.n_positions} tokens are longer than the learned positions, which end at "
            f"max_length={config.max_length}; raise --model.max_length"
        )
    parts = {"model": config, "data": data, "optimizer": optimizer, "train": train}
    settings = {name: dataclasses.asdict(part) for name, part in parts.items()}
    settings |= source.fingerprint
    out = Path(OUT.value)
    launcher.start_run(out, config, source.tokenizer, settings, runtime, data.batch_size)

    model = nnx.jit(lambda rngs: HourglassLM(config, rngs=rngs))(nnx.Rngs(train.seed))
    check_causality(model)
    millions = n_parameters(model) / 1e6
    print(f"{config.hierarchy}, {millions:.2f}M parameters, vocabulary {config.vocab_size}, causal: yes")
    print(f"{source.size} -> {out}")
    heading, sample = source.sampler(config.position_limit, train.seed, out, signals)
    result = fit(
        model,
        source.batches(train.seed),
        source.validation(),
        out,
        optimizer_config=optimizer,
        train_config=train,
        runtime_config=runtime,
        sample=sample,
        unit=source.unit,
        signals=signals,
    )
    plot = plot_curves(out)
    print(f"validation: {result.summary(source.unit)} ({time.perf_counter() - started:.0f} s, curves in {plot})")
    print(f"sample: {heading}{sample(model)}")
    script, *options = source.next_command
    print("\n" + launcher.next_command(script, f"--load_model_path={out}", *options))


if __name__ == "__main__":
    launcher.run(main)
