"""Answers do not depend on batches or interruptions; likelihoods are those of the logits; prompts are as documented."""

import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from blip3_lite import Blip3, Processor, user_turn
from eval_lite import (
    Answer,
    Asked,
    Asking,
    EvalItem,
    RandomDemonstrations,
    SimilarDemonstrations,
    Task,
    Wording,
    mean_of,
    put,
    read_answers,
    with_answer,
)
from interleave_data import FileBytes, ImagePart, Sample, TextPart


def _picture(level: int, size: tuple[int, int] = (20, 12)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, (level % 256, 90, 255 - level % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def _item(index: int, *, answer: str = "red", choices: tuple[str, ...] = (), sizes: int = 1) -> EvalItem:
    images = [ImagePart(_picture(40 * index, (20 + 9 * index, 12)), key=f"p{index}")][:sizes]
    question = "what colour is the square?"[: 5 + 3 * (index % 7)]
    prompt = Sample(id=f"q{index}", source="t", turns=(user_turn(images, question),))
    return EvalItem(group="g", prompt=prompt, answer=answer, choices=choices)


def _task(kind: Literal["question", "document"] = "question", wording: Wording | None = None) -> Task:
    return Task(
        name="toy",
        files="",
        read=lambda folder: [],
        score=lambda item, said: float(said == item.answer),
        measure=lambda asked: {"accuracy": mean_of([0.0])},
        wording=wording or Wording(stops=()),
        max_new_tokens=7,
        kind=kind,
    )


@pytest.fixture
def asking(tiny_config, tiny_processor):
    torch.manual_seed(3)
    model = Blip3(tiny_config).requires_grad_(False).eval()
    return Asking(model=model, processor=tiny_processor, task=_task(), manner="instruct", batch_size=2)


ITEMS = [_item(index) for index in range(11)]


def test_one_by_one_equals_in_batches_token_for_token(asking: Asking, tmp_path: Path) -> None:
    one = replace(asking, batch_size=1).ask(ITEMS, tmp_path / "one")
    eight = replace(asking, batch_size=8).ask(ITEMS, tmp_path / "eight")
    differing = [(a, b) for a, b in zip(one, eight, strict=True) if a.tokens != b.tokens]
    assert all(a.near_tie and b.near_tie for a, b in differing)
    assert len(differing) <= 1
    assert len({a.tokens for a in one}) > 3
    assert all(0 < len(a.tokens) <= 7 for a in one)


def test_a_near_tie_is_noted_with_its_place(tiny_config, tiny_processor, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Blip3(tiny_config).requires_grad_(False).eval()
    # Two equal rows of the head: their logits are equal everywhere.
    weight = model.lang_model.head_weight
    asking = Asking(model=model, processor=tiny_processor, task=_task(), manner="instruct")
    (answer,) = asking.ask(ITEMS[:1], tmp_path / "a")
    assert answer.near_tie is None
    weight.data[(answer.tokens[0] + 1) % weight.shape[0]] = weight.data[answer.tokens[0]]
    (answer,) = asking.ask(ITEMS[:1], tmp_path / "b")
    assert answer.near_tie is not None
    assert (answer.near_tie.step, answer.near_tie.margin) == (0, 0.0)


def test_a_killed_run_goes_on_with_the_same_answers_and_bytes(asking: Asking, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    expected = asking.ask(ITEMS, whole)
    done: list[int] = []

    def killed(count: int) -> None:
        done.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asking.ask(ITEMS, tmp_path / "killed", killed)
    # A line that was cut short, behind the last whole window.
    with (tmp_path / "killed").open("ab") as file:
        file.write(b'{"text":"a"}\n{"te')
    resumed: list[int] = []
    assert asking.ask(ITEMS, tmp_path / "killed", resumed.append) == expected
    assert (tmp_path / "killed").read_bytes() == whole.read_bytes()
    assert done == [8]
    assert resumed == [8, 3]
    asked_again: list[int] = []
    assert asking.ask(ITEMS, whole, asked_again.append) == expected
    assert asked_again == [11]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[1]\n")
    with pytest.raises(ValueError, match="expected answers, a JSON object a line"):
        read_answers(tmp_path / "a")


def test_the_fingerprint_changes_with_what_is_asked(asking: Asking) -> None:
    names = {
        asking.fingerprint(ITEMS, "m"),
        asking.fingerprint(ITEMS, "n"),
        asking.fingerprint(ITEMS[:-1], "m"),
        replace(asking, batch_size=3).fingerprint(ITEMS, "m"),
        replace(asking, manner="base").fingerprint(ITEMS, "m"),
        replace(asking, shots=2, demonstrations=RandomDemonstrations(ITEMS, 0)).fingerprint(ITEMS, "m"),
        replace(asking, shots=2, demonstrations=RandomDemonstrations(ITEMS, 1)).fingerprint(ITEMS, "m"),
    }
    assert len(names) == 7
    assert asking.fingerprint(ITEMS, "m") in names


def test_the_fingerprint_changes_with_a_pictures_file(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    turn = user_turn([ImagePart(FileBytes(str(path)), key="a.png")], "what?")
    items = [EvalItem(group="g", prompt=Sample(id="q", source="t", turns=(turn,)), answer="red")]
    names = [asking.fingerprint(items, "m")]
    for time_ns in (1_000_000, 2_000_000, 2_000_000):
        path.write_bytes(_picture(1))
        os.utime(path, ns=(time_ns, time_ns))
        names.append(asking.fingerprint(items, "m"))
    assert len(set(names)) == 3
    assert names[2] == names[3]


@pytest.mark.parametrize("manner", ["instruct", "base"])
def test_likelihood_is_that_of_the_logits_one_choice_at_a_time(asking: Asking, tmp_path: Path, manner) -> None:
    items = [_item(index, answer="A", choices=("red", "green blue", "it is")) for index in range(5)]
    asking = replace(asking, mode="likelihood", manner=manner, task=_task(wording=Wording()))
    answers = asking.ask(items, tmp_path / "a")
    model, processor = asking.model, asking.processor
    for item, answer in zip(items, answers, strict=True):
        expected: list[float] = []
        for choice in item.choices:
            sample = asking.prompt(item)
            start = processor.encode_prompt(sample).length
            whole = processor.encode(with_answer(sample, choice))
            from blip3_lite import collate

            log_probs = model.lang_model.logits(model(collate([whole]))).log_softmax(-1)
            # The end of a document is not asked for: an example would follow.
            end = whole.length if manner == "instruct" else whole.length - 1
            expected.append(-sum(log_probs[at - 1, whole.ids[at]].item() for at in range(start, end)))
        assert list(answer.nats) == pytest.approx(expected, rel=1e-4)
        assert answer.text == "ABC"[min(range(3), key=lambda index: expected[index])]


def test_worked_examples_are_not_part_of_the_likelihood(asking: Asking, tmp_path: Path) -> None:
    items = [_item(index, answer="A", choices=("red", "green")) for index in range(4)]
    asking = replace(asking, mode="likelihood", task=_task(wording=Wording()))
    plain = asking.ask(items, tmp_path / "a")
    shown = replace(asking, shots=2, demonstrations=RandomDemonstrations(items, 0)).ask(items, tmp_path / "b")
    assert [one.num_tokens for one in plain] == [one.num_tokens for one in shown]
    assert [one.nats for one in plain] != [one.nats for one in shown]


def test_documents_cost_what_the_loss_says(asking: Asking, tmp_path: Path) -> None:
    from blip3_lite import collate
    from interleave_data import Turn

    parts = (TextPart("red green"), ImagePart(_picture(9)), TextPart("blue is the square"))
    prompt = Sample(id="d", source="t", turns=(Turn(role="document", parts=parts),))
    item = EvalItem(group="d", prompt=prompt, answer="")
    (answer,) = replace(asking, task=_task("document")).ask([item], tmp_path / "a")
    encoded = asking.processor.encode(prompt)
    assert answer.num_tokens == (encoded.num_targets,)
    assert answer.nats[0] == pytest.approx(asking.model.loss_sum(collate([encoded])).item(), rel=1e-5)


def test_what_cannot_be_asked_keeps_its_place_and_reason(asking: Asking, tmp_path: Path) -> None:
    broken = EvalItem(
        group="g",
        prompt=Sample(id="x", source="t", turns=(user_turn([ImagePart(b"none")], "what?"),)),
        answer="red",
    )
    answers = asking.ask([ITEMS[0], broken, ITEMS[1]], tmp_path / "a")
    assert [one.skip_reason for one in answers] == ["", "not_an_image", ""]
    long = replace(asking, task=replace(_task(), max_new_tokens=10**6))
    assert {one.skip_reason for one in long.ask(ITEMS[:2], tmp_path / "b")} == {"too_long"}


def _texts(sample: Sample) -> list[tuple[str, str]]:
    def shown(part) -> str:
        return part.text if isinstance(part, TextPart) else "[picture]"

    return [(turn.role, "".join(shown(part) for part in turn.parts)) for turn in sample.turns]


def test_prompts_for_instruct_and_base_models() -> None:
    wording = Wording(instruction="Shortly.")
    item, example = _item(0), _item(1, answer="blue")
    assert _texts(put(item, wording, "instruct")) == [("user", "[picture]what \nShortly.")]
    assert _texts(put(item, wording, "base", shots=[example])) == [
        (
            "document",
            "[picture]Question: what col Short answer: blue\n[picture]Question: what  Short answer:",
        )
    ]
    assert _texts(put(item, wording, "base", is_plain=True, shots=[example])) == [
        ("user", "[picture]Question: what col Short answer:"),
        ("assistant", "blue"),
        ("user", "[picture]Question: what  Short answer:"),
    ]
    assert _texts(put(item, wording, "base", shots=[example], shows_pictures=False))[0][1].count("[picture]") == 1


def test_choices_are_listed_unless_they_are_compared() -> None:
    item = _item(0, answer="B", choices=("red", "blue"))
    example = _item(1, answer="B", choices=("green", "pink"))
    said = _texts(put(item, Wording(), "instruct", shots=[example]))
    assert said[0][1].startswith("[picture]what col\nA. green\nB. pink\nAnswer with the option's letter")
    assert said[1] == ("assistant", "B")
    compared = _texts(put(item, Wording(), "instruct", shots=[example], lists_choices=False))
    assert compared == [("user", "[picture]what col"), ("assistant", "pink"), ("user", "[picture]what ")]


def test_random_examples_follow_from_question_and_seed_and_share_no_picture() -> None:
    pool = [*ITEMS, replace(_item(3), prompt=replace(_item(3).prompt, id="same picture"))]
    chosen = RandomDemonstrations(pool, 0).choose(ITEMS[3], 8)
    assert len({one.id for one in chosen}) == 8
    assert not {"q3", "same picture"} & {one.id for one in chosen}
    assert RandomDemonstrations(pool, 0).choose(ITEMS[3], 8) == chosen
    assert RandomDemonstrations(pool, 1).choose(ITEMS[3], 8) != chosen
    assert len(RandomDemonstrations(pool, 0).choose(ITEMS[3], 99)) == 10
    large = [_item(0, sizes=0)] * 70
    assert RandomDemonstrations(large, 0).choose(large[0], 4) == []


def test_similar_examples_end_with_the_most_similar(asking: Asking) -> None:
    def item(name: str, colour: tuple[int, int, int]) -> EvalItem:
        buffer = BytesIO()
        Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
        prompt = Sample(id=name, source="t", turns=(user_turn([ImagePart(buffer.getvalue(), key=name)], "what?"),))
        return EvalItem(group="g", prompt=prompt, answer=name)

    pool = [
        item("blue", (0, 0, 250)),
        item("red", (250, 0, 0)),
        item("dark red", (235, 8, 6)),
        item("green", (0, 250, 0)),
    ]
    broken = EvalItem(
        group="g", prompt=Sample(id="x", source="t", turns=(user_turn([ImagePart(b"", key="x")], "a"),)), answer=""
    )
    similar = SimilarDemonstrations([*pool, broken], asking.model, asking.processor)
    assert [one.id for one in similar.choose(item("crimson", (248, 1, 1)), 2)] == ["dark red", "red"]
    assert similar.choose(pool[1], 1)[0].id == "dark red"
    with pytest.raises(ValueError, match="that can be read"):
        SimilarDemonstrations([broken], asking.model, asking.processor)


def test_an_example_is_cut_where_a_base_model_goes_on(tiny_processor: Processor) -> None:
    from eval_lite.answers import _said

    tokens = tiny_processor.tokenizer.encode("red green\nQuestion")
    answer = _said(tiny_processor, tokens, [1.0] * len(tokens), ("\n",))
    assert answer == Answer(text="red green", tokens=tuple(tokens))
    assert Asked(ITEMS[0], answer).item.id == "q0"
