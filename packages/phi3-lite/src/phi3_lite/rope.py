"""Rotary position embedding: the angles for given positions.

RoFormer, arXiv:2104.09864 §3.4; channel pairing (i, i + r) as in the published Llama and Phi-3 weights. Long-context
scaling: LongRoPE, arXiv:2402.13753 §3.3, as in transformers 5.23 (`_compute_longrope_parameters`).
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .config import Phi3Config

_FEWEST_KEPT = 256


def rotary_tables(
    cfg: Phi3Config,
    positions: Int[Tensor, " t"],
    extents: Int[Tensor, " t"] | None = None,
    end: int | None = None,
) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
    """Return cosine and sine of every position's angles, r = rotary_dim / 2.

    angle[t, i] = positions[t] · theta^(−2i / rotary_dim) / factor[t, i], in float32 whatever the model's dtype: in
    bfloat16 positions above 256 would no longer be told apart. Nothing else in the package knows how an angle is made.

    The factor is 1 without long-context scaling. With it, `extents[t]`, the length of the sequence that token t is part
    of, says which set applies: the short one up to the original window, the long one beyond. Cosine and sine then hold
    `cfg.rotary_scale`.

    end: all positions are below it; they are then looked up, where there is no long-context scaling.
    """
    if cfg.long_rope is None:
        if end is None:
            return _turns(positions, cfg.rotary_dim, cfg.rope_theta)
        cos, sin = kept_tables(cfg, end, positions.device)
        return cos[positions], sin[positions]
    if extents is None:
        raise ValueError("rotary_tables: expected extents with long-context scaling, got None; give each token's")
    exponents = torch.arange(0, cfg.rotary_dim, 2, device=positions.device, dtype=torch.float32) / cfg.rotary_dim
    factors = torch.tensor([cfg.long_rope.short_factors, cfg.long_rope.long_factors], device=positions.device)
    is_long = extents > cfg.long_rope.original_max_positions
    angles = positions[:, None].float() * (1.0 / (factors * cfg.rope_theta**exponents))[is_long.long()]
    return angles.cos() * cfg.rotary_scale, angles.sin() * cfg.rotary_scale


def kept_tables(cfg: Phi3Config, end: int, device: torch.device) -> tuple[Float[Tensor, "p r"], Float[Tensor, "p r"]]:
    """Return the tables of all positions below `end`, and beyond, made once; without long-context scaling only."""
    # doubled each time it is outgrown
    num_kept = max(_FEWEST_KEPT, 1 << (end - 1).bit_length())
    return _kept_turns(num_kept, cfg.rotary_dim, cfg.rope_theta, device)


def _turns(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions[:, None].float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


@functools.lru_cache(maxsize=4)
def _kept_turns(num_positions: int, rotary_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the positions from 0 on: a decoding step would spend a tenth of a small model's time on its own angles."""
    # may be made while decoding and used while training: no inference tensor
    with torch.inference_mode(False):
        return _turns(torch.arange(num_positions, device=device), rotary_dim, theta)


def rotation_matrices(
    cos: Float[Tensor, "t r"], sin: Float[Tensor, "t r"], head_dim: int
) -> Float[Tensor, "t head_dim head_dim"]:
    """Return for every position the matrix M that turns a head: x · M; channels from 2r on stay.

    For r = 1 and a head of three channels:

         cos  sin  0
        -sin  cos  0
          0    0   1
    """
    num_tokens, r = cos.shape
    places, rest = _matrix_places(head_dim, r, cos.dtype, cos.device)
    numbers = torch.cat((cos, sin, -sin, rest.expand(num_tokens, 2)), dim=1)
    return numbers.index_select(1, places).view(num_tokens, head_dim, head_dim)


@functools.lru_cache(maxsize=4)
def _matrix_places(head_dim: int, r: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where in (cos, sin, −sin, 0, 1) each number of a matrix stands, and the last two."""
    with torch.inference_mode(False):
        pair = torch.arange(r)
        places = torch.full((head_dim, head_dim), 3 * r)
        places.diagonal().fill_(3 * r + 1)
        places[pair, pair], places[pair + r, pair + r] = pair, pair
        places[pair, pair + r], places[pair + r, pair] = pair + r, pair + 2 * r
        return places.flatten().to(device), torch.tensor([0.0, 1.0], dtype=dtype, device=device)
