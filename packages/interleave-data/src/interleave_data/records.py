"""What stands between shards and samples: a record of a container, and what a record says about its pictures.

    container (tar, JSON, parquet)  →  record  →  format (LLaVA, OBELICS, …)  →  turns

A container knows nothing of conversations and a format nothing of files, so every format can be read from every
container that can hold it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol, TypeVar, runtime_checkable

from .errors import SkipReason, SkipSample
from .samples import ImagePart, Turn
from .sources import image_inside

Fields = TypeVar("Fields")

_PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@runtime_checkable
class Record(Protocol):
    """One record: a JSON object, a row of a parquet file, or the members of a tar that share a key."""

    @property
    def where(self) -> str:
        """Shard and key or number, as ids and messages name it: "0003.tar:000012", "train.json:17"."""
        ...

    def decode(self, fields: type[Fields]) -> Fields:
        """The record's fields: the JSON object, the row, the .json member.

        Raises:
            SkipSample: if there is none, it is broken, or not of the type.
        """
        ...

    def text(self, suffix: str) -> str:
        """The text member with this suffix, stripped; only a tar has such.

        Raises:
            SkipSample: if there is none, or it is no UTF-8, or beyond 4 MiB.
        """
        ...

    def picture(self) -> ImagePart | None:
        """The first picture that lies in the record itself (a member of the tar), not yet read; None if there is none.

        Raises:
            SkipSample: if it is far larger than any picture.
        """
        ...


@dataclass(frozen=True)
class RecordWithoutMembers:
    """A JSON value or a row: what pictures it has are among its fields, which only the format knows."""

    where: str

    def text(self, suffix: str) -> str:
        """Refuse: there are no members.

        Raises:
            SkipSample: always.
        """
        raise SkipSample(SkipReason.MISSING_MEMBER, f"expected a .{suffix} member, got a record of fields", self.where)

    def picture(self) -> None:
        """None in the record itself."""

    def pictures(self) -> list[ImagePart]:
        """None in the record itself."""
        return []

    def member(self, name: str) -> None:
        """There are no members."""

    def image_sizes(self) -> list[tuple[int, int]]:
        """Of no pictures."""
        return []


@dataclass(frozen=True)
class PreferenceBody:
    """A prompt and two answers to it, the first of which is preferred."""

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str


Body = tuple[Turn, ...] | PreferenceBody
"""What a format makes of a record."""


class Images:
    """Pictures that records name, under one folder that none of them may leave. Nothing is ever fetched."""

    def __init__(self, root: str | None) -> None:
        """`root` is None where no shard is on this disk and no folder was named."""
        self.root = root

    def part(self, reference: str | bytes) -> ImagePart:
        """A path relative to the folder, the picture's bytes, or a web address whose picture lies in the folder.

        An address stands for the file `AB/SHA256.*`, SHA256 being the digest of the address in hexadecimal and AB its
        first two digits: whoever downloads the pictures of a published set names them so.

        Raises:
            SkipSample: if a path leads out of the folder, or no file is there for an address.
        """
        if isinstance(reference, bytes):
            return ImagePart(reference, key=sha256(reference).hexdigest())
        if self.root is None:
            detail = (
                f"expected an image_root in the data file, since the shards are not on this disk, got {reference!r}"
            )
            raise SkipSample(SkipReason.PATH_REFUSED, detail)
        if not reference.startswith(("http://", "https://")):
            return image_inside(self.root, reference)
        digest = sha256(reference.encode("utf-8", "surrogatepass")).hexdigest()
        name = f"{digest[:2]}/{digest}"
        # Asking for each suffix, since listing the folder would cost more with every picture that lies in it.
        files = (f"{name}.{suffix}" for suffix in _PICTURE_SUFFIXES)
        found = next((file for file in files if os.path.isfile(os.path.join(self.root, file))), None)
        if found is None:
            raise SkipSample(SkipReason.UNREADABLE_FILE, f"expected the picture of {reference} at {name}.*, got none")
        return image_inside(self.root, found)


Format = Callable[[Record, Images], Body]
"""A layout: reads a record or raises SkipSample."""
