"""Who of a run has fallen silent: each rank's watchman tells the others that it lives, and names those that do not.

A watchman is a thread with a connection of its own to the store where the ranks have met. It says that its rank
lives, how far it is and whether it waits for others, and reads the same of them. A rank that ends, hangs or is cut off
is named within `timeout_s`, whatever operation the others wait in: that says nothing of whom it waits for, and under
NCCL it waits for ever.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist

LOST_STATUS = 6
"""Exit status of a process whose partner is lost."""
_SUSPICION_S = 3.0
"""How long a rank may be silent once an operation that it takes part in has failed."""
_LAST_WORDS_S = 3.0
"""How long an error may take to reach its handler before the watchman ends the process in its place."""
_GREETING_S = 0.05
"""How often the others are asked for until they have told who they are."""
_BETWEEN_RANKS = frozenset(("distributed", "deepspeed"))
"""Folders of the code that waits for other ranks: torch's, and DeepSpeed's."""


class RankLostError(RuntimeError):
    """Another rank has ended, hangs, or cannot be reached."""


class _Sign(msgspec.Struct, array_like=True):
    """What a rank says of itself."""

    beat: int
    progress: int
    place: str
    host: str
    process: int
    is_waiting: bool
    """Whether it is in an operation between ranks."""


class Watchman(threading.Thread):
    """Tells the store that this rank lives, and finds those that do not."""

    def __init__(self, store: Any, rank: int, count: int, timeout_s: float) -> None:
        super().__init__(name="watchman", daemon=True)
        self.rank, self.count = rank, count
        self.interval_s = min(1.0, timeout_s / 10)
        # A sign may be an interval old when it is read, and an interval passes until the next look.
        self._limit_s = timeout_s - 2 * self.interval_s
        # Of its own: a connection that waits would let the training wait too.
        self._store = store.clone()
        self._errors = store.clone()
        self._progress, self._place, self._moved_s = 0, "start", time.monotonic()
        self._is_bounded = False
        self._is_suspicious, self._is_ended = threading.Event(), threading.Event()
        self._found = threading.Event()
        self._finding = ""
        self._seen: dict[int, tuple[_Sign, float, float]] = {}
        self._answered_s = time.monotonic()
        self._is_handled = self._is_explained = False
        self._trainer = threading.get_ident()
        self._tell(0)

    @property
    def is_watching(self) -> bool:
        """Whether the watch goes on."""
        return not self._is_ended.is_set()

    def at(self, place: str, is_bounded: bool) -> None:
        """Note that the training has come so far; see `Processes.at`."""
        self._place = place
        self.go_on()
        self._is_bounded = is_bounded

    def go_on(self) -> None:
        """Note that the training goes on, to wait for others."""
        self._progress, self._moved_s, self._is_bounded = self._progress + 1, time.monotonic(), False

    def run(self) -> None:
        """Beat until the end."""
        # The reader is apart, so that a store that does not answer is noticed.
        threading.Thread(target=self._ask, name="watchman's ear", daemon=True).start()
        while not self._is_ended.wait(self.interval_s):
            if finding := self._look():
                self._finding = finding
                self._found.set()
                if not self._is_ended.wait(_LAST_WORDS_S + _SUSPICION_S) and not self._is_handled:
                    # The training waits in an operation that will not return.
                    sys.stderr.write(f"train: {finding}\n")
                    sys.stderr.flush()
                    os._exit(LOST_STATUS)
                return

    def stop(self) -> None:
        """End the watch; the others are not told, since a run ends on all ranks alike."""
        self._is_ended.set()

    def explain(self, error: BaseException) -> RankLostError | None:
        """See `Processes.explain`."""
        if self._is_ended.is_set() or self._is_explained:
            return None
        self._is_explained = True
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            # Operations between ranks fail so, as do errors of this rank alone: let us look who is left.
            self._is_suspicious.set()
            if self._found.wait(2 * _SUSPICION_S + 3 * self.interval_s):
                self._is_handled = True
                return RankLostError(self._finding)
        # A file's name may be no UTF-8, which the store does not take.
        said = f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()
        words = said.splitlines()[0][:500]
        with suppress(RuntimeError):
            _within(_LAST_WORDS_S, partial(self._errors.set, f"error/{self.rank}", words))
        return None

    def _tell(self, beat: int) -> None:
        sign = _Sign(beat, self._progress, self._place, socket.gethostname(), os.getpid(), self._is_waiting)
        self._store.set(f"sign/{self.rank}", msgspec.json.encode(sign).decode())

    @property
    def _is_waiting(self) -> bool:
        """Whether the innermost call of the training thread is one between ranks; unknown, False, on a GPU's stream."""
        frame = sys._current_frames().get(self._trainer)  # pyright: ignore[reportPrivateUsage]
        return frame is not None and not _BETWEEN_RANKS.isdisjoint(Path(frame.f_code.co_filename).parts)

    def _ask(self) -> None:
        beat = 0
        # Often, until all have been heard of: so that one which ends at once has a name.
        while not self._is_ended.wait(self.interval_s if len(self._seen) == self.count - 1 else _GREETING_S):
            beat += 1
            try:
                self._tell(beat)
                self.read_signs()
                self._answered_s = time.monotonic()
            except RuntimeError:
                # The store's host is gone or cut off: `_look` sees that no answer comes.
                time.sleep(self.interval_s)
            if self._finding:
                return

    def read_signs(self) -> None:
        """Read what the others last said, and when they last moved."""
        for rank in range(self.count):
            if rank == self.rank:
                continue
            if self._store.check([f"error/{rank}"]):
                words = self._store.get(f"error/{rank}").decode()
                self._finding = f"{self._called(rank)}: ended with {words}"
                return
            if not self._store.check([f"sign/{rank}"]):
                continue
            sign = msgspec.json.decode(self._store.get(f"sign/{rank}"), type=_Sign)
            now_s = time.monotonic()
            before, lived_s, moved_s = self._seen.get(rank, (None, now_s, now_s))
            if before is None or before.beat != sign.beat:
                lived_s = now_s
            if before is None or before.progress != sign.progress:
                moved_s = now_s
            self._seen[rank] = sign, lived_s, moved_s

    def _called(self, rank: int) -> str:
        sign = self._seen[rank][0] if rank in self._seen else None
        return f"rank {rank}" + (f" ({sign.host}, process {sign.process})" if sign else "")

    def _look(self) -> str:
        """Say who is lost; nothing while all live and move."""
        if self._finding:
            return f"{self._finding}; all ranks end; go on with --resume auto"
        now_s = time.monotonic()
        silence_s = _SUSPICION_S if self._is_suspicious.is_set() else self._limit_s
        if now_s - self._answered_s > silence_s:
            others = ", ".join(self._called(rank) for rank in range(self.count) if rank != self.rank)
            return (
                f"rank {self.rank} reaches nobody: no answer for {now_s - self._answered_s:.1f} s from the store, "
                f"where rank 0's host is, and so no sign of {others}; this rank ends; look at the network and that "
                "host, then go on with --resume auto"
            )
        for rank, (sign, lived_s, _) in sorted(self._seen.items()):
            if now_s - lived_s > silence_s:
                return (
                    f"{self._called(rank)}: last seen at {sign.place}, no sign of life for {now_s - lived_s:.1f} s; it "
                    "has died or is cut off; all ranks end; go on with --resume auto"
                )
        return self._look_for_hangs(now_s)

    def _look_for_hangs(self, now_s: float) -> str:
        """Say who has not moved for too long; the furthest behind first, for whom the others may wait."""
        stuck = [
            (sign, f"{self._called(rank)}: last seen at {sign.place}", now_s - moved_s)
            for rank, (sign, lived_s, moved_s) in sorted(self._seen.items(), key=lambda seen: seen[1][0].progress)
            # One that says nothing is not said to be alive; its silence has a limit too.
            if min(now_s - moved_s, now_s - self._moved_s) > self._limit_s and now_s - lived_s < 3 * self.interval_s
        ]
        for sign, last_seen, idle_s in stuck:
            is_behind = sign.progress < self._progress
            # Fetching data, or in a forward pass, both are at one place; before the first one may take its time.
            is_beside = sign.progress == self._progress > 0 and self._is_waiting and not sign.is_waiting
            if is_behind or is_beside:
                return (
                    f"{last_seen}, alive but without progress for {idle_s:.1f} s; it hangs, or needs longer than "
                    "parallel.timeout_s; all ranks end; go on with --resume auto"
                )
        for sign, last_seen, idle_s in stuck:
            # One that others wait for is silent: they name it.
            are_alike = sign.progress == self._progress and sign.is_waiting == self._is_waiting
            if are_alike and self._is_bounded:
                return (
                    f"{last_seen}, where rank {self.rank} is too, both without progress for {idle_s:.1f} s; one "
                    "of the ranks hangs, or a batch takes longer than parallel.timeout_s; all ranks end; go on with "
                    "--resume auto"
                )
        return ""


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Do something that may not return, and do not wait for it longer than that."""
    worker = threading.Thread(target=act, daemon=True)
    worker.start()
    worker.join(seconds)
