"""Fill sequences of a fixed budget with whole samples, without padding, cutting or losing any.

The oldest waiting sample opens a pack; then the longest one that still fits is added, the older of equals, until none
fits. (Best fit over a bounded window: as good as sorting within the window, and no sample waits for ever, since each
pack takes the oldest.) Tokens bound what a step computes, tiles what its pictures weigh; a pack keeps to both.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

from .errors import SkipReason, SkipSample
from .order import refuse_other_settings
from .samples import Size

Item = TypeVar("Item")


_Named = tuple[object, int, int]


class _Entry(NamedTuple, Generic[Item]):
    item: Item
    size: Size


class Packer(Generic[Item]):
    """Hold up to `look_ahead` samples and give out packs of at most `max_tokens`, in exact lengths.

    More are held only while they all fit into one pack: it would end early else, where samples are short.

    A sample beyond a budget is not this stage's to cut (it cannot see images or answers): `push` refuses it as a skip,
    and whoever pushes decides whether that is counted or fatal.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        max_tiles: int | None = None,
        look_ahead: int = 64,
        max_samples: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        """`max_samples` closes a pack early; with `look_ahead=max_samples` packs are runs of samples as they come.
        `group_by_length` adds the samples nearest in length to the one that opened the pack, in place of the longest.

        Raises:
            ValueError: if a budget or the window makes no pack.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}; use the training sequence length")
        if max_tiles is not None and max_tiles < 1:
            raise ValueError(f"max_tiles: expected at least 1, got {max_tiles}; leave it out for no bound")
        if not 1 <= look_ahead <= 128:
            raise ValueError(f"look_ahead: expected 1 to 128, got {look_ahead}; 64 packs well")
        if max_samples is not None and not 1 <= max_samples <= look_ahead:
            raise ValueError(f"max_samples: expected 1 to look_ahead ({look_ahead}), got {max_samples}; change either")
        self.max_tokens = max_tokens
        self.max_tiles = max_tiles
        self.look_ahead = look_ahead
        self.max_samples = max_samples
        self.group_by_length = group_by_length
        self._waiting: list[_Entry[Item]] = []
        self._all = Size(0, 0)

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[Item, ...]:
        """What waits, the oldest first."""
        return tuple(entry.item for entry in self._waiting)

    @property
    def is_ready(self) -> bool:
        """Whether the window is full, so that the next pack is as good as it gets.

        Samples that all fit into one pack leave no choice: they are its beginning, and more are looked at.
        """
        is_one_pack = self.max_samples is None and self.fits(self._all)
        return len(self._waiting) >= self.look_ahead and not is_one_pack

    def fits(self, size: Size) -> bool:
        """Whether a pack can hold a sample of this size at all."""
        return size.tokens <= self.max_tokens and (self.max_tiles is None or size.tiles <= self.max_tiles)

    def push(self, item: Item, length: int, tiles: int = 0) -> None:
        """Let a sample of `length` tokens and so many tiles wait.

        Raises:
            SkipSample: if it is larger than a whole pack.
            ValueError: if it has no token.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1 token, got {length}; skip empty samples before packing")
        size = Size(length, tiles)
        if length > self.max_tokens:
            raise SkipSample(SkipReason.TOO_LONG, f"expected at most {self.max_tokens} tokens, got {length}")
        if not self.fits(size):
            raise SkipSample(SkipReason.TOO_LONG, f"expected at most {self.max_tiles} tiles, got {tiles}")
        self._waiting.append(_Entry(item, size))
        self._all = Size(self._all.tokens + length, self._all.tiles + tiles)

    def pop(self) -> list[Item]:
        """Give out the next pack, in the order in which it was filled.

        Raises:
            ValueError: if nothing waits.
        """
        if not self._waiting:
            raise ValueError("pack: expected a waiting sample, got none; push first")
        first = self._waiting[0].size
        picked = [0]
        tokens, tiles = first
        most = self.max_samples or len(self._waiting)
        # One pass is enough: what did not fit once never fits again. sorted() keeps older first among equals.
        if self.group_by_length:
            order = sorted(range(1, len(self._waiting)), key=lambda n: abs(self._waiting[n].size.tokens - first.tokens))
        else:
            order = sorted(range(1, len(self._waiting)), key=lambda n: -self._waiting[n].size.tokens)
        for place in order:
            size = self._waiting[place].size
            if len(picked) < most and self.fits(Size(tokens + size.tokens, tiles + size.tiles)):
                picked.append(place)
                tokens, tiles = tokens + size.tokens, tiles + size.tiles
        pack = [self._waiting[place].item for place in picked]
        taken = set(picked)
        self._waiting = [entry for place, entry in enumerate(self._waiting) if place not in taken]
        self._all = Size(self._all.tokens - tokens, self._all.tiles - tiles)
        return pack

    def packs(self, items: Iterable[tuple[Item, int]]) -> Iterator[list[Item]]:
        """Pack a stream of (sample, length); at its end, whatever waits comes out too."""
        for item, length in items:
            self.push(item, length)
            if self.is_ready:
                yield self.pop()
        while self._waiting:
            yield self.pop()

    def state_dict(self, name: Callable[[Item], object]) -> dict[str, object]:
        """The settings, and names and sizes of what waits, in order: samples are not saved, only how to get them."""
        return {**self._settings(), "waiting": [[name(item), *size] for item, size in self._waiting]}

    def load_state_dict(self, state: Mapping[str, object], remake: Callable[[object, Size], Item | None]) -> None:
        """Let wait again what waited, made from its names and sizes; what `remake` has None for is left out.

        Raises:
            ValueError: if the state is of other settings.
        """
        refuse_other_settings("packer state", self._settings(), state)
        named = [(name, Size(tokens, tiles)) for name, tokens, tiles in cast(list[_Named], state["waiting"])]
        remade = [(remake(name, size), size) for name, size in named]
        self._waiting = [_Entry(item, size) for item, size in remade if item is not None]
        sizes = [size for _, size in self._waiting]
        self._all = Size(sum(size.tokens for size in sizes), sum(size.tiles for size in sizes))

    def _settings(self) -> dict[str, object]:
        return {
            "max_tokens": self.max_tokens,
            "max_tiles": self.max_tiles,
            "look_ahead": self.look_ahead,
            "max_samples": self.max_samples,
            "group_by_length": self.group_by_length,
        }


def pack(lengths: Sequence[int], max_tokens: int, *, look_ahead: int = 64) -> list[list[int]]:
    """Plan packs for known lengths: lists of indices, each index once.

    Raises:
        SkipSample: if one is longer than a pack.
    """
    packer: Packer[int] = Packer(max_tokens, look_ahead=look_ahead)
    return list(packer.packs(enumerate(lengths)))
