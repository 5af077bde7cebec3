"""ANLS of DocVQA, InfographicVQA and ST-VQA: average normalised Levenshtein similarity."""

from collections.abc import Sequence


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters."""
    if len(a) > len(b):
        a, b = b, a
    row = list(range(len(a) + 1))
    for i, char_b in enumerate(b, 1):
        above, row = row, [i]
        for j, char_a in enumerate(a):
            row.append(above[j] if char_a == char_b else 1 + min(above[j], above[j + 1], row[j]))
    return row[-1]


def anls(prediction: str, answers: str | Sequence[str], *, threshold: float = 0.5) -> float:
    """Similarity of one answer to the nearest accepted one, in [0, 1]; the benchmark's ANLS is the mean over questions.

        NL = edit_distance(prediction, answer) / max(len(prediction), len(answer))
        1 - NL if that is at least the threshold, else 0

    Strings are compared in lower case with runs of white space as one space; lengths are those of the strings as given.
    A similarity of exactly the threshold is kept, as the harnesses do; arXiv:1907.00490 has it dropped.

    Source: rrc.cvc.uab.es task 17; lmms-eval 75571cf, api/metrics.py.

    Raises:
        ValueError: no accepted answers.
    """
    accepted = [answers] if isinstance(answers, str) else answers
    if not accepted:
        raise ValueError("answers: expected at least one accepted answer, got none; leave unanswerable items out")
    folded = " ".join(prediction.lower().split())
    nearest = 1.0
    for answer in accepted:
        length = max(len(prediction), len(answer))
        distance = edit_distance(folded, " ".join(answer.lower().split()))
        nearest = min(nearest, distance / length if length else 0.0)
    similarity = 1 - nearest
    return similarity if similarity >= threshold else 0.0
