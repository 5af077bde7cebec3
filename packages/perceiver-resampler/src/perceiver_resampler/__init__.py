"""Any number of features to a fixed number of tokens: the perceiver resampler of Flamingo and xGen-MM."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import InstructedResamplerConfig as InstructedResamplerConfig
    from .config import ResamplerConfig as ResamplerConfig
    from .config import xgen_mm as xgen_mm
    from .model import PerceiverResampler as PerceiverResampler

__all__ = ["InstructedResamplerConfig", "PerceiverResampler", "ResamplerConfig", "xgen_mm"]
_HOMES = {
    "InstructedResamplerConfig": "config",
    "ResamplerConfig": "config",
    "xgen_mm": "config",
    "PerceiverResampler": "model",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
