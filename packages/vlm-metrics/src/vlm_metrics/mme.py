"""MME: two yes/no questions on each picture, ten subtasks of perception and four of cognition.

Source: arXiv:2306.13394 §2; BradyFU/Awesome-Multimodal-Large-Language-Models, tools/eval_tool/calculation.py.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

MME_PERCEPTION: tuple[str, ...] = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
"""Subtasks of perception; at most 2000 together."""
MME_COGNITION: tuple[str, ...] = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
"""Subtasks of cognition; at most 800 together."""


def mme_answer(text: str) -> Literal["yes", "no"] | None:
    """Read an answer as MME does: yes or no within its first four characters, in any case; a lone y or n; else None.

    "yes" is looked for first, and within words, so that "Not" and "know" are "no".
    """
    raise NotImplementedError


class MmeItem(NamedTuple):
    """One question and whether it was answered right."""

    subtask: str
    image: str
    """What names the picture within its subtask."""
    correct: bool


class MmeSubtask(NamedTuple):
    """Figures of one subtask, in percent."""

    accuracy: float
    accuracy_plus: float
    """acc+: pictures with both questions right."""
    score: float
    """Sum of the two, at most 200."""
    num_images: int


class MmeScores(NamedTuple):
    """Figures of MME."""

    subtasks: dict[str, MmeSubtask]
    perception: float
    """Sum of the scores of the subtasks of `MME_PERCEPTION` that were run."""
    cognition: float
    """Sum of the scores of the subtasks of `MME_COGNITION` that were run."""


def mme_scores(items: Sequence[MmeItem]) -> MmeScores:
    """Score MME.

    Raises:
        ValueError: no items, a picture without exactly two questions, or an unknown subtask.
    """
    raise NotImplementedError
