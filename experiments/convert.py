"""Convert weights from other projects, models to and from safetensors, and models to StableHLO.

python experiments/convert.py --from=original model.pth vocab.json runs/original
python experiments/convert.py --from=pypi --n_heads=8 --shorten_factor=4 model.pth runs/pypi
python experiments/convert.py --to=safetensors runs/original shared
python experiments/convert.py --from=safetensors shared runs/shared
python experiments/convert.py --to=stablehlo runs/original programs
python experiments/convert.py --to=package --about=books.md --evaluations=test.json runs/books weights/books
    # --base=books: stores only the parameters that differ from weights/books

--from writes a run directory, like pretrain.py. vocab.json maps tokens to ids; pypi requires it unless the model reads
bytes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package named experiments

from absl import flags
from flax import nnx

from experiments.common import launcher
from experiments.common.reports import model_card
from hourglass_jax import HourglassLM, UsageError
from hourglass_jax.files import whole_directory
from hourglass_jax.interop import export_safetensors, export_stablehlo, from_original, from_pypi, import_safetensors
from hourglass_jax.model import n_parameters
from hourglass_jax.pretrained import save_pretrained
from hourglass_jax.run_config import FOLDER, IMAGE_SIZES, DataConfig
from hourglass_jax.tokenizers import ImageTokenizer, Tokenizer
from hourglass_jax.training.checkpoints import CheckpointStore
from hourglass_jax.training.run import Record, Run

FROM = flags.DEFINE_enum(
    "from",
    None,
    ["original", "pypi", "safetensors"],
    "original: the PyTorch project of the README; pypi: hourglass-transformer-pytorch; safetensors: of this library.",
)
TO = flags.DEFINE_enum(
    "to",
    None,
    ["safetensors", "stablehlo", "package"],
    "Format to write; stablehlo: programs that JAX runs without this library; package: a directory of "
    "hourglass_jax/weights, in bfloat16, with a model card.",
)
BASE = flags.DEFINE_string(
    "base", None, "package: name of a model in the same directory; only parameters that differ from its own are stored."
)
ABOUT = launcher.define_path(
    "about", None, "package: Markdown about data, license, training and limits, for the model card."
)
EVALUATIONS = flags.DEFINE_list("evaluations", [], "package: records of evaluate.py --report, for the model card.")
N_HEADS = flags.DEFINE_integer(
    "n_heads", None, "Number of heads, for original (default 6) and pypi (default 8).", lower_bound=1
)
SHORTEN_FACTOR = flags.DEFINE_list(
    "shorten_factor", [], "pypi without linear resampling: the model's factor or factors."
)
CAUSAL = flags.DEFINE_boolean("causal", True, "pypi: whether the model is causal.")
FORMAT = flags.DEFINE_enum(
    "format", "text", ["text", "haiku", "prompt"], "The model's last training data; see finetune.py."
)
DATASET = flags.DEFINE_enum(
    "dataset",
    None,
    [*IMAGE_SIZES, FOLDER],
    "Models of images: the data set for evaluate.py and generate.py; default: cifar10 if the shape fits, else folder.",
)

PYTORCH, PACKAGE = ("--from=original", "--from=pypi"), ("--to=package",)
TAKEN_BY = {
    "n_heads": PYTORCH,
    "shorten_factor": ("--from=pypi",),
    "causal": ("--from=pypi",),
    "format": (*PYTORCH, "--from=safetensors"),
    "dataset": ("--from=safetensors",),
    "base": PACKAGE,
    "about": PACKAGE,
    "evaluations": PACKAGE,
}


def main(arguments: list[str]) -> None:
    if (FROM.value is None) == (TO.value is None):
        raise UsageError("give either --from=original|pypi|safetensors or --to=safetensors|stablehlo|package")
    if len(arguments) not in (3, 4):
        raise UsageError("give the input, the vocabulary of a .pth file, and the output directory, in this order")
    model_path, *vocab, out = map(os.path.expanduser, arguments[1:])
    mode = f"--from={FROM.value}" if FROM.value else f"--to={TO.value}"
    launcher.check_taken(TAKEN_BY, mode)
    if vocab and mode not in PYTORCH:
        raise UsageError(f"{mode} takes no vocabulary, but {vocab[0]} is given; leave it out")
    if TO.value:
        model, tokenizer, _ = launcher.load_run(model_path)
        if TO.value == "package":
            write_package(model, Run(model_path).read(), out)
        elif TO.value == "stablehlo":
            export_stablehlo(out, model, tokenizer)
        else:
            export_safetensors(model, tokenizer, out)
        print(f"{describe(model)} -> {out}")
        return
    with whole_directory(Path(out)) as directory:
        model, tokenizer = read_model(model_path, vocab[0] if vocab else None)
        write_model(model, tokenizer, directory)
    print(f"{describe(model)} -> {out}")
    script = "generate" if model.config.decodes else "evaluate"
    print(f"\n{launcher.next_command(script, f'--load_model_path={out}')}")


def read_model(path: str, vocab_path: str | None) -> tuple[HourglassLM, Tokenizer]:
    if FROM.value == "safetensors":
        return import_safetensors(path)[:2]
    if FROM.value == "original":
        if not vocab_path:
            raise UsageError("--from=original requires the model's vocabulary; give its JSON after the model's path")
        return from_original(path, vocab_path, n_heads=N_HEADS.value)
    factors = launcher.parse_flag(
        "shorten_factor", ",".join(SHORTEN_FACTOR.value), lambda _: [int(factor) for factor in SHORTEN_FACTOR.value]
    )
    return from_pypi(
        path,
        vocab_path,
        n_heads=N_HEADS.value or 8,
        shorten_factor=factors[0] if len(factors) == 1 else factors,
        causal=CAUSAL.value,
    )


def write_model(model: HourglassLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a run directory with the settings that the other commands require."""
    config = model.config
    if isinstance(tokenizer, ImageTokenizer):
        data = image_data(tokenizer.shape)
    else:
        data = DataConfig(tokenizer=tokenizer.kind, clean=getattr(tokenizer, "clean", False))
        if config.positions == "learned":
            data = dataclasses.replace(data, block_size=config.max_length)
    settings = {"converted_from": FROM.value, "data": dataclasses.asdict(data)}
    if FORMAT.value != "text":
        settings["format"] = FORMAT.value
    Run(directory).write(Record(config, tokenizer, settings, history=[]))
    store = CheckpointStore(directory)
    store.save(0, nnx.state(model, nnx.Param))
    store.close()


def image_data(shape: tuple[int, int, int]) -> DataConfig:
    """Return the data of --dataset; default: cifar10 if the shape fits, else a folder."""
    height, width, channels = shape
    coloured_square = height == width and channels == 3
    of_cifar10 = coloured_square and IMAGE_SIZES["cifar10"] % height == 0
    dataset = DATASET.value or ("cifar10" if of_cifar10 else FOLDER)
    if dataset != FOLDER and not coloured_square:
        raise UsageError(
            f"--dataset={dataset}: the model's images are {width}x{height}x{channels}; give --dataset={FOLDER}"
        )
    return DataConfig(dataset=dataset, image_size=height if height == width else 0)


def write_package(model: HourglassLM, record: Record, out: str) -> None:
    """Write a directory of hourglass_jax/weights."""
    if not ABOUT.value:
        raise UsageError("--to=package requires a description of the model; give it as --about=FILE.md")
    card = model_card(Path(out).name, model, record, Path(ABOUT.value), list(map(Path, EVALUATIONS.value)))
    save_pretrained(model, record, card, out, base=BASE.value)


def describe(model: HourglassLM) -> str:
    return (
        f"{model.config.hierarchy}, {n_parameters(model) / 1e6:.2f}M parameters, vocabulary {model.config.vocab_size}"
    )


if __name__ == "__main__":
    launcher.run(main, positional=True)
