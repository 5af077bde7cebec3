"""Scores by hand, and predictions that do not depend on the batch."""

import json
from pathlib import Path

import pytest

from blip3_lite import user_turn
from eval_lite import EvalItem, Prediction, encode_prompts, macro_accuracy, predict, score_groups, write_predictions
from interleave_data import ImagePart, Sample, SkipSample


def _prediction(group: str, answer: str, is_correct: bool) -> Prediction:
    return Prediction(id="x", group=group, answer=answer, prediction="p", is_correct=is_correct)


def test_scores_by_group_with_interval_and_baseline() -> None:
    scores = score_groups(
        [_prediction("a", "red", True)] * 3 + [_prediction("a", "blue", False)] + [_prediction("b", "x", False)]
    )
    assert list(scores) == ["a", "b"]
    assert (scores["a"].accuracy, scores["a"].n, scores["a"].baseline) == (0.75, 4, 0.75)
    # Wilson, 95 %: 3 of 4 (Wilson 1927, by hand with z = 1.959964).
    assert scores["a"].low == pytest.approx(0.3006, abs=1e-4)
    assert scores["a"].high == pytest.approx(0.9544, abs=1e-4)
    assert macro_accuracy(scores) == pytest.approx(0.375)


def test_macro_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        macro_accuracy({})


def test_predictions_are_the_same_for_every_batch_size_and_in_the_items_order(tiny_model, tiny_processor) -> None:
    questions = ["what?", "what colour is the square?", "red green blue red green", "is it?", "a"]
    items = [
        EvalItem(group="g", prompt=Sample(id=f"{i}", source="t", turns=(user_turn([], q),)), answer="")
        for i, q in enumerate(questions)
    ]
    prompts = encode_prompts(tiny_processor, items)

    def answers(batch_size):
        found = predict(
            tiny_model, tiny_processor, items, lambda item, said: bool(said), prompts=prompts, batch_size=batch_size
        )
        assert [p.id for p in found] == ["0", "1", "2", "3", "4"]
        return [p.prediction for p in found]

    assert answers(1) == answers(2) == answers(5)
    assert len(set(answers(5))) > 1


def test_a_broken_picture_is_counted_as_wrong_with_its_reason(tiny_model, tiny_processor) -> None:
    pictures = [[], [ImagePart(b"no picture")], [], [ImagePart(b"")]]
    items = [
        EvalItem(group="g", prompt=Sample(id=f"{i}", source="t", turns=(user_turn(images, "what?"),)), answer="")
        for i, images in enumerate(pictures)
    ]
    done: list[int] = []
    found = predict(tiny_model, tiny_processor, items, lambda item, said: True, on_progress=done.append)
    assert [(p.id, p.is_correct, p.skip_reason) for p in found] == [
        ("0", True, ""),
        ("1", False, "not_an_image"),
        ("2", True, ""),
        ("3", False, "empty_file"),
    ]
    assert found[0].prediction == found[2].prediction != found[1].prediction == ""
    assert sum(done) == 4
    score = score_groups(found)["g"]
    assert (score.accuracy, score.n, score.skipped) == (0.5, 4, {"empty_file": 1, "not_an_image": 1})
    with pytest.raises(SkipSample, match="not_an_image") as caught:
        encode_prompts(tiny_processor, items)
    assert caught.value.where


def test_the_models_mode_is_restored_where_answering_fails(tiny_model, tiny_processor) -> None:
    def fail(samples):
        raise ZeroDivisionError

    item = EvalItem(group="g", prompt=Sample(id="i", source="t", turns=(user_turn([], "a"),)), answer="")
    for is_training in (True, False):
        tiny_model.train(is_training)
        with pytest.raises(ZeroDivisionError):
            predict(tiny_model, tiny_processor, [item], lambda item, said: True, collate_prompts=fail)
        assert tiny_model.training is is_training


def test_number_of_prompts_must_be_that_of_items(tiny_model, tiny_processor) -> None:
    item = EvalItem(group="g", prompt=Sample(id="i", source="t", turns=(user_turn([], "a"),)), answer="")
    with pytest.raises(ValueError, match="expected 1, one per item, got 0"):
        predict(tiny_model, tiny_processor, [item], lambda item, said: True, prompts=[])


def test_predictions_file_has_a_line_each(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a/p.jsonl", [_prediction("a", "é", True)] * 2)
    lines = [json.loads(line) for line in (tmp_path / "a/p.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["é", "é"]


def test_predictions_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [_prediction("a", "red", True)])
    before = path.read_bytes()

    def torn(target: Path, data: bytes) -> int:
        with target.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="No space"):
        write_predictions(path, [_prediction("a", "blue", True)] * 2)
    assert path.read_bytes() == before
