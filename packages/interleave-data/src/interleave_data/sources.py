"""What all readers share: the contract of a source, paths that stay in their folder, records found by offset.

A source is a sequence of samples with random access. It keeps offsets, not contents, so it is small in memory, can be
handed to worker processes, and any order over it costs the same.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np

from .errors import SkipReason, SkipSample
from .samples import FileBytes, ImagePart, PreferenceSample, Sample, Size, SliceBytes

AnySample = Sample | PreferenceSample
Record = TypeVar("Record")

_SCAN_BYTES = 1 << 24


@runtime_checkable
class Source(Protocol):
    """Samples by index. Reading one twice gives the same; a bad one raises `SkipSample` each time."""

    @property
    def name(self) -> str:
        """What counters and logs call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of files (names and sizes) and settings: when it differs, saved positions mean nothing."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> AnySample: ...


@runtime_checkable
class HasSizes(Protocol):
    """A source whose index knows how much its samples take up."""

    def size(self, index: int) -> Size | None:
        """Exact size of a sample; None if it is not known. Raises `SkipSample` for one known to be bad."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Samples that are already there: drawn by the program, or a handful in a test."""

    name: str
    samples: Sequence[AnySample]
    version: str = ""
    """Anything that tells this list from another one under the same name, such as the seed it was drawn with."""

    @property
    def fingerprint(self) -> str:
        """Digest of the name, the version and the number of samples."""
        return fingerprint("in-memory", [], name=self.name, version=self.version, samples=len(self))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> AnySample:
        return self.samples[index]


def fingerprint(kind: str, paths: Sequence[str], **settings: str | int) -> str:
    """Digest names and sizes of files, in order, and the settings; folders do not count, so data may be moved."""
    files = [(printable(os.path.basename(path)), os.path.getsize(path)) for path in paths]
    return sha256(msgspec.json.encode([kind, files, sorted(settings.items())])).hexdigest()[:16]


def unique_id(source: str, index: int, given: str | int | None) -> str:
    """Name a record by the id that it gives itself, if any, and by its index, as nothing keeps given ids apart."""
    return f"{source}:{index}" if given is None else f"{given}#{index}"


def printable(name: str) -> str:
    """Write what cannot be printed, and the backslash, as escapes: a name from a file need not be UTF-8."""
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode() for char in name
    )


def path_inside(root: str, path: str) -> str:
    """Resolve a path from a data file under its folder.

    Raises:
        SkipSample: if it is absolute, or leads out of the folder, symbolic links included.
    """
    if not path or "\0" in path or PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor:
        raise SkipSample(SkipReason.PATH_REFUSED, f"expected a path relative to the image root, got {path!r}")
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, path))
    if os.path.commonpath([real_root, real]) != real_root:
        raise SkipSample(SkipReason.PATH_REFUSED, f"expected a path inside the image root, got {path!r}")
    return real


def image_inside(root: str, path: str) -> ImagePart:
    """Refer to a picture under the image root; it is not opened yet.

    Raises:
        SkipSample: if the path leads out of the root.
    """
    return ImagePart(FileBytes(path_inside(root, path)), key=path)


def images_inside(root: str, paths: str | Sequence[str] | None) -> list[ImagePart]:
    """Refer to the pictures of a record that may have one, several or none.

    Raises:
        SkipSample: if a path leads out of the root.
    """
    if paths is None:
        return []
    return [image_inside(root, path) for path in ([paths] if isinstance(paths, str) else paths)]


class RecordFile:
    """A JSON array or a JSON-lines file as a sequence of undecoded records.

    The whole file is looked through once, on opening, through a memory map; what stays is two integers a record.

    Raises:
        ValueError: if the file is neither, or an array is broken. A broken line is a matter of that record alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{path}: expected a JSON array or JSON lines, got an empty file; check the path")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                start = _first_content(data, 0)
                spans = _array_spans(data, self.path) if data[start : start + 1] == b"[" else _line_spans(data)
        self._spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def decode(self, index: int, record_type: type[Record]) -> Record:
        """Read and decode one record.

        Raises:
            SkipSample: if it is no JSON, nested too deeply, not of the type, or the file has changed.
        """
        offset, size = (int(value) for value in self._spans[index])
        try:
            return msgspec.json.decode(SliceBytes(self.path, offset, size)(), type=record_type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error)) from error
        except OSError as error:
            raise SkipSample(SkipReason.UNREADABLE_FILE, str(error)) from error


def _first_content(data: mmap.mmap, start: int) -> int:
    """Skip white space, commas and a byte-order mark."""
    while data[start : start + 1] in (b" ", b"\t", b"\r", b"\n", b",") or data[start : start + 3] == b"\xef\xbb\xbf":
        start += 3 if data[start : start + 1] == b"\xef" else 1
    return start


def _array_spans(data: mmap.mmap, path: str) -> list[tuple[int, int]]:
    """Find (offset, size) of each element: msgspec splits the array, and only separators lie between its pieces."""
    position = _first_content(data, 0)
    spans: list[tuple[int, int]] = []
    try:
        with memoryview(data) as view, view[position:] as array:
            records = msgspec.json.decode(array, type=list[msgspec.Raw])
            sizes = [len(memoryview(record)) for record in records]
            del records
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON array, got {error}; was the file written to its end?") from error
    position += 1
    for size in sizes:
        position = _first_content(data, position)
        spans.append((position, size))
        position += size
    return spans


def _line_spans(data: mmap.mmap) -> list[tuple[int, int]]:
    """Find (offset, size) of each line that is not blank, without its newline."""
    ends = [
        np.flatnonzero(np.frombuffer(data[start : start + _SCAN_BYTES], dtype=np.uint8) == ord("\n")) + start
        for start in range(0, len(data), _SCAN_BYTES)
    ]
    stops = np.concatenate([*ends, np.array([len(data)])])
    starts = np.concatenate([np.array([_first_content(data, 0)]), stops[:-1] + 1])
    return [
        (start, stop - start)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        if data[start:stop].strip()
    ]
