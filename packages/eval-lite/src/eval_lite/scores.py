"""Predictions to figures: accuracy by group with its interval and the figure to beat."""

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from vlm_metrics import wilson_interval

from .prediction import Prediction


class GroupScore(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Accuracy of one group."""

    accuracy: float
    low: float
    """Lower end of the 95 % Wilson interval."""
    high: float
    """Upper end."""
    baseline: float
    """Accuracy of always giving the most frequent answer."""
    n: int
    skipped: dict[str, int] = {}
    """Items among the `n` that could not be asked, by reason; they count as wrong."""


def score_groups(predictions: Iterable[Prediction]) -> dict[str, GroupScore]:
    """Accuracy by group, in order of first appearance."""
    grouped: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        grouped.setdefault(prediction.group, []).append(prediction)
    scores: dict[str, GroupScore] = {}
    for name, members in grouped.items():
        right, n = sum(member.is_correct for member in members), len(members)
        low, high = wilson_interval(right, n)
        skipped = Counter(member.skip_reason for member in members if member.skip_reason)
        most_frequent = Counter(member.answer for member in members).most_common(1)[0][1]
        scores[name] = GroupScore(
            accuracy=right / n,
            low=low,
            high=high,
            baseline=most_frequent / n,
            n=n,
            skipped=dict(sorted(skipped.items())),
        )
    return scores


def macro_accuracy(scores: Mapping[str, GroupScore]) -> float:
    """Mean of the groups' accuracies, each group counting the same.

    Raises:
        ValueError: no groups.
    """
    if not scores:
        raise ValueError("scores: expected at least one group, got none; predict something first")
    return sum(score.accuracy for score in scores.values()) / len(scores)
