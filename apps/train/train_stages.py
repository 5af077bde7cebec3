"""One stage from data to checkpoint: freeze plan, stream, loop. The demo and the single-stage recipes share it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

import lora_lite
from blip3_lite import Blip3, FeatureCache, Processor
from blip3_lite.checkpoint import WEIGHTS, load_tensors, model_writers, weights_file
from dpo_lite import ReferenceCache
from train_config import StageConfig
from train_objectives import NextToken, Preference, answer_log_probs
from train_stream import PackStream, StageData, make_stream
from trainer_lite import FitResult, ParallelConfig, Processes, Progress, RunFolder, StopFlag, Trainer
from weight_files import unique_tensors


class CheckpointFiles:
    """The model's part of a training checkpoint."""

    def __init__(self, model: Blip3, processor: Processor, lora: lora_lite.LoraConfig | None) -> None:
        self.model, self.processor, self.lora = model, processor, lora

    def writers(self) -> Mapping[str, Callable[[Path], object]]:
        """Config, weights and tokenizer."""
        return model_writers(self.model, self.processor, self.lora)

    def load(self, folder: Path) -> None:
        """Load the weights strictly."""
        load_tensors(self.model, weights_file(folder))

    @property
    def weights(self) -> str:
        """The file that several processes write as shards."""
        return WEIGHTS

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The live tensors of that file."""
        return unique_tensors(self.model)


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


def stage_trainer(
    name: str,
    stage: StageConfig,
    model: Blip3,
    processor: Processor,
    data: StageData,
    *,
    stream: PackStream,
    run: RunFolder | None,
    progress: Progress,
    stop: StopFlag,
    first_step: int = 0,
    processes: Processes | None = None,
    parallel: ParallelConfig | None = None,
    reference: ReferenceCache | None = None,
) -> Trainer[Any]:
    """Make one stage ready for `fit_stage`: freeze plan, adapters. `stream`: of this stage and data (`make_stream`).

    `reference`: of all pairs, where there are no adapters that could be switched off (see `kept_reference`).

    Raises:
        ValueError: an adapter's target is not in the model.
    """
    freeze(model, stage)
    model.neftune_alpha = stage.neftune_alpha
    parallel = ParallelConfig() if parallel is None else parallel
    model.recompute_layers(parallel.recompute)
    # What is cut in parts is brought together where modules are called: the same ones then on every rank.
    model.always_sees = is_cut = parallel.uses_deepspeed
    return Trainer(
        model=Preference(model, stage.dpo, is_kept=not is_cut, reference=reference)
        if stage.objective == "preference"
        else NextToken(model),
        parameters=model.named_parameters(),
        stream=stream,
        cfg=stage.train,
        stage=name,
        run=run,
        files=None if run is None else CheckpointFiles(model, processor, stage.lora if stage.use_lora else None),
        first_step=first_step,
        data_fingerprint=data.fingerprint,
        progress=progress,
        stop=stop,
        processes=processes,
        parallel=parallel,
        network=model,
    )


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


def kept_reference(
    model: Blip3, stage: StageConfig, data: StageData, processor: Processor, features: FeatureCache | None, path: Path
) -> ReferenceCache:
    """The log-probabilities of all answers in the data under the model as it is, for a stage that moves its weights.

    They are read from `path` if they are there, as for a run that goes on, else computed, once over the data.

    Raises:
        ReferenceCacheError: the file is of other data, or not whole.
    """
    fingerprint = f"{data.fingerprint} {processor.size_fingerprint}"
    if path.exists():
        return ReferenceCache.load(path, fingerprint=fingerprint)
    cache = ReferenceCache(fingerprint)
    once = replace(data, ratios=None, epochs=[1.0] * len(data.sources))
    alone = msgspec.structs.replace(stage, num_workers=0)
    model.eval()
    for batch in make_stream(alone, once, processor, features):
        if batch.sample_ids:
            with torch.no_grad():
                cache.put(batch.digests, answer_log_probs(model, batch.pack.to(model.device)))
    cache.save(path)
    return cache


def merge_adapters(model: Blip3) -> None:
    """Make the adapters part of the language model's own weights."""
    lora_lite.merge_and_remove(model.lang_model)
