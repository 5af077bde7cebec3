"""An adapter on a matrix that is kept as integers (QLoRA, Dettmers et al., arXiv:2305.14314 §3).

The base is any module that multiplies with a frozen matrix and lets the gradient through to its input: it has
`in_features`, `out_features` and no `weight`. What its matrix is, the adapter learns by calling it.
"""

from itertools import chain
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .adapter import LoraLayer
from .config import LoraConfig

# Columns of the matrix that are asked for at a time.
_NUM_COLUMNS = 256


class LoraQuantised(LoraLayer):
    """A frozen module `base` with a trainable adapter beside it, in fp32.

    It cannot be merged: the sum would no longer be what integers can say. Attach the same adapter to the model in
    floating point for that.
    """

    _base_square: Tensor

    def __init__(self, base: nn.Module, cfg: LoraConfig, *, generator: torch.Generator | None = None) -> None:
        """Take base over, as a submodule, and freeze it. generator: of A, on A's device."""
        super().__init__()
        self.in_features = int(cast(int, base.in_features))
        self.out_features = int(cast(int, base.out_features))
        self.base = base
        self._was_trainable = tuple(parameter.requires_grad for parameter in base.parameters())
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        device = next(chain(base.parameters(), base.buffers())).device
        if cfg.use_dora:
            self.register_buffer("_base_square", self._squares(device), persistent=False)
        self.add_adapter(cfg, torch.float32, device, generator)
        self.train(base.training)

    @property
    def bias(self) -> Tensor | None:
        """The base's, if it has one."""
        return cast(Tensor | None, getattr(self.base, "bias", None))

    def forward(self, input: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Apply the layer; without the adapter where `is_enabled` is False."""
        out = self.base(input)
        return self.adapted(input, out) if self.is_enabled else out

    def project(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Multiply with the base's matrix."""
        out = self.base(x)
        return out if self.bias is None else out - self.bias

    def row_norms(self) -> Float[Tensor, " d_out"]:
        """‖W + s B A‖ of each row: ‖w‖² + 2 s b · (A w) + s² b · (A Aᵀ) b, so that W is multiplied with A only."""
        a, b = self.lora_a, self.lora_b
        crossed = (b * self.project(a).t()).sum(dim=1)
        squares = (b @ (a @ a.t()) * b).sum(dim=1)
        total = self._base_square + 2 * self.scale * crossed + self.scale**2 * squares
        return total.clamp_min(0).sqrt()

    @torch.no_grad()
    def _squares(self, device: torch.device) -> Tensor:
        total = torch.zeros(self.out_features, device=device)
        for start in range(0, self.in_features, _NUM_COLUMNS):
            count = min(_NUM_COLUMNS, self.in_features - start)
            units = torch.zeros(count, self.in_features, device=device)
            units[:, start : start + count].fill_diagonal_(1)
            total += self.project(units).square().sum(dim=0)
        return total

    def merge(self) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"merge: expected layers in floating point, got {type(self.base).__name__}, which is quantised; "
            "save the adapter and attach it to the model in floating point"
        )

    def unmerge(self) -> None:
        """Do nothing: it is never merged."""

    def plain(self) -> nn.Module:
        """Return the base, trainable as it was."""
        for parameter, was_trainable in zip(self.base.parameters(), self._was_trainable, strict=True):
            parameter.requires_grad_(was_trainable)
        return self.base.train(self.training)

    def extra_repr(self) -> str:
        """Say the adapter's sizes."""
        return f"rank={self.lora_a.shape[0]}, scale={self.scale:g}"
