"""Objects as shards: bytes by range requests, with retries that end, and what was read kept for a while.

    r = RemoteObject(address, limits);  r.find_version();  r.read(start, stop)

A read is tried again after a cut, a stall, a wrong range or a server's error, with pauses that double and are
scattered, until `RemoteLimits.total_s` is over; then it raises, and the run ends where it can be resumed: an outage is
never turned into skipped samples. What comes is data only if the answer says so (`http_ranges`) and, once there is an
index, if the checksums agree; a record whose bytes stay wrong is skipped, as it would be on a disk.

Records are fetched whole, a tar's members together, and `read_ahead` fetches those of a pack at once: neighbours in one
request, several requests side by side. What is kept is bounded for the process, whatever the number of shards.
"""

import logging
import os
import random
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from .config import RemoteLimits
from .errors import ShardError, SkipReason, SkipSample
from .http_ranges import Interrupted, Refusal, WrongAnswer, fetch, find_version
from .index_file import Version
from .places import file_name, shown
from .stores import target_of

Result = TypeVar("Result")

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
_MOST_WRONG = 5
"""Wrong answers in a row that end the reading: whatever is at fault, it is not going to pass."""
_MOST_CHECKSUMS = 4
_FIRST_WARNING = 4
"""Failed attempts at one read, some seconds, of which the log hears; then each time that their number has doubled."""
_KEPT_BYTES = 1 << 26
_RECORD_BYTES = 1 << 23
"""Larger records are read member by member, and are not kept."""
_REQUEST_BYTES = 1 << 23
_GAP_BYTES = 1 << 15
_REQUESTS_AT_ONCE = 8
_PROBES_AT_ONCE = 16

_log = logging.getLogger(__name__)
_jitter = random.Random()


class Retries:
    """Reads that had to be tried again, of one source in one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._last = 0, ""

    def add(self, where: str, reason: str) -> None:
        """Count one."""
        with self._lock:
            self._count, self._last = self._count + 1, f"{where}: {reason}"
        _log.info("read again: %s: %s", where, reason)

    def take(self) -> tuple[int, str]:
        """How many there were since this was last asked, and the last one in words."""
        with self._lock:
            taken = self._count, self._last
            self._count, self._last = 0, ""
        return taken

    def __reduce__(self) -> tuple[object, ...]:
        """Another process counts its own."""
        return Retries, ()


@dataclass(frozen=True)
class RemoteObject:
    """An object at an address; `known` is what its index says it is."""

    # It may hold a password, which is not for whoever prints this.
    address: str = field(repr=False)
    limits: RemoteLimits = field(default_factory=RemoteLimits)
    known: Version | None = None
    retries: Retries = field(default_factory=Retries, compare=False)

    def find_version(self) -> Version:
        """Ask for its size and version.

        Raises:
            ShardError: if it cannot be read, or its server serves no ranges.
        """
        return self._persist(
            "its size and first byte", lambda deadline: find_version(target_of(self.address), self.limits, deadline)
        )

    def read(self, start: int, stop: int) -> bytes:
        """Get the bytes from `start` up to `stop`.

        Raises:
            ShardError: if they cannot be had, or it is another object than `known`.
        """
        if stop <= start:
            return b""
        return self._persist(
            f"bytes {start} to {stop - 1}",
            lambda deadline: fetch(target_of(self.address), start, stop, self.limits, deadline, self.known),
        )

    def slice(
        self, offset: int, size: int, crc32: int | None = None, record: tuple[int, int] | None = None
    ) -> "RemoteSlice":
        """Refer to a stretch of it, which is a part of a record."""
        return RemoteSlice(self, offset, size, crc32, record)

    def read_checked(self, read: Callable[[], bytes], crc32: int | None, what: str) -> bytes:
        """Get what `read` gives, again if its checksum is not that; a few times, since on a disk it would stay wrong.

        Raises:
            SkipSample: if it stays wrong.
            ShardError: as `read`.
        """
        for number in range(_MOST_CHECKSUMS):
            data = read()
            found = zlib.crc32(data)
            if crc32 is None or found == crc32:
                return data
            if number + 1 < _MOST_CHECKSUMS:
                self.retries.add(f"{shown(self.address)}, {what}", f"CRC-32 {found:08x} in place of {crc32:08x}")
                time.sleep(_pause_s(number))
        detail = f"expected {what} with CRC-32 {crc32 or 0:08x}, got {found:08x} {_MOST_CHECKSUMS} times"
        raise SkipSample(SkipReason.CHECKSUM, f"{detail}; upload {file_name(self.address)} again or index it again")

    def _persist(self, what: str, attempt: Callable[[float], Result]) -> Result:
        """Try until it works, is refused, or the time is over."""
        begun = time.monotonic()
        deadline = begun + self.limits.total_s
        number = num_wrong = 0
        reason = ""
        while True:
            try:
                return attempt(deadline)
            except Refusal as refusal:
                raise ShardError(
                    f"{shown(self.address)}: expected {what}, got {refusal}; check the address, its permissions, and "
                    "whether it was changed; if that was on purpose index it again (tools/index.py)"
                ) from None
            except (Interrupted, WrongAnswer) as failure:
                # An attempt that the end of the time cut says less than the one before.
                if number == 0 or time.monotonic() < deadline:
                    reason = str(failure)
                num_wrong = num_wrong + 1 if isinstance(failure, WrongAnswer) else 0
            if num_wrong >= _MOST_WRONG:
                raise ShardError(
                    f"{shown(self.address)}: expected {what}, got {reason}, {num_wrong} times in a row; use a server "
                    "that serves ranges, or copy the shards to a disk"
                )
            pause_s = _pause_s(number)
            number += 1
            if time.monotonic() + pause_s >= deadline:
                raise ShardError(
                    f"{shown(self.address)}: expected {what} within {self.limits.total_s:g} s, got {number} attempts "
                    f"that failed, the last with {reason}; check the server and the network and resume, or raise "
                    "total_s"
                )
            self.retries.add(f"{shown(self.address)}, {what}", reason)
            if number >= _FIRST_WARNING and number & (number - 1) == 0:
                left_s = deadline - time.monotonic()
                _log.warning(
                    "%s: %s: %d attempts failed, the last with %s; trying for %.0f s more",
                    shown(self.address),
                    what,
                    number,
                    reason,
                    left_s,
                )
            time.sleep(pause_s)


@dataclass(frozen=True)
class RemoteSlice:
    """Read one stretch of an object when called; as `samples.SliceBytes` of a file."""

    remote: RemoteObject
    offset: int
    size: int
    crc32: int | None = None
    record: tuple[int, int] | None = None
    """The stretch of the record that it is a part of, which is fetched at once."""

    def num_bytes(self) -> int:
        """Size of the stretch."""
        return self.size

    def __call__(self) -> bytes:
        """Get the stretch, from what was fetched if it is there.

        Raises:
            SkipSample: if the bytes are not those that were indexed.
            ShardError: if they cannot be had.
        """
        start, stop = self.offset, self.offset + max(self.size, 0)
        span = self.record if self.record and self.record[1] - self.record[0] <= _RECORD_BYTES else None

        def read() -> bytes:
            if span is None:
                return self.remote.read(start, stop)
            kept = _process().kept
            data = kept.get(self.remote, span)
            if data is None:
                data = self.remote.read(*span)
                kept.put(self.remote, span, data)
            piece = data[start - span[0] : stop - span[0]]
            if self.crc32 is not None and zlib.crc32(piece) != self.crc32:
                # Else the same wrong bytes would be found again.
                kept.drop(self.remote, span)
            return piece

        return self.remote.read_checked(read, self.crc32, f"{self.size} bytes at {start}")


def find_versions(remotes: Sequence[RemoteObject]) -> list[Version]:
    """Ask for size and version of many, several at once.

    Raises:
        ShardError: as `RemoteObject.find_version`, for the first that fails.
    """
    if len(remotes) <= 1:
        return [remote.find_version() for remote in remotes]
    with ThreadPoolExecutor(min(_PROBES_AT_ONCE, len(remotes)), "shard sizes") as threads:
        return list(threads.map(RemoteObject.find_version, remotes))


def read_ahead(records: Iterable[tuple[RemoteObject, tuple[int, int]]]) -> None:
    """Fetch records that will be read soon: as many as may be kept, neighbours together, and wait for them.

    Raises:
        ShardError: as `RemoteObject.read`.
    """
    kept = _process().kept
    wanted: dict[str, list[tuple[int, int]]] = {}
    remotes: dict[str, RemoteObject] = {}
    num_bytes = 0
    for remote, span in records:
        size = span[1] - span[0]
        if not 0 < size <= _RECORD_BYTES or kept.get(remote, span) is not None:
            continue
        num_bytes += size
        if num_bytes > _KEPT_BYTES // 2:
            break
        remotes[remote.address] = remote
        wanted.setdefault(remote.address, []).append(span)
    requests = [(remotes[address], spans) for address, all_spans in wanted.items() for spans in _neighbours(all_spans)]
    if len(requests) <= 1:
        for request in requests:
            _fetch_together(*request)
        return
    waiting = [_process().threads().submit(_fetch_together, *request) for request in requests]
    try:
        for done in waiting:
            done.result()
    finally:
        for left in waiting:
            left.cancel()


def _neighbours(spans: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group stretches that lie so near that one request costs less than two."""
    groups: list[list[tuple[int, int]]] = []
    for span in sorted(set(spans)):
        if groups and span[0] - groups[-1][-1][1] <= _GAP_BYTES and span[1] - groups[-1][0][0] <= _REQUEST_BYTES:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _fetch_together(remote: RemoteObject, spans: Sequence[tuple[int, int]]) -> None:
    first = spans[0][0]
    data = remote.read(first, max(stop for _, stop in spans))
    for start, stop in spans:
        _process().kept.put(remote, (start, stop), data[start - first : stop - first])


class _Kept:
    """Stretches that were read last, up to a number of bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._data: OrderedDict[tuple[str, Version | None, tuple[int, int]], bytes] = OrderedDict()
        self.num_bytes = 0

    def get(self, remote: RemoteObject, span: tuple[int, int]) -> bytes | None:
        key = remote.address, remote.known, span
        with self._lock:
            if key in self._data:
                self._data.move_to_end(key)
            return self._data.get(key)

    def put(self, remote: RemoteObject, span: tuple[int, int], data: bytes) -> None:
        key = remote.address, remote.known, span
        with self._lock:
            # Two that have read the same put it here one after the other.
            self.num_bytes += len(data) - len(self._data.pop(key, b""))
            self._data[key] = data
            while self.num_bytes > _KEPT_BYTES:
                self.num_bytes -= len(self._data.popitem(last=False)[1])

    def drop(self, remote: RemoteObject, span: tuple[int, int]) -> None:
        with self._lock:
            self.num_bytes -= len(self._data.pop((remote.address, remote.known, span), b""))


class _Process:
    """What belongs to one process: a fork begins with its own."""

    def __init__(self) -> None:
        self.kept = _Kept()
        self._threads: ThreadPoolExecutor | None = None

    def threads(self) -> ThreadPoolExecutor:
        self._threads = self._threads or ThreadPoolExecutor(_REQUESTS_AT_ONCE, "shard reads")
        return self._threads


_PROCESSES: dict[int, _Process] = {}


def _process() -> _Process:
    number = os.getpid()
    if number not in _PROCESSES:
        _PROCESSES.clear()
    return _PROCESSES.setdefault(number, _Process())


def _pause_s(number: int) -> float:
    """Before the next attempt: doubling, and scattered so that many readers do not come back at once."""
    return min(_FIRST_PAUSE_S * 2.0 ** min(number, 20), _LONGEST_PAUSE_S) * _jitter.uniform(0.5, 1.0)
