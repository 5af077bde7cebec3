"""Sizes of a Phi-3 decoder and of a sampling run. Imports without torch."""

import math
from collections.abc import Iterable

import msgspec


def _require(is_valid: bool, what: str, rule: str, got: object, remedy: str) -> None:
    if not is_valid:
        raise ValueError(f"{what}: expected {rule}, got {got}; {remedy}")


def _require_positive(cfg: msgspec.Struct, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(cfg, name)
        _require(value > 0, f"{type(cfg).__name__}.{name}", "a value above 0", value, "give a positive one")


class LongRope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Long-context scaling of the rotary frequencies: LongRoPE, arXiv:2402.13753 §3.3.

    Two sets of divisors, one number a frequency. A sequence of up to `original_max_positions` tokens uses the short
    ones at all its positions, a longer one the long ones at all its positions.
    """

    short_factors: tuple[float, ...]
    """Divisors for short sequences [rope_scaling.short_factor]."""
    long_factors: tuple[float, ...]
    """Divisors for long sequences [rope_scaling.long_factor]."""
    original_max_positions: int = 4096
    """The longest sequence that counts as short [original_max_position_embeddings]."""
    attention_factor: float | None = None
    """Scale of cosines and sines, short or long; None: sqrt(1 + ln s / ln original), s = max / original positions."""

    def __post_init__(self) -> None:
        """Check ranges."""
        factors = (*self.short_factors, *self.long_factors)
        _require(
            all(factor > 0 and math.isfinite(factor) for factor in factors),
            "LongRope factors", "numbers above 0", factors, "take them from the checkpoint's config.json",
        )  # fmt: skip
        _require(
            self.original_max_positions > 1,
            "LongRope.original_max_positions", "at least 2", self.original_max_positions, "Phi-3's is 4096",
        )  # fmt: skip
        _require(
            self.attention_factor is None or self.attention_factor > 0,
            "LongRope.attention_factor", "a value above 0, or None", self.attention_factor, "None derives it",
        )  # fmt: skip


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
    long_rope: LongRope | None = None
    """Long-context scaling of the frequencies; None for plain rotary positions [rope_scaling]."""
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

    @property
    def rotary_scale(self) -> float:
        """What cosines and sines are multiplied by: 1 without long-context scaling."""
        if self.long_rope is None:
            return 1.0
        if self.long_rope.attention_factor is not None:
            return self.long_rope.attention_factor
        original = self.long_rope.original_max_positions
        stretch = max(1.0, self.max_positions / original)
        return math.sqrt(1 + math.log(stretch) / math.log(original))

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
        for which in ("short_factors", "long_factors"):
            count = self.rotary_dim // 2 if self.long_rope is None else len(getattr(self.long_rope, which))
            _require(
                count == self.rotary_dim // 2,
                f"{name}.long_rope.{which}", f"{self.rotary_dim // 2} numbers, half the rotated channels", count,
                "take them from the same checkpoint as the sizes",
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


def mini_128k(long_rope: LongRope) -> Phi3Config:
    """Return Phi-3-mini-128k (3.8 B parameters), with the factors of the checkpoint's config.json.

    As published, its window is longer than its longest sequence, hence never felt. This preset and the next two have
    the values of copies of config.json in public repositories; the originals could not be looked at.
    """
    return msgspec.structs.replace(mini_4k(), max_positions=131_072, sliding_window=262_144, long_rope=long_rope)


def phi35_mini(long_rope: LongRope) -> Phi3Config:
    """Return Phi-3.5-mini: the sizes of Phi-3-mini-128k, with factors of its own."""
    return mini_128k(long_rope)


def phi4_mini(long_rope: LongRope) -> Phi3Config:
    """Return Phi-4-mini (3,836,021,760 parameters), with the factors of the checkpoint's config.json."""
    return Phi3Config(
        vocab_size=200_064,
        width=3072,
        num_layers=32,
        num_heads=24,
        num_kv_heads=8,
        mlp_width=8192,
        max_positions=131_072,
        sliding_window=262_144,
        rotary_fraction=0.75,
        long_rope=long_rope,
        is_head_tied=True,
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
