"""Which parameter is moved by which rule, and the optimisers' state as named tensors.

Groups are a pure function of names, shapes and the config. State tensors are named `<parameter>/<key>`, so they can be
written without pickle, looked at, and loaded into any process that has the same parameters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .config import OptimizerConfig
from .muon import Muon


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a rule, a peak rate and a weight decay."""

    kind: Literal["adamw", "muon"]
    learning_rate: float
    weight_decay: float
    names: tuple[str, ...]


def group_parameters(named: Mapping[str, nn.Parameter], cfg: OptimizerConfig) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups, in the order in which they appear.

    Raises:
        ValueError: nothing is trainable, or a prefix in `learning_rate_scales` fits no trainable parameter.
    """
    trainable = {name: param for name, param in named.items() if param.requires_grad}
    if not trainable:
        raise ValueError(
            f"parameters: expected at least one with requires_grad, got none of {len(named)}; check the freeze plan"
        )
    for prefix in cfg.learning_rate_scales:
        if not any(name.startswith(prefix) for name in trainable):
            raise ValueError(
                f"optimizer.learning_rate_scales: expected prefixes of trainable parameters, got {prefix!r}; "
                f"trainable names begin like {', '.join(sorted({name.split('.')[0] for name in trainable})[:8])}"
            )
    members: dict[tuple[Literal["adamw", "muon"], float, float], list[str]] = {}
    for name, param in trainable.items():
        is_muon = cfg.kind == "muon" and param.ndim == 2 and not _holds(name, cfg.no_muon)
        is_decayed = param.ndim >= 2 and not _holds(name, cfg.no_decay)
        peak = cfg.muon_learning_rate if is_muon else cfg.learning_rate
        key = (
            "muon" if is_muon else "adamw",
            peak * _scale_of(name, cfg.learning_rate_scales),
            cfg.weight_decay if is_decayed else 0.0,
        )
        members.setdefault(key, []).append(name)
    return [ParameterGroup(*key, tuple(names)) for key, names in members.items()]


def _holds(name: str, fragments: Iterable[str]) -> bool:
    return any(fragment in name for fragment in fragments)


def _scale_of(name: str, scales: Mapping[str, float]) -> float:
    fitting = [prefix for prefix in scales if name.startswith(prefix)]
    return scales[max(fitting, key=len)] if fitting else 1.0


_STATE_KEYS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum",)}


class Optimizers:
    """AdamW and, where asked for, Muon beside it, driven as one."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig) -> None:
        named = dict(named_parameters)
        self.groups = group_parameters(named, cfg)
        self.parameters = {name: param for name, param in named.items() if param.requires_grad}
        self._model_bytes = sum(param.nbytes for param in named.values())
        self._optimizers: list[torch.optim.Optimizer] = []
        adamw = [self._torch_group(group) for group in self.groups if group.kind == "adamw"]
        muon = [self._torch_group(group) for group in self.groups if group.kind == "muon"]
        if adamw:
            # One kernel for all parameters; on the CPU too.
            self._optimizers.append(torch.optim.AdamW(adamw, betas=cfg.betas, eps=cfg.eps, fused=True))
        if muon:
            self._optimizers.append(Muon(muon, lr=cfg.muon_learning_rate, momentum=cfg.muon_momentum))
        by_kind = {"muon" if isinstance(optimizer, Muon) else "adamw": optimizer for optimizer in self._optimizers}
        self._home = {name: by_kind[group.kind] for group in self.groups for name in group.names}

    def _torch_group(self, group: ParameterGroup) -> dict[str, object]:
        params = [self.parameters[name] for name in group.names]
        rate = group.learning_rate
        return {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": group.weight_decay}

    @property
    def adamw(self) -> torch.optim.Optimizer:
        """The one optimiser, where AdamW moves everything."""
        (only,) = self._optimizers
        return only

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, the frozen ones too, and of the state."""
        return self._model_bytes + sum(value.nbytes for value in self.state_tensors().values())

    def set_factor(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def gradients(self) -> list[Tensor]:
        """Return the gradients that exist, in the order of the parameters."""
        return [param.grad for param in self.parameters.values() if param.grad is not None]

    def step(self) -> None:
        """Make one update."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state as `<parameter>/<key>` → tensor (not copied)."""
        return {
            f"{name}/{key}": value
            for name, param in self.parameters.items()
            for key, value in self._home[name].state.get(param, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the whole state by copies of `tensors`, as `state_tensors` gave them.

        Raises:
            ValueError: a tensor of an unknown parameter or of another shape, or one missing; nothing has been changed.
        """
        problems: list[str] = []
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            param = self.parameters.get(name)
            if param is None:
                problems.append(f"{full_name}: no trainable parameter of that name")
            elif value.ndim > 0 and value.shape != param.shape:
                problems.append(f"{full_name}: shape {tuple(value.shape)}, parameter {tuple(param.shape)}")
            elif key not in _STATE_KEYS[type(self._home[name]).__name__]:
                problems.append(f"{full_name}: {type(self._home[name]).__name__} keeps no {key!r}")
        for name, optimizer in self._home.items():
            absent = [key for key in _STATE_KEYS[type(optimizer).__name__] if f"{name}/{key}" not in tensors]
            if 0 < len(absent) < len(_STATE_KEYS[type(optimizer).__name__]):
                problems.append(f"{name}: without {', '.join(absent)}")
        if problems:
            raise ValueError(
                f"optimiser state: expected the state of these {len(self.parameters)} parameters, got "
                f"{'; '.join(problems[:20])}; resume with the configuration that wrote the checkpoint"
            )
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            param = self.parameters[name]
            self._home[name].state[param][key] = value.to(device=param.device, copy=True)
