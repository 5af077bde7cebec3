"""runs/NAME/{config.json, metrics.jsonl, report.html, checkpoints/step-00000500/…}: where a run keeps what it makes.

A checkpoint is whole or not there (`blip3_lite.folder`); `latest` moves after it, and only then are old ones removed.
"""

import errno
import fcntl
import os
import shutil
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from blip3_lite import CheckpointError, read_manifest
from blip3_lite.folder import UnfinishedFolder, clear_unfinished, seal

from .atomic import write_atomically
from .guards import StepLog
from .metrics import MetricsLog
from .processes import Processes


class SaveError(OSError):
    """A checkpoint that could not be written; those that are there are as they were."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest whole checkpoint, and why newer ones were refused."""

    path: Path | None
    refused: tuple[str, ...] = ()


class RunFolder:
    """The folder of one run. Making the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.report_path = self.path / "report.html"
        self.checkpoints_path = self.path / "checkpoints"
        self.latest_path = self.checkpoints_path / "latest"
        self.nonfinite = StepLog(self.path / "nonfinite.jsonl")
        self.spikes = StepLog(self.path / "spikes.jsonl")
        self.skips = StepLog(self.path / "skips.jsonl")
        self.metrics = MetricsLog(self.path / "metrics.jsonl")

    @classmethod
    def create(cls, path: Path | str, config: object) -> "RunFolder":
        """Make a new run, save its resolved config (anything msgspec can encode) and hold it for this process.

        Raises:
            FileExistsError: there is already a run.
            BlockingIOError: another process is at work there.
        """
        run = cls(path)
        if run.config_path.exists() or run.metrics.path.exists():
            raise FileExistsError(
                f"run folder {run.path}: expected none or an empty one, got a run; resume it or choose another name"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        run._claim()
        write_atomically(run.config_path, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
        return run

    @classmethod
    def reopen(cls, path: Path | str) -> "RunFolder":
        """Take up a run that is there: hold it for this process, and clear what a killed one left half-written.

        Raises:
            FileNotFoundError: there is no run.
            BlockingIOError: another process is at work there.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise FileNotFoundError(f"run folder {run.path}: expected a run with config.json, got none; check the path")
        run._claim()
        if run.checkpoints_path.is_dir():
            clear_unfinished(run.checkpoints_path)
        for folder in (run.path, run.checkpoints_path):
            for stale in folder.glob(".*.writing"):
                stale.unlink()
        return run

    def _claim(self) -> None:
        """Lock the run for as long as this object lives.

        The lock belongs to the process: its death ends it, however it dies, and children do not inherit it.
        """
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks cannot tell, and is no reason to refuse.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(
                    f"run folder {self.path}: expected no process at work there, got one that still is; "
                    "stop it or wait for its end"
                ) from error

    def save_checkpoint(
        self,
        step: int,
        writers: Mapping[str, Callable[[Path], object]],
        manifest: Mapping[str, object],
        keep_last: int,
    ) -> Path:
        """Write checkpoints/step-%08d, point `latest` at it, then remove old ones; return its path.

        Only the `keep_last` newest whole ones stay, besides those whose manifest says `is_kept`.

        Raises:
            SaveError: the disk is full or read-only; the checkpoints that are there are as they were.
        """
        return self.begin_checkpoint(step, writers)(manifest, keep_last)

    def begin_checkpoint(
        self, step: int, writers: Mapping[str, Callable[[Path], object]], num_bytes: int = 0
    ) -> Callable[[Mapping[str, object], int], Path]:
        """Do the part of `save_checkpoint` that reads the tensors; return the rest, for this thread or another.

        num_bytes: what the checkpoint takes at least, if known: part of the message where there is no room.
        """
        path = self.checkpoints_path / f"step-{step:08d}"
        with self._saving(path, num_bytes):
            if not _is_checkpoint(path):
                # A damaged one that a resume has passed over. Folders of this name are the run's own.
                shutil.rmtree(path, ignore_errors=True)
            unfinished = UnfinishedFolder(path, writers)

        def finish(manifest: Mapping[str, object], keep_last: int) -> Path:
            with self._saving(path, num_bytes):
                unfinished.finish(manifest)
                write_atomically(self.latest_path, path.name.encode() + b"\n")
                self._prune(keep_last, newest=path)
            return path

        return finish

    def save_together(
        self,
        step: int,
        writers: Mapping[str, Callable[[Path], object]],
        shard_writers: Sequence[Callable[[Path], Sequence[str]]],
        manifest: Mapping[str, object],
        keep_last: int,
        processes: Processes,
    ) -> Path:
        """`save_checkpoint` by all ranks: the first writes the files of `writers`, all of them their shards.

        shard_writers: called one after the other on every rank, with the folder to write into; each returns the names
            of the files that this rank has written.

        Raises:
            SaveError: on every rank, if it failed on one, which is named; the checkpoints are as they were.
        """
        path = self.checkpoints_path / f"step-{step:08d}"
        unfinished: list[UnfinishedFolder] = []

        def begin() -> None:
            if processes.is_first:
                if not _is_checkpoint(path):
                    shutil.rmtree(path, ignore_errors=True)
                unfinished.append(UnfinishedFolder(path, writers))

        def finish(entries: Sequence[Mapping[str, Mapping[str, object]]]) -> None:
            for whole in unfinished:
                for written in entries:
                    whole.add(written)
                whole.finish(manifest)
                write_atomically(self.latest_path, path.name.encode() + b"\n")
                self._prune(keep_last, newest=path)

        with self._saving(path, 0):
            try:
                processes.together("write", begin)
                work = Path(processes.share([str(one.work) for one in unfinished])[0][0])
                names: list[str] = []
                for write in shard_writers:
                    processes.together("write", lambda write=write: names.extend(write(work)))
                sealed: dict[str, dict[str, object]] = {}
                processes.together("write", lambda: sealed.update({name: seal(work / name) for name in names}))
                entries = processes.share(sealed)
                processes.together("write", lambda: finish(entries))
            except OSError:
                for whole in unfinished:
                    whole.discard()
                raise
        return path

    @contextmanager
    def _saving(self, path: Path, num_bytes: int) -> Generator[None]:
        try:
            yield
        except OSError as error:
            needed = f"{num_bytes:,} bytes" if num_bytes > 0 else "its bytes"
            try:
                free = f" ({shutil.disk_usage(self.path).free:,} bytes are free)"
            except OSError:
                free = ""
            raise SaveError(
                f"checkpoint {path}: expected to write {needed} there, got: {error.strerror or error}{free}; make "
                "room, or start from another place; the checkpoints that are there are whole"
            ) from error

    def _prune(self, keep_last: int, newest: Path) -> None:
        """Remove what the new checkpoint makes needless. It is on disk, whole: there is always one to go back to."""
        passing = [path for path in self.checkpoints() if path != newest and not _is_kept(path)]
        # Half-written ones, and later ones of a course that was left by resuming from before them.
        useless = [path for path in passing if not _is_checkpoint(path) or path.name > newest.name]
        older = [path for path in passing if path not in useless]
        for path in [*useless, *older[: max(0, len(older) - (keep_last - 1))]]:
            shutil.rmtree(path)

    def rewind(self, stage: str, step: int) -> None:
        """Forget the steps of `stage` behind `step` in every log: they will be done again.

        Raises:
            ValueError: a line of metrics.jsonl that is no record, with its number.
        """
        for log in (self.metrics, self.nonfinite, self.spikes, self.skips):
            log.rewind(stage, step)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, oldest first, whole or not."""
        return sorted(path for path in self.checkpoints_path.glob("step-*") if path.is_dir())

    def find_checkpoint(self) -> FoundCheckpoint:
        """Return the newest checkpoint whose files are all there and unchanged, `latest` first.

        Every file is read and its digest compared. Damaged ones are named in `refused`, to be shown as a warning.
        """
        candidates = self.checkpoints()[::-1]
        if self.latest_path.is_file():
            # Bytes: whatever a damaged file holds, it only names no folder then.
            latest = self.latest_path.read_bytes().strip()
            candidates.sort(key=lambda path: path.name.encode() != latest)
        refused: list[str] = []
        for path in candidates:
            try:
                read_manifest(path)
            except CheckpointError as error:
                refused.append(str(error))
            else:
                return FoundCheckpoint(path, tuple(refused))
        return FoundCheckpoint(None, tuple(refused))


def _is_kept(path: Path) -> bool:
    try:
        return read_manifest(path, verify=False).get("is_kept") is True
    except CheckpointError:
        return False


def _is_checkpoint(path: Path) -> bool:
    """Whether all files are there in full; their content is not read."""
    try:
        files = read_manifest(path, verify=False)["files"]
    except CheckpointError:
        return False
    assert isinstance(files, dict)
    entries = msgspec.convert(files, dict[str, dict[str, int | str]])
    return all(
        (path / name).is_file() and (path / name).stat().st_size == entry["bytes"] for name, entry in entries.items()
    )
