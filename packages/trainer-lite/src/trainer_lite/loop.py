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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Generic, Literal

import msgspec
import torch
from torch import nn

from blip3_lite import read_manifest
from interleave_data import StoppedWaiting, samples_digest

from .background import BackgroundSave
from .config import ParallelConfig, TrainConfig
from .contract import (
    BatchT,
    LossSum,
    ModelFiles,
    NamesSkips,
    ShardedModelFiles,
    StepModel,
    StopsWaiting,
    Stream,
    TellsChanges,
)
from .engine import OneProcess, make_engine
from .guards import LeftOut, StepLog, is_spike, left_out, with_loss
from .metrics import StepRecord, format_count, format_record
from .optimizer import Optimizers
from .processes import Processes
from .progress import Progress, QuietProgress
from .run_folder import RunFolder, SaveError
from .schedule import learning_rate_factor
from .shards import checkpoint_shards
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
    state_writers,
)
from .update_sum import UpdateSum


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class FitResult:
    """How a stage ended."""

    reason: Literal["max_steps", "stream_end", "stopped"]
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
        if self._is_shared and files is not None and not isinstance(files, ShardedModelFiles):
            raise ValueError(
                f"Trainer: expected files whose weights several processes can write (ShardedModelFiles), got "
                f"{files!r}; give it `weights` and `tensors`"
            )
        self._is_started = False
        self._is_stopping = False
        self._small_writers: dict[str, Callable[[Path], object]] = {}
        self.counters = Counters()
        self._saving: BackgroundSave | None = None
        self._saving_step = 0
        self._device = self.optimizers.device

    @property
    def _is_shared(self) -> bool:
        """Whether a step is put together from what ranks tell each other; one alone may be cut in parts as well."""
        return self.processes.count > 1 or not isinstance(self.engine, OneProcess)

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            if self._is_shared and isinstance(self.files, ShardedModelFiles):
                # While the model is whole: what checks it then cannot read its parts.
                weights = self.files.weights
                self._small_writers = {name: made for name, made in self.files.writers().items() if name != weights}
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

    def fit(self) -> FitResult:
        """Train until max_steps, the end of the stream, or a wish to stop; save at the end if a step has been made.

        A wish to stop lets the step at hand end, but not wait for data where the stream `StopsWaiting`: then that step
        is forgotten, down to its draws of samples and random numbers.

        Raises:
            NonFiniteError: max_nonfinite_steps steps in a row were not finite.
            SaveError: a checkpoint could not be written: the last one, or one on the way under `on_save_error="stop"`.
            ValueError: the model breaks the contract of `LossSum`.
        """
        cfg = self.cfg
        self._start()
        if self.counters.step == 0:
            torch.manual_seed(cfg.seed)  # pyright: ignore[reportUnknownMemberType]
        reason: Literal["max_steps", "stream_end", "stopped"] = "max_steps"
        record: StepRecord | None = None
        # Ranks go on together to the end of a step: one that left the others waiting would count as lost.
        if isinstance(self.stream, StopsWaiting) and not self._is_shared:
            stop = self.stop
            # Of the flag alone: a stream that knew the trainer would keep both, and the run's lock, past their end.
            self.stream.stop_waiting_if(lambda: stop.is_set)
        batches = iter(self.stream)
        self.progress.start(self.stage, cfg.max_steps, self.counters.step)
        try:
            with self.stop.on_signals():
                while self.counters.step < cfg.max_steps:
                    if self._must_stop():
                        reason = "stopped"
                        break
                    try:
                        next_record = self._step(batches)
                    except StoppedWaiting:
                        reason = "stopped"
                        break
                    if next_record is None:
                        reason = "stream_end"
                        break
                    record = next_record
                    is_due = cfg.save_every > 0 and self.counters.step % cfg.save_every == 0
                    if is_due and self.counters.step < cfg.max_steps:
                        self._save_on_the_way()
                    elif self._saving is not None and self._saving.is_done:
                        self._end_saving()
                checkpoint = self._save_at_the_end(reason)
        except KeyboardInterrupt:
            # Who asks twice does not want to wait.
            raise
        except BaseException as error:
            if (lost := self.processes.explain(error)) is not None:
                raise lost from error
            # Let the last good checkpoint become whole; the error at hand says more than one of its own.
            with suppress(SaveError):
                self._end_saving()
            raise
        finally:
            self.progress.close()
        return FitResult(reason, msgspec.structs.replace(self.counters), record, checkpoint)

    def _step(self, batches: Iterator[BatchT]) -> StepRecord | None:
        """Make one step and log it; None if the stream has ended.

        Raises:
            StoppedWaiting: data were waited for when somebody wanted to stop; the step has not been begun.
        """
        cfg, counters = self.cfg, self.counters
        start_s = time.perf_counter()

        waited_s = self._waited_s
        self.engine.zero_grad()
        # Of the accumulation window some batches may have been consumed when the next one is not waited for any more.
        begun = (self.stream.state_dict(), rng_state()) if isinstance(self.stream, StopsWaiting) else None
        try:
            update = self._gather_shared(batches) if self._is_shared else self._gather(batches)
        except StoppedWaiting:
            if begun is not None:
                self.stream.load_state_dict(begun[0])
                set_rng_state(begun[1])
            raise
        finally:
            # Also where there are too many of them.
            self._note_skips()
        if update is None:
            return None
        loss = update.loss
        grad_norm = self.engine.gradient_norm(update.num_targets)
        if self._is_shared:
            grad_norm = self._agreed(grad_norm)

        factor = learning_rate_factor(counters.updates, cfg.max_steps, cfg.schedule)
        reason = left_out(loss, grad_norm, update.num_targets, counters.recent_losses, cfg)
        self._note_suspects(update, loss, grad_norm, reason)
        self.processes.at(f"step {counters.step + 1}, update")
        if reason is None:
            self.engine.update(update.num_targets, grad_norm, factor)
            counters.updates += 1
        else:
            self.engine.drop()
            skipped = counters.skipped_updates
            counters.skipped_updates = {**skipped, reason: skipped.get(reason, 0) + 1}
        counters.nonfinite_in_a_row = counters.nonfinite_in_a_row + 1 if reason == "non_finite_update" else 0
        if math.isfinite(loss) and update.num_targets > 0:
            counters.recent_losses = with_loss(counters.recent_losses, loss, cfg)
        counters.step += 1
        counters.tokens += update.num_tokens
        counters.targets += update.num_targets

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
        self._log(record)
        if counters.nonfinite_in_a_row >= cfg.max_nonfinite_steps:
            raise NonFiniteError(
                f"stage {self.stage!r}, step {counters.step}: expected a finite loss and gradient, got loss {loss}, "
                f"gradient norm {grad_norm}, {counters.nonfinite_in_a_row} steps in a row; lower the learning rate or "
                f"look at the samples in {self.run.nonfinite.path if self.run else 'the last batches'}"
            )
        return record

    @property
    def _waited_s(self) -> float:
        return getattr(self.stream, "waited_s", 0.0)

    def _gather(self, batches: Iterator[BatchT]) -> UpdateSum | None:
        """Run forward and backward over the batches of one step; fewer where the stream ends, None if it has ended."""
        update = UpdateSum()
        for index in range(self.cfg.accumulation_steps):
            batch = next(batches, None)
            if batch is None:
                return update if index > 0 else None
            loss = self._loss(batch)
            if loss.num_targets > 0:
                self.engine.backward(loss.total, 0, is_last=False)
            update.add(batch, loss)
        return update

    def _loss(self, batch: BatchT) -> LossSum:
        if not batch.sample_ids and not self._is_shared:
            # A pack in which nothing is left: it counts as a batch, so that no later one moves.
            return LossSum(torch.zeros(()), 0)
        loss = self.engine.loss(batch)
        if loss.total.ndim != 0 or loss.num_targets < 0:
            raise ValueError(
                f"loss of {batch.sample_ids[:3]}: expected a scalar sum over >= 0 targets, got shape "
                f"{tuple(loss.total.shape)} over {loss.num_targets}; sum it and count the targets"
            )
        if loss.num_targets > 0 and not loss.total.requires_grad:
            raise ValueError(
                f"loss of {batch.sample_ids[:3]}: expected one that depends on trainable parameters, got a constant; "
                "check the freeze plan"
            )
        return loss

    def _gather_shared(self, batches: Iterator[BatchT]) -> UpdateSum | None:
        """`_gather` by several processes; the batches are fetched first (see `sum_together`)."""
        self.processes.at(f"step {self.counters.step + 1}, data")
        own = list(islice(batches, self.cfg.accumulation_steps // self.processes.count))
        return sum_together(self.engine, own, self._loss, seed=self.cfg.seed, step=self.counters.step + 1)

    def _agreed(self, grad_norm: float) -> float:
        """One figure for all ranks, so that all of them make or skip the update; not finite if it is so on one."""
        self.processes.at(f"step {self.counters.step + 1}, gradient norm")
        told = self.processes.share([grad_norm, self.stop.is_set])
        self._is_stopping = any(is_set for _, is_set in told)
        return next((norm for norm, _ in told if not math.isfinite(norm)), told[0][0])

    def _must_stop(self) -> bool:
        """Whether somebody has asked to; of several processes, whether one had been asked when the last step ended."""
        if not self._is_shared:
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

    def _note_suspects(self, update: UpdateSum, loss: float, grad_norm: float, reason: LeftOut | None) -> None:
        """Write down the samples of a step that is not finite, or of a spike, whether it is left out or not."""
        if self.run is None or not self.processes.is_first:
            return
        step, recent = self.counters.step + 1, self.counters.recent_losses
        if reason == "non_finite_update":
            figures: dict[str, float | bool] = {"loss": loss, "grad_norm": grad_norm}
            self._note(self.run.nonfinite, step, update.sample_ids, figures)
        elif update.num_targets > 0 and is_spike(loss, recent, self.cfg):
            is_left_out = reason == "loss_spike_update"
            figures = {"loss": loss, "median": median(recent), "grad_norm": grad_norm, "is_left_out": is_left_out}
            self._note(self.run.spikes, step, update.sample_ids, figures)
            self.progress.line(
                f"{self.stage} {step}: loss {loss:.4f} is {loss / median(recent):.1f} times the median of the last "
                f"{len(recent)}{', the update is left out' if is_left_out else ''}; samples in {self.run.spikes.path}"
            )

    def _note_skips(self) -> None:
        """Write down the samples that were left out on the way to this step's batches."""
        skips = self.stream.take_skips() if isinstance(self.stream, NamesSkips) else ()
        if self.run is None or not self.processes.is_first:
            return
        for source, skip in skips:
            facts = {"reason": skip.reason.value, "detail": skip.detail}
            self._note(self.run.skips, self.counters.step + 1, [f"{source}/{skip.where}"], facts)

    def _note(
        self, log: StepLog, step: int, sample_ids: Sequence[str], facts: Mapping[str, float | bool | str]
    ) -> None:
        try:
            log.append(self.stage, step, sample_ids, facts)
        except OSError as error:
            if self.cfg.on_save_error == "stop":
                raise
            self.progress.line(f"warning: {log.path}: {error.strerror}; a line is lost")

    def _log(self, record: StepRecord) -> None:
        if self.run is not None and self.processes.is_first:
            try:
                self.run.metrics.append(record)
            except OSError as error:
                # The line waits for the next one; what is sure to be on disk is asked before a checkpoint is written.
                if self.cfg.on_save_error == "stop":
                    raise
                self.progress.line(f"warning: {self.run.metrics.path}: {error.strerror}; the line waits")
        self.progress.advance(f"loss {record.loss:.3f} {format_count(record.tokens_per_s)} tok/s")
        if record.step % self.cfg.log_every == 0 or record.step == self.cfg.max_steps:
            self.progress.line(format_record(record, self.cfg.max_steps))
        if self.on_step is not None:
            self.on_step(record)

    def _save_on_the_way(self) -> None:
        """Write a checkpoint's files now and let a thread make it whole, after the one before is whole.

        Several processes make it whole at once: a rank's failure is then every rank's, at the same step.
        """
        if self._is_shared:
            try:
                self._save_together(is_kept=False)
            except SaveError as error:
                self._bear(error)
            return
        self._end_saving()
        try:
            finish = self._begin_save(is_kept=False)
        except SaveError as error:
            self._bear(error)
        else:
            self._saving, self._saving_step = BackgroundSave(finish), self.counters.step

    def _end_saving(self) -> Path | None:
        """Wait for the checkpoint that is being written, if there is one; return it if it became whole."""
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        try:
            return saving.wait()
        except SaveError as error:
            self._bear(error)
            return None

    def _bear(self, error: SaveError) -> None:
        if self.cfg.on_save_error == "stop":
            raise error
        self.counters.failed_saves += 1
        self.progress.line(f"warning: {error}; going on without it")

    def _save_at_the_end(self, reason: Literal["max_steps", "stream_end", "stopped"]) -> Path | None:
        """Leave a checkpoint of the last step; None if no step has been made."""
        newest = self._end_saving()
        if self.run is not None and self.processes.is_first:
            self.run.metrics.sync()
        # Before the first step the folder of this number is the end of the stage before.
        if self.run is None or self.files is None or self.counters.step == 0:
            return None
        if self._is_shared:
            return self._save_together(is_kept=reason != "stopped")
        if reason == "stopped" and newest is not None and self._saving_step == self.counters.step:
            return newest
        # A stage's end is kept for good; a stopped one only waits to be resumed.
        return self._begin_save(is_kept=reason != "stopped")()

    def _begin_save(self, is_kept: bool) -> Callable[[], Path]:
        assert self.run is not None
        assert self.files is not None
        try:
            self.run.metrics.sync()
        except OSError as error:
            raise SaveError(f"{self.run.metrics.path}: expected to write it, got: {error}; make room") from error
        writers = {**self.files.writers(), **state_writers(self._state(), self.optimizers)}
        step = self.first_step + self.counters.step
        finish = self.run.begin_checkpoint(step, writers, self.optimizers.num_bytes)
        return partial(finish, self._manifest(is_kept), self.cfg.keep_last)

    def _save_together(self, is_kept: bool) -> Path:
        """Write a checkpoint whole, every rank its share of the tensors."""
        assert self.run is not None
        assert isinstance(self.files, ShardedModelFiles)
        processes = self.processes
        processes.at(f"step {self.counters.step}, checkpoint")
        try:
            if processes.is_first:
                self.run.metrics.sync()
        except OSError as error:
            raise SaveError(f"{self.run.metrics.path}: expected to write it, got: {error}; make room") from error
        state = self._state()
        return self.run.save_together(
            self.first_step + self.counters.step,
            {**self._small_writers, **state_writers(state, None)} if processes.is_first else {},
            checkpoint_shards(self.files, state.parameters, self.optimizers, self.engine),
            {**self._manifest(is_kept), "num_processes": processes.count},
            self.cfg.keep_last,
            processes,
        )

    def _state(self) -> SavedState:
        return SavedState(
            stage=self.stage,
            counters=self.counters,
            stream=self.stream.state_dict(),
            parameters=self.engine.state_keys(),
            config=self.cfg,
            data_fingerprint=self.data_fingerprint,
        )

    def _manifest(self, is_kept: bool) -> dict[str, object]:
        return {
            "stage": self.stage,
            "step": self.counters.step,
            "data_fingerprint": self.data_fingerprint,
            "is_kept": is_kept,
        }


def check_division(accumulation_steps: int, count: int) -> None:
    """Check that every process gets as many batches of a step.

    Raises:
        ValueError: they cannot; lists the numbers of processes that can.
    """
    if accumulation_steps % count:
        fitting = [size for size in range(1, accumulation_steps + 1) if accumulation_steps % size == 0]
        raise ValueError(
            f"processes: expected a number that divides the {accumulation_steps} batches of a step "
            f"(accumulation_steps), got {count}; use one of {', '.join(map(str, fitting))}"
        )
