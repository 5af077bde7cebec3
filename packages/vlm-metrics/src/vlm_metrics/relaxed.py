"""Relaxed accuracy of ChartQA: numbers may be off by five in a hundred."""

from collections.abc import Sequence


def relaxed_accuracy(prediction: str, answers: str | Sequence[str], *, tolerance: float = 0.05) -> float:
    """1 if a prediction matches an accepted answer, else 0; the benchmark's score is the mean over questions.

    Where both are numbers and the answer is not 0, a match is |prediction - answer| <= tolerance |answer|; else it is
    equality in lower case. A number is what `float` reads, so "1,000" and "$5" are none; "5%" is 0.05, and so does not
    match "5".

    Source: arXiv:2203.10244 §5.1, with the reading of numbers of google-research/pix2struct, pix2struct/metrics.py,
    which the harnesses share.

    Raises:
        ValueError: no accepted answers.
    """
    accepted = [answers] if isinstance(answers, str) else answers
    if not accepted:
        raise ValueError("answers: expected at least one accepted answer, got none; leave unanswerable items out")
    return float(any(_matches(prediction, answer, tolerance) for answer in accepted))


def _matches(prediction: str, answer: str, tolerance: float) -> bool:
    predicted, wanted = _number(prediction), _number(answer)
    if predicted is None or not wanted:
        return prediction.lower() == answer.lower()
    # Without the bars about the divisor, every number would match a negative answer.
    return abs(predicted - wanted) / abs(wanted) <= tolerance


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
