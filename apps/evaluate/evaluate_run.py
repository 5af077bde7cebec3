"""Tasks read, questions asked, figures written. Bad input costs one line and status 2."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from blip3_lite import LoadedModel
from blip3_lite.folder import MANIFEST, read_manifest
from blip3_lite.opening import open_model
from eval_lite import (
    WORLD_TASKS,
    Answer,
    Asked,
    Asking,
    EvalItem,
    Figure,
    Measure,
    RandomDemonstrations,
    SimilarDemonstrations,
    Task,
    load_task,
)
from eval_lite.wording import Manner
from evaluate_config import EvaluateConfig
from interleave_data import TextPart


class EvaluateError(ValueError):
    """Something the user can mend, told in one line."""


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
    seconds: float

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
    near_tie: object = None
    nats: tuple[float, ...] = ()
    num_tokens: tuple[int, ...] = ()
    skip_reason: str = ""


def run(config: EvaluateConfig) -> int:
    """Evaluate; return the exit status (2 for input that cannot be used, 130 if it was interrupted)."""
    try:
        _evaluate(config)
    except KeyboardInterrupt:
        _say(f"\nevaluate: interrupted; the same line goes on from the answers in {config.folder}")
        return 130
    except (ValueError, OSError) as error:
        _say(f"evaluate: {error}")
        return 2
    return 0


def _evaluate(config: EvaluateConfig) -> None:
    # before the model is loaded, which takes longer
    questions = [_read(config, name, folder) for name, folder in config.places]
    paths = [Path(config.checkpoint), *([Path(config.compare)] if config.compare else [])]
    results = {place: _ask_all(config, path, questions) for place, path in zip(("", "other"), paths, strict=False)}
    for place, of_model in results.items():
        for result in of_model:
            _write_predictions(config.folder / "predictions" / place / f"{result.questions.task.name}.jsonl", result)
    differences = _differences(results[""], results["other"]) if config.compare else {}
    _write_figures(config, results, differences)
    from evaluate_report import write_report

    write_report(config, results[""], results.get("other", []), differences)
    for result in results[""]:
        for name, measure in result.measures.items():
            print(f"{result.questions.task.name} {name} {_shown(measure.figure)}")
    for task, figures in differences.items():
        for name, figure in figures.items():
            print(f"{task} {name} differs by {_shown(figure)}")
    _say(f"report {config.folder / 'report.html'}\nfigures {config.json_file}")


def _read(config: EvaluateConfig, name: str, folder: Path) -> Questions:
    task = load_task(name)
    if name not in WORLD_TASKS and not folder.is_dir():
        raise EvaluateError(
            f"task {name}: expected a folder {folder} with {task.files}, got none; put the files there, or name their "
            f"folder ({name}=FOLDER, or --data)"
        )
    items = task.read(folder)
    if config.mode == "likelihood" and task.kind == "question":
        items = [item for item in items if item.choices or item.candidates]
        if not items:
            raise EvaluateError(
                f"task {name}: expected questions with a list of possible answers for --mode likelihood, got none; "
                "use --mode say"
            )
    if config.limit is not None:
        items = _first_of_groups(items, config.limit)
    examples, has_own = items, False
    if (config.shots or config.text_only_shots) and task.kind == "question":
        if task.read_examples is not None:
            examples, has_own = task.read_examples(folder), True
        elif (folder / "examples").is_dir():
            examples, has_own = task.read(folder / "examples"), True
    return Questions(task, items, examples, has_own)


def _first_of_groups(items: Sequence[EvalItem], limit: int) -> list[EvalItem]:
    seen: Counter[str] = Counter()
    kept: list[EvalItem] = []
    for item in items:
        seen[item.group] += 1
        if seen[item.group] <= limit:
            kept.append(item)
    return kept


def _ask_all(config: EvaluateConfig, path: Path, questions: Sequence[Questions]) -> list[Result]:
    loaded, digest = _open(config, path), _digest(path)
    manner: Manner = "base" if loaded.config.model.chat == "plain" else "instruct"
    if config.manner != "auto":
        manner = config.manner
    return [_ask(config, loaded, digest, manner, one) for one in questions]


def _ask(config: EvaluateConfig, loaded: LoadedModel, digest: str, manner: Manner, questions: Questions) -> Result:
    task = questions.task
    asking = Asking(
        model=loaded.model,
        processor=loaded.processor,
        task=task,
        manner=manner,
        mode=config.mode,
        shots=config.shots,
        text_only_shots=config.text_only_shots,
        demonstrations=_demonstrations(config, loaded, questions),
        batch_size=config.batch_size,
    )
    name = asking.fingerprint(questions.items, f"{digest} {config.quantize}")
    with tqdm(total=len(questions.items), desc=task.name, unit="question", disable=None) as bar:
        answers = asking.ask(questions.items, config.folder / "answers" / f"{task.name}-{name}.jsonl", bar.update)
        seconds = float(bar.format_dict["elapsed"])
    result = [Asked(item, answer) for item, answer in zip(questions.items, answers, strict=True)]
    if all(answer.skip_reason for answer in answers):
        reasons = ", ".join(sorted({answer.skip_reason for answer in answers}))
        raise EvaluateError(
            f"task {task.name}: expected questions that can be asked, got none ({reasons}); check files"
        )
    return Result(questions, manner, answers, task.measure(result), seconds)


def _demonstrations(
    config: EvaluateConfig, loaded: LoadedModel, questions: Questions
) -> RandomDemonstrations | SimilarDemonstrations | None:
    if not (config.shots or config.text_only_shots) or questions.task.kind == "document":
        return None
    if config.demonstrations == "random":
        return RandomDemonstrations(questions.examples, config.seed)
    return SimilarDemonstrations(questions.examples, loaded.model, loaded.processor)


def _open(config: EvaluateConfig, path: Path) -> LoadedModel:
    dtype = None if config.quantize is None else torch.bfloat16
    with tqdm(desc=f"loading {path.name}", unit="tensor", disable=None, leave=False) as bar:
        loaded = open_model(
            path, quantize=config.quantize, dtype=dtype, on_count=bar.reset, on_tensor=lambda _: bar.update()
        )
    if not isinstance(loaded, LoadedModel):
        raise EvaluateError(f"model {path}: expected one that sees pictures, got a language model alone; name another")
    return loaded


def _digest(path: Path) -> str:
    """What tells this model's files from another's: the manifest's digests, or names, sizes and times."""
    if (path / MANIFEST).exists():
        listed = msgspec.json.encode(read_manifest(path, verify=False)["files"], order="sorted")
    else:
        files = sorted(one for one in path.rglob("*") if one.is_file())
        listed = msgspec.json.encode([(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files])
    return sha256(listed).hexdigest()


def _differences(one: Sequence[Result], other: Sequence[Result]) -> dict[str, dict[str, Figure]]:
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


def _write_predictions(path: Path, result: Result) -> None:
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


def _write_figures(
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


def _shown(figure: Figure) -> str:
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g}, n {figure.n})"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
