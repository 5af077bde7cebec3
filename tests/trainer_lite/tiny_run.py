"""A small run with everything that a resume must bring back: dropout, a mixture, packing, bad samples, a schedule."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interleave_data import (
    Encoder,
    InMemory,
    PlanConfig,
    Sample,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Stream,
    TextPart,
    Turn,
)
from trainer_lite import LossSum, OptimizerConfig, RunFolder, ScheduleConfig, StopFlag, TrainConfig, Trainer

BAD_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """One sample, a function of its id alone: 1 to 9 tokens with a target each."""

    inputs: Tensor
    targets: Tensor

    @property
    def length(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class RowBatch:
    sample_ids: list[str]
    rows: tuple[Row, ...]

    @property
    def num_targets(self) -> int:
        return sum(row.length for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return self.num_targets


class Net:
    def __init__(self) -> None:
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def loss(self, batch: RowBatch) -> LossSum:
        inputs, targets = (torch.cat([getattr(row, name) for row in batch.rows]) for name in ("inputs", "targets"))
        return LossSum((self.network(inputs)[:, 0] - targets).square().sum(), len(targets))


class NetFiles:
    def __init__(self, net: Net) -> None:
        self.network = net.network

    def writers(self) -> Mapping[str, Callable[[Path], object]]:
        return {"model.safetensors": lambda path: save_file(self.network.state_dict(), path)}

    def load(self, folder: Path) -> None:
        self.network.load_state_dict(load_file(folder / "model.safetensors"))


class Rows(Encoder[Row, tuple[Row, ...]]):
    """A row is a function of the sample's id; some are bad, which is told only on encoding, like a broken picture."""

    def measure(self, sample: Any, limit: Size | None = None, /) -> Size:
        return Size(random.Random(sample.id).randint(1, 9), 0)

    def encode(self, sample: Any, limit: Size | None = None, /) -> Row:
        drawn = random.Random(sample.id)
        length = drawn.randint(1, 9)
        if drawn.random() < BAD_SHARE:
            raise SkipSample(SkipReason.BROKEN_IMAGE, "drawn to be bad")
        inputs = torch.tensor([[drawn.gauss(0, 1) for _ in range(3)] for _ in range(length)])
        return Row(inputs, inputs.sum(1).sin())

    def collate(self, items: Sequence[Row], ids: Sequence[str], /) -> tuple[Row, ...]:
        return tuple(items)


class RowStream:
    """The data stream as batches of the model."""

    def __init__(self, num_samples: int) -> None:
        sources = [
            InMemory(name, [Sample(f"{name}{i}", name, (Turn("assistant", (TextPart(name),)),)) for i in range(count)])
            for name, count in (("a", num_samples), ("b", num_samples // 3))
        ]
        limits = SkipLimits(max_share=0.5)
        cfg = PlanConfig(ratios=(2, 1), max_tokens=16, look_ahead=8, seed=3)
        self.stream: Stream[Row, tuple[Row, ...]] = Stream(sources, Rows(), cfg, skips=SkipCounter(limits))

    @property
    def skipped(self) -> Mapping[str, int]:
        return self.stream.skips.by_reason()

    def __iter__(self) -> Iterator[RowBatch]:
        for batch in self.stream:
            yield RowBatch(list(batch.ids), batch.data)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.stream.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def settings(max_steps: int, save_every: int, **more: Any) -> TrainConfig:
    return TrainConfig(
        max_steps=max_steps,
        save_every=save_every,
        accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=0.02),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=max_steps // 4),
        **more,
    )


def trainer(folder: Path, cfg: TrainConfig, num_samples: int = 60, stop: StopFlag | None = None) -> Trainer[RowBatch]:
    """Begin the run in `folder`, or go on with it."""
    torch.manual_seed(0)
    net = Net()
    is_new = not (folder / "config.json").exists()
    run = RunFolder.create(folder, cfg) if is_new else RunFolder.reopen(folder)
    made = Trainer(
        model=net,
        parameters=net.network.named_parameters(),
        stream=RowStream(num_samples),
        cfg=cfg,
        run=run,
        files=NetFiles(net),
        stop=stop,
    )
    found = run.find_checkpoint().path
    if found is not None:
        made.resume(found)
    elif not is_new:
        run.rewind(made.stage, 0)
    return made


def main(folder: Path, arguments: list[str]) -> int:
    max_steps, save_every = map(int, arguments)
    trainer(folder, settings(max_steps, save_every)).fit()
    return 0
