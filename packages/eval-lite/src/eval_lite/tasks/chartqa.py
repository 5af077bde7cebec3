"""ChartQA: test_human.json and test_augmented.json, lists of {"imgname", "query", "label"}; pictures in png/.

Source: github.com/vis-nlp/ChartQA, folder "ChartQA Dataset/test". Scored by relaxed accuracy; the benchmark's figure is
the mean of the two halves.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vlm_metrics import relaxed_accuracy

from ..measures import Measure, mean_of_groups
from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, Wording
from .files import find_file, picture, question, read_rows
from .task import Asked, Task, mean_score, scores_of


class _Row(msgspec.Struct):
    imgname: str
    query: str
    label: str


def _read(folder: Path) -> list[EvalItem]:
    items: list[EvalItem] = []
    for half in ("human", "augmented"):
        path = find_file(folder, f"*_{half}.json", f"test/*_{half}.json")
        for number, row in enumerate(read_rows(path, _Row), 1):
            image = picture(folder, (f"png/{row.imgname}", f"test/png/{row.imgname}"), path, number)
            prompt = question(f"{half}/{number}", [image], row.query, "chartqa")
            items.append(EvalItem(group=half, prompt=prompt, answer=row.label))
    return items


def _score(item: EvalItem, said: str) -> float:
    return relaxed_accuracy(said, item.answer)


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    halves = mean_of_groups(scores_of(asked, _score), [one.item.group for one in asked])
    return {"relaxed_accuracy": halves} | {
        name: measure for name, measure in mean_score(_score, "relaxed_accuracy")(asked).items() if "/" in name
    }


TASKS = {
    "chartqa": Task(
        name="chartqa",
        files="test_human.json, test_augmented.json, png/*.png",
        read=_read,
        score=_score,
        measure=_measure,
        wording=Wording(instruction=ANSWER_SHORTLY),
    )
}
