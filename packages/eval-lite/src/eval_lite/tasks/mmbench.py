"""MMBench: a TSV with index, question, hint, A to D, answer, category and image (base64, or the index of another row).

Source: MMBench_DEV_EN.tsv and its kin of open-compass/MMBench. A question counts if it is right in every rotation of
its choices (CircularEval, arXiv:2307.06281 §4.3). Rows of a million and above are rotations; a file that has none gets
them here.
"""

import binascii
from base64 import b64decode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from interleave_data import ImagePart
from vlm_metrics import circular_question, circular_rotations

from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import LETTERS
from . import choosing
from .files import find_file, need, question, read_table, refuse
from .task import Asked, Task, scores_of

_FIRST_ROTATION = 1_000_000
_LONGEST_INDEX = 64


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "MMBench*.tsv", "*.tsv")
    rows = read_table(path)
    pictures = {
        need(row, "index", path, number): need(row, "image", path, number) for number, row in enumerate(rows, 2)
    }
    has_rotations = any(index.isdecimal() and int(index) >= _FIRST_ROTATION for index in pictures)
    items: list[EvalItem] = []
    for number, row in enumerate(rows, 2):
        index = row["index"]
        if not index.isdecimal():
            raise refuse(path, number, "a whole number as index", index, "correct the row")
        encoded = pictures.get(row["image"], row["image"]) if len(row["image"]) <= _LONGEST_INDEX else row["image"]
        choices = [row[letter] for letter in "ABCD" if row.get(letter)]
        answer = need(row, "answer", path, number)
        if answer not in tuple(LETTERS[: len(choices)]):
            raise refuse(path, number, "a choice's letter as answer", answer, "take a split with answers (dev)")
        hint = f"{row['hint']}\n" if row.get("hint") else ""
        rotations = [(choices, LETTERS.index(answer))]
        if not has_rotations:
            rotations = circular_rotations(choices, LETTERS.index(answer))
        for turn, (listed, place) in enumerate(rotations):
            named = int(index) + turn * _FIRST_ROTATION
            items.append(
                EvalItem(
                    group=row.get("category", "") or "mmbench",
                    prompt=question(str(named), [_image(encoded, path, number)], hint + row["question"], "mmbench"),
                    answer=LETTERS[place],
                    choices=tuple(listed),
                    facts={"question": str(circular_question(named))},
                )
            )
    return items


def _image(encoded: str, path: Path, number: int) -> ImagePart:
    try:
        data = b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(path, number, "a picture in base64", encoded[:40], "get the file again") from error
    return ImagePart(data, key=sha256(data).hexdigest())


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    scores = scores_of(asked, choosing.score)
    right: dict[str, bool] = {}
    groups: dict[str, str] = {}
    for one, value in zip(asked, scores, strict=True):
        name = one.item.facts["question"]
        right[name] = right.get(name, True) and value == 1
        groups.setdefault(name, one.item.group)
    measures = {"circular_accuracy": mean_of(list(right.values()))}
    first = [value for one, value in zip(asked, scores, strict=True) if int(one.item.id) < _FIRST_ROTATION]
    if first:
        measures["accuracy"] = mean_of(first)
    for group in dict.fromkeys(groups.values()):
        measures[f"circular_accuracy/{group}"] = mean_of([right[name] for name in right if groups[name] == group])
    return measures | choosing.by_token(asked)


TASKS = {
    "mmbench": Task(
        name="mmbench",
        files="MMBench*.tsv, which holds its pictures",
        read=_read,
        score=choosing.score,
        measure=_measure,
        wording=choosing.WORDING,
    )
}
