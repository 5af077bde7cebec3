"""Bytes of images as rows of normalised patches, what a patch embedding multiplies with its weights."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .dispatch import Backend, Op, on_cuda_with_triton


def _patches_reference(pixels: Tensor, patch_px: int, dtype: torch.dtype) -> Tensor:
    rows, cols = pixels.shape[2] // patch_px, pixels.shape[3] // patch_px
    scaled = pixels[:, :, : rows * patch_px, : cols * patch_px].to(torch.float32) / 127.5 - 1.0
    patches = scaled.unflatten(3, (cols, patch_px)).unflatten(2, (rows, patch_px))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(dtype)


def _patches_triton(pixels: Tensor, patch_px: int, dtype: torch.dtype) -> Tensor:
    from .pixels_triton import normalised_patches

    return normalised_patches(pixels, patch_px, dtype)


NORMALISED_PATCHES = Op(
    "normalised_patches",
    Backend("triton", _patches_triton, "one Triton kernel", on_cuda_with_triton),
    Backend("reference", _patches_reference, "plain PyTorch"),
)


def normalised_patches(
    pixels: UInt8[Tensor, "p 3 height width"],
    patch_px: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
) -> Float[Tensor, "p n values"]:
    """Scale bytes to [-1, 1] (SigLIP's mean and standard deviation of 0.5) and cut them into patches, row-major.

    A patch is 3 · patch_px² values in the order of a convolution's weight: channel, row, column; with weight
    [d, 3, patch_px, patch_px] the patch embedding is `linear(patches, weight.flatten(1), bias)`. Pixels beyond whole
    patches are dropped.

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    return NORMALISED_PATCHES.run(backend, pixels.device, dtype, pixels, patch_px, dtype)
