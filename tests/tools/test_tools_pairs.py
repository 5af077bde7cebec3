"""Constructed pairs, and the figures of held-out reward accuracy."""

import importlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from interleave_data import (
    ImagePart,
    PreferenceSample,
    Sample,
    SkipLimits,
    SkipReason,
    SkipSample,
    TextPart,
    TooManySkips,
    Turn,
)
from vlm_metrics import wilson_interval


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """Import a tool by its name."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    monkeypatch.syspath_prepend(str(repo_root / "apps/train"))

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
    found = tool("train_reward_accuracy").exchanged(pairs)
    assert [pair.images()[0].key for pair in found] == [f"picture {k}" for k in (2, 3, 4, 0, 1)]
    assert [pair.turns[0].parts[1] for pair in found] == [pair.turns[0].parts[1] for pair in pairs]
    assert [(pair.chosen, pair.rejected) for pair in found] == [("yes", "no")] * 5


@dataclass
class Words:
    """Encodes an answer as its number."""

    def encode_preference(self, pair: PreferenceSample) -> tuple[int, int]:
        return int(pair.chosen), int(pair.rejected)


def test_margins_are_differences_of_log_ratios_pair_by_pair(tool, monkeypatch) -> None:
    made = tool("train_reward_accuracy")
    monkeypatch.setattr(made, "collate", lambda samples: torch.tensor(samples, dtype=torch.float32))
    monkeypatch.setattr(made, "answer_log_probs", lambda factor, answers: factor * answers)
    pairs = [PreferenceSample(str(k), "toy", (), str(k), "3") for k in range(40)]
    found = made.margins(3.0, 1.0, Words(), pairs)
    assert found == [2.0 * (k - 3) for k in range(40)]


def test_reward_accuracys_interval_takes_pictures_as_drawn(tool) -> None:
    made = tool("train_reward_accuracy")
    margins = [1.0, 2.0, 0.0, -1.0]
    alone = made.accuracy(margins, [sample(number) for number in range(4)])
    low, high = wilson_interval(2, 4)
    assert alone == {"value": 0.5, "low": low, "high": high, "n": 4, "pictures": 4}
    # Two pairs a picture, alike: as little is known as from two pairs.
    twins = made.accuracy(margins, [sample(number // 2) for number in range(4)])
    assert twins == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 4, "pictures": 2}


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


def prediction(number: int, group: str, said: str, answer: str):
    from eval_lite import Prediction

    return Prediction(id=f"{group}/{number}", group=group, answer=answer, prediction=said, is_correct=said == answer)


def test_study_compares_question_by_question(tool) -> None:
    study = tool("train_study")
    # Of ten changes, as uneven a split as 2 to 8 in 2 · (1 + 10 + 45) of 1,024 cases.
    assert study.mcnemar(8, 2) == study.mcnemar(2, 8) == pytest.approx(2 * 56 / 1024)
    assert study.mcnemar(0, 0) == 1.0
    answers = ["no", "no", "yes", "yes"] * 10
    before = [prediction(k, "presence", "yes", answer) for k, answer in enumerate(answers)]
    after = [prediction(k, "presence", answer, answer) for k, answer in enumerate(answers)]
    colours = [prediction(k, "colour", "red", "red") for k in range(40)]
    worse = [prediction(k, "colour", "blue" if k < 10 else "red", "red") for k in range(40)]
    found = study.compare([*before, *colours], [*worse, *reversed(after)])
    assert found["absent_f1"] == {"before": 0, "after": 1, "low_of_difference": 1, "high_of_difference": 1}
    presence, colour = found["skills"]["presence"], found["skills"]["colour"]
    assert (presence["before"], presence["after"], presence["gained"], presence["lost"]) == (0.5, 1.0, 20, 0)
    assert presence["p"] == pytest.approx(2 / 2**20)
    assert not presence["is_below_interval"]
    assert (colour["after"], colour["lost"], colour["is_below_interval"]) == (0.75, 10, True)


@pytest.mark.parametrize("is_kept", [True, False])
def test_study_goes_on_with_a_stage_unless_it_came_to_its_end(tool, tmp_path: Path, monkeypatch, is_kept) -> None:
    study, lines = tool("train_study"), []
    monkeypatch.setattr(study.subprocess, "run", lambda line, *, check: lines.append(line))
    checkpoint = tmp_path / "dpo/checkpoints/step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"files": {}, "is_kept": is_kept}))
    (tmp_path / "dpo/checkpoints/latest").write_text("step-00000100\n")
    assert study.train("dpo", tmp_path / "start", tmp_path / "dpo") == checkpoint
    # A stopped one leaves a checkpoint too, of fewer steps.
    assert [line[line.index("--resume") + 1] for line in lines] == ([] if is_kept else ["auto"])


def test_samples_that_are_no_pairs_are_told_and_limited(tool, monkeypatch, capsys) -> None:
    made = tool("train_reward_accuracy")

    class Rows(list):
        name = "toy"

        def __getitem__(self, index: int) -> object:
            if index == 1:
                raise SkipSample(SkipReason.BAD_RECORD, "torn")
            return super().__getitem__(index)

    rows = Rows([sample(0), sample(1), Sample("2", "toy", ())])
    monkeypatch.setattr(made, "load_data_file", lambda path: SimpleNamespace(skip_limits=SkipLimits()))
    monkeypatch.setattr(made, "open_sources", lambda file: [rows])
    assert [pair.id for pair in made.read_pairs("pairs.toml")] == ["0"]
    assert capsys.readouterr().err == "left out: bad_record 2\n"
    limits = SkipLimits(max_share=0.5, min_seen=1)
    monkeypatch.setattr(made, "load_data_file", lambda path: SimpleNamespace(skip_limits=limits))
    with pytest.raises(TooManySkips, match=r"toy: expected at most 50\.00% .* got 2 of 3 .* toy:2: bad_record"):
        made.read_pairs("pairs.toml")
