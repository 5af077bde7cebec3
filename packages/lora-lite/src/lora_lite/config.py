"""The settings of the adapters."""

import math

import msgspec


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which linear layers are adapted, and how much room each adapter has."""

    rank: int
    """Width of the bottleneck."""
    alpha: float
    """Strength: the low-rank product is scaled by alpha / rank."""
    is_rank_stabilised: bool = False
    """Scale by alpha / √rank, so that a high rank learns no slower (arXiv:2312.03732)."""
    dropout: float = 0.0
    """Share of the adapter's input channels set to zero in training."""
    use_dora: bool = False
    """Learn each row's magnitude apart from its direction (DoRA)."""
    targets: tuple[str, ...]
    """Linear layers: ends of dotted names ("qkv_proj", "mlp.down_proj"), or shell patterns ("model.layers.*_proj")."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, got {self.rank}; 8 to 64 is usual")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha: expected a positive number, got {self.alpha}; equal to rank gives a scale of 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected at least 0 and below 1, got {self.dropout}; use 0 for none")
        if not self.targets or not all(self.targets):
            raise ValueError(f"targets: expected names of linear layers, got {self.targets}; name at least one")

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


def xgen_mm_lora() -> LoraConfig:
    """Adapters on 2.5 % of the language model's weights [published: arXiv:2408.08872v1, for DPO and safety].

    Of the ranks and targets that could give that share, rank 64 on all linear layers of Phi-3's blocks comes nearest:
    2.6 % [computed]. The scale of 1 is ours, the least surprising; it only rescales the rate.
    """
    return LoraConfig(rank=64, alpha=64, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
