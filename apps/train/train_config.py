"""What a run of `apps/train` is made of. Imports no torch."""

from typing import Annotated, Literal

import msgspec
import tyro

from blip3_lite.config import Blip3Config
from dpo_lite.config import DpoConfig
from lora_lite.config import LoraConfig
from trainer_lite.config import TrainConfig

Part = Literal["vision_encoder", "vision_tokenizer", "lang_model"]


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage: what is trained, on which objective, how much data a step takes."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Length, optimiser, schedule, guards."""
    trains: tuple[Part, ...] = ("vision_tokenizer", "lang_model")
    """Parts whose weights move; with adapters, only the adapters of the language model do."""
    objective: Literal["next_token", "preference"] = "next_token"
    """Next-token prediction on the target positions, or DPO on pairs."""
    lora: LoraConfig | None = None
    """Adapters on the language model, in place of its own weights."""
    dpo: DpoConfig = DpoConfig()
    """The loss of the objective `preference`."""
    views: Literal["tiles", "base"] = "tiles"
    """Images as the model's tiling cuts them, or as one base view each."""
    max_tokens: int = 4096
    """Longest pack in tokens, image tokens included; longer samples are skipped and counted."""
    max_samples: int | None = None
    """Most samples in a pack; None for as many as fit."""
    world_samples: int = 2000
    """Samples drawn from the embedded world where no data file is given; they repeat after that many."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("max_tokens", "world_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}; raise it")
        if not self.trains and self.lora is None:
            raise ValueError("trains: expected at least one part, got none; name one, or set adapters")


class WarmupConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A vision tower from nothing, on the embedded world; stands in for published SigLIP weights."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Length, optimiser, schedule, guards."""
    objective: Literal["dense", "sigmoid"] = "dense"
    """`dense`: each patch predicts what is drawn under it. `sigmoid`: SigLIP's loss between pictures and captions."""
    batch_size: int = 64
    """Tiles (dense) or pairs (sigmoid) a step."""
    world_samples: int = 6000
    """Pictures drawn; they repeat after that many."""


class StageRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage as a run of its own."""

    data: str | None = None
    """TOML file that lists the sources; without it the embedded world is drawn."""
    init: str | None = None
    """Checkpoint folder to start from; without it a fresh model of the size under --model."""
    out: str | None = None
    """Run folder; by default runs/RECIPE."""
    resume: bool = False
    """Go on from the newest whole checkpoint of the run folder."""
    tokenizer: str | None = None
    """tokenizer.json for a fresh model; without it one is trained on the data's own text."""
    stage: Annotated[StageConfig, tyro.conf.arg(name="")]
    """The stage."""
    eval_questions: int = 0
    """Held-out questions a skill, asked at the end where the embedded world is the data."""
    feature_cache_mb: int = 1024
    """Memory for the frozen vision tower's features, computed once per picture; 0 computes them each time."""
    model: Blip3Config
    """The fresh model; without meaning where --init names one."""


class WarmupRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The vision warm-up as a run of its own; its checkpoint is for --init of the next stage."""

    out: str | None = None
    """Run folder; by default runs/RECIPE."""
    warmup: Annotated[WarmupConfig, tyro.conf.arg(name="")]
    """The warm-up."""
    model: Blip3Config
    """The model whose vision tower is trained; the rest of it stays random."""


class DemoRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All stages in a row on pictures that are drawn here, ending with a model to chat with."""

    out: str = "runs/demo"
    """Run folder; a number is added if it is taken."""
    seed: int = 0
    """Seed of weights, pictures and order."""
    eval_questions: int = 500
    """Held-out questions a skill, asked after each stage."""
    feature_cache_mb: int = 1536
    """Memory for the frozen vision tower's features."""
    model: Blip3Config
    """The model."""
    warmup: WarmupConfig
    """Vision tower from nothing."""
    pretrain: StageConfig
    """Captions and interleaved documents."""
    sft: StageConfig
    """Questions about one picture."""
    interleaved: StageConfig
    """Questions about several pictures, mixed with single ones."""
    dpo: StageConfig
    """Preference pairs, with adapters."""
    safety: StageConfig
    """Refusals and benign look-alikes, with adapters."""


RunConfig = DemoRun | StageRun | WarmupRun


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A checked command line."""

    recipe: str
    config: RunConfig
