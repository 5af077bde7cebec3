"""The demo's command line and what it leaves behind, at toy length."""

import itertools
import json
import re
from pathlib import Path

import pytest

from blip3_lite import load_model
from blip3_lite.folder import read_manifest

STAGES = ["pretrain", "sft", "interleaved", "dpo", "safety"]


@pytest.fixture(scope="module")
def summary(toy_demo: Path) -> dict:
    return json.loads((toy_demo / "runs/demo/summary.json").read_text())


def test_summary_has_every_stage_and_skill_with_figures(summary: dict) -> None:
    assert list(summary["stages"]) == ["warmup", *STAGES]
    for name, stage in summary["stages"].items():
        assert len(stage["skills"]) >= 10
        # Before SFT a tenth of the questions is asked, one at least.
        asked = 1 if name in ("warmup", "pretrain") else 3
        for skill in stage["skills"].values():
            assert 0 <= skill["low"] <= skill["accuracy"] <= skill["high"] <= 1
            assert skill["n"] == asked
            assert 1 / asked <= skill["baseline"] <= 1
        mean = sum(skill["accuracy"] for skill in stage["skills"].values()) / len(stage["skills"])
        assert stage["overall"] == pytest.approx(mean)
    assert set(summary["wall_s"]) >= {"warmup", "evaluation", *STAGES}
    assert summary["peak_rss_bytes"] > 2**27


def test_metrics_have_one_line_a_step_with_every_field(toy_demo: Path) -> None:
    lines = [json.loads(line) for line in (toy_demo / "runs/demo/metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ["warmup", *STAGES] for step in (1, 2)
    ]
    wanted = {
        "stage",
        "step",
        "loss",
        "loss_hex",
        "target_tokens",
        "tokens_per_s",
        "grad_norm",
        "lr",
        "samples_digest",
        "skipped",
    }
    for line in lines:
        assert wanted <= line.keys()
        assert float.fromhex(line["loss_hex"]) == line["loss"]
        assert line["skipped"] == {}


def test_report_needs_no_network_and_shows_pictures(toy_demo: Path) -> None:
    page = (toy_demo / "runs/demo/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page
    assert page.count("data:image/") > 20
    head = "".join(f"<th>{name}</th>" for name in ["skill", "most frequent answer", "warmup", *STAGES])
    assert head in page


def test_only_the_stage_s_parts_move(toy_demo: Path) -> None:
    checkpoints = [
        load_model(path).model.state_dict() for path in sorted((toy_demo / "runs/demo/checkpoints").glob("step-*"))
    ]
    assert len(checkpoints) == 6
    for before, after in itertools.pairwise(checkpoints):
        moved = {name for name in after if name in before and not after[name].equal(before[name])}
        assert not any(name.startswith("vision_encoder") for name in moved)
    pretrained, tuned = checkpoints[1], checkpoints[2]
    assert any(not tuned[name].equal(pretrained[name]) for name in tuned if name.startswith("vision_tokenizer"))
    interleaved, dpo = checkpoints[3], checkpoints[4]
    assert any("lora_b" in name and dpo[name].abs().sum() > 0 for name in dpo)
    assert all(dpo[name].equal(interleaved[name]) for name in interleaved)


def test_final_model_has_its_adapters_merged(toy_demo: Path) -> None:
    loaded = load_model(toy_demo / "runs/demo/model")
    assert loaded.config.lora is None
    before = load_model(sorted((toy_demo / "runs/demo/checkpoints").glob("step-*"))[4]).model.state_dict()
    name = "lang_model.model.layers.0.mlp.down_proj.weight"
    assert not loaded.model.state_dict()[name].equal(before[name])


def test_checkpoints_are_whole(toy_demo: Path) -> None:
    folders = sorted((toy_demo / "runs/demo/checkpoints").glob("step-*"))
    assert [read_manifest(folder)["stage"] for folder in folders] == ["warmup", *STAGES]


def test_a_second_demo_takes_another_folder(toy_demo: Path, train) -> None:
    from train_demo import free_path

    assert free_path(str(toy_demo / "runs/demo")) == toy_demo / "runs/demo-2"
    assert free_path(str(toy_demo / "runs/other")) == toy_demo / "runs/other"


def test_the_short_exam_asks_the_first_of_each_skill(train) -> None:
    from eval_lite import exam_items
    from train_exam import first_of_each_skill

    items = exam_items(7, 0, ("colour", "count"))
    assert [item.group for item in items] == ["colour"] * 7 + ["count"] * 7
    assert first_of_each_skill(items, 0.2) == [0, 1, 7, 8]
    assert first_of_each_skill(items, 0.01) == [0, 7]
    assert first_of_each_skill(items, 1.0) == list(range(14))


def test_the_seed_of_the_demo_reaches_every_stage(train, parse) -> None:
    from train_demo import seeded

    config = seeded(parse("--seed", "3", "--sft.seed", "2"))
    seeds = {name: getattr(config, name).train.seed for name in ("warmup", *STAGES)}
    assert seeds == {"warmup": 3, "pretrain": 3, "sft": 5, "interleaved": 3, "dpo": 3, "safety": 3}


def test_a_stage_of_the_demo_can_train_the_tower(train, tmp_path: Path, toy_model, monkeypatch) -> None:
    import train_demo

    # One stage tells; all five take as long as they do in `toy_demo`.
    monkeypatch.setattr(train_demo, "STAGES", ("sft",))
    steps = ["--warmup.max-steps", "1", "--sft.max-steps", "1", "--sft.num-workers", "0"]
    trains = ["--sft.trains", "vision_encoder", "lang_model"]
    assert train("--eval-questions", "1", *steps, *trains, *toy_model) == 0
    paths = sorted((tmp_path / "runs/demo/checkpoints").glob("step-*"))
    before, after = (load_model(path).model.vision_encoder.state_dict() for path in paths)
    assert not after["embeddings.position_embedding.weight"].equal(before["embeddings.position_embedding.weight"])


def test_features_are_not_kept_of_a_tower_that_moves(train, parse, tiny_model, tiny_processor) -> None:
    from blip3_lite import FeatureCache
    from train_stream import make_stream
    from train_world import stage_data

    tiny_model.requires_grad_(False)
    stage, data = parse("sft", "--trains", "vision_encoder").stage, stage_data("sft", 1, 0)
    features = FeatureCache(tiny_model, 1 << 20)
    with pytest.raises(ValueError, match="features: expected none for a stage that trains the vision tower"):
        make_stream(stage, data, tiny_processor, features)


def test_a_stopped_demo_says_what_to_do_and_is_exit_130(train, toy_model, toy_flags, capsys, monkeypatch) -> None:
    import train_run
    from trainer_lite import StopFlag

    class Stopped(StopFlag):
        def __init__(self) -> None:
            super().__init__()
            self.set("SIGINT")

    monkeypatch.setattr(train_run, "StopFlag", Stopped)
    assert train(*toy_model) == 130
    said = capsys.readouterr().err
    assert "stopped in warmup at step 0; a demo cannot be continued" in said
    assert "--init runs/demo/checkpoints/step-00000000" in said
    assert train("warmup", *toy_flags) == 130
    assert "a warm-up cannot be continued" in capsys.readouterr().err
    assert train("sft", *toy_flags) == 130
    assert "continue with uv run apps/train sft --out runs/sft --resume" in capsys.readouterr().err
    # No step, no report.
    assert list(Path("runs").glob("*/report.html")) == []


def test_report_lists_what_each_stage_left_out(repo_root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "apps/train"))
    from train_report import add_left_out
    from trainer_lite import Report, StepRecord

    def record(stage: str, step: int, skipped: dict[str, int], truncated: int = 0) -> StepRecord:
        figures = {"loss": 1.0, "loss_hex": "0x1p+0", "target_tokens": 1, "tokens_per_s": 1.0, "grad_norm": 1.0}
        more = {"skipped": skipped, "truncated": truncated}
        return StepRecord(stage=stage, step=step, lr=0.1, samples_digest="", **more, **figures)

    report = Report("t", "")
    add_left_out(report, [record("sft", 1, {})])
    report.write(tmp_path / "none.html")
    assert "Left out" not in (tmp_path / "none.html").read_text()
    sft = [record("sft", 1, {"too_long": 1}), record("sft", 2, {"too_long": 3}, truncated=5)]
    add_left_out(report, [*sft, record("dpo", 1, {})])
    report.write(tmp_path / "some.html")
    cells = re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", (tmp_path / "some.html").read_text())
    assert cells == ["stage", "reason", "number", "sft", "too_long", "3", "stage", "samples", "sft", "5"]
