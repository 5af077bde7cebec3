"""Sources to batches, for ever, in an order that can be continued exactly.

    sources → mixture (which sample next) → encode (yours: tokens and tiles) → packer → batches

What is saved is what has been consumed: a counter for each source, the names of the few samples that wait in the
packer, and the skips. Loading that in a fresh process gives the same batches as if nothing had happened, as long as
`encode` depends on the sample alone; sources and settings are compared with those it was saved with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

from .errors import SkipCounter, SkipSample
from .order import Draw, Mixture
from .packing import Packer
from .samples import samples_digest
from .sources import AnySample, Source


@runtime_checkable
class HasLength(Protocol):
    """What an encoder returns must say how many tokens it takes up in a sequence."""

    @property
    def length(self) -> int:
        """Tokens, image tokens included."""
        ...


Encoded = TypeVar("Encoded", bound=HasLength)


class _Waiting(NamedTuple):
    draw: Draw
    sample_id: str
    encoded: object


@dataclass(frozen=True)
class Batch(Generic[Encoded]):
    """The encoded samples of one packed sequence, in order."""

    items: tuple[Encoded, ...]
    ids: tuple[str, ...]
    """"source/id" of each item."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all items."""
        return sum(item.length for item in self.items)

    @property
    def digest(self) -> str:
        """Digest of the ordered ids."""
        return samples_digest(self.ids)


class Stream(Generic[Encoded]):
    """Endless batches from a mixture of sources. Bad samples are left out, counted, and bounded by the counter."""

    def __init__(
        self,
        sources: Sequence[Source],
        encode: Callable[[AnySample], Encoded],
        *,
        ratios: Sequence[float | int] | None = None,
        max_tokens: int,
        seed: int = 0,
        look_ahead: int = 64,
        max_samples: int | None = None,
        too_long: Literal["skip", "error"] = "skip",
        skips: SkipCounter | None = None,
    ) -> None:
        """See `Mixture` for ratios and seed, and `Packer` for budget and window.

        `encode` may raise `SkipSample`; any other error of it ends the stream. A sample that encodes to more than
        `max_tokens` is skipped and counted, or is an error; cutting it to fit is the encoder's business.
        """
        self._sources = list(sources)
        self._encode = encode
        self._too_long = too_long
        self.mixture = Mixture(sources, ratios, seed=seed)
        self.skips = skips or SkipCounter()
        self._packer: Packer[_Waiting] = Packer(max_tokens, look_ahead=look_ahead, max_samples=max_samples)

    def __iter__(self) -> "Stream[Encoded]":
        return self

    def __next__(self) -> Batch[Encoded]:
        """Fill the packer's window and give out a pack.

        Raises:
            TooManySkips: if a source is worse than the limits allow.
        """
        while not self._packer.is_ready:
            draw = next(self.mixture)
            source = self._sources[draw.source].name
            try:
                waiting, length = self._fetch(draw)
                self._push(waiting, length)
            except SkipSample as skip:
                skip.where = skip.where or f"{source}:{self.mixture.index(draw)}"
                self.skips.skip(source, skip)
            else:
                self.skips.keep(source)
        pack = self._packer.pop()
        return Batch(
            items=tuple(cast(Encoded, waiting.encoded) for waiting in pack),
            ids=tuple(waiting.sample_id for waiting in pack),
        )

    def state_dict(self) -> dict[str, object]:
        """What has been consumed, as plain data that JSON can hold."""
        return {
            "fingerprints": {source.name: source.fingerprint for source in self._sources},
            "mixture": self.mixture.state_dict(),
            "packer": self._packer.state_dict(lambda waiting: list(waiting.draw)),
            "skips": self.skips.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a saved state; the samples that waited are read and encoded again.

        Raises:
            ValueError: if a source or a setting is not what it was, or a waiting sample can no longer be read, or has
                become too long.
        """
        saved = cast(Mapping[str, str], state["fingerprints"])
        now = {source.name: source.fingerprint for source in self._sources}
        if changed := sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)):
            raise ValueError(
                f"stream state: expected the sources it was saved with, got others or changed ones: "
                f"{', '.join(changed)}; restore the files and settings, or start anew"
            )
        self.mixture.load_state_dict(cast(Mapping[str, object], state["mixture"]))
        self.skips.load_state_dict(cast(Mapping[str, object], state["skips"]))
        self._packer.load_state_dict(cast(Mapping[str, object], state["packer"]), self._remake)

    def _fetch(self, draw: Draw) -> tuple[_Waiting, int]:
        sample = self._sources[draw.source][self.mixture.index(draw)]
        encoded = self._encode(sample)
        return _Waiting(draw, f"{sample.source}/{sample.id}", encoded), encoded.length

    def _push(self, waiting: _Waiting, length: int) -> None:
        try:
            self._packer.push(waiting, length)
        except SkipSample as skip:
            if self._too_long == "skip":
                raise
            raise ValueError(f"{waiting.sample_id}: {skip.detail}; raise max_tokens or shorten it") from skip

    def _remake(self, name: object) -> tuple[_Waiting, int]:
        draw = Draw(*cast(list[int], name))
        try:
            return self._fetch(draw)
        except SkipSample as skip:
            where = f"{self._sources[draw.source].name}:{self.mixture.index(draw)}"
            raise ValueError(f"{where}: expected the sample that waited when saved, got {skip}; restore it") from skip
