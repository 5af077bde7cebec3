"""report.html: what a run did, on one page that needs no network, no script and no other file.

    report = Report("demo")
    report.add_facts({"parameters": "2.2 M"})
    report.add_loss_curves(read_metrics(path))
    report.add_table("Skills", ["skill", "before", "after"], [["colour", Share(0.2, 0.17, 0.23, 500), ...]])
    report.add_pictures("Answers", [Picture(image, caption="What colour?", notes={"answer": "red"}, is_correct=True)])
    report.write(path)

All text is escaped; pictures are embedded. The page follows the reader's light or dark setting.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image

from .atomic import write_atomically
from .charts import Bar, Curve, line_chart, stacked_bars
from .metrics import StepRecord

PICTURE_PX = 320
"""Larger pictures are shrunk to this before they are embedded."""


@dataclass(frozen=True)
class Share:
    """A share with its interval, shown as a percentage over a bar."""

    value: float
    low: float
    high: float
    count: int
    """What the share is of."""

    def __post_init__(self) -> None:
        """Raise ValueError unless 0 <= low <= value <= high <= 1."""
        # Intervals computed in floating point may miss the ends by a rounding error.
        ends = (0.0, self.low, self.value, self.high, 1.0)
        if not all(lower <= upper + 1e-9 for lower, upper in pairwise(ends)):
            raise ValueError(
                f"share: expected 0 <= low <= value <= high <= 1, got {self.low}, {self.value}, {self.high}; "
                "give shares, not percentages"
            )


@dataclass(frozen=True)
class Picture:
    """A picture with what was asked and answered."""

    image: Image.Image
    caption: str = ""
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Short lines under the caption: label → text."""
    tiles: Sequence[Image.Image] = ()
    """What the model saw of it, shown small."""
    is_correct: bool | None = None
    """Marks the card; None leaves it unmarked."""


Cell = str | int | float | Share | None


class Report:
    """Sections, added in reading order and written once."""

    def __init__(self, title: str, subtitle: str = "", style: str = "") -> None:
        """`style`: CSS for what `add_html` adds."""
        self.title, self.subtitle, self._style = title, subtitle, _STYLE + style
        self._sections: list[str] = []

    def add_text(self, heading: str, text: str) -> "Report":
        """Add paragraphs; empty lines part them."""
        paragraphs = "".join(f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())
        return self._add(heading, paragraphs)

    def add_facts(self, facts: Mapping[str, object], heading: str = "") -> "Report":
        """Add short facts, label over value, side by side."""
        body = "".join(
            f"<div><dt>{escape(label)}</dt><dd>{escape(str(value))}</dd></div>" for label, value in facts.items()
        )
        return self._add(heading, f'<dl class="facts">{body}</dl>')

    def add_curves(self, heading: str, charts: Mapping[str, Mapping[str, Curve]], *, is_log: bool = False) -> "Report":
        """Add one chart per entry of `charts` (name → label → curve), side by side."""
        body = "".join(
            f'<figure class="card"><figcaption>{escape(name)}</figcaption>{line_chart(curves, is_log=is_log)}</figure>'
            for name, curves in charts.items()
        )
        return self._add(heading, f'<div class="charts">{body}</div>')

    def add_bars(self, heading: str, parts: Sequence[str], bars: Sequence[Bar], note: str = "") -> "Report":
        """Add stacked bars, one below the other, with a legend of their parts."""
        return self._add(heading, stacked_bars(parts, bars) + _note(note))

    def add_html(self, heading: str, html: str) -> "Report":
        """Add what is HTML already; whoever made it has escaped all text in it."""
        return self._add(heading, html)

    def add_loss_curves(self, records: Iterable[StepRecord], heading: str = "Loss by stage") -> "Report":
        """Add the loss of each stage over its steps, on logarithmic axes, smoothed."""
        stages: dict[str, list[StepRecord]] = {}
        for record in records:
            stages.setdefault(record.stage, []).append(record)
        charts = {
            stage: {"loss": Curve([record.step for record in steps], [record.loss for record in steps])}
            for stage, steps in stages.items()
        }
        return self.add_curves(heading, charts, is_log=True)

    def add_table(
        self, heading: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = ""
    ) -> "Report":
        """Add a table; the first column names the row.

        Raises:
            ValueError: a row of another length than the header.
        """
        for index, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(
                    f"table {heading!r}, row {index}: expected {len(header)} cells, got {len(row)}; use None for none"
                )
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(
            f"<tr><th>{_cell(row[0])}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
        )
        table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        return self._add(heading, table + _note(note))

    def add_pictures(self, heading: str, pictures: Sequence[Picture]) -> "Report":
        """Add cards of a picture, its tiles, caption and notes."""
        return self._add(heading, f'<div class="pictures">{"".join(_card(picture) for picture in pictures)}</div>')

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        subtitle = f'<p class="muted">{escape(self.subtitle)}</p>' if self.subtitle else ""
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{self._style}</style></head>"
            f"<body><main><header><h1>{escape(self.title)}</h1>{subtitle}</header>"
            f"{''.join(self._sections)}</main></body></html>\n"
        )
        write_atomically(path, page.encode())

    def _add(self, heading: str, body: str) -> "Report":
        title = f"<h2>{escape(heading)}</h2>" if heading else ""
        self._sections.append(f"<section>{title}{body}</section>")
        return self


def _note(text: str) -> str:
    return f'<p class="muted note">{escape(text)}</p>' if text else ""


def _cell(cell: Cell) -> str:
    if cell is None:
        return '<span class="muted">–</span>'
    if isinstance(cell, Share):
        low, value, high = (100 * number for number in (cell.low, cell.value, cell.high))
        return (
            f'<div class="share" title="{value:.1f} % of {cell.count}, interval {low:.1f} to {high:.1f} %">'
            f"<b>{value:.1f}</b><small>{low:.0f}–{high:.0f}</small>"
            f'<div class="bar"><i style="width:{value:.1f}%"></i>'
            f'<u style="left:{low:.1f}%;width:{max(0.5, high - low):.1f}%"></u></div></div>'
        )
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return escape(str(cell))


def _card(picture: Picture) -> str:
    mark = {True: '<b class="good">✓</b>', False: '<b class="bad">✗</b>', None: ""}[picture.is_correct]
    tiles = "".join(f'<img src="{embed(tile, 96)}" alt="tile {index + 1}">' for index, tile in enumerate(picture.tiles))
    notes = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in picture.notes.items())
    return (
        f'<figure class="card"><img src="{embed(picture.image, PICTURE_PX)}" alt="{escape(picture.caption)}">'
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + f"<figcaption>{mark}{escape(picture.caption)}</figcaption>"
        + (f'<dl class="notes">{notes}</dl>' if notes else "")
        + "</figure>"
    )


def embed(image: Image.Image, max_px: int) -> str:
    """Return a data URI of the image, shrunk to fit max_px: whichever of PNG and JPEG is smaller."""
    image = image.convert("RGB")
    image.thumbnail((max_px, max_px))
    encoded: list[tuple[int, Literal["png", "jpeg"], bytes]] = []
    for kind in ("png", "jpeg"):
        buffer = io.BytesIO()
        image.save(buffer, kind, optimize=True, **({"quality": 88} if kind == "jpeg" else {}))
        encoded.append((buffer.tell(), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


_STYLE = """
:root{color-scheme:light dark;--page:#fafaf8;--card:#fff;--ink:#1d1f22;--muted:#6b7078;--line:#e3e4e0;
--series-1:#2f6fde;--series-2:#d9682b;--series-3:#2a9d6f;--series-4:#a24bc4;--series-5:#c2992a;--series-6:#cf3f67;
--good:#1f8a5b;--bad:#c93a3a}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--card:#1d2024;--ink:#e6e7e9;--muted:#989ea8;--line:#30343a;
--series-1:#78a6ff;--series-2:#f0945f;--series-3:#57c99a;--series-4:#cf8cec;--series-5:#e3bf5d;--series-6:#f07d9d;
--good:#57c99a;--bad:#f07d7d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:17px;margin:36px 0 12px}p{margin:0 0 10px;max-width:75ch}
.muted{color:var(--muted)}
.card{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:18px 0 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:9px 12px}
.facts dt{color:var(--muted);font-size:12.5px}.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:12px}
.charts figcaption{font-weight:600;margin:0 0 4px}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg path{fill:none}.grid{stroke:var(--line)}.raw{stroke-width:1;opacity:.28}.trend{stroke-width:2;stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:12.5px;color:var(--muted);margin-top:4px}
.legend i{display:inline-block;width:10px;height:3px;border-radius:2px;margin-right:5px;vertical-align:middle}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;vertical-align:middle;white-space:nowrap}
tbody tr{border-top:1px solid var(--line)}
thead th{color:var(--muted);font-weight:500;font-size:12.5px}th:first-child{text-align:left}tbody th{font-weight:500}
.note{margin-top:8px;font-size:13.5px}.share b{font-weight:600}.share small{color:var(--muted);margin-left:6px}
.bar{position:relative;height:4px;min-width:84px;margin-top:2px;border-radius:2px;background:var(--line)}
.bar i{position:absolute;inset:0 auto 0 0;background:var(--series-1);border-radius:2px}
.bar u{position:absolute;top:-2px;height:8px;border:solid var(--ink);border-width:0 1px;opacity:.6}
.bars{display:grid;grid-template-columns:auto 1fr auto;gap:3px 10px;align-items:center;font-size:12.5px}
.bars a{color:inherit;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;max-width:30ch}
.bars div{display:flex;height:11px}.bars i{min-width:0}.bars b{font-weight:500;text-align:right;color:var(--muted)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:12px;align-items:start}
.pictures .card>img{display:block;width:100%;border-radius:6px;background:var(--line)}
.pictures figcaption{font-weight:600;margin-top:8px}.tiles{display:flex;flex-wrap:wrap;gap:4px;margin-top:6px}
.tiles img{width:44px;border-radius:3px;border:1px solid var(--line)}
.notes{display:grid;grid-template-columns:auto 1fr;gap:2px 10px;margin:6px 0 0;font-size:13.5px}
.notes dt{color:var(--muted)}.notes dd{margin:0;overflow-wrap:anywhere}
.good{color:var(--good);margin-right:6px}.bad{color:var(--bad);margin-right:6px}
@media print{.card,.facts div,.scroll{break-inside:avoid}}
"""
