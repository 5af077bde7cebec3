"""The processes of one training run: who they are, what they tell each other, and who has fallen silent.

    with join(ParallelConfig()) as processes:      RANK, WORLD_SIZE, … as torchrun and deepspeed set them
        processes.agree({"data": fingerprint})     all must have said the same
        lists = processes.exchange(payload)        what each rank said, by rank

Every rank's watchman (a thread with a connection of its own) tells the store that it lives and how far it is, and
reads the same of the others. A rank that ends, hangs or is cut off is named by all others within `timeout_s`, whatever
collective they wait in: an operation that waits for a dead rank says nothing of who it was, and under NCCL it waits for
ever. Payloads are MessagePack: no pickle travels.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from blip3_lite.device import choose_device

from .config import ParallelConfig

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


def rank_and_count() -> tuple[int, int]:
    """This process's rank, and how many there are, by RANK and WORLD_SIZE; rank 0 of 1 without them.

    Raises:
        ValueError: they are no numbers, or do not fit each other.
    """
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    rank, count = (int(number) if number.isdecimal() else -1 for number in told)
    if not 0 <= rank < count:
        raise ValueError(
            f"RANK, WORLD_SIZE: expected a rank from 0 on and a larger number of processes, got {told[0]!r} and "
            f"{told[1]!r}; start with torchrun or deepspeed, or unset both"
        )
    return rank, count


class _Sign(msgspec.Struct, array_like=True):
    """What a rank says of itself."""

    beat: int
    progress: int
    place: str
    host: str
    process: int
    is_waiting: bool
    """Whether it is in an operation between ranks."""


class Processes:
    """The ranks of a run. One process alone has rank 0 of 1, and everything here returns at once."""

    def __init__(self, rank: int = 0, count: int = 1, watchman: "Watchman | None" = None) -> None:
        self.rank, self.count = rank, count
        self._watchman = watchman

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes the log and the run folder."""
        return self.rank == 0

    def at(self, place: str, *, is_bounded: bool = False) -> None:
        """Say where this rank is; every rank passes the same places in the same order.

        is_bounded: it is a hang too if all ranks stand there for longer than the timeout, as in a batch, inside of
            which an engine's own operations let ranks wait for each other.
        """
        if self._watchman is not None:
            self._watchman.at(place, is_bounded)

    def _wait(self) -> None:
        """Say that this rank now waits for the others: who is not there yet is behind."""
        if self._watchman is not None:
            self._watchman.go_on()

    def exchange(self, payload: bytes) -> list[bytes]:
        """Give every rank what each of them brings, by rank."""
        if self.count == 1:
            return [payload]
        self._wait()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(payload)]))
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(max(1, longest), dtype=torch.uint8)
        if payload:
            mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def share(self, value: object) -> list[Any]:
        """`exchange` of plain data: numbers (also not finite ones), strings, lists, dictionaries."""
        return [msgspec.msgpack.decode(part) for part in self.exchange(msgspec.msgpack.encode(value))]

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replace tensors, alike in shape on every rank, by their sums over the ranks."""
        if self.count > 1:
            self._wait()
            for tensor in tensors:
                dist.all_reduce(tensor)

    def together(self, what: str, act: Callable[[], object]) -> None:
        """Do something on every rank; where it fails on one, it has failed on all.

        Raises:
            OSError: on every rank, with each rank that failed and why.
        """
        fault: str | None = None
        cause: OSError | None = None
        try:
            act()
        except OSError as error:
            fault, cause = error.strerror or str(error), error
        faults = [f"rank {rank}: {said}" for rank, said in enumerate(self.share(fault)) if said is not None]
        if self.count == 1 and cause is not None:
            raise cause
        if faults:
            raise OSError(f"{what}: {'; '.join(faults)}") from cause

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare what must be the same on every rank.

        Raises:
            ValueError: on every rank, with what differs and where.
        """
        told: list[dict[str, str]] = self.share(dict(facts))
        differing = {
            name: [said.get(name, "nothing") for said in told]
            for name in dict.fromkeys(name for said in told for name in said)
            if len({said.get(name) for said in told}) > 1
        }
        if differing:
            words = "; ".join(
                f"{name}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                for name, values in differing.items()
            )
            raise ValueError(
                f"processes: expected the same on all {self.count} ranks, got {words}; bring every host to the same "
                "code, settings, data and checkpoints"
            )

    def part(self) -> None:
        """Wait for all ranks, then watch no more: what follows is each rank's own."""
        if self._watchman is not None and self._watchman.is_watching:
            self.at("end")
            self.exchange(b"")
            self._watchman.stop()

    def explain(self, error: BaseException) -> RankLostError | None:
        """Tell the others of this rank's error; return the error that stands behind it, if another rank has ended."""
        return None if self._watchman is None else self._watchman.explain(error)


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


@contextmanager
def join(cfg: ParallelConfig, device: torch.device | None = None) -> Generator[Processes]:
    """Meet the other ranks that the environment names (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); part at the end.

    device: where this process computes, which becomes torch's current one; by default its GPU where there is one.

    Raises:
        ValueError: the environment makes no sense, the others are not all there within the timeout, or the meeting
            place is taken.
    """
    rank, count = rank_and_count()
    device = choose_device() if device is None else device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1 and not cfg.uses_deepspeed:
        yield Processes()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    watchman: Watchman | None = None
    if count == 1:
        dist.init_process_group(backend, store=_no_store(), rank=0, world_size=1)
    else:
        store = _meet(cfg, rank, count)
        # The watchman speaks first, with the rank's name; this is for whoever it cannot end.
        limit = timedelta(seconds=2 * cfg.timeout_s + 60)
        dist.init_process_group(
            backend, store=distributed_c10d.PrefixStore("group", store), rank=rank, world_size=count, timeout=limit
        )
        watchman = Watchman(distributed_c10d.PrefixStore("watch", store), rank, count, cfg.timeout_s)
        watchman.start()
    try:
        processes = Processes(rank, count, watchman)
        yield processes
        processes.part()
    except BaseException as error:
        if watchman is not None and not isinstance(error, RankLostError):
            lost = watchman.explain(error)
            if lost is not None:
                raise lost from error
        raise
    else:
        # DeepSpeed has groups of its own: without this a clean run can end in an abort.
        dist.destroy_process_group()
    finally:
        if watchman is not None:
            watchman.stop()


def _no_store() -> Any:
    return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]


def _meet(cfg: ParallelConfig, rank: int, count: int) -> Any:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    limit = timedelta(seconds=cfg.timeout_s)
    try:
        store, _, _ = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        if store.add(f"joined/{rank}", 1) > 1:
            raise ValueError(
                f"rendezvous {where}: expected one process of rank {rank}, got a second; another run, or what is left "
                "of one, meets at this port: end it or choose another --master-port"
            )
        store.set(f"count/{rank}", str(count))
        store.wait([f"count/{other}" for other in range(count)], limit)
        counts = [int(store.get(f"count/{other}")) for other in range(count)]
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"rendezvous {where}: expected {count} processes to meet there within {cfg.timeout_s:g} s, got: "
            f"{str(error).splitlines()[0]}; start all ranks with the same address, port and number of processes, on a "
            "port that no other run uses"
        ) from error
    if len(set(counts)) > 1:
        raise ValueError(
            f"rendezvous {where}: expected {count} processes, got ranks that were told {sorted(set(counts))}; give "
            "every host the same --nnodes and --nproc-per-node"
        )
    return store
