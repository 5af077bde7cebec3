"""The processes of one training run: who they are, what they tell each other, and who has fallen silent.

    with join(ParallelConfig()) as processes:      RANK, WORLD_SIZE, … as torchrun and deepspeed set them
        processes.agree({"data": fingerprint})     all must have said the same
        lists = processes.exchange(payload)        what each rank said, by rank

A rank that ends, hangs or is cut off is named by all others within `timeout_s` (see `watchman`). Payloads are
MessagePack: no pickle travels.
"""

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from blip3_lite.device import choose_device

from .config import ParallelConfig
from .watchman import RankLostError, Watchman


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


class Processes:
    """The ranks of a run. One process alone has rank 0 of 1, and everything here returns at once."""

    def __init__(self, rank: int = 0, count: int = 1, watchman: Watchman | None = None) -> None:
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
