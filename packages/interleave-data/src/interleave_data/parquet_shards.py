"""Rows of a parquet file, read a row group at a time by an index.

A row group is what can be read by itself, so it is what has a checksum; the last ones that were read are kept. Rows in
order, or shuffled within windows (`order.WindowOrder`), cost one reading of each group, rows at random one each: for
random access write shards with small row groups, or tars (tools/pack_shards.py). Needs pyarrow:
`interleave-data[parquet]`.

Of an object that is not on this disk a row group is one request, whichever columns are wanted: the checksum is that of
the whole group.
"""

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from .errors import ShardError, SkipReason, SkipSample
from .index_file import ShardIndex
from .records import RecordWithoutMembers

if TYPE_CHECKING:
    from .remote import RemoteObject

Fields = TypeVar("Fields")

_CHUNK_BYTES = 1 << 20
_GROUPS_KEPT = 16
"""A window has eight runs of rows, and a run may begin in one group and end in the next."""
_GROUP_BYTES_KEPT = 1 << 28
_MAGIC = b"PAR1"


_GroupName = tuple[str, int, tuple[str, ...] | None]
"""Path, number, and the columns that were read, None for all."""


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "parquet: expected pyarrow, got none; install interleave-data[parquet], or write tars elsewhere "
            "(tools/pack_shards.py)"
        ) from error
    return pyarrow.parquet


def index_parquet(path: str, on_bytes: Callable[[int], object] | None = None) -> ShardIndex:
    """Take the place and the checksum of every row group; `on_bytes` hears of progress in bytes.

    Raises:
        ShardError: if the file is no whole parquet file.
        OSError: if it cannot be read.
        ImportError: if pyarrow is not there.
    """
    shard_bytes = os.path.getsize(path)
    _read_tail(path)
    rows, spans = [0], list[tuple[int, int]]()
    try:
        with _pyarrow_parquet().ParquetFile(path) as file:
            metadata = file.metadata
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                spans.append(_group_span(group))
                rows.append(rows[-1] + group.num_rows)
    except (OSError, ValueError, _arrow_error()) as error:
        raise ShardError(_not_whole(path, str(error))) from error
    done = 0
    checksums: list[int] = []
    for offset, size in spans:
        if not 0 < offset <= offset + size <= shard_bytes:
            raise ShardError(_not_whole(path, f"a row group of {size} bytes at {offset} of {shard_bytes}"))
        checksums.append(_checksum(path, offset, size))
        if on_bytes:
            on_bytes(size)
        done += size
    if on_bytes:
        on_bytes(shard_bytes - done)
    arrays = {
        "first_row": np.array(rows, np.int64),
        "offset": np.array([offset for offset, _ in spans], np.int64),
        "size": np.array([size for _, size in spans], np.int64),
        # The last is that of the footer, which says how the groups are to be read.
        "crc32": np.array([*checksums, zlib.crc32(_read_tail(path))], np.uint32),
    }
    return ShardIndex.of("parquet", shard_bytes, rows[-1], arrays)


def _arrow_error() -> type[Exception]:
    import pyarrow

    return pyarrow.ArrowException


def _not_whole(path: str, got: str) -> str:
    return f"{path}: expected a whole parquet file, got {got}; copy or write the shard again"


def _read_tail(path: str) -> bytes:
    """Read the footer, its length and the closing mark."""
    with open(path, "rb") as file:
        shard_bytes = os.fstat(file.fileno()).st_size
        file.seek(max(0, shard_bytes - 8))
        tail = file.read(8)
        size = 8 + int.from_bytes(tail[:4], "little")
        if tail[4:] != _MAGIC or size + len(_MAGIC) > shard_bytes:
            raise ShardError(_not_whole(path, f"{shard_bytes} bytes without a footer at their end"))
        file.seek(shard_bytes - size)
        return file.read(size)


def _group_span(group: Any) -> tuple[int, int]:
    """(offset, size) of the stretch that holds all column chunks of a row group."""
    starts, ends = list[int](), list[int]()
    for number in range(group.num_columns):
        column = group.column(number)
        dictionary = column.dictionary_page_offset if column.has_dictionary_page else None
        start = min(column.data_page_offset, dictionary or column.data_page_offset)
        starts.append(start)
        ends.append(start + column.total_compressed_size)
    return min(starts, default=len(_MAGIC)), max(ends, default=len(_MAGIC)) - min(starts, default=len(_MAGIC))


def _checksum(path: str, offset: int, size: int) -> int:
    crc = 0
    with open(path, "rb") as file:
        file.seek(offset)
        while size > 0 and (data := file.read(min(size, _CHUNK_BYTES))):
            crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


class _Piece(io.RawIOBase):
    """A file of which only one stretch is here."""

    def __init__(self, data: bytes, offset: int, num_bytes: int) -> None:
        self._data, self._offset, self._num_bytes = memoryview(data), offset, num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = offset + (0, self._position, self._num_bytes)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        start = self._position - self._offset
        stop = start + min(len(buffer), self._num_bytes - self._position)
        if not 0 <= start <= stop <= len(self._data):
            raise OSError(f"expected a reading of the row group alone, got bytes from {self._position}")
        buffer[: stop - start] = self._data[start:stop]
        self._position += stop - start
        return stop - start


class RowGroups:
    """Row groups of all shards of a source that were read last: a few, and the bytes are bounded too."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_GroupName, Any] = OrderedDict()
        self._num_bytes = 0

    def get(self, name: _GroupName, read: Callable[[], Any]) -> Any:
        """One that is kept, or what `read` gives, which is then kept in the place of the oldest.

        Raises:
            SkipSample: as `read`.
        """
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        group = read()
        self._kept[name] = group
        self._num_bytes += group.nbytes
        while len(self._kept) > 1 and (len(self._kept) > _GROUPS_KEPT or self._num_bytes > _GROUP_BYTES_KEPT):
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return group

    def __reduce__(self) -> tuple[object, ...]:
        """Another process reads its own."""
        return RowGroups, ()


class ParquetShard:
    """The rows of one file by their numbers."""

    def __init__(
        self,
        path: str,
        name: str,
        index: ShardIndex,
        groups: RowGroups | None = None,
        remote: "RemoteObject | None" = None,
    ) -> None:
        """`groups` is shared by the shards of a source; `remote` reads what is not on this disk."""
        self.path = path
        self.name = name
        self.index = index
        self._arrays = dict(index.arrays)
        self._groups = groups or RowGroups()
        self._remote = remote
        self._footer = b""

    def __len__(self) -> int:
        return self.index.num_samples

    def record(self, row: int) -> "ParquetRecord":
        """Refer to a row; its group is not read yet."""
        return ParquetRecord(f"{self.name}:{row}", self, row)

    def span(self, row: int) -> None:
        """A row is read with its group."""

    def read_row(self, row: int, columns: tuple[str, ...] | None) -> dict[str, object]:
        """Read one row of some columns, or of all.

        Raises:
            SkipSample: if the row group has changed or cannot be read.
        """
        group = int(np.searchsorted(self._arrays["first_row"], row, side="right")) - 1
        table = self._groups.get((self.path, group, columns), lambda: self._read_group(group, columns))
        (found,) = table.slice(row - int(self._arrays["first_row"][group]), 1).to_pylist()
        return found

    def _read_group(self, group: int, columns: tuple[str, ...] | None) -> Any:
        if self._remote is not None:
            return self._fetch_group(self._remote, group, columns)
        try:
            self._check(-1, zlib.crc32(_read_tail(self.path)))
            offset, size = (int(self._arrays[column][group]) for column in ("offset", "size"))
            self._check(group, _checksum(self.path, offset, size))
            with _pyarrow_parquet().ParquetFile(self.path) as file:
                known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                # One thread: readers run in workers, one beside the other.
                return file.read_row_group(group, columns=known, use_threads=False)
        except (ShardError, OSError, ValueError, _arrow_error()) as error:
            raise SkipSample(SkipReason.UNREADABLE_FILE, str(error)) from error

    def _fetch_group(self, remote: "RemoteObject", group: int, columns: tuple[str, ...] | None) -> Any:
        crc32 = [int(found) for found in self._arrays["crc32"]]
        num_bytes = self.index.shard_bytes

        def footer() -> bytes:
            size = 8 + int.from_bytes(remote.read(num_bytes - 8, num_bytes)[:4], "little")
            return remote.read(max(num_bytes - size, 0), num_bytes)

        self._footer = self._footer or remote.read_checked(footer, crc32[-1], "footer")
        offset, size = (int(self._arrays[column][group]) for column in ("offset", "size"))
        data = remote.read_checked(lambda: remote.read(offset, offset + size), crc32[group], f"row group {group}")
        try:
            parquet = _pyarrow_parquet()
            metadata = parquet.read_metadata(io.BytesIO(self._footer))
            with parquet.ParquetFile(_Piece(data, offset, num_bytes), metadata=metadata) as file:
                known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                return file.read_row_group(group, columns=known, use_threads=False)
        except (OSError, ValueError, _arrow_error()) as error:
            raise SkipSample(SkipReason.UNREADABLE_FILE, str(error)) from error

    def _check(self, piece: int, found: int) -> None:
        expected = int(self._arrays["crc32"][piece])
        if found != expected:
            what = "footer" if piece < 0 else f"row group {piece}"
            detail = f"expected {what} with CRC-32 {expected:08x}, got {found:08x}"
            raise SkipSample(
                SkipReason.CHECKSUM, f"{detail}; copy {os.path.basename(self.path)} again or index it again"
            )


@dataclass(frozen=True)
class ParquetRecord(RecordWithoutMembers):
    """One row."""

    shard: ParquetShard
    row: int

    def decode(self, fields: type[Fields]) -> Fields:
        """Read the row, of a struct only the columns that it names.

        Raises:
            SkipSample: if the row is not of the type, or its row group has changed or cannot be read.
        """
        columns = None
        if issubclass(fields, msgspec.Struct):
            columns = tuple(column.encode_name for column in msgspec.structs.fields(fields))
        try:
            return msgspec.convert(self.shard.read_row(self.row, columns), fields)
        except msgspec.ValidationError as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error), self.where) from error
        except SkipSample as skip:
            skip.where = self.where
            raise
