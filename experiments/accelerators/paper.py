"""Compiles the paper's main models for accelerators, one command of compile.py after another.

python -m experiments.accelerators.paper                    those whose compilers are installed
python -m experiments.accelerators.paper --dry_run          the commands alone
python -m experiments.accelerators.paper --targets=h100,v5e-16 --datasets=enwik8

In bfloat16, without dropout. Rows that the record has are left as they are: the same command goes on after a stop.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments.ablations.rows import row_config
from experiments.ablations.scales import find_setup, for_table
from experiments.ablations.tables import find_table
from experiments.accelerators.targets import COMPILERS, find_target, is_installed
from experiments.common import launcher, pretraining
from experiments.common.reports import EXPERIMENTS, read_record

TABLES = {"enwik8": "2", "imagenet32": "3", "imagenet64": "3"}
POSITIONS = ("relative", "rotary")
ROWS = {"enwik8": 4, "imagenet32": 4, "imagenet64": 1}  # sequences for each chip
LENGTHS = {"enwik8": 4096}  # as the paper's test has them

TARGETS = flags.DEFINE_list("targets", ["h100", "8xh100", "v5e-16", "v5e-256"], "See experiments/compile.py.")
DATASETS = flags.DEFINE_list("datasets", list(TABLES), "Whose main model.")
OUT = launcher.define_path("results", "experiments/results/accelerators", "Directory of the records.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the commands.")


def options(dataset: str, positions: str, n_chips: int) -> dict[str, Any]:
    """Of pretrain.py, where they differ from its own: the paper's model in bfloat16, parameters divided among chips."""
    table = find_table(TABLES[dataset], dataset)
    setup = for_table(find_setup(dataset, "paper"), table)
    [row] = (row for row in table.rows if row.name == table.baseline)
    length = LENGTHS.get(dataset, setup.data.block_size)
    model = dataclasses.replace(
        row_config(row, setup),
        positions=positions,
        attention="auto",
        dtype="bfloat16",
        max_length=length,
        dropout=0.0,
    )
    data = dataclasses.replace(setup.data, path="", block_size=length, batch_size=ROWS[dataset] * n_chips)
    found: dict[str, Any] = {}
    for name, config in (("model", model), ("data", data), ("optimizer", setup.optimizer), ("train", setup.train)):
        default = getattr(pretraining, name.upper())
        for field, value in dataclasses.asdict(config).items():
            if value != getattr(default, field) and field != "vocab_size":
                found[f"{name}.{field}"] = value
    return found | ({"runtime.fsdp": n_chips} if n_chips > 1 else {})


def commands(dataset: str) -> Iterator[tuple[str, str, list[str]]]:
    """Of each row: its name, its target and the command."""
    for target in TARGETS.value:
        for positions in POSITIONS:
            given = options(dataset, positions, find_target(target).chips)
            flags_given = [f"--{name}={value}" for name, value in given.items()]
            report = f"--report={OUT.value}/{dataset}"
            yield positions, target, [f"--target={target}", *flags_given, f"--name={positions}", report]


def main(_: list[str]) -> None:
    for dataset in DATASETS.value:
        for name, target, given in commands(dataset):
            record = read_record(Path(OUT.value) / f"{dataset}.json") or {"rows": []}
            done = any((row["name"], row["target"]) == (name, target) for row in record["rows"])
            packages, extra = COMPILERS[find_target(target).platform]
            command = [sys.executable, str(EXPERIMENTS / "compile.py"), *given]
            if DRY_RUN.value:
                print(shlex.join(["python", "experiments/compile.py", *given]))
            elif done or not any(map(is_installed, packages)):
                print(f"{dataset}, {name}, {target}: {'done' if done else f'needs the extra [{extra}]'}", flush=True)
            else:
                print(f"{dataset}, {name}, {target}", flush=True)
                subprocess.run(command, check=False)  # 1 where it does not fit, which the record says


if __name__ == "__main__":
    launcher.run(main)
