"""The run folder: what stays, what is pruned, what is refused; and metrics.jsonl after a kill."""

import io
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from trainer_lite import (
    MetricsLog,
    PhaseTimer,
    RunFolder,
    StepRecord,
    TqdmProgress,
    TrainConfig,
    read_metrics,
    write_atomically,
)


def record(stage: str, step: int, loss: float = 1.5) -> StepRecord:
    return StepRecord(
        stage=stage,
        step=step,
        loss=loss,
        loss_hex=loss.hex(),
        target_tokens=2,
        tokens_per_s=3.0,
        grad_norm=0.5,
        lr=0.1,
        samples_digest="0" * 16,
        skipped={},
    )


def names(run: RunFolder) -> list[str]:
    return [path.name for path in run.checkpoints()]


def save(run: RunFolder, step: int, keep_last: int = 2, **manifest: object) -> None:
    def write(path: Path) -> None:
        path.write_text(str(step))

    run.save_checkpoint(step, {"a.txt": write}, manifest, keep_last)


def test_create_saves_the_config_and_refuses_a_second_time(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "one", TrainConfig(max_steps=3))
    assert json.loads(run.config_path.read_text())["max_steps"] == 3
    with pytest.raises(FileExistsError, match="expected none or an empty one, got a run; resume it or choose another"):
        RunFolder.create(tmp_path / "runs" / "one", {})


def test_prune_keeps_the_last_and_the_ends_of_stages(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(1, 8):
        save(run, step, is_kept=step == 2)
    assert names(run) == ["step-00000002", "step-00000006", "step-00000007"]
    assert run.latest_path.read_text() == "step-00000007\n"
    save(run, 8, keep_last=1)
    assert names(run) == ["step-00000002", "step-00000008"]


def test_failed_save_leaves_everything_as_it_was(tmp_path):
    run = RunFolder(tmp_path)
    save(run, 1, keep_last=1)

    def fail(path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run.save_checkpoint(2, {"a.txt": fail}, {}, keep_last=1)
    assert names(run) == ["step-00000001"]
    assert run.latest_path.read_text() == "step-00000001\n"
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.parametrize("damage", ["manifest missing", "manifest garbled", "file missing", "file cut", "bit flipped"])
def test_find_checkpoint_falls_back_and_names_the_damage(tmp_path, damage):
    """(T4)"""
    run = RunFolder(tmp_path)
    save(run, 1)
    save(run, 2)
    folder = run.checkpoints_path / "step-00000002"
    if damage == "manifest missing":
        (folder / "MANIFEST.json").unlink()
    elif damage == "manifest garbled":
        (folder / "MANIFEST.json").write_bytes(b'{"files": {"\xff": {}}}')
    elif damage == "file missing":
        (folder / "a.txt").unlink()
    else:
        (folder / "a.txt").write_text("" if damage == "file cut" else "3")
    found = run.find_checkpoint()
    assert found.path == run.checkpoints_path / "step-00000001"
    assert len(found.refused) == 1
    assert "step-00000002" in found.refused[0]
    assert ("MANIFEST.json" if "manifest" in damage else "a.txt") in found.refused[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path):
    run = RunFolder(tmp_path)
    save(run, 1)
    save(run, 2)
    (run.checkpoints_path / "step-00000002" / "MANIFEST.json").unlink()
    save(run, 2)
    assert run.find_checkpoint().path == run.checkpoints_path / "step-00000002"


def test_find_checkpoint_prefers_latest_and_survives_its_loss(tmp_path):
    run = RunFolder(tmp_path)
    assert run.find_checkpoint().path is None
    save(run, 1)
    save(run, 2)
    write_atomically(run.latest_path, b"step-00000001\n")
    assert run.find_checkpoint().path == run.checkpoints_path / "step-00000001"
    write_atomically(run.latest_path, b"\xff")
    assert run.find_checkpoint().path == run.checkpoints_path / "step-00000002"
    run.latest_path.unlink()
    assert run.find_checkpoint().path == run.checkpoints_path / "step-00000002"


def test_stage_ends_are_kept_and_numbered_across_stages(tiny, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    cfg = TrainConfig(max_steps=6, save_every=2, keep_last=1)
    first = tiny.trainer(cfg, run=run, with_files=True, stage="pretrain").fit()
    tiny.trainer(cfg, run=run, with_files=True, stage="sft", first_step=first.counters.step).fit()
    assert names(run) == ["step-00000006", "step-00000012"]
    manifest = json.loads((run.checkpoints()[1] / "MANIFEST.json").read_text())
    assert (manifest["stage"], manifest["step"], manifest["is_kept"]) == ("sft", 6, True)
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}


def test_metrics_rewind_forgets_redone_steps_and_later_stages(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind("sft", 3)
    for stage, step in (("pretrain", 1), ("pretrain", 2), ("sft", 1), ("sft", 2), ("sft", 3), ("dpo", 1)):
        log.append(record(stage, step))
    log.rewind("sft", 2)
    assert [(line.stage, line.step) for line in read_metrics(log.path)] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("sft", 1),
        ("sft", 2),
    ]


def test_metrics_survive_a_cut_line_and_a_loss_that_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    parts = {"text": math.nan, "pictures": 0.5}
    log.append(msgspec.structs.replace(record("sft", 1, math.inf), parts=parts, evaluation={"loss": math.inf}))
    log.append(record("sft", 2))
    with log.path.open("ab") as file:
        file.write(b'{"stage":"sf')
    first, second = read_metrics(log.path)
    assert math.isnan(first.loss)
    assert first.loss_hex == "inf"
    assert math.isnan(first.parts["text"])
    assert first.parts["pictures"] == 0.5
    assert math.isnan(first.evaluation["loss"])
    assert second == record("sft", 2)
    log.rewind("sft", 9)
    log.append(record("sft", 3))
    assert [line.step for line in read_metrics(log.path)] == [1, 2, 3]


@pytest.mark.parametrize("line", [b'{"step": 2}', b'{"stage": "\xff"}', b"[]"])
def test_metrics_line_that_is_no_record(tmp_path, line):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record("sft", 1))
    with log.path.open("ab") as file:
        file.write(line + b"\n")
    for read in (read_metrics, lambda path: log.rewind("sft", 9)):
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a step record, got b"):
            read(log.path)


def test_phase_timer_adds_up_and_counts_failed_phases():
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("wait"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timer.phase("fail"):
        raise KeyError
    assert timer.seconds["wait"] >= 0.02
    assert set(timer.seconds) == {"wait", "fail"}
    assert timer.total_s == sum(timer.seconds.values())


def test_peak_rss_sees_a_large_array_and_stays_after_it():
    # In a process of its own: this one's peak may be far above what a test should allocate.
    code = (
        "from trainer_lite.measure import peak_rss_bytes as peak\n"
        "print(peak()); block = b'x' * (64 << 20); print(peak()); del block; print(peak())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, ran.stdout.split())
    assert 1 << 20 < before < 1 << 30
    assert during - before == pytest.approx(64 << 20, rel=0.1)
    # The kernel counts pages per thread and sums them up late, so the last pages come and go.
    assert after == pytest.approx(during, rel=0.02)


def test_progress_without_a_terminal_writes_lines_only(tiny):
    out = io.StringIO()
    tiny.trainer(TrainConfig(max_steps=7, log_every=3), progress=TqdmProgress(out), stage="sft").fit()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    pattern = (
        r"sft +3/7  loss \d\.\d{4}  absolute \d\.\d{4}  lr \d\.\d\de-\d\d  grad \d+\.\d{3}  [\d.]+k? tok/s  skipped 1 "
    )
    assert re.match(pattern + r"\(broken_image 1\)$", lines[0])


def test_a_sample_that_was_cut_is_no_skipped_one(tiny, tmp_path):
    class Cutting(tiny.stream):
        num_truncated = 2

    out, run = io.StringIO(), RunFolder.create(tmp_path / "run", {})
    more = {"progress": TqdmProgress(out), "stage": "sft", "run": run}
    tiny.trainer(TrainConfig(max_steps=3, log_every=1), stream=Cutting(), **more).fit()
    ends = [line.partition("tok/s")[2] for line in out.getvalue().splitlines()]
    assert ends == ["  truncated 2", "  truncated 2", "  skipped 1 (broken_image 1)  truncated 2"]
    assert [(line.skipped, line.truncated) for line in read_metrics(run.metrics.path)] == [
        ({}, 2), ({}, 2), ({"broken_image": 1}, 2),
    ]  # fmt: skip
