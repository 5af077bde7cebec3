"""Records of a JSON array or of JSON lines, read in place by an index.

Indexing looks through the whole file once, through a memory map; what stays is twenty bytes a record. A broken array is
an error then; a broken line is a matter of that record alone.
"""

import mmap
import os
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from .errors import ShardError, SkipReason, SkipSample
from .index_file import ShardIndex
from .records import RecordWithoutMembers
from .samples import SliceBytes

if TYPE_CHECKING:
    from .remote import RemoteObject, RemoteSlice

Fields = TypeVar("Fields")

_PROGRESS_BYTES = 1 << 24
# Text alone: a document of a million words has a tenth of it.
_MAX_RECORD_BYTES = 1 << 26
_MARK = b"\xef\xbb\xbf"
_SEPARATORS = b" \t\r\n,"


def index_json(path: str, on_bytes: Callable[[int], object] | None = None) -> ShardIndex:
    """Find every record; `on_bytes` hears how many bytes were done since it was last called.

    Raises:
        ShardError: if the file is empty or a broken array.
        OSError: if it cannot be read.
    """
    offsets, sizes, checksums = array("q"), array("q"), array("I")
    done = 0
    with open(path, "rb") as file:
        shard_bytes = os.fstat(file.fileno()).st_size
        if shard_bytes == 0:
            raise ShardError(f"{path}: expected a JSON array or JSON lines, got an empty file; check the path")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = _first_content(data, 0)
            spans = _array_spans(data, path) if data[start : start + 1] == b"[" else _line_spans(data, start)
            with memoryview(data) as view:
                for offset, size in spans:
                    with view[offset : offset + size] as record:
                        checksums.append(zlib.crc32(record))
                    offsets.append(offset)
                    sizes.append(size)
                    if on_bytes and offset - done >= _PROGRESS_BYTES:
                        on_bytes(offset - done)
                        done = offset
    if on_bytes:
        on_bytes(shard_bytes - done)
    arrays = {
        "offset": np.array(offsets, np.int64),
        "size": np.array(sizes, np.int64),
        "crc32": np.array(checksums, np.uint32),
    }
    return ShardIndex.of("json", shard_bytes, len(offsets), arrays)


class JsonShard:
    """The records of one file by their numbers."""

    def __init__(self, path: str, name: str, index: ShardIndex, remote: "RemoteObject | None" = None) -> None:
        """`remote` reads what is not on this disk."""
        self.path = path
        self.name = name
        self.index = index
        self._arrays = dict(index.arrays)
        self._remote = remote

    def __len__(self) -> int:
        return self.index.num_samples

    def record(self, row: int) -> "JsonRecord":
        """Refer to a record; it is not read yet."""
        offset, size, crc32 = (int(self._arrays[column][row]) for column in ("offset", "size", "crc32"))
        where = f"{self.name}:{row}"
        if self._remote is not None:
            return JsonRecord(where, self._remote.slice(offset, size, crc32, (offset, offset + size)))
        return JsonRecord(where, SliceBytes(self.path, offset, size, crc32))

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a record and the one behind its last."""
        offset = int(self._arrays["offset"][row])
        return offset, offset + int(self._arrays["size"][row])


@dataclass(frozen=True)
class JsonRecord(RecordWithoutMembers):
    """One JSON value."""

    span: "SliceBytes | RemoteSlice"

    def decode(self, fields: type[Fields]) -> Fields:
        """Read and decode the record.

        Raises:
            SkipSample: if it is no JSON, nested too deeply, beyond 64 MiB or not of the type, or the file has changed.
        """
        if self.span.size > _MAX_RECORD_BYTES:
            detail = f"expected a record of at most {_MAX_RECORD_BYTES} bytes, got {self.span.size}"
            raise SkipSample(SkipReason.TOO_MANY_BYTES, detail, self.where)
        try:
            return msgspec.json.decode(self.span(), type=fields)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error), self.where) from error
        except OSError as error:
            raise SkipSample(SkipReason.UNREADABLE_FILE, str(error), self.where) from error


def _first_content(data: mmap.mmap, start: int) -> int:
    """Skip white space, commas and a byte-order mark."""
    while start < len(data) and (data[start] in _SEPARATORS or data[start : start + 3] == _MARK):
        start += 1 if data[start] in _SEPARATORS else 3
    return start


def _array_spans(data: mmap.mmap, path: str) -> Iterator[tuple[int, int]]:
    """Find (offset, size) of each element: msgspec splits the array, and only separators lie between its pieces."""
    position = _first_content(data, 0)
    try:
        with memoryview(data) as view, view[position:] as whole:
            records = msgspec.json.decode(whole, type=list[msgspec.Raw])
            sizes = array("q", [len(memoryview(record)) for record in records])
            del records
    except (msgspec.DecodeError, RecursionError) as error:
        raise ShardError(f"{path}: expected a JSON array, got {error}; was the file written to its end?") from error
    position += 1
    for size in sizes:
        position = _first_content(data, position)
        yield position, size
        position += size


def _line_spans(data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Find (offset, size) of each line that is not blank, without its newline."""
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        # A line may be as long as the file, so it is not copied only to see that there is something in it.
        if data[start : min(stop, start + 256)].strip() or data[start:stop].strip():
            yield start, stop - start
        start = stop + 1
