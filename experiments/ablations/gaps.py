"""Gap between two learning curves: at equal characters, at equal FLOPs, and its trend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.ablations.curves import LOSSES, Leg

TREND = 4  # a trend starts at this share of the most characters
Record = dict[str, Any]
Reading = dict[str, Any]  # row, seed, point, decayed, characters, and a figure


def paired(plain: Leg, rival: Leg) -> tuple[float, float]:
    """Return the mean of the rival's minus the plain model's bits on the same sequences, and its standard error."""
    losses = [np.load(leg.job.directory / LOSSES).astype(np.float64) / math.log(2) for leg in (plain, rival)]
    difference = losses[1] - losses[0]
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def equal_flops(record: Record, plain: str, gap: Reading) -> float | None:
    """Return the rival's bits minus the plain model's at the same FLOPs; None if that has fewer than 2 readings.

    The plain model's bits are interpolated between its two nearest readings, linearly in log characters.
    """
    ours = [reading for reading in record["readings"] if reading["row"] == plain and alike(reading, gap)]
    if len(ours) < 2:
        return None
    flops = [record["rows"][name]["character_flops"] for name in (plain, gap["row"])]
    x = np.log([reading["characters"] for reading in ours])
    y = [reading["bpc"] for reading in ours]
    wanted = math.log(gap["characters"] * flops[1] / flops[0])
    i = int(np.clip(np.searchsorted(x, wanted), 1, len(x) - 1))
    reached = y[i - 1] + (y[i] - y[i - 1]) * (wanted - x[i - 1]) / (x[i] - x[i - 1])
    return find(record["readings"], gap)["bpc"] - reached


def alike(a: Reading, b: Reading) -> bool:
    """Return whether both have the same seed, and both or neither are decayed."""
    return (a["seed"], a["decayed"]) == (b["seed"], b["decayed"])


def find(readings: Sequence[Reading], like: Reading, row: str = "") -> Reading | None:
    """Return the reading of a row at the seed and point of `like`."""
    wanted = row or like["row"], like["characters"]
    return next((each for each in readings if alike(each, like) and (each["row"], each["characters"]) == wanted), None)


def gaps_of(record: Record, rival: str, decayed: bool) -> list[Reading]:
    """Return the gaps of a row, ordered by characters."""
    gaps = [gap for gap in record["gaps"] if gap["row"] == rival and gap["decayed"] == decayed]
    return sorted(gaps, key=lambda gap: gap["characters"])


class Trend(NamedTuple):
    """A line through gaps: bits at `start` characters, and bits added per doubling of the characters."""

    start: int
    level: float
    slope: float
    standard_error: float  # of the slope

    def at(self, characters: float) -> float:
        return self.level + self.slope * math.log2(characters / self.start)


def trend(gaps: Sequence[Reading]) -> Trend | None:
    """Fit the late gaps, weighted by their standard errors; None if all have the same number of characters."""
    late = [gap for gap in gaps if gap["characters"] >= gaps[-1]["characters"] / TREND]
    if len({gap["characters"] for gap in late}) < 2:
        return None
    start = late[0]["characters"]
    doublings = np.log2([gap["characters"] / start for gap in late])
    weights = [1 / gap["standard_error"] for gap in late]
    line, covariance = np.polyfit(doublings, [gap["difference"] for gap in late], 1, w=weights, cov="unscaled")
    return Trend(start, float(line[1]), float(line[0]), math.sqrt(covariance[0, 0]))
