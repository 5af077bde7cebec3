"""DAQUAR as in the sample data: eval.json {"question_id", "image", "question", "answer"}, train.json in LLaVA's form.

Most answers are a word or a number; several are parted by ", " and count only together. Scored by equality.
"""

from pathlib import Path

import msgspec

from vlm_metrics import exact_match

from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, Wording
from .files import find_file, picture, question, read_rows, refuse
from .task import Task, mean_score


class _Row(msgspec.Struct):
    question_id: str
    image: str
    question: str
    answer: str


class _Message(msgspec.Struct, rename={"speaker": "from"}):
    speaker: str
    value: str


class _Talk(msgspec.Struct):
    id: str
    image: str
    conversations: list[_Message]


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "eval.json")
    return [
        EvalItem(
            group="daquar",
            prompt=question(row.question_id, [picture(folder, (row.image,), path, number)], row.question, "daquar"),
            answer=row.answer,
        )
        for number, row in enumerate(read_rows(path, _Row), 1)
    ]


def _read_examples(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "train.json")
    items: list[EvalItem] = []
    for number, talk in enumerate(read_rows(path, _Talk), 1):
        said = talk.conversations
        if len(said) % 2 or {one.speaker for one in said[::2]} != {"human"}:
            raise refuse(path, number, "questions and answers in turn", len(said), "correct the row")
        image = picture(folder, (talk.image,), path, number)
        for place, (asked, answered) in enumerate(zip(said[::2], said[1::2], strict=True)):
            text = asked.value.replace("<image>", "").strip()
            prompt = question(f"{talk.id}/{place}", [image], text, "daquar")
            items.append(EvalItem(group="daquar", prompt=prompt, answer=answered.value))
    return items


def _score(item: EvalItem, said: str) -> float:
    return float(exact_match(said, item.answer))


TASKS = {
    "daquar": Task(
        name="daquar",
        files="eval.json, images/; train.json for worked examples",
        read=_read,
        read_examples=_read_examples,
        score=_score,
        measure=mean_score(_score, "accuracy"),
        wording=Wording(instruction=ANSWER_SHORTLY),
    )
}
