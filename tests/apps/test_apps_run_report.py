"""report.html of a run that is no demo: well formed, alone on its page, and true to metrics.jsonl."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Fails on a tag closed out of order, or what would fetch or run something; gathers headings, cells and curves."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.num_points: list[int] = []
        self.feed(file.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in ("script", "link", "iframe", "a")
        assert not given.keys() & {"src", "href", "onload"}
        if tag != "meta":
            self.open.append((tag, given.get("class")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._count(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1][0], []).append(data)

    def _count(self, given: dict[str, str | None]) -> None:
        if given.get("class") == "raw":
            self.num_points.append(len(re.findall(r"[ML]", given["d"] or "")))


def test_a_stage_leaves_a_page_of_its_curves_and_of_what_was_left_out_and_cut(
    train, tmp_path: Path, toy_flags, llava_data: Path, capsys
) -> None:
    rows = json.loads((llava_data.parent / "train.json").read_text())
    rows[0]["image"] = "missing<1>.png"
    rows[3]["conversations"][1]["value"] = "long " * 2000
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "data.toml").write_text(
        f'[[sources]]\nname = "bad"\nformat = "llava-json"\npath = "train.json"\nimage_root = "{llava_data.parent}"\n'
        "[skip_limits]\nmax_share = 0.9\n"
    )
    command = ["sft", "--data", "data.toml", "--out", "mine", *toy_flags, "--too-long", "truncate-text"]
    assert train(*command, "--max-steps", "5") == 0
    assert "report mine/report.html" in capsys.readouterr().err
    page = Page(tmp_path / "mine/report.html")
    lines = [json.loads(line) for line in (tmp_path / "mine/metrics.jsonl").read_text().splitlines()]
    assert page.texts["h1"] == ["Run of sft"]
    assert page.texts["h2"] == ["Loss by stage", "Course of sft", "Left out", "Kept, but cut to fit"]
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["steps"] == "5"
    assert facts["last loss"] == f"{lines[-1]['loss']:.4f}"
    assert facts["target tokens (or pairs)"] == f"{sum(line['target_tokens'] for line in lines):,}"
    # Loss, tokens/s, learning rate, gradient norm, wait: a point each step.
    assert page.num_points == [5] * 5
    skipped, cut = lines[-1]["skipped"], lines[-1]["truncated"]
    assert page.texts["td"] == ["unreadable_file", str(skipped["unreadable_file"]), str(cut)]


def test_a_warm_up_s_page_shows_what_its_objective_says_besides(train, tmp_path: Path, toy_model) -> None:
    sizes = ["--max-steps", "3", "--batch-size", "2", "--world-samples", "6"]
    assert train("warmup", *toy_model, *sizes) == 0
    page = Page(tmp_path / "runs/warmup/report.html")
    assert page.texts["h2"] == ["Loss by stage", "Course of warmup"]
    assert page.texts["figcaption"][-3:] == ["colour", "form", "symbol"]
    assert page.num_points == [3] * 8


def test_scores_stand_side_by_side(repo_root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "apps/train"))
    from eval_lite import GroupScore
    from train_exam import StageScores
    from train_report import write_run_report
    from trainer_lite import MetricsLog, RunFolder, StepRecord

    def scores(accuracy: float) -> StageScores:
        skill = GroupScore(n=4, accuracy=accuracy, low=0.1, high=0.9, baseline=0.25, skipped={})
        return StageScores(
            overall=accuracy, absent_f1=0, refused_private=0, refused_lookalikes=0, skills={"box": skill}
        )

    run = RunFolder(tmp_path)
    shown = {"right": scores(0.75), "exchanged": scores(0.25)}
    assert not write_run_report(run, "x", {}, shown)
    assert not run.report_path.exists()
    figures = {"loss": 1.0, "loss_hex": "0x1p+0", "target_tokens": 1, "tokens_per_s": 1.0, "grad_norm": 1.0}
    MetricsLog(run.metrics.path).append(StepRecord(stage="x", step=1, lr=0.1, samples_digest="", skipped={}, **figures))
    assert write_run_report(run, "x", {"made <by>": "hand"}, shown)
    page = Page(run.report_path)
    assert page.texts["th"] == ["skill", "most frequent answer", "right", "exchanged", "box", "overall"]
    assert page.texts["td"] == ["25%", "75.0%", "25.0%"]
    assert [text for text in page.texts["b"] if text.strip()] == ["75.0", "25.0"]
    assert "made <by>" in page.texts["dt"]
