"""The two kinds of trouble with data: a bad sample, which is skipped and counted, and bad files, which end the run.

Errors of the program are neither and always propagate; nothing here catches them.
"""

import logging
from collections.abc import Callable, Mapping
from enum import StrEnum

import msgspec

from .config import SkipLimits

_log = logging.getLogger(__name__)


class SkipReason(StrEnum):
    """Why a sample was left out: the closed list that counters, logs and metrics use."""

    UNREADABLE_FILE = "unreadable_file"
    PATH_REFUSED = "path_refused"
    CHECKSUM = "checksum"
    EMPTY_FILE = "empty_file"
    NOT_AN_IMAGE = "not_an_image"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    BROKEN_IMAGE = "broken_image"
    UNSUPPORTED_MODE = "unsupported_mode"
    BAD_RECORD = "bad_record"
    MISSING_MEMBER = "missing_member"
    IMAGE_MARKS = "image_marks"
    EMPTY_TEXT = "empty_text"
    EMPTY_ANSWER = "empty_answer"
    NO_TARGETS = "no_targets"
    TOO_LONG = "too_long"
    UNWANTED = "unwanted"
    """Nothing is wrong with it, but its layout's own rule leaves it out."""

    @property
    def is_bad(self) -> bool:
        """Whether it counts into the share of bad samples: not what is left out on purpose (`too_long`, `unwanted`)."""
        return self not in (SkipReason.TOO_LONG, SkipReason.UNWANTED)


class SkipSample(Exception):  # noqa: N818  (a request to the reader, not an error of the program)
    """Ask for a sample to be left out. `where` is "source:index", filled in by whoever knows it."""

    def __init__(self, reason: SkipReason, detail: str, where: str = "") -> None:
        super().__init__(reason, detail, where)
        self.reason = reason
        self.detail = detail
        self.where = where

    def __str__(self) -> str:
        return f"{self.where or 'sample'}: {self.reason.value}: {self.detail}"


class DataError(ValueError):
    """Data that a run cannot go on with, though no limit on bad samples is passed."""


class ShardError(DataError):
    """A shard that is cut, damaged or inconsistent: more than a sample is lost, and nobody knows how much more."""


class WorkerError(RuntimeError):
    """A worker process that died, stalled, or met an error of the program."""


class StoppedWaiting(Exception):  # noqa: N818  (a wish that was heeded, not an error)
    """Somebody wanted to stop while a pack was waited for; nothing of that pack has been consumed."""


class TooManySkips(RuntimeError):  # noqa: N818  (says what happened)
    """More bad samples than the run's limits allow."""


class _SourceCount(msgspec.Struct, kw_only=True):
    seen: int = 0
    consecutive: int = 0
    truncated: int = 0
    skipped: dict[str, int] = msgspec.field(default_factory=dict[str, int])


class SkipCounter:
    """Count what was seen and what was skipped, by source and reason, and stop a run that skips too much.

    Reads that had to be tried again are counted too, though no sample is lost by them: since this process began and not
    in the saved state, since they say something of the network and nothing of the data.
    """

    def __init__(
        self, limits: SkipLimits | None = None, on_skip: Callable[[str, SkipSample], object] | None = None
    ) -> None:
        """`on_skip` hears of each bad sample, with its source: only numbers are kept here."""
        self.limits = limits or SkipLimits()
        self._on_skip = on_skip
        self._counts: dict[str, _SourceCount] = {}
        self.retries: dict[str, int] = {}
        """Reads that had to be tried again, by source."""

    def keep(self, source: str) -> None:
        """Count a good sample."""
        count = self._counts.setdefault(source, _SourceCount())
        count.seen += 1
        count.consecutive = 0

    def skip(self, source: str, skip: SkipSample, follows_good: bool = False) -> None:
        """Count a bad sample; `follows_good` ends a run of them, though the good one is counted later.

        Raises:
            TooManySkips: if the source has passed the share or the run of skips that the limits allow.
        """
        count = self._counts.setdefault(source, _SourceCount())
        count.seen += 1
        count.consecutive = 1 if follows_good else count.consecutive + 1
        count.skipped[skip.reason.value] = count.skipped.get(skip.reason.value, 0) + 1
        if self._on_skip is not None:
            self._on_skip(source, skip)
        # A run of such as are not bad still counts: a rule that lets nothing through would be read against for ever.
        total = sum(n for reason, n in count.skipped.items() if SkipReason(reason).is_bad)
        by_reason = ", ".join(f"{reason} {n}" for reason, n in sorted(count.skipped.items()))
        if count.consecutive >= self.limits.max_consecutive:
            raise TooManySkips(
                f"{source}: expected fewer than {self.limits.max_consecutive} bad samples in a row, got "
                f"{count.consecutive} ({by_reason}); the last was {skip}; repair the source or remove it"
            ) from skip
        if total > self.limits.max_share * max(count.seen, self.limits.min_seen):
            raise TooManySkips(
                f"{source}: expected at most {self.limits.max_share:.2%} bad samples, got {total} of {count.seen} "
                f"({by_reason}); the last was {skip}; repair the source or raise max_share"
            ) from skip

    def retry(self, source: str, count: int, last: str, *, is_logged: bool = True) -> None:
        """Count reads that had to be tried again; the log hears of it each time that their number has doubled."""
        before = self.retries.get(source, 0)
        self.retries[source] = before + count
        if is_logged and self.retries[source].bit_length() > before.bit_length():
            _log.warning("%s: %d reads had to be tried again so far, the last %s", source, before + count, last)

    def truncate(self, source: str) -> None:
        """Count a sample that was kept, but cut to fit; beside `keep`."""
        self._counts.setdefault(source, _SourceCount()).truncated += 1

    @property
    def num_retries(self) -> int:
        """Reads of all sources that had to be tried again."""
        return sum(self.retries.values())

    @property
    def num_truncated(self) -> int:
        """Samples that were cut to fit; none of them is among the skips."""
        return sum(count.truncated for count in self._counts.values())

    def by_reason(self) -> dict[str, int]:
        """Skips by reason over all sources, sorted by name: one entry of a metrics line."""
        totals: dict[str, int] = {}
        for count in self._counts.values():
            for reason, skipped in count.skipped.items():
                totals[reason] = totals.get(reason, 0) + skipped
        return dict(sorted(totals.items()))

    def table(self) -> dict[str, dict[str, int]]:
        """Skips by source and reason, sources without any left out."""
        return {name: dict(sorted(count.skipped.items())) for name, count in self._counts.items() if count.skipped}

    def num_seen(self, source: str) -> int:
        """Samples of the source that were looked at, good and bad."""
        return self._counts[source].seen if source in self._counts else 0

    def state_dict(self) -> dict[str, object]:
        """Everything counted, as plain data."""
        return {name: msgspec.to_builtins(count) for name, count in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Count on from a saved state."""
        self._counts = msgspec.convert(dict(state), dict[str, _SourceCount])
