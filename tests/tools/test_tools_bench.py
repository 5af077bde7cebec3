"""The benchmark: what it takes as red, how it makes a ratio, what it counts, and the table it writes."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from anyres_tiler import TilingConfig, tile_image
from phi3_lite import Phi3Config

TINY = Phi3Config(vocab_size=64, width=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=48)
ROW = {
    "suite": "step", "name": "a step", "peer": "somebody", "ours": 2.0, "theirs": 4.0, "unit": "ms", "ratio": 2.0,
    "share_of_floor": 0.5, "gate": "loss within 1e-7",
}  # fmt: skip
REPORT = {"device": "a CPU", "cores": 2, "threads": 2, "versions": {"torch": "2"}, "floors": {}, "rows": [ROW]}


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """Name → module of tools/."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


class Gauge:
    """Floors that stand still."""

    def __init__(self, floors) -> None:
        self.measure = lambda: floors


def _pair(pairs: ModuleType, **changes):
    def never() -> float:
        raise AssertionError("timed though the gate is red")

    given = {
        "suite": "step", "name": "x", "peer": "y", "ours": never, "theirs": never, "check": lambda: "equal", **changes
    }  # fmt: skip
    return pairs.Pair(**given)


def test_no_figure_is_given_where_the_gate_is_red(tool) -> None:
    pairs = tool("bench_pairs")

    def check() -> str:
        return pairs.agree("loss", torch.ones(3), torch.ones(3) * 1.01, 1e-3)

    row = pairs.compare(_pair(pairs, check=check), Gauge(None), 3)
    assert (row.ours, row.theirs, row.ratio, row.share_of_floor) == (None, None, None, None)
    assert row.is_red
    assert "expected a relative error of at most 1e-03, got 9.9e-03" in row.gate
    with pytest.raises(pairs.GateError):
        pairs.agree("loss", torch.tensor([float("nan")]), torch.ones(1), 1.0)


@pytest.mark.parametrize(("unit", "ours", "theirs"), [("ms", 2000.0, 6000.0), ("tokens/s", 50.0, 50 / 3)])
def test_ratio_is_the_median_of_the_rounds_and_above_one_where_ours_is_faster(tool, unit, ours, theirs) -> None:
    pairs = tool("bench_pairs")
    # a warm-up, then three rounds, the second of them on a machine three times as slow
    own, other = iter([9.0, 2.0, 6.0, 1.0]), iter([9.0, 6.0, 18.0, 4.0])
    pair = _pair(
        pairs,
        unit=unit,
        amount=100.0,
        ours=lambda: next(own),
        theirs=lambda: next(other),
        least_s=lambda floors: 8 / floors.flops_per_s,
    )
    row = pairs.compare(pair, Gauge(pairs.Floors(8.0, 1.0)), 3)
    assert (row.ours, row.theirs, row.ratio, row.share_of_floor) == (ours, pytest.approx(theirs), 3.0, 0.5)


def test_counted_operations_are_those_of_the_peers_matrix_products(tool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    models = tool("bench_models")
    batch = models.text_batch([5, 9, 7], 2, TINY.vocab_size)
    step = models.LMStep(TINY, torch.float32, batch, is_ours=False)
    step.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        step.loss().backward()
    assert models.lm_flops(TINY, [9, 9, 9], 27) == counter.get_total_flops()


def test_both_sides_of_a_step_compute_the_same(tool) -> None:
    models = tool("bench_models")
    assert "gradient within" in models.same_lm(TINY, torch.float32, models.text_batch([5, 9, 7], 2, TINY.vocab_size))
    cfg = models.demo_joined()
    assert "loss within" in models.same_joined(cfg, models.picture_batch(cfg, (1, 3), (9, 12), 4))


def test_second_turn_reads_the_bytes_of_all_weights_but_the_embedding(tool) -> None:
    decode, models = tool("bench_decode"), tool("bench_models")
    model = models.random_lm(TINY, torch.bfloat16)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32 + 64 * 32
    assert decode.bytes_per_token(model, 10) == 2 * (weights + 2 * 2 * 32 * 10)


def _main(tool, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    try:
        tool("bench").main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def test_table_is_put_between_the_markers_and_nothing_else_is_touched(tool, monkeypatch, tmp_path: Path) -> None:
    begin, end = tool("bench").MARKERS
    page, rows = tmp_path / "README.md", tmp_path / "rows.json"
    scaling = {**ROW, "suite": "scaling", "name": "step at tokens = 512"}
    rows.write_text(json.dumps({**REPORT, "rows": [ROW, scaling]}))
    page.write_text(f"before\n{begin}\nold\n{end}\nbehind\n")
    for _ in range(2):
        assert _main(tool, monkeypatch, "--json", rows, "--readme", page) == 0
        assert page.read_text() == (
            f"before\n{begin}\na CPU, 2 threads; torch 2.\n\n"
            "| suite | what | peer | ours | theirs | ratio | share |\n| --- | --- | --- | --: | --: | --: | --: |\n"
            f"| step | a step | somebody | 2 ms | 4 ms | 2.00× | 50% |\n{end}\nbehind\n"
        )
    page.write_text("no markers\n")
    assert _main(tool, monkeypatch, "--json", rows, "--readme", page) == 1
    assert page.read_text() == "no markers\n"


def test_rows_of_another_machine_are_not_mixed_and_others_are_kept(tool, tmp_path: Path) -> None:
    bench, path = tool("bench"), tmp_path / "rows.json"
    path.write_text(json.dumps({**REPORT, "rows": [ROW, {**ROW, "name": "another"}]}))
    merged = bench.merged(path, {**REPORT, "rows": [{**ROW, "ratio": 3.0}]})
    assert [(row["name"], row["ratio"]) for row in merged["rows"]] == [("a step", 3.0), ("another", 2.0)]
    with pytest.raises(SystemExit, match="expected rows of the same device"):
        bench.merged(path, {**REPORT, "device": "a GPU", "rows": []})


def test_a_red_row_is_the_exit_status_and_is_saved(tool, monkeypatch, tmp_path: Path) -> None:
    pairs, step = tool("bench_pairs"), tool("bench_step")

    def check() -> str:
        raise pairs.GateError("tokens: expected these, got those")

    monkeypatch.setattr(step, "pairs", lambda: iter([_pair(pairs, check=check)]))
    monkeypatch.setattr(pairs, "_COPY_BYTES", 1 << 16)
    assert _main(tool, monkeypatch, "step", "--rounds", 1, "--json", tmp_path / "rows.json") == 1
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(row) == set(ROW)
    assert row["gate"] == "red: tokens: expected these, got those"


def test_a_suite_that_is_not_there_is_named(tool, monkeypatch, capsys) -> None:
    assert _main(tool, monkeypatch, "speed") == 2
    assert "got speed; choose from these" in capsys.readouterr().err


def _same_tiles(tool, ours: torch.Tensor, theirs: torch.Tensor, *steps: torch.Tensor) -> str:
    # steps: with columns first, and with rows first where that differs
    return tool("bench_pictures").same_tiles(
        [b""], lambda _: ours, lambda _: theirs / 127.5 - 1, lambda _, rows_first: steps[-1 if rows_first else 0]
    )


def test_tiles_that_differ_are_red(tool) -> None:
    red = tool("bench_pairs").GateError
    steps = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    off_by_one = steps + 1
    assert _same_tiles(tool, steps, off_by_one.float(), steps).endswith("but for 0e+00 of a picture's values")
    with pytest.raises(red, match=r"theirs: expected at most 1e-05 .* got 1\.0e"):
        _same_tiles(tool, steps, steps + 2.0, steps)
    with pytest.raises(red, match="ours: expected at most 1e-05"):
        _same_tiles(tool, steps + 2, steps.float(), steps)
    with pytest.raises(red, match="expected tiles \\(2, 3, 4, 4\\), got \\(1, 3, 4, 4\\)"):
        _same_tiles(tool, steps, steps[:1].float(), steps)


def test_a_peer_may_resize_rows_first_but_not_we(tool) -> None:
    columns_first = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    rows_first = columns_first + 9
    mixed = torch.stack([columns_first[0], rows_first[1]])
    _same_tiles(tool, columns_first, mixed.float(), columns_first, rows_first)
    with pytest.raises(tool("bench_pairs").GateError, match="ours"):
        _same_tiles(tool, rows_first, mixed.float(), columns_first, rows_first)


def test_steps_one_by_one_lie_where_ours_do(tool) -> None:
    # 9 × 31 onto 8 × 24: fitted to 7 × 24, a column of black at the right
    noise = torch.randint(0, 256, (31, 9, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    cfg = TilingConfig(tile_px=8)
    pinpoints = [[8 * rows, 8 * columns] for columns, rows in cfg.grids]
    pictures = tool("bench_pictures")
    steps = [pictures.stepwise_tiles(image, pinpoints, rows_first=rows_first) for rows_first in (False, True)]
    own = tile_image(image, cfg).pixels
    assert int((own.int() - steps[0].int()).abs().max()) <= 1
    assert int((own.int() - steps[1].int()).abs().max()) > 1
    assert not steps[0][1:, :, :, -1].any()


def test_plot_has_every_point_in_order_of_growth(tool, tmp_path: Path) -> None:
    scaling = tool("bench_scaling")
    rows = [
        {**ROW, "suite": "scaling", "name": f"{what} at {axis} = {value}", "ours": float(value), "theirs": 2.0 * value}
        for what in ("step", "memory")
        for axis, values in scaling.AXES.items()
        for value in values
    ]
    scaling.write_plot(tmp_path / "plot.svg", rows)
    import xml.etree.ElementTree as ET

    drawn = ET.parse(tmp_path / "plot.svg").getroot()
    circles = [node for node in drawn.iter() if node.tag.endswith("circle")]
    assert len(circles) == 2 * len(rows)
    first = [float(node.get("cy", 0)) for node in circles[: len(scaling.AXES["tokens"])]]
    assert first == sorted(first, reverse=True)
    assert (tmp_path / "plot.svg").stat().st_size < 50_000
