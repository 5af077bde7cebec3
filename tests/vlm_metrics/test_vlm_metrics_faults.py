"""Where reference code is wrong: what it gives (tools/golden_metrics.py keeps it), and what we give on the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_metrics import (
    HallusionItem,
    cider_d,
    hallusion_scores,
    mmmu_parse_choice,
    normalise_vqa,
    parse_yes_no,
    pope_scores,
    tokenise_caption,
    vqa_accuracy,
)

THEIRS = json.loads((Path(__file__).parent / "golden" / "faults.json").read_text(encoding="utf-8"))
CAPTIONS = ["a cat", "a dog", "two red buses", "two red buses"]


def second_call() -> list[float]:
    references = [[text] for text in CAPTIONS]
    cider_d(CAPTIONS, references)
    return cider_d(CAPTIONS, references).per_image


def without_a_figure() -> float:
    item = HallusionItem("VS", "map", "0", "0", "0", correct=False)
    return hallusion_scores([item, item._replace(figure_id="1", correct=True)]).f_acc


OURS: list[tuple[str, Callable[[], object], object]] = [
    ("vqa: unanimous answers are normalised", lambda: vqa_accuracy("Red", ["red"] * 10), 0.0),
    ("vqa: people without an id who agree are one", lambda: vqa_accuracy("red", ["red"] * 4 + ["blue"]), 1.0),
    ("vqa: people's number words stay", lambda: vqa_accuracy("two dogs", ["two dogs"] * 9 + ["cat"]), 1.0),
    ("vqa: a stop behind a digit stays", lambda: normalise_vqa("5."), "5"),
    (
        "mmmu: a capital that ends a word is an option",
        lambda: mmmu_parse_choice("It is PAC man", ["red", "green", "blue", "grey"]),
        None,
    ),
    (
        "pope: yes-ratio of the labels",
        lambda: pope_scores(["yes"] * 4, ["yes", "yes", "no", "no"]).yes_ratio,
        1.0,
    ),
    ("pope: an answer of more than one word is no answer", lambda: pope_scores(["Yes."], ["yes"]).accuracy, 1.0),
    ("hallusion: no figure counts as a figure", without_a_figure, 1.0),
    ("hallusion: yes is found within words", lambda: float(parse_yes_no("No, it was yesterday") == "yes"), 0.0),
    ("cider: a second call changes the score", second_call, [5.0, 5.0, 7.5, 7.5]),
    (
        "ptb: words hang on the caption that follows",
        lambda: [" ".join(tokenise_caption(text)) for text in ("plan B.", "plan B.")],
        ["plan b", "plan b"],
    ),
]


@pytest.mark.parametrize(("fault", "ours", "expected"), OURS)
def test_known_fault_is_not_ours(fault: str, ours: Callable[[], object], expected: object) -> None:
    _, theirs = THEIRS[fault]
    assert ours() == (pytest.approx(expected) if isinstance(expected, list) and fault.startswith("cider") else expected)
    assert theirs != expected


def test_every_known_fault_is_tested() -> None:
    assert {fault for fault, *_ in OURS} == set(THEIRS)
