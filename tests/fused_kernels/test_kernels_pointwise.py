"""Norms, activations and rotation against hand-computed values, fp64 and gradcheck, for every backend."""

import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from fused_kernels import (
    add_layer_norm,
    add_rms_norm,
    gelu_tanh,
    layer_norm,
    rms_norm,
    rotary_embedding,
    swiglu,
)

BACKENDS = {
    rms_norm: ["by_hand", "reference"],
    layer_norm: ["torch", "reference"],
    add_rms_norm: ["by_hand", "reference"],
    add_layer_norm: ["torch", "reference"],
    rotary_embedding: ["by_hand", "reference"],
    swiglu: ["by_hand", "reference"],
    gelu_tanh: ["torch", "reference"],
}
CASES = [(op, backend) for op, backends in BACKENDS.items() for backend in backends]


def inputs(op, shape=(5, 7), dtype=torch.float64, requires_grad=True) -> Any:
    def new(*size):
        return torch.randn(*size, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    d = shape[-1]
    if op is rms_norm:
        return new(*shape), new(d), 1e-5
    if op is layer_norm:
        return new(*shape), new(d), new(d), 1e-5
    if op is add_rms_norm:
        return new(*shape), new(*shape), new(d), 1e-5
    if op is add_layer_norm:
        return new(*shape), new(*shape), new(d), new(d), 1e-5
    if op is swiglu:
        return (new(*shape[:-1], 2 * d),)
    if op is gelu_tanh:
        return new(*shape), new(d)
    angles = torch.randn(*shape[:-1], d, dtype=torch.float64).to(dtype)
    return new(*shape[:-1], 3, 2 * d + 1), new(*shape[:-1], 1, 2 * d + 1), angles.cos(), angles.sin()


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_gradients_are_those_of_finite_differences(op, backend):
    assert gradcheck(lambda *args: op(*args, backend=backend), inputs(op, shape=(2, 3)))


@pytest.mark.parametrize(("op", "backend"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 13), (0, 4)])
def test_backend_gives_the_reference_values(op, backend, shape):
    args = inputs(op, shape, torch.float32, requires_grad=False)
    torch.testing.assert_close(op(*args, backend=backend), op(*args, backend="reference"))


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_bf16_values_and_gradients_are_near_fp64(op, backend):
    args = inputs(op, (16, 32), torch.bfloat16)
    wide = [arg.detach().double().requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
    results = []
    for case in (args, wide):
        out = op(*case, backend=backend if case is args else "reference")
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        leaves = [arg for arg in case if torch.is_tensor(arg) and arg.requires_grad]
        weights = [torch.randn(o.shape).to(torch.bfloat16).to(o.dtype) for o in outs]
        results.append([*outs, *torch.autograd.grad(outs, leaves, weights)])
    for low, high in zip(*results, strict=True):
        error = (low.double() - high).square().mean().sqrt() / high.square().mean().sqrt()
        assert error <= 1e-2


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_result_is_fresh_and_inputs_are_untouched(op, backend):
    args = inputs(op, (2, 4), torch.float32, requires_grad=False)
    before = [arg.clone() if torch.is_tensor(arg) else arg for arg in args]
    outs = op(*args, backend=backend)
    for out in outs if isinstance(outs, tuple) else (outs,):
        out.fill_(math.nan)
    for arg, copy in zip(args, before, strict=True):
        assert arg == copy if isinstance(arg, float) else torch.equal(arg, copy)


def test_rms_norm_by_hand():
    # mean square of (3, 4) is 12.5
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5))


def test_rms_norm_casts_before_the_weight():
    x = torch.randn(4, 8).bfloat16()
    weight = torch.full((8,), 3.0)
    normalised = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    for backend in ("by_hand", "reference"):
        assert torch.equal(rms_norm(x, weight, 1e-5, backend=backend), (normalised * weight).bfloat16())


def test_layer_norm_by_hand():
    out = layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[-0.5, 2.0]]))


def test_norm_of_a_sum_by_hand():
    x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    total, normed = add_rms_norm(x, residual, torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(total, torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(normed, torch.tensor([[3.0, 8.0]]) / math.sqrt(12.5))
    total, normed = add_layer_norm(x, residual, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), 0.0)
    torch.testing.assert_close(total, torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(normed, torch.tensor([[-0.5, 2.0]]))


def test_swiglu_gates_with_the_first_half():
    out = swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 2.0 / (1 + math.exp(-1.0))]]))


def test_swiglu_refuses_an_odd_number_of_channels():
    with pytest.raises(ValueError, match=r"expected an even number.*got 3"):
        swiglu(torch.ones(1, 3))


def test_gelu_tanh_by_hand():
    expected = 0.5 * 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8)))
    for backend in BACKENDS[gelu_tanh]:
        out = gelu_tanh(torch.tensor([[1.5]]), torch.tensor([0.5]), backend=backend)
        torch.testing.assert_close(out, torch.tensor([[expected]]))


@pytest.mark.parametrize("backend", BACKENDS[rotary_embedding])
def test_rotation_by_a_right_angle_pairs_channel_c_with_c_plus_r(backend):
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 9.0]]])
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    q, k = rotary_embedding(x, 2 * x, cos, sin, backend=backend)
    expected = torch.tensor([[[-3.0, -4.0, 1.0, 2.0, 9.0]]])
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(k, 2 * expected)


@pytest.mark.parametrize("backend", BACKENDS[rotary_embedding])
def test_rotated_scores_depend_on_the_distance_only(backend):
    frequencies = torch.tensor([1.0, 0.1, 0.01])

    def score(i, j):
        angles = torch.tensor([i, j])[:, None] * frequencies
        torch.manual_seed(3)
        q = torch.randn(1, 1, 6).expand(2, 1, 6)
        k = torch.randn(1, 1, 6).expand(2, 1, 6)
        q, k = rotary_embedding(q, k, angles.cos(), angles.sin(), backend=backend)
        return (q[0] * k[1]).sum()

    torch.testing.assert_close(score(7.0, 3.0), score(104.0, 100.0), atol=1e-4, rtol=1e-4)


def test_rotary_embedding_broadcasts_over_the_batch():
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    angles = torch.randn(2, 5, 4)
    whole = rotary_embedding(q, k, angles.cos(), angles.sin())
    for row in range(2):
        part = rotary_embedding(q[row], k[row], angles[row].cos(), angles[row].sin())
        torch.testing.assert_close((whole[0][row], whole[1][row]), part)


def test_rotary_embedding_refuses_more_angles_than_half_the_channels():
    with pytest.raises(ValueError, match="expected at most 2 for heads of 4 channels, got 3"):
        rotary_embedding(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 3), torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_by_hand_is_the_plain_one_bit_for_bit(dtype):
    (gate_up,) = inputs(swiglu, (5, 3, 8), dtype)
    grad = torch.randn(5, 3, 8).to(dtype)
    found = [swiglu(gate_up, backend=backend) for backend in ("by_hand", "reference")]
    assert torch.equal(*found)
    assert torch.equal(*(torch.autograd.grad(out, gate_up, grad)[0] for out in found))
