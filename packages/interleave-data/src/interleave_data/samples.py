"""What a reader yields: text and images in reading order, without a tokenizer, a tiler or decoded pixels.

A picture is a reference until somebody reads it, so a sample of a hundred images weighs nothing in a buffer.
"""

import os
import stat
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from PIL import Image

from .config import ImageLimits
from .errors import SkipReason, SkipSample
from .images import check_size, image_size, open_image


class Size(NamedTuple):
    """What a sample takes up once it is encoded; known from its text and its pictures' headers alone."""

    tokens: int
    """Tokens in the sequence, image tokens included."""
    tiles: int
    """Tiles of all its pictures."""


Role = Literal["document", "system", "user", "assistant"]
"""Who speaks. `document`: running text or a caption, all of which is to be predicted."""


@runtime_checkable
class StoredBytes(Protocol):
    """Bytes that lie somewhere, whose number is known before they are read."""

    def num_bytes(self) -> int:
        """How many there are; raises `OSError` if there are none to be read."""
        ...

    def __call__(self) -> bytes:
        """Read them."""
        ...


@dataclass(frozen=True)
class FileBytes:
    """Read a whole file when called. Paths must have been checked before (see `sources.path_inside`)."""

    path: str

    def num_bytes(self) -> int:
        """Size of the file, without reading it.

        Raises:
            OSError: if it is absent or no plain file (a pipe would be waited for).
        """
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("expected a plain file")
        return status.st_size

    def __call__(self) -> bytes:
        """Read the file.

        Raises:
            OSError: if it cannot be read or is no plain file.
        """
        self.num_bytes()
        with open(self.path, "rb") as file:
            return file.read()


@dataclass(frozen=True)
class SliceBytes:
    """Read one stretch of a file when called: a member of a tar, a record of a JSON file."""

    path: str
    offset: int
    size: int
    crc32: int | None = None
    """What the bytes are held against, if anything."""

    def num_bytes(self) -> int:
        """Size of the stretch."""
        return self.size

    def __call__(self) -> bytes:
        """Read the stretch.

        Raises:
            OSError: if it cannot be read, or the file ends before the stretch does.
            SkipSample: if the bytes are not those that were indexed.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            # A negative size would read to the file's end.
            data = file.read(max(self.size, 0))
        if len(data) != self.size:
            raise OSError(f"expected {self.size} bytes at {self.offset}, got {len(data)}")
        if self.crc32 is not None and (found := zlib.crc32(data)) != self.crc32:
            detail = f"expected {self.size} bytes at {self.offset} with CRC-32 {self.crc32:08x}, got {found:08x}"
            raise SkipSample(
                SkipReason.CHECKSUM, f"{detail}; copy {os.path.basename(self.path)} again or index it again"
            )
        return data


@dataclass(frozen=True)
class TextPart:
    """A stretch of text, exactly as it stands in the source."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A picture: its encoded bytes, or a call that reads them later."""

    open: bytes | Callable[[], bytes]
    key: str = ""
    """A cheap name that is the same for the same picture of the same source, for caches; empty if there is none."""
    frame: int = 0
    """Which frame of a file with several, such as a TIFF of pages."""
    size_px: tuple[int, int] | None = None
    """(width, height) of the decoded, upright picture where it is known without reading it."""

    def read(self, max_bytes: int | None = None) -> bytes:
        """Get the encoded bytes.

        Raises:
            SkipSample: if the file cannot be read, or is known to be larger than `max_bytes` before it is.
        """
        if isinstance(self.open, bytes):
            return self.open
        try:
            if max_bytes is not None and isinstance(self.open, StoredBytes):
                num_bytes = self.open.num_bytes()
                if num_bytes > max_bytes:
                    raise SkipSample(SkipReason.TOO_MANY_BYTES, f"expected at most {max_bytes} bytes, got {num_bytes}")
            return self.open()
        except OSError as error:
            detail = f"{error.strerror or error} ({self.key})" if self.key else str(error)
            raise SkipSample(SkipReason.UNREADABLE_FILE, detail) from error

    def size(self, limits: ImageLimits | None = None) -> tuple[int, int]:
        """(width, height) that `decode` will give: the known one, or the header's.

        Raises:
            SkipSample: as `decode`, for all that the header tells.
        """
        limits = limits or ImageLimits()
        if self.size_px is None:
            return image_size(self.read(limits.max_bytes), limits, self.frame)
        check_size(self.size_px, limits)
        return self.size_px

    def decode(self, limits: ImageLimits | None = None) -> Image.Image:
        """Read and decode through the image gate: an upright RGB picture.

        Raises:
            SkipSample: if the file cannot be read, the gate refuses it, or its size is not the one that was known.
        """
        limits = limits or ImageLimits()
        image = open_image(self.read(limits.max_bytes), limits, self.frame)
        if self.size_px is not None and image.size != self.size_px:
            detail = f"expected {self.size_px[0]} × {self.size_px[1]} px as indexed, got {image.width} × {image.height}"
            raise SkipSample(SkipReason.BROKEN_IMAGE, f"{detail}; index the file again")
        return image


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Turn:
    """What one speaker says, in order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """A document, a caption pair or a conversation. `id` is stable and unique within `source`."""

    id: str
    source: str
    turns: tuple[Turn, ...]

    def images(self) -> tuple[ImagePart, ...]:
        """All pictures in reading order."""
        return _images(self.turns)


@dataclass(frozen=True)
class PreferenceSample:
    """A prompt and two answers to it, the first of which is preferred."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    chosen: str
    rejected: str

    def images(self) -> tuple[ImagePart, ...]:
        """All pictures in reading order."""
        return _images(self.turns)


def samples_digest(ids: Iterable[str]) -> str:
    """Name an ordered list of sample ids by 16 hexadecimal digits; equal lists only have equal names."""
    digest = sha256()
    for sample_id in ids:
        encoded = sample_id.encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") apart from ("a", "bc").
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:16]


def _images(turns: tuple[Turn, ...]) -> tuple[ImagePart, ...]:
    return tuple(part for turn in turns for part in turn.parts if isinstance(part, ImagePart))
