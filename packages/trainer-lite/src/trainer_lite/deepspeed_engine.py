"""DeepSpeed as an engine: optimiser state (ZeRO-1), gradients (2) and parameters (3) cut in parts over the ranks.

What DeepSpeed does not do by itself and is done here (0.19, read in its source and tried on gloo):

- its check for numbers that are not finite is off in fp32: the norm is taken first, by its own function, and a step
  that may not move anything is cleared away as its own overflow path does;
- gradients are means over ranks and batches: losses are scaled so that they are means over the step's targets;
- its checkpoints are pickles of one world size: tensors are gathered one by one by their names (`whole`) and set again
  from files by any number of ranks; Adam's step, one for all parameters of a group, is set beside them.

Precision: parameters, masters and moments are fp32 as in one process, and "bf16" runs the forward pass under autocast,
so that a checkpoint means the same under each engine.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic

import torch
from torch import Tensor, nn

from .config import ParallelConfig, TrainConfig
from .contract import BatchT, LossSum, StepModel
from .optimizer import Optimizers
from .planning import BUCKET_NUMBERS, PERSISTENT_NUMBERS
from .processes import Processes

ADAMW_KEYS: tuple[str, ...] = ("step", "exp_avg", "exp_avg_sq")


class _Root(nn.Module, Generic[BatchT]):
    """The network with the loss on top: ZeRO-3 gathers parameters where modules are called, this one first."""

    def __init__(self, model: StepModel[BatchT], network: nn.Module, device_type: str, is_bf16: bool) -> None:
        super().__init__()
        self.network = network
        # In a list, so that a model that is a module itself is not registered a second time.
        self._model = [model]
        self._device_type, self._is_bf16 = device_type, is_bf16
        self.last: LossSum | None = None

    def forward(self, batch: BatchT) -> Tensor:
        """The summed loss."""
        # In here, as DeepSpeed turns off an autocast that begins around it.
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._is_bf16):
            self.last = self._model[0].loss(batch)
        return self.last.total


class DeepSpeed(Generic[BatchT]):
    """ZeRO-0 to ZeRO-3, with the loop's own optimiser inside."""

    is_shared = True

    def __init__(
        self,
        model: StepModel[BatchT],
        network: nn.Module,
        optimizers: Optimizers,
        cfg: TrainConfig,
        parallel: ParallelConfig,
        processes: Processes,
    ) -> None:
        self.optimizers, self.cfg, self.parallel, self.processes = optimizers, cfg, parallel, processes
        self.stage = int(parallel.engine.removeprefix("zero"))
        self._root = _Root(model, network, optimizers.device.type, cfg.precision == "bf16")
        self._engine: Any = None
        self._excess = 1.0

    def start(self) -> None:
        """Hand the model over; its weights are final by then, the optimiser's state may follow."""
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Its import and its use of torch speak of things that are not ours to mend.
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            # A module for inference on CPUs, which it would compile at every user's: no g++ is needed without it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self._engine, *_ = deepspeed.initialize(
                model=self._root, optimizer=self.optimizers.adamw, config=self._config()
            )
        if self.stage > 0:
            # DeepSpeed looks for a group's state once, behind the first group's first update.
            self._states(is_made=True)

    def _config(self) -> dict[str, Any]:
        largest = max(parameter.numel() for parameter in self._root.parameters())
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": BUCKET_NUMBERS,
            "allgather_bucket_size": BUCKET_NUMBERS,
            # Vectors stay whole on each rank, which is DeepSpeed's rule at the sizes that it is made for.
            "stage3_param_persistence_threshold": min(PERSISTENT_NUMBERS, largest // 100),
        }
        if self.parallel.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if self.parallel.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.cfg.accumulation_steps // self.processes.count,
            "gradient_clipping": self.cfg.grad_clip,
            "zero_optimization": zero,
            # torch's fused AdamW runs on a CPU too, needs no compiler there, and rounds as in one process.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }

    def loss(self, batch: BatchT) -> LossSum:
        """Run a batch forward through DeepSpeed's hooks."""
        total = self._engine(batch)
        last = self._root.last
        assert last is not None
        return LossSum(total, last.num_targets, last.parts)

    def zero_grad(self) -> None:
        """Nothing is left over: an update and a skip clear the gradients."""

    def backward(self, total: Tensor, num_targets: int, *, is_last: bool) -> None:
        """Add the gradient of this rank's share of the mean; DeepSpeed divides by the ranks."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        # A power of two, so that bf16 rounds as without it; `_excess` is what is left to divide by.
        power = 2.0 ** round(math.log2(self.processes.count / max(1, num_targets)))
        self._excess = power * max(1, num_targets) / self.processes.count
        self._engine.backward(total * power, scale_wrt_gas=False)

    def gradient_norm(self, num_targets: int) -> float:
        """Norm over all parts, as DeepSpeed computes it to clip; not finite if a part is not."""
        if self.stage == 0:
            gradients = self.optimizers.gradients()
            norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
        elif self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self._engine.optimizer._get_norm_groups()))
        else:
            norm = float(self._engine.optimizer.scaled_global_norm())
        return norm / self._excess

    def update(self, num_targets: int, grad_norm: float, factor: float) -> None:
        """Let DeepSpeed clip (by its config) and update its parts."""
        self.optimizers.set_factor(factor)
        if self.stage == 0:
            for gradient in self.optimizers.gradients():
                gradient.div_(self._excess)
            self._engine.step()
            return
        inner = self._engine.optimizer
        # As a loss scale: DeepSpeed divides by it before it clips.
        inner.override_loss_scale(self._excess)
        self._engine.step()
        inner.override_loss_scale(1.0)

    def drop(self) -> None:
        """Clear the gradients by DeepSpeed's own way out of a step whose norm is not finite: nothing moves."""
        if self.stage == 0:
            self._engine.zero_grad()
            return
        inner = self._engine.optimizer
        infinite = torch.tensor(math.inf)
        name, answer = ("_get_norm_groups", [infinite]) if self.stage == 3 else ("scaled_global_norm", infinite)
        # On this object alone, for this call.
        setattr(inner, name, lambda: answer)
        try:
            self._engine.step()
        finally:
            delattr(inner, name)

    def state_keys(self) -> dict[str, list[str]]:
        """AdamW's, or none before the first update."""
        keys: list[str] = list(ADAMW_KEYS) if any(self.optimizers.adamw.state.values()) else []
        return dict.fromkeys(self.optimizers.parameters, keys)

    def whole(self, tensor: Tensor, name: str | None, key: str | None = None) -> Tensor:
        """Bring the ranks' parts of one tensor together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is not None:
            if self.stage == 0:
                return self.optimizers.adamw.state[tensor][key]
            if key == "step":
                return self._states()[self._group_of(str(name))][0]["step"]
            return self._found(safe_get_full_optimizer_state(tensor, key), name)
        if self.stage < 3 or not hasattr(tensor, "ds_id"):
            return tensor
        if name is not None:
            return self._found(safe_get_full_fp32_param(tensor), name)
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def _found(self, tensor: Tensor | None, name: str | None) -> Tensor:
        if tensor is None:
            raise RuntimeError(f"{name}: expected DeepSpeed to hold it, got nothing; its release is another than 0.19")
        return tensor

    def load_state(self, keys: Mapping[str, list[str]], read: Callable[[str], Tensor]) -> None:
        """Set moments and steps from tensors of any engine; a group's parameters share one step, the latest."""
        if not any(keys.values()):
            return
        states = self._states(is_made=self.stage == 0)
        steps = [0.0] * len(states)
        for name, parameter in self.optimizers.parameters.items():
            if not keys[name]:
                continue
            group = self._group_of(name)
            steps[group] = max(steps[group], float(read(f"{name}/step")))
            for key in ("exp_avg", "exp_avg_sq"):
                self._set_state(parameter, key, read(f"{name}/{key}"))
        for step, parts in zip(steps, states, strict=True):
            for part in parts:
                part["step"].fill_(step)

    def _group_of(self, name: str) -> int:
        return next(place for place, group in enumerate(self.optimizers.groups) if name in group.names)

    def _states(self, is_made: bool = False) -> list[list[dict[str, Tensor]]]:
        """AdamW's state of each group's parts on this rank; with `is_made`, made first where there is none yet."""
        adamw, inner = self.optimizers.adamw, self._engine.optimizer
        parts: list[list[Tensor]]
        if self.stage == 0:
            parts = [[self.optimizers.parameters[name] for name in group.names] for group in self.optimizers.groups]
        elif self.stage == 3:
            parts = [[] for _ in self.optimizers.groups]
            for place, part in enumerate(inner.fp32_partitioned_groups_flat):
                parts[inner.sub_group_to_group_id[place]].append(part)
        else:
            parts = [[part] for part in inner.single_partition_of_fp32_groups]
        if is_made:
            for part in (part for group in parts for part in group):
                step = torch.zeros((), dtype=torch.float32, device=part.device)
                moments = {key: torch.zeros_like(part) for key in ("exp_avg", "exp_avg_sq")}
                adamw.state[part] = {"step": step, **moments}
            if self.stage in (1, 2):
                inner._lazy_init_hp_params_optimizer_state()
        return [[adamw.state[part] for part in group] for group in parts]

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(device=parameter.device, dtype=torch.float32)
        if self.stage == 0:
            self.optimizers.adamw.state[parameter][key].copy_(value)
        elif self.stage == 3:
            # Parts are of equal size, the last one filled up; DeepSpeed's own way of cutting fails there.
            held: Any = parameter
            size = held.partition_numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.processes.count - value.numel()))
            safe_set_local_optimizer_state(parameter, padded.split(size)[self.processes.rank].clone(), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
