"""MMMU's reading of answers, to choice questions and to open ones.

Source: arXiv:2311.16502; MMMU-Benchmark/MMMU 51ce7f3, eval/eval_utils.py.
"""

import re
from collections.abc import Sequence

from .choices import option_letters

_MARKS = (",", ".", "!", "?", ";", ":", "'")
# A response this short names its option by letter or not at all.
_NUM_SHORT_WORDS = 5
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_parse_choice(response: str, options: Sequence[str]) -> str | None:
    """Letter ("A" for the first option) that a response names, or None where the official code guesses at random.

    The first of these that finds any option decides, and of several options the last one named: "(B)"; "B" between
    spaces, where the response's ends count as spaces and outer punctuation is dropped; with more than five words, the
    option's text in any case. Letters are capitals.

    Officially None becomes a guess, seeded with 42, so a score depends on the order of the questions; here None is no
    answer, and wrong. A guess would be right 1 / len(options) of the time.

    Raises:
        ValueError: no options, or more than 26.
    """
    letters = option_letters(options)
    for mark in _MARKS:
        response = response.strip(mark)
    padded = f" {response} "
    places = {letter: padded.rfind(f"({letter})") for letter in letters}
    if max(places.values()) < 0:
        places = {letter: padded.rfind(f" {letter} ") for letter in letters}
    if max(places.values()) < 0 and len(padded.split()) > _NUM_SHORT_WORDS:
        folded = padded.lower()
        places = {letter: folded.rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
    # The first of options at one place, as numpy.argmax has it.
    best = max(letters, key=lambda letter: places[letter])
    return best if places[best] >= 0 else None


def mmmu_parse_open(response: str) -> list[str | float]:
    """What an open response may mean: phrases in lower case and numbers rounded to two decimals, each once.

    A line's phrase is the shortest of what follows a word such as "is", "so" or "answer" in it (in the last line also
    "="); without any such word the whole response is the phrase. Numbers are those in the phrases. A phrase of one
    character is given twice, with a space before and behind.
    """
    lines = response.strip().strip(".").lower().split("\n")
    phrases: list[str] = []
    for i, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if i == len(lines) - 1 else _INDICATORS
        tails = [line.rsplit(indicator, 1)[1].strip() for indicator in indicators if indicator in line]
        # An empty tail is passed over while another follows it, as the official loop does.
        phrase = _shortest(tails)
        if phrase and phrase not in _MARKS:
            phrases.append(phrase)
    if not phrases:
        phrases = [response.strip().strip(".").lower()]
    numbers = [number for phrase in phrases for form in _NUMBERS for number in re.findall(form, phrase)]
    meant = [value for text in phrases + numbers for value in _normalise(text)]
    return list(dict.fromkeys(meant))


def _shortest(tails: Sequence[str]) -> str:
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def _normalise(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        # With a space, one letter is not found inside every word.
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_correct(parsed: str | Sequence[str | float] | None, answers: str | Sequence[str]) -> bool:
    """Tell whether a parsed response is right.

    What `mmmu_parse_choice` gave, a letter or None, must be an accepted letter. Of what `mmmu_parse_open` gave, a
    number must be an accepted number, or a phrase must hold an accepted phrase. MMMU's accuracy is the mean over all
    questions.

    Raises:
        ValueError: no accepted answers.
    """
    accepted = [answers] if isinstance(answers, str) else answers
    if not accepted:
        raise ValueError("answers: expected at least one accepted answer, got none; leave the question out")
    if parsed is None or isinstance(parsed, str):
        return parsed in accepted
    wanted = [value for answer in accepted for value in _normalise(answer)]
    phrases = [value for value in wanted if isinstance(value, str)]
    return any(
        any(phrase in value for phrase in phrases) if isinstance(value, str) else value in wanted for value in parsed
    )
