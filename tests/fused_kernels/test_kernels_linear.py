"""Products in half precision by way of fp32: the same numbers, gradients and dtypes as without."""

import pytest
import torch

from fused_kernels import BackendError, linear, linear_product


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_product, "_lacks_half_units", lambda: True)
    # what was found out about this machine before
    monkeypatch.setattr(linear_product.LINEAR, "_able", {})


def _inputs(rows: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    shapes = ((3, rows // 3, 17), (11, 17), (11,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rows", [3, 96], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_by_fp32_is_as_near_to_fp64_as_its_dtype(without_units, rows: int, dtype: torch.dtype) -> None:
    inputs = _inputs(rows, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = torch.randn(3, rows // 3, 11).to(dtype)
    out = linear(*inputs, backend="by_fp32")
    expected = linear(*wide, backend="reference")
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=4 * eps)
    found = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), other, rtol=2 * eps, atol=40 * eps)


@pytest.mark.parametrize("has_bias", [False, True])
def test_one_long_row_in_half_precision_is_as_near_to_fp64_as_its_dtype(without_units, has_bias: bool) -> None:
    x, weight, bias = torch.randn(1, 1, 2053), torch.randn(7, 2053) / 45, torch.randn(7)
    inputs = [tensor.bfloat16() for tensor in ((x, weight, bias) if has_bias else (x, weight))]
    out = linear(*inputs, backend="by_fp32")
    assert out.shape == (1, 1, 7)
    assert out.dtype == torch.bfloat16
    expected = linear(*(tensor.double() for tensor in inputs), backend="reference")
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=2 * eps)


def test_only_the_gradients_that_are_wanted_are_made(without_units) -> None:
    x, weight, bias = _inputs(96)
    weight.requires_grad_(False)
    linear(x, weight, bias).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((11,), 96.0, dtype=torch.bfloat16))


def test_autocast_decides_the_dtype_as_for_a_plain_product(without_units) -> None:
    inputs = _inputs(96, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(*inputs)
        expected = torch.nn.functional.linear(*inputs)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    found, wanted = (torch.autograd.grad(result.float().sum(), inputs) for result in (out, expected))
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=2e-2, atol=5e-2)


def test_fp32_is_the_plain_product_bit_for_bit(without_units) -> None:
    inputs = _inputs(96, torch.float32)
    assert torch.equal(linear(*inputs), torch.nn.functional.linear(*inputs))


def test_fp32_cannot_be_asked_to_go_by_fp32() -> None:
    with pytest.raises(BackendError, match="half precision on a CPU"):
        linear(*_inputs(96, torch.float32), backend="by_fp32")
