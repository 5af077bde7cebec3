"""One stage from data to checkpoint: freeze plan, stream, loop. The demo and the single-stage recipes share it."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

import lora_lite
from blip3_lite import Blip3, EncodedSample, FeatureCache, Processor, collate
from blip3_lite.checkpoint import WEIGHTS, load_tensors, model_writers
from blip3_lite.generation import Collate
from fused_kernels import backend_report
from interleave_data import (
    Batch,
    ImageLimits,
    PreferenceSample,
    Sample,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Source,
    Stream,
    load_data_file,
    open_sources,
)
from train_config import StageConfig
from train_objectives import NextToken, Preference, SamplePair, collate_pairs
from trainer_lite import FitResult, Progress, RunFolder, StopFlag, Trainer

IMAGE_CACHE_BYTES = 3 << 27
"""Tiles of images are kept up to this much, so that a repeated picture is decoded and cut once."""

_LOOK_AHEAD = 64
"""Samples that wait to be packed."""


@dataclass(frozen=True)
class StageData:
    """Where a stage's samples come from."""

    sources: Sequence[Source]
    ratios: Sequence[float] | None = None
    skip_limits: SkipLimits = field(default_factory=SkipLimits)
    image_limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def fingerprint(self) -> str:
        """Changes with any source and with what the image gate lets in; the stream itself compares the ratios."""
        sources = [f"{source.name}={source.fingerprint}" for source in self.sources]
        return " ".join([*sources, f"images={msgspec.json.encode(self.image_limits).decode()}"])


def data_of_file(path: str) -> StageData:
    """The sources that a data file lists, in its ratios and under its limits.

    Raises:
        ValueError: the file or a source of it cannot be used.
    """
    file = load_data_file(path)
    return StageData(open_sources(file), [source.ratio for source in file.sources], file.skip_limits, file.image_limits)


class PackStream:
    """Batches of the data stream as the model takes them; the state is the data stream's."""

    def __init__(self, stream: Stream[Any], collate_batch: Callable[[Batch[Any]], Any]) -> None:
        self._stream = stream
        self._collate = collate_batch

    @property
    def skipped(self) -> Mapping[str, int]:
        """Samples left out so far, by reason."""
        return self._stream.skips.by_reason()

    def __iter__(self) -> Iterator[Any]:
        """Go on from the current state."""
        for batch in self._stream:
            yield self._collate(batch)

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed."""
        return dict(self._stream.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._stream.load_state_dict(state)


def encode_sample(processor: Processor, sample: Sample | PreferenceSample) -> EncodedSample | SamplePair:
    """Encode a sample or a preference pair."""
    if isinstance(sample, PreferenceSample):
        return SamplePair(*processor.encode_preference(sample))
    return processor.encode(sample)


class CheckpointFiles:
    """The model's part of a training checkpoint."""

    def __init__(self, model: Blip3, processor: Processor, lora: lora_lite.LoraConfig | None) -> None:
        self.model, self.processor, self.lora = model, processor, lora

    def writers(self) -> Mapping[str, Callable[[Path], object]]:
        """Config, weights and tokenizer."""
        return model_writers(self.model, self.processor, self.lora)

    def load(self, folder: Path) -> None:
        """Load the weights strictly."""
        load_tensors(self.model, folder / WEIGHTS)


def freeze(model: Blip3, stage: StageConfig) -> None:
    """Make exactly the stage's parts trainable; attached adapters take the place of the language model's weights."""
    model.requires_grad_(False)
    for part in stage.trains:
        if part != "lang_model" or not stage.use_lora:
            getattr(model, part).requires_grad_(True)
    if stage.use_lora:
        lora_lite.attach(model.lang_model, stage.lora)
        for parameter in lora_lite.lora_parameters(model.lang_model):
            parameter.requires_grad_(True)


def _check_kind(sample: Sample | PreferenceSample, stage: StageConfig) -> None:
    if isinstance(sample, PreferenceSample) != (stage.objective == "preference"):
        expected = "a preference pair" if stage.objective == "preference" else "a document or conversation"
        raise SkipSample(
            SkipReason.BAD_RECORD, f"expected {expected} for the objective {stage.objective}, got another kind"
        )


def make_stream(
    stage: StageConfig, data: StageData, processor: Processor, collate_samples: Collate, seed: int
) -> PackStream:
    """The stage's batches."""

    def encode(sample: Sample | PreferenceSample) -> Any:
        _check_kind(sample, stage)
        return encode_sample(processor, sample)

    def collate_batch(batch: Batch[Any]) -> Any:
        if stage.objective == "preference":
            return collate_pairs(batch.items, batch.ids, collate_samples)
        return replace(collate_samples(batch.items), sample_ids=list(batch.ids))

    stream: Stream[Any] = Stream(
        data.sources,
        encode,
        ratios=data.ratios,
        max_tokens=stage.max_tokens,
        max_samples=stage.max_samples,
        look_ahead=max(_LOOK_AHEAD, stage.max_samples or 1),
        seed=seed,
        skips=SkipCounter(data.skip_limits),
    )
    return PackStream(stream, collate_batch)


def base_view_processor(processor: Processor) -> Processor:
    """The same processor, one view an image."""
    tiling = msgspec.structs.replace(processor.cfg.tiling, kind="base")
    cfg = msgspec.structs.replace(processor.cfg, tiling=tiling)
    return Processor(cfg, processor.tokenizer, processor.limits, IMAGE_CACHE_BYTES)


def announce(model: Blip3, path: Path) -> None:
    """Say what is about to be trained, where it goes, and which kernels compute it."""
    parts = {"vision": model.vision_encoder, "connector": model.vision_tokenizer, "language model": model.lang_model}
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    listed = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    total = sum(counts.values()) / 1e6
    say(f"run folder {path}; {total:.2f} M parameters ({listed}); {torch.get_num_threads()} threads")
    rows = backend_report(model.device, torch.float32)
    say("kernels: " + ", ".join(f"{row.op}={row.backend}" for row in rows))


def say(text: str) -> None:
    """One line for the person who waits; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def stage_trainer(
    name: str,
    stage: StageConfig,
    model: Blip3,
    processor: Processor,
    data: StageData,
    *,
    features: FeatureCache | None,
    run: RunFolder,
    progress: Progress,
    stop: StopFlag,
    first_step: int = 0,
    resume: Path | None = None,
) -> Trainer[Any]:
    """Make one stage ready for `fit_stage`: freeze plan, adapters, stream, and where it left off.

    Raises:
        ValueError: settings, data or checkpoint do not fit each other.
    """
    if features is not None and stage.trains_tower:
        raise ValueError("features: expected none for a stage that trains the vision tower, got a cache; they go stale")
    freeze(model, stage)
    full_processor = processor
    if stage.views == "base":
        processor = base_view_processor(processor)
    collate_samples = collate if features is None else features.collate
    stream = make_stream(stage, data, processor, collate_samples, stage.train.seed)
    trainer: Trainer[Any] = Trainer(
        model=Preference(model, stage.dpo) if stage.objective == "preference" else NextToken(model),
        parameters=model.named_parameters(),
        stream=stream,
        cfg=stage.train,
        stage=name,
        run=run,
        files=CheckpointFiles(model, full_processor, stage.lora if stage.use_lora else None),
        first_step=first_step,
        data_fingerprint=data.fingerprint,
        progress=progress,
        stop=stop,
    )
    if resume is not None:
        trainer.resume(resume)
    return trainer


def fit_stage(trainer: Trainer[Any], model: Blip3) -> FitResult:
    """Train one stage and leave its checkpoint; adapters stay attached (see `merge_adapters`).

    Raises:
        TooManySkips: the data is worse than its limits allow.
        NonFiniteError: too many steps in a row were not finite.
    """
    model.train()
    result = trainer.fit()
    model.eval().requires_grad_(False)
    return result


def merge_adapters(model: Blip3) -> None:
    """Make the adapters part of the language model's own weights."""
    lora_lite.merge_and_remove(model.lang_model)
