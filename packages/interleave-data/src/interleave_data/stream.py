"""Sources to batches, in an order that can be continued exactly.

    sources → plan (which samples share a pack) → read, encode, collate (here or in workers) → batches

What is saved belongs to what has been consumed, never to what was made ahead: the plan's counters, names and sizes of
the few samples that wait to be packed, and the skips. Loading that in a fresh process gives the same batches as if
nothing had happened, with any number of workers, as long as the encoder depends on the samples alone; sources and
settings are compared with those it was saved with.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, cast

import msgspec

from .changes import shards_of
from .config import PlanConfig
from .errors import DataError, SkipCounter
from .making import Encoded, Encoder, Event, Made, Maker, Packed, Retried, decode_events, encode_events, sendable
from .plan import Plan
from .samples import samples_digest
from .sources import Source
from .workers import WorkerPool


@dataclass(frozen=True)
class Batch(Generic[Packed]):
    """One packed sequence."""

    number: int
    """Of the pack, counted over all ranks."""
    data: Packed
    """What the encoder's `collate` made of the samples."""
    ids: tuple[str, ...]
    """"source/id" of each sample, in order."""
    num_tokens: int
    """Tokens of all samples."""
    num_tiles: int
    """Tiles of all samples."""

    @property
    def digest(self) -> str:
        """Digest of the ordered ids."""
        return samples_digest(self.ids)


class _Said(msgspec.Struct, array_like=True):
    """What ranks tell each other behind each round of packs."""

    plan: bytes
    """Digest of the plan's state, which each rank has computed by itself."""
    events: bytes
    """Of this rank's pack (`making.encode_events`)."""
    retried: list[tuple[str, int, str]]


class Stream(Generic[Encoded, Packed]):
    """Batches from a mixture of sources. Bad samples are left out, counted, and bounded by the counter.

    With workers the samples are read and encoded in other processes; sources and encoder must then be picklable, and a
    script needs the usual `if __name__ == "__main__":`. Close the stream, or use it in a `with`, to end them.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder[Encoded, Packed],
        cfg: PlanConfig,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        data_timeout_s: float = 600.0,
        skips: SkipCounter | None = None,
        exchange: Callable[[bytes], Sequence[bytes]] | None = None,
        keep_empty: bool = False,
    ) -> None:
        """Open the stream at its beginning; nothing is read before the first batch is asked for.

        `rank` of `num_ranks` gets every so many-th pack; with more than one rank a pack in which nothing is left comes
        as a batch of nothing, as the ranks must keep in step, and each counts the holes of its own packs. With an
        `exchange`, which gives every rank what each of them brings, by rank, each counts the holes of all, in the order
        of the packs, and what any had to read again; the state is the same on every rank, which is checked; all ranks
        must then ask for batches alike.
        `keep_empty`: also one rank alone gives out packs of nothing, so that a step of so many packs is the same for
        any number of ranks.
        `data_timeout_s` bounds the wait for one pack of a worker.

        Raises:
            ValueError: a setting makes no sense.
        """
        if num_workers < 0:
            raise ValueError(f"num_workers: expected at least 0, got {num_workers}; 0 reads in this process")
        if not data_timeout_s > 0:
            raise ValueError(f"data_timeout_s: expected above 0, got {data_timeout_s}; use several minutes")
        self._maker = Maker(sources, encoder, cfg, rank=rank, num_ranks=num_ranks)
        self._num_workers, self._timeout_s = num_workers, data_timeout_s
        self._exchange, self._keep_empty = exchange, keep_empty or num_ranks > 1
        self.skips = skips or SkipCounter()
        self.waited_s = 0.0
        """Seconds that `next` has waited for packs so far; without workers, those that it took to make them."""
        self._consumed: Mapping[str, object] = self._maker.plan.state_dict()
        self._packs: Iterator[Made[Packed]] | None = None
        self._should_stop: Callable[[], bool] = lambda: False

    def __iter__(self) -> "Stream[Encoded, Packed]":
        return self

    def __next__(self) -> Batch[Packed]:
        """Give out the next batch.

        Raises:
            TooManySkips: a source is worse than the limits allow.
            DataError: a shard is not what it was, a sample is too long where that is an error, or ranks have planned
                different packs.
            WorkerError: a worker died or lets us wait for too long.
            StoppedWaiting: see `stop_waiting_if`.
        """
        while True:
            made = self._next_made()
            self._consumed = made.state
            events, retried = self._heard(made)
            for one in retried:
                # Of ranks that all hear of it, one tells.
                self.skips.retry(*one, is_logged=self._exchange is None or self._maker.rank == 0)
            for event in events:
                if event.hole is not None:
                    self.skips.skip(event.source, event.hole.skip, event.hole.follows_good)
                    continue
                self.skips.keep(event.source)
                if event.is_truncated:
                    self.skips.truncate(event.source)
            if made.ids or self._keep_empty:
                return Batch(made.number, made.data, made.ids, made.size.tokens, made.size.tiles)

    def _heard(self, made: Made[Packed]) -> tuple[Sequence[Event], Sequence[Retried]]:
        """What became of samples and of reads, for this rank's pack or for all ranks' packs of the round.

        Raises:
            DataError: on every rank, if one has planned other packs.
        """
        # With workers, what was read again here was so on opening.
        retried = (*self._maker.take_retries(), *made.retried)
        if self._exchange is None:
            return made.events, retried
        said = _Said(
            sha256(msgspec.msgpack.encode(made.state)).digest(),
            encode_events(made.events),
            [(source, count, sendable(last)) for source, count, last in retried],
        )
        told = [msgspec.msgpack.decode(part, type=_Said) for part in self._exchange(msgspec.msgpack.encode(said))]
        if others := [str(rank) for rank, theirs in enumerate(told) if theirs.plan != told[0].plan]:
            raise DataError(
                f"packs up to {made.number}: expected the same plan on all ranks, got another on {', '.join(others)} "
                "than on 0; a sample can be read on one host alone: look for skips that the others have not, repair "
                "the file or the network there and resume, or measure ahead (tools/index.py DATA.toml --checkpoint DIR)"
            )
        return (
            [event for theirs in told for event in decode_events(theirs.events)],
            [Retried(*one) for theirs in told for one in theirs.retried],
        )

    def start(self) -> None:
        """Let workers begin before the first batch is asked for; without workers there is nothing to start."""
        if self._packs is None and self._num_workers > 0:
            self._packs = self._start()

    def stop_waiting_if(self, should_stop: Callable[[], bool]) -> None:
        """From now on ask this while a worker lets us wait; once it says so, `next` raises `StoppedWaiting`.

        A pack that is there is given out all the same. Without workers there is no wait in which it could be asked.
        """
        self._should_stop = should_stop

    def __enter__(self) -> "Stream[Encoded, Packed]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they made ahead is made again if the stream is asked for more."""
        if isinstance(self._packs, WorkerPool):
            self._packs.close()
        self._packs = None

    def epochs(self) -> dict[str, float]:
        """How many times over each source has been drawn for what was consumed, and for what waits to be packed."""
        return self._plan_at(self._consumed).epochs()

    def state_dict(self) -> dict[str, object]:
        """What has been consumed, and of which shards, as plain data that JSON can hold."""
        shards = shards_of(self._maker.sources)
        return {"plan": dict(self._consumed), "skips": self.skips.state_dict(), "shards": shards}

    def changes(self, state: Mapping[str, object]) -> list[str]:
        """Say in words how the data differ from those that a state was saved with; empty if they do not."""
        plan = cast(Mapping[str, object], state["plan"])
        changed = self._maker.new_plan().changes(plan, _saved_shards(state))
        # As JSON has them, in the order of the sources.
        before, now = list(cast(Mapping[str, str], plan["fingerprints"])), [one.name for one in self._maker.sources]
        words = [f"{name} ({what})" for name, what in changed.items()]
        if [name for name in before if name in now] != [name for name in now if name in before]:
            words.append(f"the sources in another order ({', '.join(now)})")
        return words

    def load_state_dict(self, state: Mapping[str, object], *, accept_data_change: bool = False) -> dict[str, str]:
        """Continue from a saved state; return the sources that begin anew, each with what is different about it.

        With `accept_data_change` a source that is new or has changed is drawn from its beginning, and all others keep
        their place.

        Raises:
            ValueError: a setting is not what it was, or a source without `accept_data_change`.
        """
        self.close()
        plan = self._maker.new_plan()
        restarted = plan.load_state_dict(
            cast(Mapping[str, object], state["plan"]),
            accept_data_change=accept_data_change,
            saved_shards=_saved_shards(state),
        )
        self.skips.load_state_dict(cast(Mapping[str, object], state["skips"]))
        self._consumed = plan.state_dict()
        return restarted

    def _plan_at(self, state: Mapping[str, object]) -> Plan:
        plan = self._maker.new_plan()
        plan.load_state_dict(state)
        return plan

    def _next_made(self) -> Made[Packed]:
        if self._packs is None:
            self._packs = self._start()
        start_s = time.perf_counter()
        try:
            return next(self._packs)
        except BaseException:
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - start_s

    def _start(self) -> Iterator[Made[Packed]]:
        if self._num_workers == 0:
            return self._maker.make(self._consumed)
        # Workers may be at work before anybody says when to stop.
        return WorkerPool(self._maker, self._consumed, self._num_workers, self._timeout_s, lambda: self._should_stop())


def _saved_shards(state: Mapping[str, object]) -> Mapping[str, Mapping[str, str]]:
    """Of a state from before shards were kept, none."""
    return cast(Mapping[str, Mapping[str, str]], state.get("shards", {}))
