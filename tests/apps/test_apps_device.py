"""The device of a run: by its flag, and that every recipe computes there what it computes on the CPU."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pretended_device import PRETENDED, pretended_device
from torch import Tensor

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a run on it")


@pytest.fixture
def plain_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW of single operations: its one kernel does not know the pretended device."""
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **more: adamw(*args, **more))


def losses(folder: str) -> list[float]:
    """Of each step of a run."""
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "recipe",
    [
        ["sft", "--eval-questions", "1"],
        ["pretrain", "--trains", "vision_encoder", "vision_tokenizer", "lang_model"],
        ["dpo"],
        ["dpo", "--no-use-lora", "--trains", "lang_model"],
        ["dpo", "--dpo.kind", "kto"],
        ["warmup", "--batch-size", "3"],
        ["warmup", "--batch-size", "3", "--objective", "sigmoid"],
    ],
    ids=" ".join,
)
def test_a_recipe_computes_on_its_device_alone(train, toy_flags, monkeypatch, plain_adamw, capsys, recipe) -> None:
    """Operations between devices are refused there; the losses are the same bits, as the numbers are the CPU's."""
    import train_run

    assert train(*recipe, *toy_flags, "--out", "cpu") == 0
    with pretended_device(monkeypatch) as device:
        monkeypatch.setattr(train_run, "choose_device", lambda _: device)
        status = train(*recipe, *toy_flags, "--out", "there")
        said = capsys.readouterr().err
        assert status == 0, said
        assert "threads, meta" in said
    assert losses("there") == losses("cpu")
    assert len(losses("cpu")) == 2


def test_tensors_of_two_devices_are_refused(monkeypatch) -> None:
    """The control: what the test above goes by."""
    with pretended_device(monkeypatch) as device:
        there = torch.arange(3.0, device=device)
        assert (there + 1).sum().item() == 6
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + torch.ones(3)


def test_batches_of_the_warmup_move_with_every_tensor(repo_root: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))
    from train_vision_data import PairBatch, TileBatch

    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    whole = torch.zeros(1, 3, 4, dtype=torch.int64)
    for batch in (TileBatch(["a"], pixels, whole, torch.zeros(1, 4, 4)), PairBatch(["a"], pixels, whole[:, 0])):
        moved = batch.to(PRETENDED)
        held = [name for name in (item.name for item in fields(batch)) if name != "sample_ids"]
        assert all(isinstance(getattr(moved, name), Tensor) for name in held)
        assert {getattr(moved, name).device for name in held} == {PRETENDED}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_ends_with_status_2(train, toy_flags, capsys) -> None:
    assert train("sft", *toy_flags, "--device", "cuda") == 2
    assert "device: expected a CUDA device, got none" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.gpu
@NEEDS_GPU
def test_a_stage_on_a_gpu_has_the_cpus_losses_and_goes_on_anywhere(train, toy_flags, run_app, tmp_path, capsys) -> None:
    """Saved there, it is resumed there and on the CPU, and chats on both."""
    flags = ["sft", *toy_flags, "--max-steps", "4", "--save-every", "2"]
    assert train(*flags, "--device", "cpu", "--out", "cpu") == 0
    assert train(*flags, "--device", "cuda", "--out", "there") == 0
    assert "threads, cuda:0" in capsys.readouterr().err
    assert losses("there") == pytest.approx(losses("cpu"), rel=1e-3)
    whole = losses("there")
    for device in ("cuda", "cpu"):
        assert train("--out", "there", "--resume", "there/checkpoints/step-00000002", "--device", device) == 0
        assert losses("there") == pytest.approx(whole, rel=0 if device == "cuda" else 1e-3)
        model = str(tmp_path / "there/checkpoints/step-00000004")
        said = run_app("chat", ["--model", model, "--device", device, "--prompt", "what?"], tmp_path)
        assert said.returncode == 0, said.stderr
        assert f"; {device}" in said.stderr
