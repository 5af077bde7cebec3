"""TextVQA: {"data": [{"question_id", "image_id", "question", "answers": [ten]}]}, pictures in train_images/ID.jpg.

Source: textvqa.org/dataset, version 0.5.1. Scored by EvalAI's rule.
"""

from pathlib import Path

import msgspec

from vlm_metrics import evalai_vqa_accuracy

from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, Wording
from .files import find_file, picture, question, read_rows, refuse
from .task import Task, mean_score


class _Row(msgspec.Struct):
    question_id: int | str
    image_id: str
    question: str
    answers: list[str] = []


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "TextVQA*.json", "*.json")
    items: list[EvalItem] = []
    for number, row in enumerate(read_rows(path, _Row, "data"), 1):
        if len(row.answers) < 4:
            raise refuse(path, number, "ten answers", len(row.answers), "take the validation file: the test has none")
        names = [
            f"{place}{row.image_id}.jpg" for place in ("train_images/", "train_val_images/train_images/", "images/", "")
        ]
        image = picture(folder, names, path, number)
        prompt = question(str(row.question_id), [image], row.question, "textvqa")
        common = max(row.answers, key=row.answers.count)
        items.append(EvalItem(group="textvqa", prompt=prompt, answer=common, references=tuple(row.answers)))
    return items


def _score(item: EvalItem, said: str) -> float:
    return evalai_vqa_accuracy(said, item.references)


TASKS = {
    "textvqa": Task(
        name="textvqa",
        files="TextVQA_0.5.1_val.json, train_images/*.jpg",
        read=_read,
        score=_score,
        measure=mean_score(_score, "accuracy"),
        wording=Wording(instruction=ANSWER_SHORTLY),
    )
}
