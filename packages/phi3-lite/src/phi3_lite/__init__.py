"""Phi-3 in plain PyTorch: packed training, ragged decoding, sampling, tokenizer and chat template."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import KVCache as KVCache
    from .chat import IMAGE as IMAGE
    from .chat import SMOLLM2_SYSTEM as SMOLLM2_SYSTEM
    from .chat import ChatKind as ChatKind
    from .chat import ChatTemplate as ChatTemplate
    from .chat import ChatTurn as ChatTurn
    from .chat import EncodedChat as EncodedChat
    from .chat import ImageSlot as ImageSlot
    from .config import GenerationDefaults as GenerationDefaults
    from .config import LongRope as LongRope
    from .config import Phi3Config as Phi3Config
    from .config import SamplingConfig as SamplingConfig
    from .config import mini_4k as mini_4k
    from .config import mini_128k as mini_128k
    from .config import phi4_mini as phi4_mini
    from .config import phi35_mini as phi35_mini
    from .formats.huggingface import save_huggingface as save_huggingface
    from .formats.loading import LoadedLM as LoadedLM
    from .formats.loading import load_lm as load_lm
    from .layout import lay_out_for_decoding as lay_out_for_decoding
    from .model import Phi3 as Phi3
    from .prefix import PromptMemory as PromptMemory
    from .quantised import Quantisation as Quantisation
    from .quantised import QuantisedLinear as QuantisedLinear
    from .quantised import load_targets as load_targets
    from .quantised import quantise_linears as quantise_linears
    from .sampling import FINISHED as FINISHED
    from .sampling import GenerationStep as GenerationStep
    from .sampling import choose_tokens as choose_tokens
    from .sampling import collect as collect
    from .sampling import generate as generate
    from .sampling import penalise_repeats as penalise_repeats
    from .stop_text import StopCutter as StopCutter
    from .stop_text import StopTexts as StopTexts
    from .stop_text import cut_at_stop as cut_at_stop
    from .stop_text import stream_text as stream_text
    from .tokenizer import StreamDecoder as StreamDecoder
    from .tokenizer import Tokenizer as Tokenizer
    from .tokenizer_hf import HFTokenizer as HFTokenizer
    from .tokenizer_sp import PHI3_CONTROL_IDS as PHI3_CONTROL_IDS
    from .tokenizer_sp import SentencePieceTokenizer as SentencePieceTokenizer
    from .tokenizer_train import CONTROL_TOKENS as CONTROL_TOKENS
    from .tokenizer_train import train_tokenizer as train_tokenizer

__all__ = [
    "CONTROL_TOKENS",
    "FINISHED",
    "IMAGE",
    "PHI3_CONTROL_IDS",
    "SMOLLM2_SYSTEM",
    "ChatKind",
    "ChatTemplate",
    "ChatTurn",
    "EncodedChat",
    "GenerationDefaults",
    "GenerationStep",
    "HFTokenizer",
    "ImageSlot",
    "KVCache",
    "LoadedLM",
    "LongRope",
    "Phi3",
    "Phi3Config",
    "PromptMemory",
    "Quantisation",
    "QuantisedLinear",
    "SamplingConfig",
    "SentencePieceTokenizer",
    "StopCutter",
    "StopTexts",
    "StreamDecoder",
    "Tokenizer",
    "choose_tokens",
    "collect",
    "cut_at_stop",
    "generate",
    "lay_out_for_decoding",
    "load_lm",
    "load_targets",
    "mini_4k",
    "mini_128k",
    "penalise_repeats",
    "phi4_mini",
    "phi35_mini",
    "quantise_linears",
    "save_huggingface",
    "stream_text",
    "train_tokenizer",
]
_HOMES = {
    "KVCache": "cache",
    "ChatKind": "chat",
    "ChatTemplate": "chat",
    "ChatTurn": "chat",
    "EncodedChat": "chat",
    "IMAGE": "chat",
    "GenerationDefaults": "config",
    "LongRope": "config",
    "SMOLLM2_SYSTEM": "chat",
    "Phi3Config": "config",
    "SamplingConfig": "config",
    "mini_128k": "config",
    "mini_4k": "config",
    "phi35_mini": "config",
    "phi4_mini": "config",
    "save_huggingface": "formats.huggingface",
    "LoadedLM": "formats.loading",
    "load_lm": "formats.loading",
    "lay_out_for_decoding": "layout",
    "Phi3": "model",
    "QuantisedLinear": "quantised",
    "PromptMemory": "prefix",
    "Quantisation": "quantised",
    "load_targets": "quantised",
    "quantise_linears": "quantised",
    "FINISHED": "sampling",
    "GenerationStep": "sampling",
    "choose_tokens": "sampling",
    "collect": "sampling",
    "generate": "sampling",
    "penalise_repeats": "sampling",
    "StopCutter": "stop_text",
    "StopTexts": "stop_text",
    "cut_at_stop": "stop_text",
    "stream_text": "stop_text",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "HFTokenizer": "tokenizer_hf",
    "ImageSlot": "chat",
    "PHI3_CONTROL_IDS": "tokenizer_sp",
    "SentencePieceTokenizer": "tokenizer_sp",
    "CONTROL_TOKENS": "tokenizer_train",
    "train_tokenizer": "tokenizer_train",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
