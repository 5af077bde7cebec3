"""What a run of `apps/train` is made of. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro

from anyres_tiler.config import TilingConfig
from blip3_lite.config import Blip3Config, DeviceChoice
from dpo_lite.config import DpoConfig
from lora_lite.config import LoraConfig
from perceiver_resampler.config import ResamplerConfig
from siglip_lite.config import SiglipVisionConfig
from train_ablate_config import AblateRun
from trainer_lite.config import ParallelConfig, TrainConfig

Part = Literal["vision_encoder", "vision_tokenizer", "lang_model"]
SMOLLM2_FILE = "runs/downloads/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_SAMPLES_IN_A_PACK = 128
"""The widest window that samples are packed from (`interleave_data.Packer`)."""


def _require_at_least(least: int, config: msgspec.Struct, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(config, name)}; raise it")


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage: what is trained, on which objective, how much data a step takes."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Length, optimiser, schedule, guards."""
    trains: tuple[Part, ...] = ("vision_tokenizer", "lang_model")
    """Parts whose weights move; with adapters, those move in the place of the language model's own weights."""
    objective: Literal["next_token", "preference"] = "next_token"
    """Next-token prediction on the target positions, or DPO on pairs."""
    use_lora: bool = False
    """Train adapters on the language model in place of its own weights."""
    lora: LoraConfig = LoraConfig(rank=16, alpha=32, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    """The adapters; without meaning where they are not used."""
    dpo: DpoConfig = DpoConfig()
    """The loss of the objective `preference`."""
    own_errors: int | None = None
    """Questions of each source that the model is asked before the stage; what it answers wrongly becomes the rejected
    answer, and its other answers make no pair. None for the pairs that the data give."""
    noise: float = 0.0
    """Above 0, each step on pairs is followed by one on the same prompts and chosen answers, the rejected ones being
    the model's own to pictures with this share of noise in their variance; `max_steps` counts both."""
    neftune_alpha: float = 0.0
    """Noise on the text's embeddings in training, arXiv:2310.05914: uniform up to alpha / √(L d) in a document of L
    tokens; 5 is usual."""
    views: Literal["tiles", "base"] = "tiles"
    """Images as the model's tiling cuts them, or as one base view each."""
    max_tokens: int = 4096
    """Longest pack in tokens, image tokens included."""
    max_tiles: int | None = None
    """Most tiles of a pack's pictures, which bounds what they weigh; None for as many as its tokens allow."""
    max_samples: int | None = None
    """Most samples in a pack; None for as many as fit."""
    too_long: Literal["drop", "truncate-text", "error"] = "drop"
    """What becomes of a sample larger than a pack: left out and counted as too_long; cut where the pack is full, but
    never inside a picture, and counted as truncated; or the end of the run."""
    num_workers: int = 0
    """Processes that read, decode and tile ahead of the step; 0 does it in between, which is enough for drawn pictures.
    Batches are the same for any number."""
    data_timeout_s: float = 600.0
    """Longest wait for a worker's pack; then the run ends and says what was being read."""
    world_samples: int = 2000
    """Samples drawn from the embedded world where no data file is given; they repeat after that many."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least(1, self, "max_tokens", "world_samples")
        _require_at_least(0, self, "num_workers")
        if self.max_tiles is not None:
            _require_at_least(1, self, "max_tiles")
        if not self.data_timeout_s > 0:
            raise ValueError(f"data_timeout_s: expected above 0, got {self.data_timeout_s}; use several minutes")
        if self.max_samples is not None and not 1 <= self.max_samples <= MAX_SAMPLES_IN_A_PACK:
            raise ValueError(
                f"max_samples: expected 1 to {MAX_SAMPLES_IN_A_PACK}, got {self.max_samples}; "
                "leave it out for as many as fit"
            )
        if not self.trains and not self.use_lora:
            raise ValueError("trains: expected at least one part, got none; name one, or --use-lora")
        self._check_preference()
        if not 0 <= self.neftune_alpha < math.inf:
            raise ValueError(f"neftune_alpha: expected at least 0, got {self.neftune_alpha}; 5 is usual, 0 is none")

    def _check_preference(self) -> None:
        if self.own_errors is not None:
            _require_at_least(1, self, "own_errors")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: expected 0 to 1, got {self.noise}; 0.5 leaves outlines, 0 is none")
        if self.objective != "preference":
            for name, none in (("own_errors", None), ("noise", 0.0)):
                if getattr(self, name) != none:
                    raise ValueError(f"{name}: expected {none} without pairs, got {getattr(self, name)}; leave it out")
        elif not self.use_lora and self.dpo.needs_reference and (self.dpo.kind == "kto" or self.noise):
            raise ValueError(
                "use_lora: expected adapters where the reference meets new answers (kto, noise), got none; add "
                "--use-lora: the reference is the model without them"
            )

    @property
    def has_kept_reference(self) -> bool:
        """Whether the reference's log-probabilities must be computed before the first step, with the first weights."""
        return self.objective == "preference" and self.dpo.needs_reference and not self.use_lora

    @property
    def trains_head(self) -> bool:
        """Whether the language model's head moves."""
        return "lang_model" in self.trains and not self.use_lora

    @property
    def trains_tower(self) -> bool:
        """Whether the vision tower moves, so that features kept of it would be stale."""
        return "vision_encoder" in self.trains


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

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least(1, self, "batch_size", "world_samples")


class StageRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage as a run of its own."""

    data: str | None = None
    """TOML file that lists the sources; without it the embedded world is drawn."""
    init: str | None = None
    """Checkpoint to start from, ours or a release of xGen-MM; without it a fresh model of the size under --model."""
    vision: str | None = None
    """Vision tower of a new model: a SigLIP folder or a checkpoint of ours; goes with --language."""
    language: str | None = None
    """Language model of a new model: a folder or GGUF file of Phi-3 or Llama; goes with --vision."""
    out: str | None = None
    """Run folder; by default runs/RECIPE."""
    resume: str | None = None
    """Alone or `newest`: go on from the newest whole checkpoint of the run folder. `auto`: likewise, or begin the run
    if there is none yet. A checkpoint's folder: go on from that one."""
    accept_data_change: bool = False
    """Continue though the data are not what they were; sources that changed start anew."""
    tokenizer: str | None = None
    """tokenizer.json for a fresh model; without it one is trained on the data's own text."""
    stage: Annotated[StageConfig, tyro.conf.arg(name="")]
    """The stage."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU of each process where there is one (`auto`), or as said."""
    parallel: ParallelConfig = ParallelConfig()
    """How several processes share the work (started by torchrun or deepspeed)."""
    eval_questions: int = 0
    """Held-out questions of the embedded world a skill, asked at the end; 0 for none, as with a data file."""
    feature_cache_mb: int = 1024
    """Memory for the frozen vision tower's features, computed once per picture; 0 computes them each time."""
    model: Blip3Config
    """The fresh model; of no meaning with --init. With --vision and --language its connector and tiling count."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least(0, self, "eval_questions", "feature_cache_mb")
        if (self.vision is None) != (self.language is None):
            given, other = ("vision", "language") if self.language is None else ("language", "vision")
            raise ValueError(f"{given}: expected together with --{other}, got it alone; name both, or neither")
        if self.init is not None and self.vision is not None:
            raise ValueError(f"init: expected none with --vision and --language, got {self.init}; choose one start")
        if self.data is not None and self.eval_questions > 0:
            raise ValueError(
                f"eval_questions: expected 0 with a data file, got {self.eval_questions}; the questions are the "
                "embedded world's, so leave one of the two out"
            )


class WarmupRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The vision warm-up as a run of its own; its checkpoint is for --init of the next stage."""

    out: str | None = None
    """Run folder; by default runs/RECIPE."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU of each process where there is one (`auto`), or as said."""
    warmup: Annotated[WarmupConfig, tyro.conf.arg(name="")]
    """The warm-up."""
    model: Blip3Config
    """The model whose vision tower is trained; the rest of it stays random."""


class LanguageRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published language model learns to see: a vision tower and connector from nothing, then questions."""

    language: str = SMOLLM2_FILE
    """Folder or GGUF file of the language model; `uv run tools/fetch_smollm2.py` puts SmolLM2 at the default place."""
    data: str | None = None
    """TOML file that lists the sources of the second part; without it the embedded world is drawn."""
    out: str | None = None
    """Run folder; by default runs/RECIPE."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU of each process where there is one (`auto`), or as said."""
    warmup: WarmupConfig
    """First part: vision tower and connector."""
    stage: StageConfig
    """Second part: the language model, or adapters on it, and the connector if `trains` names it."""
    eval_questions: int = 20
    """Held-out questions a skill about one drawn picture, asked at the end with right and with exchanged pictures."""
    feature_cache_mb: int = 1024
    """Memory for the frozen vision tower's features."""
    vision: SiglipVisionConfig
    """The fresh vision tower."""
    connector: ResamplerConfig
    """The fresh connector; its output has the language model's width."""
    tiling: TilingConfig
    """How pictures are cut."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least(0, self, "eval_questions", "feature_cache_mb")


class DemoRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All stages in a row on pictures that are drawn here, ending with a model to chat with."""

    out: str = "runs/demo"
    """Run folder; a number is added if it is taken."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU of each process where there is one (`auto`), or as said."""
    seed: int = 0
    """Seed of weights, pictures and order; a stage's own seed is added for its order."""
    eval_questions: int = 250
    """Held-out questions a skill, asked after each stage; a tenth of them before SFT, for comparison."""
    feature_cache_mb: int = 896
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

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least(1, self, "eval_questions")
        _require_at_least(0, self, "feature_cache_mb")


def run_path(recipe: str, out: str | None) -> Path:
    """The folder of a stage's or a warm-up's run."""
    return Path(out or f"runs/{recipe}")


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a dry run is to plan for.

    Raises:
        ValueError: a value out of range.
    """

    devices: int
    """Devices that share each step's packs."""
    kind: Literal["a100", "h100", "h200"]
    """The devices (see `trainer_lite.DEVICE_KINDS`)."""
    utilisation: float = 0.4
    """Share of the peak that the counted operations are assumed to reach."""
    link_gb_per_s: float | None = None
    """Speed at which a device sends; None for its link within a host, and its network beyond one."""
    image_share: float = 0.5
    """Of the tokens, where there is no data to look at."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least(1, self, "devices")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation: expected above 0 and at most 1, got {self.utilisation}; 0.4 is usual")
        if self.link_gb_per_s is not None and not 0 < self.link_gb_per_s < math.inf:
            raise ValueError(f"link_gb_per_s: expected above 0, got {self.link_gb_per_s}; leave it out for the kind's")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share: expected 0 to 1, got {self.image_share}; it is a share of the tokens")

    def link_bytes_per_s(self, devices_per_host: int, link: float, network: float) -> float:
        """Bytes a second that a device can send in a ring of all devices: the slowest link's."""
        if self.link_gb_per_s is not None:
            return self.link_gb_per_s * 1e9
        return link if self.devices <= devices_per_host else network


RunConfig = DemoRun | LanguageRun | StageRun | WarmupRun


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A checked command line."""

    recipe: str
    """Of an ablation, its name."""
    config: RunConfig | AblateRun
    is_dry_run: bool = False
    """Whether to say only what would be trained (see `train_dry_run`)."""
    plan: PlanRequest | None = None
    """What a dry run is to plan for besides."""
