"""Accuracy by skill."""

from collections.abc import Sequence

from .bootstrap import Estimate
from .intervals import wilson_interval


def skill_accuracies(skills: Sequence[str], correct: Sequence[bool]) -> dict[str, Estimate]:
    """Accuracy of each skill with its 95 % Wilson interval, in order of first appearance.

    Item i asks for `skills[i]` and was answered as `correct[i]` tells.

    Raises:
        ValueError: different lengths.
    """
    if len(skills) != len(correct):
        raise ValueError(
            f"skills: expected one for each item, got {len(skills)} skills and {len(correct)} items; pair them first"
        )
    by_skill: dict[str, list[bool]] = {}
    for skill, is_right in zip(skills, correct, strict=True):
        by_skill.setdefault(skill, []).append(is_right)
    return {
        skill: Estimate(sum(items) / len(items), *wilson_interval(sum(items), len(items)), n=len(items))
        for skill, items in by_skill.items()
    }
