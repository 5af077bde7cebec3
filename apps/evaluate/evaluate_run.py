"""Tasks read, questions asked, figures written. Bad input costs one line and status 2."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from blip3_lite import LoadedModel
from blip3_lite.device import choose_device, device_words
from blip3_lite.folder import MANIFEST, read_manifest
from blip3_lite.opening import open_model
from eval_lite import (
    WORLD_TASKS,
    Asked,
    Asking,
    EvalItem,
    Figure,
    RandomDemonstrations,
    SimilarDemonstrations,
    load_task,
    read_answers,
)
from eval_lite.wording import Manner
from evaluate_config import EvaluateConfig
from evaluate_report import write_report
from evaluate_results import Questions, Result, differences_of, write_figures, write_predictions


class EvaluateError(ValueError):
    """Something the user can mend, told in one line."""


def run(config: EvaluateConfig) -> int:
    """Evaluate; return the exit status (2 for input that cannot be used, 130 if it was interrupted)."""
    try:
        _evaluate(config)
    except KeyboardInterrupt:
        _say(f"\nevaluate: interrupted; the same line goes on from the answers in {config.folder}")
        return 130
    except EvaluateError as error:
        _say(f"evaluate: {error}")
        return 2
    except OSError as error:
        _say(f"evaluate: cannot write below {config.folder}: {error.strerror or error}")
        return 2
    return 0


@contextmanager
def _checking_input() -> Iterator[None]:
    """What readers and loaders say of files is the user's to mend; errors anywhere else are ours."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise EvaluateError(str(error)) from error


def _evaluate(config: EvaluateConfig) -> None:
    # before the model is loaded, which takes longer
    paths = [Path(config.checkpoint), *([Path(config.compare)] if config.compare else [])]
    for path in paths:
        if not path.exists():
            raise EvaluateError(f"checkpoint {path}: expected a folder, got nothing there; check the path")
    with _checking_input():
        questions = [_read(config, name, folder) for name, folder in config.places]
    results = {place: _ask_all(config, path, questions) for place, path in zip(("", "other"), paths, strict=False)}
    for place, of_model in results.items():
        for result in of_model:
            write_predictions(config.folder / "predictions" / place / f"{result.questions.task.name}.jsonl", result)
    differences = differences_of(results[""], results["other"]) if config.compare else {}
    write_figures(config, results, differences)
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
    items = task.read(folder) if task.draw is None else task.draw(config.limit)
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
    with _checking_input():
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
    file = config.folder / "answers" / f"{task.name}-{name}.jsonl"
    with _checking_input():
        read_answers(file)
    with tqdm(total=len(questions.items), desc=task.name, unit="question", disable=None) as bar:
        answers = asking.ask(questions.items, file, bar.update)
    result = [Asked(item, answer) for item, answer in zip(questions.items, answers, strict=True)]
    if all(answer.skip_reason for answer in answers):
        reasons = ", ".join(sorted({answer.skip_reason for answer in answers}))
        raise EvaluateError(
            f"task {task.name}: expected questions that can be asked, got none ({reasons}); check files"
        )
    return Result(questions, manner, answers, task.measure(result))


def _demonstrations(
    config: EvaluateConfig, loaded: LoadedModel, questions: Questions
) -> RandomDemonstrations | SimilarDemonstrations | None:
    if not (config.shots or config.text_only_shots) or questions.task.kind == "document":
        return None
    if config.demonstrations == "random":
        return RandomDemonstrations(questions.examples, config.seed)
    with _checking_input():
        return SimilarDemonstrations(questions.examples, loaded.model, loaded.processor)


def _open(config: EvaluateConfig, path: Path) -> LoadedModel:
    dtype = None if config.quantize is None else torch.bfloat16
    device = choose_device(config.device)
    with tqdm(desc=f"loading {path.name}", unit="tensor", disable=None, leave=False) as bar:

        def advance(_: str) -> None:
            bar.update()

        loaded = open_model(
            path,
            quantize=config.quantize,
            dtype=dtype,
            device=device,
            on_count=bar.reset,
            on_tensor=advance,
        )
    if not isinstance(loaded, LoadedModel):
        raise EvaluateError(f"model {path}: expected one that sees pictures, got a language model alone; name another")
    _say(f"model {path}; {device_words(device)}")
    return loaded


def _digest(path: Path) -> str:
    """What tells this model's files from another's: the manifest's digests, or names, sizes and times."""
    if (path / MANIFEST).exists():
        listed = msgspec.json.encode(read_manifest(path, verify=False)["files"], order="sorted")
    else:
        files = sorted(one for one in path.rglob("*") if one.is_file())
        listed = msgspec.json.encode([(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files])
    return sha256(listed).hexdigest()


def _shown(figure: Figure) -> str:
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g}, n {figure.n})"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
