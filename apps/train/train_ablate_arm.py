"""One arm with one seed: from the shared start through its lessons to its answers."""

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from msgspec.structs import asdict, replace

from blip3_lite import Blip3, FeatureCache, LoadedModel, Processor
from eval_lite import EvalItem, Prediction, encode_prompts, predict
from perceiver_resampler import InstructedResamplerConfig
from phi3_lite import SamplingConfig
from train_ablate_data import draw_questions, exchange_pictures, is_right, lesson_data
from train_ablate_plan import Ablation, Arm
from train_config import WarmupConfig
from train_recipes import warmup_stage
from train_stages import fit_stage, merge_adapters, stage_trainer
from train_stream import IMAGE_CACHE_BYTES, make_stream
from train_vision import DenseObjective
from train_vision_data import DenseStream
from trainer_lite import Progress, StopFlag, Trainer

QUESTION_SEED = 1
"""Of the held-out world: another one than that of the shared start, whatever the arm's seed."""
_ANSWER = SamplingConfig(max_new_tokens=16)
_BATCH = 128
_FEATURE_BYTES = 640 << 20


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one arm with one seed gave; the file arms/ARM-SEED.json."""

    arm: str
    seed: int
    fingerprint: str
    """Of all that it follows from; a result of another fingerprint is made again."""
    seconds: dict[str, float]
    """By part of the work, on one thread."""
    loss: float | None
    """Of the last step of the last lesson; None without lessons."""
    predictions: list[Prediction]
    exchanged: list[Prediction]
    """Of the control's skills with other questions' pictures; of the control's arm only."""


@dataclass(frozen=True)
class Starts:
    """The checkpoints that arms begin from, loaded when asked for."""

    start: LoadedModel
    towers: dict[str, LoadedModel]


@dataclass(frozen=True)
class Task:
    """One arm with one seed."""

    ablation: Ablation
    arm: str
    seed: int
    num_questions: int
    """Of each skill."""
    fingerprint: str
    """See `ArmResult`."""


def build_model(arm: Arm, starts: Starts, has_lm: bool, seed: int, device: torch.device) -> tuple[Blip3, Processor]:
    """The start's model with what the arm changes; `has_lm`: its language model has learnt something, so it is kept."""
    base = starts.start.config.model
    connector = replace(base.connector, num_latents=arm.num_latents)
    if arm.reads_question:
        connector = InstructedResamplerConfig(**asdict(connector), dim_text=base.lm.width)
    cfg = replace(base, connector=connector, tiling=replace(base.tiling, kind=arm.tiling))
    torch.manual_seed(seed)
    model = Blip3(cfg)
    tower = (starts.start if arm.tower is None else starts.towers[arm.tower]).model
    model.vision_encoder.load_state_dict(tower.vision_encoder.state_dict())
    if arm.connector_steps == 0:
        own = model.vision_tokenizer.state_dict()
        model.vision_tokenizer.load_state_dict({**own, **tower.vision_tokenizer.state_dict()})
    if has_lm:
        model.lang_model.load_state_dict(starts.start.model.lang_model.state_dict())
    processor = Processor(cfg, starts.start.processor.tokenizer, image_cache_bytes=IMAGE_CACHE_BYTES)
    return model.requires_grad_(False).eval().to(device), processor


def teach_connector(model: Blip3, steps: int, seed: int, progress: Progress, stop: StopFlag) -> None:
    """Train the connector alone on the warm-up's labels, the tower as it is."""
    recipe = warmup_stage()
    train = replace(recipe.train, max_steps=steps, seed=seed)
    config = WarmupConfig(train=train, batch_size=recipe.batch_size, world_samples=steps * recipe.batch_size)
    objective = DenseObjective(model).requires_grad_(True).to(model.device)
    model.vision_encoder.requires_grad_(False)
    trainer = Trainer(
        model=objective,
        parameters=objective.named_parameters(),
        stream=DenseStream(config, model.cfg),
        cfg=train,
        stage="connector",
        progress=progress,
        stop=stop,
    )
    trainer.fit()
    model.eval().requires_grad_(False)


def run_arm(task: Task, starts: Starts, device: torch.device, progress: Progress, stop: StopFlag) -> ArmResult | None:
    """Train and ask one arm; None if a signal stopped it."""
    num_threads = torch.get_num_threads()
    # The figures are the same on any number of cores, and two commands can share two of them.
    torch.set_num_threads(1)
    try:
        return _run_arm(task, starts, device, progress, stop)
    finally:
        torch.set_num_threads(num_threads)


def _run_arm(task: Task, starts: Starts, device: torch.device, progress: Progress, stop: StopFlag) -> ArmResult | None:
    ablation, seed = task.ablation, task.seed
    arm, seconds = ablation.arms[task.arm], dict[str, float]()
    began_s = time.monotonic()
    model, processor = build_model(arm, starts, ablation.start != "warmup", seed, device)
    if arm.connector_steps:
        teach_connector(model, arm.connector_steps, seed, progress, stop)
    seconds["setup"] = time.monotonic() - began_s
    features = FeatureCache(model, _FEATURE_BYTES)
    loss: float | None = None
    for number, lesson in enumerate(arm.lessons):
        if stop.is_set:
            return None
        lesson_s = time.monotonic()
        stage = replace(lesson.stage, train=replace(lesson.stage.train, seed=seed))
        data = lesson_data(lesson, seed)
        stream = make_stream(stage, data, processor, features)
        trainer = stage_trainer(
            task.arm, stage, model, processor, data, stream=stream, run=None, progress=progress, stop=stop
        )
        result = fit_stage(trainer, model)
        loss = None if result.last is None else result.last.loss
        if stage.use_lora:
            merge_adapters(model)
        seconds[f"lesson {number + 1}"] = time.monotonic() - lesson_s
    if stop.is_set:
        return None
    exam_s = time.monotonic()
    items = draw_questions(ablation.skills, task.num_questions, QUESTION_SEED)
    predictions = _answers(model, processor, items, features)
    exchanged: list[Prediction] = []
    if task.arm == ablation.control.arm:
        asked = [item for item in items if item.group in ablation.control.skills]
        exchanged = _answers(model, processor, exchange_pictures(asked), features)
    seconds["questions"] = time.monotonic() - exam_s
    return ArmResult(
        arm=task.arm,
        seed=seed,
        fingerprint=task.fingerprint,
        seconds={part: round(value, 2) for part, value in seconds.items()},
        loss=loss,
        predictions=predictions,
        exchanged=exchanged,
    )


def _answers(model: Blip3, processor: Processor, items: list[EvalItem], features: FeatureCache) -> list[Prediction]:
    return predict(
        model,
        processor,
        items,
        is_right,
        prompts=encode_prompts(processor, items),
        sampling=_ANSWER,
        batch_size=_BATCH,
        collate_prompts=features.collate,
    )


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """Where an arm's result lies."""
    return folder / "arms" / f"{arm}-{seed}.json"
