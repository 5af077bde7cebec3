"""Fill sequences of a fixed budget with whole samples, without padding, cutting or losing any.

The oldest waiting sample opens a pack; then the longest one that still fits is added, the older of equals, until none
fits. (Best fit over a bounded window: as good as sorting within the window, and no sample waits for ever, since each
pack takes the oldest.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar, cast

from .errors import SkipReason, SkipSample
from .order import refuse_other_settings

Item = TypeVar("Item")


class Packer(Generic[Item]):
    """Hold up to `look_ahead` samples and give out packs of at most `max_tokens`, in exact lengths.

    A sample longer than the budget is not this stage's to cut (it cannot see images or answers): `push` refuses it as
    a skip, and whoever pushes decides whether that is counted or fatal.
    """

    def __init__(self, max_tokens: int, *, look_ahead: int = 64, max_samples: int | None = None) -> None:
        """`max_samples` closes a pack early; with `look_ahead=max_samples` packs are runs of samples as they come.

        Raises:
            ValueError: if the budget or the window makes no pack.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}; use the training sequence length")
        if not 1 <= look_ahead <= 128:
            raise ValueError(f"look_ahead: expected 1 to 128, got {look_ahead}; 64 packs well")
        if max_samples is not None and not 1 <= max_samples <= look_ahead:
            raise ValueError(f"max_samples: expected 1 to look_ahead ({look_ahead}), got {max_samples}; change either")
        self.max_tokens = max_tokens
        self.look_ahead = look_ahead
        self.max_samples = max_samples
        self._waiting: list[tuple[Item, int]] = []

    def __len__(self) -> int:
        """Samples that wait."""
        return len(self._waiting)

    @property
    def is_ready(self) -> bool:
        """Whether the window is full, so that the next pack is as good as it gets."""
        return len(self._waiting) >= self.look_ahead

    def push(self, item: Item, length: int) -> None:
        """Let a sample of `length` tokens wait.

        Raises:
            SkipSample: if it is longer than a whole pack.
            ValueError: if it has no token.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1 token, got {length}; skip empty samples before packing")
        if length > self.max_tokens:
            raise SkipSample(SkipReason.TOO_LONG, f"expected at most {self.max_tokens} tokens, got {length}")
        self._waiting.append((item, length))

    def pop(self) -> list[Item]:
        """Give out the next pack, in the order in which it was filled.

        Raises:
            ValueError: if nothing waits.
        """
        if not self._waiting:
            raise ValueError("pack: expected a waiting sample, got none; push first")
        picked = [0]
        room = self.max_tokens - self._waiting[0][1]
        most = self.max_samples or len(self._waiting)
        # One pass from long to short is best fit: what did not fit once never fits again. sorted() keeps older first.
        for place in sorted(range(1, len(self._waiting)), key=lambda place: -self._waiting[place][1]):
            if len(picked) < most and self._waiting[place][1] <= room:
                picked.append(place)
                room -= self._waiting[place][1]
        pack = [self._waiting[place][0] for place in picked]
        taken = set(picked)
        self._waiting = [entry for place, entry in enumerate(self._waiting) if place not in taken]
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
        """The settings, and the names of what waits, in order: samples are not saved, only how to get them again."""
        return {**self._settings(), "waiting": [name(item) for item, _ in self._waiting]}

    def load_state_dict(self, state: Mapping[str, object], remake: Callable[[object], tuple[Item, int]]) -> None:
        """Fetch what waited by its names.

        Raises:
            ValueError: if the state is of other settings, or a sample has become too long for a pack.
        """
        refuse_other_settings("packer state", self._settings(), state)
        self._waiting = []
        for name in cast(list[object], state["waiting"]):
            item, length = remake(name)
            try:
                self.push(item, length)
            except SkipSample as skip:
                raise ValueError(f"waiting sample {name}: {skip.detail}; encode it as when it was saved") from skip

    def _settings(self) -> dict[str, object]:
        return {"max_tokens": self.max_tokens, "look_ahead": self.look_ahead, "max_samples": self.max_samples}


def pack(lengths: Sequence[int], max_tokens: int, *, look_ahead: int = 64) -> list[list[int]]:
    """Plan packs for known lengths: lists of indices, each index once.

    Raises:
        SkipSample: if one is longer than a pack.
    """
    packer: Packer[int] = Packer(max_tokens, look_ahead=look_ahead)
    return list(packer.packs(enumerate(lengths)))
