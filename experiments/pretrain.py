"""Pretrain a character-level Hourglass on texts or the built-in corpus, or a pixel-level one on images.

python experiments/pretrain.py
python experiments/pretrain.py --data_path=books --valid_path=held_out.txt --out=runs/books
python experiments/pretrain.py --data_path=book.txt --factors=3,1,8,4 --d_model=512 --n_heads=8 --out=runs/book
python experiments/pretrain.py --model.causal=false --out=runs/masked                      # bidirectional
python experiments/pretrain.py --data.dataset=cifar10 --data_path=cifar-10-batches-bin --out=runs/cifar10
python experiments/pretrain.py --data.dataset=folder --data_path=photos --data.image_size=32 --out=runs/photos
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags
from flax import nnx

from experiments.common import launcher, pretraining
from experiments.common.cuts import check_groups, describe_groups
from experiments.common.sources import open_source, unit_of
from hourglass_jax import HourglassLM, Run, UsageError, at_shorten_factor
from hourglass_jax.model import n_parameters
from hourglass_jax.training.metrics import plot_curves
from hourglass_jax.training.optimizer import trained_parameters
from hourglass_jax.training.signals import Signals
from hourglass_jax.training.trainer import fit

flags.adopt_module_key_flags(pretraining)  # so that --help lists them


def main(_: list[str]) -> None:
    with Signals() as signals:
        pretrain(signals)


def pretrain(signals: Signals) -> None:
    started = time.perf_counter()
    runtime = launcher.read_runtime()
    data, optimizer, train = pretraining.read_configs()
    model = tokenizer = begun = None
    if origin := pretraining.INIT_FROM.value:
        model, tokenizer, settings = launcher.load_origin(origin)
        begun = {"path": origin, "settings": settings}
    source = open_source(data, pretraining.VOCAB_PATH.value, tokenizer, allow_unknown=flags.FLAGS.allow_unknown)
    data = pretraining.in_tokens_of(source.tokenizer, data)
    config = pretraining.read_model(source.tokenizer, model.config if model else None)
    model = model.reconfigured(config) if model else None
    if source.n_positions > config.position_limit:
        raise UsageError(
            f"sequences of {source.n_positions} tokens are longer than the learned positions, which end at "
            f"max_length={config.max_length}; raise --model.max_length"
        )
    parts = {"model": config, "data": data, "optimizer": optimizer, "train": train}
    settings = {name: dataclasses.asdict(part) for name, part in parts.items()}
    settings |= source.fingerprint | {"init_from": begun}

    if model is None:
        model = nnx.jit(lambda rngs: HourglassLM(config, rngs=rngs))(nnx.Rngs(train.seed))
    batch = source.batches(train.seed)(0)
    trained_parameters(nnx.state(model), optimizer)  # raises before anything is written
    for factor in train.shorten_factors:
        at_shorten_factor(model, factor)
    check_groups(model, *batch)
    run = Run(pretraining.OUT.value)
    launcher.start_run(run, config, source.tokenizer, settings, runtime, batch)
    groups = describe_groups(model, *batch)
    causal = launcher.causality(model)
    millions = n_parameters(model) / 1e6
    print(f"{config.hierarchy}, {millions:.2f}M parameters, vocabulary {config.vocab_size}, causal: {causal}{groups}")
    print(f"{source.size} -> {run}")
    unit = unit_of(source.unit, config)
    heading, sample = source.sampler(config, train.seed, Path(pretraining.OUT.value), signals)
    result = fit(
        model,
        source.batches(train.seed),
        source.validation(),
        run,
        optimizer_config=optimizer,
        train_config=train,
        runtime_config=runtime,
        sample=sample,
        unit=unit,
        signals=signals,
    )
    plot = plot_curves(Path(pretraining.OUT.value))
    groups = describe_groups(model, *batch)
    seconds = time.perf_counter() - started
    print(f"validation: {result.summary(unit)} ({seconds:.0f} s, {launcher.peak_memory()}, curves in {plot}{groups})")
    print(f"sample: {heading}{sample(model)}")
    script, *options = source.next_command if config.decodes else ("evaluate",)
    print("\n" + launcher.next_command(script, f"--load_model_path={run}", *options))


if __name__ == "__main__":
    launcher.run(main)
