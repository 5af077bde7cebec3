import pytest

from vlm_metrics import evalai_vqa_accuracy, normalise_evalai, normalise_vqa, vqa_accuracy


# Values of the official code, run once from the repository's own file.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the two dogs.", "2 dogs"),
        ("2,000", "2000"),
        ("dont", "don't"),
        ("black/white", "black white"),
        ("u.s.a", "usa"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("A, B", "b"),
        ("-5", "5"),
        ("none", "0"),
        ("it's 5.", "it's 5"),
        # With a comma between digits a mark is removed where it would have become a space.
        ("2,000 or a/b", "2000 or ab"),
        # These two the table of contractions leaves, and this one it takes apart.
        ("lets shes", "lets shes"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_normalise_vqa_golden_values(text: str, expected: str) -> None:
    assert normalise_vqa(text) == expected


def test_normalise_evalai_parts_the_genitive() -> None:
    assert normalise_evalai("it's 5.") == "it 's 5"


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_accuracy_by_number_of_matches(matches: int, score: float) -> None:
    people = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("Red.", people) == pytest.approx(score)
    assert evalai_vqa_accuracy("Red.", people) == pytest.approx(score)


def test_unanimous_answers_are_compared_as_they_stand_by_the_official_rule_alone() -> None:
    assert vqa_accuracy("Red", ["red"] * 10) == 0
    assert vqa_accuracy("red", ["red "] * 10) == 1
    assert evalai_vqa_accuracy("Red", ["red"] * 10) == 1


def test_vqa_accuracy_of_equal_answers_of_different_people_counts_each() -> None:
    # Code that leaves out "equal records" instead of one person finds no other "red" here.
    assert vqa_accuracy("red", ["red", "red", "red", "red", "blue"]) == pytest.approx((4 * 1 + 1) / 5)


def test_vqa_accuracy_of_too_few_people_raises() -> None:
    with pytest.raises(ValueError, match="at least four people"):
        vqa_accuracy("red", ["red"] * 3)
    with pytest.raises(ValueError, match="exact_match"):
        evalai_vqa_accuracy("red", ["red"])
