"""The paper's ablations.

python -m experiments.ablate --costs     what Table 1's rows cost: parameters, FLOPs, memory
"""

from __future__ import annotations

from dataclasses import replace

from absl import flags

from experiments import launcher
from experiments.reports import markdown_table
from experiments.tables import TABLE_1
from hourglass_jax import UsageError
from hourglass_jax.costs import activation_bytes, cache_bytes, count_parameters, forward_flops

LENGTH = 2048  # tokens of a sequence, as in the paper's enwik8 ablations

COSTS = flags.DEFINE_boolean("costs", False, "Print what the rows of Table 1 cost.")


def costs_table() -> str:
    """Table 1 as Markdown: parameters, ours, the paper's and their ratio, then the costs of one sequence.

    Activations with all of them kept, as in the paper, and as the configuration is run, where deep stacks are
    computed again.
    """
    header = ("hierarchy", "parameters", "paper", "ratio", "forward GFLOPs", "activations MB", "as run MB", "cache MB")
    rows = []
    for row in TABLE_1:
        config = row.config
        millions = count_parameters(config) / 1e6
        gigaflops = sum(forward_flops(config, LENGTH).values()) / 1e9
        kept = activation_bytes(replace(config, max_unrolled_layers=100), LENGTH) / 1e6
        as_run = activation_bytes(config, LENGTH) / 1e6
        # Room for the whole groups that hold the sequence: a cache is a multiple of the total factor.
        factor = config.parsed_hierarchy.total_factor
        cache = cache_bytes(config, -(-LENGTH // factor) * factor) / 1e6
        rows.append(
            (
                row.hierarchy,
                f"{millions:.2f}M",
                f"{row.parameters_millions}M",
                f"{millions / row.parameters_millions:.3f}",
                f"{gigaflops:.0f}",
                f"{kept:.0f}",
                f"{as_run:.0f}",
                f"{cache:.1f}",
            )
        )
    return markdown_table(header, rows)


def main(_: list[str]) -> None:
    if not COSTS.value:
        raise UsageError("nothing to do; pass --costs")
    print(costs_table())


if __name__ == "__main__":
    launcher.run(main)
