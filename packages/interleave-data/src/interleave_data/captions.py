"""Pictures with captions from WebDataset tar shards, read in place.

A sample is the run of members that share a key: the name up to the first dot of its last component. Only plain files
count, and only with the suffixes .jpg .jpeg .png .webp .txt .json, in either case; everything else is passed over.
Nothing is ever extracted, names are never used as paths, and no member is decoded by what its suffix might ask for.

On opening, the headers of every shard are walked and offsets are kept. A shard that was cut or damaged is an error
then, even where `tarfile` would end quietly: the walk must end on the two zero blocks that close an archive. What
cannot be told without an index of checksums is a changed byte inside a member; a picture shows it on decoding, if at
all.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from .errors import ShardError, SkipReason, SkipSample
from .samples import ImagePart, Sample, SliceBytes, TextPart, Turn
from .sources import fingerprint, printable

_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
_PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_BLOCK_BYTES = tarfile.BLOCKSIZE
_ABSENT = (-1, -1)
# A caption and what is said about it weigh kilobytes; this keeps a forged size from filling the memory.
_MAX_TEXT_BYTES = 1 << 22

# What one sample needs of a shard: (offset, size) of the picture and of the member that holds the caption.
_Spans = dict[str, tuple[int, int]]


class CaptionTars:
    """Caption pairs of several shards, in the shards' order; each is a document of the picture and then its caption."""

    def __init__(self, paths: Sequence[str | Path], *, caption: str = "txt", name: str = "captions") -> None:
        """Walk all shards.

        `caption` is `txt` for the .txt member, or `json:KEY` for a text under a key of the .json member.

        Raises:
            ShardError: if a shard is cut, damaged, or has a member twice.
            ValueError: if there is no shard.
        """
        if not paths:
            raise ValueError("paths: expected at least one tar shard, got none; check the pattern")
        self.name = name
        self._paths = [str(path) for path in paths]
        self._shard_names = _shard_names(self._paths)
        suffix, _, self._json_key = caption.partition(":")
        self._keys: list[str] = []
        rows: list[tuple[int, int, int, int, int]] = []
        for shard, path in enumerate(self._paths):
            for key, spans in _walk_samples(path):
                picture_at, picture_size = next((spans[name] for name in spans if name in _IMAGE_SUFFIXES), _ABSENT)
                caption_at, caption_size = spans.get(suffix, _ABSENT)
                self._keys.append(key)
                rows.append((shard, picture_at, picture_size, caption_at, caption_size))
        self._rows = np.asarray(rows, dtype=np.int64).reshape(-1, 5)
        self.fingerprint = fingerprint("caption-tars", self._paths, caption=caption)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        """Read one pair.

        Raises:
            SkipSample: if the picture or the caption is absent, or the caption is empty, no text, or beyond 4 MiB.
        """
        shard, picture_at, picture_size, caption_at, caption_size = (int(value) for value in self._rows[index])
        path = self._paths[shard]
        where = f"{self._shard_names[shard]}:{printable(self._keys[index])}"
        if picture_at < 0 or caption_at < 0:
            absent = "picture" if picture_at < 0 else "caption"
            raise SkipSample(SkipReason.MISSING_MEMBER, f"expected a {absent} member, got none", where)
        if caption_size > _MAX_TEXT_BYTES:
            detail = f"expected a caption member of at most {_MAX_TEXT_BYTES} bytes, got {caption_size}"
            raise SkipSample(SkipReason.TOO_MANY_BYTES, detail, where)
        try:
            text = self._caption_text(SliceBytes(path, caption_at, caption_size)())
        except OSError as error:
            raise SkipSample(SkipReason.UNREADABLE_FILE, str(error), where) from error
        except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error), where) from error
        if not text:
            raise SkipSample(SkipReason.EMPTY_TEXT, "expected a caption with some text, got none", where)
        picture = ImagePart(SliceBytes(path, picture_at, picture_size), key=where)
        return Sample(id=where, source=self.name, turns=(Turn("document", (picture, TextPart(text))),))

    def _caption_text(self, data: bytes) -> str:
        if not self._json_key:
            return data.decode("utf-8").strip()
        values = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        if self._json_key not in values:
            raise msgspec.ValidationError(f"expected the key `{self._json_key}`, got {', '.join(values)}")
        return msgspec.json.decode(values[self._json_key], type=str).strip()


def _shard_names(paths: Sequence[str]) -> list[str]:
    """Name each shard by its file, with its place in front where several folders have a file of that name."""
    names = [printable(os.path.basename(path)) for path in paths]
    count = Counter(names)
    return [name if count[name] == 1 else f"{place}/{name}" for place, name in enumerate(names)]


def _walk_samples(path: str) -> Iterator[tuple[str, _Spans]]:
    """Group the members of one shard into samples."""
    spans: _Spans = {}
    current: str | None = None
    done: set[str] = set()
    for name, offset, size in _walk_members(path):
        folder, _, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        suffix = suffix.lower()
        if not (stem and dot and (suffix in _IMAGE_SUFFIXES or suffix in ("txt", "json"))):
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if current is not None:
                yield current, spans
                done.add(current)
            if key in done:
                raise ShardError(f"{path}: expected the members of {key!r} side by side, got them apart; rewrite it")
            current, spans = key, {}
        if suffix in spans:
            raise ShardError(f"{path}: expected each member once, got {name!r} again; rewrite the shard")
        spans[suffix] = (offset, size)
    if current is not None:
        yield current, spans


def _walk_members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the plain files of a tar, and make sure that the archive is whole.

    Raises:
        ShardError: with the place up to which the archive is sound.
    """
    found = 0
    sound_until = 0
    num_bytes = os.path.getsize(path)
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # A negative size sends the walk backwards (CVE-2025-8194); a large one is a cut in the last member.
                if member.size < 0 or tar.offset <= sound_until or tar.offset > num_bytes:
                    raise ShardError(_damage(path, found, sound_until, num_bytes))
                found += 1
                sound_until = tar.offset
                # `tarfile` keeps every member it has seen; a large shard would fill the memory.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  (absent from the stubs only)
                if member.type in _PLAIN_TYPES and not member.issparse():
                    yield member.name, member.offset_data, member.size
            file.seek(sound_until)
            if file.read(2 * _BLOCK_BYTES) != bytes(2 * _BLOCK_BYTES):
                raise ShardError(_damage(path, found, sound_until, num_bytes))
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{_damage(path, found, sound_until, num_bytes)} ({error})") from error


def _damage(path: str, found: int, sound_until: int, num_bytes: int) -> str:
    return (
        f"{path}: expected a whole tar archive, got {found} members up to byte {sound_until} of {num_bytes} and then "
        "no member and no closing blocks; copy or write the shard again"
    )
