"""A task: a reader of one benchmark's own files, the wording of its questions, and its scoring rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..answers import Answer
from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import Wording


class Asked(NamedTuple):
    """An item and what the model gave for it."""

    item: EvalItem
    answer: Answer


Reader = Callable[[Path], list[EvalItem]]
"""A folder with the benchmark's files → its items, in the files' order. Raises `TaskFileError`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark."""

    name: str
    files: str
    """What its folder holds, in words; empty where nothing is needed."""
    read: Reader
    score: Callable[[EvalItem, str], float]
    """(item, what was said) → 0 wrong to 1 right: what the report shows of single answers."""
    measure: Callable[[Sequence[Asked]], Mapping[str, Measure]]
    """All answers → measures by name, the first of which is the task's own figure."""
    wording: Wording
    max_new_tokens: int = 16
    kind: Literal["question", "document"] = "question"
    """`document`: nothing is asked; what is measured is how well its text is predicted."""
    draw: Callable[[int | None], list[EvalItem]] | None = None
    """Of tasks that need no files: the first so many items of each group, None for all; `read` draws all."""
    read_examples: Reader | None = None
    """Worked examples, of a split that is not asked; None: the same files in a folder `examples` within the task's."""


def mean_score(score: Callable[[EvalItem, str], float], name: str) -> Callable[[Sequence[Asked]], dict[str, Measure]]:
    """The measure that is the mean of the items' scores, in all and by group where there are several."""

    def measure(asked: Sequence[Asked]) -> dict[str, Measure]:
        scores = scores_of(asked, score)
        groups = list(dict.fromkeys(one.item.group for one in asked))
        measures = {name: mean_of(scores)}
        if len(groups) > 1:
            for group in groups:
                members = [value for value, one in zip(scores, asked, strict=True) if one.item.group == group]
                measures[f"{name}/{group}"] = mean_of(members)
        return measures

    return measure


def scores_of(asked: Sequence[Asked], score: Callable[[EvalItem, str], float]) -> list[float]:
    """The score of each answer; what could not be asked is wrong."""
    return [0.0 if one.answer.skip_reason else float(score(one.item, one.answer.text)) for one in asked]
