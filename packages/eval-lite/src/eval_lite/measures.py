"""Figures with intervals: a measure keeps its units, so that they can be drawn again, alone or in pairs with another's.

A unit is what was drawn independently: a question, a picture with all its questions, a document. A measure is a
function of the mean of its units' rows, which covers means, ratios of sums (F1, perplexity) and sums of ratios (MME):

    accuracy     rows (right,)                 value = m0
    F1           rows (tp, fp, fn)             value = 2 m0 / (2 m0 + m1 + m2)
    perplexity   rows (nats, tokens)           value = exp(m0 / m1)

Intervals cover 95 %: Wilson's for shares, else percentiles of the bootstrap (Efron 1979) over units.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import msgspec
import torch

from vlm_metrics import wilson_interval

Combine = Callable[[Sequence[float]], float]
"""Means of a measure's columns → its value; nan where they give none."""

_NUM_DRAWS = 2000
_SEED = 20
_MAX_DRAWN = 4_000_000


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Units that the value is of."""


@dataclass(frozen=True)
class Measure:
    """Units and what is made of them."""

    rows: tuple[tuple[float, ...], ...]
    """One a unit, all of the same length, in the order of the items."""
    combine: Combine | None = None
    """None for the mean of the only column."""
    scale: float = 1.0
    """What the value is multiplied by, such as 100 for CIDEr."""

    def __post_init__(self) -> None:
        """Raise ValueError for no units, or rows that are not of one length."""
        if not self.rows or len({len(row) for row in self.rows}) != 1:
            raise ValueError(
                f"measure: expected rows of one length, at least one, got {len(self.rows)} of the lengths "
                f"{sorted({len(row) for row in self.rows})}; ask something first"
            )

    @property
    def is_share(self) -> bool:
        """Whether it is a share of units."""
        return self.combine is None and self.scale == 1 and all(row in ((0.0,), (1.0,)) for row in self.rows)

    @cached_property
    def figure(self) -> Figure:
        """The value and its interval."""
        n = len(self.rows)
        means = [math.fsum(column) / n for column in zip(*self.rows, strict=True)]
        value = self._value(means)
        if self.is_share:
            low, high = wilson_interval(round(means[0] * n), n)
        else:
            low, high = _percentiles([self._value(drawn) for drawn in _drawn_means(self._matrix(), n)])
        return Figure(value=value, low=low, high=high, n=n)

    def less(self, other: "Measure") -> Figure:
        """This measure's value less another's of the same units, drawn in pairs.

        Raises:
            ValueError: another number of units.
        """
        n = len(self.rows)
        if len(other.rows) != n:
            raise ValueError(
                f"difference: expected the same units on both sides, got {n} and {len(other.rows)}; ask both the same"
            )
        width = len(self.rows[0])
        both = torch.cat([self._matrix(), other._matrix()], dim=1)
        drawn = [self._value(means[:width]) - other._value(means[width:]) for means in _drawn_means(both, n)]
        low, high = _percentiles(drawn)
        return Figure(value=self.figure.value - other.figure.value, low=low, high=high, n=n)

    def _matrix(self) -> torch.Tensor:
        return torch.tensor(self.rows, dtype=torch.float64)

    def _value(self, means: Sequence[float]) -> float:
        return self.scale * (means[0] if self.combine is None else self.combine(means))


def mean_of(values: Sequence[float | bool], *, scale: float = 1.0) -> Measure:
    """The mean of a number a unit."""
    return Measure(tuple((float(value),) for value in values), scale=scale)


def f1_of(predicted: Sequence[bool], actual: Sequence[bool]) -> Measure:
    """F1 of finding the True ones; 0 where neither side has any."""
    rows = tuple(
        (float(p and a), float(p and not a), float(a and not p)) for p, a in zip(predicted, actual, strict=True)
    )
    return Measure(rows, lambda m: 2 * m[0] / (2 * m[0] + m[1] + m[2]) if m[0] else 0.0)


def mean_of_groups(values: Sequence[float | bool], groups: Sequence[str]) -> Measure:
    """The mean over groups of each group's mean, each group counting the same."""
    rows, _ = _by_group(values, groups)
    return Measure(rows, lambda means: fmean(_group_means(means)))


def sum_of_groups(values: Sequence[float | bool], groups: Sequence[str]) -> Measure:
    """The sum over groups of each group's mean."""
    rows, _ = _by_group(values, groups)
    return Measure(rows, lambda means: math.fsum(_group_means(means)))


def _by_group(values: Sequence[float | bool], groups: Sequence[str]) -> tuple[tuple[tuple[float, ...], ...], int]:
    """Two columns a group: the value, and 1 for being of it."""
    places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    rows: list[tuple[float, ...]] = []
    for value, group in zip(values, groups, strict=True):
        row = [0.0] * (2 * len(places))
        row[2 * places[group] : 2 * places[group] + 2] = [float(value), 1.0]
        rows.append(tuple(row))
    return tuple(rows), len(places)


def _group_means(means: Sequence[float]) -> list[float]:
    """Each group's mean; a group that a draw has not hit is not in it."""
    return [value / count for value, count in zip(means[::2], means[1::2], strict=True) if count]


def _drawn_means(matrix: torch.Tensor, n: int) -> list[list[float]]:
    """Column means of `_NUM_DRAWS` samples of n rows, drawn with replacement; the same draws for the same n."""
    generator = torch.Generator().manual_seed(_SEED)
    means: list[list[float]] = []
    per_round = max(1, min(_NUM_DRAWS, _MAX_DRAWN // n))
    while len(means) < _NUM_DRAWS:
        num_draws = min(per_round, _NUM_DRAWS - len(means))
        drawn = torch.randint(n, (num_draws, n), generator=generator)
        counts = torch.zeros(num_draws, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(num_draws, n))
        means += (counts @ matrix / n).tolist()
    return means


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan, math.nan
    last = len(ordered) - 1
    return ordered[math.floor(0.025 * last)], ordered[math.ceil(0.975 * last)]
