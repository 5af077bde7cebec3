"""Every scorer against the benchmark's own code, on cases that tools/golden_metrics.py made and had it score."""

import json
import string
from pathlib import Path
from typing import Any

import pytest

from vlm_metrics import (
    HallusionItem,
    MmeItem,
    anls,
    box_iou,
    cider_d,
    circular_accuracy,
    circular_question,
    evalai_vqa_accuracy,
    grounding_accuracy,
    hallusion_scores,
    match_letter,
    mme_answer,
    mme_scores,
    mmmu_correct,
    mmmu_parse_choice,
    mmmu_parse_open,
    normalise_evalai,
    normalise_vqa,
    parse_choice,
    parse_yes_no,
    pope_answer,
    pope_scores,
    relaxed_accuracy,
    tokenise_caption,
    vqa_accuracy,
)


def golden(name: str, key: str = "cases") -> list[Any]:
    """Cases of a golden file; fewer than 200 would not prove what the README says."""
    path = Path(__file__).parent / "golden" / f"{name}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))[key]
    assert sum(len(case["texts"]) for case in cases) >= 200 if key == "sets" else len(cases) >= 200
    return cases


def test_vqa_normalisation_equals_the_official() -> None:
    cases = golden("vqa", "normalised")
    assert [normalise_vqa(text) for text, _ in cases] == [wanted for _, wanted in cases]


def test_vqa_accuracy_equals_the_official() -> None:
    cases = golden("vqa", "accuracy")
    assert [vqa_accuracy(text, people) for text, people, _ in cases] == pytest.approx([c[2] for c in cases], abs=1e-12)
    assert len({score for *_, score in cases}) >= 5


def test_evalai_normalisation_equals_the_official() -> None:
    cases = golden("evalai", "normalised")
    assert [normalise_evalai(text) for text, _ in cases] == [wanted for _, wanted in cases]


def test_evalai_accuracy_equals_the_official() -> None:
    cases = golden("evalai", "accuracy")
    ours = [evalai_vqa_accuracy(text, people) for text, people, _ in cases]
    assert ours == pytest.approx([score for *_, score in cases], abs=1e-12)
    assert len({score for *_, score in cases}) >= 5


def test_anls_equals_the_official() -> None:
    cases = golden("anls")
    assert [anls(text, answers) for text, answers, _ in cases] == [score for *_, score in cases]


def test_relaxed_accuracy_equals_the_official() -> None:
    cases = golden("relaxed")
    assert [relaxed_accuracy(text, answer) for text, answer, _ in cases] == [float(score) for *_, score in cases]


def test_caption_words_equal_the_official() -> None:
    cases = golden("ptb")
    assert [" ".join(tokenise_caption(text)) for text, _ in cases] == [words for _, words in cases]


def test_cider_d_equals_the_official() -> None:
    file = json.loads((Path(__file__).parent / "golden" / "cider.json").read_text(encoding="utf-8"))
    scores = cider_d(file["predictions"], file["references"])
    assert len(scores.per_image) >= 200
    assert scores.per_image == pytest.approx(file["per_image"], abs=1e-9)
    assert scores.mean == pytest.approx(file["mean"], abs=1e-9)


def test_parsed_choice_equals_the_official() -> None:
    cases = golden("choices", "parsed")
    assert [parse_choice(text, options) for text, options, _ in cases] == [letter for *_, letter in cases]


def test_matched_letter_equals_the_official() -> None:
    cases = golden("choices", "matched")
    assert [match_letter(text, letter) for text, letter, _ in cases] == [right for *_, right in cases]


def test_mmmu_choice_equals_the_official_where_it_does_not_guess() -> None:
    cases = golden("mmmu", "parsed")
    assert [mmmu_parse_choice(text, options) for text, options, _ in cases] == [letter for *_, letter in cases]


def test_mmmu_open_equals_the_official() -> None:
    cases = golden("mmmu", "open")
    parsed = [mmmu_parse_open(text) for text, *_ in cases]
    assert [sorted(meant, key=str) for meant in parsed] == [meant for _, meant, *_ in cases]
    right = [mmmu_correct(meant, answer) for meant, (*_, answer, _) in zip(parsed, cases, strict=True)]
    assert right == [is_right for *_, is_right in cases]


def test_pope_equals_the_official() -> None:
    for case in golden("pope", "sets"):
        assert [pope_answer(text) for text in case["texts"]] == case["read"]
        assert list(pope_scores(case["texts"], case["labels"])) == pytest.approx(case["figures"], abs=1e-12)


def test_yes_no_equals_the_official() -> None:
    cases = golden("reading")
    assert [parse_yes_no(text) for text, *_ in cases] == [read for _, read, _ in cases]


def test_mme_answer_equals_the_official() -> None:
    cases = golden("reading")
    assert [mme_answer(text) for text, *_ in cases] == [read for *_, read in cases]


def test_mme_sums_equal_the_official() -> None:
    for rows, perception, cognition in golden("mme"):
        scores = mme_scores([MmeItem(subtask, image, bool(right)) for subtask, image, right in rows])
        assert [scores.perception, scores.cognition] == pytest.approx([perception, cognition], abs=1e-9)


def test_hallusion_accuracies_equal_the_official() -> None:
    for rows, *figures in golden("hallusion"):
        scores = hallusion_scores([HallusionItem(*names, correct=bool(right)) for *names, right in rows])
        assert list(scores) == pytest.approx(figures, abs=1e-12)


def test_circular_accuracy_equals_the_official() -> None:
    options = ["dog", "cat", "bus", "car"]
    for rows, named, answers, hit in golden("circular"):
        right = [parse_choice(text, options) == answer for text, answer in zip(named, answers, strict=True)]
        assert circular_accuracy([circular_question(row) for row in rows], right) == hit


def test_grounding_equals_the_official() -> None:
    cases = golden("grounding")
    assert [box_iou(box, answer) for box, answer, *_ in cases] == pytest.approx(
        [iou for *_, iou, _ in cases], abs=1e-12
    )
    assert [grounding_accuracy([box], [answer]) for box, answer, *_ in cases] == [right for *_, right in cases]


def test_golden_letters_reach_beyond_the_first_options() -> None:
    letters = {letter for *_, letter in golden("mmmu", "parsed")} | {
        letter for *_, letter in golden("choices", "parsed")
    }
    assert letters == {None, *string.ascii_uppercase[:5]}
