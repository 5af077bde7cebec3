"""Hugging Face folders: config.json, safetensors in one file or in shards, generation_config.json, tokenizer files.

`phi3` folders hold what the model holds, under the same names; `llama` folders hold q, k, v and gate, up apart, each in
the order of rows that the model has. Nothing in a folder is run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from weight_files import (
    Piece,
    Recipe,
    SafetensorsFiles,
    TensorSource,
    WeightsError,
    as_they_are,
    shard_writers,
    unique_tensors,
)

from ..chat import ChatTemplate
from ..config import GenerationDefaults, Phi3Config
from ..model import Phi3
from ..tokenizer import Tokenizer
from .huggingface_config import read_config, read_generation, write_config, write_generation
from .huggingface_tokenizer import read_tokenizer, special_ids, tokenizer_writers, write_json
from .published import PublishedLM, check_ids

_CHUNK = 4096
# some old folders carry the frequencies along, which follow from the config
_IGNORED = ("*.rotary_emb.inv_freq",)


def read_huggingface(folder: Path | str) -> PublishedLM:
    """Open a folder: everything but the weights themselves is read.

    Raises:
        WeightsError: files are missing, cut or damaged, the architecture is another one, or it has a feature that is
            not implemented.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    if config is None:
        raise WeightsError(f"weights {folder}: expected a folder with a config.json, got none; finish the download")
    try:
        cfg, arch = read_config(config)
        generation = read_generation(config, _read_json(folder / "generation_config.json") or {})
    except WeightsError as error:
        raise WeightsError(f"weights {folder}: {error}") from error
    tokenizer, chat = read_tokenizer(folder)
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*")):
        raise WeightsError(f"weights {folder}: expected safetensors, got pickled .bin files; convert them elsewhere")
    source = SafetensorsFiles(folder)
    ignored = _IGNORED
    if cfg.is_head_tied and "lm_head.weight" in source.tensors:
        _check_tied(source)
        ignored = (*_IGNORED, "lm_head.weight")
    return PublishedLM(cfg, source, recipes(cfg, arch), tokenizer, generation, chat, ignored)


def recipes(cfg: Phi3Config, arch: str = "phi3") -> dict[str, Recipe]:
    """Return of what rows of a folder's tensors each of the model's is made; `arch` as in config.json."""
    whole = ["model.embed_tokens.weight", "model.norm.weight"] + ([] if cfg.is_head_tied else ["lm_head.weight"])
    fused = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    made: dict[str, Recipe] = {}
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}"
        names = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
        whole += [f"{prefix}.{name}.weight" for name in names]
        for name, parts in fused.items():
            block = name.split(".")[0]
            pieces = [f"{prefix}.{block}.{part}.weight" for part in parts]
            made[f"{prefix}.{name}.weight"] = [Piece(x) for x in pieces]
            if arch == "phi3":
                whole.append(f"{prefix}.{name}.weight")
    return made | {name: [Piece(name)] for name in whole}


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"weights {path}: expected a JSON object, got: {error}; fetch it again") from error


def _check_tied(source: TensorSource) -> None:
    """Refuse a head that is not the embedding, though the config says so: one of the two would be lost."""
    head, embedding = source.tensors["lm_head.weight"], source.tensors.get("model.embed_tokens.weight")
    is_equal = embedding is not None and head.shape == embedding.shape
    for start in range(0, head.shape[0] if is_equal else 0, _CHUNK):
        rows = (start, min(start + _CHUNK, head.shape[0]))
        is_equal = is_equal and torch.equal(
            source.read("lm_head.weight", rows), source.read("model.embed_tokens.weight", rows)
        )
    if not is_equal:
        raise WeightsError(
            f"weights {source.where}: lm_head.weight: expected the embedding's values, as tie_word_embeddings is true, "
            "got others; set it to false in config.json if the head is its own"
        )


def save_huggingface(
    folder: Path | str,
    model: Phi3,
    tokenizer: Tokenizer | None = None,
    *,
    generation: GenerationDefaults | None = None,
    chat: ChatTemplate | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers loads as Phi3ForCausalLM, and `load_lm` again; tensors in the model's dtypes.

    config.json is written last: a folder whose writing was cut off is none. A chat format is written as the program
    that transformers wants.

    Raises:
        ValueError: the folder holds something, or transformers' Phi-3 has no place for what the model has (a bias of
            the head, adapters, quantised matrices).
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"save_huggingface: expected a new or empty folder, got {folder}; name another")
    tensors = unique_tensors(model)
    expected = recipes(model.cfg)
    if strange := sorted(tensors.keys() - expected.keys() - {"lm_head.bias"}) + sorted(
        expected.keys() - tensors.keys()
    ):
        raise ValueError(
            f"save_huggingface: expected the tensors of a plain Phi-3, got others or lacks: {', '.join(strange[:8])}; "
            "merge adapters and save before quantising"
        )
    stops = GenerationDefaults() if generation is None else generation
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    special = special_ids(tokenizer)
    config = write_config(model.cfg, dtype, stops.stop_ids) | special
    writers: dict[str, Callable[[Path], object]] = {}
    if tokenizer is not None:
        check_ids(model.cfg, tokenizer, stops.stop_ids, str(folder))
        writers |= tokenizer_writers(tokenizer, chat, model.cfg.max_positions, stops.stop_ids)
    if generation is not None:
        writers["generation_config.json"] = lambda path: write_json(path, write_generation(stops) | special)
    writers |= shard_writers(as_they_are(tensors), max_shard_bytes=max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in writers.items():
        write(folder / name)
    write_json(folder / "config.json", config)
