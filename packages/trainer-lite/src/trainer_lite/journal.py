"""What a run writes down of its steps: the log's line, and the samples of steps that somebody should look at.

Only the first rank writes; the others know the same and say nothing. A full disk ends the run, or costs a line, as
`on_save_error` says.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from interleave_data import SkipSample

from .config import TrainConfig
from .guards import LeftOut, StepLog, is_spike
from .metrics import StepRecord, format_count, format_record
from .progress import Progress
from .run_folder import RunFolder
from .update_sum import UpdateSum


class Journal:
    """The logs of one stage; without a `run` only what a terminal sees."""

    def __init__(self, run: RunFolder | None, stage: str, cfg: TrainConfig, progress: Progress) -> None:
        self.run, self.stage, self.cfg, self.progress = run, stage, cfg, progress

    def note_suspects(
        self,
        step: int,
        update: UpdateSum,
        grad_norm: float,
        recent_losses: Sequence[float],
        reason: LeftOut | None,
    ) -> None:
        """Write down the samples of a step that is not finite, or of a spike, whether it is left out or not.

        Raises:
            OSError: the disk is full, under `on_save_error="stop"`.
        """
        if self.run is None:
            return
        loss = update.loss
        if reason == "non_finite_update":
            figures: dict[str, float | bool] = {"loss": loss, "grad_norm": grad_norm}
            self._note(self.run.nonfinite, step, update.sample_ids, figures)
        elif update.num_targets > 0 and is_spike(loss, recent_losses, self.cfg):
            is_left_out, middle = reason == "loss_spike_update", median(recent_losses)
            figures = {"loss": loss, "median": middle, "grad_norm": grad_norm, "is_left_out": is_left_out}
            self._note(self.run.spikes, step, update.sample_ids, figures)
            self.progress.line(
                f"{self.stage} {step}: loss {loss:.4f} is {loss / middle:.1f} times the median of the last "
                f"{len(recent_losses)}{', the update is left out' if is_left_out else ''}; samples in "
                f"{self.run.spikes.path}"
            )

    def note_skips(self, step: int, skips: Sequence[tuple[str, SkipSample]]) -> None:
        """Write down the samples that were left out on the way to a step's batches.

        Raises:
            OSError: as `note_suspects`.
        """
        if self.run is None:
            return
        for source, skip in skips:
            facts = {"reason": skip.reason.value, "detail": skip.detail}
            self._note(self.run.skips, step, [f"{source}/{skip.where}"], facts)

    def log(self, record: StepRecord) -> None:
        """Write a step's line; one that finds no room waits for the next.

        Raises:
            OSError: as `note_suspects`.
        """
        if self.run is not None:
            try:
                self.run.metrics.append(record)
            except OSError as error:
                # What is sure to be on disk is asked before a checkpoint is written.
                if self.cfg.on_save_error == "stop":
                    raise
                self.progress.line(f"warning: {self.run.metrics.path}: {error.strerror}; the line waits")
        self.progress.advance(f"loss {record.loss:.3f} {format_count(record.tokens_per_s)} tok/s")
        if record.step % self.cfg.log_every == 0 or record.step == self.cfg.max_steps:
            self.progress.line(format_record(record, self.cfg.max_steps))

    def _note(
        self, log: StepLog, step: int, sample_ids: Sequence[str], facts: Mapping[str, float | bool | str]
    ) -> None:
        try:
            log.append(self.stage, step, sample_ids, facts)
        except OSError as error:
            if self.cfg.on_save_error == "stop":
                raise
            self.progress.line(f"warning: {log.path}: {error.strerror}; a line is lost")
