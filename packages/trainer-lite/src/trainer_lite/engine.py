"""What differs between one process and many: how gradients become one, how an update is made, where tensors are.

The loop talks to an `Engine`. Here are the one of one process and the one of several that hold the same model each
(`Replicas`); DeepSpeed's, which cuts a model in parts, is in `deepspeed_engine` and imported only when asked for.
"""

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .config import ParallelConfig, TrainConfig
from .contract import BatchT, BatchT_contra, LossSum, StepModel
from .optimizer import Optimizers
from .processes import Processes
from .train_state import state_keys

BUCKET_ELEMENTS = 1 << 24
"""Gradients are summed in flat pieces of about this many numbers: few operations, little memory beside them."""


@runtime_checkable
class Engine(Protocol[BatchT_contra]):
    """Turns summed losses into updates. Every method is called on every rank, in the same order."""

    processes: Processes
    is_shared: bool
    """Whether a step is put together from what ranks tell each other; one alone may be cut in parts as well."""

    def start(self) -> None:
        """Take over model and optimisers as they now are; called once, before the first step and `load_state`."""
        ...

    def loss(self, batch: BatchT_contra) -> LossSum:
        """Run a batch forward."""
        ...

    def zero_grad(self) -> None:
        """Drop all gradients."""
        ...

    def backward(self, total: Tensor, num_targets: int, *, is_last: bool) -> None:
        """Add the gradient of a summed loss; num_targets: of the step on all ranks, of no meaning to one process."""
        ...

    def gradient_norm(self, num_targets: int) -> float:
        """Bring the ranks' gradients together; return the norm of the mean over the step's targets, or NaN."""
        ...

    def update(self, num_targets: int, grad_norm: float, factor: float) -> None:
        """Clip the mean gradient and move the parameters, at `factor` times the peak rates."""
        ...

    def drop(self) -> None:
        """Make no update: nothing moves."""
        ...

    def state_keys(self) -> dict[str, list[str]]:
        """Each trainable parameter with the keys of its optimiser state."""
        ...

    def whole(self, tensor: Tensor, name: str | None, key: str | None = None) -> Tensor:
        """Return a tensor of the model, all of it, or what the optimiser keeps under `key` for the parameter `name`.

        name: of a trainable parameter; None for what is not trained.
        """
        ...

    def load_state(self, keys: Mapping[str, list[str]], read: Callable[[str], Tensor]) -> None:
        """Replace the optimiser's state; `read` gives a tensor by its name, `<parameter>/<key>`."""
        ...


class OneProcess(Generic[BatchT]):
    """The model is here and nowhere else."""

    is_shared = False

    def __init__(self, model: StepModel[BatchT], optimizers: Optimizers, cfg: TrainConfig) -> None:
        self.model, self.optimizers, self.cfg = model, optimizers, cfg
        self.processes = Processes()

    def start(self) -> None:
        """Nothing to take over."""

    def loss(self, batch: BatchT) -> LossSum:
        """Run a batch forward."""
        with torch.autocast(self.optimizers.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            return self.model.loss(batch)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.optimizers.zero_grad()

    def backward(self, total: Tensor, num_targets: int, *, is_last: bool) -> None:
        """Add the gradient of a sum."""
        total.backward()  # pyright: ignore[reportUnknownMemberType]

    def gradient_norm(self, num_targets: int) -> float:
        """Norm of the sum, divided by the targets."""
        gradients = self.optimizers.gradients()
        raw_norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
        return raw_norm / max(1, num_targets)

    def update(self, num_targets: int, grad_norm: float, factor: float) -> None:
        """Turn the summed gradients into clipped means, in one pass, and update the parameters."""
        clip = self.cfg.grad_clip
        scale = min(1.0, clip / grad_norm) if clip > 0 and grad_norm > 0 else 1.0
        for gradient in self.optimizers.gradients():
            gradient.mul_(scale / num_targets)
        self.optimizers.set_factor(factor)
        self.optimizers.step()

    def drop(self) -> None:
        """Nothing has moved; the next step drops the gradients."""

    def state_keys(self) -> dict[str, list[str]]:
        """What the optimisers keep."""
        return state_keys(self.optimizers)

    def whole(self, tensor: Tensor, name: str | None, key: str | None = None) -> Tensor:
        """The tensor itself; nothing is in parts."""
        return tensor if key is None else self.optimizers.state_tensors()[f"{name}/{key}"]

    def load_state(self, keys: Mapping[str, list[str]], read: Callable[[str], Tensor]) -> None:
        """Load what was saved under any engine."""
        names = [f"{name}/{key}" for name, found in keys.items() for key in found]
        self.optimizers.load_state_tensors({name: read(name) for name in names})


class Replicas(OneProcess[BatchT]):
    """Every process holds the whole model; the ranks' gradients are added up once a step.

    After the last backward pass and not during it: which parameters a batch reaches may then differ between ranks, and
    no order of operations in a graph can make them wait for each other.
    """

    is_shared = True

    def __init__(
        self, model: StepModel[BatchT], optimizers: Optimizers, cfg: TrainConfig, processes: Processes
    ) -> None:
        super().__init__(model, optimizers, cfg)
        self.processes = processes

    def gradient_norm(self, num_targets: int) -> float:
        """Add the ranks' gradients up, then take the norm, which is the same bits on each rank."""
        self._sum_gradients()
        return super().gradient_norm(num_targets)

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        parameters = list(self.optimizers.parameters.values())
        # A parameter that no rank's batches reach has no gradient, and does not move, as in one process.
        reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        self.processes.add_up([reached])
        waiting: list[nn.Parameter] = []
        for parameter, count in zip(parameters, reached.tolist(), strict=True):
            if count == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if waiting and (parameter.dtype != waiting[0].dtype or sum(p.numel() for p in waiting) >= BUCKET_ELEMENTS):
                self._sum_bucket(waiting)
                waiting = []
            waiting.append(parameter)
        if waiting:
            self._sum_bucket(waiting)

    def _sum_bucket(self, parameters: list[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.processes.add_up([flat])
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def make_engine(
    model: StepModel[BatchT],
    network: nn.Module | None,
    optimizers: Optimizers,
    cfg: TrainConfig,
    parallel: ParallelConfig,
    processes: Processes,
) -> Engine[BatchT]:
    """Choose by configuration and number of processes.

    Raises:
        ValueError: DeepSpeed is asked for and not there, cannot run this optimiser, or `network` is None.
    """
    if not parallel.uses_deepspeed:
        if processes.count == 1:
            return OneProcess(model, optimizers, cfg)
        return Replicas(model, optimizers, cfg, processes)
    if network is None:
        raise ValueError(
            f"parallel.engine {parallel.engine}: expected a Trainer with `network`, the module that DeepSpeed cuts in "
            "parts, got none; give it, or use ddp"
        )
    if cfg.optimizer.kind != "adamw":
        raise ValueError(
            f"parallel.engine {parallel.engine}: expected the optimiser adamw, got {cfg.optimizer.kind}: it needs "
            "whole matrices where DeepSpeed has parts; use --parallel.engine ddp, or --optimizer.kind adamw"
        )
    check_deepspeed(parallel)
    from .deepspeed_engine import DeepSpeed

    return DeepSpeed(model, network, optimizers, cfg, parallel, processes)


def check_deepspeed(parallel: ParallelConfig) -> None:
    """Say what to install where DeepSpeed is asked for and not there; imports nothing.

    Raises:
        ValueError: it is not installed.
    """
    from importlib.util import find_spec

    if parallel.uses_deepspeed and find_spec("deepspeed") is None:
        raise ValueError(
            f"parallel.engine {parallel.engine}: expected DeepSpeed, got no such package; install "
            "trainer-lite[deepspeed] (Linux), or use --parallel.engine ddp"
        )
