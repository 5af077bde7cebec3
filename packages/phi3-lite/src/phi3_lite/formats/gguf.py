"""GGUF files of the architectures `phi3` and `llama`: sizes, and of what rows the model's tensors are made.

`phi3` files hold q, k, v in one matrix and gate, up in another, as the model does (`ffn_up` is both). `llama` files
hold them apart, and the rows of q and k permuted so that the channels of a rotary pair lie side by side; the model
pairs channel i with i + r. As written by ggml-org/llama.cpp, convert_hf_to_gguf.py at a38b884c (`LlamaModel.permute`,
`Phi3MiniModel`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeVar

from einops import rearrange
from torch import Tensor

from weight_files import Piece, Recipe, WeightsError

from ..chat import SMOLLM2_SYSTEM, ChatKind
from ..config import GenerationDefaults, LongRope, Phi3Config, SamplingConfig
from ..tokenizer import Tokenizer
from .gguf_file import GGUFFile, Value
from .gguf_file import is_gguf as is_gguf
from .gguf_tokenizer import read_tokenizer

T = TypeVar("T", int, float, str)

_ARCHITECTURES = ("phi3", "llama")
# divisors of the rotary frequencies: Llama 3.1's, and the long and short ones of Phi-3's long-context models
_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# control tokens that end an answer or a document; a file names only one of its own
_STOPS = ("<|end|>", "<|im_end|>", "<|endoftext|>")
_MAX_NUMBERS = 1 << 24
"""Numbers read at once, in float32: an embedding comes part by part, or it would take more than its place in a bfloat16
model."""


class GGUFModel(NamedTuple):
    """What a file holds, opened but not loaded."""

    config: Phi3Config
    """Sizes."""
    source: GGUFFile
    """The tensors."""
    recipes: Mapping[str, Recipe]
    """Of what rows of the source each of the model's tensors is made."""
    tokenizer: Tokenizer
    """The file's own."""
    generation: GenerationDefaults
    """Stop ids and sampling."""
    chat: ChatKind | None
    """Chat format; None where the file names none, or one that is not known."""
    ignored: Sequence[str] = (_FREQS, _LONG, _SHORT)
    """Tensors that are part of the config."""


def read_gguf(path: Path | str) -> GGUFModel:
    """Open a file: everything but the weights themselves is read.

    Raises:
        WeightsError: no GGUF file, one that is cut or damaged, another architecture or variant, tensors of a type that
            is not handled, or a tokenizer that is not.
    """
    source = GGUFFile(path)
    metadata = _Metadata(source)
    try:
        cfg = _config(source, metadata)
        tokenizer = read_tokenizer(source.metadata)
        generation = _generation(metadata, tokenizer)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"weights {path}: {error}") from error
    return GGUFModel(cfg, source, _recipes(cfg, source, metadata.arch), tokenizer, generation, _chat_kind(metadata))


class _Metadata:
    """The file's values by key, with their types checked; `{}` in a key is the architecture's name."""

    def __init__(self, source: GGUFFile) -> None:
        self._held = source.metadata
        self._where = source.where
        arch = self.get("general.architecture", str, "")
        if arch not in _ARCHITECTURES:
            raise WeightsError(
                f"weights {self._where}: expected an architecture of {', '.join(_ARCHITECTURES)}, got {arch!r}; "
                "other models are not handled"
            )
        self.arch = arch

    def __contains__(self, key: str) -> bool:
        return key.format(self.arch) in self._held

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of a key, or `default` if there is one."""
        key = key.format(getattr(self, "arch", ""))
        value: Value | None = self._held.get(key, default)
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            got = "nothing" if value is None else repr(value)[:80]
            raise WeightsError(f"weights {self._where}: {key}: expected {kind.__name__}, got {got}")
        return value

    def refuse(self, key: str, got: object, rule: str) -> WeightsError:
        """Return the error for a value that is not handled."""
        return WeightsError(f"weights {self._where}: {key.format(self.arch)}: expected {rule}, got {got}")


def _config(source: GGUFFile, metadata: _Metadata) -> Phi3Config:
    width = metadata.get("{}.embedding_length", int)
    num_heads = metadata.get("{}.attention.head_count", int)
    if num_heads < 1 or width % num_heads:
        raise metadata.refuse("{}.attention.head_count", num_heads, f"a divisor of the width {width}")
    head_dim = width // num_heads
    for key in ("{}.attention.key_length", "{}.attention.value_length"):
        if metadata.get(key, int, head_dim) != head_dim:
            raise metadata.refuse(key, metadata.get(key, int), f"{head_dim}, width / heads")
    if metadata.get("{}.expert_count", int, 0):
        raise metadata.refuse("{}.expert_count", metadata.get("{}.expert_count", int), "no experts")
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise metadata.refuse("token_embd.weight", "no such tensor", "the embedding")
    rotary_dim = metadata.get("{}.rope.dimension_count", int, head_dim)
    if metadata.arch == "llama" and rotary_dim != head_dim:
        raise metadata.refuse("{}.rope.dimension_count", rotary_dim, f"{head_dim}, the whole head")
    max_positions = metadata.get("{}.context_length", int)
    return Phi3Config(
        vocab_size=embedding.shape[0],
        width=width,
        num_layers=metadata.get("{}.block_count", int),
        num_heads=num_heads,
        num_kv_heads=metadata.get("{}.attention.head_count_kv", int, num_heads),
        mlp_width=metadata.get("{}.feed_forward_length", int),
        max_positions=max_positions,
        sliding_window=_sliding_window(metadata, max_positions),
        rope_theta=metadata.get("{}.rope.freq_base", float, 10_000.0),
        rotary_fraction=rotary_dim / head_dim,
        long_rope=_long_rope(source, metadata, max_positions),
        norm_eps=metadata.get("{}.attention.layer_norm_rms_epsilon", float),
        is_head_tied="output.weight" not in source.tensors,
    )


def _sliding_window(metadata: _Metadata, max_positions: int) -> int | None:
    """Return the window; files from before the key existed have it by their size (llama.cpp, pull request 8931)."""
    if metadata.arch == "phi3" and "{}.attention.sliding_window" not in metadata and max_positions == 4096:
        return 2047
    return metadata.get("{}.attention.sliding_window", int, 0) or None


def _long_rope(source: GGUFFile, metadata: _Metadata, max_positions: int) -> LongRope | None:
    """Return the scaling of the frequencies: sets for short and long sequences, or one for all (Llama 3.1)."""
    scaling = metadata.get("{}.rope.scaling.type", str, "none")
    held = [name for name in (_FREQS, _LONG, _SHORT) if name in source.tensors]
    handled = [("none", []), ("none", [_FREQS]), ("none", [_LONG, _SHORT]), ("longrope", [_LONG, _SHORT])]
    if (scaling, held) not in handled:
        got = f"{scaling!r} and {', '.join(held) or 'no factors'}"
        raise metadata.refuse("{}.rope.scaling.type", got, f"none, {_FREQS}, or both {_LONG} and {_SHORT}")
    if not held:
        return None
    factors = {name: tuple(source.read(name).flatten().tolist()) for name in held}
    if _FREQS in factors:
        return LongRope(
            short_factors=factors[_FREQS],
            long_factors=factors[_FREQS],
            original_max_positions=max_positions,
            attention_factor=1.0,
        )
    attention_factor = "{}.rope.scaling.attn_factor"
    return LongRope(
        short_factors=factors[_SHORT],
        long_factors=factors[_LONG],
        original_max_positions=metadata.get("{}.rope.scaling.original_context_length", int),
        attention_factor=metadata.get(attention_factor, float) if attention_factor in metadata else None,
    )


def _recipes(cfg: Phi3Config, source: GGUFFile, arch: str) -> dict[str, Recipe]:
    def whole(name: str) -> list[Piece]:
        return _in_parts(source, f"{name}.weight")

    recipes: dict[str, Recipe] = {
        "model.embed_tokens.weight": whole("token_embd"),
        "model.norm.weight": whole("output_norm"),
    }
    if not cfg.is_head_tied:
        recipes["lm_head.weight"] = whole("output")
    for index in range(cfg.num_layers):
        ours, theirs = f"model.layers.{index}", f"blk.{index}"
        if arch == "phi3":
            qkv, gate_up = whole(f"{theirs}.attn_qkv"), whole(f"{theirs}.ffn_up")
        else:
            qkv = [
                Piece(f"{theirs}.attn_q.weight", transform=partial(_unpermuted, num_heads=cfg.num_heads)),
                Piece(f"{theirs}.attn_k.weight", transform=partial(_unpermuted, num_heads=cfg.num_kv_heads)),
                *whole(f"{theirs}.attn_v"),
            ]
            gate_up = whole(f"{theirs}.ffn_gate") + whole(f"{theirs}.ffn_up")
        recipes |= {
            f"{ours}.self_attn.qkv_proj.weight": qkv,
            f"{ours}.self_attn.o_proj.weight": whole(f"{theirs}.attn_output"),
            f"{ours}.mlp.gate_up_proj.weight": gate_up,
            f"{ours}.mlp.down_proj.weight": whole(f"{theirs}.ffn_down"),
            f"{ours}.input_layernorm.weight": whole(f"{theirs}.attn_norm"),
            f"{ours}.post_attention_layernorm.weight": whole(f"{theirs}.ffn_norm"),
        }
    return recipes


def _in_parts(source: GGUFFile, name: str) -> list[Piece]:
    info = source.tensors.get(name)
    if info is None or prod(info.shape) <= _MAX_NUMBERS:
        return [Piece(name)]
    num_rows = max(1, _MAX_NUMBERS // prod(info.shape[1:]))
    return [Piece(name, rows=(start, start + num_rows)) for start in range(0, info.shape[0], num_rows)]


def _unpermuted(rows: Tensor, num_heads: int) -> Tensor:
    """Bring each head's rows from (pair, member) into (member, pair), the order of the published weights."""
    return rearrange(rows, "(h pair member) d -> (h member pair) d", h=num_heads, member=2)


def _generation(metadata: _Metadata, tokenizer: Tokenizer) -> GenerationDefaults:
    key = "tokenizer.ggml.eos_token_id"
    stops = [metadata.get(key, int)] if key in metadata else []
    stops += [tokenizer.control_ids[name] for name in _STOPS if name in tokenizer.control_ids]
    sampling = SamplingConfig(
        temperature=metadata.get("general.sampling.temp", float, 0.0),
        top_p=metadata.get("general.sampling.top_p", float, 1.0),
        repetition_penalty=metadata.get("general.sampling.penalty_repeat", float, 1.0),
    )
    return GenerationDefaults(stop_ids=tuple(dict.fromkeys(stops)), sampling=sampling)


def _chat_kind(metadata: _Metadata) -> ChatKind | None:
    """Tell the format by the file's own template, a Jinja program that is read but never run."""
    template = metadata.get("tokenizer.chat_template", str, "")
    if "<|im_start|>" in template and SMOLLM2_SYSTEM in template:
        return "chatml"
    return "phi3" if "<|end|>" in template and "<|assistant|>" in template else None
