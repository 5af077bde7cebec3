"""The resampler's configs and the published preset; importable without torch."""

import msgspec


class ResamplerConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="perceiver"
):
    """Sizes of a `PerceiverResampler`.

    Written to disk it carries `kind = "perceiver"`, so that it can be one of several connectors in a model's config.

    Raises:
        ValueError: a size that is not positive.
    """

    dim: int
    """Width of the features and of the latents; the resampler works at this width throughout."""
    dim_out: int
    """Width of the tokens given back: the language model's."""
    depth: int
    """Number of layers, each a cross attention and a feed-forward block."""
    num_heads: int
    """Number of attention heads."""
    head_dim: int
    """Width of one head; `num_heads * head_dim` need not equal `dim`."""
    num_latents: int
    """Number of learned queries, hence of tokens given back for one set of features (Flamingo's R)."""
    ff_mult: int = 4
    """Hidden width of the feed-forward block, in multiples of `dim`."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""

    @property
    def inner_dim(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    def __post_init__(self) -> None:
        for name in ("dim", "dim_out", "depth", "num_heads", "head_dim", "num_latents", "ff_mult"):
            if getattr(self, name) < 1:
                raise ValueError(f"ResamplerConfig.{name}: expected at least 1, got {getattr(self, name)}; raise it")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise ValueError(
                f"ResamplerConfig.layer_norm_eps: expected a number between 0 and 1, got {self.layer_norm_eps}; "
                "use a small positive one"
            )


class InstructedResamplerConfig(
    ResamplerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="instructed_perceiver"
):
    """Sizes of a `PerceiverResampler` that also reads what is asked: text features are queries beside the latents.

    xGen-MM (arXiv:2408.08872) tried this and found no gain.
    """

    dim_text: int
    """Width of the text features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim_text < 1:
            raise ValueError(
                f"InstructedResamplerConfig.dim_text: expected at least 1, got {self.dim_text}; "
                "give the width of the text features"
            )


def xgen_mm() -> ResamplerConfig:
    """Return the resampler of `Salesforce/xgen-mm-phi3-mini-*-r-v1.5`: SigLIP features to 128 tokens for Phi-3-mini."""
    return ResamplerConfig(dim=1152, dim_out=3072, depth=6, num_heads=16, head_dim=96, num_latents=128)
