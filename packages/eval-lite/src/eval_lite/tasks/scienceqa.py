"""ScienceQA-IMG: problems.json {ID: {"question", "choices", "answer": 0, "hint", "image": "image.png", "split"}}.

Source: github.com/lupantech/ScienceQA, data/scienceqa; pictures in SPLIT/ID/image.png. The test split's questions with
a picture are asked (2,017); by pid_splits.json where it is there, else by `split`.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vlm_metrics import match_letter

from ..measures import Measure
from ..prediction import EvalItem
from ..wording import LETTERS
from . import choosing
from .files import TaskFileError, find_file, picture, question, read_json, read_named, refuse
from .task import Asked, Task, mean_score

_SPLIT = "test"


class _Row(msgspec.Struct):
    question: str
    choices: list[str]
    answer: int
    hint: str = ""
    image: str | None = None
    split: str = ""
    subject: str = "scienceqa"


class _Splits(msgspec.Struct):
    test: list[str]


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "problems.json")
    rows = read_named(path, _Row)
    splits = folder / "pid_splits.json"
    wanted = [name for name, row in rows.items() if row.split == _SPLIT]
    if splits.is_file():
        wanted = read_json(splits, _Splits).test
    items: list[EvalItem] = []
    for name in wanted:
        row = rows.get(name)
        if row is None:
            raise refuse(splits, name, f"an id of {path.name}", name, "take both files of one release")
        if not row.image:
            continue
        if not 0 <= row.answer < len(row.choices) <= len(LETTERS):
            raise refuse(path, name, f"an answer below {len(row.choices)}", row.answer, "correct the row")
        image = picture(folder, (f"{_SPLIT}/{name}/{row.image}", f"images/{_SPLIT}/{name}/{row.image}"), path, name)
        hint = f"{row.hint}\n" if row.hint else ""
        items.append(
            EvalItem(
                group=row.subject,
                prompt=question(name, [image], hint + row.question, "scienceqa"),
                answer=LETTERS[row.answer],
                choices=tuple(row.choices),
            )
        )
    if not items:
        raise TaskFileError(
            f"{path}: expected questions of the split {_SPLIT} with a picture, got none; check the file"
        )
    return items


def _score(item: EvalItem, said: str) -> float:
    return float(match_letter(said, item.answer))


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    return mean_score(_score, "accuracy")(asked) | choosing.by_token(asked)


TASKS = {
    "scienceqa": Task(
        name="scienceqa",
        files="problems.json, pid_splits.json, test/ID/image.png",
        read=_read,
        score=_score,
        measure=_measure,
        wording=choosing.WORDING,
    )
}
