"""The paper's hierarchy notation, `N1@f1 N2@f2 ...` (section 2): parse, validate, print, lengths per level."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hourglass_jax.errors import UsageError


@dataclass(frozen=True)
class Level:
    """One level of an Hourglass.

    pre_layers, post_layers: layers before the shortening and after the upsampling (the innermost level has
        only `pre_layers`).
    factor: total shortening of this level's sequence, in tokens per position.
    shorten_factor: k, the ratio of the next level's factor to this one; 1 at the innermost level.
    """

    pre_layers: int
    post_layers: int
    factor: int
    shorten_factor: int


@dataclass(frozen=True)
class Hierarchy:
    """Stages (n_layers, total shorten factor) in the order of computation.

    `Hierarchy.parse("2@1 8@3 2@1")` has 2 layers on the tokens, 8 at a third of the length, 2 on the tokens.
    Raises UsageError unless the factors rise and fall through the same values.
    """

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        layers = [n for n, _ in self.stages]
        factors = [f for _, f in self.stages]
        depth = len(factors) // 2
        up = factors[: depth + 1]

        def fail(problem: str, advice: str) -> None:
            raise UsageError(f"hierarchy '{self}': {problem}; {advice}")

        if not factors or factors[0] != 1:
            fail("the first stage must be at factor 1 (the tokens)", "e.g. '2@1 8@3 2@1'")
        if factors[-1] != 1:
            fail("the last stage must return to factor 1", f"e.g. '{self} {layers[0]}@1'")
        if len(factors) % 2 == 0 or factors != factors[::-1]:
            fail("factors must go up and come down through the same values", "e.g. '2@1 1@2 4@4 1@2 2@1'")
        if any(low >= high for low, high in itertools.pairwise(up)):
            fail("factors must grow towards the middle stage", "e.g. '2@1 1@2 4@4 1@2 2@1'")
        for low, high in itertools.pairwise(up):
            if high % low:
                fail(f"factor {low} does not divide the next factor {high}", f"choose a multiple of {low}")
        if min(layers) < 0 or sum(layers) == 0:
            fail("there must be at least one layer, and no negative number of layers", "e.g. '2@1 8@3 2@1'")

    @classmethod
    def parse(cls, text: str | Hierarchy) -> Hierarchy:
        """Parse the paper's notation: stages separated by spaces."""
        if isinstance(text, Hierarchy):
            return text
        stages = []
        for stage in str(text).split():
            match = re.fullmatch(r"(\d+)@([1-9]\d*)", stage)
            if not match:
                raise UsageError(
                    f"hierarchy '{text}': cannot read '{stage}'; a stage is layers@factor, e.g. '2@1 8@3 2@1'"
                )
            stages.append((int(match[1]), int(match[2])))
        return cls(tuple(stages))

    @classmethod
    def from_factors(cls, factors: Sequence[int], *, relative: bool = False) -> Hierarchy:
        """Build a hierarchy from the original project's list of layers and factors, mirrored on the way up.

        `[3, 1, 8, 4]` is `3@1 8@4 3@1`. Factors are total; with `relative=True` each one multiplies those before it,
        as in the original project's code.
        """
        factors = list(factors)
        if len(factors) < 2 or len(factors) % 2:
            raise UsageError(f"factors {factors}: give pairs of layers and factor, e.g. 3,1,8,4 for '3@1 8@4 3@1'")
        layers, totals = factors[::2], factors[1::2]
        if relative:
            totals = [math.prod(totals[: i + 1]) for i in range(len(totals))]
        down = list(zip(layers, totals, strict=True))
        return cls(tuple(down + down[-2::-1]))

    def __str__(self) -> str:
        return " ".join(f"{n}@{f}" for n, f in self.stages)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels, outermost first."""
        depth = len(self.stages) // 2
        levels = []
        for i in range(depth + 1):
            layers, factor = self.stages[i]
            inner = i == depth
            levels.append(
                Level(
                    pre_layers=layers,
                    post_layers=0 if inner else self.stages[-1 - i][0],
                    factor=factor,
                    shorten_factor=1 if inner else self.stages[i + 1][1] // factor,
                )
            )
        return tuple(levels)

    def with_shorten_factor(self, k: int) -> Hierarchy:
        """Return the same layers with another factor. Raises UsageError unless there is exactly one shortening."""
        if len(self.stages) != 3:
            raise UsageError(
                f"hierarchy '{self}': a shorten factor can be set only for exactly one shortening, e.g. '2@1 8@3 2@1'"
            )
        (pre, _), (inner, _), (post, _) = self.stages
        return Hierarchy(((pre, 1), (inner, k), (post, 1)))

    @property
    def total_factor(self) -> int:
        """Tokens per position of the innermost level."""
        return max(f for _, f in self.stages)

    def lengths(self, length: int) -> tuple[int, ...]:
        """Return the number of positions of each level, outermost first; incomplete groups count as one."""
        return tuple(-(-length // level.factor) for level in self.levels)
