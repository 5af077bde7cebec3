"""The recipes: functions that return a config. A new one is made by calling another and changing what differs."""

from collections.abc import Callable

from msgspec.structs import replace

from anyres_tiler.config import XGEN_MM_GRIDS, TilingConfig
from blip3_lite.config import Blip3Config
from perceiver_resampler.config import ResamplerConfig
from phi3_lite.config import Phi3Config
from siglip_lite.config import SiglipVisionConfig
from train_config import DemoRun, LanguageRun, RunConfig, StageConfig, StageRun, WarmupConfig, WarmupRun
from train_recipes_full import FULL_RECIPES
from trainer_lite.config import OptimizerConfig, ScheduleConfig, TrainConfig


def demo_model() -> Blip3Config:
    """A model that learns in minutes on two cores: 96-pixel tiles of 64 patches, 16 image tokens each."""
    return Blip3Config(
        vision=SiglipVisionConfig(
            image_px=96,
            patch_px=12,
            width=128,
            num_layers=3,
            num_heads=4,
            mlp_width=256,
            use_head=False,
            stem="conv",
        ),
        connector=ResamplerConfig(dim=128, dim_out=128, depth=2, num_heads=4, head_dim=32, num_latents=16, ff_mult=3),
        lm=Phi3Config(
            vocab_size=512,
            width=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            mlp_width=384,
            max_positions=2048,
            init_std=0.08,
            residual_init_std=0.03,
        ),
        tiling=TilingConfig(tile_px=96, grids=((1, 1), *XGEN_MM_GRIDS)),
    )


def _train(max_steps: int, learning_rate: float, muon_learning_rate: float) -> TrainConfig:
    return TrainConfig(
        max_steps=max_steps,
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=learning_rate, muon_learning_rate=muon_learning_rate, weight_decay=0.01
        ),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=min(20, max_steps // 10), min_ratio=0.05),
        log_every=50,
    )


def warmup_stage() -> WarmupConfig:
    """Dense labels; replaces published SigLIP weights."""
    return WarmupConfig(train=_train(540, 4e-3, 1.5e-2), batch_size=32, world_samples=6300)


def pretrain_stage() -> StageConfig:
    """Captions and interleaved documents, one base view an image; resampler and language model, the tower frozen."""
    return StageConfig(train=_train(200, 4e-3, 1.5e-2), views="base", max_tokens=1280, world_samples=6000)


def sft_stage() -> StageConfig:
    """Conversations about one picture, any-resolution tiles."""
    return StageConfig(train=_train(800, 2e-3, 5e-3), max_tokens=1280, world_samples=6000)


def interleaved_stage() -> StageConfig:
    """Conversations about several pictures, mixed with single ones."""
    return StageConfig(train=_train(180, 1.5e-3, 4e-3), max_tokens=1280, world_samples=5000)


def dpo_stage() -> StageConfig:
    """Preference pairs, adapters on the language model."""
    train = replace(_train(60, 1e-3, 1e-3), optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0))
    return StageConfig(
        train=train, objective="preference", trains=(), use_lora=True, max_tokens=2048, world_samples=1000
    )


def safety_stage() -> StageConfig:
    """Refusals, look-alikes and replay, adapters on the language model."""
    train = replace(_train(120, 3e-3, 3e-3), optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0))
    return StageConfig(train=train, trains=(), use_lora=True, max_tokens=1536, world_samples=3500)


def smollm2() -> LanguageRun:
    """The demo's tower and connector before SmolLM2-135M, which gets adapters; a quarter of an hour on two cores."""
    model = demo_model()
    optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)
    return LanguageRun(
        vision=model.vision,
        connector=replace(model.connector, num_latents=32),
        tiling=model.tiling,
        warmup=replace(warmup_stage(), train=_train(450, 4e-3, 1.5e-2)),
        stage=StageConfig(
            train=replace(_train(170, 1e-3, 1e-3), optimizer=optimizer, log_every=10),
            # The connector rests: trained on, its tokens left the words that they had been brought to.
            trains=("lang_model",),
            use_lora=True,
            max_tokens=640,
            world_samples=2000,
        ),
    )


def demo() -> DemoRun:
    """All stages in a row, ten minutes on two undisturbed cores."""
    return DemoRun(
        model=demo_model(),
        warmup=warmup_stage(),
        pretrain=_with_worker(pretrain_stage()),
        sft=_with_worker(sft_stage()),
        interleaved=_with_worker(interleaved_stage()),
        dpo=_with_worker(dpo_stage()),
        safety=_with_worker(safety_stage()),
    )


def _with_worker(stage: StageConfig) -> StageConfig:
    return replace(stage, num_workers=1)


def _alone(stage: Callable[[], StageConfig]) -> Callable[[], StageRun]:
    return lambda: StageRun(stage=stage(), model=demo_model())


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "smollm2": smollm2,
    "warmup": lambda: WarmupRun(warmup=warmup_stage(), model=demo_model()),
    "pretrain": _alone(pretrain_stage),
    "sft": _alone(sft_stage),
    "interleaved": _alone(interleaved_stage),
    "dpo": _alone(dpo_stage),
    "safety": _alone(safety_stage),
    **FULL_RECIPES,
}
