"""POPE: coco_pope_random.json, _popular, _adversarial; a JSON object a line: {"question_id", "image", "text", "label"}.

Source: RUCAIBox/POPE, output/coco; pictures of COCO's val2014. An answer is "no" if No, no or not is a word of its
first sentence, else "yes", as the benchmark's own code reads it.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vlm_metrics import pope_answer

from ..measures import Measure, f1_of, mean_of
from ..prediction import EvalItem
from . import yes_no
from .files import TaskFileError, picture, question, read_lines, refuse
from .task import Asked, Task, scores_of


class _Row(msgspec.Struct):
    image: str
    text: str
    label: str
    question_id: int | str | None = None


def _read(folder: Path) -> list[EvalItem]:
    paths = sorted({*folder.glob("*pope_*.json"), *folder.glob("*pope_*.jsonl")}) if folder.is_dir() else []
    if not paths:
        raise TaskFileError(f"{folder}: expected coco_pope_*.json, got none; put POPE's files there")
    items: list[EvalItem] = []
    for path in paths:
        split = path.stem.rsplit("pope_", 1)[-1]
        for number, row in enumerate(read_lines(path, _Row), 1):
            if row.label not in yes_no.CANDIDATES:
                raise refuse(path, number, "yes or no as label", row.label, "correct the row")
            image = picture(folder, (f"val2014/{row.image}", f"images/{row.image}", row.image), path, number)
            prompt = question(
                f"{split}/{number if row.question_id is None else row.question_id}", [image], row.text, "pope"
            )
            items.append(EvalItem(group=split, prompt=prompt, answer=row.label, candidates=yes_no.CANDIDATES))
    return items


def _score(item: EvalItem, said: str) -> float:
    return float(pope_answer(said) == item.answer)


def _figures(asked: Sequence[Asked], suffix: str) -> dict[str, Measure]:
    # What was not asked was not answered: neither class, and wrong.
    said = [not one.answer.skip_reason and pope_answer(one.answer.text) == "yes" for one in asked]
    there = [one.item.answer == "yes" for one in asked]
    return {
        f"f1{suffix}": f1_of(said, there),
        f"accuracy{suffix}": mean_of(scores_of(asked, _score)),
        f"precision{suffix}": yes_no.share_of(there, said),
        f"recall{suffix}": yes_no.share_of(said, there),
        f"yes_ratio{suffix}": mean_of(said),
    }


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    splits = list(dict.fromkeys(one.item.group for one in asked))
    measures = _figures(asked, "")
    for split in splits if len(splits) > 1 else ():
        measures |= _figures([one for one in asked if one.item.group == split], f"/{split}")
    return measures


TASKS = {
    "pope": Task(
        name="pope",
        files="coco_pope_*.json, val2014/*.jpg",
        read=_read,
        score=_score,
        measure=_measure,
        wording=yes_no.WORDING,
    )
}
