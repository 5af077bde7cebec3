"""One step by several processes: every rank computes its batches and knows the figures of all of them."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from .contract import BatchT
from .engine import Engine
from .train_state import rng_state, set_rng_state
from .update_sum import UpdateSum, checked_loss

T = TypeVar("T")


def sum_together(engine: Engine[BatchT], own: Sequence[BatchT], *, seed: int, step: int) -> UpdateSum | None:
    """Run forward and backward over this rank's batches of a step; return the sums of all ranks, None without batches.

    The mean needs the targets of the whole step before the first backward pass, since parts of a gradient may be summed
    and cut during it: so all of the step's batches are there first, and say what they hold.

    Raises:
        ValueError: as `checked_loss`, or a loss runs over another number of targets than its batch has.
    """
    processes = engine.processes
    # Ids as bytes: of names that files gave, some are no UTF-8.
    told = [
        [
            [name.encode("utf-8", "surrogatepass") for name in batch.sample_ids],
            batch.num_targets,
            batch.num_tokens if batch.sample_ids else 0,
        ]
        for batch in own
    ]
    facts = in_order(processes.share(told))
    if not facts:
        return None
    update = UpdateSum()
    for ids, num_targets, num_tokens in facts:
        update.sample_ids += [name.decode("utf-8", "surrogatepass") for name in ids]
        update.num_targets += num_targets
        update.num_tokens += num_tokens
    before = rng_state()
    sums: list[tuple[float, dict[str, float]] | None] = []
    for index, batch in enumerate(own):
        processes.at(f"step {step}, batch {index + 1}", is_bounded=True)
        # So that what is drawn (dropout) depends on the batch's place, not on the rank that computes it.
        place = index * processes.count + processes.rank
        torch.manual_seed(hash((seed, step, place)))  # pyright: ignore[reportUnknownMemberType]
        loss = checked_loss(engine, batch)
        if loss.num_targets != batch.num_targets:
            raise ValueError(
                f"loss of {batch.sample_ids[:3]}: expected the batch's {batch.num_targets} targets, got "
                f"{loss.num_targets}; with several processes they are counted before the forward pass"
            )
        if loss.total.requires_grad:
            # Also without targets: the sum is worth nothing then, and its operations are run for the others' sake.
            total = loss.total if loss.num_targets > 0 else loss.total.nan_to_num() * 0.0
            engine.backward(total, update.num_targets, is_last=index == len(own) - 1)
        sums.append((loss.total.item(), dict(loss.parts)) if loss.num_targets > 0 else None)
    set_rng_state(before)
    processes.at(f"step {step}, sums")
    for summed in in_order(processes.share(sums)):
        if summed is not None:
            update.totals.append(torch.tensor(summed[0]))
            for name, value in summed[1].items():
                update.parts[name] = update.parts.get(name, 0.0) + value
    return update


def in_order(by_rank: Sequence[Sequence[T]]) -> list[T]:
    """What the ranks say of their batches, in the order of the one stream."""
    return [said for turn in zip(*by_rank, strict=True) for said in turn]
