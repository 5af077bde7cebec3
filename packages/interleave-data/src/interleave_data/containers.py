"""What all containers have in common: a suffix, an index, and records by number."""

import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .errors import ShardError
from .index_file import IndexHeader, Kind, ShardIndex, Version, fresh_header, read_header
from .json_shards import JsonShard, index_json
from .parquet_shards import ParquetShard, RowGroups, index_parquet
from .places import file_name, is_remote, local_place, shown
from .records import Record
from .samples import ImagePart
from .tar_shards import TarShard, index_tar

if TYPE_CHECKING:
    from .remote import RemoteObject

_COPIED_AT_ONCE = 1 << 23

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

    def span(self, row: int) -> tuple[int, int] | None:
        """First byte of a record and the one behind its last; None if it is not what is read at once."""
        ...


def shard_kind(path: str) -> Kind | None:
    """Tell the container by the suffix, in either case; None for a file that is no shard."""
    return SUFFIXES.get(os.path.splitext(file_name(path))[1].lower())


def make_index(path: str, on_bytes: Callable[[int], object] | None = None) -> ShardIndex:
    """Read a shard of this disk from end to end; nothing is written.

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
    """Read a shard of this disk from end to end and write the index beside it.

    Raises:
        ShardError: as `make_index`.
        OSError: if the shard cannot be read, or its folder cannot be written to.
    """
    read_at_ns = os.stat(path).st_mtime_ns
    index = make_index(path, on_bytes)
    index.save(path, read_at_ns)
    return index


def open_shard(
    path: str, name: str, index: ShardIndex, groups: RowGroups | None = None, remote: "RemoteObject | None" = None
) -> Shard:
    """Refer to a shard by its index; `name` is what records and messages call it.

    `groups` keeps what was read of the parquet shards of one source. `remote` reads what is not on this disk.
    """
    if index.kind == "parquet":
        return ParquetShard(path, name, index, groups, remote)
    return (TarShard if index.kind == "tar" else JsonShard)(path, name, index, remote)


def write_remote_index(
    remote: "RemoteObject", version: Version, on_bytes: Callable[[int], object] | None = None
) -> IndexHeader:
    """Copy an object of this version to the cache folder, read it from end to end, and keep only its index there.

    Of several processes that want the same one, the first makes it and the others wait for it.

    Raises:
        ShardError: as `make_index`, or the object cannot be read, or has changed meanwhile.
        OSError: if the folder cannot be written to, or has no room for the shard.
    """
    place = local_place(remote.address)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(f"{place}.lock", "wb") as lock:
        # Given back by the system, however this process ends; what it leaves is written over by the next.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (header := _whole_header(remote.address)) is not None and header.version == version:
            return header
        try:
            with open(place, "wb") as file:
                for start in range(0, version.num_bytes, _COPIED_AT_ONCE):
                    data = remote.read(start, min(start + _COPIED_AT_ONCE, version.num_bytes))
                    file.write(data)
                    if on_bytes:
                        on_bytes(len(data))
            index = make_index(place)
        except ShardError as error:
            raise ShardError(str(error).replace(place, shown(remote.address))) from error
        else:
            # A lock that a network's file system does not keep lets another process write there.
            if index.shard_bytes != version.num_bytes:
                raise ShardError(
                    f"{shown(remote.address)}: expected {version.num_bytes} bytes in the copy at {place}, got "
                    f"{index.shard_bytes}; name a cache folder that this host has to itself (XDG_CACHE_HOME)"
                )
        finally:
            if os.path.exists(place):
                os.unlink(place)
        index.save(remote.address, None, version.tag)
        return replace(index.header, tag=version.tag)


def _whole_header(path: str) -> IndexHeader | None:
    try:
        return read_header(path)
    except ShardError:
        # A damaged one, which is about to be replaced.
        return None


def index_shard(path: str, on_bytes: Callable[[int], object] | None = None) -> IndexHeader:
    """Index a shard wherever it is, anew.

    Raises:
        ShardError: as `make_index`, or an object cannot be read.
        OSError: as `write_index` and `write_remote_index`.
    """
    if not is_remote(path):
        return write_index(path, on_bytes).header
    from .remote import RemoteObject

    version = RemoteObject(path).find_version()
    return write_remote_index(RemoteObject(path, known=version), version, on_bytes)


def fresh_index(path: str) -> IndexHeader | None:
    """Read the head of an index that can be used, wherever the shard is; None if there is none.

    Raises:
        ShardError: the index is damaged, or the shard has another size, or an object cannot be read.
        OSError: the shard or its index cannot be read.
    """
    if not is_remote(path):
        return fresh_header(path)
    from .remote import RemoteObject

    header = read_header(path)
    version = RemoteObject(path).find_version()
    return header if header is not None and header.is_of(path, version) else None


def shard_bytes(path: str) -> int:
    """Size of a shard, wherever it is.

    Raises:
        ShardError: an object cannot be read.
        OSError: there is no such file.
    """
    if not is_remote(path):
        return os.path.getsize(path)
    from .remote import RemoteObject

    return RemoteObject(path).find_version().num_bytes
