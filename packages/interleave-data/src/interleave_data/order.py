"""In what order samples come: a pure function of the seed and of counters, so that any position can be gone to.

Nothing is shuffled in memory. An epoch's order is a keyed permutation that is computed one index at a time, and a
mixture is decided by counting; the whole state is one counter for each source.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple, cast

from .sources import Source

_ROUNDS = 8
_WORD = (1 << 64) - 1


class EpochOrder:
    """A permutation of `range(size)` for each epoch, without a list of it.

    A Feistel network over the next power of four, with cycle walking: what falls outside the range is sent through
    again until it falls inside, at most four times on average (Black and Rogaway, CT-RSA 2002).
    """

    def __init__(self, size: int, seed: int, name: str = "") -> None:
        """`name` gives sources with the same seed different orders.

        Raises:
            ValueError: if `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"{name or 'order'}: expected at least one sample, got {size}; leave the source out")
        self.size = size
        self.seed = seed
        self.name = name
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys: tuple[int, tuple[int, ...]] = (-1, ())

    def index(self, epoch: int, position: int) -> int:
        """Index of the sample at `position` (0 to size - 1) of an epoch (0, 1, …).

        Raises:
            ValueError: if `position` is outside the epoch.
        """
        if not 0 <= position < self.size:
            raise ValueError(f"position: expected 0 to {self.size - 1}, got {position}; divide by the size first")
        keys = self._round_keys(epoch)
        index = self._permute(position, keys)
        while index >= self.size:
            index = self._permute(index, keys)
        return index

    def _permute(self, value: int, keys: tuple[int, ...]) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half_bits | right

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        if self._keys[0] != epoch:
            digests = (
                sha256(f"{self.seed}/{epoch}/{number}/{self.name}".encode()).digest() for number in range(_ROUNDS)
            )
            self._keys = (epoch, tuple(int.from_bytes(digest[:8], "little") for digest in digests))
        return self._keys[1]


def _mix(word: int) -> int:
    """Scatter 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


class Draw(NamedTuple):
    """One choice of a mixture: the `number`-th sample taken from source `source`."""

    source: int
    number: int


def refuse_other_settings(what: str, settings: Mapping[str, object], state: Mapping[str, object]) -> None:
    """Hold a saved state against the settings of now.

    Raises:
        ValueError: naming each setting that differs, or that the state does not have.
    """
    if differ := [name for name in settings if state.get(name) != settings[name]]:
        expected = ", ".join(f"{name} {settings[name]}" for name in differ)
        got = ", ".join(f"{name} {state.get(name)}" for name in differ)
        raise ValueError(f"{what}: expected {expected}, got {got}; resume with the settings that it was saved with")


class Mixture:
    """Draw from sources for ever, in ratios that hold over any stretch and not only on average.

    Each draw goes to the source that is furthest behind its share of the draws so far; the earlier source wins a tie.
    So a source's count stays within one or two draws of its share at all times. The seed does not enter into that: it
    orders the samples within each source, epoch by epoch.
    """

    def __init__(
        self, sources: Sequence[Source], ratios: Sequence[float | int] | None = None, *, seed: int = 0
    ) -> None:
        """Ratios are relative to each other; without them all sources are drawn from equally often.

        Raises:
            ValueError: if there is no source, one is empty, names repeat, or a ratio is not above zero.
        """
        ratios = [1.0] * len(sources) if ratios is None else list(ratios)
        if not sources or len(ratios) != len(sources):
            raise ValueError(
                f"ratios: expected one for each of at least one source, got {len(ratios)} for {len(sources)} sources; "
                "leave them out for equal shares"
            )
        if not all(0 < ratio < float("inf") for ratio in ratios):
            raise ValueError(f"ratios: expected all above 0 and finite, got {ratios}; leave a source out instead")
        self.names = [source.name for source in sources]
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"sources: expected each name once, got {', '.join(self.names)}; rename one")
        self.seed = seed
        self._orders = [EpochOrder(len(source), seed, source.name) for source in sources]
        self._shares = [ratio / sum(ratios) for ratio in ratios]
        self._drawn = [0] * len(sources)

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> Draw:
        """Choose the next source and count it."""
        total = sum(self._drawn) + 1
        behind = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        source = behind.index(max(behind))
        self._drawn[source] += 1
        return Draw(source, self._drawn[source] - 1)

    def index(self, draw: Draw) -> int:
        """Index, within its source, of the sample that a draw stands for."""
        order = self._orders[draw.source]
        return order.index(*divmod(draw.number, order.size))

    def epochs(self) -> dict[str, float]:
        """How many times over each source has been drawn."""
        return {
            name: drawn / order.size for name, drawn, order in zip(self.names, self._drawn, self._orders, strict=True)
        }

    def state_dict(self) -> dict[str, object]:
        """The draws so far, and what the order follows from: seed, sources in their order, and shares."""
        return {**self._settings(), "drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Draw on from a saved state.

        Raises:
            ValueError: if it is of another seed, of other sources or another order of them, or of other ratios.
        """
        refuse_other_settings("mixture state", self._settings(), state)
        self._drawn = list(cast(list[int], state["drawn"]))

    def _settings(self) -> dict[str, object]:
        return {"seed": self.seed, "sources": list(self.names), "shares": list(self._shares)}
