"""MME: two yes/no questions on each picture, ten subtasks of perception and four of cognition.

Source: arXiv:2306.13394; lmms-eval 75571cf, tasks/mme/utils.py, which takes over the official reading of answers.
"""

from collections.abc import Mapping, Sequence
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

    "yes" is looked for first, and within words, so that "Not" and "know" are "no". Full stops do not count.
    """
    folded = text.lower().strip().replace(".", "")
    if len(folded) == 1:
        return "yes" if folded == "y" else "no" if folded == "n" else None
    opening = folded[:4]
    if "yes" in opening:
        return "yes"
    return "no" if "no" in opening else None


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
    right: dict[str, dict[str, list[bool]]] = {}
    for item in items:
        right.setdefault(item.subtask, {}).setdefault(item.image, []).append(item.correct)
    _check_questions(right)
    subtasks: dict[str, MmeSubtask] = {}
    for name, images in right.items():
        accuracy = 100 * sum(map(sum, images.values())) / (2 * len(images))
        accuracy_plus = 100 * sum(map(all, images.values())) / len(images)
        subtasks[name] = MmeSubtask(accuracy, accuracy_plus, accuracy + accuracy_plus, len(images))
    return MmeScores(
        subtasks,
        perception=sum(subtasks[name].score for name in MME_PERCEPTION if name in subtasks),
        cognition=sum(subtasks[name].score for name in MME_COGNITION if name in subtasks),
    )


def _check_questions(right: Mapping[str, Mapping[str, Sequence[bool]]]) -> None:
    if not right:
        raise ValueError("items: expected at least one, got none; answer something first")
    for name, images in right.items():
        if name not in MME_PERCEPTION + MME_COGNITION:
            raise ValueError(f"subtask: expected one of MME's fourteen, got {name!r}; name it as the benchmark does")
        for image, answers in images.items():
            if len(answers) != 2:
                raise ValueError(
                    f"{name}, {image}: expected two questions on a picture, got {len(answers)}; add what is missing, "
                    "or name pictures apart"
                )
