"""A BLIP-3 (xGen-MM) style model from its parts: fusion, processor, generation, checkpoints."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi3_lite import SamplingConfig as SamplingConfig

    from .batch import EncodedSample as EncodedSample
    from .batch import PackedBatch as PackedBatch
    from .batch import collate as collate
    from .checkpoint import WEIGHTS as WEIGHTS
    from .checkpoint import LoadedModel as LoadedModel
    from .checkpoint import load_model as load_model
    from .checkpoint import load_tensors as load_tensors
    from .checkpoint import model_writers as model_writers
    from .checkpoint import newest_checkpoint as newest_checkpoint
    from .checkpoint import save_model as save_model
    from .config import Blip3Config as Blip3Config
    from .config import CheckpointConfig as CheckpointConfig
    from .features import FeatureCache as FeatureCache
    from .folder import CheckpointError as CheckpointError
    from .folder import read_manifest as read_manifest
    from .folder import write_folder as write_folder
    from .fusion import place_image_tokens as place_image_tokens
    from .generation import Collate as Collate
    from .generation import answer_batch as answer_batch
    from .generation import generate_steps as generate_steps
    from .generation import stream_answer as stream_answer
    from .memory import ChatMemory as ChatMemory
    from .model import Blip3 as Blip3
    from .processor import Processor as Processor
    from .processor import load_tokenizer as load_tokenizer
    from .processor import user_turn as user_turn
    from .spans import Span as Span
    from .spans import Token as Token
    from .spans import spans_of as spans_of

__all__ = [
    "WEIGHTS",
    "Blip3",
    "Blip3Config",
    "ChatMemory",
    "CheckpointConfig",
    "CheckpointError",
    "Collate",
    "EncodedSample",
    "FeatureCache",
    "LoadedModel",
    "PackedBatch",
    "Processor",
    "SamplingConfig",
    "Span",
    "Token",
    "answer_batch",
    "collate",
    "generate_steps",
    "load_model",
    "load_tensors",
    "load_tokenizer",
    "model_writers",
    "newest_checkpoint",
    "place_image_tokens",
    "read_manifest",
    "save_model",
    "spans_of",
    "stream_answer",
    "user_turn",
    "write_folder",
]
_HOMES = {
    "Blip3Config": "config",
    "ChatMemory": "memory",
    "CheckpointConfig": "config",
    "CheckpointError": "folder",
    "read_manifest": "folder",
    "write_folder": "folder",
    "EncodedSample": "batch",
    "PackedBatch": "batch",
    "collate": "batch",
    "FeatureCache": "features",
    "WEIGHTS": "checkpoint",
    "LoadedModel": "checkpoint",
    "load_model": "checkpoint",
    "load_tensors": "checkpoint",
    "model_writers": "checkpoint",
    "newest_checkpoint": "checkpoint",
    "save_model": "checkpoint",
    "place_image_tokens": "fusion",
    "Collate": "generation",
    "SamplingConfig": "generation",
    "answer_batch": "generation",
    "generate_steps": "generation",
    "stream_answer": "generation",
    "Blip3": "model",
    "Processor": "processor",
    "load_tokenizer": "processor",
    "user_turn": "processor",
    "Span": "spans",
    "Token": "spans",
    "spans_of": "spans",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
