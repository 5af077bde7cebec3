"""Rotary position embedding: the angles for given positions.

RoFormer, arXiv:2104.09864 §3.4; channel pairing (i, i + r) as in the published Llama and Phi-3 weights. Long-context
scaling: LongRoPE, arXiv:2402.13753 §3.3, as in transformers 5.23 (`_compute_longrope_parameters`).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .config import Phi3Config


def rotary_tables(
    cfg: Phi3Config, positions: Int[Tensor, " t"], extents: Int[Tensor, " t"] | None = None
) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
    """Return cosine and sine of every position's angles, r = rotary_dim / 2.

    angle[t, i] = positions[t] · theta^(−2i / rotary_dim) / factor[t, i], in float32 whatever the model's dtype: in
    bfloat16 positions above 256 would no longer be told apart. Nothing else in the package knows how an angle is made.

    The factor is 1 without long-context scaling. With it, `extents[t]`, the length of the sequence that token t is part
    of, says which set applies: the short one up to the original window, the long one beyond. Cosine and sine then hold
    `cfg.rotary_scale`.
    """
    exponents = torch.arange(0, cfg.rotary_dim, 2, device=positions.device, dtype=torch.float32) / cfg.rotary_dim
    if cfg.long_rope is None:
        angles = positions[:, None].float() * (1.0 / cfg.rope_theta**exponents)
        return angles.cos(), angles.sin()
    if extents is None:
        raise ValueError("rotary_tables: expected extents with long-context scaling, got None; give each token's")
    factors = torch.tensor([cfg.long_rope.short_factors, cfg.long_rope.long_factors], device=positions.device)
    is_long = extents > cfg.long_rope.original_max_positions
    angles = positions[:, None].float() * (1.0 / (factors * cfg.rope_theta**exponents))[is_long.long()]
    return angles.cos() * cfg.rotary_scale, angles.sin() * cfg.rotary_scale
