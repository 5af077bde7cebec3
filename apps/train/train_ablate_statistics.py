"""Intervals over seeds and questions at once, and the verdict's rule.

Every seed of every arm answers the same questions. A contrast gives one number a seed and question, x[s, q]: the
weighted sum of the arms' right (1) and wrong (0) answers. Seeds and questions are both samples of many, so with mean
squares of the two-way layout without replication

    Var(mean) = (MS_seeds + max(0, MS_questions - MS_rest)) / (S Q)

with Satterthwaite's degrees of freedom, and Student's t. Three seeds that agree by chance cannot make it narrower than
`vlm_metrics.paired_difference` (or `wilson_interval`) of all answers pooled, where that applies: the hull counts.

Sources: R. L. Brennan, "Generalizability Theory" (2001), the crossed design s × q; F. E. Satterthwaite, "An approximate
distribution of estimates of variance components", Biometrics Bulletin 2 (1946).
"""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from statistics import NormalDist
from typing import Literal

import msgspec

from vlm_metrics import paired_difference, wilson_interval

Verdict = Literal["agrees", "disagrees", "undecided", "invalid"]
Answers = Sequence[Sequence[bool]]
"""Right or wrong, seed by seed and question by question."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    by_seed: list[float]
    """The mean of each seed."""
    n: int
    """Questions of one seed."""


def t_quantile(degrees: float) -> float:
    """97.5 % point of Student's t, within 1 % from 2 degrees of freedom on; whole ones, rounded down.

    Cornish–Fisher's expansion about the normal (Abramowitz and Stegun, 26.7.5); 2 has a closed form.

    Raises:
        ValueError: fewer than 2 degrees of freedom.
    """
    if degrees < 2:
        raise ValueError(f"degrees of freedom: expected at least 2, got {degrees}; take three seeds or more")
    if degrees < 3:
        return 0.95 * sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    if degrees == inf:
        return z
    nu = int(degrees)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / nu**power for power, term in enumerate(terms))


def crossed_interval(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean of values[s][q] over seeds and questions that are both random.

    Raises:
        ValueError: fewer than three seeds or two questions, or rows of several lengths.
    """
    num_seeds, num_questions = len(values), len(values[0]) if values else 0
    if num_seeds < 3 or num_questions < 2 or any(len(row) != num_questions for row in values):
        raise ValueError(
            f"values: expected three seeds or more with the same two questions or more, got {num_seeds} of "
            f"{sorted({len(row) for row in values})}; train the missing arms"
        )
    count = num_seeds * num_questions
    by_seed = [sum(row) / num_questions for row in values]
    by_question = [sum(column) / num_seeds for column in zip(*values, strict=True)]
    mean = sum(by_seed) / num_seeds
    free_seeds, free_questions = num_seeds - 1, num_questions - 1
    sum_seeds = num_questions * sum((one - mean) ** 2 for one in by_seed)
    sum_questions = num_seeds * sum((one - mean) ** 2 for one in by_question)
    sum_rest = max(0.0, sum((x - mean) ** 2 for row in values for x in row) - sum_seeds - sum_questions)
    ms_seeds, ms_questions = sum_seeds / free_seeds, sum_questions / free_questions
    ms_rest = sum_rest / (free_seeds * free_questions)
    # Without an effect of the questions the rest says nothing about the mean that the seeds do not.
    parts = [(ms_seeds, free_seeds)]
    if ms_questions > ms_rest:
        parts += [(ms_questions, free_questions), (-ms_rest, free_seeds * free_questions)]
    total = sum(square for square, _ in parts)
    spread = sum(square**2 / free for square, free in parts)
    degrees = max(float(min(free_seeds, free_questions)), total**2 / spread) if spread > 0 else inf
    half = t_quantile(max(2.0, degrees)) * sqrt(total / count)
    return Estimate(value=mean, low=mean - half, high=mean + half, by_seed=by_seed, n=num_questions)


def share(answers: Answers) -> Estimate:
    """One arm's share of right answers."""
    found = crossed_interval([[float(right) for right in row] for row in answers])
    pooled = [right for row in answers for right in row]
    low, high = wilson_interval(sum(pooled), len(pooled))
    return msgspec.structs.replace(found, low=max(0.0, min(low, found.low)), high=min(1.0, max(high, found.high)))


def contrast(answers: Mapping[str, Answers], weights: Mapping[str, float]) -> Estimate:
    """The weighted sum of arms."""
    rows = [
        [
            sum(weight * right for weight, right in zip(weights.values(), rights, strict=True))
            for rights in zip(*(answers[arm][seed] for arm in weights), strict=True)
        ]
        for seed in range(min(len(answers[arm]) for arm in weights))
    ]
    found = crossed_interval(rows)
    if sorted(weights.values()) != [-1, 1]:
        return found
    plus, minus = (next(arm for arm, weight in weights.items() if weight == sign) for sign in (1, -1))
    pooled = paired_difference(*([right for row in answers[arm] for right in row] for arm in (plus, minus)))
    return msgspec.structs.replace(found, low=min(pooled.low, found.low), high=max(pooled.high, found.high))


def judge(estimate: Estimate, expects: Literal["more", "same"], margin: float) -> Verdict:
    """Compare an interval with what is expected: `more` than 0, or the `same` but for a margin."""
    low, high = estimate.low, estimate.high
    if expects == "more":
        return "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"
    if low >= -margin and high <= margin:
        return "agrees"
    return "disagrees" if low > margin or high < -margin else "undecided"


def overall(verdicts: Sequence[Verdict], control: Verdict) -> Verdict:
    """One verdict: invalid without the control, disagrees where one part does, agrees where all do."""
    if control != "agrees":
        return "invalid"
    if "disagrees" in verdicts:
        return "disagrees"
    return "agrees" if all(verdict == "agrees" for verdict in verdicts) else "undecided"
