"""Sizes of a Phi-3 decoder and of a sampling run. Imports without torch."""

from collections.abc import Iterable

import msgspec


def _require(is_valid: bool, what: str, rule: str, got: object, remedy: str) -> None:
    if not is_valid:
        raise ValueError(f"{what}: expected {rule}, got {got}; {remedy}")


def _require_positive(cfg: msgspec.Struct, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(cfg, name)
        _require(value > 0, f"{type(cfg).__name__}.{name}", "a value above 0", value, "give a positive one")


class Phi3Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Phi-3 decoder's sizes. Phi-3 report: arXiv:2404.14219; names of the published config in brackets."""

    vocab_size: int
    """Rows of the embedding and of the head [vocab_size]; may exceed the tokenizer's size."""
    width: int
    """Model width d [hidden_size]."""
    num_layers: int
    """Decoder layers [num_hidden_layers]."""
    num_heads: int
    """Query heads h [num_attention_heads]."""
    num_kv_heads: int
    """Key/value heads g, each shared by num_heads / num_kv_heads query heads [num_key_value_heads]."""
    mlp_width: int
    """Inner width of the gated MLP [intermediate_size]."""
    max_positions: int = 4096
    """Longest sequence the model is meant for, in tokens [max_position_embeddings]; not enforced by the model."""
    sliding_window: int | None = None
    """Number of keys a query sees, itself included; None sees the whole past [sliding_window]."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies [rope_theta]."""
    rotary_fraction: float = 1.0
    """Share of each head's channels that is rotated, from the first on [partial_rotary_factor]."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm [rms_norm_eps]."""
    is_head_tied: bool = False
    """Whether the head's weight is the embedding's [tie_word_embeddings]; then there is no `lm_head.weight`."""
    has_head_bias: bool = False
    """Whether the head adds a bias, one number a token."""
    init_std: float = 0.02
    """Standard deviation of the initial weights [initializer_range]."""
    residual_init_std: float | None = None
    """Standard deviation for the two matrices a layer that write into the residual; None is init_std."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of one head."""
        return int(self.head_dim * self.rotary_fraction)

    def __post_init__(self) -> None:
        """Check ranges and divisibility."""
        _require_positive(
            self,
            (
                "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "mlp_width", "max_positions",
                "rope_theta", "norm_eps",
            ),
        )  # fmt: skip
        name = "Phi3Config"
        _require(
            self.width % self.num_heads == 0,
            f"{name}.width", f"a multiple of num_heads ({self.num_heads})", self.width, "change one of the two",
        )  # fmt: skip
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"{name}.num_heads", f"a multiple of num_kv_heads ({self.num_kv_heads})", self.num_heads,
            "change one of the two",
        )  # fmt: skip
        _require(
            self.sliding_window is None or self.sliding_window > 0,
            f"{name}.sliding_window", "at least 1 key, or None", self.sliding_window, "use None for no window",
        )  # fmt: skip
        _require(
            0 < self.rotary_fraction <= 1,
            f"{name}.rotary_fraction", "above 0 and at most 1", self.rotary_fraction, "1 rotates the whole head",
        )  # fmt: skip
        _require(
            self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
            f"{name}.rotary_fraction", f"an even number of rotated channels of {self.head_dim}", self.rotary_dim,
            "change rotary_fraction, width or num_heads",
        )  # fmt: skip
        _require(
            self.init_std >= 0 and (self.residual_init_std is None or self.residual_init_std >= 0),
            f"{name}.init_std", "standard deviations of at least 0", (self.init_std, self.residual_init_std),
            "0.02 is Phi-3's",
        )  # fmt: skip


def mini_4k() -> Phi3Config:
    """Return Phi-3-mini-4k (3.8 B parameters), the language model of xGen-MM."""
    return Phi3Config(
        vocab_size=32_064,
        width=3072,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=8192,
        max_positions=4096,
        sliding_window=2047,
    )


class SamplingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen, and for how long."""

    max_new_tokens: int = 128
    """Tokens generated for each row at most, stop token included."""
    temperature: float = 0.0
    """Divides the logits before sampling; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together hold this probability (nucleus); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, where negative) the logits of tokens already seen; 1 leaves them."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_positive(self, ("max_new_tokens",))
        _require(
            self.temperature >= 0,
            "SamplingConfig.temperature", "at least 0", self.temperature, "0 is greedy",
        )  # fmt: skip
        _require(
            0 < self.top_p <= 1,
            "SamplingConfig.top_p", "above 0 and at most 1", self.top_p, "1 keeps every token",
        )  # fmt: skip
        _require_positive(self, ("repetition_penalty",))


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a published model is meant to be sampled."""

    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer."""
    sampling: SamplingConfig = SamplingConfig()
    """How the next token is chosen."""
