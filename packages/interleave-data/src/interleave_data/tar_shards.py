"""Samples from WebDataset tar shards, read in place by an index.

A sample is the run of members that share a key: the name up to the first dot of its last component. Only plain files
count, and only with the suffixes below, in either case; everything else is passed over. A suffix may have a number
before it (KEY.0.jpg, KEY.1.jpg), which is how a sample has several pictures. Nothing is ever extracted, names are
never used as paths, and no member is decoded by what its suffix might ask for.

Indexing walks the headers and reads every member once for its checksum. A shard that was cut or damaged is an error
then, even where `tarfile` would end quietly: the walk must end on the two zero blocks that close an archive.
"""

import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from .config import ImageLimits
from .errors import ShardError, SkipReason, SkipSample
from .images import frame_sizes
from .index_file import ShardIndex
from .samples import ImagePart, SliceBytes
from .sources import printable

if TYPE_CHECKING:
    from .remote import RemoteObject, RemoteSlice

Fields = TypeVar("Fields")

# The order is part of the index's format: new ones go to the end.
_SUFFIXES = ("txt", "json", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_CODES = {suffix: code for code, suffix in enumerate(_SUFFIXES)}
_FIRST_PICTURE = _CODES["jpg"]
_NUMBERED = re.compile(r"(0|[1-9][0-9]{0,3})\.([a-z]+)")
_PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_BLOCK_BYTES = tarfile.BLOCKSIZE
# A caption and what is said about it weigh kilobytes; this keeps a forged size from filling the memory.
_MAX_TEXT_BYTES = 1 << 22
# Names and extended headers are read at once by `tarfile`, with the size that they claim.
_MAX_NAME_BYTES = 1 << 20
# What is larger is no picture: it is neither looked into while indexing nor ever read.
_MAX_PICTURE_BYTES = 1 << 26
# As large as a limit can be set: what a run lets in is looked at when it reads.
_ANY_PICTURE = ImageLimits(max_pixels=89_478_485, max_bytes=_MAX_PICTURE_BYTES)
_MAX_MEMBER_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20


def check_members(members: Iterable[tuple[str, int]]) -> None:
    """Say before they are written that members would not be read; `members`: (suffix, bytes) of one sample's.

    Raises:
        SkipSample: one is larger than any of its kind that is read.
    """
    for suffix, num_bytes in members:
        is_picture = _CODES[suffix.rpartition(".")[2]] >= _FIRST_PICTURE
        most = _MAX_PICTURE_BYTES if is_picture else _MAX_TEXT_BYTES
        if num_bytes > most:
            detail = f"expected a .{suffix} member of at most {most} bytes, got {num_bytes}"
            raise SkipSample(SkipReason.TOO_MANY_BYTES, detail)


def index_tar(path: str, on_bytes: Callable[[int], object] | None = None) -> ShardIndex:
    """Walk a shard from end to end; `on_bytes` hears how many bytes were done since it was last called.

    Raises:
        ShardError: if the shard is cut, damaged, or has a member twice.
        OSError: if it cannot be read.
    """
    table = _Table(path)
    shard_bytes = os.path.getsize(path)
    done = 0
    for member in _walk_members(path):
        table.add(member)
        if on_bytes and member.end - done >= _CHUNK_BYTES:
            on_bytes(member.end - done)
            done = member.end
    if on_bytes:
        on_bytes(shard_bytes - done)
    arrays = table.arrays()
    return ShardIndex.of("tar", shard_bytes, len(arrays["first_member"]) - 1, arrays)


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    file: BinaryIO

    @property
    def end(self) -> int:
        return self.offset + self.size

    def checksum(self) -> tuple[int, bytes]:
        """CRC-32, and the bytes where they are few enough for a picture."""
        self.file.seek(self.offset)
        if self.size <= _MAX_PICTURE_BYTES:
            data = self.file.read(self.size)
            return zlib.crc32(data), data
        crc, left = 0, self.size if self.size <= _MAX_MEMBER_BYTES else 0
        while left and (data := self.file.read(min(left, _CHUNK_BYTES))):
            crc, left = zlib.crc32(data, crc), left - len(data)
        return crc, b""


class _Table:
    """Columns that grow: some dozens of bytes a member, whatever their number."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._key: bytes | None = None
        self._suffixes: set[tuple[int, int]] = set()
        self._offset, self._size, self._crc32 = array("q"), array("q"), array("I")
        self._suffix, self._number = array("B"), array("h")
        self._first_member, self._first_image, self._image_size = array("q"), array("q"), array("i")
        self._keys, self._key_ends, self._key_hashes = bytearray(), array("q", [0]), array("Q")

    def add(self, member: _Member) -> None:
        """Take a member, or pass it over."""
        split = _split_name(member.name)
        if split is None:
            return
        key, code, number = split
        if key != self._key:
            self._begin(key)
        if (code, number) in self._suffixes:
            raise ShardError(f"{self._path}: expected each member once, got {member.name!r} again; rewrite the shard")
        self._suffixes.add((code, number))
        crc, data = member.checksum()
        self._offset.append(member.offset)
        self._size.append(member.size)
        self._crc32.append(crc)
        self._suffix.append(code)
        self._number.append(number)
        self._first_image.append(len(self._image_size) // 2)
        if code >= _FIRST_PICTURE:
            for size in frame_sizes(data, _ANY_PICTURE):
                self._image_size.extend(size or (0, 0))

    def _begin(self, key: bytes) -> None:
        self._key = key
        self._suffixes = set()
        self._first_member.append(len(self._offset))
        self._keys += key
        self._key_ends.append(len(self._keys))
        self._key_hashes.append(int.from_bytes(blake2b(key, digest_size=8).digest(), "little"))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Close the table.

        Raises:
            ShardError: if a key came twice.
        """
        self._refuse_repeated_keys()
        return {
            "first_member": np.append(np.array(self._first_member, np.int64), len(self._offset)),
            "key_end": np.array(self._key_ends, np.int64),
            "offset": np.array(self._offset, np.int64),
            "size": np.array(self._size, np.int64),
            "image_first": np.append(np.array(self._first_image, np.int64), len(self._image_size) // 2),
            "crc32": np.array(self._crc32, np.uint32),
            "image_size": np.array(self._image_size, np.int32).reshape(-1, 2),
            "number": np.array(self._number, np.int16),
            "suffix": np.array(self._suffix, np.uint8),
            "key": np.frombuffer(bytes(self._keys), np.uint8),
        }

    def _refuse_repeated_keys(self) -> None:
        hashes = np.array(self._key_hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
            # Neighbours by hash: with more than two of one hash each is compared with the next.
            first, second = (
                bytes(self._keys[self._key_ends[row] : self._key_ends[row + 1]]) for row in order[place : place + 2]
            )
            if first == second:
                name = first.decode("utf-8", "surrogateescape")
                raise ShardError(
                    f"{self._path}: expected the members of {name!r} side by side, got them apart; rewrite it"
                )


def _split_name(name: str) -> tuple[bytes, int, int] | None:
    """Split a member's name into key, code of its suffix and number (-1 for none); None if it is passed over."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    suffix, number = suffix.lower(), -1
    if numbered := _NUMBERED.fullmatch(suffix):
        number, suffix = int(numbered[1]), numbered[2]
    if not (stem and dot and suffix in _CODES):
        return None
    key = f"{folder}/{stem}" if folder else stem
    return key.encode("utf-8", "surrogateescape"), _CODES[suffix], number


class TarShard:
    """The samples of one shard by their numbers."""

    def __init__(self, path: str, name: str, index: ShardIndex, remote: "RemoteObject | None" = None) -> None:
        """`remote` reads what is not on this disk."""
        self.path = path
        self.name = name
        self.index = index
        # One look-up instead of one for each of a sample's numbers.
        self._arrays = dict(index.arrays)
        self._remote = remote

    def __len__(self) -> int:
        return self.index.num_samples

    def record(self, row: int) -> "TarRecord":
        """Refer to a sample; nothing of the shard is read yet."""
        table = self._arrays
        key_end, first, image_first = table["key_end"], table["first_member"], table["image_first"]
        key = table["key"][int(key_end[row]) : int(key_end[row + 1])].tobytes()
        members: dict[_MemberName, _Stored] = {}
        for m in range(int(first[row]), int(first[row + 1])):
            place = int(table["offset"][m]), int(table["size"][m]), int(table["crc32"][m])
            span = SliceBytes(self.path, *place) if self._remote is None else self._remote.slice(*place, self.span(row))
            sizes = table["image_size"][int(image_first[m]) : int(image_first[m + 1])]
            members[_SUFFIXES[int(table["suffix"][m])], int(table["number"][m])] = _Stored(
                span, [(int(width), int(height)) for width, height in sizes]
            )
        return TarRecord(self.name, key.decode("utf-8", "surrogateescape"), members)

    def span(self, row: int) -> tuple[int, int]:
        """First byte of a sample's members and the one behind their last."""
        first, behind = (int(self._arrays["first_member"][place]) for place in (row, row + 1))
        offset, size = self._arrays["offset"], self._arrays["size"]
        return int(offset[first]), int(offset[behind - 1]) + int(size[behind - 1])


_MemberName = tuple[str, int]
"""Suffix and number, -1 for none."""


class _Stored(NamedTuple):
    span: "SliceBytes | RemoteSlice"
    page_sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class TarRecord:
    """The members of one key."""

    shard: str
    key: str
    members: dict[_MemberName, _Stored]

    @property
    def where(self) -> str:
        """Shard and key, printable."""
        return f"{self.shard}:{printable(self.key)}"

    def decode(self, fields: type[Fields]) -> Fields:
        """Decode the .json member.

        Raises:
            SkipSample: if there is none, it is beyond 4 MiB, changed or broken, or not of the type.
        """
        try:
            return msgspec.json.decode(self._read("json"), type=fields)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error), self.where) from error

    def text(self, suffix: str) -> str:
        """Read a text member, stripped.

        Raises:
            SkipSample: if there is none, it is beyond 4 MiB, changed, or no UTF-8.
        """
        try:
            return self._read(suffix).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error), self.where) from error

    def picture(self) -> ImagePart | None:
        """Refer to the first picture of the sample; of a TIFF with several pages without a size, for any of them.

        Raises:
            SkipSample: if it is far larger than any picture.
        """
        name = next(iter(self._picture_names()), None)
        if name is None:
            return None
        part = self._part(name)
        return replace(part, size_px=None) if len(self.members[name].page_sizes) > 1 else part

    def pictures(self) -> list[ImagePart]:
        """Refer to all pictures in the members' order; each page of a TIFF is one.

        Raises:
            SkipSample: if one is far larger than any picture.
        """
        return [
            self._part(name, page)
            for name in self._picture_names()
            for page in range(len(self.members[name].page_sizes))
        ]

    def member(self, name: str) -> ImagePart | None:
        """Refer to the picture whose member has this whole name, as a record written into the shard calls it.

        Raises:
            SkipSample: if it is far larger than any picture.
        """
        split = _split_name(name) if name.startswith(f"{self.key}.") else None
        if split is None or split[1] < _FIRST_PICTURE:
            return None
        found = (_SUFFIXES[split[1]], split[2])
        return self._part(found) if found in self.members else None

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each of `pictures` in pixels, upright, by its header; 0, 0 where that cannot be read."""
        return [size for name in self._picture_names() for size in self.members[name].page_sizes]

    def _picture_names(self) -> list[_MemberName]:
        return [name for name in self.members if _CODES[name[0]] >= _FIRST_PICTURE]

    def _part(self, name: _MemberName, page: int = 0) -> ImagePart:
        span, sizes = self.members[name]
        if span.size > _MAX_MEMBER_BYTES:
            detail = f"expected a picture of at most {_MAX_MEMBER_BYTES} bytes, got {span.size}"
            raise SkipSample(SkipReason.TOO_MANY_BYTES, detail, self.where)
        number = "" if name[1] < 0 else f".{name[1]}"
        key = f"{self.where}{number}.{name[0]}"
        size_px = None if sizes[page] == (0, 0) else sizes[page]
        return ImagePart(span, key=f"{key}#{page}" if page else key, frame=page, size_px=size_px)

    def _read(self, suffix: str) -> bytes:
        stored = self.members.get((suffix, -1))
        if stored is None:
            raise SkipSample(SkipReason.MISSING_MEMBER, f"expected a .{suffix} member, got none", self.where)
        if stored.span.size > _MAX_TEXT_BYTES:
            detail = f"expected a .{suffix} member of at most {_MAX_TEXT_BYTES} bytes, got {stored.span.size}"
            raise SkipSample(SkipReason.TOO_MANY_BYTES, detail, self.where)
        try:
            return stored.span()
        except OSError as error:
            raise SkipSample(SkipReason.UNREADABLE_FILE, str(error), self.where) from error


class _ShortReads:
    """A file that refuses a long read: `tarfile` reads names and extended headers at the size that they claim."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read a header or a part of one.

        Raises:
            TarError: it is longer than any real one.
        """
        if not 0 <= size <= _MAX_NAME_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _walk_members(path: str) -> Iterator[_Member]:
    """Yield the plain files of a tar, and make sure that the archive is whole.

    Raises:
        ShardError: with the place up to which the archive is sound.
    """
    found = 0
    sound_until = 0
    num_bytes = os.path.getsize(path)
    try:
        with (
            open(path, "rb") as file,
            open(path, "rb") as content,
            tarfile.open(fileobj=cast(BinaryIO, _ShortReads(file)), mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                # A negative size sends the walk backwards (CVE-2025-8194); a large one is a cut in the last member.
                if member.size < 0 or tar.offset <= sound_until or tar.offset > num_bytes:
                    raise ShardError(_damage(path, found, sound_until, num_bytes))
                found += 1
                sound_until = tar.offset
                # `tarfile` keeps every member it has seen; a large shard would fill the memory.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  (absent from the stubs only)
                if member.type in _PLAIN_TYPES and not member.issparse():
                    yield _Member(member.name, member.offset_data, member.size, content)
            file.seek(sound_until)
            if file.read(2 * _BLOCK_BYTES) != bytes(2 * _BLOCK_BYTES):
                raise ShardError(_damage(path, found, sound_until, num_bytes))
    # RecursionError: one long name after another, each of the next.
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{_damage(path, found, sound_until, num_bytes)} ({error})") from error


def _damage(path: str, found: int, sound_until: int, num_bytes: int) -> str:
    return (
        f"{path}: expected a whole tar archive, got {found} members up to byte {sound_until} of {num_bytes} and then "
        "no member and no closing blocks; copy or write the shard again"
    )
