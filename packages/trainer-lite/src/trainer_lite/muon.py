"""Muon: momentum whose matrix is orthogonalised before it is applied.

For a matrix W[m, n] with gradient G, momentum mu and rate lr:

    B <- mu B + (1 - mu) G
    W <- W - lr sqrt(max(1, m / n)) NewtonSchulz((1 - mu) G + mu B)

NewtonSchulz(X) takes X = U S V^T to about U V^T: every direction is moved by about the same amount.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/ (coefficients, five steps, Nesterov form, which parameters it is for).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of the published step X <- a X + (b A + c A A) X with A = X X^T."""


def orthogonalize(matrix: Float[Tensor, "*batch m n"], steps: int = 5) -> Float[Tensor, "*batch m n"]:
    """Return about U V^T for each matrix U S V^T, its singular values between roughly 0.7 and 1.2.

    Each published step multiplies X from the left by a polynomial P = a I + b A + c A A of its Gram matrix A, so all of
    them together are X <- Q X with Q the product of the P, and A <- P A P follows without X. Only the first and the
    last product are as wide as the matrix: a third of the time for the shapes of a transformer.

    Computed in float32 (A squares the singular values: bfloat16 would lose the small ones) and returned in the
    argument's dtype. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float()
    # The Gram matrix is taken on the short side: the same result for less work.
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.transpose(-2, -1)
    # The Frobenius norm bounds the spectral norm, as the iteration needs.
    x = x / (x.square().sum(dim=(-2, -1), keepdim=True).sqrt() + 1e-7)
    gram = x @ x.transpose(-2, -1)
    product: Tensor | None = None
    for step in range(steps):
        polynomial = c * (gram @ gram) + b * gram
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    if product is not None:
        x = product @ x
    return (x.transpose(-2, -1) if is_tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon on 2-D parameters, with decoupled weight decay; matrices of equal shape are orthogonalised together."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    shape = tuple(param.shape)
                    raise ValueError(f"Muon: expected 2-D parameters, got shape {shape}; move the others by AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    alike[tuple(param.shape)].append(param)
            for params in alike.values():
                self._step_alike(params, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _step_alike(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        directions: list[Tensor] = []
        for param in params:
            grad = param.grad
            assert grad is not None
            state = self.state[param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(param)
            buffer: Tensor = state["momentum"]
            buffer.lerp_(grad, 1 - momentum)
            directions.append(grad.lerp(buffer, momentum))
        num_rows, num_columns = params[0].shape
        scale = max(1.0, num_rows / num_columns) ** 0.5
        for param, direction in zip(params, orthogonalize(torch.stack(directions)), strict=True):
            param.mul_(1 - lr * weight_decay)
            param.add_(direction, alpha=-lr * scale)
