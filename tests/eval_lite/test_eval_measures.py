"""Figures with intervals: by hand, and against the plain bootstrap of vlm-metrics."""

import math
import random
from statistics import fmean

import pytest

from eval_lite import Measure, f1_of, mean_of, mean_of_groups, sum_of_groups
from vlm_metrics import binary_f1, bootstrap_interval, wilson_interval


def test_a_share_has_wilsons_interval() -> None:
    figure = mean_of([True, False, True, True]).figure
    assert (figure.value, figure.n) == (0.75, 4)
    assert (figure.low, figure.high) == wilson_interval(3, 4)


def test_a_mean_has_the_bootstraps_interval_of_the_other_implementation() -> None:
    values = [random.Random(index).random() for index in range(53)]
    figure = mean_of(values, scale=100.0).figure
    other = bootstrap_interval(values, random.Random(1), num_resamples=4000)
    assert figure.value == pytest.approx(100 * fmean(values), rel=1e-12)
    # Two draws of a few thousand differ by about a fiftieth of the interval's width.
    width = 100 * (other.high - other.low)
    assert figure.low == pytest.approx(100 * other.low, abs=0.06 * width)
    assert figure.high == pytest.approx(100 * other.high, abs=0.06 * width)
    assert mean_of(values, scale=100.0).figure == figure


def test_f1_is_that_of_the_scorer() -> None:
    said, true = [True, True, False, False, True], [True, False, False, True, True]
    expected = binary_f1(["no" if one else "yes" for one in said], ["no" if one else "yes" for one in true]).f1
    assert f1_of(said, true).figure.value == pytest.approx(expected)
    assert f1_of([False], [True]).figure.value == 0


def test_means_and_sums_of_groups_by_hand() -> None:
    values, groups = [1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "a"]
    assert mean_of_groups(values, groups).figure.value == pytest.approx((2 / 3 + 1) / 2)
    assert sum_of_groups([112.5, 200.0], ["a", "b"]).figure.value == pytest.approx(312.5)


def test_perplexity_is_a_ratio_of_sums() -> None:
    measure = Measure(((2.0, 4.0), (6.0, 4.0)), lambda means: math.exp(means[0] / means[1]))
    figure = measure.figure
    assert figure.value == pytest.approx(math.e)
    assert figure.low == pytest.approx(math.exp(0.5))
    assert figure.high == pytest.approx(math.exp(1.5))


def test_a_difference_draws_the_same_units_for_both() -> None:
    hard = [float(index % 2) for index in range(40)]
    better = [min(1.0, value + 0.25) for value in hard]
    difference = mean_of(better).less(mean_of(hard))
    assert difference.value == pytest.approx(0.125)
    # Unpaired, the interval would be some 0.4 wide and hold 0.
    assert 0.08 < difference.low < 0.125 < difference.high < 0.17
    same = mean_of(hard).less(mean_of(hard))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_measures_of_nothing_and_of_other_units_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_of([])
    with pytest.raises(ValueError, match="same units"):
        mean_of([1.0]).less(mean_of([1.0, 0.0]))
