"""The recipe `demo`: every stage in a row on drawn pictures, held-out questions after each, a report at the end."""

from pathlib import Path

import msgspec
import torch

from blip3_lite import Blip3, FeatureCache, Processor, save_model
from eval_lite import write_predictions
from train_config import DemoRun, StageConfig, WarmupConfig
from train_errors import checking_input
from train_exam import Exam, StageScores, Summary
from train_preparation import Prepared, prepare
from train_report import write_report
from train_stages import CheckpointFiles, fit_stage, merge_adapters, stage_trainer
from train_stream import IMAGE_CACHE_BYTES
from train_terminal import announce, say
from train_vision import fit_warmup, warmup_trainer
from train_world import stage_data, world_tokenizer
from trainer_lite import FitResult, PhaseTimer, RunFolder, StopFlag, TqdmProgress, peak_rss_bytes

STAGES = ("pretrain", "sft", "interleaved", "dpo", "safety")
_SHARE_BEFORE = 0.1
"""Share of the questions asked before SFT, the first stage to teach answering: none is right, to no surprise."""


def free_path(wanted: str) -> Path:
    """The folder itself, or the first numbered one beside it that is not taken."""
    path, number = Path(wanted), 1
    while path.exists() and any(path.iterdir()):
        number += 1
        path = Path(f"{wanted}-{number}")
    return path


def seeded(config: DemoRun) -> DemoRun:
    """The config with the run's seed added to each stage's own, from which weights, order and dropout follow."""

    def shifted(stage: StageConfig | WarmupConfig) -> StageConfig | WarmupConfig:
        train = msgspec.structs.replace(stage.train, seed=stage.train.seed + config.seed)
        return msgspec.structs.replace(stage, train=train)

    return msgspec.structs.replace(config, **{name: shifted(getattr(config, name)) for name in ("warmup", *STAGES)})


def _show_scores(stage: str, scores: StageScores) -> None:
    skills = "  ".join(f"{name} {score.accuracy:.0%}" for name, score in scores.skills.items())
    say(f"{stage}: overall {scores.overall:.1%}  ({skills})")


def _say_stopped(stage: str, result: FitResult, newest: Path | None) -> None:
    say(
        f"stopped in {stage} at step {result.counters.step}; a demo cannot be continued: start it anew, or go on from "
        f"what is there, for example with uv run apps/train sft --init {newest}"
    )


def _begin_stage(
    name: str,
    config: DemoRun,
    model: Blip3,
    processor: Processor,
    features: FeatureCache,
    run: RunFolder,
    progress: TqdmProgress,
) -> tuple[StageConfig, Prepared]:
    """A stage's data, with workers that begin at once, while the stage before it is examined."""
    stage: StageConfig = getattr(config, name)
    data = stage_data(name, stage.world_samples, config.seed)
    ready = prepare(stage, data, model, processor, None if stage.trains_tower else features, run, progress)
    ready.stream.start()
    return stage, ready


def run_demo(config: DemoRun, device: torch.device, stop: StopFlag) -> bool:
    """Run all stages; return False if a signal stopped them."""
    path = free_path(config.out)
    timer, progress = PhaseTimer(), TqdmProgress()
    with timer.phase("setup"), checking_input():
        run = RunFolder.create(path, {"recipe": "demo", "config": config})
        config = seeded(config)
        torch.manual_seed(config.seed)
        tokenizer = world_tokenizer(config.model.lm.vocab_size)
        # Drawn before it is moved: the same weights on every device.
        model = Blip3(config.model).to(device)
        processor = Processor(config.model, tokenizer, image_cache_bytes=IMAGE_CACHE_BYTES)
        warmup = warmup_trainer(config.warmup, model, tokenizer, run=run, progress=progress, stop=stop)
    announce(model, path)
    with timer.phase("warmup"):
        result = fit_warmup(warmup, model, CheckpointFiles(model, processor, None))
    if stop.is_set:
        _say_stopped("warmup", result, result.checkpoint)
        return False
    first_step, newest = result.counters.step, result.checkpoint
    # Its pictures are not needed again.
    del warmup
    features = FeatureCache(model, config.feature_cache_mb << 20)
    scores: dict[str, StageScores] = {}
    with checking_input():
        stage, ready = _begin_stage(STAGES[0], config, model, processor, features, run, progress)
    with timer.phase("evaluation"):
        exam = Exam.draw(config.eval_questions, config.seed, processor)
        scores["warmup"] = exam.sit("warmup", model, processor, features, _SHARE_BEFORE)
    for name, next_name in zip(STAGES, [*STAGES[1:], None], strict=True):
        with timer.phase(name):
            with checking_input():
                trainer = stage_trainer(
                    name,
                    stage,
                    model,
                    processor,
                    ready.data,
                    stream=ready.stream,
                    run=run,
                    progress=progress,
                    stop=stop,
                    first_step=first_step,
                    reference=ready.reference,
                )
            result = fit_stage(trainer, model)
            if stage.use_lora:
                merge_adapters(model)
            if stage.trains_tower:
                features = FeatureCache(model, config.feature_cache_mb << 20)
        newest = result.checkpoint or newest
        if stop.is_set:
            _say_stopped(name, result, newest)
            return False
        first_step += result.counters.step
        if next_name is not None:
            with checking_input():
                stage, ready = _begin_stage(next_name, config, model, processor, features, run, progress)
        with timer.phase("evaluation"):
            share = _SHARE_BEFORE if name == "pretrain" else 1.0
            scores[name] = exam.sit(name, model, processor, features, share)
        _show_scores(name, scores[name])
    save_model(path / "model", model, processor, manifest={"recipe": "demo"})
    summary = Summary(
        stages=scores,
        wall_s=timer.seconds,
        wall_s_total=timer.total_s,
        peak_rss_bytes=peak_rss_bytes(),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        seed=config.seed,
    )
    _finish(path, summary, exam, run, config)
    return True


def _finish(path: Path, summary: Summary, exam: Exam, run: RunFolder, config: DemoRun) -> None:
    (path / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    for stage, predictions in exam.predictions.items():
        write_predictions(path / "predictions" / f"{stage}.jsonl", predictions)
    write_report(run, summary, exam, config.model)
    peak = f"{summary.peak_rss_bytes / 2**30:.2f} GiB at the peak, data worker apart"
    say(f"done in {summary.wall_s_total:.0f} s, {peak}")
    say(f"report {path / 'report.html'}\nfigures {path / 'summary.json'}")
    say(f"chat: uv run apps/chat --model {path / 'model'}")
