"""Adapters on a whole model: put on by name, switched off, saved, merged, taken off."""

import difflib
import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .adapter import LoraLayer, is_lora_name
from .config import LoraConfig
from .layer import LoraLinear
from .quantised import LoraQuantised


def _is_target(name: str, target: str) -> bool:
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _unmatched(target: str, names: list[str]) -> ValueError:
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(target.rpartition(".")[2], ends, n=3) or ends
    examples = [name for end in near[:8] for name in names if name.rpartition(".")[2] == end][:12]
    return ValueError(
        f"target {target!r}: expected the name of a linear layer of this model, got no match; "
        f"{'near it are' if examples else 'it has no linear layer'} {', '.join(examples)}".rstrip()
    )


def _is_quantised(module: nn.Module) -> bool:
    """Whether it is a matrix without a `weight`; asked of its class, for a property could cost a whole matrix."""
    has_sizes = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    has_weight = inspect.getattr_static(module, "weight", None) is not None or "weight" in dict(
        module.named_parameters(recurse=False)
    )
    return has_sizes and not has_weight and not isinstance(module, nn.Linear)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return what an adapter can be put on, or is on already, by name."""
    found: dict[str, nn.Module] = {}
    adapted = ""
    for name, module in model.named_modules(remove_duplicate=False):
        if adapted and name.startswith(adapted):
            continue
        if isinstance(module, LoraQuantised):
            adapted = f"{name}."
        if name and (isinstance(module, nn.Linear) or _is_quantised(module)):
            found[name] = module
    return found


def attach(model: nn.Module, cfg: LoraConfig, *, generator: torch.Generator | None = None) -> list[str]:
    """Put an adapter on each linear layer that a target names, in place; return the layers' names in model order.

    The weight and bias of these layers are frozen; all other parameters are left as they are. A layer that stands in
    the model under several names stays one layer. A module with `in_features` and `out_features` but without `weight`
    counts as a linear layer that is quantised (`LoraQuantised`).

    Raises:
        ValueError: if a target matches no linear layer (lists near names), a layer has an adapter already or is
            part of an nn.MultiheadAttention, which reads its weight past any adapter. The model is then unchanged.
    """
    linears = linear_layers(model)
    for target in cfg.targets:
        if not any(_is_target(name, target) for name in linears):
            raise _unmatched(target, list(linears))
    chosen = {name: cfg for name in linears if any(_is_target(name, target) for target in cfg.targets)}
    attach_named(model, chosen, generator)
    return list(chosen)


def attach_named(model: nn.Module, configs: Mapping[str, LoraConfig], generator: torch.Generator | None = None) -> None:
    """Put an adapter on each of these layers, given by their whole names; the configs' targets do not count.

    Raises:
        ValueError: as `attach`, but for the targets.
    """
    linears = {name: model.get_submodule(name) for name in configs}
    for name, linear in linears.items():
        if isinstance(linear, LoraLayer):
            raise ValueError(f"layer {name!r}: expected none with an adapter, got one; detach or merge it first")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"layer {name!r}: expected a layer that is called, got one of nn.MultiheadAttention, "
                "which reads the weight past the adapter; leave it out of the targets"
            )
    adapted: dict[int, LoraLayer] = {}
    for name, linear in linears.items():
        if id(linear) not in adapted:
            kind = LoraLinear if isinstance(linear, nn.Linear) else LoraQuantised
            adapted[id(linear)] = kind(linear, configs[name], generator=generator)  # pyright: ignore[reportArgumentType]
        _replace(model, name, adapted[id(linear)])


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Return the adapted layers with their names, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the adapters' own parameters, in model order."""
    return [parameter for _, layer in lora_layers(model) for parameter in layer.adapter_tensors().values()]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' own tensors under their names in the model, detached, sharing memory."""
    return {
        f"{name}.{leaf}": tensor.detach()
        for name, layer in lora_layers(model)
        for leaf, tensor in layer.adapter_tensors().items()
    }


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the adapters' tensors from what `lora_state_dict` gave; each must be there with its shape, and no other.

    Raises:
        ValueError: if names are missing, unexpected or of another shape (all are listed), or a layer is merged. The
            model is unchanged then.
    """
    merged = [name for name, layer in lora_layers(model) if layer.is_merged]
    if merged:
        raise ValueError(f"adapters: expected none merged, got {merged}; unmerge them first")
    own = lora_state_dict(model)
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if missing or unexpected or misshaped:
        raise ValueError(
            f"adapter tensors: expected those of this model, got missing {missing}, unexpected {unexpected}, "
            f"misshaped {misshaped}; attach with the config that they were trained with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model as it was before `attach`: plain names, base weights, no adapter tensors."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_lora_name(name)}
    for name, layer in lora_layers(model):
        if isinstance(layer, LoraLinear):
            state[f"{name}.weight"] = layer.base_weight.detach()
    hidden = {f"{name}.base.": f"{name}." for name, layer in lora_layers(model) if isinstance(layer, LoraQuantised)}
    return {_renamed(name, hidden): tensor for name, tensor in state.items()}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def merge(model: nn.Module) -> None:
    """Fold each adapter into its layer's weight; the layers then cost what plain ones do. The base weights are kept.

    Raises:
        ValueError: if a layer is quantised; the model is then unchanged.
    """
    layers = [layer for _, layer in lora_layers(model)]
    # Those that refuse come first.
    for layer in sorted(layers, key=lambda layer: isinstance(layer, LoraLinear)):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: each layer gets its kept weight back, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def detach(model: nn.Module) -> None:
    """Take the adapters off: the plain layers with the base weights, trainable as they were before `attach`."""
    unmerge(model)
    _remove(model)


def merge_and_remove(model: nn.Module) -> None:
    """Fold the adapters in for good: plain nn.Linear layers with the merged weights; the base weights are let go.

    Raises:
        ValueError: if a layer is quantised; the model is then unchanged.
    """
    merge(model)
    _remove(model)


def _remove(model: nn.Module) -> None:
    plain: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoraLayer):
            if id(module) not in plain:
                plain[id(module)] = module.plain()
            _replace(model, name, plain[id(module)])


@contextmanager
def disabled(model: nn.Module) -> Generator[None]:
    """Run the model without its adapters, merged or not: the reference of the same weights, for DPO.

    Not for use while another thread runs the same model.
    """
    layers = [(layer, layer.is_enabled) for _, layer in lora_layers(model)]
    for layer, _ in layers:
        layer.is_enabled = False
    try:
        yield
    finally:
        for layer, was_enabled in layers:
            layer.is_enabled = was_enabled
