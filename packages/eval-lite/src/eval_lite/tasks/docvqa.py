"""DocVQA: {"data": [{"questionId", "question", "image": "documents/….png", "answers": [...]}]}.

Source: rrc.cvc.uab.es, task 17 (val_v1.0*.json). Scored by ANLS.
"""

from pathlib import Path

import msgspec

from vlm_metrics import anls

from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, Wording
from .files import find_file, picture, question, read_rows, refuse
from .task import Task, mean_score


class _Row(msgspec.Struct, rename={"question_id": "questionId"}):
    question_id: int | str
    question: str
    image: str
    answers: list[str] = []
    question_types: list[str] | None = None


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "val*.json", "*.json")
    items: list[EvalItem] = []
    for number, row in enumerate(read_rows(path, _Row, "data"), 1):
        if not row.answers:
            raise refuse(path, number, "answers", row.answers, "take the validation file: the test has none")
        plain = row.image.rsplit("/", 1)[-1]
        image = picture(folder, (row.image, f"spdocvqa_images/{plain}", f"images/{plain}"), path, number)
        prompt = question(str(row.question_id), [image], row.question, "docvqa")
        items.append(EvalItem(group="docvqa", prompt=prompt, answer=row.answers[0], references=tuple(row.answers)))
    return items


def _score(item: EvalItem, said: str) -> float:
    return anls(said, item.references)


TASKS = {
    "docvqa": Task(
        name="docvqa",
        files="val_v1.0*.json, documents/*.png",
        read=_read,
        score=_score,
        measure=mean_score(_score, "anls"),
        wording=Wording(instruction=ANSWER_SHORTLY),
        max_new_tokens=32,
    )
}
