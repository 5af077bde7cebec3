"""Figures, verdict and page of one ablation, from the answers of its arms."""

from collections.abc import Mapping, Sequence

import msgspec

from eval_lite import EvalItem, Prediction
from interleave_data import TextPart
from train_ablate_arm import ArmResult
from train_ablate_picture import draw
from train_ablate_plan import Ablation, Contrast
from train_ablate_statistics import Answers, Estimate, Verdict, contrast, judge, overall, share
from trainer_lite import Picture, Report, Share
from vlm_metrics import binary_f1

_SHOWN_PER_SKILL = 2
_WORDS: dict[Verdict, str] = {
    "agrees": "all that decides came as the paper has it",
    "disagrees": "something that decides came otherwise than the paper has it",
    "undecided": "the intervals do not tell",
    "invalid": "the control was not detected, so nothing else could have been",
}


class ArmFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One arm over its seeds."""

    means: str
    skills: dict[str, Estimate]
    """Share of right answers."""
    seconds: list[float]
    """Of each seed, on one thread."""
    losses: list[float]
    """At the last step of each seed; empty without training."""
    absent_f1: list[float]
    """F1 of "no" on presence questions by seed; empty where none are asked."""


class ContrastFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was expected of a contrast, and what came."""

    rule: Contrast
    estimate: Estimate
    verdict: Verdict


class Conclusion(msgspec.Struct, frozen=True, kw_only=True):
    """result.json."""

    ablation: str
    title: str
    claim: str
    source: str
    done: str
    verdict: Verdict
    control: ContrastFigures
    """The control's arm with its own pictures less the same with exchanged ones."""
    contrasts: list[ContrastFigures]
    arms: dict[str, ArmFigures]
    num_seeds: int
    num_questions: int
    """Of each skill."""
    seconds: float
    """Of all arms, on one thread each; the shared start is not among them."""
    date: str
    machine: str
    torch: str


def _by_skill(predictions: Sequence[Prediction]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for prediction in predictions:
        found.setdefault(prediction.group, []).append(prediction.is_correct)
    return found


def _answers(answered: Sequence[Sequence[Prediction]], skills: Sequence[str]) -> Answers:
    rows = [_by_skill(predictions) for predictions in answered]
    return [[right for skill in skills for right in row[skill]] for row in rows]


def _contrast_figures(rule: Contrast, by_arm: Mapping[str, Sequence[ArmResult]]) -> ContrastFigures:
    answers = {arm: _answers([one.predictions for one in by_arm[arm]], rule.skills) for arm in rule.weights}
    estimate = contrast(answers, rule.weights)
    return ContrastFigures(rule=rule, estimate=estimate, verdict=judge(estimate, rule.expects, rule.margin))


def _control_figures(ablation: Ablation, by_arm: Mapping[str, Sequence[ArmResult]]) -> ContrastFigures:
    control = ablation.control
    own, exchanged = "own pictures", "exchanged pictures"
    answers = {
        own: _answers([one.predictions for one in by_arm[control.arm]], control.skills),
        exchanged: _answers([one.exchanged for one in by_arm[control.arm]], control.skills),
    }
    rule = Contrast(
        says=f"control ({control.arm}): own above exchanged pictures",
        weights={own: 1, exchanged: -1},
        skills=control.skills,
    )
    estimate = contrast(answers, rule.weights)
    return ContrastFigures(rule=rule, estimate=estimate, verdict=judge(estimate, "more", 0.0))


def conclude(
    name: str, ablation: Ablation, by_arm: Mapping[str, Sequence[ArmResult]], *, date: str, machine: str, torch: str
) -> Conclusion:
    """All figures and the verdict. `by_arm`: the results of each arm, the same seeds in the same order."""
    contrasts = [_contrast_figures(rule, by_arm) for rule in ablation.contrasts]
    control = _control_figures(ablation, by_arm)
    deciding: list[Verdict] = [found.verdict for found in contrasts if found.rule.decides]
    first = by_arm[ablation.control.arm]
    return Conclusion(
        ablation=name,
        title=ablation.title,
        claim=ablation.claim,
        source=ablation.source,
        done=ablation.done,
        verdict=overall(deciding, control.verdict),
        control=control,
        contrasts=contrasts,
        arms={arm: _arm_figures(ablation, arm, results) for arm, results in by_arm.items()},
        num_seeds=len(first),
        num_questions=len(first[0].predictions) // len(ablation.skills),
        seconds=round(sum(sum(one.seconds.values()) for results in by_arm.values() for one in results), 1),
        date=date,
        machine=machine,
        torch=torch,
    )


def _arm_figures(ablation: Ablation, arm: str, results: Sequence[ArmResult]) -> ArmFigures:
    return ArmFigures(
        means=ablation.arms[arm].means,
        skills={skill: share(_answers([one.predictions for one in results], [skill])) for skill in ablation.skills},
        seconds=[round(sum(one.seconds.values()), 1) for one in results],
        losses=[one.loss for one in results if one.loss is not None],
        absent_f1=[_absent_f1(one.predictions) for one in results] if "presence" in ablation.skills else [],
    )


def _absent_f1(predictions: Sequence[Prediction]) -> float:
    asked = [one for one in predictions if one.group == "presence"]
    said = [one.prediction.strip().lower() for one in asked]
    return round(binary_f1(said, [one.answer for one in asked], positive="no").f1, 4)


def write_page(
    conclusion: Conclusion, by_arm: Mapping[str, Sequence[ArmResult]], items: Sequence[EvalItem]
) -> tuple[Report, str]:
    """The page, ready to be written, and its picture (SVG)."""
    picture = draw(conclusion)
    report = Report(f"Ablation: {conclusion.title}", f"{conclusion.ablation}, {conclusion.date}")
    report.add_facts(
        {
            "verdict": conclusion.verdict,
            "seeds an arm": conclusion.num_seeds,
            "questions a skill": conclusion.num_questions,
            "time of all arms, one thread": f"{conclusion.seconds:.0f} s",
            "machine": conclusion.machine,
            "torch": conclusion.torch,
        }
    )
    report.add_text("Verdict", f"{conclusion.verdict.capitalize()}: {_WORDS[conclusion.verdict]}.")
    report.add_text("What the paper says", f"{conclusion.claim}\n\nSource: {conclusion.source}.")
    report.add_text("What was done", conclusion.done)
    report.add_html("Figures", f'<div class="card">{picture}</div>')
    _add_contrasts(report, conclusion)
    _add_arms(report, conclusion)
    report.add_pictures("Some of the questions, answered with the first seed", _pictures(by_arm, items))
    return report, picture


def _add_contrasts(report: Report, conclusion: Conclusion) -> None:
    rows: list[list[str]] = []
    for found in (conclusion.control, *conclusion.contrasts):
        rule, estimate = found.rule, found.estimate
        is_control = found is conclusion.control
        expected = "above 0" if rule.expects == "more" else f"within ±{100 * rule.margin:.0f}"
        seeds = ", ".join(f"{100 * value:+.1f}" for value in estimate.by_seed)
        passed = {"agrees": "detected"}.get(found.verdict, "not detected") if is_control else found.verdict
        role = "control" if is_control else "decides" if rule.decides else "shown only"
        interval = f"{100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"
        rows.append([rule.says, role, expected, f"{100 * estimate.value:+.1f}", interval, seeds, passed])
    report.add_table(
        "What was expected and what came, in points",
        ["", "role", "expected", "difference", "95 % interval", "by seed", "verdict"],
        rows,
        note="Fixed before the run: above 0 agrees where the whole interval lies above 0, and disagrees where it lies "
        "below; within a margin agrees where the whole interval lies in it, and disagrees where it lies outside. "
        "Anything else is undecided. The verdict disagrees where one deciding line does, and agrees where all do; "
        "without the control it is invalid. Intervals take both seeds and questions as drawn from many (two-way "
        "variance components, Student's t), on the same questions and seeds of both arms.",
    )


def _add_arms(report: Report, conclusion: Conclusion) -> None:
    skills = list(next(iter(conclusion.arms.values())).skills)
    rows = [
        [
            arm,
            *(
                Share(figure.value, figure.low, figure.high, figure.n * conclusion.num_seeds)
                for figure in (figures.skills[skill] for skill in skills)
            ),
            f"{sum(figures.seconds) / len(figures.seconds):.0f} s",
        ]
        for arm, figures in conclusion.arms.items()
    ]
    report.add_table("Right answers by arm, in %", ["arm", *skills, "time of a seed"], rows)
    told = {arm: figures.absent_f1 for arm, figures in conclusion.arms.items() if figures.absent_f1}
    if told:
        facts = {arm: ", ".join(f"{one:.3f}" for one in values) for arm, values in told.items()}
        report.add_facts(facts, 'F1 of "no" on presence questions, by seed')
    report.add_facts({arm: figures.means for arm, figures in conclusion.arms.items()}, "Arms")


def _pictures(by_arm: Mapping[str, Sequence[ArmResult]], items: Sequence[EvalItem]) -> list[Picture]:
    shown: dict[str, int] = {}
    cards: list[Picture] = []
    for index, item in enumerate(items):
        images = item.prompt.images()
        if shown.get(item.group, 0) == _SHOWN_PER_SKILL or not images:
            continue
        shown[item.group] = shown.get(item.group, 0) + 1
        answers = {arm: results[0].predictions[index] for arm, results in by_arm.items()}
        assert all(answer.id == item.id for answer in answers.values())
        said = {arm: f"{'✓' if one.is_correct else '✗'} {one.prediction}" for arm, one in answers.items()}
        cards.append(Picture(images[-1].decode(), caption=_question(item), notes={"known": item.answer, **said}))
    return cards


def _question(item: EvalItem) -> str:
    texts = [part.text for part in item.prompt.turns[-1].parts if isinstance(part, TextPart)]
    return f"{item.group}: {texts[-1] if texts else ''}"
