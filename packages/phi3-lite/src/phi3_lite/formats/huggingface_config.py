"""config.json and generation_config.json of Hugging Face folders ↔ ours, for the architectures `phi3` and `llama`.

A value that a file leaves out is that of transformers 5.23 (`Phi3Config`, `LlamaConfig`). A value that would change
what the model computes, and that the model does not know, is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from weight_files import WeightsError

from ..config import GenerationDefaults, LongRope, Phi3Config, SamplingConfig

Json = Mapping[str, Any]

_UNHANDLED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "rope_interleaved": (False,),
    "quantization_config": (),
}
"""Settings and the values that the model stands for; a null is none."""


class _Rope(msgspec.Struct, kw_only=True):
    """`rope_scaling` of transformers 4, `rope_parameters` of 5."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    factor: float | None = None
    attention_factor: float | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None


class _Phi3(msgspec.Struct, kw_only=True):
    vocab_size: int = 32_064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int | None = None
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    partial_rotary_factor: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None

    scalings: ClassVar[Mapping[str, str]] = {"longrope": "longrope", "su": "longrope", "yarn": "longrope"}
    """Names of scalings and what they mean; Phi-3's first releases called LongRoPE `su` and `yarn`."""


class _Llama(_Phi3, kw_only=True):
    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6

    scalings: ClassVar[Mapping[str, str]] = {}


_ARCHITECTURES: Mapping[str, type[_Phi3]] = {"phi3": _Phi3, "llama": _Llama}


class _Generation(msgspec.Struct, kw_only=True):
    eos_token_id: int | list[int] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_config(published: Json) -> tuple[Phi3Config, str]:
    """Return the sizes, and the architecture, which says how the tensors are named.

    Raises:
        WeightsError: another architecture, a setting that the model does not know, or sizes that cannot be.
    """
    arch = published.get("model_type")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        raise WeightsError(
            f"config.json: model_type: expected {' or '.join(_ARCHITECTURES)}, got {arch!r}; no other is implemented"
        )
    for name, handled in _UNHANDLED.items():
        if published.get(name) is not None and published[name] not in handled:
            rule = f"{handled[0]!r}" if handled else "none"
            raise WeightsError(f"config.json: {name}: expected {rule}, got {published[name]!r}; it is not implemented")
    try:
        given = msgspec.convert(published, _ARCHITECTURES[arch])
        return _sizes(given), arch
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"config.json: {error}") from error


def _sizes(given: _Phi3) -> Phi3Config:
    head_dim, rest = divmod(given.hidden_size, max(1, given.num_attention_heads))
    if rest or given.head_dim not in (None, head_dim):
        raise WeightsError(
            f"config.json: head_dim: expected hidden_size / num_attention_heads ({given.hidden_size} / "
            f"{given.num_attention_heads}), got {given.head_dim}; no other is implemented"
        )
    rope = given.rope_parameters or given.rope_scaling or _Rope()
    fraction = rope.partial_rotary_factor or given.partial_rotary_factor or 1.0
    if isinstance(given, _Llama) and fraction != 1:
        raise WeightsError(f"config.json: partial_rotary_factor: expected 1 for llama, got {fraction}")
    return Phi3Config(
        vocab_size=given.vocab_size,
        width=given.hidden_size,
        num_layers=given.num_hidden_layers,
        num_heads=given.num_attention_heads,
        num_kv_heads=given.num_attention_heads if given.num_key_value_heads is None else given.num_key_value_heads,
        mlp_width=given.intermediate_size,
        max_positions=given.max_position_embeddings,
        # the published llama has none, whatever its file says
        sliding_window=None if isinstance(given, _Llama) else given.sliding_window,
        rope_theta=given.rope_theta if rope.rope_theta is None else rope.rope_theta,
        rotary_fraction=fraction,
        long_rope=_long_rope(given, rope),
        norm_eps=given.rms_norm_eps,
        is_head_tied=given.tie_word_embeddings,
        init_std=given.initializer_range,
    )


def _long_rope(given: _Phi3, rope: _Rope) -> LongRope | None:
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return None
    if kind not in given.scalings:
        handled = " or ".join(["default", *sorted(given.scalings)])
        raise WeightsError(f"config.json: rope_scaling: expected {handled}, got {kind!r}; it is not implemented")
    for name in ("short_mscale", "long_mscale"):
        if getattr(rope, name) is not None:
            raise WeightsError(f"config.json: rope_scaling: {name}: expected none, got one; it is not implemented")
    if rope.short_factor is None or rope.long_factor is None:
        raise WeightsError("config.json: rope_scaling: expected short_factor and long_factor, got one or none of them")
    original = given.original_max_position_embeddings or rope.original_max_position_embeddings or 4096
    attention_factor = rope.attention_factor
    if attention_factor is None and rope.factor is not None:
        attention_factor = math.sqrt(1 + math.log(max(1.0, rope.factor)) / math.log(original))
    return LongRope(
        short_factors=rope.short_factor,
        long_factors=rope.long_factor,
        original_max_positions=original,
        attention_factor=attention_factor,
    )


def write_config(cfg: Phi3Config, dtype: str, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """Return what config.json says of a model; read by transformers 4 and 5 alike.

    Raises:
        ValueError: transformers' Phi-3 has no such thing.
    """
    if cfg.has_head_bias:
        raise ValueError(
            "has_head_bias: expected a head without bias, got one with; transformers' Phi-3 has no place for it "
            "and would drop it"
        )
    published: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "original_max_position_embeddings": cfg.max_positions,
        "sliding_window": cfg.sliding_window,
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.is_head_tied,
        "rope_theta": cfg.rope_theta,
        "partial_rotary_factor": cfg.rotary_fraction,
        "rope_scaling": None,
        "attention_bias": False,
        "eos_token_id": _one_or_all(stop_ids),
        "torch_dtype": dtype,
    }
    if cfg.long_rope is not None:
        published["original_max_position_embeddings"] = cfg.long_rope.original_max_positions
        scaling: dict[str, Any] = {
            "type": "longrope",
            "short_factor": list(cfg.long_rope.short_factors),
            "long_factor": list(cfg.long_rope.long_factors),
        }
        if cfg.long_rope.attention_factor is not None:
            scaling["attention_factor"] = cfg.long_rope.attention_factor
        published["rope_scaling"] = scaling
    return published


def read_generation(config: Json, generation: Json) -> GenerationDefaults:
    """Return stop ids and sampling; those of generation_config.json go before those of config.json.

    Of the ways of sampling only temperature, top_p and the repetition penalty are read; without `do_sample` the model
    is greedy.

    Raises:
        WeightsError: values that cannot be.
    """
    try:
        given = msgspec.convert(generation, _Generation)
        stops = given.eos_token_id
        if stops is None:
            stops = msgspec.convert({"eos_token_id": config.get("eos_token_id")}, _Generation).eos_token_id
        asked = {
            "temperature": (1.0 if given.temperature is None else given.temperature) if given.do_sample else None,
            "top_p": given.top_p if given.do_sample else None,
            "repetition_penalty": given.repetition_penalty,
            "max_new_tokens": given.max_new_tokens,
        }
        sampling = msgspec.structs.replace(
            SamplingConfig(), **{name: value for name, value in asked.items() if value is not None}
        )
    except ValueError as error:
        raise WeightsError(f"generation_config.json: {error}") from error
    stop_ids = [stops] if isinstance(stops, int) else stops or []
    return GenerationDefaults(stop_ids=tuple(dict.fromkeys(stop_ids)), sampling=sampling)


def write_generation(generation: GenerationDefaults) -> dict[str, Any]:
    """Return what generation_config.json says."""
    sampling, plain = generation.sampling, SamplingConfig()
    published: dict[str, Any] = {
        "eos_token_id": _one_or_all(generation.stop_ids),
        "do_sample": sampling.temperature > 0,
    }
    # transformers refuses a temperature or top_p that greedy decoding would not look at
    if sampling.temperature > 0:
        published |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.repetition_penalty != plain.repetition_penalty:
        published["repetition_penalty"] = sampling.repetition_penalty
    if sampling.max_new_tokens != plain.max_new_tokens:
        published["max_new_tokens"] = sampling.max_new_tokens
    return published


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None
