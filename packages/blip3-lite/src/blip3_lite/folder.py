"""A folder that is either whole or not there: temporary folder, synced files, MANIFEST.json last, rename.

Used for model checkpoints and, with more files in it, for training checkpoints. No pickle: writers write what they get.
"""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from safetensors import SafetensorError

MANIFEST = "MANIFEST.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, half-written, damaged, or made for something else."""


class _FileEntry(msgspec.Struct, frozen=True):
    """What the manifest says of one file."""

    bytes: int
    sha256: str


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> dict[str, object]:
    """Bring a written file to the disk; return its entry in the manifest."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


class UnfinishedFolder:
    """A folder whose files are written but not yet on disk for sure; `finish` makes it whole and puts it in its place.

    Nothing that the writers read is needed any more: `finish` works on the files alone, so that another thread may do
    it while the tensors move on.
    """

    def __init__(self, path: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
        """Write the files into a temporary folder beside `path`; raises as `write_folder` does."""
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(path.parent, glob.escape(path.name))
        self.path = path
        self._names = list(writers)
        self._work = path.parent / f".{path.name}.writing-{os.getpid()}"
        self._given: dict[str, Mapping[str, object]] = {}
        self._work.mkdir()
        try:
            for name, write in writers.items():
                write(self._work / name)
        except SafetensorError as error:
            self.discard()
            raise as_os_error(error) from error
        except BaseException:
            self.discard()
            raise

    @property
    def work(self) -> Path:
        """The temporary folder, for files that others write."""
        return self._work

    def add(self, files: Mapping[str, Mapping[str, object]]) -> None:
        """Take in files that others have written into `work` and synced, with their entries of the manifest."""
        self._given.update(files)

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Sync the files, write MANIFEST.json last, and rename; a failure removes the temporary folder."""
        work, path = self._work, self.path
        replaced = path.parent / f".{path.name}.writing-old"
        try:
            files: dict[str, Mapping[str, object]] = dict(self._given)
            for name in self._names:
                files[name] = seal(work / name)
            body = msgspec.json.format(msgspec.json.encode({**manifest, "files": files}), indent=2)
            (work / MANIFEST).write_bytes(body)
            _sync(work / MANIFEST)
            _sync(work)
            if path.exists():
                path.rename(replaced)
            work.rename(path)
            _sync(path.parent)
            # The new folder is in its place: an old one that resists is left to the next writer.
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self._work, ignore_errors=True)


def write_folder(path: Path, writers: Mapping[str, Callable[[Path], object]], manifest: Mapping[str, object]) -> None:
    """Write the files of `writers` (name → function that writes that path) into `path`, all or nothing.

    An older folder of this kind at `path` is replaced only once the new one is complete and on disk. What a killed
    writer left is removed by the next one. `manifest` is stored in MANIFEST.json beside the sizes and digests of the
    files.

    Raises:
        CheckpointError: something else is at `path`, a file or a folder with content but without a manifest; nothing
            has been touched.
        OSError: the disk is full or read-only; `path` is then as it was before, or the new folder where that was
            complete already.
    """
    UnfinishedFolder(path, writers).finish(manifest)


def clear_unfinished(parent: Path, name: str = "*") -> None:
    """Put right what killed writers of `parent`/`name` (a glob pattern) left; no other writer may be at work there."""
    for replaced in parent.glob(f".{name}.writing-old"):
        path = parent / replaced.name.removeprefix(".").removesuffix(".writing-old")
        if not path.exists():
            # A writer died between its two renames: the old folder is the last whole one.
            replaced.rename(path)
    for stale in parent.glob(f".{name}.writing-*"):
        shutil.rmtree(stale)


def as_os_error(error: SafetensorError) -> OSError:
    """The same as an OSError: what safetensors says of a full disk is none; its text ends in "(os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _check_replaceable(path: Path) -> None:
    """Refuse to write over what this module did not write: runs/demo/model may be replaced, runs/demo may not."""
    if path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir())
        if not foreign or MANIFEST in foreign:
            return
        got = f"a folder without {MANIFEST} that holds {', '.join(foreign[:3])}"
    elif path.exists() or path.is_symlink():
        got = "a file" if path.is_file() else "neither a file nor a folder"
    else:
        return
    raise CheckpointError(
        f"checkpoint {path}: expected nothing there, an empty folder or an older checkpoint, got {got}; "
        "nothing was written: choose another path"
    )


def read_manifest(path: Path, verify: bool = True) -> dict[str, object]:
    """Return the manifest of the folder at `path`; with `verify`, check every file's size and digest.

    Raises:
        CheckpointError: no folder, no manifest, or files that are missing, cut or changed (all of them are listed).
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: expected a folder, got nothing there; check the path")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"checkpoint {path}: expected {MANIFEST} (it is written last), got none; "
            "the folder is half-written or no checkpoint: use an earlier one"
        )
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=dict[str, object])
        files = msgspec.convert(manifest.get("files"), dict[str, _FileEntry])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"checkpoint {path / MANIFEST}: expected a list of files, got: {error}; use an earlier one"
        ) from error
    faults: list[str] = []
    for name, entry in files.items() if verify else ():
        file = path / name
        if Path(name).name != name:
            faults.append(f"{name!r}: expected a plain file name")
        elif not file.is_file():
            faults.append(f"{name}: missing")
        elif file.stat().st_size != entry.bytes:
            faults.append(f"{name}: expected {entry.bytes} bytes, got {file.stat().st_size}")
        elif file_sha256(file) != entry.sha256:
            faults.append(f"{name}: its sha256 is not the one in {MANIFEST}")
    if faults:
        raise CheckpointError(f"checkpoint {path}: damaged: " + "; ".join(faults) + "; use an earlier one")
    return manifest
