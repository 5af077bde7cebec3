"""A linear layer with a low-rank adapter (LoRA, Hu et al., arXiv:2106.09685 §4.1).

    y = W x + b + (alpha / rank) · B A dropout(x)        A: [rank, d_in]   B: [d_out, rank]

A starts random (Kaiming-uniform, as nn.Linear's own weight), B at zero, so that a fresh adapter changes nothing. The
layer *is* an nn.Linear and keeps the base layer's own parameters under their own names: a checkpoint of the base model
needs no renaming, and the adapter's tensors stand beside them as `lora_a` and `lora_b`, with DoRA `lora_magnitude`.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .adapter import LoraLayer
from .config import LoraConfig


class LoraLinear(LoraLayer, nn.Linear):
    """An nn.Linear whose weight and bias are frozen, with a trainable adapter beside them.

    The adapter's tensors are in fp32 where the base is in half precision: small steps must not be rounded away.
    """

    def __init__(self, base: nn.Linear, cfg: LoraConfig, *, generator: torch.Generator | None = None) -> None:
        """Take over base's parameters (shared, not copied) and freeze them. generator: of A, on A's device."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        # In a tuple, so that it is no parameter of this module: the base weight while the adapter is merged.
        self._kept: tuple[nn.Parameter] | None = None
        self._was_trainable = tuple(parameter.requires_grad for parameter in base.parameters(recurse=False))
        for parameter in base.parameters(recurse=False):
            parameter.requires_grad_(False)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.add_adapter(cfg, dtype, base.weight.device, generator)
        self.train(base.training)

    @property
    def is_merged(self) -> bool:
        """Whether `weight` holds the adapter's product."""
        return self._kept is not None

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight without the adapter, merged or not."""
        return cast(nn.Parameter, self.weight) if self._kept is None else self._kept[0]

    def forward(self, input: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Apply the layer; without the adapter where `is_enabled` is False, merged or not."""
        if not self.is_enabled:
            return F.linear(input, self.base_weight, self.bias)
        out = F.linear(input, self.weight, self.bias)
        return out if self.is_merged else self.adapted(input, out)

    def project(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Multiply with the base weight."""
        return F.linear(x, self.base_weight)

    def row_norms(self) -> Float[Tensor, " d_out"]:
        """‖W + (alpha / rank) B A‖ of each row."""
        return torch.linalg.vector_norm(self._sum(), dim=1)

    def _sum(self) -> Tensor:
        return self.base_weight.to(self.lora_a.dtype) + self.scale * (self.lora_b @ self.lora_a)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into a new weight, computed in fp32; the old one is kept aside, untouched. Idempotent."""
        if self.is_merged:
            return
        merged = self._sum() if self.lora_magnitude is None else self._sum() * self.gain()[:, None]
        self._kept = (self.base_weight,)
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the kept weight back: the same parameter, bit for bit. Idempotent."""
        if self._kept is not None:
            self.weight = self._kept[0]
            self._kept = None

    def plain(self) -> nn.Linear:
        """Return an nn.Linear with this layer's present weight and bias, trainable as the base was."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        for parameter, was_trainable in zip(linear.parameters(), self._was_trainable, strict=True):
            parameter.requires_grad_(was_trainable)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraLinear":
        super()._apply(fn, recurse)
        # The kept weight is no parameter, so that moves and casts would pass it by.
        if self._kept is not None:
            self._kept[0].data = fn(self._kept[0].data)
        return self

    def extra_repr(self) -> str:
        """Say the layer's sizes and the adapter's."""
        state = "merged" if self.is_merged else "apart"
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}, scale={self.scale:g}, adapter {state}"
