"""Receipts of SROIE as in the sample data: receipts.jsonl {"uid", "image", "key": {company, date, address, total}}.

Each key field is asked for, as in document question answering, and scored by ANLS and by equality.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vlm_metrics import anls, exact_match

from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, Wording
from .files import find_file, picture, question, read_lines
from .task import Asked, Task, mean_score, scores_of

_QUESTIONS = {
    "company": "Which company issued the receipt?",
    "date": "What is the date of the receipt?",
    "address": "What is the address of the company?",
    "total": "What is the total amount?",
}


class _Row(msgspec.Struct):
    uid: str
    image: str
    key: dict[str, str]


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "receipts.jsonl")
    items: list[EvalItem] = []
    for number, row in enumerate(read_lines(path, _Row), 1):
        image = picture(folder, (row.image,), path, number)
        for name, text in _QUESTIONS.items():
            if row.key.get(name):
                prompt = question(f"{row.uid}/{name}", [image], text, "sroie")
                items.append(EvalItem(group=name, prompt=prompt, answer=row.key[name]))
    return items


def _score(item: EvalItem, said: str) -> float:
    return anls(said, item.answer)


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    exact = mean_of(scores_of(asked, lambda item, said: exact_match(said, item.answer)))
    figures = mean_score(_score, "anls")(asked)
    return {"anls": figures["anls"], "exact": exact} | figures


TASKS = {
    "sroie": Task(
        name="sroie",
        files="receipts.jsonl, images/",
        read=_read,
        score=_score,
        measure=_measure,
        wording=Wording(instruction=ANSWER_SHORTLY),
        max_new_tokens=48,
    )
}
