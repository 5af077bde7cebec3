"""report.html: figures with intervals, pictures with right and wrong answers, errors, ties, what could not be asked."""

from collections.abc import Mapping, Sequence

from PIL import Image

from eval_lite import Asked, Figure
from evaluate_config import EvaluateConfig
from evaluate_results import Result, question_text
from interleave_data import SkipSample
from trainer_lite import Picture, Report, Share

_CARDS_A_TASK = 24
_ERRORS_A_TASK = 60
_PICTURES_A_CARD = 4
_LONGEST = 240


def write_report(
    config: EvaluateConfig,
    results: Sequence[Result],
    others: Sequence[Result],
    differences: Mapping[str, Mapping[str, Figure]],
) -> None:
    """Write the page; `others` and `differences` where two models were compared."""
    report = Report("Evaluation", config.checkpoint + (f" against {config.compare}" if config.compare else ""))
    report.add_facts(
        {
            "questions": f"{sum(len(result.answers) for result in results):,}",
            "put as": results[0].manner,
            "decided by": config.mode,
            "worked examples": _examples(config),
            "seed": config.seed,
            "questions a group": config.limit or "all",
        }
    )
    report.add_table(
        "Figures",
        ["task and figure", "value, 95 % interval", "n"],
        [
            [f"{result.questions.task.name}: {name}", _cell(measure.figure), measure.figure.n]
            for result in results
            for name, measure in result.measures.items()
        ],
        note="Shares in percent; of shares, Wilson's intervals; else the bootstrap's. n counts what was drawn "
        "independently. What could not be asked counts as wrong.",
    )
    if others:
        _add_differences(report, config, results, others, differences)
    for index, result in enumerate(results):
        _add_task(report, config, result, others[index] if others else None)
    config.folder.mkdir(parents=True, exist_ok=True)
    report.write(config.folder / "report.html")


def _examples(config: EvaluateConfig) -> str:
    if config.text_only_shots:
        return f"{config.text_only_shots}, without their pictures"
    return f"{config.shots} ({config.demonstrations})" if config.shots else "none"


def _cell(figure: Figure) -> Share | str:
    if 0 <= figure.low <= figure.value <= figure.high <= 1:
        return Share(figure.value, figure.low, figure.high, figure.n)
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"


def _add_differences(
    report: Report,
    config: EvaluateConfig,
    results: Sequence[Result],
    others: Sequence[Result],
    differences: Mapping[str, Mapping[str, Figure]],
) -> None:
    rows: list[list[str | Share]] = []
    for mine, theirs in zip(results, others, strict=True):
        task = mine.questions.task.name
        for name, figure in differences[task].items():
            # Not better or worse: of perplexity, or refusals of look-alikes, less is wanted.
            verdict = "higher" if figure.low > 0 else "lower" if figure.high < 0 else "undecided"
            values = [_cell(one.measures[name].figure) for one in (mine, theirs)]
            shown = f"{figure.value:+.4g} ({figure.low:+.4g} to {figure.high:+.4g})"
            rows.append([f"{task}: {name}", *values, shown, verdict])
    report.add_table(
        "Difference, drawn in pairs",
        ["task and figure", config.checkpoint, str(config.compare), "difference", "first is"],
        rows,
        note="The same units are drawn for both models (paired bootstrap), so what is hard about a question is left "
        "out of the interval. A verdict a figure, not corrected for their number.",
    )


def _add_task(report: Report, config: EvaluateConfig, result: Result, other: Result | None) -> None:
    task = result.questions.task
    if task.kind == "question":
        asked = result.asked
        scores = [0.0 if one.answer.skip_reason else task.score(one.item, one.answer.text) for one in asked]
        said = [one.text for one in other.answers] if other else []
        report.add_pictures(f"{task.name}: right and wrong answers", _cards(asked, scores, said))
        _add_errors(report, task.name, asked, scores)
    if (config.shots or config.text_only_shots) and not result.questions.has_own_examples and task.kind == "question":
        report.add_text(
            "", f"The worked examples of {task.name} are other questions of the same set, about other pictures."
        )
    if result.left_out:
        rows = [[reason, count] for reason, count in result.left_out.items()]
        report.add_table(f"{task.name}: could not be asked", ["reason", "questions"], rows)
    ties = [one for one in result.asked if one.answer.near_tie is not None]
    if ties:
        report.add_table(
            f"{task.name}: another batch size may answer these otherwise",
            ["question", "token", "logits apart by", "said"],
            [
                [one.item.id, one.answer.near_tie.step + 1, f"{one.answer.near_tie.margin:.1e}", _cut(one.answer.text)]
                for one in ties
                if one.answer.near_tie is not None
            ],
        )


def _add_errors(report: Report, task: str, asked: Sequence[Asked], scores: Sequence[float]) -> None:
    wrong = [one for one, score in zip(asked, scores, strict=True) if score < 0.5 and not one.answer.skip_reason]
    if wrong:
        shown = f"The first {_ERRORS_A_TASK} of {len(wrong)}." if len(wrong) > _ERRORS_A_TASK else ""
        report.add_table(
            f"{task}: errors",
            ["question", "asked", "expected", "said"],
            [
                [one.item.id, _cut(question_text(one.item)), _cut(_expected(one)), _cut(one.answer.text)]
                for one in wrong[:_ERRORS_A_TASK]
            ],
            note=shown,
        )


def _expected(one: Asked) -> str:
    return " | ".join(dict.fromkeys(one.item.references or (one.item.answer,)))


def _cards(asked: Sequence[Asked], scores: Sequence[float], said_by_other: Sequence[str]) -> list[Picture]:
    """Of each group the first right and the first wrong answer, as far as there is room."""
    seen: set[tuple[str, bool]] = set()
    cards: list[Picture] = []
    for index, (one, score) in enumerate(zip(asked, scores, strict=True)):
        key = (one.item.group, score >= 0.5)
        if key in seen or len(cards) == _CARDS_A_TASK or one.answer.skip_reason:
            continue
        image = _pictures(one)
        if image is None:
            continue
        seen.add(key)
        notes = {
            "group": one.item.group,
            "said": _cut(one.answer.text) or "(nothing)",
            "expected": _cut(_expected(one)),
        }
        if one.item.choices:
            notes["choices"] = _cut(" · ".join(one.item.choices))
        if said_by_other:
            notes["other said"] = _cut(said_by_other[index]) or "(nothing)"
        cards.append(Picture(image, caption=_cut(question_text(one.item)), notes=notes, is_correct=score >= 0.5))
    return cards


def _pictures(one: Asked, gap_px: int = 6) -> Image.Image | None:
    """A question's pictures side by side; None where it has none, or one cannot be read."""
    try:
        images = [image.decode() for image in one.item.prompt.images()[:_PICTURES_A_CARD]]
    except SkipSample:
        return None
    if not images:
        return None
    for image in images:
        image.thumbnail((640, 640))
    width = sum(image.width for image in images) + gap_px * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), (255, 255, 255))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap_px
    return sheet


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
