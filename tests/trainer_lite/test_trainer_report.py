"""report.html is one page without scripts or links that holds what was put in; charts put points where they belong."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageChops

from trainer_lite import IndexProgress, Picture, Report, Share, StepRecord
from trainer_lite.charts import Curve, line_chart, smooth
from trainer_lite.report import embed


def records(stage: str, losses: list[float]) -> list[StepRecord]:
    return [
        StepRecord(
            stage=stage,
            step=step,
            loss=loss,
            loss_hex=loss.hex(),
            target_tokens=1,
            tokens_per_s=1.0,
            grad_norm=1.0,
            lr=0.1,
            samples_digest="0",
            skipped={},
        )
        for step, loss in enumerate(losses, start=1)
    ]


class Checked(HTMLParser):
    """Fails on a tag closed out of order, and gathers the tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def parse(page: str) -> Checked:
    parser = Checked()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture
def page(tmp_path) -> str:
    picture = Image.new("RGB", (40, 30), "red")
    report = Report("run <one>", "seed & device")
    report.add_facts({"wall clock": "9 min"})
    report.add_text("Notes", "first <script>alert(1)</script>\n\nsecond")
    report.add_loss_curves([*records("sft", [3.0, 2.0, 1.0]), *records("dpo", [0.7])])
    report.add_table(
        "Skills", ["skill", "before", "n"], [["colour", Share(0.5, 0.25, 0.75, 500), 500], ["x", None, 1.5]]
    )
    report.add_pictures(
        "Answers",
        [Picture(picture, "what?", {"answer": "<red>"}, tiles=[picture, picture], is_correct=False), Picture(picture)],
    )
    report.write(tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_report_is_well_formed_and_stands_alone(page):
    parsed = parse(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    addresses = [attrs[key] or "" for _, attrs in parsed.tags for key in ("src", "href", "xlink:href") if key in attrs]
    assert len(addresses) == 4
    assert all(address.startswith("data:image/") for address in addresses)
    assert "http" not in page
    assert "url(" not in page
    assert "prefers-color-scheme:dark" in page


def test_report_holds_what_was_added(page):
    parsed = parse(page)
    assert (parsed.count("svg"), parsed.count("img"), parsed.count("tr")) == (2, 4, 3)
    for text in ("run &lt;one&gt;", "seed &amp; device", "first &lt;script&gt;", "<p>second</p>", "&lt;red&gt;", "✗"):
        assert text in page
    assert "50.0 % of 500, interval 25.0 to 75.0 %" in page
    assert "left:25.0%;width:50.0%" in page
    assert "✓" not in page


def test_report_table_row_of_another_length():
    with pytest.raises(ValueError, match="table 'Skills', row 1: expected 2 cells, got 1; use None for none"):
        Report("x").add_table("Skills", ["skill", "n"], [["a", 1], ["b"]])


def test_share_refuses_percentages():
    assert Share(1.0, 0.9, 1.0 + 1e-12, 7).count == 7
    for value, low, high in ((50.0, 40.0, 60.0), (0.5, 0.6, 0.7), (float("nan"), 0.0, 1.0)):
        with pytest.raises(ValueError, match="give shares, not percentages"):
            Share(value, low, high, 10)


def test_embed_keeps_the_picture_and_shrinks_it():
    image = Image.new("RGBA", (500, 10), (10, 200, 30, 255))
    kind, _, content = embed(image, 100).partition(";base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/png"
    assert decoded.size == (100, 2)
    assert ImageChops.difference(decoded.convert("RGB"), Image.new("RGB", (100, 2), (10, 200, 30))).getbbox() is None
    assert image.size == (500, 10)


def path_points(svg: str, css_class: str) -> list[list[tuple[float, float]]]:
    paths = re.findall(rf'class="{css_class}"[^>]* d="M([^"]+)"', svg)
    pairs = [[pair.split(",") for pair in path.split("L")] for path in paths]
    return [[(float(x), float(y)) for x, y in line] for line in pairs]


def test_chart_puts_decades_at_equal_distances():
    (line,) = path_points(line_chart({"loss": Curve([0, 1, 2], [100.0, 10.0, 1.0])}, is_log=True), "raw")
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)
    assert y0 < y1 < y2


def test_chart_leaves_out_what_has_no_place():
    curve = Curve([1, 2, 3, 4, 5], [1.0, math.nan, -2.0, math.inf, 4.0])
    (logarithmic,) = path_points(line_chart({"loss": curve}, is_log=True), "raw")
    (linear,) = path_points(line_chart({"loss": curve}), "raw")
    assert (len(logarithmic), len(linear)) == (2, 3)
    assert "no finite values" in line_chart({"loss": Curve([1], [math.nan])})


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [1e-30, 1e30], [1e-9, 2e-9], [0.0, 0.0]])
@pytest.mark.parametrize("is_log", [False, True])
def test_chart_of_awkward_ranges_stays_inside(values, is_log):
    svg = line_chart({"a": Curve(range(len(values)), values), "b": Curve([0], [1.0])}, is_log=is_log)
    parse(svg)
    assert "nan" not in svg
    numbers = [pair for line in path_points(svg, "raw") for pair in line]
    assert all(0 <= x <= 420 and 0 <= y <= 240 for x, y in numbers)
    assert svg.count("<text") < 30


def test_chart_of_many_points_is_thinned_but_keeps_the_ends():
    full = Curve(range(10_001), [1.0 + step for step in range(10_001)])
    (line,) = path_points(line_chart({"loss": full}), "raw")
    assert len(line) <= 402
    # The picture's left and right margins are 46 and 12 of 420.
    assert (line[0][0], line[-1][0]) == (46.0, 408.0)


def test_smooth_by_hand():
    # Window 2 halves the weight with each step away: (1/2 * 0 + 1 * 4 + 1/2 * 4) / 2 in the middle.
    assert smooth([0.0, 4.0, 4.0], 2.0, is_log=False) == pytest.approx([3 / 1.75, 3.0, 6 / 1.75])
    assert smooth([1.0, 100.0, 1.0], 1.0, is_log=True) == pytest.approx([1.0, 100.0, 1.0])
    assert smooth([1.0, 100.0], 2.0, is_log=True) == pytest.approx([100 ** (1 / 3), 100 ** (2 / 3)])


def test_curve_of_unequal_lengths():
    with pytest.raises(ValueError, match="expected as many steps as values, got 2 and 1; pair them"):
        Curve([1, 2], [1.0])


def test_index_progress_tells_of_large_shards_where_there_is_no_terminal():
    buffer = io.StringIO()
    with IndexProgress(buffer) as on_index:
        on_index("/data/small.tar", 10, 10)
        on_index("/data/large.tar", 1 << 20, 1 << 27)
        on_index("/data/large.tar", 1 << 20, 1 << 27)
    assert buffer.getvalue() == "indexing large.tar, 134,217,728 bytes\n"


def test_index_progress_is_a_bar_for_each_shard_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with IndexProgress(terminal) as on_index:
        on_index("/data/a.tar", 50, 100)
        on_index("/data/b.tar", 7, 7)
    said = terminal.getvalue()
    assert "index a.tar" in said
    assert "index b.tar" in said
