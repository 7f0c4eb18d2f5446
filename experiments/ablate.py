"""The paper's ablations.

python -m experiments.ablate --costs     parameters of Table 1's rows, ours and the paper's
"""

from __future__ import annotations

from absl import flags

from experiments import launcher
from experiments.reports import markdown_table
from experiments.tables import TABLE_1
from hourglass_jax import UsageError
from hourglass_jax.costs import count_parameters

COSTS = flags.DEFINE_boolean("costs", False, "Print what the rows of Table 1 cost.")


def costs_table() -> str:
    """Table 1's parameter counts as Markdown: ours, the paper's, their ratio."""
    rows = []
    for row in TABLE_1:
        millions = count_parameters(row.config) / 1e6
        ratio = millions / row.parameters_millions
        rows.append((row.hierarchy, f"{millions:.2f}M", f"{row.parameters_millions}M", f"{ratio:.3f}"))
    return markdown_table(("hierarchy", "parameters", "paper", "ratio"), rows)


def main(_: list[str]) -> None:
    if not COSTS.value:
        raise UsageError("nothing to do; pass --costs")
    print(costs_table())


if __name__ == "__main__":
    launcher.run(main)
