"""The five stages at full size (4.4 B parameters), for published weights and a user's data.

Marks: [published] the paper (arXiv:2408.08872) or its released fine-tuning script says so; [ours] nobody published it,
the reason stands beside it. A step's batch is `accumulation_steps` packs; on several devices divide it among them.
All stages hold the vision tower frozen and take bf16 autocast [published].
"""

from collections.abc import Callable

from blip3_lite.presets import XgenKind, xgen_mm_config
from lora_lite.config import xgen_mm_lora
from train_config import StageConfig, StageRun
from trainer_lite.config import OptimizerConfig, ScheduleConfig, TrainConfig

_IMAGE_TOKENS = 640
"""Of an image on the largest grid: four tiles and the thumbnail, 128 tokens each [published]."""
_TEXT_TOKENS = 2048
"""Longest text of an SFT sample [published]."""
_SAMPLES_A_PACK = 8
_NUM_WORKERS = 4
"""Pictures are decoded and tiled ahead of the step [ours]; batches are the same for any number."""
_ADAPTERS = xgen_mm_lora()


def _train(
    max_steps: int, warmup_steps: int, learning_rate: float, *, weight_decay: float, accumulation_steps: int
) -> TrainConfig:
    return TrainConfig(
        max_steps=max_steps,
        accumulation_steps=accumulation_steps,
        # torch's default betas, and no decay but in pre-training [published for SFT].
        optimizer=OptimizerConfig(learning_rate=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay),
        # Cosine [published for SFT]; to 0 as there.
        schedule=ScheduleConfig(kind="cosine", warmup_steps=warmup_steps, min_ratio=0.0),
        grad_clip=1.0,
        precision="bf16",
        seed=42,
        save_every=500,
    )


def pretrain() -> StageConfig:
    """Interleaved documents and captions, 100 B tokens [published], one 384-pixel view an image [published].

    Rate, decay and warm-up are the defaults of the code that the release grew from (OpenFlamingo's) [ours: the paper
    gives none]. A step is 1 M tokens [ours: usual at this size], hence the number of steps.
    """
    train = _train(100_000, 2000, 1e-4, weight_decay=0.1, accumulation_steps=64)
    return StageConfig(train=train, views="base", max_tokens=16_384, num_workers=_NUM_WORKERS)


def sft() -> StageConfig:
    """Single-image and text-only instructions, 1 M samples once [published], 64 a step, 2e-5, 2000 steps of warm-up
    [all published in the fine-tuning script]."""
    return _instructions(1_000_000, 2000, 2e-5)


def interleaved() -> StageConfig:
    """Multi-image instructions mixed with single-image ones.

    Size and rate are [ours]: a quarter of SFT's samples, and half its rate, since the model starts from SFT's weights.
    """
    return _instructions(250_000, 200, 1e-5)


def dpo() -> StageConfig:
    """62.6 k preference pairs once [published], adapters on 2.5 % of the language model [published].

    β 0.1 and 1e-5 are those of the preference data's authors (Silkie) [ours: the paper gives none]; 64 pairs a step as
    in SFT [ours].
    """
    train = _train(62_600 // 64, 100, 1e-5, weight_decay=0.05, accumulation_steps=16)
    return StageConfig(
        train=train,
        objective="preference",
        trains=(),
        use_lora=True,
        lora=_ADAPTERS,
        max_tokens=2 * 4 * (_TEXT_TOKENS + _IMAGE_TOKENS),
        max_samples=4,
        num_workers=_NUM_WORKERS,
    )


def safety() -> StageConfig:
    """2 k unsafe and safe instructions with 5 k of SFT, three times over [published], adapters as in DPO [published].

    The rate is [ours]: ten times SFT's, as adapters usually take.
    """
    train = _train(3 * 7000 // 64, 20, 2e-4, weight_decay=0.0, accumulation_steps=8)
    return StageConfig(
        train=train,
        trains=(),
        use_lora=True,
        lora=_ADAPTERS,
        max_tokens=_SAMPLES_A_PACK * (_TEXT_TOKENS + _IMAGE_TOKENS),
        max_samples=_SAMPLES_A_PACK,
        num_workers=_NUM_WORKERS,
    )


def _instructions(num_samples: int, warmup_steps: int, learning_rate: float) -> StageConfig:
    train = _train(num_samples // 64, warmup_steps, learning_rate, weight_decay=0.0, accumulation_steps=8)
    return StageConfig(
        train=train,
        max_tokens=_SAMPLES_A_PACK * (_TEXT_TOKENS + _IMAGE_TOKENS),
        max_samples=_SAMPLES_A_PACK,
        num_workers=_NUM_WORKERS,
    )


def _run(stage: Callable[[], StageConfig], kind: XgenKind) -> Callable[[], StageRun]:
    # 0: features of a million pictures are not kept.
    return lambda: StageRun(stage=stage(), model=xgen_mm_config(kind), feature_cache_mb=0)


FULL_RECIPES: dict[str, Callable[[], StageRun]] = {
    "pretrain-4b": _run(pretrain, "base"),
    "sft-4b": _run(sft, "singleimg"),
    "interleaved-4b": _run(interleaved, "interleave"),
    "dpo-4b": _run(dpo, "dpo"),
    "safety-4b": _run(safety, "dpo"),
}
