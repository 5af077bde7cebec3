"""Carry out a command line: all stages, one stage, or the warm-up; turn trouble into one message and an exit status."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from blip3_lite import Blip3, FeatureCache, LoadedModel, Processor, load_tokenizer
from blip3_lite.assembly import join_parts, load_tower
from blip3_lite.checkpoint import read_config
from blip3_lite.device import choose_device
from blip3_lite.model import undrawn_model
from blip3_lite.opening import open_model
from eval_lite import write_predictions
from interleave_data import DataError, Sample, SkipSample, TextPart, TooManySkips, WorkerError
from lora_lite import disabled
from phi3_lite import load_lm, train_tokenizer
from train_ablate import run_ablation
from train_ablate_config import AblateRun
from train_agreement import agree_on_order, agree_on_weights, created_run, run_to_continue
from train_config import Command, DemoRun, LanguageRun, PlanRequest, StageRun, WarmupRun, run_path
from train_demo import run_demo
from train_dry_run import describe_plan, describe_stage, shell_config, shell_of
from train_errors import (
    BAD_INPUT,
    FINISHED,
    INTERRUPTED,
    NOT_FINITE,
    NOT_SAVED,
    RANK_LOST,
    TERMINATED,
    TOO_MUCH_BAD_DATA,
    BadInputError,
    checking_input,
)
from train_exam import Exam, StageScores
from train_language import run_language
from train_preparation import prepare
from train_report import write_run_report
from train_stages import CheckpointFiles, fit_stage, merge_adapters, stage_trainer
from train_stream import IMAGE_CACHE_BYTES, StageData, data_of_file
from train_terminal import announce, num_parameters, say
from train_vision import fit_warmup, warmup_trainer
from train_world import WORLD_STAGES, stage_data, world_tokenizer
from trainer_lite import (
    NonFiniteError,
    Processes,
    Progress,
    QuietProgress,
    RankLostError,
    RunFolder,
    SaveError,
    StopFlag,
    TqdmProgress,
    Trainer,
    join,
    keep_freed_memory,
)
from trainer_lite.config import check_division
from trainer_lite.engine import check_deepspeed
from trainer_lite.processes import rank_and_count

_TOKENIZER_SAMPLES = 2000
_BEFORE = "before"


def run(command: Command) -> int:
    """Run it; return 0, or the status of what went wrong (see `train_errors`)."""
    stop = StopFlag()
    keep_freed_memory()
    try:
        is_finished = _dispatch(command, stop)
    except BadInputError as error:
        return _fail(BAD_INPUT, error)
    except RankLostError as error:
        return _fail(RANK_LOST, error)
    except (TooManySkips, DataError, WorkerError) as error:
        return _fail(TOO_MUCH_BAD_DATA, error)
    except SaveError as error:
        return _fail(NOT_SAVED, error)
    except OSError as error:
        # Set-up is behind us and readers turn their own into skips: only what a run writes is left.
        return _fail(NOT_SAVED, f"expected to save the run, got {error}; checkpoints that are there are whole")
    except NonFiniteError as error:
        return _fail(NOT_FINITE, error)
    except KeyboardInterrupt:
        return _fail(_stopped_status(stop), "interrupted; checkpoints that are there are whole")
    return FINISHED if is_finished else _stopped_status(stop)


def _stopped_status(stop: StopFlag) -> int:
    return TERMINATED if stop.reason == "SIGTERM" else INTERRUPTED


def _fail(status: int, error: Exception | str) -> int:
    say(f"train: {error}")
    return status


def _dispatch(command: Command, stop: StopFlag) -> bool:
    with checking_input():
        _, num_processes = rank_and_count()
    if num_processes > 1 and not isinstance(command.config, StageRun):
        raise BadInputError(
            f"processes: expected one for {command.recipe}, got {num_processes}; start it without torchrun, or name "
            "a stage, as sft"
        )
    if command.is_dry_run and isinstance(command.config, StageRun):
        return _dry_run(command.recipe, command.config, command.plan)
    with checking_input():
        device = choose_device(command.config.device)
    if isinstance(command.config, AblateRun):
        return run_ablation(command.recipe, command.config, device, stop)
    if isinstance(command.config, DemoRun):
        return run_demo(command.config, device, stop)
    if isinstance(command.config, LanguageRun):
        return run_language(command.recipe, command.config, device, stop)
    if isinstance(command.config, WarmupRun):
        return _run_warmup_alone(command.recipe, command.config, device, stop)
    with checking_input():
        check_deepspeed(command.config.parallel)
        if command.config.parallel.uses_deepspeed and device.type == "cpu" and torch.cuda.is_available():
            raise BadInputError(
                "device: expected cuda or auto with DeepSpeed, which takes the GPU where there is one, got cpu; use "
                "--parallel.engine ddp, or hide the GPUs by an empty CUDA_VISIBLE_DEVICES"
            )
        check_division(command.config.stage.train.accumulation_steps, num_processes)
    with _joined(command.config, device) as processes:
        return _run_stage_alone(command.recipe, command.config, device, stop, processes)


@contextmanager
def _joined(config: StageRun, device: torch.device) -> Generator[Processes]:
    """The other processes of the run; what fails while they meet is bad input."""
    with ExitStack() as stack:
        with checking_input():
            processes = stack.enter_context(join(config.parallel, device))
        yield processes


def _run_warmup_alone(recipe: str, config: WarmupRun, device: torch.device, stop: StopFlag) -> bool:
    with checking_input():
        torch.manual_seed(config.warmup.train.seed)
        # Drawn before it is moved: the same weights on every device.
        model = Blip3(config.model).to(device)
        tokenizer = world_tokenizer(config.model.lm.vocab_size)
        files = CheckpointFiles(model, Processor(config.model, tokenizer), None)
        run_folder = RunFolder.create(run_path(recipe, config.out), {"recipe": recipe, "config": config})
        trainer = warmup_trainer(
            config.warmup, model, tokenizer, run=run_folder, progress=TqdmProgress(), stop=stop, name=recipe
        )
    announce(model, run_folder.path)
    result = fit_warmup(trainer, model, files)
    say(f"checkpoint {result.checkpoint}")
    _report(run_folder, recipe, trainer)
    if stop.is_set:
        say(f"stopped at step {result.counters.step}; a warm-up cannot be continued, but --init takes its checkpoint")
    return not stop.is_set


def _run_stage_alone(recipe: str, config: StageRun, device: torch.device, stop: StopFlag, processes: Processes) -> bool:
    path = run_path(recipe, config.out)
    with checking_input():
        data = _stage_data(recipe, config)
        agree_on_order(recipe, config, device, data, processes)
        run_folder, resume = run_to_continue(path, config, processes)
        torch.manual_seed(config.stage.train.seed)
        model, processor = _new_model(config, data) if resume is None else _model_shell(resume, data)
        # Drawn or read before it is moved: the same weights on every device.
        model.to(device)
        if resume is None:
            agree_on_weights(model, processes)
        if run_folder is None:
            run_folder = created_run(path, recipe, config, processes)
        elif resume is None and processes.is_first:
            run_folder.rewind(recipe, 0)
        # Kept features call the tower as often as there are new pictures: not where it is cut in parts.
        keeps_features = not config.stage.trains_tower and not config.parallel.uses_deepspeed
        features = _feature_cache(model, config) if keeps_features else None
        progress = _progress(processes)
        ready = prepare(
            config.stage,
            data,
            model,
            processor,
            features,
            run_folder,
            progress,
            processes=processes,
            is_resumed=resume is not None,
        )
        trainer = stage_trainer(
            recipe,
            config.stage,
            model,
            processor,
            ready.data,
            stream=ready.stream,
            run=run_folder,
            progress=progress,
            stop=stop,
            processes=processes,
            parallel=config.parallel,
            reference=ready.reference,
        )
        if resume is not None:
            trainer.resume(resume, accept_data_change=config.accept_data_change)
            if processes.is_first:
                say(f"going on from {resume}, behind step {trainer.counters.step}")
    if processes.is_first:
        announce(model, path)
        if processes.count > 1 or config.parallel.uses_deepspeed:
            say(f"{processes.count} processes, {config.parallel.engine}")
    result = fit_stage(trainer, model)
    processes.part()
    if not processes.is_first:
        return not stop.is_set
    if result.checkpoint is not None:
        say(f"checkpoint {result.checkpoint}")
    if run_folder.skips.path.exists():
        say(f"samples that were left out: {run_folder.skips.path}")
    if stop.is_set:
        _report(run_folder, recipe, trainer)
        say(f"stopped at step {result.counters.step}; continue with uv run apps/train {recipe} --out {path} --resume")
        return False
    _report(run_folder, recipe, trainer, _asked(recipe, config, model, processor, features, path))
    return True


def _asked(
    recipe: str, config: StageRun, model: Blip3, processor: Processor, features: FeatureCache | None, path: Path
) -> dict[str, StageScores]:
    """Scores of a finished stage, by its recipe; none where no questions are wanted, or the model is in parts."""
    if config.eval_questions == 0:
        return {}
    if config.parallel.uses_deepspeed:
        say("no questions are asked where the model is in parts: --init the checkpoint with --max-steps 1 asks them")
        return {}
    features = _feature_cache(model, config) if config.stage.trains_tower else features
    return _examine(recipe, model, processor, config, features, path)


def _report(
    run_folder: RunFolder, recipe: str, trainer: Trainer[Any], scores: Mapping[str, StageScores] | None = None
) -> None:
    """Write report.html, and say where, if a step has been made."""
    trained = trainer.optimizers.parameters.values()
    facts = {
        "parameters trained": f"{num_parameters(trained) / 1e6:.2f} M",
        "seed": trainer.cfg.seed,
        "time of the steps": f"{trainer.counters.wall_s:.0f} s",
    }
    if write_run_report(run_folder, recipe, facts, scores):
        say(f"report {run_folder.report_path}")


def _progress(processes: Processes) -> Progress:
    return TqdmProgress() if processes.is_first else QuietProgress()


def _stage_data(recipe: str, config: StageRun) -> StageData:
    if config.data is None:
        if recipe not in WORLD_STAGES:
            raise BadInputError(f"{recipe}: expected --data FILE, got none; the embedded world is for small models")
        mixture = recipe if config.stage.own_errors is None else "own-errors"
        return stage_data(mixture, config.stage.world_samples, config.stage.train.seed)
    return data_of_file(config.data)


def _new_model(config: StageRun, data: StageData) -> tuple[Blip3, Processor]:
    """Load or join the model to start from, or make a fresh one with a tokenizer."""
    if config.init is not None or (config.vision is not None and config.language is not None):
        loaded = _load_start(config)
        tokenizer = loaded.processor.tokenizer
        return loaded.model, Processor(loaded.config.model, tokenizer, data.image_limits, IMAGE_CACHE_BYTES)
    return Blip3(config.model), _fresh_processor(config, data)


def _fresh_processor(config: StageRun, data: StageData) -> Processor:
    """Of a fresh model, with the tokenizer that was named, or one that is trained on its data's text."""
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    elif config.data is None:
        tokenizer = world_tokenizer(config.model.lm.vocab_size)
    else:
        tokenizer = train_tokenizer(_texts(data), config.model.lm.vocab_size)
    return Processor(config.model, tokenizer, data.image_limits, IMAGE_CACHE_BYTES)


def _dry_run(recipe: str, config: StageRun, plan: PlanRequest | None) -> bool:
    """Say what the stage would be; no weight is drawn or loaded but those of --vision and --language."""
    with checking_input():
        if plan is not None and config.data is None and recipe not in WORLD_STAGES and config.language is None:
            # Nothing to look at: a plan can be made of the recipe alone.
            cfg = config.model if config.init is None else shell_config(Path(config.init))
            lines = describe_plan(recipe, config, undrawn_model(cfg), plan)
        else:
            data = _stage_data(recipe, config)
            if config.init is not None:
                model, processor = shell_of(Path(config.init), data.image_limits)
            elif config.language is not None:
                model, processor = _new_model(config, data)
            else:
                model, processor = undrawn_model(config.model), _fresh_processor(config, data)
            lines = describe_stage(recipe, config, model, processor, data, plan)
    print("\n".join(lines))
    return True


def _load_start(config: StageRun) -> LoadedModel:
    """The model under `init`, its adapters merged, or one joined from `vision` and `language`; in fp32."""
    if config.vision is not None and config.language is not None:
        tower, lm = load_tower(Path(config.vision)), load_lm(Path(config.language), dtype=torch.float32)
        return join_parts(tower, lm, config.model.connector, config.model.tiling)
    path = Path(str(config.init))
    loaded = open_model(path, dtype=torch.float32)
    if not isinstance(loaded, LoadedModel):
        raise BadInputError(f"init: expected a whole model, got a language model alone at {path}; use --language")
    if loaded.config.lora is not None:
        merge_adapters(loaded.model)
    return loaded


def _model_shell(checkpoint: Path, data: StageData) -> tuple[Blip3, Processor]:
    """Model and processor of the checkpoint's own config and tokenizer; the trainer loads the weights into it."""
    saved = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint / saved.tokenizer_file)
    return Blip3(saved.model), Processor(saved.model, tokenizer, data.image_limits, IMAGE_CACHE_BYTES)


def _texts(data: StageData) -> Iterator[str]:
    """Text of the first samples of each source, bad ones left out (the loop will count them)."""
    for source in data.sources:
        for index in range(min(len(source), _TOKENIZER_SAMPLES)):
            try:
                sample = source[index]
            except SkipSample:
                continue
            for turn in sample.turns:
                yield from (part.text for part in turn.parts if isinstance(part, TextPart))
            if not isinstance(sample, Sample):
                yield from (sample.chosen, sample.rejected)


def _feature_cache(model: Blip3, config: StageRun) -> FeatureCache | None:
    if config.feature_cache_mb == 0:
        return None
    model.vision_encoder.requires_grad_(False)
    return FeatureCache(model, config.feature_cache_mb << 20)


def _examine(
    recipe: str, model: Blip3, processor: Processor, config: StageRun, features: FeatureCache | None, path: Path
) -> dict[str, StageScores]:
    """Ask the trained model, its adapters merged; of adapters first the model without them, as it was before."""
    exam = Exam.draw(config.eval_questions, config.stage.train.seed, processor)
    scores: dict[str, StageScores] = {}
    if config.stage.use_lora:
        with disabled(model.lang_model):
            scores[_BEFORE] = exam.sit(_BEFORE, model, processor, features)
        write_predictions(path / "predictions-before.jsonl", exam.predictions[_BEFORE])
        merge_adapters(model)
    after = scores[recipe] = exam.sit(recipe, model, processor, features)
    write_predictions(path / "predictions.jsonl", exam.predictions[recipe])
    for name, result in after.skills.items():
        print(
            f"{name:<12} {result.accuracy:6.1%}  [{result.low:.1%}, {result.high:.1%}]  baseline {result.baseline:.1%}"
        )
    print(f"{'overall':<12} {after.overall:6.1%}")
    return scores
