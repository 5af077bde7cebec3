"""metrics.jsonl: one line per optimiser step, whole or absent, without steps told twice after a resume."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from .atomic import append_whole, write_atomically


class StepRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of metrics.jsonl."""

    stage: str
    step: int
    """Steps of this stage done, from 1."""
    loss: float
    """Mean over the target tokens of the whole update; null in the file if it is not finite."""
    loss_hex: str
    """The same number exactly (`float.hex`)."""
    target_tokens: int
    tokens_per_s: float
    """All tokens computed, per second of wall clock of this step."""
    grad_norm: float
    """Of the mean loss, before clipping."""
    lr: float
    """AdamW's rate of this step, before the scales of its groups."""
    samples_digest: str
    """`interleave_data.samples_digest` of the ids in the order in which the model saw them."""
    skipped: dict[str, int]
    """Left out so far in this stage, by reason: samples, and whole updates (see `guards.LeftOut`)."""
    truncated: int = 0
    """Samples kept so far in this stage, but cut to fit, if the stream counts them; none is among the skipped."""
    data_wait: float = 0.0
    """Share of this step's wall clock that went into waiting for data, if the stream counts it."""
    read_again: dict[str, int] = {}
    """Reads that had to be tried again so far in this process, by source, if the stream counts them."""
    parts: dict[str, float] = {}
    """Further means from the model."""
    failed_saves: int = 0
    """Checkpoints on the way that could not be written so far."""
    evaluation: dict[str, float] = {}
    """What the evaluation callback returned at this step."""


def format_record(record: StepRecord, max_steps: int) -> str:
    """Return the console line of a step."""
    cells = [
        f"{record.stage:<12} {record.step:>{len(str(max_steps))}}/{max_steps}",
        f"loss {record.loss:.4f}",
        *(f"{name} {value:.4f}" for name, value in record.parts.items()),
        f"lr {record.lr:.2e}",
        f"grad {record.grad_norm:.3f}",
        f"{format_count(record.tokens_per_s)} tok/s",
    ]
    if record.data_wait > 0:
        cells.append(f"data {record.data_wait:.0%}")
    if record.skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(record.skipped.items()))
        cells.append(f"skipped {sum(record.skipped.values())} ({reasons})")
    if record.truncated:
        cells.append(f"truncated {record.truncated}")
    if record.read_again:
        sources = ", ".join(f"{source} {count}" for source, count in sorted(record.read_again.items()))
        cells.append(f"read again {sum(record.read_again.values())} ({sources})")
    return "  ".join(cells)


def format_count(value: float) -> str:
    """Return a number in three figures with k or M: 12_345 → 12.3k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class MetricsLog:
    """Appends records to a file; `rewind` forgets the steps that a resume will do again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def append(self, record: StepRecord) -> None:
        """Write one line, whole or not at all.

        Raises:
            OSError: the disk is full; the line waits for the next call, and the file is as it was.
        """
        self._waiting += msgspec.json.encode(record) + b"\n"
        self._write_waiting()

    def _write_waiting(self) -> None:
        append_whole(self.path, self._waiting)
        self._waiting = b""

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        if self._waiting:
            self._write_waiting()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, stage: str, step: int) -> None:
        """Keep the lines up to `step` of `stage`; drop a cut last line and whatever follows the first later line.

        Raises:
            ValueError: a line that is no record, with its number.
        """
        self._waiting = b""
        if not self.path.exists():
            return
        kept: list[bytes] = []
        for line, record in _lines(self.path):
            if record is None or (record.stage == stage and record.step > step):
                break
            kept.append(line)
        write_atomically(self.path, b"".join(kept))


def _decode(line: bytes) -> StepRecord | None:
    if not line.endswith(b"\n"):
        return None
    fields = msgspec.json.decode(line, type=dict[str, object])
    for name in ("loss", "grad_norm"):
        fields[name] = _number(fields[name])
    for name in ("parts", "evaluation"):
        means = msgspec.convert(fields.get(name, {}), dict[str, object])
        fields[name] = {part: _number(value) for part, value in means.items()}
    return msgspec.convert(fields, StepRecord)


def _number(value: object) -> object:
    # JSON has no number for one that is not finite.
    return math.nan if value is None else value


def _lines(path: Path) -> Iterator[tuple[bytes, StepRecord | None]]:
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            yield line, _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a step record, got {line[:80]!r}; {error}; remove the line"
            ) from error


def read_metrics(path: Path) -> list[StepRecord]:
    """Return the records of a metrics.jsonl; a cut last line, the mark of a killed run, is left out.

    Raises:
        ValueError: a line that is no record, with its number.
    """
    return [record for _, record in _lines(path) if record is not None]
