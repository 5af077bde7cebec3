"""The one training loop.

    for each step:
        zero the gradients
        for each of accumulation_steps batches:      forward, backward of the SUM over the targets
        divide by the targets of the whole step      (so 4 batches of 1 sample = 1 batch of 4)
        loss or gradient norm not finite?            skip: nothing moves, the ids are kept, too many in a row raise
        loss far above the last ones?                the ids are kept; with the guard on, skip
        clip once, set the rate, update
        write one line; now and then evaluate, save; stop if somebody asked to

A resumed run continues bit for bit: parameters, moments, random states, counters and the stream's place are restored.

With several processes each rank takes its batches of the step (r, r + W, … of the one stream), and all of them know
every figure of the step: what is logged, decided and saved is what one process would. What differs between one and many
is an `Engine`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Generic, Literal

import msgspec
import torch
from torch import nn

from blip3_lite import read_manifest
from interleave_data import StoppedWaiting, samples_digest

from .config import ParallelConfig, TrainConfig, check_division
from .contract import BatchT, ModelFiles, NamesSkips, StepModel, StopsWaiting, Stream, TellsChanges
from .engine import make_engine
from .guards import LeftOut, left_out, with_loss
from .journal import Journal
from .metrics import StepRecord
from .optimizer import Optimizers
from .processes import Processes
from .progress import Progress, QuietProgress
from .run_folder import RunFolder, SaveError
from .saving import StageCheckpoints
from .schedule import learning_rate_factor
from .stop import StopFlag
from .together import sum_together
from .train_state import (
    Counters,
    SavedState,
    config_differences,
    load_tensors,
    parameter_differences,
    read_state,
    rng_state,
    set_rng_state,
)
from .update_sum import UpdateSum, sum_alone

EndReason = Literal["max_steps", "stream_end", "stopped"]


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class FitResult:
    """How a stage ended."""

    reason: EndReason
    """A stage whose last step is done has ended by max_steps, though somebody asked to stop during that step; who runs
    several stages looks at the StopFlag between them."""
    counters: Counters
    last: StepRecord | None
    """The last step made by this process."""
    checkpoint: Path | None
    """The checkpoint written at the end; None if the stage has made no step, so that there is nothing new to save."""


class Trainer(Generic[BatchT]):
    """One stage: a model, its parameters, a stream of batches.

        trainer = Trainer(model=model, parameters=network.named_parameters(), stream=stream, cfg=cfg)
        result = trainer.fit()

    `run` gives it a place for metrics and, with `files`, for checkpoints, whose folders are numbered from `first_step`
    on (the steps of the stages before). `evaluate(step)` is called without a trace on the random state; what it returns
    goes into the log. `stop` may be shared by several stages.

    With several `processes` each has a trainer of its own, whose stream gives its rank's share of each step, and
    `parallel` names the engine; `network` is the module of the parameters, for engines that cut it in parts. Only the
    first rank writes to `run`.
    """

    def __init__(
        self,
        *,
        model: StepModel[BatchT],
        parameters: Iterable[tuple[str, nn.Parameter]],
        stream: Stream[BatchT],
        cfg: TrainConfig,
        stage: str = "train",
        run: RunFolder | None = None,
        files: ModelFiles | None = None,
        first_step: int = 0,
        data_fingerprint: str = "",
        progress: Progress | None = None,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        stop: StopFlag | None = None,
        processes: Processes | None = None,
        parallel: ParallelConfig | None = None,
        network: nn.Module | None = None,
    ) -> None:
        if (cfg.save_every > 0 or files is not None) and (run is None or files is None):
            raise ValueError(
                f"Trainer: expected both run and files to save checkpoints, got run={run!r}, files={files!r}; "
                "give both, or neither with save_every=0"
            )
        self.model, self.stream, self.cfg, self.stage = model, stream, cfg, stage
        self.run, self.files, self.first_step, self.data_fingerprint = run, files, first_step, data_fingerprint
        self.progress: Progress = QuietProgress() if progress is None else progress
        self.evaluate, self.on_step = evaluate, on_step
        self.stop = StopFlag() if stop is None else stop
        self.processes = Processes() if processes is None else processes
        check_division(cfg.accumulation_steps, self.processes.count)
        self.optimizers = Optimizers(parameters, cfg.optimizer)
        self.engine = make_engine(
            model, network, self.optimizers, cfg, ParallelConfig() if parallel is None else parallel, self.processes
        )
        self.journal = Journal(run if self.processes.is_first else None, stage, cfg, self.progress)
        self.checkpoints = None
        if run is not None and files is not None:
            self.checkpoints = StageCheckpoints(
                run, files, first_step, cfg, self.optimizers, self.engine, self.progress
            )
        self.counters = Counters()
        self._is_started = False
        self._is_stopping = False
        self._device = self.optimizers.device

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            if self.checkpoints is not None:
                self.checkpoints.start()
            self.engine.start()

    def resume(self, folder: Path, *, accept_changes: bool = False, accept_data_change: bool = False) -> None:
        """Continue from a checkpoint folder; its files are compared with its manifest first.

        accept_data_change: hand this wish on to a stream whose `load_state_dict` has a keyword of this name; it decides
        which places in the data start anew, and says so.

        Raises:
            CheckpointError: the folder is half-written or damaged.
            ValueError: it belongs to another stage, other data (passes with `accept_data_change`), other settings (both
                pass with `accept_changes`), or to other parameters. Do not train on after an error.
        """
        if self.files is None:
            raise ValueError("resume: expected a Trainer with files, got none; they load the model's weights")
        read_manifest(folder)
        saved = read_state(folder)
        self._check_resumable(folder, saved, accept_changes, accept_data_change)
        self.files.load(folder)
        self.counters = saved.counters
        if accept_data_change and "accept_data_change" in signature(self.stream.load_state_dict).parameters:
            load_state: Callable[..., None] = self.stream.load_state_dict
            load_state(saved.stream, accept_data_change=True)
        else:
            self.stream.load_state_dict(saved.stream)
        if self.run is not None and self.processes.is_first:
            self.run.rewind(self.stage, saved.counters.step)
        # The weights are in: parameters that are cut in parts are cut from them.
        self._start()
        # Last, so that nothing above can draw from the restored generators.
        load_tensors(folder, saved.parameters, self.engine.load_state)

    def _check_resumable(self, folder: Path, saved: SavedState, accept_changes: bool, accept_data_change: bool) -> None:
        """See `resume`."""
        if saved.stage != self.stage:
            raise ValueError(
                f"checkpoint {folder}: expected stage {self.stage!r}, got {saved.stage!r}; "
                "resume that stage, or start this one from its weights"
            )
        if others := parameter_differences(saved.parameters, self.optimizers):
            raise ValueError(
                f"checkpoint {folder}: expected the same trainable parameters, got {'; '.join(others)}; "
                "resume with the freeze plan and the adapters that wrote it"
            )
        differences = config_differences(saved.config, self.cfg)
        if saved.data_fingerprint != self.data_fingerprint and not accept_data_change:
            words = self.stream.changes(saved.stream) if isinstance(self.stream, TellsChanges) else []
            words = words or [f"{saved.data_fingerprint!r} in the checkpoint, {self.data_fingerprint!r} now"]
            differences.append(f"data: {', '.join(words)}")
        if differences and not accept_changes:
            raise ValueError(
                f"checkpoint {folder}: expected the same settings and data, got {'; '.join(differences)}; "
                "restore them or accept the changes (of data alone: accept_data_change)"
            )

    def fit(self) -> FitResult:
        """Train until max_steps, the end of the stream, or a wish to stop; save at the end if a step has been made.

        A wish to stop lets the step at hand end, but not wait for data where the stream `StopsWaiting`: then that step
        is forgotten, down to its draws of samples and random numbers.

        Raises:
            NonFiniteError: max_nonfinite_steps steps in a row were not finite.
            RankLostError: another rank has ended, hangs or cannot be reached.
            SaveError: a checkpoint could not be written: the last one, or one on the way under `on_save_error="stop"`.
            ValueError: the model breaks the contract of `LossSum`.
        """
        cfg = self.cfg
        self._start()
        if self.counters.step == 0:
            torch.manual_seed(cfg.seed)  # pyright: ignore[reportUnknownMemberType]
        # Ranks go on together to the end of a step: one that left the others waiting would count as lost.
        if isinstance(self.stream, StopsWaiting) and not self.engine.is_shared:
            stop = self.stop
            # Of the flag alone: a stream that knew the trainer would keep both, and the run's lock, past their end.
            self.stream.stop_waiting_if(lambda: stop.is_set)
        self.progress.start(self.stage, cfg.max_steps, self.counters.step)
        try:
            with self.stop.on_signals():
                reason, record = self._steps(iter(self.stream))
                checkpoint = self._save_at_the_end(reason)
        except KeyboardInterrupt:
            # Who asks twice does not want to wait.
            raise
        except BaseException as error:
            if (lost := self.processes.explain(error)) is not None:
                raise lost from error
            # Let the last good checkpoint become whole; the error at hand says more than one of its own.
            if self.checkpoints is not None:
                with suppress(SaveError):
                    self.checkpoints.end_saving(self.counters)
            raise
        finally:
            self.progress.close()
        return FitResult(reason, msgspec.structs.replace(self.counters), record, checkpoint)

    def _steps(self, batches: Iterator[BatchT]) -> tuple[EndReason, StepRecord | None]:
        """Make all steps that there are to make; return why no more, and the last one made."""
        cfg, record = self.cfg, None
        while self.counters.step < cfg.max_steps:
            if self._must_stop():
                return "stopped", record
            try:
                next_record = self._step(batches)
            except StoppedWaiting:
                return "stopped", record
            if next_record is None:
                return "stream_end", record
            record = next_record
            if self.checkpoints is None:
                continue
            if cfg.save_every > 0 and self.counters.step % cfg.save_every == 0 and self.counters.step < cfg.max_steps:
                self.checkpoints.save_on_the_way(self._state())
            else:
                self.checkpoints.end_saving_if_done(self.counters)
        return "max_steps", record

    def _step(self, batches: Iterator[BatchT]) -> StepRecord | None:
        """Make one step and log it; None if the stream has ended.

        Raises:
            StoppedWaiting: data were waited for when somebody wanted to stop; the step has not been begun.
        """
        cfg, counters = self.cfg, self.counters
        start_s, waited_s = time.perf_counter(), self._waited_s
        self.engine.zero_grad()
        update = self._gather(batches)
        if update is None:
            return None
        loss = update.loss
        self.processes.at(f"step {counters.step + 1}, gradient norm", is_bounded=True)
        grad_norm = self.engine.gradient_norm(update.num_targets)
        if self.engine.is_shared:
            grad_norm = self._agreed(grad_norm)

        factor = learning_rate_factor(counters.updates, cfg.max_steps, cfg.schedule)
        reason = left_out(loss, grad_norm, update.num_targets, counters.recent_losses, cfg)
        self.journal.note_suspects(counters.step + 1, update, grad_norm, counters.recent_losses, reason)
        self.processes.at(f"step {counters.step + 1}, update", is_bounded=True)
        if reason is None:
            self.engine.update(update.num_targets, grad_norm, factor)
        else:
            self.engine.drop()
        self.processes.at(f"step {counters.step + 1}, end")
        self._count(update, reason)

        elapsed_s = time.perf_counter() - start_s
        counters.wall_s += elapsed_s
        record = StepRecord(
            stage=self.stage,
            step=counters.step,
            loss=loss,
            loss_hex=loss.hex(),
            target_tokens=update.num_targets,
            tokens_per_s=update.num_tokens / elapsed_s,
            grad_norm=grad_norm,
            lr=cfg.optimizer.learning_rate * factor,
            samples_digest=samples_digest(update.sample_ids),
            skipped={**self.stream.skipped, **counters.skipped_updates},
            truncated=getattr(self.stream, "num_truncated", 0),
            data_wait=(self._waited_s - waited_s) / elapsed_s,
            read_again=dict(getattr(self.stream, "read_again", {})),
            parts={name: value / update.num_targets for name, value in update.parts.items()},
            failed_saves=counters.failed_saves,
            evaluation=self._evaluation(),
        )
        self.journal.log(record)
        if self.on_step is not None:
            self.on_step(record)
        self._check_finite(record)
        return record

    def _count(self, update: UpdateSum, reason: LeftOut | None) -> None:
        """Bring the counters behind a step that was made, or left out for a reason."""
        counters, loss = self.counters, update.loss
        if reason is None:
            counters.updates += 1
        else:
            skipped = counters.skipped_updates
            counters.skipped_updates = {**skipped, reason: skipped.get(reason, 0) + 1}
        counters.nonfinite_in_a_row = counters.nonfinite_in_a_row + 1 if reason == "non_finite_update" else 0
        if math.isfinite(loss) and update.num_targets > 0:
            counters.recent_losses = with_loss(counters.recent_losses, loss, self.cfg)
        counters.step += 1
        counters.tokens += update.num_tokens
        counters.targets += update.num_targets

    def _check_finite(self, record: StepRecord) -> None:
        in_a_row = self.counters.nonfinite_in_a_row
        if in_a_row >= self.cfg.max_nonfinite_steps:
            raise NonFiniteError(
                f"stage {self.stage!r}, step {record.step}: expected a finite loss and gradient, got loss "
                f"{record.loss}, gradient norm {record.grad_norm}, {in_a_row} steps in a row; lower the learning rate "
                f"or look at the samples in {self.run.nonfinite.path if self.run else 'the last batches'}"
            )

    @property
    def _waited_s(self) -> float:
        return getattr(self.stream, "waited_s", 0.0)

    def _gather(self, batches: Iterator[BatchT]) -> UpdateSum | None:
        """Run forward and backward over the batches of one step; None if the stream has ended.

        Raises:
            StoppedWaiting: as `_step`.
        """
        step = self.counters.step + 1
        # Of the accumulation window some batches may have been consumed when the next one is not waited for any more.
        begun = (self.stream.state_dict(), rng_state()) if isinstance(self.stream, StopsWaiting) else None
        try:
            if not self.engine.is_shared:
                return sum_alone(self.engine, batches, self.cfg.accumulation_steps)
            self.processes.at(f"step {step}, data")
            own = list(islice(batches, self.cfg.accumulation_steps // self.processes.count))
            return sum_together(self.engine, own, seed=self.cfg.seed, step=step)
        except StoppedWaiting:
            if begun is not None:
                self.stream.load_state_dict(begun[0])
                set_rng_state(begun[1])
            raise
        finally:
            # Also where there are too many of them.
            if isinstance(self.stream, NamesSkips):
                self.journal.note_skips(step, self.stream.take_skips())

    def _agreed(self, grad_norm: float) -> float:
        """One figure for all ranks, so that all of them make or skip the update; not finite if it is so on one."""
        told = self.processes.share([grad_norm, self.stop.is_set])
        self._is_stopping = any(is_set for _, is_set in told)
        return next((norm for norm, _ in told if not math.isfinite(norm)), told[0][0])

    def _must_stop(self) -> bool:
        """Whether somebody has asked to; of several processes, whether one had been asked when the last step ended."""
        if not self.engine.is_shared:
            return self.stop.is_set
        if self._is_stopping:
            self.stop.set("another rank was asked to stop")
        return self._is_stopping

    def _evaluation(self) -> dict[str, float]:
        every = self.cfg.eval_every
        if self.evaluate is None or every == 0 or self.counters.step % every != 0:
            return {}
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():  # pyright: ignore[reportUnknownMemberType]
            return dict(self.evaluate(self.counters.step))

    def _save_at_the_end(self, reason: EndReason) -> Path | None:
        """Leave a checkpoint of the last step; None if no step has been made."""
        # Before the first step the folder of this number is the end of the stage before.
        if self.checkpoints is not None and self.counters.step > 0:
            return self.checkpoints.save_at_the_end(self._state(), is_kept=reason != "stopped")
        if self.run is not None and self.processes.is_first:
            self.run.metrics.sync()
        return None

    def _state(self) -> SavedState:
        return SavedState(
            stage=self.stage,
            counters=self.counters,
            stream=self.stream.state_dict(),
            parameters=self.engine.state_keys(),
            config=self.cfg,
            data_fingerprint=self.data_fingerprint,
        )
