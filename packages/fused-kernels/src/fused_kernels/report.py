"""The table of what runs where, for an application to print at its start."""

import torch

from . import (
    activations,
    decoder_stack,
    dense,
    int_matmul,
    linear_loss,
    linear_product,
    norms,
    packed,
    pixels,
    rotary,
    rows,
    token_step,
)
from .dispatch import BackendRow

_OPS = (
    linear_product.LINEAR,
    norms.RMS_NORM,
    norms.LAYER_NORM,
    norms.ADD_RMS_NORM,
    norms.ADD_LAYER_NORM,
    rotary.ROTARY_EMBEDDING,
    activations.SWIGLU,
    activations.GELU_TANH,
    dense.ATTENTION,
    dense.JOINT_ATTENTION,
    dense.CACHED_ATTENTION,
    packed.PACKED_ATTENTION,
    decoder_stack.DECODER_LAYERS,
    token_step.DECODE_TOKENS,
    linear_loss.LINEAR_CROSS_ENTROPY,
    linear_loss.LINEAR_LOG_PROBS,
    rows.REPLACE_ROWS,
    pixels.NORMALISED_PATCHES,
    int_matmul.INT8_MATMUL,
    int_matmul.INT4_MATMUL,
)


def backend_report(device: torch.device | str, dtype: torch.dtype) -> list[BackendRow]:
    """Return one row an operation: what `backend="auto"` takes for tensors of this device and dtype, and why.

    It asks each backend's own rule and runs nothing.
    """
    return [op.report(torch.device(device), dtype) for op in _OPS]
