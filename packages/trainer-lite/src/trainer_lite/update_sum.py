"""What the batches of one optimiser step add up to."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contract import Batch, BatchT, LossSum
from .engine import Engine


@dataclass
class UpdateSum:
    """Sums over the batches of one step, before anything is moved."""

    sample_ids: list[str] = field(default_factory=list[str])
    totals: list[Tensor] = field(default_factory=list[Tensor])
    parts: dict[str, float] = field(default_factory=dict[str, float])
    num_targets: int = 0
    num_tokens: int = 0

    def add(self, batch: Batch, loss: LossSum) -> None:
        """Take in one batch; a loss without targets counts nothing, whatever its total is."""
        self.sample_ids += batch.sample_ids
        self.num_tokens += batch.num_tokens
        self.num_targets += loss.num_targets
        if loss.num_targets > 0:
            self.totals.append(loss.total.detach())
            for name, value in loss.parts.items():
                self.parts[name] = self.parts.get(name, 0.0) + value

    @property
    def loss(self) -> float:
        """Mean over the targets of the step; 0 without any."""
        if not self.totals:
            return 0.0
        return torch.stack(self.totals).double().sum().item() / self.num_targets


def sum_alone(engine: Engine[BatchT], batches: Iterator[BatchT], count: int) -> UpdateSum | None:
    """Run forward and backward over `count` batches, fewer where the stream ends; None if it has ended.

    Raises:
        ValueError: as `checked_loss`.
    """
    update = UpdateSum()
    for index in range(count):
        batch = next(batches, None)
        if batch is None:
            return update if index > 0 else None
        # A pack in which nothing is left counts as a batch all the same, so that no later one moves.
        loss = checked_loss(engine, batch) if batch.sample_ids else LossSum(torch.zeros(()), 0)
        if loss.num_targets > 0:
            engine.backward(loss.total, 0, is_last=False)
        update.add(batch, loss)
    return update


def checked_loss(engine: Engine[BatchT], batch: BatchT) -> LossSum:
    """Run a batch forward and hold what the model returns against the contract of `LossSum`.

    Raises:
        ValueError: it is no scalar sum over a number of targets, or a constant.
    """
    loss = engine.loss(batch)
    if loss.total.ndim != 0 or loss.num_targets < 0:
        raise ValueError(
            f"loss of {batch.sample_ids[:3]}: expected a scalar sum over >= 0 targets, got shape "
            f"{tuple(loss.total.shape)} over {loss.num_targets}; sum it and count the targets"
        )
    if loss.num_targets > 0 and not loss.total.requires_grad:
        raise ValueError(
            f"loss of {batch.sample_ids[:3]}: expected one that depends on trainable parameters, got a constant; "
            "check the freeze plan"
        )
    return loss
