"""Muon against its defining property, the exact polar factor, and torch's own implementation."""

import pytest
import torch
from torch import nn

from trainer_lite import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (16, 5), (5, 16), (3, 13, 8)])
def test_orthogonalize_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    singular = torch.linalg.svdvals(orthogonalize(matrix))
    # The published coefficients trade exactness for speed: the values end in about [0.7, 1.2]. A singular value near
    # zero is lifted less, so the lower bound holds for those above a hundredth of the norm.
    relative = torch.linalg.svdvals(matrix) / matrix.norm(dim=(-2, -1), keepdim=True)[..., 0]
    assert singular.max() < 1.25
    assert singular[relative > 0.01].min() > 0.65


def test_orthogonalize_points_along_the_polar_factor():
    matrix = torch.randn(12, 9, generator=torch.Generator().manual_seed(3))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    # In the basis of the singular vectors the result is diagonal: only the values changed.
    rotated = u.T @ orthogonalize(matrix) @ v.T
    torch.testing.assert_close(rotated, torch.diag(rotated.diag()), atol=1e-4, rtol=0)


def test_orthogonalize_scale_transpose_and_zero():
    matrix = torch.randn(6, 11)
    torch.testing.assert_close(orthogonalize(1000 * matrix), orthogonalize(matrix))
    torch.testing.assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T)
    assert orthogonalize(torch.zeros(4, 3)).abs().max() == 0
    assert orthogonalize(matrix.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20)])
def test_muon_follows_torch(shape):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1)
    oracle = torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        grad = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        oracle.step()
    # torch's iteration runs in bfloat16, ours in float32 on a CPU: five rounds of its rounding.
    # A wrong momentum form, shape factor or coefficient is off by 0.1 and more.
    moved, error = theirs.detach() - start, ours.detach() - theirs.detach()
    assert error.norm() / moved.norm() < 2e-2


def test_muon_same_shapes_together_equal_one_by_one():
    weights = [torch.randn(5, 4) for _ in range(3)]
    grads = [torch.randn(5, 4) for _ in range(3)]
    together = [nn.Parameter(weight.clone()) for weight in weights]
    alone = [nn.Parameter(weight.clone()) for weight in weights]
    for params, optimizers in ((together, [Muon(together, lr=0.1)]), (alone, [Muon([p], lr=0.1) for p in alone])):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(list(together), list(alone))


def test_muon_leaves_a_parameter_without_gradient():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.eye(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


def test_muon_refuses_a_vector():
    with pytest.raises(ValueError, match=r"Muon: expected 2-D parameters, got shape \(3,\); move the others by AdamW"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize("shape", [(16, 5), (5, 16), (8, 8), (4, 24, 8)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_orthogonalize_equals_the_published_iteration(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    x = matrix.double() / matrix.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrix, steps).double(), x, atol=5e-5, rtol=0)


def test_orthogonalize_of_a_matrix_of_low_rank_keeps_its_rank():
    factors = torch.randn(2, 32, 3, generator=torch.Generator().manual_seed(6))
    singular = torch.linalg.svdvals(orthogonalize(factors[0] @ factors[1].T))
    assert singular[:3].min() > 0.65
    # Rounding is lifted by at most 3.4445 a step.
    assert singular[3:].max() < 1e-3
