"""In what order samples come: a pure function of the seed and of counters, so that any position can be gone to.

Nothing is shuffled in memory. An epoch's order is a keyed permutation that is computed one index at a time, and a
mixture is decided by counting; the whole state is a few counters for each source.
"""

from collections.abc import Container, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple, Protocol, cast, runtime_checkable

from .config import RatioUnit
from .sources import Source

_ROUNDS = 8
_WORD = (1 << 64) - 1
_BLOCKS_IN_A_WINDOW = 8


@runtime_checkable
class HasWindow(Protocol):
    """A source that is read in blocks asks for its samples to be shuffled within windows."""

    @property
    def window(self) -> int | None:
        """Samples of a window; None to shuffle them all."""
        ...


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


class WindowOrder:
    """A permutation that stays near: for containers that are read in blocks, such as the row groups of parquet.

    Runs of window / 8 neighbours are put in random order; eight runs that follow each other in it make a window, and
    the samples of a window are shuffled. So a reader that keeps eight blocks reads each block once an epoch. The run
    that is left over at the end, shorter than the others, has a random place among them.
    """

    def __init__(self, size: int, seed: int, name: str = "", *, window: int) -> None:
        """`window`: samples that are shuffled together, a multiple of 8 is best.

        Raises:
            ValueError: if `size` is below 1 or `window` below 8.
        """
        if window < _BLOCKS_IN_A_WINDOW:
            raise ValueError(
                f"window: expected at least {_BLOCKS_IN_A_WINDOW} samples, got {window}; use several thousand, or "
                "leave it out to shuffle all samples"
            )
        self.size = size
        self.seed = seed
        self.name = name
        self.window = window
        if size < 1:
            raise ValueError(f"{name or 'order'}: expected at least one sample, got {size}; leave the source out")
        self._block = min(window // _BLOCKS_IN_A_WINDOW, size)
        self._num_blocks, self._rest = divmod(size, self._block)
        self._blocks = EpochOrder(self._num_blocks, seed, f"{name}/blocks")
        self._places = EpochOrder(self._num_blocks + 1, seed, f"{name}/rest")
        # One window's order at a time, as positions come in turn.
        self._inner: tuple[tuple[int, int], EpochOrder | None] = ((-1, -1), None)

    def index(self, epoch: int, position: int) -> int:
        """Index of the sample at `position` (0 to size - 1) of an epoch (0, 1, …).

        Raises:
            ValueError: if `position` is outside the epoch.
        """
        if not 0 <= position < self.size:
            raise ValueError(f"position: expected 0 to {self.size - 1}, got {position}; divide by the size first")
        rest_place = self._places.index(epoch, 0) if self._rest else self._num_blocks
        window = self._window_at(position, rest_place)
        start = self._start_of(window * _BLOCKS_IN_A_WINDOW, rest_place)
        end = self._start_of((window + 1) * _BLOCKS_IN_A_WINDOW, rest_place)
        if self._inner[0] != (epoch, window):
            order = EpochOrder(end - start, self.seed, f"{self.name}/window {window}")
            self._inner = ((epoch, window), order)
        order = self._inner[1]
        assert order is not None
        place, offset = self._block_at(start + order.index(epoch, position - start), rest_place)
        if self._rest and place == rest_place:
            return self._num_blocks * self._block + offset
        block = self._blocks.index(epoch, place - (place > rest_place) if self._rest else place)
        return block * self._block + offset

    def _start_of(self, place: int, rest_place: int) -> int:
        """Position at which the block at `place` of the order begins; the end for places beyond."""
        if self._rest and place > rest_place:
            return min((place - 1) * self._block + self._rest, self.size)
        return min(place * self._block, self.size)

    def _block_at(self, position: int, rest_place: int) -> tuple[int, int]:
        """Place of the block that holds a position before the windows are shuffled, and the position within it."""
        if not self._rest or position < rest_place * self._block:
            return divmod(position, self._block)
        behind = position - rest_place * self._block
        if behind < self._rest:
            return rest_place, behind
        places, offset = divmod(behind - self._rest, self._block)
        return rest_place + 1 + places, offset

    def _window_at(self, position: int, rest_place: int) -> int:
        return self._block_at(position, rest_place)[0] // _BLOCKS_IN_A_WINDOW


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
    """Draw from sources in ratios that hold over any stretch and not only on average.

    Each draw goes to the source that is furthest behind its share; the earlier source wins a tie. Counted in samples,
    a source stays within one or two draws of its share at all times; counted in tokens, within about its longest
    sample. The seed does not enter into that: it orders the samples within each source, epoch by epoch.

    `epochs` bounds a source. 3 takes each sample three times, 0.25 the first quarter of the first epoch's order. A
    source that has been drawn so often is left, the others keep the ratios among themselves, and the mixture ends with
    the last of them; sources without a bound go on for ever. The order of a source does not depend on its bound.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        ratios: Sequence[float | int] | None = None,
        *,
        seed: int = 0,
        unit: RatioUnit = "samples",
        epochs: Sequence[float | int | None] | None = None,
    ) -> None:
        """Ratios are relative to each other. Without them all sources are drawn from equally often, or, if each has a
        bound, in proportion to the draws it allows, so that they end together.

        Raises:
            ValueError: if there is no source, one is empty, names repeat, or a ratio or bound is not above zero.
        """
        epochs = [None] * len(sources) if epochs is None else list(epochs)
        if not sources or len(epochs) != len(sources) or (ratios is not None and len(ratios) != len(sources)):
            raise ValueError(
                f"ratios: expected one for each of at least one source, got {len(ratios or epochs)} for "
                f"{len(sources)} sources; leave them out for equal shares"
            )
        for what, values in (("ratios", ratios or []), ("epochs", [bound for bound in epochs if bound is not None])):
            if not all(0 < value < float("inf") for value in values):
                raise ValueError(f"{what}: expected all above 0 and finite, got {list(values)}; leave a source out")
        self.names = [source.name for source in sources]
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"sources: expected each name once, got {', '.join(self.names)}; rename one")
        self.seed = seed
        self.unit: RatioUnit = unit
        self._orders = [_order_of(source, seed) for source in sources]
        self._limits = [
            None if bound is None else max(1, round(bound * len(source)))
            for bound, source in zip(epochs, sources, strict=True)
        ]
        if ratios is None:
            bounds = [limit for limit in self._limits if limit is not None]
            ratios = bounds if len(bounds) == len(sources) else [1.0] * len(sources)
        self._shares = [ratio / sum(ratios) for ratio in ratios]
        self._drawn = [0] * len(sources)
        # In the unit of the ratios.
        self._amounts = [0] * len(sources)

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> Draw:
        """Choose the next source and count the draw."""
        left = [number for number, limit in enumerate(self._limits) if limit is None or self._drawn[number] < limit]
        if not left:
            raise StopIteration
        in_samples = self.unit == "samples"
        whole = sum(self._shares[number] for number in left)
        total = sum(self._amounts[number] for number in left) + in_samples
        behind = [self._shares[number] / whole * total - self._amounts[number] for number in left]
        source = left[behind.index(max(behind))]
        self._drawn[source] += 1
        if in_samples:
            self._amounts[source] += 1
        return Draw(source, self._drawn[source] - 1)

    def count_tokens(self, draw: Draw, tokens: int) -> None:
        """Say how long a drawn sample is; asked for before the next draw where ratios are counted in tokens.

        A sample that is left out counts for nothing.
        """
        if self.unit == "tokens":
            self._amounts[draw.source] += tokens

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
        """The draws so far, and what the order follows from: seed, sources in their order, shares, bounds, windows."""
        return {**self._settings(), "drawn": list(self._drawn), "amounts": list(self._amounts)}

    def load_state_dict(self, state: Mapping[str, object], *, restart: Container[str] | None = None) -> None:
        """Draw on from a saved state.

        `restart` holds the names of sources that have changed and are drawn from their beginning again; with it, the
        list of sources and their shares may differ from the saved ones.

        Raises:
            ValueError: if it is of another seed, of other sources or another order of them, or of other ratios.
        """
        settings = self._settings()
        if restart is not None:
            settings = {name: settings[name] for name in ("seed", "unit")}
        refuse_other_settings("mixture state", settings, state)
        drawn = dict(zip(cast(list[str], state["sources"]), cast(list[int], state["drawn"]), strict=True))
        self._drawn = [0 if restart is not None and name in restart else drawn.get(name, 0) for name in self.names]
        is_same_mixture = all(state.get(name) == value for name, value in self._settings().items())
        self._amounts = list(cast(list[int], state["amounts"])) if is_same_mixture else [0] * len(self._drawn)

    def _settings(self) -> dict[str, object]:
        return {
            "seed": self.seed,
            "sources": list(self.names),
            "shares": list(self._shares),
            "unit": self.unit,
            "limits": list(self._limits),
            "windows": [order.window if isinstance(order, WindowOrder) else None for order in self._orders],
        }


def _order_of(source: Source, seed: int) -> EpochOrder | WindowOrder:
    window = source.window if isinstance(source, HasWindow) else None
    if window is None or window >= len(source):
        return EpochOrder(len(source), seed, source.name)
    return WindowOrder(len(source), seed, source.name, window=window)
