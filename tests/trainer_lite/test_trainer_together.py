"""Ranks as threads of this process: what one of them meets is every rank's, at the same step."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer_lite import Processes, RunFolder, SaveError, TrainConfig, Trainer, read_metrics
from weight_files import unique_tensors

COUNT, STEPS = 2, 4


class Board:
    """Where the ranks leave what they tell each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(COUNT, timeout=10)
        self.payloads = [b""] * COUNT


class Thread(Processes):
    def __init__(self, rank: int, board: Board) -> None:
        super().__init__(rank, COUNT)
        self.board = board

    def exchange(self, payload: bytes) -> list[bytes]:
        self.board.payloads[self.rank] = payload
        self.board.barrier.wait()
        told = list(self.board.payloads)
        self.board.barrier.wait()
        return told

    def add_up(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            told = self.share(tensor.flatten().tolist())
            tensor.copy_(torch.tensor(told).sum(0).view_as(tensor))


class Files:
    """The network's, which ranks can write together."""

    weights = "model.safetensors"

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def writers(self) -> dict[str, Callable[[Path], object]]:
        return {self.weights: lambda path: None}

    def tensors(self) -> dict[str, Tensor]:
        return dict(unique_tensors(self.network))

    def load(self, folder: Path) -> None:
        raise NotImplementedError


def share_of(tiny, processes: Processes) -> Any:
    """The rank's batches, whose ids are names that are no UTF-8."""

    class Every(tiny.stream):
        def __iter__(self) -> Iterator[Any]:
            for number, batch in enumerate(super().__iter__()):
                batch.sample_ids = [f"{name}\udcff" for name in batch.sample_ids]
                if number % processes.count == processes.rank:
                    yield batch

    return Every((3, 2))


def trained(tiny, folder: Path, prepare: Callable[[Trainer[Any]], None], **settings: Any) -> list[Any]:
    """What each rank's training returns or raises."""
    board = Board()
    first = RunFolder.create(folder, {})
    models: list[Any] = []
    for _ in range(COUNT):
        torch.manual_seed(7)
        models.append(tiny.model(0.0))

    def rank(number: int) -> Any:
        processes = Thread(number, board)
        model = models[number]
        trainer = tiny.trainer(
            TrainConfig(max_steps=STEPS, accumulation_steps=2, **settings),
            model=model,
            stream=share_of(tiny, processes),
            run=first if number == 0 else RunFolder(folder),
            files=Files(model.network),
            processes=processes,
        )
        prepare(trainer)
        try:
            return trainer.fit()
        except Exception as error:  # noqa: BLE001  (the test looks at it)
            return error

    with ThreadPoolExecutor(COUNT) as threads:
        return list(threads.map(rank, range(COUNT)))


def test_two_ranks_have_the_order_and_losses_of_one(tiny, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "two", lambda trainer: None)
    one = RunFolder.create(tmp_path / "one", {})
    cfg = TrainConfig(max_steps=STEPS, accumulation_steps=2)
    tiny.trainer(cfg, dropout=0.0, stream=share_of(tiny, Processes()), run=one).fit()
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [record.samples_digest for record in ours] == [record.samples_digest for record in theirs]
    assert [record.loss for record in ours] == pytest.approx([record.loss for record in theirs], rel=1e-6)


def fail_to_sync_at(step: int) -> Callable[[Trainer[Any]], None]:
    """The first rank's log cannot be brought to the disk in this step."""

    def prepare(trainer: Trainer[Any]) -> None:
        assert trainer.run is not None
        sync = trainer.run.metrics.sync

        def full() -> None:
            if trainer.counters.step == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync()

        trainer.run.metrics.sync = full  # type: ignore[method-assign]

    return prepare


def test_a_log_that_cannot_be_written_fails_the_save_on_all_ranks_and_all_go_on(tiny, tmp_path: Path) -> None:
    first, second = trained(tiny, tmp_path / "run", fail_to_sync_at(2), save_every=1, on_save_error="warn", keep_last=9)
    assert (first.counters.step, first.counters.failed_saves) == (STEPS, 1)
    assert (second.counters.step, second.counters.failed_saves) == (STEPS, 1)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert names == ["step-00000001", "step-00000003", "step-00000004"]
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == STEPS


@pytest.mark.parametrize("step", [2, STEPS])
def test_a_log_that_cannot_be_written_ends_all_ranks_alike(tiny, tmp_path: Path, step: int) -> None:
    for error in trained(tiny, tmp_path / "run", fail_to_sync_at(step), save_every=2):
        assert isinstance(error, SaveError)
        assert "rank 0: No space left on device" in str(error)
