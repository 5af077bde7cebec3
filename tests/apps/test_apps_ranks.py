"""`torchrun … apps/train`: a stage with pictures on several processes, judged by the run folder that it leaves."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from blip3_lite import load_model

STEPS = 6


def course(folder: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["samples_digest"], line["loss"]) for line in lines]


def torchrun(repo_root: Path, cwd: Path, count: int, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*command, str(repo_root / "apps/train"), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.returncode, done.stderr


@pytest.fixture
def stage(toy_flags) -> list[str]:
    """Questions with and without pictures, four packs a step, adamw."""
    steps = ["--max-steps", str(STEPS), "--accumulation-steps", "4", "--optimizer.kind", "adamw"]
    return ["interleaved", *toy_flags, *steps, "--world-samples", "40", "--max-samples", "2", "--max-tokens", "600"]


def test_two_processes_train_what_one_does_and_one_goes_on(
    repo_root: Path, tmp_path: Path, run_app, stage: list[str]
) -> None:
    engine = "zero3" if find_spec("deepspeed") else "ddp"
    whole = run_app("train", [*stage, "--out", "one"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    status, words = torchrun(
        repo_root, tmp_path, 2, *stage, "--out", "two", "--parallel.engine", engine, "--parallel.recompute"
    )
    checkpoints = sorted((tmp_path / "two/checkpoints").glob("step-*"))
    # A clean run can end in an abort behind its last line: what it wrote counts.
    assert checkpoints, (status, words[-3000:])
    one, two = course(tmp_path / "one"), course(tmp_path / "two")
    assert [line[:2] for line in two] == [line[:2] for line in one]
    assert [line[2] for line in two] == pytest.approx([line[2] for line in one], rel=1e-6)
    # The checkpoint of two is a model like any other, within what the updates round.
    ours, theirs = (
        load_model(sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1]).model for name in ("two", "one")
    )
    for (name, tensor), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert tensor.allclose(other, rtol=1e-3, atol=1e-4), name


def test_a_number_of_processes_that_does_not_divide_a_step_is_refused_before_weights_are_read(
    train, stage: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("train_run._new_model", lambda *_: pytest.fail("weights were read"))
    assert train(*stage, "--parallel.timeout-s", "1") == 2
    said = capsys.readouterr().err
    assert "divides the 4 batches of a step (accumulation_steps), got 3; use one of 1, 2, 4" in said
    assert not any(tmp_path.iterdir())


def test_a_rank_without_the_others_says_where_it_waited(train, stage: list[str], monkeypatch, capsys) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert train(*stage, "--parallel.timeout-s", "1") == 2
    assert "rendezvous 127.0.0.1:1: expected 2 processes to meet there within 1 s" in capsys.readouterr().err


def test_the_demo_is_for_one_process(train, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("demo") == 2
    assert "processes: expected one for demo, got 2" in capsys.readouterr().err
