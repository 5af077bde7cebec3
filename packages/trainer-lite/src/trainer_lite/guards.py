"""What keeps a bad step from the weights: not finite, without targets, or a loss far above the last ones.

A step that is left out moves nothing: no parameter, no moment, no rate. Its samples are written down.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

from .atomic import append_whole, write_atomically
from .config import TrainConfig

LeftOut = Literal["non_finite_update", "no_target_update", "loss_spike_update"]
"""Why an update was not made; the names under which it is counted."""


def left_out(
    loss: float, grad_norm: float, num_targets: int, recent_losses: Sequence[float], cfg: TrainConfig
) -> LeftOut | None:
    """Say why a step may not move the parameters; None if it may."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "non_finite_update"
    if num_targets == 0:
        return "no_target_update"
    if cfg.spike_guard and is_spike(loss, recent_losses, cfg):
        return "loss_spike_update"
    return None


def is_spike(loss: float, recent_losses: Sequence[float], cfg: TrainConfig) -> bool:
    """Whether a loss is more than `spike_ratio` times the median of a whole window of positive losses.

    Losses around zero or below have no ratio, so none of them is a spike.
    """
    if cfg.spike_ratio == 0 or len(recent_losses) < cfg.spike_window:
        return False
    middle = median(recent_losses[-cfg.spike_window :])
    return middle > 0 and loss > cfg.spike_ratio * middle


def with_loss(recent_losses: Sequence[float], loss: float, cfg: TrainConfig) -> list[float]:
    """The window one loss later. Spikes go in too: a level that has changed for good is normal half a window later."""
    return [*recent_losses, loss][-cfg.spike_window :]


class StepLog:
    """JSON lines of steps to look at, with the ids of their samples."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, stage: str, step: int, sample_ids: Sequence[str], facts: Mapping[str, float | bool | str]) -> None:
        """Write one line; figures that JSON has no number for are written as text.

        Raises:
            OSError: the disk is full; the file is as it was.
        """
        shown = {name: _writable(value) for name, value in facts.items()}
        line = {"stage": stage, "step": step, **shown, "sample_ids": [_writable(name) for name in sample_ids]}
        append_whole(self.path, msgspec.json.encode(line) + b"\n")

    def rewind(self, stage: str, step: int) -> None:
        """Forget the steps of `stage` behind `step`, which are done again, and a line that a kill has cut."""
        if not self.path.exists():
            return
        kept: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            place = msgspec.json.decode(line, type=_Place)
            if place.stage != stage or place.step <= step:
                kept.append(line)
        write_atomically(self.path, b"".join(kept))


def _writable(value: float | bool | str) -> float | bool | str:
    if isinstance(value, str):
        # A file name that is no UTF-8 holds surrogates, which JSON cannot.
        return value.encode("utf-8", "backslashreplace").decode()
    return value if math.isfinite(value) else str(value)


class _Place(msgspec.Struct):
    stage: str
    step: int
