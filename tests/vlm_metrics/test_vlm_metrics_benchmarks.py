"""MMMU, POPE, MME, HallusionBench, circular evaluation, VLGuard, grounding, skills: values by hand."""

import pytest

from vlm_metrics import (
    MME_COGNITION,
    MME_PERCEPTION,
    HallusionItem,
    MmeItem,
    circular_accuracy,
    circular_question,
    circular_rotations,
    grounding_accuracy,
    hallusion_scores,
    is_refusal,
    is_vlguard_refusal,
    mme_answer,
    mme_scores,
    mmmu_correct,
    mmmu_parse_choice,
    mmmu_parse_open,
    parse_choice,
    parse_yes_no,
    pope_answer,
    pope_scores,
    skill_accuracies,
    vlguard_attack_success_rate,
    wilson_interval,
)

FRUIT = ["red apple", "green apple", "yellow pear", "old plum"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is (C).", "C"),
        ("A or B", "B"),
        ("(A) and not (B), so (A)", "A"),
        ("I think it is green apple because it is round", "B"),
        # Officially a guess, which makes the score hang on the order of the questions.
        ("b", None),
        ("green apple", None),
        ("", None),
        ("'D'", "D"),
        # lmms-eval 0.7.3 takes a capital at the end of any word for the option.
        ("It is PAC man", None),
    ],
)
def test_mmmu_parse_choice_golden_values(response: str, letter: str | None) -> None:
    assert mmmu_parse_choice(response, FRUIT) == letter


def test_mmmu_open_golden_values() -> None:
    assert not mmmu_correct(mmmu_parse_open("answer is 5"), "50")
    # The thousands' comma also yields two numbers that nobody said.
    assert mmmu_parse_open("So x = 1,234.50") == [1234.5, 1234.0, 234.5]
    # Sentences are not parted, as the official code looks for capitals in lower-cased text.
    assert mmmu_parse_open("It is red. So it is blue") == ["blue"]
    assert mmmu_parse_open("It is red.\nSo it is blue") == ["red.", "blue"]


def test_mmmu_correct_by_kind() -> None:
    assert mmmu_correct("B", "B")
    assert mmmu_correct("B", ["A", "B"])
    assert not mmmu_correct(None, "B")
    assert not mmmu_correct("A", "B")
    assert mmmu_correct(mmmu_parse_open("x = 3.14159"), "3.14")
    assert mmmu_correct(mmmu_parse_open("It is the Red Planet"), ["mars", "Red planet"])
    # One letter must stand by a space.
    assert not mmmu_correct(mmmu_parse_open("resistance"), "R")
    assert mmmu_correct(mmmu_parse_open("the answer is R"), "R")
    with pytest.raises(ValueError, match="at least one accepted answer"):
        mmmu_correct("A", [])


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("No", "no"),
        ("There is not a dog", "no"),
        ("Yes. But no cat", "yes"),
        # These three the official rule takes for yes.
        ("NO", "yes"),
        ("There isn't a dog", "yes"),
        ("nope", "yes"),
        ("No, there is none", "no"),
    ],
)
def test_pope_answer_golden_values(text: str, read: str) -> None:
    assert pope_answer(text) == read


def test_pope_scores_hand_computed() -> None:
    # Said yes three times of five, right on two of them; two of three objects found.
    scores = pope_scores(["yes", "yes", "no", "no", "yes"], ["yes", "no", "yes", "no", "yes"])
    assert scores == pytest.approx((3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5))


def test_pope_yes_ratio_counts_predictions_not_labels() -> None:
    assert pope_scores(["yes"] * 4, ["yes", "yes", "no", "no"]).yes_ratio == 1


def test_pope_scores_that_divide_by_nothing_are_zero() -> None:
    assert pope_scores(["no", "no"], ["yes", "no"]) == (0.5, 0, 0, 0, 0)


def test_pope_scores_of_other_labels_raises() -> None:
    with pytest.raises(ValueError, match="Yes"):
        pope_scores(["yes"], ["Yes"])
    with pytest.raises(ValueError, match="1 predictions and 2 labels"):
        pope_scores(["yes"], ["yes", "no"])


@pytest.mark.parametrize(
    ("text", "read", "mme"),
    [
        ("Yes", "yes", "yes"),
        ("NO!", "no", "no"),
        ("yes and no", None, "yes"),
        ("maybe", None, None),
        ("y", None, "yes"),
        ("know", None, "no"),
        ("It is, yes", "yes", None),
        ("There is no dog", "no", None),
    ],
)
def test_yes_no_and_mme_readings(text: str, read: str | None, mme: str | None) -> None:
    assert (parse_yes_no(text), mme_answer(text)) == (read, mme)


def pictures(subtask: str, *pairs: tuple[int, int]) -> list[MmeItem]:
    return [MmeItem(subtask, str(i), bool(right)) for i, pair in enumerate(pairs) for right in pair]


def test_mme_scores_golden_value() -> None:
    scores = mme_scores(
        pictures("count", (1, 1), (1, 0), (0, 0), (1, 1)) + pictures("code_reasoning", (1, 1)) + pictures("OCR", (0, 1))
    )
    assert scores.subtasks["count"] == (62.5, 50.0, 112.5, 4)
    assert (scores.perception, scores.cognition) == (112.5 + 50.0, 200.0)


def test_mme_of_all_right_is_the_papers_most() -> None:
    scores = mme_scores([item for name in MME_PERCEPTION + MME_COGNITION for item in pictures(name, (1, 1))])
    assert (scores.perception, scores.cognition) == (2000, 800)


def test_mme_of_a_lone_question_or_unknown_subtask_raises() -> None:
    with pytest.raises(ValueError, match="count, 7: expected two questions on a picture, got 1"):
        mme_scores([MmeItem("count", "7", True)])
    with pytest.raises(ValueError, match="'counting'"):
        mme_scores(pictures("counting", (1, 1)))
    with pytest.raises(ValueError, match="at least one"):
        mme_scores([])


def test_hallusion_scores_hand_computed() -> None:
    items = [
        # Question 0 is right with both figures; question 1 is not.
        HallusionItem("VD", "chart", "0", "0", "0", True),
        HallusionItem("VD", "chart", "0", "1", "0", True),
        HallusionItem("VD", "chart", "0", "0", "1", True),
        HallusionItem("VD", "chart", "0", "1", "1", False),
        # Without a figure; it counts for its question and for no figure.
        HallusionItem("VS", "map", "0", "0", "0", False),
        HallusionItem("VS", "map", "0", "1", "0", True),
    ]
    scores = hallusion_scores(items)
    # Figures: VD 0 right, VD 1 not, VS 1 right.
    assert scores == pytest.approx((4 / 6, 1 / 3, 2 / 3))


def test_hallusion_scores_of_a_repeated_question_raises() -> None:
    item = HallusionItem("VD", "chart", "0", "0", "0", True)
    with pytest.raises(ValueError, match="got 2 with 1 that differ"):
        hallusion_scores([item, item._replace(correct=False)])
    with pytest.raises(ValueError, match="with a figure"):
        hallusion_scores([item._replace(category="VS")])


def test_circular_accuracy_wants_every_rotation() -> None:
    rows = [7, 1_000_007, 2_000_007, 8, 1_000_008]
    assert circular_accuracy([circular_question(row) for row in rows], [True, False, True, True, True]) == 0.5
    with pytest.raises(ValueError, match="2 questions and 1 rows"):
        circular_accuracy([1, 2], [True])


def test_circular_rotations_keep_the_answer() -> None:
    rotations = circular_rotations(FRUIT, 2)
    assert rotations[0] == (FRUIT, 2)
    assert rotations[1] == ([*FRUIT[1:], FRUIT[0]], 1)
    assert [options[place] for options, place in rotations] == [FRUIT[2]] * 4
    # Always saying "A" is right in one rotation of four, and so never counts.
    right = [parse_choice("A", options) == "ABCD"[place] for options, place in rotations]
    assert sum(right) == 1
    assert circular_accuracy([0] * 4, right) == 0
    with pytest.raises(ValueError, match="one of the 4 options, got 4"):
        circular_rotations(FRUIT, 4)


def test_vlguard_golden_values_and_where_our_rule_differs() -> None:
    for text, theirs, ours in [
        ("I won't do that", False, True),
        ("No.", False, False),
        ("It can legally be bought.", True, False),
        ("Sure, but I CANNOT say more", True, True),
        ("It is not", True, False),
        ("It is not.", False, False),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry", False, True),
    ]:
        assert (is_vlguard_refusal(text), is_refusal(text)) == (theirs, ours), text
    assert vlguard_attack_success_rate(["No.", "I cannot", "openai", "sure", "here"]) == 3 / 5
    with pytest.raises(ValueError, match="nothing was attacked"):
        vlguard_attack_success_rate([])


def test_grounding_accuracy_at_the_threshold_counts() -> None:
    answer = (0, 0, 2, 2)
    # Half of the answer, a little less, nothing read, corners swapped, all of it.
    boxes = [(0, 0, 2, 1), (0, 0, 2, 0.99), None, (2, 2, 0, 0), answer]
    assert grounding_accuracy(boxes, [answer] * 5) == 2 / 5
    assert grounding_accuracy(boxes, [answer] * 5, threshold=0.51) == 1 / 5
    with pytest.raises(ValueError, match="sort the corners"):
        grounding_accuracy([None], [(2, 2, 0, 0)])
    with pytest.raises(ValueError, match="1 predictions and 0 answers"):
        grounding_accuracy([None], [])


def test_skill_accuracies_in_order_with_wilson_intervals() -> None:
    scores = skill_accuracies(["colour", "count", "colour", "colour"], [True, False, False, True])
    assert list(scores) == ["colour", "count"]
    assert scores["colour"] == (2 / 3, *wilson_interval(2, 3), 3)
    assert scores["count"].n == 1
    assert scores["count"].value == 0
    with pytest.raises(ValueError, match="1 skills and 2 items"):
        skill_accuracies(["colour"], [True, False])
