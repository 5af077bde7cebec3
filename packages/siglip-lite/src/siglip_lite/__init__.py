"""SigLIP in plain PyTorch: vision tower, text tower, sigmoid loss."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import SiglipConfig as SiglipConfig
    from .config import SiglipTextConfig as SiglipTextConfig
    from .config import SiglipVisionConfig as SiglipVisionConfig
    from .formats.huggingface import save_huggingface as save_huggingface
    from .formats.loading import load_siglip as load_siglip
    from .formats.loading import load_siglip_text as load_siglip_text
    from .formats.loading import load_siglip_vision as load_siglip_vision
    from .loss import sigmoid_loss as sigmoid_loss
    from .model import Siglip as Siglip
    from .model import SiglipOutput as SiglipOutput
    from .presets import base_patch16_224 as base_patch16_224
    from .presets import base_patch16_256 as base_patch16_256
    from .presets import base_patch16_384 as base_patch16_384
    from .presets import base_patch16_512 as base_patch16_512
    from .presets import large_patch16_256 as large_patch16_256
    from .presets import large_patch16_384 as large_patch16_384
    from .presets import so400m_patch14_224 as so400m_patch14_224
    from .presets import so400m_patch14_384 as so400m_patch14_384
    from .text import SiglipText as SiglipText
    from .tokenizer import SiglipTokenizer as SiglipTokenizer
    from .vision import SiglipVision as SiglipVision
    from .vision import interpolate_positions as interpolate_positions
    from .vision import normalise as normalise

_HOMES = {
    "SiglipConfig": "config",
    "SiglipTextConfig": "config",
    "SiglipVisionConfig": "config",
    "base_patch16_224": "presets",
    "base_patch16_256": "presets",
    "base_patch16_384": "presets",
    "base_patch16_512": "presets",
    "large_patch16_256": "presets",
    "large_patch16_384": "presets",
    "so400m_patch14_224": "presets",
    "so400m_patch14_384": "presets",
    "Siglip": "model",
    "SiglipOutput": "model",
    "SiglipText": "text",
    "SiglipTokenizer": "tokenizer",
    "SiglipVision": "vision",
    "interpolate_positions": "vision",
    "load_siglip": "formats.loading",
    "load_siglip_text": "formats.loading",
    "load_siglip_vision": "formats.loading",
    "normalise": "vision",
    "save_huggingface": "formats.huggingface",
    "sigmoid_loss": "loss",
}
__all__ = [
    "Siglip",
    "SiglipConfig",
    "SiglipOutput",
    "SiglipText",
    "SiglipTextConfig",
    "SiglipTokenizer",
    "SiglipVision",
    "SiglipVisionConfig",
    "base_patch16_224",
    "base_patch16_256",
    "base_patch16_384",
    "base_patch16_512",
    "interpolate_positions",
    "large_patch16_256",
    "large_patch16_384",
    "load_siglip",
    "load_siglip_text",
    "load_siglip_vision",
    "normalise",
    "save_huggingface",
    "sigmoid_loss",
    "so400m_patch14_224",
    "so400m_patch14_384",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
