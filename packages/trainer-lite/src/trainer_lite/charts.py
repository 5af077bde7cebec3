"""Charts drawn with nothing but string formatting: lines as inline SVG, bars as HTML; colours are the page's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 34.0
MAX_POINTS = 400
"""More points than this are thinned: the page stays small and no screen shows them."""


@dataclass(frozen=True)
class Curve:
    """Values over steps; those that are not finite are left out."""

    steps: Sequence[int] | Sequence[float]
    values: Sequence[int] | Sequence[float]

    def __post_init__(self) -> None:
        """Raise ValueError for lengths that differ."""
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"curve: expected as many steps as values, got {len(self.steps)} and {len(self.values)}; pair them"
            )

    @property
    def points(self) -> list[tuple[float, float]]:
        """The finite (step, value) pairs."""
        return [
            (float(step), float(value))
            for step, value in zip(self.steps, self.values, strict=True)
            if math.isfinite(value)
        ]


def smooth(values: Sequence[float], window: float, is_log: bool) -> list[float]:
    """Return a mean over about `window` values on either side, weights falling exponentially; it does not lag behind.

    With `is_log` the mean is taken of logarithms (a geometric mean), as suits losses that fall by orders of magnitude.
    """
    decay = 1.0 - 1.0 / max(1.0, window)
    scaled = [math.log(value) if is_log else value for value in values]
    before = _running(scaled, decay)
    after = _running(scaled[::-1], decay)[::-1]
    smoothed: list[float] = []
    for value, (total_before, weight_before), (total_after, weight_after) in zip(scaled, before, after, strict=True):
        # Both sums hold the value itself; it counts once.
        mean = (total_before + total_after - value) / (weight_before + weight_after - 1.0)
        smoothed.append(math.exp(mean) if is_log else mean)
    return smoothed


def _running(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    total = weight = 0.0
    sums: list[tuple[float, float]] = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        sums.append((total, weight))
    return sums


def line_chart(curves: Mapping[str, Curve], *, is_log: bool = False, x_label: str = "step") -> str:
    """Return an SVG: each curve faint as it is and strong as smoothed, over a grid of round numbers.

    With `is_log` the vertical axis is logarithmic, and values that are not positive are left out.
    """
    series = {label: [(x, y) for x, y in curve.points if y > 0 or not is_log] for label, curve in curves.items()}
    points = [point for line in series.values() for point in line]
    if not points:
        return '<p class="muted">no finite values</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks = _linear_ticks(min(xs), max(xs), 5, least=1.0)
    y_ticks = _log_ticks(min(ys), max(ys)) if is_log else _linear_ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]])
    if min(ys) == max(ys):
        y_low, y_high = (y_low / 1.5, y_high * 1.5) if is_log else (y_low - 0.5, y_high + 0.5)

    def place_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        low, high, at = (math.log(y_low), math.log(y_high), math.log(y)) if is_log else (y_low, y_high, y)
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(line: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line)

    parts = [f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img">']
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{format_tick(tick)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" class="axis">{escape(x_label)}</text>')
    for index, (label, line) in enumerate(series.items()):
        if not line:
            continue
        smoothed = smooth([y for _, y in line], max(1.0, len(line) / 40), is_log)
        trend = [(x, y) for (x, _), y in zip(line, smoothed, strict=True)]
        colour = f"--series-{index % 6 + 1}"
        title = f"{label}: {format_value(line[0][1])} → {format_value(trend[-1][1])} (smoothed)"
        if len(line) == 1:
            parts.append(
                f'<circle r="3" cx="{place_x(line[0][0]):.1f}" cy="{place_y(line[0][1]):.1f}" '
                f'style="fill:var({colour})"><title>{escape(title)}</title></circle>'
            )
            continue
        parts.append(f'<path class="raw" style="stroke:var({colour})" d="{path(_thin(line))}"/>')
        parts.append(
            f'<path class="trend" style="stroke:var({colour})" d="{path(_thin(trend))}">'
            f"<title>{escape(title)}</title></path>"
        )
    parts.append("</svg>")
    if len(series) > 1:
        parts.append(_legend(list(series)))
    return "".join(parts)


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its parts, and the id of the element that a click leads to."""

    label: str
    parts: Sequence[int]
    to: str = ""


def stacked_bars(parts: Sequence[str], bars: Sequence[Bar]) -> str:
    """Return HTML: a row a bar, all to one scale, and a legend of the parts.

    Raises:
        ValueError: a bar of another number of parts.
    """
    for bar in bars:
        if len(bar.parts) != len(parts):
            raise ValueError(f"bar {bar.label!r}: expected {len(parts)} parts, got {len(bar.parts)}; use 0 for none")
    longest = max((sum(bar.parts) for bar in bars), default=0) or 1
    rows: list[str] = []
    for bar in bars:
        stack = "".join(
            f'<i style="width:{100 * part / longest:.2f}%;background:var(--series-{index % 6 + 1})"></i>'
            for index, part in enumerate(bar.parts)
        )
        said = ", ".join(f"{name} {part}" for name, part in zip(parts, bar.parts, strict=True))
        link = f' href="#{escape(bar.to)}"' if bar.to else ""
        rows.append(f'<a{link}>{escape(bar.label)}</a><div title="{escape(said)}">{stack}</div>')
        rows.append(f"<b>{sum(bar.parts):,}</b>")
    return f'<div class="card"><div class="bars">{"".join(rows)}</div>{_legend(parts)}</div>'


def _legend(labels: Sequence[str]) -> str:
    entries = "".join(
        f'<span><i style="background:var(--series-{index % 6 + 1})"></i>{escape(label)}</span>'
        for index, label in enumerate(labels)
    )
    return f'<div class="legend">{entries}</div>'


def _thin(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    stride = max(1, math.ceil(len(line) / MAX_POINTS))
    return [*line[::stride], line[-1]] if (len(line) - 1) % stride else list(line[::stride])


def _linear_ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) in [low, high], about `count`, at least `least` apart."""
    if low == high:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    step = max(step, least)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten around [low, high]; fewer if the range is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, (last - first) // 5))
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3] or [low]


def format_tick(value: float) -> str:
    """Return a short axis label: 1500 → 1.5k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"


def format_value(value: float) -> str:
    """Return a number in four figures."""
    return f"{value:.4g}"
