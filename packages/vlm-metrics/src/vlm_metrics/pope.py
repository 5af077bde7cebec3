"""POPE: is an object in the picture? Questions about objects that are there and that are not.

Source: arXiv:2305.10355; RUCAIBox/POPE, evaluate.py (LLaVA's llava/eval/eval_pope.py has the same rule).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple


def pope_answer(text: str) -> Literal["yes", "no"]:
    """Read an answer as POPE does: "no" if one of the words No, no, not is in the first sentence, else "yes".

    Words are parted by spaces alone, commas are dropped, and case counts, so "NO", "nope" and "There isn't one" are
    "yes".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


class PopeScores(NamedTuple):
    """Figures of POPE; "yes" is the positive class. All are shares in [0, 1]."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    """Share of "yes" among the predictions."""


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """Score answers against the labels "yes" and "no", reading each answer with `pope_answer`.

    Where precision or recall has nothing to divide by, it is 0, and so is f1 (the official code stops there). To score
    answers by another reading, hand in "yes" and "no"; neither is changed.

    Raises:
        ValueError: different lengths, none at all, or another label.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(
            f"predictions: expected one for each label and at least one, got {len(predictions)} predictions and "
            f"{len(labels)} labels; pair them first"
        )
    if unknown := set(labels) - {"yes", "no"}:
        raise ValueError(f'labels: expected "yes" or "no", got {sorted(unknown)}; fold their case')
    pairs = [(pope_answer(text) == "yes", label == "yes") for text, label in zip(predictions, labels, strict=True)]
    tp, said, there = (sum(p and a for p, a in pairs), sum(p for p, _ in pairs), sum(a for _, a in pairs))
    return PopeScores(
        accuracy=sum(p == a for p, a in pairs) / len(pairs),
        precision=tp / said if tp else 0.0,
        recall=tp / there if tp else 0.0,
        f1=2 * tp / (said + there) if tp else 0.0,
        yes_ratio=said / len(pairs),
    )
