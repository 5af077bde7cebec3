"""Which samples share which pack: decided from sizes alone, before anything is decoded.

    sources → mixture (which sample next) → size (from the index, or measured) → packer → planned packs

The plan is a pure function of the sources (fingerprints, lengths), the settings and the seed, so every rank and every
worker computes the same one and takes its part: rank r of w takes the packs r, r + w, r + 2w, … A sample whose size
cannot be told, or that is too long, is a hole: it is counted with the pack that was being planned, and the draws behind
it are what they would be without it. A sample that turns out bad later, when it is decoded, leaves its place in its
pack empty; no other sample moves.

The state is the counters of the mixture, names and sizes of the samples that wait (at most 128, or what one pack of
short ones begins with), and the pack's number;
to continue from it touches no sample.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from .changes import source_changes
from .config import PlanConfig
from .errors import DataError, SkipReason, SkipSample
from .order import Draw, Mixture, refuse_other_settings
from .packing import Packer
from .samples import Size
from .sources import AnySample, HasPlaces, HasSizes, Source

_MOST_HOLES = 100
"""Holes that are handed out at the latest, with a pack of nothing: a source of bad samples alone must not plan on for
ever, and its holes must be counted."""
_ANY_NUMBER = 1 << 31


Measure = Callable[[AnySample, Size | None], Size]
"""What a sample takes up, or would if it were cut to a limit; raises `SkipSample` for a bad one."""


@dataclass(frozen=True)
class Entry:
    """A sample's place in a pack."""

    draw: Draw
    index: int
    """Index within its source."""
    size: Size
    is_cut: bool
    """Whether the sample has to be cut to the pack's budget."""
    sample: AnySample | None = field(default=None, compare=False, repr=False)
    """The sample, if it has been read to be measured."""


class Hole(NamedTuple):
    """A sample that was drawn and left out."""

    source: str
    reason: SkipReason
    detail: str
    where: str
    follows_good: bool = False
    """Whether a good sample of the source was drawn since its last hole: holes are told before what waits is packed."""

    @classmethod
    def of(cls, source: str, index: int, skip: SkipSample, follows_good: bool = False) -> "Hole":
        """What a skip says, with a place if it has none."""
        return cls(source, skip.reason, skip.detail, skip.where or f"{source}:{index}", follows_good)

    @property
    def skip(self) -> SkipSample:
        """As it was raised."""
        return SkipSample(self.reason, self.detail, self.where)


@dataclass(frozen=True)
class PlannedPack:
    """Samples for one sequence. Nothing in it: the last round is filled up, or there were holes only."""

    number: int
    entries: tuple[Entry, ...] = ()
    holes: tuple[Hole, ...] = ()

    @property
    def size(self) -> Size:
        """Tokens and tiles of all entries."""
        sizes = [entry.size for entry in self.entries]
        return Size(sum(size.tokens for size in sizes), sum(size.tiles for size in sizes))


class Plan:
    """Planned packs, without end unless every source is bounded (`PlanConfig.epochs`).

        plan = Plan(sources, measure, PlanConfig(max_tokens=4096))
        for pack in plan: ...

    `measure` is asked where a source's index does not know a size.
    """

    def __init__(self, sources: Sequence[Source], measure: Measure, cfg: PlanConfig) -> None:
        """Start at the first pack.

        Raises:
            ValueError: see `Mixture` and `Packer`.
        """
        self.sources = list(sources)
        self.cfg = cfg
        self.number = 0
        """Packs planned so far."""
        self.reading = ""
        """The sample that is being looked at, as "source:index (id)", for whoever waits in vain."""
        self._good: set[str] = set()
        self._measure = measure
        self._limit = Size(cfg.max_tokens, cfg.max_tiles or _ANY_NUMBER)
        self._mixture = Mixture(sources, cfg.ratios, seed=cfg.seed, unit=cfg.ratio_unit, epochs=cfg.epochs)
        self._packer: Packer[Entry] = Packer(
            cfg.max_tokens,
            max_tiles=cfg.max_tiles,
            look_ahead=cfg.look_ahead,
            max_samples=cfg.max_samples,
            group_by_length=cfg.group_by_length,
        )

    def __iter__(self) -> "Plan":
        return self

    def __next__(self) -> PlannedPack:
        """Fill the packer's window and plan a pack.

        Raises:
            DataError: a sample is too long, where that is an error.
            ShardError: a shard or its index is not there any more, or another one.
        """
        holes: list[Hole] = []
        while not self._packer.is_ready and len(holes) < _MOST_HOLES:
            draw = next(self._mixture, None)
            if draw is None:
                break
            index = self._mixture.index(draw)
            try:
                entry = self._entry(draw, index)
                self._packer.push(entry, *entry.size)
            except SkipSample as skip:
                name = self.sources[draw.source].name
                skip.where = skip.where or self._place(draw.source, index)
                holes.append(Hole.of(name, index, skip, name in self._good))
                self._good.discard(name)
            else:
                self._good.add(self.sources[draw.source].name)
                self._mixture.count_tokens(draw, entry.size.tokens)
        is_done = len(holes) >= _MOST_HOLES or len(self._packer) == 0
        if is_done and not holes:
            raise StopIteration
        pack = PlannedPack(self.number, () if is_done else tuple(self._packer.pop()), tuple(holes))
        self.number += 1
        return pack

    def next_round(self, num_ranks: int) -> list[PlannedPack]:
        """One pack for each rank; at the end of the sources packs of nothing fill the round up; none when it is over.

        States that are taken between rounds are the same on all ranks, and may be continued by another number of them.
        """
        packs: list[PlannedPack] = []
        while len(packs) < num_ranks and (pack := next(self, None)) is not None:
            packs.append(pack)
        while packs and len(packs) < num_ranks:
            packs.append(PlannedPack(self.number))
            self.number += 1
        return packs

    def read(self, entry: Entry) -> AnySample:
        """Get an entry's sample.

        Raises:
            SkipSample: if it cannot be read.
        """
        if entry.sample is not None:
            self.reading = f"{self.sources[entry.draw.source].name}:{entry.index} ({entry.sample.id})"
            return entry.sample
        return self._read(entry.draw.source, entry.index)

    @property
    def waiting(self) -> tuple[Entry, ...]:
        """What has been drawn and is in no pack yet."""
        return self._packer.waiting

    def epochs(self) -> dict[str, float]:
        """How many times over each source has been drawn."""
        return self._mixture.epochs()

    def state_dict(self) -> dict[str, object]:
        """What has been planned, as plain data that JSON can hold."""
        return {
            "number": self.number,
            "too_long": self.cfg.too_long,
            "good": sorted(self._good),
            "fingerprints": {source.name: source.fingerprint for source in self.sources},
            "mixture": self._mixture.state_dict(),
            "packer": self._packer.state_dict(lambda entry: [*entry.draw, entry.is_cut]),
        }

    def changes(
        self, state: Mapping[str, object], saved_shards: Mapping[str, Mapping[str, str]] | None = None
    ) -> dict[str, str]:
        """Say in words of each source that is new, gone or other than when this was saved what is different.

        `saved_shards`: digests of each source's shards then, where they were kept (`changes.shards_of`).
        """
        saved = cast(Mapping[str, str], state["fingerprints"])
        return source_changes(saved, saved_shards or {}, self.sources)

    def load_state_dict(
        self,
        state: Mapping[str, object],
        *,
        accept_data_change: bool = False,
        saved_shards: Mapping[str, Mapping[str, str]] | None = None,
    ) -> dict[str, str]:
        """Continue from a saved state; return the sources that begin anew, each with what is different about it.

        With `accept_data_change` a source that is new or has changed is drawn from its beginning, what waited of
        changed and removed ones is forgotten, and all others keep their place. `saved_shards`: as for `changes`.

        Raises:
            ValueError: a setting is not what it was, or a source without `accept_data_change`.
        """
        changed = self.changes(state, saved_shards)
        if changed and not accept_data_change:
            raise ValueError(
                f"stream state: expected the sources it was saved with, got others or changed ones: "
                f"{', '.join(f'{name} ({what})' for name, what in changed.items())}; restore the files and settings, "
                "accept the change, or start anew"
            )
        refuse_other_settings("plan state", {"too_long": self.cfg.too_long}, state)
        mixture = cast(Mapping[str, object], state["mixture"])
        names = cast(list[str], mixture["sources"])
        places = {source.name: place for place, source in enumerate(self.sources)}
        self._mixture.load_state_dict(mixture, restart=frozenset(changed) if accept_data_change else None)

        def remake(name: object, size: Size) -> Entry | None:
            source, number, is_cut = cast(tuple[int, int, bool], name)
            if names[source] in changed:
                return None
            draw = Draw(places[names[source]], number)
            return Entry(draw, self._mixture.index(draw), size, is_cut)

        self._packer.load_state_dict(cast(Mapping[str, object], state["packer"]), remake)
        self.number = cast(int, state["number"])
        self._good = set(cast(list[str], state["good"]))
        return {name: what for name, what in changed.items() if name in places}

    def _entry(self, draw: Draw, index: int) -> Entry:
        """Find out a sample's size.

        Raises:
            SkipSample: if it is bad.
            DataError: if it is too long, where that is an error.
        """
        source = self.sources[draw.source]
        size = source.size(index) if isinstance(source, HasSizes) else None
        sample = None
        if size is None:
            sample = self._read(draw.source, index)
            size = self._size_of(sample, None)
        is_cut = not self._packer.fits(size) and self.cfg.too_long == "truncate-text"
        if is_cut:
            sample = sample or self._read(draw.source, index)
            size = self._size_of(sample, self._limit)
        if not self._packer.fits(size) and self.cfg.too_long == "error":
            place = self._place(draw.source, index) or index
            raise DataError(
                f"{source.name}/{place}: expected at most {self.cfg.max_tokens} tokens and "
                f"{self.cfg.max_tiles or 'any number of'} tiles, got {size.tokens} and {size.tiles}; raise the budget "
                "or shorten it"
            )
        return Entry(draw, index, size, is_cut, sample if sample is not None and _is_light(sample) else None)

    def _size_of(self, sample: AnySample, limit: Size | None) -> Size:
        try:
            return self._measure(sample, limit)
        except SkipSample as skip:
            skip.where = skip.where or sample.id
            raise

    def _place(self, source: int, index: int) -> str:
        found = self.sources[source]
        return found.place(index) if isinstance(found, HasPlaces) else ""

    def _read(self, source: int, index: int) -> AnySample:
        self.reading = f"{self.sources[source].name}:{index}"
        sample = self.sources[source][index]
        self.reading += f" ({sample.id})"
        return sample


def _is_light(sample: AnySample) -> bool:
    """Whether a sample may wait as it is: not if it holds pictures as bytes, which would fill the memory."""
    return not any(isinstance(image.open, bytes) for image in sample.images())
