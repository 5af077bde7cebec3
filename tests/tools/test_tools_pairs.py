"""Constructed pairs, and the figures of held-out reward accuracy."""

import importlib
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from interleave_data import ImagePart, PreferenceSample, TextPart, Turn


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """Import a tool by its name."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


ROWS = [
    {
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nhow many chairs"},
            {"from": "gpt", "value": "2"},
            {"from": "human", "value": "what is red"},
            {"from": "gpt", "value": "sofa"},
        ],
    },
    {"image": "b.jpg", "question": "how many lamps", "answer": "5"},
    {"image": "b.jpg", "question": "how many cups", "answer": "7"},
    {"image": "c.jpg", "question": "which one is it", "answer": "sofa"},
]


def test_rejected_answers_are_those_to_like_questions_about_other_pictures(tool) -> None:
    made = tool("make_pairs")
    asked = made.read_questions(ROWS)
    assert [(one.image, one.question, one.answer) for one in asked[:2]] == [
        ("a.jpg", "how many chairs", "2"),
        ("a.jpg", "what is red", "sofa"),
    ]
    for seed in range(10):
        pairs = made.make_pairs(asked, random.Random(seed))
        rejected = {pair["prompt"]: pair["rejected"] for pair in pairs}
        assert rejected["how many chairs"] in ("5", "7")
        # Not 7, which is about the same picture.
        assert rejected["how many lamps"] == "2"
        # No question is like it: another picture's, but never the right answer itself.
        assert rejected["what is red"] in ("5", "7")
        assert rejected["which one is it"] in ("2", "5", "7")
        assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


def sample(number: int) -> PreferenceSample:
    turns = (Turn("user", (ImagePart(b"", key=f"picture {number}"), TextPart(f"question {number}"))),)
    return PreferenceSample(str(number), "toy", turns, "yes", "no")


def test_exchanged_pairs_keep_their_texts(tool) -> None:
    pairs = [sample(number) for number in range(5)]
    found = tool("reward_accuracy").exchanged(pairs)
    assert [pair.images()[0].key for pair in found] == [f"picture {k}" for k in (2, 3, 4, 0, 1)]
    assert [pair.turns[0].parts[1] for pair in found] == [pair.turns[0].parts[1] for pair in pairs]
    assert [(pair.chosen, pair.rejected) for pair in found] == [("yes", "no")] * 5


@dataclass
class Words:
    """Encodes an answer as its number."""

    def encode_preference(self, pair: PreferenceSample) -> tuple[int, int]:
        return int(pair.chosen), int(pair.rejected)


def test_margins_are_differences_of_log_ratios_pair_by_pair(tool, monkeypatch) -> None:
    made = tool("reward_accuracy")
    monkeypatch.setattr(made, "collate", lambda samples: torch.tensor(samples, dtype=torch.float32))
    monkeypatch.setattr(made, "answer_log_probs", lambda factor, answers: factor * answers)
    pairs = [PreferenceSample(str(k), "toy", (), str(k), "3") for k in range(40)]
    found = made.margins(3.0, 1.0, Words(), pairs)
    assert found == [2.0 * (k - 3) for k in range(40)]
    assert made._accuracy(found[:6]) | {"low": 0, "high": 0} == {"value": 2 / 6, "low": 0, "high": 0, "n": 6}


def test_bench_compares_medians_and_losses(tool) -> None:
    bench = tool("bench_dpo")
    ours = [{"seconds": [1.0, 2.0, 9.0], "step_bytes": 10, "peak_bytes": 30, "losses": [0.7, 0.5]}]
    trl = [{"seconds": [4.0, 3.0, 5.0], "step_bytes": 40, "peak_bytes": 60, "losses": [0.7, 0.25]}]
    found = bench._compared({"ours": ours, "trl": trl}, 4)
    assert found["pairs_per_s"] == {"ours": 2.0, "trl": 1.0}
    assert (found["speed_ratio"], found["memory_ratio"], found["peak_ratio"]) == (2.0, 0.25, 0.5)
    assert found["largest_loss_difference"] == 0.25
    pairs = bench.drawn_pairs(3)
    assert pairs == bench.drawn_pairs(3)
    assert [len(pairs[0][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [192, 64, 64]
