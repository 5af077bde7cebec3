"""What all adapted layers share: the low-rank product, and with DoRA the magnitudes.

LoRA, arXiv:2106.09685 §4.1; DoRA, arXiv:2402.09353 §4.1: with V = W + (alpha / rank) · B A,

    LoRA    y = V x + b
    DoRA    y = (m / ‖V‖) V x + b        m: [d_out], ‖V‖ the norm of each row, a constant to the gradient (§4.3)

m starts as ‖W‖. As in PEFT, dropout acts on the x of B A and on that of the part by which DoRA changes W x.
"""

import math
from abc import ABC, abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .config import LoraConfig


class LoraLayer(nn.Module, ABC):
    """A frozen linear map with a trainable adapter beside it."""

    in_features: int
    out_features: int
    scale: float
    is_enabled: bool
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_magnitude: nn.Parameter | None
    dropout: nn.Dropout

    def add_adapter(
        self, cfg: LoraConfig, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
    ) -> None:
        """Make the adapter's own tensors; the base must be in its place."""
        self.scale = cfg.scale
        self.is_enabled = True
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, self.in_features, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, cfg.rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), generator=generator)
        self.dropout = nn.Dropout(cfg.dropout)
        with torch.no_grad():
            magnitude = nn.Parameter(self.row_norms()) if cfg.use_dora else None
        self.register_parameter("lora_magnitude", magnitude)

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is folded into the base."""
        return False

    @abstractmethod
    def project(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Multiply with the base weight, without bias."""

    @abstractmethod
    def row_norms(self) -> Float[Tensor, " d_out"]:
        """Give ‖V‖."""

    @abstractmethod
    def merge(self) -> None:
        """Fold the adapter into the base."""

    @abstractmethod
    def unmerge(self) -> None:
        """Undo `merge`."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """Return the layer as it was before the adapter; merged, if it is."""

    def gain(self) -> Float[Tensor, " d_out"]:
        """Return m / ‖V‖ of DoRA."""
        assert self.lora_magnitude is not None
        with torch.no_grad():
            norms = self.row_norms()
        # A row of zeros has no direction; its magnitude is zero too.
        return self.lora_magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def adapted(self, x: Float[Tensor, "... d_in"], out: Float[Tensor, "... d_out"]) -> Float[Tensor, "... d_out"]:
        """Add the adapter's part to `out`, the base's result with its bias."""
        is_dropping = self.training and self.dropout.p > 0
        dropped = self.dropout(x) if is_dropping else x
        low_rank = F.linear(dropped, self.lora_a.to(x.dtype))
        added = F.linear(low_rank, self.lora_b.to(x.dtype)) * self.scale
        if self.lora_magnitude is None:
            return out + added
        gain = self.gain()
        bias = cast(Tensor | None, getattr(self, "bias", None))
        bare = out if bias is None else out - bias
        plain = self.project(dropped) if is_dropping else bare
        return out + (gain - 1).to(out.dtype) * plain + gain.to(out.dtype) * added

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters by the end of their names."""
        tensors = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        if self.lora_magnitude is not None:
            tensors["lora_magnitude"] = self.lora_magnitude
        return tensors


def is_lora_name(name: str) -> bool:
    """Whether a state-dict key is one of an adapter's own tensors."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b", "lora_magnitude")
