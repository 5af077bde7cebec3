"""The device of a run: by its flag, and that every recipe computes there what it computes on the CPU.

A pretended device stands for a GPU: its tensors say that they are on it, compute on the CPU, and refuse to meet tensors
that are not there. Torch calls it `meta`, whose own tensors hold nothing; these hold numbers.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PRETENDED = torch.device("meta")
_CROSSES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _There(Tensor):
    """A tensor on the device; its numbers are in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_There":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=PRETENDED,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """As of a GPU's tensor; torch refuses it of a subclass."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [one for one in given if isinstance(one, _There)]
    here = [one for one in given if not isinstance(one, _There) and one.ndim > 0]
    if there and here and func not in _CROSSES:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {len(there)} there and {len(here)} here")
    is_there = bool(there)
    # What is written in place stays the tensor that it was.
    known = {id(one.inner if isinstance(one, _There) else one): one for one in given}
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]) == PRETENDED
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda one: one.inner if isinstance(one, _There) else one, (args, kwargs))
    found = func(*args, **kwargs)

    def outward(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        same = known.get(id(one))
        # Its shape may have been changed in place, as by `squeeze_`.
        if same is not None and same.shape == one.shape:
            return same
        return _There(one) if is_there else one

    return tree_map(outward, found)


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device, for as long as this lasts."""
    tensor = torch.tensor

    def moved(data: Any, *, device: Any = None, **more: Any) -> Tensor:
        # Of meta, torch itself would keep the shape alone.
        return tensor(data, **more) if device is None else tensor(data, **more).to(device)

    with monkeypatch.context() as patch, _Mode():
        patch.setattr(torch, "tensor", moved)
        # Neither knows meta.
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        yield PRETENDED


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
        ["dpo"],
        ["warmup", "--batch-size", "3"],
        ["warmup", "--batch-size", "3", "--objective", "sigmoid"],
    ],
    ids=" ".join,
)
def test_a_recipe_computes_on_its_device_alone(train, toy_flags, monkeypatch, plain_adamw, capsys, recipe) -> None:
    """Operations between devices are refused there; the numbers are the CPU's, but for the order of some sums."""
    import train_run

    recipe = [*recipe, "--world-samples", "20"]
    assert train(*recipe, *toy_flags, "--out", "cpu") == 0
    with pretended_device(monkeypatch) as device:
        monkeypatch.setattr(train_run, "choose_device", lambda _: device)
        status = train(*recipe, *toy_flags, "--out", "there")
        said = capsys.readouterr().err
        assert status == 0, said
        assert "threads, meta" in said
    assert losses("there") == pytest.approx(losses("cpu"), rel=1e-5)
    assert len(losses("cpu")) == 2


def test_tensors_of_two_devices_are_refused(monkeypatch) -> None:
    """The control: what the test above goes by."""
    with pretended_device(monkeypatch) as device:
        there = torch.arange(3.0, device=device)
        assert (there + 1).sum().item() == 6
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there.add(torch.ones(3))


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
