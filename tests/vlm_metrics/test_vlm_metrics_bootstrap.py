import random
from itertools import product
from statistics import fmean, median

import numpy as np
import pytest

from vlm_metrics import bootstrap_interval, paired_bootstrap, paired_difference, wilson_interval


def test_bootstrap_interval_nears_all_resamples_of_three_items() -> None:
    # All 27 resamples are known; the percentiles of 1,000 drawn ones lie on the same means.
    items = [0.0, 0.4, 1.0]
    means = sorted(fmean(drawn) for drawn in product(items, repeat=3))
    result = bootstrap_interval(items, random.Random(0))
    assert result.value == fmean(items)
    assert result.n == 3
    assert result.low == pytest.approx(means[0])
    assert result.high == pytest.approx(means[-1])


def test_bootstrap_interval_equals_numpy_on_the_same_draws() -> None:
    draw = random.Random(5)
    items = [draw.random() for _ in range(31)]
    result = bootstrap_interval(items, random.Random(1), num_resamples=97)
    rng = random.Random(1)
    drawn = [fmean(rng.choices(items, k=31)) for _ in range(97)]
    assert (result.low, result.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_bootstrap_interval_of_a_share_is_near_wilsons() -> None:
    result = bootstrap_interval([1.0] * 120 + [0.0] * 80, random.Random(0))
    assert (result.low, result.high) == pytest.approx(wilson_interval(120, 200), abs=0.015)


def test_bootstrap_interval_of_groups_is_wider_than_of_their_items() -> None:
    groups = [[1.0] * 5] * 10 + [[0.0] * 5] * 10
    of_items = bootstrap_interval([score for group in groups for score in group], random.Random(0))
    of_groups = bootstrap_interval(
        groups, random.Random(0), statistic=lambda drawn: fmean(score for group in drawn for score in group)
    )
    assert of_groups.value == of_items.value
    assert of_groups.high - of_groups.low > 1.8 * (of_items.high - of_items.low)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, rng = random.Random(123), random.Random(7)
    results = [bootstrap_interval([draw.gauss(0, 1) for _ in range(40)], rng, num_resamples=200) for _ in range(200)]
    # Percentile intervals of 40 items cover a little less than 95 %; the standard error here is 1.8 %.
    assert 0.88 < sum(result.low <= 0 <= result.high for result in results) / 200 < 0.98


def test_paired_bootstrap_leaves_out_what_is_hard_about_items() -> None:
    # b is a, less 0.1 everywhere: no doubt about the difference, much about either mean.
    draw = random.Random(3)
    a = [draw.random() for _ in range(50)]
    result = paired_bootstrap(a, [score - 0.1 for score in a], random.Random(0))
    assert result == pytest.approx((0.1, 0.1, 0.1))


def test_paired_bootstrap_of_shares_is_near_the_formula() -> None:
    draw = random.Random(4)
    a = [draw.random() < 0.7 for _ in range(400)]
    b = [x if draw.random() < 0.8 else draw.random() < 0.4 for x in a]
    ours, formula = paired_bootstrap([*map(float, a)], [*map(float, b)], random.Random(0)), paired_difference(a, b)
    assert ours.difference == pytest.approx(formula.difference)
    assert (ours.low, ours.high) == pytest.approx((formula.low, formula.high), abs=0.012)


def test_paired_bootstrap_draws_the_same_items_for_both_runs() -> None:
    a = [1.0, 2.0, 4.0, 8.0]
    assert paired_bootstrap(a, a, random.Random(0), statistic=median) == (0, 0, 0)


def test_bootstrap_with_the_same_seed_is_the_same() -> None:
    items = [0.1, 0.5, 0.9, 0.3]
    assert bootstrap_interval(items, random.Random(9)) == bootstrap_interval(items, random.Random(9))


def test_bootstrap_of_nothing_or_too_few_resamples_raises() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        bootstrap_interval([], random.Random(0))
    with pytest.raises(ValueError, match="at least 40"):
        bootstrap_interval([1.0], random.Random(0), num_resamples=39)
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_bootstrap([1.0], [1.0, 0.0], random.Random(0))
