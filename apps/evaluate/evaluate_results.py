"""What was asked and answered, and the files that are made of it: predictions and figures."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from eval_lite import Answer, Asked, EvalItem, Figure, Measure, NearTie, Task
from eval_lite.wording import Manner
from evaluate_config import EvaluateConfig
from interleave_data import TextPart


@dataclass(frozen=True)
class Questions:
    """A task with what is to be asked of it."""

    task: Task
    items: list[EvalItem]
    examples: list[EvalItem]
    has_own_examples: bool
    """Whether the worked examples are of a split of their own; else they are other questions of the same one."""


@dataclass(frozen=True)
class Result:
    """A task as one model has answered it."""

    questions: Questions
    manner: Manner
    answers: list[Answer]
    measures: Mapping[str, Measure]

    @property
    def asked(self) -> list[Asked]:
        """Items with their answers."""
        return [Asked(item, answer) for item, answer in zip(self.questions.items, self.answers, strict=True)]

    @property
    def left_out(self) -> dict[str, int]:
        """Items that could not be asked, by reason; they count as wrong."""
        return dict(sorted(Counter(one.skip_reason for one in self.answers if one.skip_reason).items()))


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a file of predictions."""

    id: str
    group: str
    question: str
    answer: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    prediction: str
    score: float
    tokens: tuple[int, ...] = ()
    near_tie: NearTie | None = None
    nats: tuple[float, ...] = ()
    num_tokens: tuple[int, ...] = ()
    skip_reason: str = ""


def differences_of(one: Sequence[Result], other: Sequence[Result]) -> dict[str, dict[str, Figure]]:
    """This model's figures less the other's, where both have the same units."""
    return {
        mine.questions.task.name: {
            name: measure.less(theirs.measures[name])
            for name, measure in mine.measures.items()
            if name in theirs.measures and len(theirs.measures[name].rows) == len(measure.rows)
        }
        for mine, theirs in zip(one, other, strict=True)
    }


def question_text(item: EvalItem) -> str:
    """The question's own words."""
    return "".join(part.text for part in item.prompt.turns[-1].parts if isinstance(part, TextPart)).strip()


def write_predictions(path: Path, result: Result) -> None:
    """Write one JSON object an item, in the items' order."""
    score = result.questions.task.score
    lines = [
        Line(
            id=item.id,
            group=item.group,
            question=question_text(item),
            answer=item.answer,
            references=item.references,
            choices=item.choices,
            prediction=answer.text,
            score=0.0 if answer.skip_reason else float(score(item, answer.text)),
            tokens=answer.tokens,
            near_tie=answer.near_tie,
            nats=answer.nats,
            num_tokens=answer.num_tokens,
            skip_reason=answer.skip_reason,
        )
        for item, answer in result.asked
    ]
    _write(path, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def write_figures(
    config: EvaluateConfig,
    results: Mapping[str, Sequence[Result]],
    differences: Mapping[str, Mapping[str, Figure]],
) -> None:
    """No time, no host and no path of the output goes in: the same line gives the same bytes."""
    settings = {name: getattr(config, name) for name in ("mode", "shots", "text_only_shots", "demonstrations", "seed")}
    content: dict[str, object] = {
        "checkpoint": config.checkpoint,
        "settings": settings | {"limit": config.limit, "quantize": config.quantize},
        **_of_model(results[""]),
    }
    if config.compare:
        content["compare"] = {
            "checkpoint": config.compare,
            **_of_model(results["other"]),
            "differences": differences,
        }
    _write(config.json_file, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _of_model(results: Sequence[Result]) -> dict[str, object]:
    return {
        "manner": results[0].manner,
        "tasks": {
            result.questions.task.name: {name: measure.figure for name, measure in result.measures.items()}
            for result in results
        },
        "left_out": {result.questions.task.name: result.left_out for result in results if result.left_out},
        "near_ties": {
            result.questions.task.name: sum(one.near_tie is not None for one in result.answers) for result in results
        },
    }


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.writing")
    work.write_bytes(content)
    os.replace(work, path)
