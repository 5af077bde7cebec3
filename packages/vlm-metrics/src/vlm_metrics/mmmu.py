"""MMMU's reading of answers, to choice questions and to open ones."""

from collections.abc import Sequence


def mmmu_parse_choice(response: str, options: Sequence[str]) -> str | None:
    """Letter ("A" for the first option) that a response names, or None where the official code guesses at random."""
    raise NotImplementedError


def mmmu_parse_open(response: str) -> list[str | float]:
    """What an open response may have meant: its key phrases in lower case, and numbers with two decimals."""
    raise NotImplementedError


def mmmu_correct(parsed: str | Sequence[str | float] | None, answers: str | Sequence[str]) -> bool:
    """Tell whether what `mmmu_parse_choice` (a letter or None) or `mmmu_parse_open` (a list) gave is right."""
    raise NotImplementedError
