"""The Triton softmax of the output head: losses, log-probabilities and every gradient against the references."""

# The check hands its inputs over as a tuple.
# pyright: reportCallIssue=false

import pytest
import torch

from fused_kernels import linear_cross_entropy, linear_log_prob_pairs, linear_log_probs

# Tokens, width and classes: one, primes, one past a block of classes.
SIZES = [(1, 1, 2), (11, 7, 13), (5, 3, 4097)]


def problem(t, d, v, has_bias, num_ignored):
    def new(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    labels = torch.randint(0, v, (t,))
    labels[torch.randperm(t)[:num_ignored]] = -100
    # Small, so that products in half precision are not what is tested.
    return new(t, d), new(v, d), labels, new(v) if has_bias else None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_kernel_is_the_reference(check_kernel, kernel_dtype, size, has_bias, reduction):
    from fused_kernels.linear_loss import _Call, _cross_entropy_triton

    check_kernel(
        lambda *args: _cross_entropy_triton(_Call(*args, -100, 3), reduction),
        lambda *args: linear_cross_entropy(*args, reduction=reduction, backend="reference"),
        kernel_dtype,
        *problem(*size, has_bias, num_ignored=size[0] // 2),
    )


@pytest.mark.parametrize("chunk_rows", [1, 2, None])
@pytest.mark.parametrize("has_bias", [True, False])
def test_log_probs_kernel_is_the_reference(check_kernel, kernel_dtype, has_bias, chunk_rows):
    from fused_kernels.linear_loss import _Call, _log_probs_triton

    check_kernel(
        lambda *args: _log_probs_triton(_Call(*args, -100, chunk_rows))[0],
        lambda *args: linear_log_probs(*args, backend="reference"),
        kernel_dtype,
        *problem(7, 5, 131, has_bias, num_ignored=2),
    )


@pytest.mark.parametrize("chunk_rows", [2, None])
def test_log_probs_kernel_of_two_sides_is_the_reference(check_kernel, kernel_dtype, chunk_rows):
    from fused_kernels.linear_loss import _Call, _log_probs_triton

    hidden, *rest = problem(7, 5, 131, True, num_ignored=2)
    check_kernel(
        lambda other, *args: _log_probs_triton(_Call(*args, -100, chunk_rows, other)),
        lambda other, *args: torch.stack(linear_log_prob_pairs(args[0], other, *args[1:], backend="reference")),
        kernel_dtype,
        torch.randn_like(hidden), hidden, *rest,
    )  # fmt: skip


def test_loss_kernel_without_a_target_is_zero_with_zero_gradients(kernel_device):
    from fused_kernels.linear_loss import _Call, _cross_entropy_triton

    hidden, weight, labels, bias = problem(3, 2, 5, True, num_ignored=3)
    leaves = [x.detach().float().to(kernel_device).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    call = _Call(leaves[0], leaves[1], labels.to(kernel_device), leaves[2], -100, None)
    loss = _cross_entropy_triton(call, "mean")
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, leaves):
        assert torch.count_nonzero(grad) == 0


def test_loss_kernel_with_a_frozen_head_gives_the_gradient_of_hidden(check_kernel, kernel_dtype):
    from fused_kernels.linear_loss import _Call, _cross_entropy_triton

    hidden, weight, labels, _ = problem(5, 3, 17, False, num_ignored=1)
    check_kernel(
        lambda *args: _cross_entropy_triton(_Call(*args, None, -100, None), "mean"),
        lambda *args: linear_cross_entropy(*args, backend="reference"),
        kernel_dtype,
        hidden, weight.detach(), labels,
    )  # fmt: skip
