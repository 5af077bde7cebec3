"""What the loop asks of a model, of a stream of batches and of a model's files: four small protocols.

Nothing here names a recipe or an architecture. A batch is whatever the model understands; the loop reads three of its
attributes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from interleave_data import SkipSample


@runtime_checkable
class Batch(Protocol):
    """One micro-batch."""

    @property
    def sample_ids(self) -> list[str]:
        """The ids of its samples in order; logged as a digest, and in full if the step is not finite."""
        ...

    @property
    def num_targets(self) -> int:
        """Target tokens (or preference pairs) in it."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens the model computes, for the rate in the log."""
        ...


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum with its count, so that any number of batches can be averaged without error."""

    total: Tensor
    """Scalar, the sum over the targets; ignored if there are none."""
    num_targets: int
    """What the sum runs over: target tokens, or pairs for a preference loss."""
    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further sums over the same targets, only logged (as means)."""


BatchT = TypeVar("BatchT", bound=Batch)
BatchT_contra = TypeVar("BatchT_contra", bound=Batch, contravariant=True)
BatchT_co = TypeVar("BatchT_co", bound=Batch, covariant=True)


@runtime_checkable
class StepModel(Protocol[BatchT_contra]):
    """A model as the loop sees it."""

    def loss(self, batch: BatchT_contra) -> LossSum:
        """Run the batch forward and return its summed loss.

        With several processes a batch may be without samples; where parameters are cut in parts, the same modules must
        be called for each batch, whatever is in it.
        """
        ...


@runtime_checkable
class Stream(Protocol[BatchT_co]):
    """Batches in an order that can be continued: its state is small and speaks of consumed, not prefetched, batches.

    One that counts the seconds its iteration has waited for data (`waited_s`), the samples that it kept but cut
    (`num_truncated`), or what it had to read again, by source (`read_again`), finds them in the log.
    """

    @property
    def skipped(self) -> Mapping[str, int]:
        """Samples left out so far, by reason."""
        ...

    def __iter__(self) -> Iterator[BatchT_co]:
        """Go on from the current state."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state after the last batch handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch after which `state` was taken."""
        ...


@runtime_checkable
class TellsChanges(Protocol):
    """A stream that can say what is different about its data."""

    def changes(self, state: dict[str, Any]) -> list[str]:
        """How the data differ from those that a state was saved with, in words; empty if they do not."""
        ...


@runtime_checkable
class NamesSkips(Protocol):
    """A stream that also says which samples it left out; the loop writes them down."""

    def take_skips(self) -> Sequence[tuple[str, SkipSample]]:
        """(source, reason and place) of each sample left out since this was last asked."""
        ...


@runtime_checkable
class StopsWaiting(Protocol):
    """A stream whose iteration can be called off while it waits for data."""

    def stop_waiting_if(self, should_stop: Callable[[], bool]) -> None:
        """From now on raise `interleave_data.StoppedWaiting` instead of waiting on, once `should_stop` says so."""
        ...


@runtime_checkable
class ModelFiles(Protocol):
    """How a model goes into a checkpoint folder and comes back."""

    def writers(self) -> Mapping[str, Callable[[Path], object]]:
        """Return, by file name, functions that write the file at the path they are given."""
        ...

    def load(self, folder: Path) -> None:
        """Load the weights of a checkpoint folder strictly into the live model."""
        ...


@runtime_checkable
class ShardedModelFiles(ModelFiles, Protocol):
    """Model files whose weights several processes can write together; `load` also takes what they have written."""

    @property
    def weights(self) -> str:
        """The one of `writers` that is replaced by shards, as "model.safetensors"."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """The live tensors of the weights, by their names in the file, each once."""
        ...
