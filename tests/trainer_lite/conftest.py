"""A tiny regression with dropout, its endless seeded stream, and its files: all that a Trainer needs."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer_lite import LossSum, TrainConfig, Trainer

# Helpers of several test files, one of them a program that is started too.
for _name in ("ranks_run", "ranks"):
    _spec = spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_name] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Iterator[Any]:
    """Has ranks forked (`ranks.Forks`)."""
    from ranks import Forks

    made = Forks(tmp_path_factory.mktemp("forks") / "stderr")
    yield made
    made.close()


@dataclass
class TinyBatch:
    sample_ids: list[str]
    inputs: Tensor
    targets: Tensor

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    @property
    def num_tokens(self) -> int:
        return len(self.targets)


class TinyModel:
    """LossSum of squared errors of a small network with an embedding-like table, a norm, and dropout."""

    def __init__(self, dropout: float = 0.5) -> None:
        self.network = nn.Sequential(
            nn.Linear(3, 8),
            nn.LayerNorm(8),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(8, 5),
            nn.Tanh(),
            nn.Linear(5, 1),
        )

    def loss(self, batch: TinyBatch) -> LossSum:
        errors = self.network(batch.inputs)[:, 0] - batch.targets
        return LossSum(errors.square().sum(), len(errors), {"absolute": float(errors.detach().abs().sum())})


class TinyFiles:
    def __init__(self, model: TinyModel) -> None:
        self.network = model.network

    def writers(self) -> Mapping[str, Callable[[Path], None]]:
        return {"model.safetensors": lambda path: save_file(self.network.state_dict(), path)}

    def load(self, folder: Path) -> None:
        self.network.load_state_dict(load_file(folder / "model.safetensors"))


class TinyStream:
    """Batch k of size `sizes[k % len(sizes)]` holds samples numbered on; sample i is a function of i alone."""

    def __init__(self, sizes: tuple[int, ...] = (4,), length: int | None = None) -> None:
        self.sizes, self.length = sizes, length
        self.num_batches = self.num_samples = 0
        self.skipped: dict[str, int] = {}

    def __iter__(self) -> Iterator[TinyBatch]:
        while self.length is None or self.num_batches < self.length:
            size = self.sizes[self.num_batches % len(self.sizes)]
            samples = [random.Random(self.num_samples + offset) for offset in range(size)]
            ids = [f"s{self.num_samples + offset}" for offset in range(size)]
            rows = [[sample.gauss(0, 1) for _ in range(3)] for sample in samples]
            inputs = torch.tensor(rows).reshape(size, 3)
            self.num_batches += 1
            self.num_samples += size
            if self.num_batches % 3 == 0:
                self.skipped["broken_image"] = self.skipped.get("broken_image", 0) + 1
            yield TinyBatch(ids, inputs, inputs.sum(1).sin())

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "num_samples": self.num_samples, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_batches, self.num_samples = state["num_batches"], state["num_samples"]
        self.skipped = dict(state["skipped"])


@dataclass
class Tiny:
    """Builds trainers that differ only in what a test names; the network starts the same each time."""

    def trainer(
        self,
        cfg: TrainConfig,
        *,
        dropout: float = 0.5,
        stream: TinyStream | None = None,
        model: TinyModel | None = None,
        with_files: bool = False,
        **more: Any,
    ) -> Trainer[TinyBatch]:
        torch.manual_seed(7)
        model = TinyModel(dropout) if model is None else model
        if with_files:
            more["files"] = TinyFiles(model)
        return Trainer(
            model=model,
            parameters=model.network.named_parameters(),
            stream=TinyStream() if stream is None else stream,
            cfg=cfg,
            **more,
        )

    model = TinyModel
    stream = TinyStream
    batch = TinyBatch


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()
