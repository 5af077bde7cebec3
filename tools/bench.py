"""Ours beside what people use, on this machine: a table, and rows for benchmarks/results/.

    uv run tools/bench.py step decode                      # some suites; see --help for their names
    uv run tools/bench.py kernels --json benchmarks/results/bench_cpu.json
    uv run tools/bench.py --json benchmarks/results/bench_cpu.json --readme README.md

Every comparison begins with a check that both sides compute the same; where they do not, no figure is given and the
exit status is 1. Times are taken in turn with two floors, a large matrix product and a large copy; `share` is how much
of its floor ours reached. Ratios above 1: ours is better.

`--json` keeps the rows of the file that were not measured anew, if they are of this device and its versions. Without a
suite nothing is measured: `--readme` then puts the rows of the file between the markers of a page.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

MARKERS = ("<!-- bench: begin -->", "<!-- bench: end -->")
SUITES = {
    "kernels": ("bench_kernels", "pairs"),
    "step": ("bench_step", "pairs"),
    "decode": ("bench_decode", "decode_pairs"),
    "prefill": ("bench_decode", "prefill_pairs"),
    "data": ("bench_pictures", "pairs"),
    "memory": ("bench_step", "footprints"),
    "dpo": ("bench_dpo", "rows"),
    "scaling": ("bench_scaling", "points"),
}
"""Name → module and function that gives what is to be measured."""


def number(value: float | None) -> str:
    """Three figures that count."""
    if value is None:
        return "—"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is shown."""
    ratio = "—" if row["ratio"] is None else f"{row['ratio']:.2f}×"
    share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
    ours, theirs = (f"{number(row[side])} {row['unit']}" for side in ("ours", "theirs"))
    return [row["suite"], row["name"], row["peer"], ours, theirs, ratio, share]


_HEAD = ["suite", "what", "peer", "ours", "theirs", "ratio", "share"]


def markdown(report: dict[str, Any]) -> str:
    """The README's table: what was measured, where, and with which command."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    # Points of growth are in the plot.
    rows = [cells(row) for row in report["rows"] if row["suite"] != "scaling"]
    lines = [_HEAD, ["---"] * 3 + ["--:"] * 4, *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{report['device']}, {report['threads']} threads; {versions}.\n\n{table}\n"


def write_table(page: Path, report: dict[str, Any]) -> None:
    """Put the table between the page's two markers.

    Raises:
        SystemExit: the page has not one of each, in order.
    """
    text = page.read_text()
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"--readme {page}: expected the lines {begin} and {end}, once and in this order; put them in")
    head, _, rest = text.partition(begin)
    page.write_text(f"{head}{begin}\n{markdown(report)}{end}{rest.partition(end)[2]}")


def merged(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, in place of the same rows of the file and beside its others.

    Raises:
        SystemExit: the file is of another device or of other versions.
    """
    if not path.exists():
        return found
    held = json.loads(path.read_text())
    other = [name for name in ("device", "cores", "threads", "versions") if held[name] != found[name]]
    if other:
        sys.exit(
            f"--json {path}: expected rows of the same {', '.join(other)}, got {held[other[0]]}; name another file"
        )
    rows = {(row["suite"], row["name"], row["peer"]): row for row in [*held["rows"], *found["rows"]]}
    order = list(SUITES)
    return {
        **found,
        "floors": {**held["floors"], **found["floors"]},
        "rows": sorted(rows.values(), key=lambda row: order.index(row["suite"])),
    }


def measure(suites: Iterable[str], rounds: int, only: str | None, on_row: Callable[[dict[str, Any]], None]) -> Any:
    """Run the suites in order; return the floors of each, as medians."""
    from bench_pairs import FloorGauge, Footprint, Pair, compare, weigh

    floors: dict[str, dict[str, float]] = {}
    for suite in suites:
        gauge = FloorGauge()
        module, function = SUITES[suite]
        for item in getattr(import_module(module), function)():
            if only is not None and only not in item.name:
                continue
            row = compare(item, gauge, rounds) if isinstance(item, Pair) else item
            on_row(asdict(weigh(row) if isinstance(row, Footprint) else row))
        floors[suite] = gauge.medians()
    return floors


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="bench", description="Ours beside what people use, on this machine.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--only", help="measure what has this in its name")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each side takes")
    parser.add_argument("--threads", type=int, help="by default as many as PyTorch takes")
    parser.add_argument(
        "--photos", type=Path, help="folder of photographs for the suite data; by default some are made"
    )
    parser.add_argument("--plot", type=Path, help="SVG file for the suite scaling")
    parser.add_argument("--json", type=Path, help="file of rows")
    parser.add_argument("--readme", type=Path, help="page whose table is made from the rows of --json")
    args = parser.parse_args()
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"suites: expected some of {', '.join(SUITES)}, got {unknown[0]}; choose from these")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}; give more")
    if args.readme is not None and args.json is None:
        parser.error("--readme: expected --json FILE beside it, got none; name the file of the rows")
    status = run(args) if args.suites else 0
    if args.readme is not None:
        write_table(args.readme, json.loads(args.json.read_text()))
    if status:
        sys.exit(status)


def run(args: argparse.Namespace) -> int:
    """Measure; 1 if a gate is red."""
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    from bench_pairs import machine

    if args.photos is not None:
        import_module("bench_pictures").read_from(args.photos)
    print("".join(f"{name:<{width}}" for name, width in zip(_HEAD, _WIDTHS, strict=True)))
    rows: list[dict[str, Any]] = []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        print("".join(f"{cell:<{width}}" for cell, width in zip(cells(row), _WIDTHS, strict=True)) + f"  {row['gate']}")
        sys.stdout.flush()

    floors = measure(args.suites, args.rounds, args.only, show)
    report = {**machine(), "floors": floors, "rows": rows}
    for suite, found in floors.items():
        print(f"{suite}: matrix product {found['matmul_gflops']:.0f} GFLOP/s, copy {found['copy_gb_per_s']:.1f} GB/s")
    if args.json is not None:
        report = merged(args.json, report)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot is not None:
        import_module("bench_scaling").write_plot(args.plot, report["rows"])
    return int(any(row["gate"].startswith("red") for row in rows))


_WIDTHS = (9, 62, 50, 18, 18, 8, 6)


if __name__ == "__main__":
    main()
