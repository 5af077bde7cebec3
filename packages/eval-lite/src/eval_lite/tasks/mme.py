"""MME: a folder a subtask, with pictures and, of the same name, a .txt of two lines "question TAB Yes" (or No).

Source: MME_Benchmark_release_version of BradyFu/Awesome-Multimodal-Large-Language-Models. Some subtasks have their
pictures in images/ and their texts in questions_answers_YN/. A subtask scores acc + acc⁺, of 200; the sums are those of
the subtasks that are there.
"""

from collections.abc import Sequence
from pathlib import Path

from vlm_metrics import MME_COGNITION, MME_PERCEPTION, mme_answer

from ..measures import Measure, mean_of, sum_of_groups
from ..prediction import EvalItem
from ..wording import Wording
from . import yes_no
from .files import TaskFileError, picture, question, refuse
from .task import Asked, Task, scores_of

_SUBTASKS = MME_PERCEPTION + MME_COGNITION


def _read(folder: Path) -> list[EvalItem]:
    items: list[EvalItem] = []
    for subtask in _SUBTASKS:
        place = folder / subtask
        apart = place / "questions_answers_YN"
        for path in sorted((apart if apart.is_dir() else place).glob("*.txt")):
            items += _of_picture(folder, subtask, path)
    if not items:
        raise TaskFileError(
            f"{folder}: expected folders of MME's subtasks ({', '.join(_SUBTASKS[:3])}, …) with .txt files, got none; "
            "put the release's folders there"
        )
    return items


def _of_picture(folder: Path, subtask: str, path: Path) -> list[EvalItem]:
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskFileError(f"{path}: expected UTF-8 text, got: {error}; get it again") from error
    if len(lines) != 2:
        raise TaskFileError(f"{path}: expected two questions, one a line, got {len(lines)}; get it again")
    names = [f"{subtask}/{part}{path.stem}{suffix}" for suffix in (".jpg", ".png") for part in ("images/", "")]
    items: list[EvalItem] = []
    for number, line in enumerate(lines, 1):
        text, _, label = line.rstrip().rpartition("\t")
        if label.lower() not in yes_no.CANDIDATES or not text:
            raise refuse(path, number, "question TAB Yes or No", line, "correct the line")
        image = picture(folder, names, path, number)
        items.append(
            EvalItem(
                group=subtask,
                prompt=question(f"{subtask}/{path.stem}/{number}", [image], text, "mme"),
                answer=label.lower(),
                candidates=yes_no.CANDIDATES,
                facts={"picture": f"{subtask}/{path.stem}"},
            )
        )
    return items


def _score(item: EvalItem, said: str) -> float:
    return float(mme_answer(said) == item.answer)


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    """A unit is a picture with its two questions: half of the points for each, and as many again for both."""
    right: dict[str, list[float]] = {}
    subtask_of: dict[str, str] = {}
    for one, value in zip(asked, scores_of(asked, _score), strict=True):
        right.setdefault(one.item.facts["picture"], []).append(value)
        subtask_of[one.item.facts["picture"]] = one.item.group
    points = {name: 100 * sum(values) / len(values) + 100 * (min(values) == 1) for name, values in right.items()}
    measures: dict[str, Measure] = {}
    for name, subtasks in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        members = [picture for picture in points if subtask_of[picture] in subtasks]
        if members:
            measures[name] = sum_of_groups([points[one] for one in members], [subtask_of[one] for one in members])
    for subtask in dict.fromkeys(subtask_of.values()):
        measures[f"score/{subtask}"] = mean_of([points[one] for one in points if subtask_of[one] == subtask])
    return measures


TASKS = {
    "mme": Task(
        name="mme",
        files="a folder a subtask (existence, count, …) with pictures and .txt files",
        read=_read,
        score=_score,
        measure=_measure,
        # The questions themselves end in "Please answer yes or no."
        wording=Wording(after=yes_no.WORDING.after),
    )
}
