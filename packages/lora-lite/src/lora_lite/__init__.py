"""LoRA and DoRA on linear layers: attach, train, merge, unmerge exactly, in PEFT's files too."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter import LoraLayer as LoraLayer
    from .config import LoraConfig as LoraConfig
    from .config import xgen_mm_lora as xgen_mm_lora
    from .layer import LoraLinear as LoraLinear
    from .model import attach as attach
    from .model import base_state_dict as base_state_dict
    from .model import detach as detach
    from .model import disabled as disabled
    from .model import load_lora_state_dict as load_lora_state_dict
    from .model import lora_layers as lora_layers
    from .model import lora_parameters as lora_parameters
    from .model import lora_state_dict as lora_state_dict
    from .model import merge as merge
    from .model import merge_and_remove as merge_and_remove
    from .model import unmerge as unmerge
    from .peft_files import load_peft as load_peft
    from .peft_files import save_peft as save_peft
    from .quantised import LoraQuantised as LoraQuantised

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "LoraQuantised",
    "attach",
    "base_state_dict",
    "detach",
    "disabled",
    "load_lora_state_dict",
    "load_peft",
    "lora_layers",
    "lora_parameters",
    "lora_state_dict",
    "merge",
    "merge_and_remove",
    "save_peft",
    "unmerge",
    "xgen_mm_lora",
]
_HOMES = {
    "LoraConfig": "config",
    "LoraLayer": "adapter",
    "LoraLinear": "layer",
    "LoraQuantised": "quantised",
    "attach": "model",
    "base_state_dict": "model",
    "detach": "model",
    "disabled": "model",
    "load_lora_state_dict": "model",
    "load_peft": "peft_files",
    "lora_layers": "model",
    "lora_parameters": "model",
    "lora_state_dict": "model",
    "merge": "model",
    "merge_and_remove": "model",
    "save_peft": "peft_files",
    "unmerge": "model",
    "xgen_mm_lora": "config",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
