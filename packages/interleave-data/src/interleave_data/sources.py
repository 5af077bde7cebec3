"""What all sources share: their contract, names that can be printed, paths that stay in their folder.

A source is a sequence of samples with random access. It keeps no contents, so it is small in memory, can be handed to
worker processes, and any order over it costs the same.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath, PureWindowsPath
from typing import Protocol, runtime_checkable

import msgspec

from .errors import SkipReason, SkipSample
from .samples import FileBytes, ImagePart, PreferenceSample, Sample, Size

AnySample = Sample | PreferenceSample


@runtime_checkable
class Source(Protocol):
    """Samples by index. Reading one twice gives the same; a bad one raises `SkipSample` each time."""

    @property
    def name(self) -> str:
        """What counters and logs call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of contents and settings: when it differs, saved positions mean nothing."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> AnySample: ...


@runtime_checkable
class HasSizes(Protocol):
    """A source whose index knows how much its samples take up."""

    def size(self, index: int) -> Size | None:
        """Exact size of a sample; None if it is not known. Raises `SkipSample` for one known to be bad."""
        ...


@runtime_checkable
class HasPlaces(Protocol):
    """A source that can say where a sample lies without reading it."""

    def place(self, index: int) -> str:
        """Shard and key or number, which is the sample's id."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can fetch samples before they are read, and says what trouble it had; one that is far away."""

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Fetch samples that will be read soon."""
        ...

    def take_retries(self) -> tuple[int, str]:
        """How many reads had to be tried again since this was last asked, and the last one in words."""
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
        return fingerprint("in-memory", name=self.name, version=self.version, samples=len(self))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> AnySample:
        return self.samples[index]


def fingerprint(kind: str, **settings: str | int) -> str:
    """Digest of settings, by name."""
    return sha256(msgspec.json.encode([kind, sorted(settings.items())])).hexdigest()[:16]


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
        detail = f"expected a path inside the image root, got {path!r}, which is {real!r}"
        raise SkipSample(SkipReason.PATH_REFUSED, f"{detail}; name an image_root that holds both")
    return real


def image_inside(root: str, path: str) -> ImagePart:
    """Refer to a picture under the image root; it is not opened yet.

    Raises:
        SkipSample: if the path leads out of the root.
    """
    return ImagePart(FileBytes(path_inside(root, path)), key=path)
