"""Intervals by the bootstrap, for figures that are no plain share: means of scores, F1, MME's sums.

Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979). Intervals are
percentile intervals.
"""

import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar, overload

from .intervals import PairedDifference

Item = TypeVar("Item")


class Estimate(NamedTuple):
    """A figure with its 95 % interval and the number of items it is of."""

    value: float
    low: float
    high: float
    n: int


@overload
def bootstrap_interval(items: Sequence[float], rng: random.Random, *, num_resamples: int = 1000) -> Estimate: ...
@overload
def bootstrap_interval(
    items: Sequence[Item],
    rng: random.Random,
    *,
    statistic: Callable[[Sequence[Item]], float],
    num_resamples: int = 1000,
) -> Estimate: ...
def bootstrap_interval(
    items: Sequence[Any],
    rng: random.Random,
    *,
    statistic: Callable[[Sequence[Any]], float] = fmean,
    num_resamples: int = 1000,
) -> Estimate:
    """Mean of the items, or another `statistic`, with its 95 % percentile interval over resamples of the items.

    Items are what was drawn independently: where questions come in groups (MME's pictures, MMBench's rotations), hand
    in the groups and a statistic over groups.

    Raises:
        ValueError: no items, or fewer than 40 resamples.
    """
    if not items:
        raise ValueError("items: expected at least one, got none; score something first")
    resampled = [statistic(rng.choices(items, k=len(items))) for _ in range(_checked(num_resamples))]
    return Estimate(statistic(items), *_percentiles(resampled), n=len(items))


@overload
def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], rng: random.Random, *, num_resamples: int = 1000
) -> PairedDifference: ...
@overload
def paired_bootstrap(
    a: Sequence[Item],
    b: Sequence[Item],
    rng: random.Random,
    *,
    statistic: Callable[[Sequence[Item]], float],
    num_resamples: int = 1000,
) -> PairedDifference: ...
def paired_bootstrap(
    a: Sequence[Any],
    b: Sequence[Any],
    rng: random.Random,
    *,
    statistic: Callable[[Sequence[Any]], float] = fmean,
    num_resamples: int = 1000,
) -> PairedDifference:
    """Mean of `a` less mean of `b`, two runs on the same items, with its 95 % percentile interval.

    Each resample draws the same items for both runs, so what is hard about an item is left out of the interval. The
    runs differ if the interval leaves out 0.

    Raises:
        ValueError: different lengths, no items, or fewer than 40 resamples.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b: expected the same items, at least one, got {len(a)} and {len(b)}; pair them first")
    places = range(len(a))
    resampled: list[float] = []
    for _ in range(_checked(num_resamples)):
        drawn = rng.choices(places, k=len(a))
        resampled.append(statistic([a[i] for i in drawn]) - statistic([b[i] for i in drawn]))
    return PairedDifference(statistic(a) - statistic(b), *_percentiles(resampled))


def _checked(num_resamples: int) -> int:
    if num_resamples < 40:
        raise ValueError(
            f"num_resamples: expected at least 40, one beyond each end, got {num_resamples}; 1000 is usual"
        )
    return num_resamples


def _percentiles(values: list[float]) -> tuple[float, float]:
    """The values that leave 2.5 % of all on either side, between neighbours by straight lines (numpy's default)."""
    ordered = sorted(values)
    low, high = ((len(ordered) - 1) * share for share in (0.025, 0.975))
    return _between(ordered, low), _between(ordered, high)


def _between(ordered: list[float], place: float) -> float:
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
