"""A source of shards: records by number over several files of one container, and a format that reads them.

    shards (tar, JSON, parquet)  →  record  →  format (LLaVA, OBELICS, …)  →  sample

Opening reads the head of each shard's index and nothing else; tables are mapped when a shard is first asked for, and
the least used are let go. So neither time nor memory grows with the number of samples.
"""

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from .config import CutShards, RemoteLimits
from .containers import Shard, ShardRecord, make_index, open_shard, shard_kind, write_remote_index
from .errors import ShardError, SkipSample
from .formats import Setting
from .index_file import IndexHeader, Lengths, ShardIndex, Version, fresh_header, read_header
from .parquet_shards import RowGroups
from .places import file_name, is_remote, shown
from .records import Body, Format, Images, PreferenceBody
from .samples import ImagePart, PreferenceSample, Sample, Size
from .sources import AnySample, printable

if TYPE_CHECKING:
    from .remote import RemoteObject, Retries

OnIndex = Callable[[str, int, int], object]
"""(shard, bytes done since the last call, bytes of the shard): progress of an index that is being made."""

_MAX_OPEN_SHARDS = 64
_MEASURED_AHEAD = 64
_log = logging.getLogger(__name__)


class RecordSource:
    """Samples of one or several shards, in the shards' order."""

    def __init__(
        self,
        paths: Sequence[str],
        read: Format,
        *,
        name: str,
        image_root: str | None = None,
        settings: Mapping[str, Setting] | None = None,
        lengths: str | None = None,
        indexed_only: bool = False,
        cut_shards: CutShards = "error",
        window: int | None = None,
        on_index: OnIndex | None = None,
        remote: RemoteLimits | None = None,
    ) -> None:
        """Open the shards by their indexes; an index that is missing, or older than its shard, is made.

        Shards may be files or addresses of objects (see `places`); `remote` says how long these are waited for.

        `settings` name the format and all that it depends on, for the fingerprint. `lengths` is the fingerprint of what
        measured the samples (see `measure`). With `indexed_only` a shard without an index is left out (`num_left_out`).
        With `cut_shards` skip a shard may be shorter than was indexed: what is cut off raises `SkipSample` when it is
        asked for. `window`: samples that are shuffled together, None for all.

        Raises:
            ShardError: if a shard is cut or damaged, or has another size than was indexed.
            OSError: if a file cannot be read.
            ValueError: if there is no shard.
        """
        if not paths:
            raise ValueError(f"{name}: expected at least one shard, got none; check `path`")
        self.name = name
        self.window = window
        self.num_left_out = 0
        """Shards without an index that were left out."""
        self._read = read
        self._settings = dict(settings or {})
        self._may_be_cut = cut_shards == "skip"
        self._lengths = None if lengths is None else _lengths_fingerprint(lengths, self._settings)
        folders = [os.path.dirname(os.path.abspath(path)) for path in paths if not is_remote(path)]
        self._image_root = os.path.commonpath(folders) if image_root is None and folders else image_root
        self._limits = remote or RemoteLimits()
        self._retries: Retries | None = None
        versions = self._find_versions([path for path in paths if is_remote(path)])
        self._paths: list[str] = []
        self._headers: list[IndexHeader] = []
        # Only of shards whose folder cannot be written to.
        self._in_memory: dict[int, ShardIndex] = {}
        for path in paths:
            version = versions.get(path)
            if version is None:
                header = fresh_header(path, may_be_cut=self._may_be_cut)
            else:
                header = read_header(path)
                header = header if header is not None and header.is_of(path, version) else None
            if header is None and indexed_only:
                self.num_left_out += 1
                continue
            if header is None:
                header = self._make_index(path, version, on_index)
            if header.kind != shard_kind(path):
                raise ShardError(
                    f"{shown(path)}: expected an index of such a file, got one of a {header.kind}; index it again"
                )
            if version is None and header.is_cut(path):
                _log.warning(
                    "%s: %s is cut: %d of its %d samples are not whole; what cannot be read is skipped (cut_shards)",
                    name,
                    path,
                    header.num_samples - header.num_whole(path),
                    header.num_samples,
                )
            self._paths.append(path)
            self._headers.append(header)
        self._names = _shard_names(self._paths)
        self.shards = {name: header.digest for name, header in zip(self._names, self._headers, strict=True)}
        """Digest of each shard by its name, in order."""
        self._ends = np.cumsum([header.num_samples for header in self._headers], dtype=np.int64)
        self._open: OrderedDict[int, tuple[Shard, Lengths | None]] = OrderedDict()
        self._groups = RowGroups()
        whole = msgspec.json.encode([list(self.shards.items()), sorted(self._settings.items())])
        self.fingerprint = sha256(whole).hexdigest()[:16]
        """Digest of the shards' names, order and contents and the format's settings; not of folders, nor of times."""

    def _find_versions(self, addresses: Sequence[str]) -> dict[str, Version]:
        if not addresses:
            return {}
        # Only here: who reads from a disk alone need not load what speaks to servers.
        from .remote import Retries, find_versions

        self._retries = Retries()
        return dict(zip(addresses, find_versions([self._remote(address) for address in addresses]), strict=True))

    def _remote(self, address: str, known: Version | None = None) -> "RemoteObject":
        from .remote import RemoteObject

        assert self._retries is not None
        return RemoteObject(address, self._limits, known, self._retries)

    def _make_index(self, path: str, version: Version | None, on_index: OnIndex | None) -> IndexHeader:
        if version is not None:
            on_bytes = None if on_index is None else partial(_tell, on_index, shown(path), version.num_bytes)
            return write_remote_index(self._remote(path, version), version, on_bytes)
        shard_bytes = os.path.getsize(path)
        read_at_ns = os.stat(path).st_mtime_ns
        index = make_index(path, None if on_index is None else partial(_tell, on_index, path, shard_bytes))
        try:
            index.save(path, read_at_ns)
        except OSError as error:
            self._in_memory[len(self._paths)] = index
            _log.warning(
                "%s: expected to write an index beside it, got %s; it is kept in memory and made again on each start",
                path,
                error.strerror or error,
            )
        return index.header

    def use_lengths(self, measured_by: str) -> None:
        """From now on take sizes from what this measured, where it has (see `measure`)."""
        self._lengths = _lengths_fingerprint(measured_by, self._settings)
        self._open.clear()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> AnySample:
        """Read one sample.

        Raises:
            SkipSample: if it is bad, with its shard and key.
            ShardError: if the shard or its index is gone, or another one.
            IndexError: if there is no such sample.
        """
        record = self.record(index)
        try:
            body: Body = self._read(record, RecordImages(self._image_root, record))
        except SkipSample as skip:
            skip.where = skip.where or record.where
            raise
        if isinstance(body, PreferenceBody):
            return PreferenceSample(record.where, self.name, body.turns, body.chosen, body.rejected)
        return Sample(record.where, self.name, body)

    def record(self, index: int) -> ShardRecord:
        """Refer to the record of a sample, before any format.

        Raises:
            ShardError: if the shard or its index is gone, or another one.
            IndexError: if there is no such sample.
        """
        shard, row = self._locate(index)
        return self._shard(shard)[0].record(row)

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Fetch samples that will be read soon; of shards on this disk there is nothing to fetch.

        Raises:
            ShardError: if a shard cannot be read, or its index is gone, or another one.
            IndexError: if there is no such sample.
        """
        if self._retries is None:
            return
        from .remote import read_ahead

        wanted: list[tuple[RemoteObject, tuple[int, int]]] = []
        for number, row in map(self._locate, indices):
            shard, path, header = self._shard(number)[0], self._paths[number], self._headers[number]
            span = shard.span(row) if is_remote(path) else None
            if span is not None:
                wanted.append((self._remote(path, header.version), span))
        read_ahead(wanted)

    def take_retries(self) -> tuple[int, str]:
        """How many reads had to be tried again since this was last asked, and the last one in words."""
        return (0, "") if self._retries is None else self._retries.take()

    def place(self, index: int) -> str:
        """Shard and key or number of a sample, its id; no sample is read.

        Raises:
            ShardError: if the shard or its index is gone, or another one.
            IndexError: if there is no such sample.
        """
        return self.record(index).where

    def size(self, index: int) -> Size | None:
        """What a sample comes to in tokens and tiles; None if it was not measured, or could not be.

        Raises:
            ShardError: if the shard's index or lengths are damaged.
            IndexError: if there is no such sample.
        """
        shard, row = self._locate(index)
        lengths = self._shard(shard)[1]
        if lengths is None or lengths.tokens[row] < 0:
            return None
        return Size(int(lengths.tokens[row]), int(lengths.tiles[row]))

    def measure(self, measured_by: str, measure: Callable[[AnySample], Size], on_sample: Callable[[], object]) -> int:
        """Write the size of every sample beside its shard, where that has not been done; return how many are bad.

        `measured_by` is the fingerprint of all that `measure` depends on; `on_sample` is called after each sample.

        Raises:
            ShardError: if a shard's index has been replaced.
            OSError: if a folder cannot be written to.
        """
        fingerprint = _lengths_fingerprint(measured_by, self._settings)
        num_bad = 0
        first = 0
        for path, header in zip(self._paths, self._headers, strict=True):
            if Lengths.load(path, fingerprint, header) is None:
                lengths = Lengths(np.full(header.num_samples, -1, np.int32), np.zeros(header.num_samples, np.int32))
                for row in range(header.num_samples):
                    if row % _MEASURED_AHEAD == 0:
                        self.read_ahead(range(first + row, first + min(row + _MEASURED_AHEAD, header.num_samples)))
                    try:
                        lengths.tokens[row], lengths.tiles[row] = measure(self[first + row])
                    except SkipSample:
                        num_bad += 1
                    on_sample()
                lengths.save(path, fingerprint, header.digest)
            first += header.num_samples
        return num_bad

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """(width, height) in pixels of the pictures that lie in the record, from the index; 0, 0 where it is unknown.

        Raises:
            ShardError: if the shard or its index is gone, or another one.
            IndexError: if there is no such sample.
        """
        return self.record(index).image_sizes()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: expected an index from 0 to {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _shard(self, number: int) -> tuple[Shard, Lengths | None]:
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        path, header = self._paths[number], self._headers[number]
        try:
            index = self._in_memory.get(number) or ShardIndex.load(path, may_be_cut=self._may_be_cut)
            lengths = None if self._lengths is None else Lengths.load(path, self._lengths, header)
        except OSError as error:
            raise ShardError(
                f"{shown(path)}: expected it and its index as they were opened, got {error}; put them back and resume"
            ) from error
        if index.digest != header.digest:
            raise ShardError(
                f"{shown(path)}: expected the index of when it was opened, got another; start anew or resume"
            )
        remote = self._remote(path, header.version) if is_remote(path) else None
        found = self._open[number] = open_shard(path, self._names[number], index, self._groups, remote), lengths
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return found

    def __getstate__(self) -> dict[str, object]:
        # A mapped table would be copied into each worker; it is mapped there anew.
        return {**self.__dict__, "_open": OrderedDict()}


class RecordImages(Images):
    """Pictures that a record names: its own members first, then files under the image root."""

    def __init__(self, root: str | None, record: ShardRecord) -> None:
        super().__init__(root)
        self._record = record

    def part(self, reference: str | bytes) -> ImagePart:
        """As `Images.part`, or a member of the record by its whole name.

        Raises:
            SkipSample: as `Images.part`.
        """
        found = self._record.member(reference) if isinstance(reference, str) else None
        return super().part(reference) if found is None else found


def _tell(on_index: OnIndex, shard: str, shard_bytes: int, done: int) -> None:
    on_index(shard, done, shard_bytes)


def _lengths_fingerprint(measured_by: str, settings: Mapping[str, Setting]) -> str:
    """Name the lengths of a shard: of the same records another format makes other samples."""
    return sha256(msgspec.json.encode([measured_by, sorted(settings.items())])).hexdigest()[:16]


def _shard_names(paths: Sequence[str]) -> list[str]:
    """Name each shard by its file, with its place in front where several folders have a file of that name."""
    names = [printable(file_name(path)) for path in paths]
    count = Counter(names)
    return [name if count[name] == 1 else f"{place}/{name}" for place, name in enumerate(names)]
