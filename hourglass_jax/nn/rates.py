"""Statistics of variable boundaries, and the losses of learned ones."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from hourglass_jax.nn.event_groups import EventGroups
from hourglass_jax.nn.groups import Groups
from hourglass_jax.nn.learned import LearnedBoundaries, mean


def boundary_terms(
    levels: Iterable[tuple[nnx.Module, Groups]], weights: jax.Array, entropy: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the sum of the losses of learned boundaries, with their papers' weights, and statistics by name.

    levels: the rule and the groups of each shortening, outermost first.
    weights: float [B, L], weight of each token.
    entropy: float [B, L], entropy of the prediction at each token.

    Statistics; from the second shortening on, names end in its number, as in boundary_rate_2:
    boundary_rate: boundaries per position.
    boundary_spread: standard deviation of the rate over rows.
    boundary_suppressed: share of boundaries that the limit dropped.
    boundary_loss: the loss of a learned rule, without its weight.
    """
    loss = jnp.zeros((), weights.dtype)
    figures: dict[str, jax.Array] = {}
    for number, (rule, groups) in enumerate(levels, 1):
        if isinstance(groups, EventGroups):
            named = rates(groups, weights)
            if isinstance(rule, LearnedBoundaries):
                named["boundary_loss"] = rule.loss(groups, weights, entropy)
                loss += rule.loss_weight * named["boundary_loss"]
            figures |= {name if number == 1 else f"{name}_{number}": value for name, value in named.items()}
        at_events = groups.select(groups.shift_right(jnp.stack([weights, entropy], axis=-1)))
        weights, entropy = at_events[..., 0], at_events[..., 1]
        weights = jnp.where(jnp.arange(weights.shape[1], dtype=jnp.int32)[None] < groups.count[:, None], weights, 0)
    return loss, figures


def rates(groups: EventGroups, weights: jax.Array) -> dict[str, jax.Array]:
    """Return the statistics of one shortening, see `boundary_terms`."""
    fired, wanted = (mean(events, weights) for events in (groups.fires, groups.decision.boundary_mask))
    of_row = (groups.fires.astype(weights.dtype) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
    return {
        "boundary_rate": fired,
        "boundary_spread": of_row.std(),
        "boundary_suppressed": (wanted - fired) / jnp.maximum(wanted, 1e-9),
    }
