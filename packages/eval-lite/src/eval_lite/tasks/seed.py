"""SEED-Bench: {"questions": [{"question_id", "question", "choice_a" … "choice_d", "answer": "A", "data_id",
"question_type_id"}], "question_type": {name: id}}; pictures in SEED-Bench-image/DATA_ID.

Source: SEED-Bench.json of AILab-CVC/SEED-Bench. Its own evaluation takes the choice of least loss (the mode
`likelihood`); harnesses read a letter. Questions about videos (`data_type` "video") are left out.
"""

from pathlib import Path

import msgspec

from ..prediction import EvalItem
from . import choosing
from .files import find_file, picture, question, read_json, read_rows, refuse
from .task import Task


class _Row(msgspec.Struct):
    question_id: int | str
    question: str
    choice_a: str
    choice_b: str
    choice_c: str
    choice_d: str
    answer: str
    data_id: str
    data_type: str = "image"
    question_type_id: int = 0


class _Types(msgspec.Struct):
    question_type: dict[str, int] = {}


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "SEED-Bench*.json", "*.json")
    names = {number: name for name, number in read_json(path, _Types).question_type.items()}
    items: list[EvalItem] = []
    for number, row in enumerate(read_rows(path, _Row, "questions"), 1):
        if row.data_type != "image":
            continue
        if row.answer not in tuple("ABCD"):
            raise refuse(path, number, "an answer A to D", row.answer, "correct the row")
        image = picture(folder, (f"SEED-Bench-image/{row.data_id}", row.data_id, f"images/{row.data_id}"), path, number)
        items.append(
            EvalItem(
                group=names.get(row.question_type_id, f"type {row.question_type_id}"),
                prompt=question(str(row.question_id), [image], row.question, "seed"),
                answer=row.answer,
                choices=(row.choice_a, row.choice_b, row.choice_c, row.choice_d),
            )
        )
    return items


TASKS = {
    "seed": Task(
        name="seed",
        files="SEED-Bench.json, SEED-Bench-image/*",
        read=_read,
        score=choosing.score,
        measure=choosing.measure,
        wording=choosing.WORDING,
    )
}
