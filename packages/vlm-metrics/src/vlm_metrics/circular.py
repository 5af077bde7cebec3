"""Circular evaluation of MMBench: a choice question counts only if it is answered in every rotation of its options.

Source: arXiv:2307.06281; VLMEvalKit e8e78f0, vlmeval/dataset/utils/multiple_choice.py.
"""

from collections.abc import Hashable, Sequence

# MMBench's files give rotation k of question i the index i + k * 10**6.
_INDEX_STEP = 1_000_000


def circular_question(index: int) -> int:
    """Question that a row of an MMBench file belongs to, from its index: rotations are a million apart."""
    return index % _INDEX_STEP


def circular_rotations(options: Sequence[str], answer: int) -> list[tuple[list[str], int]]:
    """All rotations of a question's options, each with the place of the answer in it; the first is the question itself.

    Rotation k begins with option k.

    Raises:
        ValueError: no option at the answer's place.
    """
    n = len(options)
    if not 0 <= answer < n:
        raise ValueError(f"answer: expected the place of one of the {n} options, got {answer}; count from 0")
    return [([*options[k:], *options[:k]], (answer - k) % n) for k in range(n)]


def circular_accuracy(questions: Sequence[Hashable], correct: Sequence[bool]) -> float:
    """Share of questions that are right in every one of their rows, in [0, 1].

    Row i belongs to `questions[i]` and was answered as `correct[i]` tells.

    Raises:
        ValueError: different lengths, or no rows.
    """
    if len(questions) != len(correct) or not questions:
        raise ValueError(
            f"questions: expected one for each row and at least one, got {len(questions)} questions and {len(correct)} "
            "rows; pair them first"
        )
    right: dict[Hashable, bool] = {}
    for question, is_right in zip(questions, correct, strict=True):
        right[question] = right.get(question, True) and is_right
    return sum(right.values()) / len(right)
