"""The course of the learning rate, as a pure function of the number of updates made."""

from math import cos, pi

from .config import ScheduleConfig


def learning_rate_factor(update: int, max_steps: int, cfg: ScheduleConfig) -> float:
    """Return the factor on every peak rate for update number `update` (from 0).

    Warm-up gives update u the factor (u + 1) / warmup_steps, so no update is wasted at rate 0; the last update
    (max_steps - 1) has `min_ratio`. A warm-up longer than the run is cut to it, so that a short trial of a long recipe
    needs no other schedule; the last update then has the peak.

    Raises:
        ValueError: a negative `update`.
    """
    if update < 0:
        raise ValueError(f"update: expected a number >= 0, got {update}; count updates from 0")
    warmup_steps = min(cfg.warmup_steps, max_steps)
    if update < warmup_steps:
        return (update + 1) / warmup_steps
    if cfg.kind == "constant":
        return 1.0
    # With a warm-up its last update already has the peak; without, update 0 has it.
    first = max(warmup_steps - 1, 0)
    progress = min(1.0, (update - first) / max(1, max_steps - 1 - first))
    falling = 0.5 * (1.0 + cos(pi * progress)) if cfg.kind == "cosine" else 1.0 - progress
    return cfg.min_ratio + (1.0 - cfg.min_ratio) * falling
