"""A stage's checkpoints: one process writes the files and lets a thread make them whole; several do it together."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .background import BackgroundSave
from .config import TrainConfig
from .contract import ModelFiles, ShardedModelFiles
from .engine import Engine
from .optimizer import Optimizers
from .progress import Progress
from .run_folder import RunFolder, SaveError
from .shards import checkpoint_shards
from .train_state import Counters, SavedState, state_writers


class StageCheckpoints:
    """Writes the checkpoints of one stage. Nothing is kept of the state that each is given."""

    def __init__(
        self,
        run: RunFolder,
        files: ModelFiles,
        first_step: int,
        cfg: TrainConfig,
        optimizers: Optimizers,
        engine: Engine[Any],
        progress: Progress,
    ) -> None:
        """Refuse files that several processes cannot write, where they are to.

        Raises:
            ValueError: as said.
        """
        if engine.is_shared and not isinstance(files, ShardedModelFiles):
            raise ValueError(
                f"Trainer: expected files whose weights several processes can write (ShardedModelFiles), got "
                f"{files!r}; give it `weights` and `tensors`"
            )
        self.run, self.files, self.first_step, self.cfg = run, files, first_step, cfg
        self.optimizers, self.engine, self.progress = optimizers, engine, progress
        self._small_writers: dict[str, Callable[[Path], object]] = {}
        self._saving: BackgroundSave | None = None
        self._saving_step = 0

    def start(self) -> None:
        """Take over what is written beside the weights while the model is whole: its writers cannot read parts."""
        if self.engine.is_shared and isinstance(self.files, ShardedModelFiles):
            weights = self.files.weights
            self._small_writers = {name: write for name, write in self.files.writers().items() if name != weights}

    def save_on_the_way(self, state: SavedState) -> None:
        """Write a checkpoint's files now and let a thread make it whole, after the one before is whole.

        Several processes make it whole at once: a rank's failure is then every rank's, at the same step.

        Raises:
            SaveError: under `on_save_error="stop"`; else it is counted in the state's counters.
        """
        if not self.engine.is_shared:
            self.end_saving(state.counters)
        try:
            if self.engine.is_shared:
                self._save_together(state, is_kept=False)
            else:
                self._saving = BackgroundSave(self._begin(state, is_kept=False))
                self._saving_step = state.counters.step
        except SaveError as error:
            self._bear(error, state.counters)

    def end_saving_if_done(self, counters: Counters) -> None:
        """Take notice of a checkpoint that has become whole, or has failed.

        Raises:
            SaveError: as `end_saving`.
        """
        if self._saving is not None and self._saving.is_done:
            self.end_saving(counters)

    def end_saving(self, counters: Counters) -> Path | None:
        """Wait for the checkpoint that is being written, if there is one; return it if it became whole.

        Raises:
            SaveError: it did not, under `on_save_error="stop"`; else it is counted.
        """
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        try:
            return saving.wait()
        except SaveError as error:
            self._bear(error, counters)
            return None

    def save_at_the_end(self, state: SavedState, *, is_kept: bool) -> Path:
        """Leave a checkpoint of the last step, whole. `is_kept`: for good; a stopped one only waits to be resumed.

        Raises:
            SaveError: it could not be written.
        """
        newest = self.end_saving(state.counters)
        if self.engine.is_shared:
            return self._save_together(state, is_kept)
        if not is_kept and newest is not None and self._saving_step == state.counters.step:
            return newest
        return self._begin(state, is_kept)()

    def _bear(self, error: SaveError, counters: Counters) -> None:
        if self.cfg.on_save_error == "stop":
            raise error
        counters.failed_saves += 1
        self.progress.line(f"warning: {error}; going on without it")

    def _begin(self, state: SavedState, is_kept: bool) -> Callable[[], Path]:
        self._sync()
        writers = {**self.files.writers(), **state_writers(state, self.optimizers)}
        finish = self.run.begin_checkpoint(self._step(state), writers, self.optimizers.num_bytes)
        return partial(finish, _manifest(state, is_kept), self.cfg.keep_last)

    def _save_together(self, state: SavedState, is_kept: bool) -> Path:
        """Write a checkpoint whole, every rank its share of the tensors."""
        assert isinstance(self.files, ShardedModelFiles)
        processes = self.engine.processes
        processes.at(f"step {state.counters.step}, checkpoint")
        self._sync()
        return self.run.save_together(
            self._step(state),
            {**self._small_writers, **state_writers(state, None)} if processes.is_first else {},
            checkpoint_shards(self.files, state.parameters, self.optimizers, self.engine),
            {**_manifest(state, is_kept), "num_processes": processes.count},
            self.cfg.keep_last,
            processes,
        )

    def _step(self, state: SavedState) -> int:
        """Of the whole run, by which folders are numbered."""
        return self.first_step + state.counters.step

    def _sync(self) -> None:
        """Have the log on disk before a checkpoint that stands behind it.

        Raises:
            SaveError: on every rank: if the first one went on alone, the others would wait for it in the checkpoint.
        """
        processes, metrics = self.engine.processes, self.run.metrics
        try:
            processes.together("sync", lambda: metrics.sync() if processes.is_first else None)
        except OSError as error:
            raise SaveError(f"{metrics.path}: expected to write it, got: {error}; make room") from error


def _manifest(state: SavedState, is_kept: bool) -> Mapping[str, object]:
    return {
        "stage": state.stage,
        "step": state.counters.step,
        "data_fingerprint": state.data_fingerprint,
        "is_kept": is_kept,
    }
