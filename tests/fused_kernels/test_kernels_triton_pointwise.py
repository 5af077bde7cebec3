"""Triton's norms, activations, rotation, rows and patches: values and every gradient against the references in fp64."""

import pytest
import torch

from fused_kernels import (
    add_layer_norm,
    add_rms_norm,
    gelu_tanh,
    layer_norm,
    normalised_patches,
    replace_rows,
    rms_norm,
    rotary_embedding,
    swiglu,
)

# Rows and width: one, primes, one past the columns of a tile, and one past two tiles of rows, shared by two programs.
SHAPES = [(1, 1), (7, 13), (513, 16), (3, 65), (2, 5, 129)]


def new(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_kernel_is_the_reference(check_kernel, kernel_dtype, shape):
    from fused_kernels.norms_triton import rms_norm as kernel

    check_kernel(kernel, lambda *a: rms_norm(*a, backend="reference"), kernel_dtype, new(*shape), new(shape[-1]), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_kernel_is_the_reference(check_kernel, kernel_dtype, shape):
    from fused_kernels.norms_triton import layer_norm as kernel

    args = new(*shape), new(shape[-1]), new(shape[-1]), 1e-3
    check_kernel(kernel, lambda *a: layer_norm(*a, backend="reference"), kernel_dtype, *args)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_kernel_is_the_reference(check_kernel, kernel_dtype, shape):
    from fused_kernels.norms_triton import add_rms_norm as kernel

    args = new(*shape), new(*shape), new(shape[-1]), 1e-5
    check_kernel(kernel, lambda *a: add_rms_norm(*a, backend="reference"), kernel_dtype, *args)


@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm_kernel_is_the_reference(check_kernel, kernel_dtype, shape):
    from fused_kernels.norms_triton import add_layer_norm as kernel

    args = new(*shape), new(*shape), new(shape[-1]), new(shape[-1]), 1e-3
    check_kernel(kernel, lambda *a: add_layer_norm(*a, backend="reference"), kernel_dtype, *args)


def test_norm_kernel_of_frozen_weights_gives_them_no_gradient(check_kernel, kernel_dtype):
    from fused_kernels.norms_triton import add_layer_norm as kernel

    args = new(5, 9), new(5, 9), new(9).detach(), new(9).detach(), 1e-3
    check_kernel(kernel, lambda *a: add_layer_norm(*a, backend="reference"), kernel_dtype, *args)


def test_norm_kernel_of_no_rows(kernel_device):
    from fused_kernels.norms_triton import rms_norm as kernel

    x = torch.zeros(0, 4, device=kernel_device, requires_grad=True)
    weight = torch.ones(4, device=kernel_device, requires_grad=True)
    grads = torch.autograd.grad(kernel(x, weight, 1e-5).sum(), (x, weight))
    assert torch.equal(grads[1], torch.zeros_like(weight))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 13), (3, 65), (2, 2, 2049)])
def test_swiglu_kernel_is_the_reference(check_kernel, kernel_dtype, shape):
    from fused_kernels.activations_triton import swiglu as kernel

    x = new(*shape[:-1], 2 * shape[-1])
    check_kernel(kernel, lambda *a: swiglu(*a, backend="reference"), kernel_dtype, x)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 129), (67, 13), (2, 2, 2049)])
def test_gelu_tanh_kernel_is_the_reference(check_kernel, kernel_dtype, shape, has_bias):
    from fused_kernels.activations_triton import gelu_tanh as kernel

    args = new(*shape), new(shape[-1]) if has_bias else None
    check_kernel(kernel, lambda *a: gelu_tanh(*a, backend="reference"), kernel_dtype, *args)


@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_kv_heads", "head_dim", "num_angles"),
    [
        ((0,), 1, 1, 2, 1),
        ((1,), 1, 1, 2, 1),
        ((7,), 4, 2, 64, 32),
        ((3,), 2, 1, 72, 36),
        ((3,), 5, 1, 96, 48),
        ((2, 3), 3, 3, 80, 16),
        ((2,), 33, 32, 128, 64),
    ],
)
def test_rotary_kernel_is_the_reference(
    check_kernel, kernel_dtype, tokens, num_heads, num_kv_heads, head_dim, num_angles
):
    from fused_kernels.rotary_triton import rotary_embedding as kernel

    angles = torch.randn(*tokens, num_angles, dtype=torch.float64)
    args = new(*tokens, num_heads, head_dim), new(*tokens, num_kv_heads, head_dim), angles.cos(), angles.sin()
    check_kernel(kernel, lambda *a: rotary_embedding(*a, backend="reference"), kernel_dtype, *args)


def test_rotary_kernel_reads_views_of_a_packed_product(check_kernel, kernel_dtype):
    from fused_kernels.rotary_triton import rotary_embedding as kernel

    def through(function):
        def run(packed, cos, sin):
            q, k, v = packed.split((3, 2, 2), dim=1)
            return (*function(q, k, cos, sin), v.clone())

        return run

    angles = torch.randn(5, 4, dtype=torch.float64)
    reference = through(lambda *a: rotary_embedding(*a, backend="reference"))
    check_kernel(through(kernel), reference, kernel_dtype, new(5, 7, 8), angles.cos(), angles.sin())


@pytest.mark.parametrize(("t", "m", "d"), [(1, 1, 1), (7, 3, 13), (5, 0, 2), (4, 4, 2049)])
def test_replace_rows_kernel_is_the_reference(check_kernel, kernel_dtype, t, m, d):
    from fused_kernels.rows_triton import replace_rows as kernel

    index = torch.randperm(t)[:m]
    reference = lambda *a: replace_rows(*a, backend="reference")  # noqa: E731
    check_kernel(kernel, reference, kernel_dtype, new(t, d), new(m, d), index)


def test_replace_rows_by_hand():
    x, rows = torch.arange(6.0).view(3, 2), torch.tensor([[9.0, 8.0]])
    assert replace_rows(x, rows, torch.tensor([1])).tolist() == [[0, 1], [9, 8], [4, 5]]


def test_replace_rows_refuses_two_dtypes():
    with pytest.raises(ValueError, match=r"expected torch.float32, as x, got torch.float16"):
        replace_rows(torch.zeros(2, 2), torch.zeros(1, 2).half(), torch.tensor([1]))


@pytest.mark.parametrize(("size", "patch_px"), [((1, 1), 1), ((9, 14), 3), ((30, 31), 14), ((48, 64), 16)])
def test_patches_kernel_is_the_reference(check_kernel, kernel_dtype, size, patch_px):
    from fused_kernels.pixels_triton import normalised_patches as kernel

    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    check_kernel(
        lambda x: kernel(x, patch_px, kernel_dtype),
        lambda x: normalised_patches(x, patch_px, torch.float64, backend="reference"),
        kernel_dtype,
        pixels,
    )


def test_patches_times_the_flat_weight_are_the_convolution():
    pixels = torch.randint(0, 256, (2, 3, 9, 14), dtype=torch.uint8)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(pixels.double() / 127.5 - 1, weight, stride=4)
    got = normalised_patches(pixels, 4, torch.float64) @ weight.flatten(1).t()
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2), rtol=1e-6, atol=1e-5)
