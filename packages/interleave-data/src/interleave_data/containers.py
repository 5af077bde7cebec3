"""What all containers have in common: a suffix, an index, and records by number."""

import os
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from .errors import ShardError
from .index_file import Kind, ShardIndex
from .json_shards import JsonShard, index_json
from .parquet_shards import ParquetShard, RowGroups, index_parquet
from .records import Record
from .samples import ImagePart
from .tar_shards import TarShard, index_tar

SUFFIXES: dict[str, Kind] = {".tar": "tar", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The files that are looked at, and no others."""

_INDEXERS: dict[Kind, Callable[[str, Callable[[int], object] | None], ShardIndex]] = {
    "tar": index_tar,
    "json": index_json,
    "parquet": index_parquet,
}


@runtime_checkable
class ShardRecord(Record, Protocol):
    """A record, and what is known of its pictures besides."""

    def pictures(self) -> list[ImagePart]:
        """All pictures that lie in the record, in order; each page of a TIFF is one.

        Raises:
            SkipSample: if one is far larger than any picture.
        """
        ...

    def member(self, name: str) -> ImagePart | None:
        """The picture that lies in the record under this whole name; None if there is none.

        Raises:
            SkipSample: if it is far larger than any picture.
        """
        ...

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of each of `pictures`, upright, without reading them; 0, 0 if unknown."""
        ...


@runtime_checkable
class Shard(Protocol):
    """One file of records."""

    def __len__(self) -> int: ...

    def record(self, row: int) -> ShardRecord:
        """Refer to a record by its number."""
        ...


def shard_kind(path: str) -> Kind | None:
    """Tell the container by the suffix, in either case; None for a file that is no shard."""
    return SUFFIXES.get(os.path.splitext(path)[1].lower())


def make_index(path: str, on_bytes: Callable[[int], object] | None = None) -> ShardIndex:
    """Read a shard from end to end; nothing is written.

    `on_bytes` hears how many bytes were done since it was last called; together they are the shard's size.

    Raises:
        ShardError: if the shard is cut or damaged, or no shard by its suffix.
        OSError: if it cannot be read.
    """
    kind = shard_kind(path)
    if kind is None:
        raise ShardError(f"{path}: expected a file with one of {', '.join(SUFFIXES)}, got another; rename it")
    return _INDEXERS[kind](path, on_bytes)


def write_index(path: str, on_bytes: Callable[[int], object] | None = None) -> ShardIndex:
    """Read a shard from end to end and write the index beside it.

    Raises:
        ShardError: as `make_index`.
        OSError: if the shard cannot be read, or its folder cannot be written to.
    """
    read_at_ns = os.stat(path).st_mtime_ns
    index = make_index(path, on_bytes)
    index.save(path, read_at_ns)
    return index


def open_shard(path: str, name: str, index: ShardIndex, groups: RowGroups | None = None) -> Shard:
    """Refer to a shard by its index; `name` is what records and messages call it.

    `groups` keeps what was read of the parquet shards of one source.
    """
    if index.kind == "parquet":
        return ParquetShard(path, name, index, groups)
    return (TarShard if index.kind == "tar" else JsonShard)(path, name, index)
