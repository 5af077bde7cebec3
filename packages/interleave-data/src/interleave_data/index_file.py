"""The file beside a shard that says where everything in it lies: named arrays, opened without reading them.

The layout is that of safetensors: 8 bytes with the length of a JSON header, the header, then the arrays, little-endian
and back to back in the header's order. `SHARD.index` holds the table of a shard, `SHARD.lengths-FINGERPRINT` what its
samples come to in tokens and tiles. Both are written under a temporary name, synced and renamed, so that a reader
finds a whole file or none. Whoever writes holds a lock on the temporary file; what a killed writer left there is
without one, and is the next writer's to write over. Those of an object that is not on this disk lie in the cache folder
(`places.local_place`).
"""

import fcntl
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from .errors import ShardError
from .places import is_remote, local_place, shown

VERSION = "1"
"""Of the tables' meaning; an index of another version is made anew."""

Kind = Literal["tar", "json", "parquet"]
"""What a shard is: a container."""

_DTYPES = {"U8": "u1", "I16": "<i2", "I32": "<i4", "U32": "<u4", "I64": "<i8"}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 1 << 20

Arrays = Mapping[str, NDArray[np.generic]]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def write_arrays(path: str, metadata: Mapping[str, str], arrays: Arrays, written_at_ns: int | None = None) -> None:
    """Write the file whole or not at all, if asked as if at another time.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; what was at `path` is as it was.
    """
    position = 0
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, array in arrays.items():
        header[name] = _Entry(_CODES[array.dtype], array.shape, (position, position + array.nbytes))
        position += array.nbytes
    encoded = msgspec.json.encode(header)
    # Padded to whole words, so that the arrays of 8-byte numbers that come first lie on such borders.
    encoded += b" " * (-len(encoded) % 8)
    temporary, descriptor = _open_temporary(path)
    # Open, and so locked, until it has its name.
    with os.fdopen(descriptor, "wb") as file:
        try:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            os.fsync(file.fileno())
            if written_at_ns is not None:
                os.utime(temporary, ns=(written_at_ns, written_at_ns))
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _open_temporary(path: str) -> tuple[str, int]:
    """Open an empty file to write into, and lock it: one name for all writers, so that none leaves a file for good.

    Where a living one has it, or the disk knows no locks, it is a file of this process's own.
    """
    shared, flags = f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
    descriptor = -1
    with suppress(OSError):
        descriptor = os.open(shared, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Its writer is alive.
            raise
        except OSError:
            os.unlink(shared)
            raise
        # Between the two it may have got its name, or have been unlinked.
        if os.path.samestat(os.fstat(descriptor), os.stat(shared)):
            os.ftruncate(descriptor, 0)
            return shared, descriptor
    if descriptor >= 0:
        os.close(descriptor)
    own = f"{path}.{os.getpid()}.tmp"
    return own, os.open(own, flags | os.O_TRUNC, 0o666)


def read_metadata(path: str) -> dict[str, str]:
    """Read the header's metadata alone.

    Raises:
        ShardError: if it is no such file, or not whole.
        OSError: if it cannot be read.
    """
    return _read_header(path)[0]


def map_arrays(path: str) -> dict[str, NDArray[np.generic]]:
    """Map the arrays into memory, read-only: what is not looked at is not read.

    Raises:
        ShardError: if it is no such file, or not whole.
        OSError: if it cannot be read.
    """
    _, entries, start = _read_header(path)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(
            mapped, _DTYPES[entry.dtype], int(np.prod(entry.shape)), start + entry.data_offsets[0]
        ).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _read_header(path: str) -> tuple[dict[str, str], dict[str, _Entry], int]:
    """Return metadata, entries, and where the arrays begin; they must fill the file to its last byte."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ShardError(_not_whole(path, f"a header of {length} bytes in a file of {size}"))
        encoded = file.read(length)
    try:
        raw = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__"), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise ShardError(_not_whole(path, f"a header that is none ({error})")) from error
    position = 0
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        count = 1
        for side in entry.shape:
            count *= side
        num_bytes = 0 if dtype is None else count * np.dtype(dtype).itemsize
        if dtype is None or min(entry.shape, default=0) < 0 or entry.data_offsets != (position, position + num_bytes):
            raise ShardError(_not_whole(path, f"{name} as {entry.dtype} {entry.shape} at {entry.data_offsets}"))
        position += num_bytes
    if 8 + length + position != size:
        raise ShardError(_not_whole(path, f"{size} bytes where the header tells of {8 + length + position}"))
    return metadata, entries, 8 + length


def _not_whole(path: str, got: str) -> str:
    return f"{path}: expected a whole index, got {got}; delete it and index the shard again (tools/index.py)"


@dataclass(frozen=True)
class ShardIndex:
    """The table of one shard, in memory or mapped from its file."""

    kind: Kind
    shard_bytes: int
    """Size of the shard when it was indexed."""
    num_samples: int
    digest: str
    """Of the container's kind and all its offsets, sizes, checksums and keys: 32 hexadecimal digits."""
    arrays: Arrays

    @classmethod
    def of(cls, kind: Kind, shard_bytes: int, num_samples: int, arrays: Arrays) -> "ShardIndex":
        """Take the digest of a new table. Sizes of pictures do not enter: they follow from the bytes."""
        digest = sha256(msgspec.json.encode([VERSION, kind, shard_bytes, num_samples]))
        for name in sorted(name for name in arrays if not name.startswith("image_")):
            digest.update(f"/{name}/{arrays[name].nbytes}/".encode())
            digest.update(np.ascontiguousarray(arrays[name]).data)
        return cls(kind, shard_bytes, num_samples, digest.hexdigest()[:32], arrays)

    @property
    def header(self) -> "IndexHeader":
        """What is known of the shard without its table."""
        return IndexHeader(self.kind, self.shard_bytes, self.num_samples, self.digest)

    def save(self, shard: str, indexed_at_ns: int | None, tag: str = "") -> None:
        """Write it beside its shard, with the time that the shard had when it was read; of an object, with its tag.

        So a shard that is written to later, even before the index is there, is newer than its index.

        Raises:
            OSError: as `write_arrays`.
        """
        metadata = {
            "version": VERSION,
            "kind": self.kind,
            "shard_bytes": str(self.shard_bytes),
            "num_samples": str(self.num_samples),
            "digest": self.digest,
            **({"tag": tag} if tag else {}),
        }
        write_arrays(index_path(shard), metadata, self.arrays, indexed_at_ns)

    @classmethod
    def load(cls, shard: str, *, may_be_cut: bool = False) -> "ShardIndex":
        """Map the index beside a shard. Whether an object is still the same, each reading of it tells.

        Raises:
            ShardError: as `read_header`, or the shard has another size; with `may_be_cut` only a larger one.
            OSError: there is none, or it cannot be read.
        """
        header = read_header(shard)
        if header is None:
            raise ShardError(f"{index_path(shard)}: expected an index of version {VERSION}, got none; index it again")
        if not is_remote(shard) and not (may_be_cut and header.is_cut(shard)):
            header.check_size(shard)
        return cls(header.kind, header.shard_bytes, header.num_samples, header.digest, map_arrays(index_path(shard)))


class Version(NamedTuple):
    """What tells an object from another one at the same address."""

    num_bytes: int
    tag: str
    """Its ETag, or its Last-Modified, or nothing."""


@dataclass(frozen=True)
class IndexHeader:
    """What opening a source reads of each index: a few hundred bytes, however many samples there are."""

    kind: Kind
    shard_bytes: int
    num_samples: int
    digest: str
    tag: str = ""
    """What an object's server called its version; nothing for a file."""

    @property
    def version(self) -> Version:
        """Of the object that was indexed."""
        return Version(self.shard_bytes, self.tag)

    def is_of(self, address: str, version: Version) -> bool:
        """Whether an object is the version that was indexed.

        Raises:
            ShardError: it has another size: of one that was cut, a new index would show nothing.
        """
        if version.num_bytes != self.shard_bytes:
            raise ShardError(
                f"{shown(address)}: expected {self.shard_bytes} bytes with {self.num_samples} samples as indexed, got "
                f"{version.num_bytes}; upload the shard again, or if it was changed on purpose index it again "
                "(tools/index.py)"
            )
        return version == self.version

    def check_size(self, shard: str) -> None:
        """Compare the shard's size with what was indexed.

        Raises:
            ShardError: they differ.
            OSError: there is no such shard.
        """
        found = os.path.getsize(shard)
        if found != self.shard_bytes:
            raise ShardError(
                f"{shard}: expected {self.shard_bytes} bytes with {self.num_samples} samples as indexed, got {found} "
                f"bytes with {self.num_whole(shard)} of them whole; copy the shard again, or if it was changed on "
                "purpose index it again (tools/index.py)"
            )

    def is_cut(self, shard: str) -> bool:
        """Whether the shard is shorter than it was when it was indexed.

        Raises:
            OSError: there is no such shard.
        """
        return os.path.getsize(shard) < self.shard_bytes

    def num_whole(self, shard: str) -> int:
        """Samples that lie whole within the bytes that the shard has now, by its index; of a cut parquet file none.

        Raises:
            ShardError: as `map_arrays`.
            OSError: as `map_arrays`, or there is no such shard.
        """
        num_bytes = os.path.getsize(shard)
        if self.kind == "parquet":
            # What says how to read it is at its end.
            return self.num_samples if num_bytes >= self.shard_bytes else 0
        # All of these columns are of this type.
        arrays = cast(dict[str, NDArray[np.int64]], map_arrays(index_path(shard)))
        is_lost = arrays["offset"] + arrays["size"] > num_bytes
        if self.kind == "json":
            return int(np.count_nonzero(~is_lost))
        num_lost = np.append(0, np.cumsum(is_lost))
        first_member = arrays["first_member"]
        return int(np.count_nonzero(num_lost[first_member[1:]] == num_lost[first_member[:-1]]))


def read_header(shard: str) -> IndexHeader | None:
    """Read the head of the index beside a shard; None if there is no index, or one of another version.

    Raises:
        ShardError: it is damaged.
        OSError: it cannot be read.
    """
    path = index_path(shard)
    try:
        metadata = read_metadata(path)
    except FileNotFoundError:
        return None
    if metadata.get("version") != VERSION:
        return None
    try:
        kind, shard_bytes, num_samples, digest = (
            metadata[name] for name in ("kind", "shard_bytes", "num_samples", "digest")
        )
        if kind not in ("tar", "json", "parquet"):
            raise ValueError(f"a container {kind}")
        return IndexHeader(kind, int(shard_bytes), int(num_samples), digest, metadata.get("tag", ""))
    except (KeyError, ValueError) as error:
        raise ShardError(_not_whole(path, f"a header without what it should say ({error})")) from error


def fresh_header(shard: str, *, may_be_cut: bool = False) -> IndexHeader | None:
    """Read the head of an index that can be used; None if there is none, or the shard was written to since.

    A shard that kept its size but is newer than its index may have been edited. One of another size is refused: of a
    shard that was cut, a new index would show nothing. With `may_be_cut` the old index of a cut shard can be used.

    Raises:
        ShardError: the index is damaged, or the shard has another size.
        OSError: the shard or its index cannot be read.
    """
    header = read_header(shard)
    if header is None or (may_be_cut and header.is_cut(shard)):
        return header
    header.check_size(shard)
    return header if os.stat(index_path(shard)).st_mtime_ns >= os.stat(shard).st_mtime_ns else None


def index_path(shard: str) -> str:
    """Where the index of a shard lies."""
    return f"{local_place(shard)}.index"


def lengths_path(shard: str, fingerprint: str) -> str:
    """Where the lengths of a shard's samples lie that were measured under this fingerprint."""
    return f"{local_place(shard)}.lengths-{fingerprint}"


@dataclass(frozen=True)
class Lengths:
    """What the samples of a shard come to; -1 tokens where a sample cannot be encoded."""

    tokens: NDArray[np.int32]
    tiles: NDArray[np.int32]

    def save(self, shard: str, fingerprint: str, digest: str) -> None:
        """Write them beside the shard; `digest` is that of the shard's index.

        Raises:
            OSError: as `write_arrays`.
        """
        metadata = {"version": VERSION, "digest": digest, "fingerprint": fingerprint}
        write_arrays(lengths_path(shard, fingerprint), metadata, {"tokens": self.tokens, "tiles": self.tiles})

    @classmethod
    def load(cls, shard: str, fingerprint: str, header: IndexHeader) -> "Lengths | None":
        """Map the lengths that belong to the shard as indexed; None if there are none, or they are of another state.

        Raises:
            ShardError: the file is damaged.
        """
        path = lengths_path(shard, fingerprint)
        try:
            metadata = read_metadata(path)
            arrays = map_arrays(path)
        except FileNotFoundError:
            return None
        if (metadata.get("version"), metadata.get("digest")) != (VERSION, header.digest):
            return None
        tokens, tiles = (arrays.get(name) for name in ("tokens", "tiles"))
        shape = (header.num_samples,)
        if tokens is None or tiles is None or not (tokens.shape == tiles.shape == shape):
            raise ShardError(_not_whole(path, f"lengths that are not those of {header.num_samples} samples"))
        return cls(cast(NDArray[np.int32], tokens), cast(NDArray[np.int32], tiles))
