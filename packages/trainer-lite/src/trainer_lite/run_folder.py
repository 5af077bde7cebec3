"""runs/NAME/{config.json, metrics.jsonl, report.html, checkpoints/step-00000500/…}: where a run keeps what it makes.

A checkpoint is whole or not there (`blip3_lite.folder`); `latest` moves after it, and only then are old ones removed.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from blip3_lite import CheckpointError, read_manifest, write_folder

from .atomic import write_atomically
from .metrics import MetricsLog


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
        self.nonfinite_path = self.path / "nonfinite.jsonl"
        self.metrics = MetricsLog(self.path / "metrics.jsonl")

    @classmethod
    def create(cls, path: Path | str, config: object) -> "RunFolder":
        """Make a new run and save its resolved config (anything msgspec can encode).

        Raises:
            FileExistsError: there is already a run.
        """
        run = cls(path)
        if run.config_path.exists() or run.metrics.path.exists():
            raise FileExistsError(
                f"run folder {run.path}: expected none or an empty one, got a run; resume it or choose another name"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run.config_path, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
        return run

    def save_checkpoint(
        self,
        step: int,
        writers: Mapping[str, Callable[[Path], object]],
        manifest: Mapping[str, object],
        keep_last: int,
    ) -> Path:
        """Write checkpoints/step-%08d, point `latest` at it, then remove old ones; return its path.

        Only the `keep_last` newest stay, besides those whose manifest says `is_kept`.
        """
        path = self.checkpoints_path / f"step-{step:08d}"
        if not _is_checkpoint(path):
            # A damaged one that a resume has passed over. Folders of this name are the run's own.
            shutil.rmtree(path, ignore_errors=True)
        write_folder(path, writers, manifest)
        write_atomically(self.latest_path, path.name.encode() + b"\n")
        self._prune(keep_last, newest=path)
        return path

    def _prune(self, keep_last: int, newest: Path) -> None:
        passing = [path for path in self.checkpoints() if path != newest and not _is_kept(path)]
        for path in passing[: max(0, len(passing) - (keep_last - 1))]:
            shutil.rmtree(path)

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
    try:
        read_manifest(path, verify=False)
    except CheckpointError:
        return False
    return True
