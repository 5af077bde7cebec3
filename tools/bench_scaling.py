"""Suite `scaling`: how time and memory of a step grow with tokens, tiles and vocabulary, on the demo's sizes."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench_models import JoinedStep, LMStep, demo_joined, picture_batch, text_batch
from bench_pairs import Row, clocked, in_a_process, peak_of
from bench_step import DTYPES, rest

AXES = {
    "tokens": (512, 1024, 2048, 4096, 8192, 16_384),
    "tiles": (1, 3, 5, 9, 13),
    "vocabulary": (512, 4096, 16_384, 65_536),
}
"""One document of so many tokens; four pictures of so many tiles each; 16 samples of 60 to 200 tokens."""
_PEER = "transformers, padded"
_LONG_S = 20.0
"""No further step once they took as long."""


def step_at(axis: str, value: int, *, is_ours: bool) -> LMStep | JoinedStep:
    """The step at a point."""
    cfg = demo_joined()
    if axis == "tiles":
        return JoinedStep(cfg, picture_batch(cfg, (value,) * 4, (40, 50, 30, 60), 8), is_ours=is_ours)
    if axis == "tokens":
        lm, lengths, num_targets = replace(cfg.lm, max_positions=value), [value], value // 10
    else:
        lm, lengths, num_targets = replace(cfg.lm, vocab_size=value), list(range(60, 204, 9)), 20
    return LMStep(lm, DTYPES["fp32"], text_batch(lengths, num_targets, lm.vocab_size), is_ours=is_ours)


def costs(*, is_ours: bool) -> dict[tuple[str, int], tuple[float, float]]:
    """At each point seconds of a step, the best of three, and bytes of weights, optimiser and step."""
    rest(is_ours)
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for axis, values in AXES.items():
        for value in values:
            seconds: list[float] = []

            def work(axis: str = axis, value: int = value, seconds: list[float] = seconds) -> None:
                step = step_at(axis, value, is_ours=is_ours)
                # the first one meets memory anew, which of a long one is a small part
                while len(seconds) < 3 and sum(seconds) < _LONG_S:
                    seconds.append(clocked(step.run)())

            num_bytes = peak_of(work)
            found[axis, value] = min(seconds), num_bytes
    return found


def points() -> Iterator[Row]:
    """Two rows a point: milliseconds and megabytes. Both sides' steps are held equal by the suite `step`."""
    ours, theirs = (in_a_process(partial(costs, is_ours=is_ours)) for is_ours in (True, False))
    for (axis, value), own in ours.items():
        other = theirs[axis, value]
        yield _row(f"step at {axis} = {value}", "ms", 1e3, own[0], other[0])
        yield _row(f"memory at {axis} = {value}", "MB", 1e-6, own[1], other[1])


def _row(name: str, unit: str, scale: float, own: float, other: float) -> Row:
    return Row("scaling", name, _PEER, own * scale, other * scale, unit, other / own, None, "as in the suite step")


_PANEL, _GAP, _MARGIN = (240.0, 160.0), 26.0, 46.0
_COLOURS = {"ours": "#1f6feb", "theirs": "#b08800"}


def write_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw six panels with logarithmic axes: time and memory over each axis."""
    width = 3 * (_PANEL[0] + _GAP) + _MARGIN
    height = 2 * (_PANEL[1] + 2 * _GAP) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        'font-size="10"><rect width="100%" height="100%" fill="white"/>'
    ]
    for line, (what, unit) in enumerate((("step", "ms"), ("memory", "MB"))):
        for column, axis in enumerate(AXES):
            start = f"{what} at {axis} = "
            found = [row for row in rows if row["suite"] == "scaling" and row["name"].startswith(start)]
            curves = {side: [(float(row["name"].removeprefix(start)), row[side]) for row in found] for side in _COLOURS}
            left = _MARGIN + column * (_PANEL[0] + _GAP)
            top = _GAP + line * (_PANEL[1] + 2 * _GAP)
            parts += _panel(left, top, f"{what}, {unit}, by {axis}", curves)
    for number, (side, colour) in enumerate(_COLOURS.items()):
        label = side if side == "ours" else _PEER
        parts.append(f'<text x="{_MARGIN + 60 * number}" y="{height - 6}" fill="{colour}">{escape(label)}</text>')
    path.write_text("".join([*parts, "</svg>\n"]))


def _panel(left: float, top: float, title: str, curves: dict[str, list[tuple[float, float]]]) -> list[str]:
    parts = [f'<text x="{left}" y="{top - 6}" font-weight="bold">{escape(title)}</text>']
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return parts
    xs, ys = zip(*points, strict=True)
    powers = range(math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys))) + 1)
    low, high = 10.0 ** powers[0], 10.0 ** powers[-1]

    def x_of(x: float) -> float:
        return left + _PANEL[0] * math.log(x / min(xs)) / max(1e-9, math.log(max(xs) / min(xs)))

    def y_of(y: float) -> float:
        return top + _PANEL[1] * (1 - math.log(y / low) / math.log(high / low))

    for power in powers:
        y = y_of(10.0**power)
        parts.append(f'<path d="M{left:.1f},{y:.1f}h{_PANEL[0]:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4:.1f}" y="{y + 3:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for x in sorted(set(xs)):
        parts.append(f'<text x="{x_of(x):.1f}" y="{top + _PANEL[1] + 13:.1f}" text-anchor="middle">{x:g}</text>')
    for side, curve in curves.items():
        line = "L".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve)
        parts.append(f'<path d="M{line}" fill="none" stroke="{_COLOURS[side]}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.2" fill="{_COLOURS[side]}"/>' for x, y in curve]
    return parts
