"""MMMU: parquet files, or a JSON list, of question (with marks `<image 1>`), options, answer, question_type, image_1 …

Source: the data set MMMU/MMMU of the hub, validation split, a parquet file a subject; `options` is a list as text.
Pictures lie in the parquet file; in JSON, `image_1` is a path. Parquet needs pyarrow. A choice that cannot be read from
an answer is wrong here; the official code draws one at random.
"""

import ast
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from interleave_data import ImagePart, Part, Sample, TextPart, Turn
from vlm_metrics import mmmu_correct, mmmu_parse_choice, mmmu_parse_open

from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, LETTERS, Wording
from .files import TaskFileError, find_file, picture, read_rows, refuse
from .task import Task, mean_score

_MARK = re.compile(r"<image (\d)>")
_MOST_IMAGES = 7


def _read(folder: Path) -> list[EvalItem]:
    tables = sorted(folder.glob("**/*.parquet")) if folder.is_dir() else []
    if tables:
        rows = [(path, number, row) for path in tables for number, row in enumerate(_table(path), 1)]
    else:
        path = find_file(folder, "*.json")
        rows = [(path, number, row) for number, row in enumerate(read_rows(path, dict), 1)]
    return [_item(folder, path, number, row) for path, number, row in rows]


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TaskFileError(f"{path}: expected pyarrow, got none; install eval-lite[parquet]") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskFileError(f"{path}: expected a parquet file, got: {error}; get it again") from error


def _item(folder: Path, path: Path, number: int, row: Mapping[str, Any]) -> EvalItem:
    for name in ("id", "question", "answer"):
        if not isinstance(row.get(name), str):
            raise refuse(path, number, f"text as {name}", row.get(name), "is it the benchmark's own file?")
    images: dict[int, ImagePart] = {}
    for place in range(1, _MOST_IMAGES + 1):
        held = row.get(f"image_{place}")
        if isinstance(held, Mapping) and held.get("bytes"):
            images[place] = ImagePart(held["bytes"], key=sha256(held["bytes"]).hexdigest())
        elif isinstance(held, str):
            images[place] = picture(folder, (held, f"images/{held}"), path, number)
    choices = tuple(_listed(row.get("options"), path, number))
    answers = tuple(_listed(row["answer"], path, number)) if row["answer"].startswith("[") else (row["answer"],)
    is_choice = row.get("question_type", "multiple-choice") == "multiple-choice"
    if is_choice and answers[0] not in tuple(LETTERS[: len(choices)]):
        raise refuse(path, number, "a choice's letter as answer", answers[0], "take the validation split")
    subject = re.sub(r"^\w+?_(.*)_\d+$", r"\1", row["id"])
    turn = Turn(role="user", parts=_laid_out(row["question"], images))
    return EvalItem(
        group=subject,
        prompt=Sample(id=row["id"], source="mmmu", turns=(turn,)),
        answer=answers[0],
        references=answers,
        choices=choices if is_choice else (),
    )


def _listed(value: object, path: Path, number: int) -> list[str]:
    """A list, or a Python literal of one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise refuse(path, number, "a list as text", value, "is it the benchmark's own file?") from error
    return [str(one) for one in value] if isinstance(value, list | tuple) else []


def _laid_out(text: str, images: Mapping[int, ImagePart]) -> tuple[Part, ...]:
    """The question with its pictures where their marks are; those that only the choices name, behind it."""
    parts: list[Part] = []
    used: set[int] = set()
    for index, piece in enumerate(_MARK.split(text)):
        if index % 2 == 1 and int(piece) in images:
            parts.append(images[int(piece)])
            used.add(int(piece))
        elif index % 2 == 0 and piece:
            parts.append(TextPart(piece))
    return (*parts, *(image for place, image in images.items() if place not in used))


def _score(item: EvalItem, said: str) -> float:
    if item.choices:
        return float(mmmu_correct(mmmu_parse_choice(said, item.choices), item.answer))
    return float(mmmu_correct(mmmu_parse_open(said), item.references))


TASKS = {
    "mmmu": Task(
        name="mmmu",
        files="*.parquet below it, or a JSON list with pictures beside it",
        read=_read,
        score=_score,
        measure=mean_score(_score, "accuracy"),
        wording=Wording(instruction=ANSWER_SHORTLY),
    )
}
