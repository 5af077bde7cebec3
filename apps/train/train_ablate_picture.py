"""The picture of an ablation: arms and differences with their intervals, as one SVG that needs nothing around it."""

from html import escape
from typing import TYPE_CHECKING

from train_ablate_statistics import Estimate

if TYPE_CHECKING:
    from train_ablate_report import Conclusion

_WIDTH, _LEFT, _RIGHT, _ROW, _HEAD = 760.0, 290.0, 90.0, 20.0, 34.0
_LABEL = 48
"""Most characters that fit beside a row."""
_INK, _MUTED, _LINE = "#1d1f22", "#6b7078", "#d9dad6"
_ARMS = ("#2f6fde", "#d9682b", "#2a9d6f", "#a24bc4", "#c2992a", "#cf3f67")
_VERDICTS = {"agrees": "#1f8a5b", "disagrees": "#c93a3a", "undecided": "#8a8f98", "invalid": "#c93a3a"}


def draw(conclusion: "Conclusion") -> str:
    """Return the SVG: right answers of each skill and arm above, the contrasts below."""
    parts: list[str] = []
    y = _panel(parts, 0.0, "Right answers, %", 0.0, 1.0)
    for skill in next(iter(conclusion.arms.values())).skills:
        for place, (arm, figures) in enumerate(conclusion.arms.items()):
            label = f"{skill}: {arm}" if place == 0 else arm
            figure = figures.skills[skill]
            _row(parts, y, label, figure, _ARMS[place % len(_ARMS)], 0.0, 1.0, f"{100 * figure.value:.1f}")
            y += _ROW
        y += _ROW / 2
    found = [conclusion.control, *conclusion.contrasts]
    reach = max(0.05, *(max(abs(one.estimate.low), abs(one.estimate.high)) for one in found))
    top = y
    y = _panel(parts, y, "Differences, points", -reach, reach)
    zero = _place(0.0, -reach, reach)
    parts.append(f'<path d="M{zero:.1f},{top + _HEAD:.1f}V{y + _ROW * len(found):.1f}" stroke="{_MUTED}"/>')
    for one in found:
        if one.rule.expects == "same":
            left, right = (_place(side * one.rule.margin, -reach, reach) for side in (-1, 1))
            parts.append(
                f'<rect x="{left:.1f}" y="{y + 2:.1f}" width="{right - left:.1f}" height="{_ROW - 4:g}" '
                f'fill="{_LINE}"/>'
            )
        text = f"{100 * one.estimate.value:+.1f}"
        _row(parts, y, one.rule.says, one.estimate, _VERDICTS[one.verdict], -reach, reach, text)
        y += _ROW
    height = y + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:.0f}" role="img" '
        f'style="background:#fff" font-family="system-ui,sans-serif" font-size="11">'
        f"<title>{escape(conclusion.title)}: {conclusion.verdict}</title>{''.join(parts)}</svg>"
    )


def _place(value: float, low: float, high: float) -> float:
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _panel(parts: list[str], y: float, title: str, low: float, high: float) -> float:
    """A heading with its scale; return where the rows begin."""
    parts.append(_text(8, y + 16, title, weight=600))
    for step in range(5):
        value = low + (high - low) * step / 4
        parts.append(_text(_place(value, low, high), y + 28, f"{100 * value:.0f}", anchor="middle", fill=_MUTED))
    return y + _HEAD


def _row(
    parts: list[str], y: float, label: str, estimate: Estimate, colour: str, low: float, high: float, text: str
) -> None:
    middle = y + _ROW / 2
    left, at, right = (_place(value, low, high) for value in (estimate.low, estimate.value, estimate.high))
    shown = label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"
    parts.append(_text(_LEFT - 10, middle + 4, shown, anchor="end"))
    parts.append(f'<path d="M{left:.1f},{middle:.1f}H{right:.1f}" stroke="{colour}" stroke-width="2"/>')
    for value in estimate.by_seed:
        parts.append(f'<circle cx="{_place(value, low, high):.1f}" cy="{middle:.1f}" r="1.6" fill="{_MUTED}"/>')
    parts.append(
        f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4" fill="{colour}"><title>{escape(label)}: {text}</title></circle>'
    )
    parts.append(_text(_WIDTH - _RIGHT + 12, middle + 4, text))


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = _INK, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{fill};font-weight:{weight}">'
        f"{escape(text)}</text>"
    )
