"""The Triton products with int8 and int4 weights against the references."""

import pytest
import torch

from fused_kernels import int4_matmul, int8_matmul, pack_int4, quantise_int4, quantise_int8
from fused_kernels.integers import INT4_GROUP


@pytest.mark.parametrize(("t", "n", "d"), [(1, 1, 1), (3, 7, 13), (1, 5, 1025), (17, 3, 5)])
def test_int8_kernel_is_the_reference(check_kernel, kernel_dtype, t, n, d):
    from fused_kernels.int_matmul import INT8_MATMUL

    codes, scales = quantise_int8(torch.randn(n, d))
    x = torch.randn(t, d, dtype=torch.float64).requires_grad_()
    kernel = INT8_MATMUL.backends["triton"].run
    check_kernel(kernel, lambda *a: int8_matmul(*a, backend="reference"), kernel_dtype, x, codes, scales)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("t", "n", "d"), [(1, 1, 1), (3, 65, 96), (1, 3, 1056), (17, 3, 5)])
def test_int4_kernel_is_the_reference(check_kernel, kernel_dtype, t, n, d, block):
    from fused_kernels.int_matmul import INT4_MATMUL

    codes, scales = quantise_int4(torch.randn(n, d))
    packed = pack_int4(codes, block)
    scales = torch.nn.functional.pad(scales, (0, 0, 0, -n % block))
    x = torch.randn(t, -(-d // INT4_GROUP) * INT4_GROUP, dtype=torch.float64).requires_grad_()
    kernel = INT4_MATMUL.backends["triton"].run
    check_kernel(kernel, lambda *a: int4_matmul(*a, backend="reference"), kernel_dtype, x, packed, scales)
