"""HallusionBench's three accuracies.

Source: arXiv:2310.14566; tianyi-lab/HallusionBench, utils.py.
"""

from collections.abc import Sequence
from typing import NamedTuple


class HallusionItem(NamedTuple):
    """One question about one figure, named as in the benchmark's file, and whether it was answered right."""

    category: str
    """"VD" (visual dependent) or "VS" (visual supplement)."""
    subcategory: str
    set_id: str
    figure_id: str
    """"0" is the original figure; with "VS" it is no figure at all."""
    question_id: str
    correct: bool


class HallusionScores(NamedTuple):
    """Three shares in [0, 1]."""

    a_acc: float
    """aAcc: questions right."""
    q_acc: float
    """qAcc: questions right with every figure they are asked about."""
    f_acc: float
    """fAcc: figures about which every question is right; "VS" without a figure is left out."""


def hallusion_scores(items: Sequence[HallusionItem]) -> HallusionScores:
    """Score HallusionBench.

    Right is for the caller to tell: the official evaluation has GPT-4 compare the texts and, for "VS" without a figure,
    also takes "uncertain"; harnesses without a judge compare `parse_yes_no` with the answer.

    Raises:
        ValueError: no items, a question that comes twice, or no figures.
    """
    rows = [tuple(map(str, item[:5])) for item in items]
    if not rows or len(set(rows)) != len(rows):
        raise ValueError(
            f"items: expected at least one, each question and figure once, got {len(rows)} with {len(set(rows))} that "
            "differ; score each run by itself"
        )
    by_question: dict[tuple[str, ...], bool] = {}
    by_figure: dict[tuple[str, ...], bool] = {}
    for item, (category, subcategory, set_id, figure_id, question_id) in zip(items, rows, strict=True):
        question = (category, subcategory, set_id, question_id)
        by_question[question] = by_question.get(question, True) and item.correct
        if category == "VS" and figure_id == "0":
            continue
        figure = (category, subcategory, set_id, figure_id)
        by_figure[figure] = by_figure.get(figure, True) and item.correct
    if not by_figure:
        raise ValueError('items: expected some with a figure, got only "VS" with figure 0; add the others')
    return HallusionScores(
        a_acc=sum(item.correct for item in items) / len(items),
        q_acc=sum(by_question.values()) / len(by_question),
        f_acc=sum(by_figure.values()) / len(by_figure),
    )
