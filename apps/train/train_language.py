"""A published language model learns to see: a drawn world's vision tower and connector in front of it.

First the tower and the connector are warmed up on drawn labels until image tokens are the words for what is drawn (see
`train_vision`), the language model waiting; then its adapters learn to answer questions about pictures. The exam asks
with the right pictures and with exchanged ones: only the difference shows sight.
"""

from pathlib import Path

import msgspec
import torch

from blip3_lite import Blip3, FeatureCache, Processor, save_model
from blip3_lite.assembly import join_parts
from eval_lite import write_predictions
from phi3_lite import load_lm
from scene_world import PictureKind
from siglip_lite import SiglipVision
from train_config import LanguageRun, run_path
from train_errors import BadInputError, checking_input
from train_exam import Exam, StageScores, with_exchanged_pictures
from train_report import write_run_report
from train_stages import CheckpointFiles, fit_stage, merge_adapters, stage_trainer
from train_stream import IMAGE_CACHE_BYTES, data_of_file, make_stream
from train_terminal import announce, say
from train_vision import fit_warmup, label_words, warmup_trainer
from train_world import stage_data
from trainer_lite import PhaseTimer, RunFolder, StopFlag, TqdmProgress, peak_rss_bytes
from vlm_metrics import paired_difference

_KINDS: tuple[PictureKind, ...] = ("scene",)
"""Pictures that it learns from, in both parts."""
_SKILLS = ("colour", "shape", "count", "place", "relation", "presence", "box")
"""What is asked about such pictures."""


class SightSummary(msgspec.Struct, frozen=True, kw_only=True):
    """summary.json of such a run."""

    right: StageScores
    """With the right pictures."""
    exchanged: StageScores
    """With those of another question of the same skill."""
    difference: float
    """Accuracy with the right pictures minus accuracy with exchanged ones, over all questions alike."""
    low: float
    high: float
    wall_s: dict[str, float]
    wall_s_total: float
    peak_rss_bytes: int


def _joined(config: LanguageRun) -> tuple[Blip3, Processor]:
    path = Path(config.language)
    if not path.exists():
        raise BadInputError(
            f"language: expected a folder or file at {path}, got nothing there; uv run tools/fetch_smollm2.py gets one"
        )
    lm = load_lm(path, dtype=torch.float32)
    loaded = join_parts(SiglipVision(config.vision), lm, config.connector, config.tiling)
    cfg, tokenizer = loaded.config.model, loaded.processor.tokenizer
    return loaded.model, Processor(cfg, tokenizer, image_cache_bytes=IMAGE_CACHE_BYTES)


def run_language(recipe: str, config: LanguageRun, device: torch.device, stop: StopFlag) -> bool:
    """Run both parts and the exam; return False if a signal stopped them."""
    path = run_path(recipe, config.out)
    timer, progress = PhaseTimer(), TqdmProgress()
    with timer.phase("setup"), checking_input():
        world_samples, seed = config.stage.world_samples, config.stage.train.seed
        data = stage_data("sft", world_samples, seed, _KINDS) if config.data is None else data_of_file(config.data)
        torch.manual_seed(config.warmup.train.seed)
        model, processor = _joined(config)
        model.to(device)
        run = RunFolder.create(path, {"recipe": recipe, "config": config})
        words = label_words(model.lang_model, processor.tokenizer)
        warmup = warmup_trainer(
            config.warmup, model, processor.tokenizer, run=run, progress=progress, stop=stop, words=words, kinds=_KINDS
        )
    announce(model, path)
    with timer.phase("warmup"):
        result = fit_warmup(warmup, model, CheckpointFiles(model, processor, None))
    if stop.is_set:
        say("stopped in warmup; start the run anew")
        return False
    features = FeatureCache(model, config.feature_cache_mb << 20)
    with timer.phase(recipe):
        with checking_input():
            trainer = stage_trainer(
                recipe,
                config.stage,
                model,
                processor,
                data,
                stream=make_stream(config.stage, data, processor, None if config.stage.trains_tower else features),
                run=run,
                progress=progress,
                stop=stop,
                first_step=result.counters.step,
            )
        result = fit_stage(trainer, model)
    if stop.is_set:
        say(f"stopped at step {result.counters.step}; go on with uv run apps/train sft --init {result.checkpoint}")
        return False
    if config.stage.use_lora:
        merge_adapters(model)
    save_model(path / "model", model, processor, manifest={"recipe": recipe})
    scores = _examine(config, model, processor, timer, path) if config.eval_questions > 0 else {}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"parameters": f"{parameters / 1e6:.2f} M", "time": f"{timer.total_s:.0f} s"}
    if write_run_report(run, recipe, facts, scores):
        say(f"report {run.report_path}")
    say(f"chat: uv run apps/chat --model {path / 'model'}")
    return True


def _examine(
    config: LanguageRun, model: Blip3, processor: Processor, timer: PhaseTimer, path: Path
) -> dict[str, StageScores]:
    with timer.phase("evaluation"):
        exam = Exam.draw(config.eval_questions, config.stage.train.seed, processor, _SKILLS)
        right = exam.sit("right pictures", model, processor, None)
        other = Exam.of(with_exchanged_pictures(exam.items), processor)
        exchanged = other.sit("exchanged pictures", model, processor, None)
    answers = exam.predictions["right pictures"], other.predictions["exchanged pictures"]
    found = paired_difference(*([prediction.is_correct for prediction in predictions] for predictions in answers))
    summary = SightSummary(
        right=right,
        exchanged=exchanged,
        difference=found.difference,
        low=found.low,
        high=found.high,
        wall_s=timer.seconds,
        wall_s_total=timer.total_s,
        peak_rss_bytes=peak_rss_bytes(),
    )
    (path / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    for name, predictions in zip(("right", "exchanged"), answers, strict=True):
        write_predictions(path / "predictions" / f"{name}.jsonl", predictions)
    for skill, score in right.skills.items():
        say(f"{skill:<12} {score.accuracy:6.1%}   exchanged pictures {exchanged.skills[skill].accuracy:6.1%}")
    say(
        f"right minus exchanged: {found.difference:+.1%}, 95 % interval [{found.low:+.1%}, {found.high:+.1%}]; "
        f"{timer.total_s:.0f} s, {summary.peak_rss_bytes / 2**30:.2f} GiB at the peak"
    )
    return {"right pictures": right, "exchanged pictures": exchanged}
