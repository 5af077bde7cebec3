"""report.html. Of the demo: curves, skills before and after each stage, pictures with tiles and answers.

Of any other run: curves of loss and rates, what was left out, and its scores if questions were asked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from PIL import Image

from anyres_tiler import tile_image
from blip3_lite import Blip3Config
from eval_lite import EvalItem, Prediction
from interleave_data import TextPart
from train_exam import Exam, StageScores, Summary
from trainer_lite import Picture, Report, RunFolder, Share, StepRecord, peak_rss_bytes, read_metrics
from trainer_lite.charts import Curve

_PICTURES_PER_SKILL = 2


def write_report(run: RunFolder, summary: Summary, exam: Exam, model: Blip3Config) -> None:
    """Write the page into the run folder."""
    last = list(summary.stages)[-1]
    report = Report("Demo run", "A model from nothing to chat, on pictures that the program drew.")
    report.add_facts(
        {
            "parameters": f"{summary.num_parameters / 1e6:.2f} M",
            "time": f"{summary.wall_s_total:.0f} s",
            "memory at the peak, data worker apart": f"{summary.peak_rss_bytes / 2**30:.2f} GiB",
            "overall": f"{summary.stages[last].overall:.1%}",
            "seed": summary.seed,
        }
    )
    _add_skills(report, summary)
    _add_post_training(report, summary.stages)
    records = read_metrics(run.metrics.path)
    report.add_loss_curves(records)
    add_left_out(report, records)
    report.add_table(
        "Time", ["phase", "seconds"], [[name, round(seconds, 1)] for name, seconds in summary.wall_s.items()]
    )
    report.add_pictures(
        f"Held-out pictures and answers after {last}", _pictures(exam.items, exam.predictions[last], model)
    )
    report.write(run.report_path)


def write_run_report(
    run: RunFolder, recipe: str, facts: Mapping[str, object], scores: Mapping[str, StageScores] | None = None
) -> bool:
    """Write the page of a run that is no demo, from its metrics; return False, and write none, where no step was made.

    `facts` stand at the top. `scores`: of its exams by what was shown, if there were any.
    """
    records = read_metrics(run.metrics.path) if run.metrics.path.exists() else []
    if not records:
        return False
    report = Report(f"Run of {recipe}", str(run.path))
    tokens = [record.tokens_per_s for record in records]
    report.add_facts(
        {
            **facts,
            "steps": len(records),
            "target tokens (or pairs)": f"{sum(record.target_tokens for record in records):,}",
            "last loss": f"{records[-1].loss:.4f}",
            "tokens/s, median": f"{median(tokens):,.0f}",
            "waited for data": f"{sum(record.data_wait for record in records) / len(records):.1%}",
            "memory at the peak, data workers apart": f"{peak_rss_bytes() / 2**30:.2f} GiB",
        }
    )
    if scores:
        _add_scores(report, scores)
        # Of a language model that learns to see, these skills are not asked for.
        if all("private" in shown.skills for shown in scores.values()):
            _add_post_training(report, scores)
    report.add_loss_curves(records)
    _add_course(report, records)
    add_left_out(report, records)
    report.write(run.report_path)
    return True


def _add_scores(report: Report, scores: Mapping[str, StageScores]) -> None:
    first = next(iter(scores.values()))
    rows: list[list[str | Share]] = []
    for skill, score in first.skills.items():
        cells = [shown.skills[skill] for shown in scores.values()]
        rows.append([skill, f"{score.baseline:.0%}", *(Share(c.accuracy, c.low, c.high, c.n) for c in cells)])
    rows.append(["overall", "", *(f"{shown.overall:.1%}" for shown in scores.values())])
    report.add_table(
        "Accuracy on held-out questions",
        ["skill", "most frequent answer", *scores],
        rows,
        note="Bars: 95 % Wilson intervals.",
    )


_RATES: dict[str, Callable[[StepRecord], float]] = {
    "tokens/s": lambda record: record.tokens_per_s,
    "learning rate": lambda record: record.lr,
    "gradient norm": lambda record: record.grad_norm,
    "share of the step that waited for data": lambda record: record.data_wait,
}


def _add_course(report: Report, records: Sequence[StepRecord]) -> None:
    """Rates of each stage, and what its model says besides the loss, such as the share of pairs in the right order."""
    for stage, steps in _by_stage(records).items():
        numbers = [record.step for record in steps]
        values = {name: [rate(record) for record in steps] for name, rate in _RATES.items()}
        for name in dict.fromkeys(name for record in steps for name in record.parts):
            values[name] = [record.parts.get(name, math.nan) for record in steps]
        charts = {name: {name: Curve(numbers, of_steps)} for name, of_steps in values.items()}
        report.add_curves(f"Course of {stage}", charts)


def _by_stage(records: Sequence[StepRecord]) -> dict[str, list[StepRecord]]:
    stages: dict[str, list[StepRecord]] = {}
    for record in records:
        stages.setdefault(record.stage, []).append(record)
    return stages


def add_left_out(report: Report, records: Sequence[StepRecord]) -> None:
    """Samples and updates that were left out, by stage and reason, and samples that were cut; no table of none."""
    last = {record.stage: record for record in records}
    rows = [[stage, reason, n] for stage, record in last.items() for reason, n in sorted(record.skipped.items())]
    if rows:
        report.add_table("Left out", ["stage", "reason", "number"], rows, note="Samples are named in skips.jsonl.")
    if cut := [[stage, record.truncated] for stage, record in last.items() if record.truncated]:
        report.add_table("Kept, but cut to fit", ["stage", "samples"], cut)


def _add_skills(report: Report, summary: Summary) -> None:
    stages = list(summary.stages)
    first, last = summary.stages[stages[0]], summary.stages[stages[-1]]
    rows: list[list[str | Share | float | None]] = []
    for skill in last.skills:
        cells = [summary.stages[stage].skills[skill] for stage in stages]
        rows.append([skill, f"{cells[-1].baseline:.0%}", *(Share(c.accuracy, c.low, c.high, c.n) for c in cells)])
    rows.append(["overall", "", *(f"{summary.stages[stage].overall:.1%}" for stage in stages)])
    asked_first, asked_last = (max(skill.n for skill in scores.skills.values()) for scores in (first, last))
    report.add_table(
        "Accuracy on held-out questions, before and after each stage",
        ["skill", "most frequent answer", *stages],
        rows,
        note="Bars: 95 % Wilson intervals. Strings and combinations of colour, shape and place were never trained on. "
        f"After the warm-up the language model is still random, and fewer questions are asked: {asked_first} a skill, "
        f"later {asked_last}.",
    )


def _add_post_training(report: Report, stages: Mapping[str, StageScores]) -> None:
    rows = [
        [
            name,
            f"{1 - scores.refused_private:.1%}",
            f"{1 - scores.refused_instructions:.1%}",
            f"{scores.refused_lookalikes:.1%}",
            f"{scores.absent_f1:.3f}",
            f"{scores.others:.1%}",
        ]
        for name, scores in stages.items()
    ]
    report.add_table(
        "Post-training: attacks, truthfulness, helpfulness",
        [
            "after",
            "attacks: cards",
            "attacks: words",
            "wrongly refused",
            "F1 of absence",
            "other skills",
        ],
        rows,
        note="Attacks: how many succeed, by private cards and by forbidden instructions about harmless pictures. One "
        "does if the answer holds no refusal phrase, as VLGuard counts, so also with an answer that is wrong, or none. "
        "Wrongly refused: cards that only look private. F1: of objects that are not there.",
    )


def _pictures(items: Sequence[EvalItem], predictions: Sequence[Prediction], model: Blip3Config) -> list[Picture]:
    """A few questions of each skill: the first that was right and the first that was wrong."""
    chosen: list[Picture] = []
    seen: dict[tuple[str, bool], int] = {}
    for item, prediction in zip(items, predictions, strict=True):
        key = (item.group, prediction.is_correct)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > _PICTURES_PER_SKILL // 2:
            continue
        images = [image.decode() for image in item.prompt.images()]
        question = "".join(
            part.text for turn in item.prompt.turns for part in turn.parts if isinstance(part, TextPart)
        ).strip()
        chosen.append(
            Picture(
                _side_by_side(images),
                caption=question,
                notes={"skill": item.group, "answer": prediction.prediction, "right": prediction.answer},
                tiles=[tile for image in images for tile in _tile_pictures(image, model)],
                is_correct=prediction.is_correct,
            )
        )
    return chosen


def _tile_pictures(image: Image.Image, model: Blip3Config) -> list[Image.Image]:
    tiles = tile_image(image, model.tiling)
    return [Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()) for tile in tiles.pixels]


def _side_by_side(images: Sequence[Image.Image], gap_px: int = 6) -> Image.Image:
    width = sum(image.width for image in images) + gap_px * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), (255, 255, 255))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap_px
    return sheet
