"""Quantised weights: errors as theory says against a float64 quantiser, and products that are the reference's."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fused_kernels import (
    INT4_GROUP,
    BackendError,
    dequantise_int4,
    dequantise_int8,
    int4_block,
    int4_matmul,
    int8_matmul,
    pack_int4,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)
from fused_kernels.integers import torch_int4_block

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["by_slab", "torch", "reference"]
# rows of x, rows and columns of the weight: ones, primes, one past a group and past a block, whole ones
SHAPES = [(1, 1, 1), (3, 7, 33), (2, 65, 64), (70, 64, 32), (5, 130, 96), (4, 31, 17)]


def random_weight(n: int, d: int) -> Tensor:
    """Rows of very different size, one of them zero."""
    weight = torch.randn(n, d) * torch.logspace(-3, 2, n)[:, None]
    weight[n // 2] = 0 if n > 1 else 1
    return weight


def q8_0_weight(n: int, d: int) -> Tensor:
    """Weights as a Q8_0 file gives them: 8-bit codes times an fp16 scale for each 32 along a row."""
    scales = (torch.rand(n, -(-d // 32)) * 0.01 + 1e-4).half().float()
    codes = torch.randint(-127, 128, (n, d)).float()
    return codes * scales.repeat_interleave(32, dim=1)[:, :d]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    error = (got.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(1e-300))


def padded_scales(scales: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(scales, (0, 0, 0, -scales.shape[1] % block))


def quantised(kind: str, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes, scales) as the product wants them, and the weights that they stand for, in float64."""
    if kind == "int8":
        codes, scales = quantise_int8(weight, dtype)
        return codes, scales, dequantise_int8(codes, scales.double())
    codes, scales = quantise_int4(weight, dtype)
    meant = dequantise_int4(codes, scales.double())[:, : weight.shape[1]]
    return pack_int4(codes, int4_block()), padded_scales(scales, int4_block()), meant


MATMULS = {"int8": int8_matmul, "int4": int4_matmul}


@pytest.mark.parametrize("make", [random_weight, q8_0_weight])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_are_those_of_a_float64_quantiser(make, dtype):
    weight = make(37, 75)
    codes, scales = quantise_int8(weight, dtype)
    wide, steps = weight.double().numpy(), scales.double().numpy()[:, None]
    # The scale is the smallest of its dtype that reaches the greatest weight with 127 steps.
    greatest = np.abs(wide).max(axis=1, keepdims=True) / 127
    assert (steps >= greatest * (1 - 1e-6)).all()
    assert (steps <= greatest * (1 + 2 * torch.finfo(dtype).eps) + torch.finfo(dtype).smallest_normal).all()
    exact = np.divide(wide, steps, out=np.zeros_like(wide), where=steps > 0)
    is_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
    assert ((codes.numpy() == np.rint(exact)) | is_tie).all()
    error = np.abs(codes.double().numpy() * steps - wide)
    assert (error <= steps / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize("make", [random_weight, q8_0_weight])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_codes_are_those_of_a_float64_quantiser(make, dtype):
    weight = make(37, 75)
    codes, scales = quantise_int4(weight, dtype)
    assert codes.shape == (37, 96)
    assert scales.shape == (3, 37, 2)
    for group in range(3):
        columns = slice(group * INT4_GROUP, min(75, (group + 1) * INT4_GROUP))
        wide = weight[:, columns].double().numpy()
        step, zero = (scales[group, :, part, None].double().numpy() for part in (0, 1))
        # 15 steps from the least to the greatest, and no more than a rounded zero makes necessary
        span = wide.max(axis=1, keepdims=True) - wide.min(axis=1, keepdims=True)
        slack = np.abs(zero) * torch.finfo(dtype).eps / 7 + torch.finfo(dtype).tiny
        assert (step <= (span / 15 + slack) * (1 + 2 * torch.finfo(dtype).eps)).all()
        exact = np.divide(wide - zero, step, out=np.zeros_like(wide), where=step > 0)
        expected = np.clip(np.rint(exact), -8, 7) + 8
        is_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-3
        found = codes[:, columns].numpy()
        assert ((found == expected) | is_tie).all()
        error = np.abs((found - 8.0) * step + zero - wide)
        assert (error <= step / 2 * (1 + 1e-3)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_on_a_grid_survive_exactly(dtype):
    steps = torch.tensor([0.25, 2.0**-9, 4.0])[:, None]
    eight = torch.cat([torch.randint(-127, 128, (3, 40)), torch.full((3, 1), 127)], dim=1) * steps
    assert torch.equal(dequantise_int8(*quantise_int8(eight, dtype)), eight.to(dtype))
    # every code in each group, about a centre that is no zero
    four = (torch.stack([torch.randperm(32) % 16 for _ in range(3)]) - 8) * steps + steps * 3
    assert torch.equal(dequantise_int4(*quantise_int4(four, dtype)), four.to(dtype))


def test_random_weights_err_by_a_uniform_rounding_error():
    """The error of a uniform quantiser is uniform: rms = step / √12 (Bennett, 1948)."""
    weight = torch.randn(64, 1024)
    codes, scales = quantise_int8(weight)
    ratio = (dequantise_int8(codes, scales) - weight).square().mean(1).sqrt() / (scales / 12**0.5)
    assert ratio.mean().item() == pytest.approx(1, abs=0.02)
    four, steps = quantise_int4(weight)
    error = (dequantise_int4(four, steps) - weight).square().unflatten(1, (-1, INT4_GROUP)).mean(2).sqrt().t()
    # A little less: the least and the greatest of a group's 32 lie on the grid.
    assert (error / (steps[..., 0] / 12**0.5)).mean().item() == pytest.approx((30 / 32) ** 0.5, abs=0.02)


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int4])
def test_weights_that_are_not_finite_are_refused(quantise):
    weight = torch.ones(3, 40)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight[1, 7] = bad
        with pytest.raises(ValueError, match="expected finite numbers"):
            quantise(weight)


@pytest.mark.parametrize("block", [64, 32, 2])
def test_packing_is_undone(block):
    codes = torch.randint(0, 16, (67, 32), dtype=torch.uint8)
    packed = pack_int4(codes, block)
    assert packed.shape == (-(-67 // block), 32, block // 2)
    assert packed[0, 5, 0] == codes[0, 5] + 16 * codes[block // 2, 5]
    assert torch.equal(unpack_int4(packed)[:67], codes)
    assert not unpack_int4(packed)[67:].any()


def test_blocks_are_laid_out_as_pytorch_does():
    block = torch_int4_block()
    if block is None:
        pytest.skip("PyTorch's int4 operation has no vector code for this CPU")
    codes = torch.randint(0, 16, (3 * block, 96), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(pack_int4(codes, block).flatten(), theirs.flatten())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "by_slab", "reference"])
@pytest.mark.parametrize("kind", MATMULS)
def test_product_in_fp32_is_that_of_the_dequantised_weights(kind, backend, shape):
    t, n, d = shape
    x = torch.randn(t, d)
    codes, scales, meant = quantised(kind, torch.randn(n, d) / d**0.5, torch.float32)
    got = MATMULS[kind](x, codes, scales, backend=backend)[:, :n]
    assert got.dtype == torch.float32
    assert relative_rms(got, x.double() @ meant.t()) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MATMULS)
def test_product_in_bf16_is_near_that_of_the_dequantised_weights(kind, backend, shape):
    t, n, d = shape
    x = torch.randn(t, d).bfloat16()
    codes, scales, meant = quantised(kind, torch.randn(n, d) / d**0.5, torch.bfloat16)
    try:
        got = MATMULS[kind](x, codes, scales, backend=backend)[:, :n]
    except BackendError as error:
        pytest.skip(str(error))
    assert got.dtype == torch.bfloat16
    assert relative_rms(got, x.double() @ meant.t()) <= 1e-2


@pytest.mark.parametrize("kind", MATMULS)
def test_product_keeps_leading_axes_and_takes_no_rows(kind):
    codes, scales, _ = quantised(kind, torch.randn(64, 32), torch.float32)
    x = torch.randn(2, 3, 32)
    whole = MATMULS[kind](x, codes, scales)
    assert whole.shape == (2, 3, 64)
    torch.testing.assert_close(whole[1, 2], MATMULS[kind](x[1, 2], codes, scales))
    assert MATMULS[kind](x[:0], codes, scales).shape == (0, 3, 64)


@pytest.mark.parametrize("backend", ["by_slab", "reference"])
@pytest.mark.parametrize("kind", MATMULS)
def test_gradient_at_x_is_that_of_finite_differences(kind, backend):
    codes, scales, _ = quantised(kind, torch.randn(5, 34), torch.float64)
    x = torch.randn(2, 34, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: MATMULS[kind](x, codes, scales, backend=backend), (x,))


@pytest.mark.parametrize("kind", MATMULS)
def test_gradient_in_bf16_is_near_that_of_the_dequantised_weights(kind):
    codes, scales, meant = quantised(kind, torch.randn(70, 64), torch.bfloat16)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    out = MATMULS[kind](x, codes, scales)
    grad = torch.randn(out.shape).bfloat16()
    out.backward(grad)
    assert x.grad is not None
    assert relative_rms(x.grad, grad[:, :70].double() @ meant) <= 1e-2


def test_products_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="channels of int8_matmul: expected 4, got 5"):
        int8_matmul(torch.ones(1, 5), torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    packed = torch.zeros(1, 64, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales of int4_matmul: expected \(2, 64, 2\)"):
        int4_matmul(torch.ones(1, 64), packed, torch.ones(2, 63, 2))
    for width in (32, 65):
        with pytest.raises(ValueError, match=f"channels of int4_matmul: expected 64, .* got {width}"):
            int4_matmul(torch.ones(1, width), packed, torch.ones(2, 64, 2))
