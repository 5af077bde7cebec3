"""What a stage needs before its first step: its pairs, its batches, and the reference's say on them."""

from dataclasses import dataclass

from blip3_lite import Blip3, FeatureCache, Processor
from dpo_lite import ReferenceCache
from train_config import StageConfig
from train_errors import BadInputError
from train_noise import NoisedStream
from train_pairs import own_errors
from train_stages import kept_reference
from train_stream import PackStream, StageData, make_stream
from trainer_lite import Processes, Progress, RunFolder

OWN_ERRORS_FILE = "own_errors.jsonl"
REFERENCE_FILE = "reference.json"


@dataclass(frozen=True)
class Prepared:
    """A stage's data as it is trained on, and its batches."""

    data: StageData
    stream: PackStream
    reference: ReferenceCache | None


def prepare(
    stage: StageConfig,
    data: StageData,
    model: Blip3,
    processor: Processor,
    features: FeatureCache | None,
    run: RunFolder,
    progress: Progress,
    *,
    processes: Processes | None = None,
    is_resumed: bool = False,
) -> Prepared:
    """Ask the model as it is for what the stage is to know of it, and make the stage's stream.

    `is_resumed`: the model is not as it was when the stage began, so what was asked then must lie in the run folder.

    Raises:
        BadInputError: it does not, or there are several processes, which would ask the same.
    """
    asks = {OWN_ERRORS_FILE: stage.own_errors is not None, REFERENCE_FILE: stage.has_kept_reference}
    for file, is_needed in asks.items():
        if is_needed and processes is not None and processes.count > 1:
            raise BadInputError(f"{file}: expected one process to ask the model, got {processes.count}; start one")
        if is_needed and is_resumed and not (run.path / file).exists():
            raise BadInputError(f"{run.path / file}: expected the file of when the stage began, got none; start anew")
    if stage.noise and processes is not None and processes.count > 1:
        raise BadInputError(f"noise: expected one process, got {processes.count}; start one, or leave it out")
    if stage.own_errors is not None:
        path = run.path / OWN_ERRORS_FILE
        data = own_errors(data, stage.own_errors, model, processor, features, path, progress, seed=stage.train.seed)
    reference = None
    if stage.has_kept_reference:
        reference = kept_reference(model, stage, data, processor, features, run.path / REFERENCE_FILE)
    stream = make_stream(stage, data, processor, features, processes)
    if stage.noise:
        stream = NoisedStream(
            stream,
            model,
            processor,
            noise=stage.noise,
            batches_a_step=stage.train.accumulation_steps,
            seed=stage.train.seed,
        )
    return Prepared(data, stream, reference)
