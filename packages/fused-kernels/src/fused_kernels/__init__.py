"""The hot operations of a multimodal model on plain tensors: readable references behind one explicit dispatch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .activations import gelu_tanh as gelu_tanh
    from .activations import swiglu as swiglu
    from .decoder_stack import DecoderStack as DecoderStack
    from .decoder_stack import HeldKeys as HeldKeys
    from .decoder_stack import LayerWeights as LayerWeights
    from .decoder_stack import decoder_layers as decoder_layers
    from .dense import attention as attention
    from .dense import cached_attention as cached_attention
    from .dense import joint_attention as joint_attention
    from .dispatch import BackendError as BackendError
    from .dispatch import BackendRow as BackendRow
    from .int_matmul import int4_matmul as int4_matmul
    from .int_matmul import int8_matmul as int8_matmul
    from .integers import INT4_GROUP as INT4_GROUP
    from .integers import dequantise_int4 as dequantise_int4
    from .integers import dequantise_int8 as dequantise_int8
    from .integers import int4_block as int4_block
    from .integers import pack_int4 as pack_int4
    from .integers import quantise_int4 as quantise_int4
    from .integers import quantise_int8 as quantise_int8
    from .integers import unpack_int4 as unpack_int4
    from .linear_loss import linear_cross_entropy as linear_cross_entropy
    from .linear_loss import linear_log_prob_pairs as linear_log_prob_pairs
    from .linear_loss import linear_log_probs as linear_log_probs
    from .linear_product import linear as linear
    from .norms import add_layer_norm as add_layer_norm
    from .norms import add_rms_norm as add_rms_norm
    from .norms import layer_norm as layer_norm
    from .norms import rms_norm as rms_norm
    from .packed import PackPlan as PackPlan
    from .packed import packed_attention as packed_attention
    from .packed import plan_packing as plan_packing
    from .pixels import normalised_patches as normalised_patches
    from .report import backend_report as backend_report
    from .rotary import rotary_embedding as rotary_embedding
    from .rows import replace_rows as replace_rows
    from .token_step import TokenEnds as TokenEnds
    from .token_step import decode_tokens as decode_tokens

__all__ = [
    "INT4_GROUP",
    "BackendError",
    "BackendRow",
    "DecoderStack",
    "HeldKeys",
    "LayerWeights",
    "PackPlan",
    "TokenEnds",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "backend_report",
    "cached_attention",
    "decode_tokens",
    "decoder_layers",
    "dequantise_int4",
    "dequantise_int8",
    "gelu_tanh",
    "int4_block",
    "int4_matmul",
    "int8_matmul",
    "joint_attention",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_log_prob_pairs",
    "linear_log_probs",
    "normalised_patches",
    "pack_int4",
    "packed_attention",
    "plan_packing",
    "quantise_int4",
    "quantise_int8",
    "replace_rows",
    "rms_norm",
    "rotary_embedding",
    "swiglu",
    "unpack_int4",
]
_HOMES = {
    "INT4_GROUP": "integers",
    "BackendError": "dispatch",
    "BackendRow": "dispatch",
    "DecoderStack": "decoder_stack",
    "HeldKeys": "decoder_stack",
    "LayerWeights": "decoder_stack",
    "PackPlan": "packed",
    "add_layer_norm": "norms",
    "add_rms_norm": "norms",
    "attention": "dense",
    "backend_report": "report",
    "cached_attention": "dense",
    "TokenEnds": "token_step",
    "decode_tokens": "token_step",
    "decoder_layers": "decoder_stack",
    "dequantise_int4": "integers",
    "dequantise_int8": "integers",
    "gelu_tanh": "activations",
    "int4_block": "integers",
    "int4_matmul": "int_matmul",
    "int8_matmul": "int_matmul",
    "joint_attention": "dense",
    "layer_norm": "norms",
    "linear": "linear_product",
    "linear_cross_entropy": "linear_loss",
    "linear_log_prob_pairs": "linear_loss",
    "linear_log_probs": "linear_loss",
    "normalised_patches": "pixels",
    "pack_int4": "integers",
    "packed_attention": "packed",
    "plan_packing": "packed",
    "quantise_int4": "integers",
    "quantise_int8": "integers",
    "replace_rows": "rows",
    "rms_norm": "norms",
    "rotary_embedding": "rotary",
    "swiglu": "activations",
    "unpack_int4": "integers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
