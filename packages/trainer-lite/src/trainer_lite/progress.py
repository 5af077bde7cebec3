"""Where the loop shows itself: a bar and lines, or nothing. The loop itself never prints."""

import os
import sys
from types import TracebackType
from typing import NoReturn, Protocol, runtime_checkable

from tqdm import tqdm

_LARGE_BYTES = 1 << 26
"""A shard that takes its time."""


@runtime_checkable
class TextSink(Protocol):
    """What text can be written to: a stream of the terminal, a file, a buffer."""

    def write(self, text: str, /) -> object:
        """Write the text."""
        ...

    def flush(self) -> object:
        """Let it be seen."""
        ...


@runtime_checkable
class Progress(Protocol):
    """What the loop tells a terminal, a notebook or a test."""

    def start(self, label: str, total: int, done: int) -> None:
        """Begin a stage of `total` steps of which `done` are behind it."""
        ...

    def advance(self, note: str) -> None:
        """Count one step; `note` is a short text beside the bar."""
        ...

    def line(self, text: str) -> None:
        """Show one line that stays."""
        ...

    def close(self) -> None:
        """End the stage."""
        ...


class QuietProgress:
    """Shows nothing."""

    def start(self, label: str, total: int, done: int) -> None:
        """Do nothing."""

    def advance(self, note: str) -> None:
        """Do nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TqdmProgress:
    """A bar with rate and time left on a terminal; lines above it, and only lines where there is no terminal."""

    def __init__(self, file: TextSink | None = None) -> None:
        self._file: TextSink = sys.stderr if file is None else file
        self._bar: tqdm[NoReturn] | None = None

    def start(self, label: str, total: int, done: int) -> None:
        """Begin a bar; `disable=None` leaves it out where `file` is no terminal."""
        self._bar = tqdm(
            total=total, initial=done, desc=label, unit="step", file=self._file, disable=None, dynamic_ncols=True
        )

    def advance(self, note: str) -> None:
        """Move the bar by one."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(1)

    def line(self, text: str) -> None:
        """Write a line without breaking the bar."""
        tqdm.write(text, file=self._file)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class IndexProgress:
    """Bars of bytes for the indexes that opening a source makes (its `on_index`); nothing where none is made.

    Where there is no terminal, a line for each large shard.
    """

    def __init__(self, file: TextSink | None = None) -> None:
        self._file: TextSink = sys.stderr if file is None else file
        self._path: str | None = None
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, path: str, num_bytes: int, shard_bytes: int) -> None:
        """Hear that so many more bytes of a shard are done."""
        if self._bar is None or path != self._path:
            self._close()
            name = os.path.basename(path)
            self._path = path
            self._bar = tqdm(
                total=shard_bytes,
                desc=f"index {name}",
                unit="B",
                unit_scale=True,
                file=self._file,
                disable=None,
                leave=False,
                dynamic_ncols=True,
            )
            if self._bar.disable and shard_bytes >= _LARGE_BYTES:
                tqdm.write(f"indexing {name}, {shard_bytes:,} bytes", file=self._file)
        self._bar.update(num_bytes)

    def __enter__(self) -> "IndexProgress":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
