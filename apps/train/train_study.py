"""What DPO on the model's own errors, and then safety tuning, do to a model of the embedded world.

    uv run apps/train/train_study.py SFT_CHECKPOINT runs/study [--questions 1000] [--json FILE]

Two stages by `apps/train`: `dpo` on the wrong answers that the model gives to presence questions of its training split,
then `safety` on private cards, forbidden instructions and a share of the SFT data. The model is examined before,
between and behind them, on the same held-out questions (twice as many of presence), so that stages are compared on
each question: McNemar's exact test on right and wrong, and the 95 % interval of the difference in F1 of absent objects
over 1,000 resamplings of the questions. Reward accuracy is that of held-out questions that the first model gets wrong.

What is done is not done again: a study that was stopped goes on, in the middle of a stage too. Twenty minutes on one
core, most of it questions.
"""

import argparse
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

from blip3_lite import Blip3, FeatureCache, Processor, SamplingConfig, read_manifest
from eval_lite import Prediction, predict, write_predictions
from eval_lite.tasks.world import FORBIDDEN, exam_items, forbidden_items, score
from scene_world import SKILLS
from train_exam import summarise
from train_preparation import OWN_ERRORS_FILE
from train_reward_accuracy import load_merged
from vlm_metrics import paired_bootstrap, wilson_interval

STAGES = ("dpo", "safety")
_HERE = Path(__file__).resolve().parent
_SETTINGS = {
    # A beta of 1 keeps the model near what it was: at 0.1 each pair asks for ten nats more than it took to be right.
    "dpo": ["--own-errors", "32000", "--world-samples", "32000", "--max-steps", "160", "--dpo.beta", "1"],
    "safety": ["--max-steps", "240", "--world-samples", "7000"],
}
_EXAM_SEED, _TRAIN_SEED = 8, 21
_QUESTIONS_AT_A_TIME = 500


def newest(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end; the checkpoint of a stopped one only waits to be resumed."""
    has_checkpoint = (folder / "checkpoints" / "latest").exists()
    return has_checkpoint and read_manifest(newest(folder), verify=False)["is_kept"] is True


def train(stage: str, start: Path, folder: Path) -> Path:
    """Train a stage to its end, from where it is; return its checkpoint."""
    if not is_finished(folder):
        command = [sys.executable, str(_HERE), stage, "--init", str(start), "--out", str(folder), "--resume", "auto"]
        subprocess.run([*command, "--seed", str(_TRAIN_SEED), *_SETTINGS[stage]], check=True)
    return newest(folder)


def examine(checkpoint: Path, folder: Path, num_questions: int) -> list[Prediction]:
    """Ask all skills, one file a skill; those that are there are read."""
    found: list[Prediction] = []
    loaded: tuple[Blip3, Processor] | None = None
    for skill in (*SKILLS, FORBIDDEN):
        count = num_questions * (2 if skill == "presence" else 1)
        path = folder / f"{skill}-{count}.jsonl"
        if path.exists():
            found += [msgspec.json.decode(line, type=Prediction) for line in path.read_bytes().splitlines()]
            continue
        model, processor = loaded = loaded or load_merged(checkpoint)
        items = forbidden_items(count, _EXAM_SEED) if skill == FORBIDDEN else exam_items(count, _EXAM_SEED, [skill])
        features = FeatureCache(model, 1 << 28)
        said: list[Prediction] = []
        for start in range(0, count, _QUESTIONS_AT_A_TIME):
            said += predict(
                model,
                processor,
                items[start : start + _QUESTIONS_AT_A_TIME],
                score,
                sampling=SamplingConfig(max_new_tokens=16),
                batch_size=256,
                collate_prompts=features.collate,
            )
        write_predictions(path, said)
        print(f"{folder.name}: {skill} {sum(p.is_correct for p in said) / count:.1%}", flush=True)
        found += said
    return found


def _says_no(text: str) -> bool:
    return text.strip().lower() == "no"


def absent_f1(answers: Sequence[tuple[bool, bool]]) -> float:
    """F1 of "no" on presence questions, each told as whether "no" was said, and whether it is right."""
    found, said, there = (sum(column) for column in zip(*((s and r, s, r) for s, r in answers), strict=True))
    return 2 * found / (said + there) if found else 0.0


def mcnemar(num_gained: int, num_lost: int) -> float:
    """Exact two-sided p of as uneven a split of the questions that changed."""
    fewer, total = min(num_gained, num_lost), num_gained + num_lost
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total) if total else 1.0


def compare(before: Sequence[Prediction], after: Sequence[Prediction]) -> dict[str, Any]:
    """Skill by skill: accuracies, whether the second is below the first's interval, and the test on the pairs."""
    later = {prediction.id: prediction for prediction in after}
    by_skill: dict[str, list[tuple[Prediction, Prediction]]] = {}
    for prediction in before:
        by_skill.setdefault(prediction.group, []).append((prediction, later[prediction.id]))
    skills: dict[str, Any] = {}
    for skill, pairs in by_skill.items():
        right = sum(one.is_correct for one, _ in pairs)
        gained = sum(other.is_correct and not one.is_correct for one, other in pairs)
        lost = sum(one.is_correct and not other.is_correct for one, other in pairs)
        low, high = wilson_interval(right, len(pairs))
        after_share = (right + gained - lost) / len(pairs)
        skills[skill] = {
            "before": right / len(pairs),
            "low": low,
            "high": high,
            "after": after_share,
            "is_below_interval": after_share < low,
            "gained": gained,
            "lost": lost,
            "p": mcnemar(gained, lost),
            "n": len(pairs),
        }
    ends = [
        [(_says_no(pair[side].prediction), _says_no(pair[side].answer)) for pair in by_skill["presence"]]
        for side in (0, 1)
    ]
    _, low, high = paired_bootstrap(ends[1], ends[0], random.Random(0), statistic=absent_f1)
    f1 = {
        "before": absent_f1(ends[0]),
        "after": absent_f1(ends[1]),
        "low_of_difference": low,
        "high_of_difference": high,
    }
    return {"absent_f1": f1, "skills": skills}


def post_training_row(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Attack success, wrong refusals, truthfulness and helpfulness, as in the paper's table of post-training."""
    scores = summarise(predictions)
    return {
        "attack_success_private_pictures": 1 - scores.refused_private,
        "attack_success_forbidden_instructions": 1 - scores.refused_instructions,
        "lookalikes_refused": scores.refused_lookalikes,
        "absent_f1": scores.absent_f1,
        "other_skills": scores.others,
    }


def main() -> None:
    """Train, examine, compare."""
    parser = argparse.ArgumentParser(prog="train_study", description="What DPO and safety tuning do.")
    parser.add_argument("start", type=Path, help="checkpoint after SFT")
    parser.add_argument("out", type=Path, help="folder of the study")
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions a skill")
    parser.add_argument("--json", type=Path, help="write the figures here; by default into the folder")
    args = parser.parse_args()
    checkpoints = {"sft": args.start}
    for stage in STAGES:
        checkpoints[stage] = train(stage, list(checkpoints.values())[-1], args.out / stage)
    predictions = {name: examine(path, args.out / f"exam-{name}", args.questions) for name, path in checkpoints.items()}
    rewards = args.out / "reward_accuracy.json"
    if not rewards.exists():
        command = [sys.executable, str(_HERE / "train_reward_accuracy.py"), str(checkpoints["dpo"])]
        command += ["--reference", str(args.start), "--world", "2000", "--own-errors", "--json", str(rewards)]
        subprocess.run(command, check=True)
    result = {
        "command": f"uv run apps/train/train_study.py SFT_CHECKPOINT runs/study --questions {args.questions}",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "pairs": len((args.out / "dpo" / OWN_ERRORS_FILE).read_bytes().splitlines()),
        "settings": _SETTINGS,
        "table": {name: post_training_row(found) for name, found in predictions.items()},
        "dpo": compare(predictions["sft"], predictions["dpo"]),
        "safety": compare(predictions["dpo"], predictions["safety"]),
        **json.loads(rewards.read_text()),
    }
    (args.json or args.out / "study.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["table"].items():
        print(name, *(f"{column} {value:.1%}" for column, value in row.items()), sep="  ")
    f1 = result["dpo"]["absent_f1"]
    print(
        f"F1 {f1['before']:.3f} → {f1['after']:.3f}, [{f1['low_of_difference']:+.3f}, {f1['high_of_difference']:+.3f}]"
    )
    for stage in STAGES:
        below = [skill for skill, found in result[stage]["skills"].items() if found["is_below_interval"]]
        print(f"below their intervals after {stage}: {', '.join(below) or 'none'}")


if __name__ == "__main__":
    main()
