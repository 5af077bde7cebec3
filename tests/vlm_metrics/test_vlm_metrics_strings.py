"""ANLS, relaxed accuracy, letters."""

import random
from collections.abc import Callable

import pytest

from vlm_metrics import anls, edit_distance, match_letter, parse_choice, relaxed_accuracy


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("ACME Corp", "acme corp", 1.0),
        ("acme corp.", "acme corp", 0.9),
        ("acme c", "acme corp", 1 - 3 / 9),
        ("acme", "acme corp", 0.0),
        ("12", "21", 0.0),
        # Exactly the threshold is kept; code that asks for a distance below one half gives 0.
        ("a", "ab", 0.5),
        ("", "", 1.0),
        ("ab", ["zz", "ab", "abc"], 1.0),
        # Lengths are those before white space is folded: one edit in six, not in five.
        ("ab  cd", "ab ce", 1 - 1 / 6),
    ],
)
def test_anls_golden_values(prediction: str, answers: str | list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


def test_anls_threshold_is_the_callers() -> None:
    assert anls("a", "ab", threshold=0.6) == 0
    assert anls("12", "13", threshold=0.4) == 0.5


def test_edit_distance_equals_the_recursive_definition() -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("10.5", "10", True),
        ("10.6", "10", False),
        ("-10.4", "-10", True),
        # Dividing by the signed answer would let every number pass.
        ("500", "-10", False),
        ("5%", "0.05", True),
        ("5%", "5", False),
        # An answer of 0 is compared as a string.
        ("0.0", "0", False),
        ("0", "0", True),
        ("1,000", "1000", False),
        ("$5", "5", False),
        ("YES", "yes", True),
        ("ten", "10", False),
    ],
)
def test_relaxed_accuracy_golden_values(prediction: str, answer: str, right: bool) -> None:
    assert relaxed_accuracy(prediction, answer) == float(right)


def test_relaxed_accuracy_any_answer_will_do() -> None:
    assert relaxed_accuracy("10.4", ["7", "10"]) == 1
    assert relaxed_accuracy("10.4", "10", tolerance=0.03) == 0


@pytest.mark.parametrize("score", [anls, relaxed_accuracy])
def test_no_accepted_answers_raises(score: Callable[[str, list[str]], float]) -> None:
    with pytest.raises(ValueError, match="at least one accepted answer"):
        score("a", [])


@pytest.mark.parametrize("text", ["B", "b", " B ", "B.", "B. a cat", "B.a"])
def test_match_letter_takes(text: str) -> None:
    assert match_letter(text, "B")


@pytest.mark.parametrize("text", ["", "A", "b.", "(B)", "B)", "B: a cat", "The answer is B", "A. B"])
def test_match_letter_refuses(text: str) -> None:
    assert not match_letter(text, "B")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("The answer is **B**.", "B"),
        ("A bus", "A"),
        ("a cat", "B"),
        ("I see a cat", "B"),
        # Two letters, and then two texts, decide nothing; a letter long before the end is not the answer.
        ("A or B", None),
        ("a dog and a cat", None),
        ("A man with a red hat walks", None),
        ("Z", None),
        # None of them, though an option's text is there.
        ("Z (a cat is not it)", None),
        ("none", None),
        ("", None),
        # Too long to be an option's text: more than twice all options together.
        ("a cat" + "!" * 60, None),
    ],
)
def test_parse_choice_by_hand(response: str, letter: str | None) -> None:
    assert parse_choice(response, ["a dog", "a cat", "two birds"]) == letter


def test_parse_choice_of_no_options_or_too_many_raises() -> None:
    for options in ([], ["x"] * 27):
        with pytest.raises(ValueError, match=f"expected 1 to 26, got {len(options)}"):
            parse_choice("A", options)
