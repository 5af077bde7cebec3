"""From planned packs to what a step takes: read, encode, collate. The same code runs in this process and in workers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec

from .config import PlanConfig
from .errors import DataError, SkipReason, SkipSample
from .plan import Hole, Plan, PlannedPack
from .samples import Size
from .sources import AnySample, ReadsAhead, Source


@runtime_checkable
class HasLength(Protocol):
    """What an encoder returns must say how many tokens it takes up in a sequence."""

    @property
    def length(self) -> int:
        """Tokens, image tokens included."""
        ...


Encoded = TypeVar("Encoded", bound=HasLength)
Packed = TypeVar("Packed")


class Encoder(ABC, Generic[Encoded, Packed]):
    """Yours: what a token is, and what a step takes. All of it must depend on the samples alone.

    With workers it is handed to processes that start afresh, so it must be possible to pickle it, and what `collate`
    returns is sent back: numbers, strings, lists, dictionaries and numpy arrays.
    """

    @abstractmethod
    def measure(self, sample: AnySample, limit: Size | None = None, /) -> Size:
        """Exactly what `encode` will take up, without decoding a picture.

        Raises:
            SkipSample: as `encode`, as far as it can be told.
        """

    @abstractmethod
    def encode(self, sample: AnySample, limit: Size | None = None, /) -> Encoded:
        """Encode a sample, cut to a limit if there is one (only where `too_long` is truncate-text).

        Raises:
            SkipSample: if the sample is bad.
        """

    @abstractmethod
    def collate(self, items: Sequence[Encoded], ids: Sequence[str], /) -> Packed:
        """Make one batch of a pack's samples, of which there may be none where several ranks keep in step."""

    def start_worker(self) -> None:
        """Called once in each worker process, before anything else."""


class Retried(NamedTuple):
    """Reads of a source that had to be tried again."""

    source: str
    count: int
    last: str
    """The last one in words."""


class Event(NamedTuple):
    """What became of one sample, in the order in which it is counted."""

    source: str
    hole: Hole | None = None
    """None for a good one."""
    is_truncated: bool = False


_SentEvent = tuple[str, tuple[str, str, str, bool] | None, bool]


def encode_events(events: Sequence[Event]) -> bytes:
    """Events as bytes for another process. Strings that a file gave may be no UTF-8."""
    sent = [
        (
            event.source,
            None
            if event.hole is None
            else (
                event.hole.reason.value,
                sendable(event.hole.detail),
                sendable(event.hole.where),
                event.hole.follows_good,
            ),
            event.is_truncated,
        )
        for event in events
    ]
    return msgspec.msgpack.encode(sent)


def decode_events(content: bytes) -> list[Event]:
    """Undo `encode_events`."""
    return [
        Event(source, None if hole is None else Hole(source, SkipReason(hole[0]), *hole[1:]), is_truncated)
        for source, hole, is_truncated in msgspec.msgpack.decode(content, type=list[_SentEvent])
    ]


def sendable(text: str) -> str:
    """As UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Made(Generic[Packed]):
    """A pack as a step takes it, and what is to be counted and saved once the step has it."""

    number: int
    data: Packed
    ids: tuple[str, ...]
    size: Size
    events: tuple[Event, ...]
    state: Mapping[str, object]
    """The plan's, behind the round that the pack belongs to."""
    retried: tuple[Retried, ...] = ()
    """What was read again while this pack was planned and made."""


class Maker(Generic[Encoded, Packed]):
    """Makes the packs of one rank, or every n-th of them."""

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder[Encoded, Packed],
        cfg: PlanConfig,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """Check the settings.

        Raises:
            ValueError: see `Plan`; or `rank` is not below `num_ranks`.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank: expected 0 to num_ranks - 1 ({num_ranks - 1}), got {rank}; number ranks from 0")
        self.sources, self.encoder, self.cfg = list(sources), encoder, cfg
        self.rank, self.num_ranks = rank, num_ranks
        self.plan = self.new_plan()

    def new_plan(self) -> Plan:
        """A plan at its beginning."""
        return Plan(self.sources, self.encoder.measure, self.cfg)

    def make(self, state: Mapping[str, object], first: int = 0, step: int = 1) -> Iterator[Made[Packed]]:
        """Go on from a plan's state; of this rank's packs from there on, make `first`, `first + step`, …

        Raises:
            DataError: an encoded sample has another length than was planned.
        """
        self.plan = self.new_plan()
        self.plan.load_state_dict(state)
        turn = 0
        while packs := self.plan.next_round(self.num_ranks):
            if turn % step == first:
                yield self._made(packs[self.rank], self.plan.state_dict())
            turn += 1

    def take_retries(self) -> tuple[Retried, ...]:
        """What was read again in this process since this was last asked."""
        taken = [(one.name, *one.take_retries()) for one in self.sources if isinstance(one, ReadsAhead)]
        return tuple(Retried(*one) for one in taken if one[1])

    def _read_ahead(self, pack: PlannedPack) -> None:
        """Let sources that are far away fetch all of a pack at once."""
        for number, source in enumerate(self.sources):
            if isinstance(source, ReadsAhead):
                entries = (entry for entry in pack.entries if entry.draw.source == number)
                # Of one that was read to be measured, only pictures are wanted still.
                source.read_ahead(one.index for one in entries if one.sample is None or one.sample.images())

    def _made(self, pack: PlannedPack, state: Mapping[str, object]) -> Made[Packed]:
        events = [Event(hole.source, hole) for hole in pack.holes]
        items: list[Encoded] = []
        ids: list[str] = []
        tokens, tiles = 0, 0
        limit = Size(self.cfg.max_tokens, self.cfg.max_tiles or 1 << 31)
        self._read_ahead(pack)
        for entry in pack.entries:
            name = self.sources[entry.draw.source].name
            sample = None
            try:
                sample = self.plan.read(entry)
                encoded = self.encoder.encode(sample, limit if entry.is_cut else None)
            except SkipSample as skip:
                skip.where = skip.where or ("" if sample is None else sample.id)
                events.append(Event(name, Hole.of(name, entry.index, skip)))
                continue
            if encoded.length != entry.size.tokens:
                raise DataError(
                    f"{name}:{entry.index}: expected {entry.size.tokens} tokens as planned, got {encoded.length}; the "
                    "file has changed since it was indexed (index it again), or measure and encode disagree"
                )
            events.append(Event(name, is_truncated=entry.is_cut))
            items.append(encoded)
            ids.append(f"{sample.source}/{sample.id}")
            tokens, tiles = tokens + entry.size.tokens, tiles + entry.size.tiles
        return Made(
            number=pack.number,
            data=self.encoder.collate(items, ids),
            ids=tuple(ids),
            size=Size(tokens, tiles),
            events=tuple(events),
            state=state,
            retried=self.take_retries(),
        )
