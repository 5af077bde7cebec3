"""Adapters in the files of Hugging Face's PEFT: `adapter_model.safetensors` and `adapter_config.json`.

A layer `model.layers.0.mlp.down_proj` has the tensors `base_model.model.model.layers.0.mlp.down_proj.lora_A.weight`,
`….lora_B.weight` and, with DoRA, `….lora_magnitude_vector` (peft v0.21.2, utils/save_and_load.py). The names of the
tensors say which layers are adapted; the config says how strongly, and whether there is more to it than that.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from safetensors.torch import save_file
from torch import Tensor, nn

from weight_files import Piece, SafetensorsFiles, WeightsError, load_tensors

from .adapter import LoraLayer
from .config import LoraConfig
from .model import attach_named, linear_layers, lora_layers

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "lora_magnitude": ".lora_magnitude_vector"}
# Settings that are read below, and those without any bearing on what an adapter computes.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora",
    "use_rslora",
}  # fmt: skip
# Starts that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ …) belong to a changed base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

Config = Mapping[str, object]


def save_peft(model: nn.Module, folder: Path | str, *, base_model: str | None = None) -> None:
    """Write the model's adapters as PEFT reads them; `model` stands for the model that PEFT is to wrap.

    base_model: name or path of that model, for the config. Layers may differ in rank and alpha.

    Raises:
        ValueError: the model has no adapter, or layers differ in dropout or in being DoRA.
    """
    layers = lora_layers(model)
    kinds = {(layer.dropout.p, layer.lora_magnitude is not None) for _, layer in layers}
    if len(kinds) != 1:
        raise ValueError(
            "adapters to save: expected some that agree in dropout and in being DoRA, "
            f"got (dropout, is DoRA) {sorted(kinds)}; attach them with such configs"
        )
    ((dropout, use_dora),) = kinds
    ranks = {name: layer.lora_a.shape[0] for name, layer in layers}
    alphas = {name: _number(layer.scale * ranks[name]) for name, layer in layers}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": dropout,
        "target_modules": list(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": use_dora,
        "use_rslora": False,
    }
    tensors = {
        f"{_PREFIX}{name}{_ENDS[leaf]}": tensor.detach().cpu().contiguous()
        for name, layer in layers
        for leaf, tensor in layer.adapter_tensors().items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Under other names first: a file that is there is whole.
    weights, settings = (folder / f".{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE))
    save_file(tensors, weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(weights, folder / WEIGHTS_FILE)
    os.replace(settings, folder / CONFIG_FILE)


def _number(alpha: float) -> int | float:
    """A whole number as an int, as PEFT has it, without the last bit's error of scale · rank."""
    near = float(f"{alpha:.12g}")
    return int(near) if near.is_integer() else near


def load_peft(model: nn.Module, folder: Path | str) -> list[str]:
    """Attach a PEFT adapter to `model`, which stands for the model that PEFT wrapped; return the layers' names.

    Ranks, alphas, dropout, rank-stabilised scale (arXiv:2312.03732) and DoRA are taken from the files.

    Raises:
        WeightsError: files are missing or damaged, tensors do not fit the model or each other, or the config asks for
            what is not LoRA or DoRA on linear layers; all faults of a kind are listed.
        ValueError: a layer has an adapter already. The model is unchanged in all cases.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        others = sorted(path.name for path in folder.glob("adapter_model*"))
        raise WeightsError(
            f"{folder}: expected {WEIGHTS_FILE}, got {', '.join(others) or 'no weights'}; "
            "save the adapter as safetensors (a .bin is a pickle, which can run code)"
        )
    with SafetensorsFiles(folder / WEIGHTS_FILE) as source:
        shapes = {name: info.shape for name, info in source.tensors.items()}
        configs = _layer_configs(source.where, shapes, config, model)
        attach_named(model, configs)
        targets: dict[str, Tensor] = {}
        for name in configs:
            layer = model.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            targets |= {_PREFIX + name + _ENDS[leaf]: tensor for leaf, tensor in layer.adapter_tensors().items()}
        load_tensors(source, targets, {name: [Piece(name)] for name in targets})
    return list(configs)


def _read_config(path: Path) -> Config:
    """Read adapter_config.json and refuse what is no plain LoRA or DoRA."""
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: expected PEFT's config as JSON, got {error}; copy the folder again") from error
    config = cast(dict[str, object], config) if isinstance(config, dict) else {}
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise WeightsError(
            f"{path}: expected an object with numbers r and lora_alpha, got none; give an adapter's config"
        )
    asked = {name: value for name, value in config.items() if name not in _KNOWN and value not in (None, False, {}, [])}
    if config.get("peft_type", "LORA") != "LORA":
        asked["peft_type"] = config["peft_type"]
    if config.get("bias", "none") != "none":
        asked["bias"] = config["bias"]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        asked["init_lora_weights"] = config["init_lora_weights"]
    if asked:
        raise WeightsError(
            f"{path}: expected LoRA or DoRA on linear layers and nothing else, got {asked}; "
            "merge the adapter with PEFT and load the merged model"
        )
    return config


def _layer_configs(
    where: str, shapes: Mapping[str, tuple[int, ...]], config: Config, model: nn.Module
) -> dict[str, LoraConfig]:
    """Say how each layer is to be adapted, after comparing tensors, config and model with each other."""
    linears = linear_layers(model)
    use_dora = bool(config.get("use_dora"))
    leaves = ["lora_a", "lora_b", *(["lora_magnitude"] if use_dora else [])]
    named = {
        name.removeprefix(_PREFIX).removesuffix(_ENDS["lora_a"]) for name in shapes if name.endswith(_ENDS["lora_a"])
    }
    names = [name for name in linears if name in named or _is_wanted(name, config)]
    expected: dict[str, tuple[int, ...]] = {}
    configs: dict[str, LoraConfig] = {}
    for name in names:
        linear = linears[name]
        rank = int(_by_pattern(name, config, "rank_pattern", "r"))
        alpha = float(_by_pattern(name, config, "alpha_pattern", "lora_alpha"))
        configs[name] = LoraConfig(
            rank=rank,
            alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
            dropout=float(cast(float, config.get("lora_dropout", 0.0))),
            use_dora=use_dora,
            targets=(name,),
        )
        d_in, d_out = cast(int, linear.in_features), cast(int, linear.out_features)
        sizes = {"lora_a": (rank, d_in), "lora_b": (d_out, rank), "lora_magnitude": (d_out,)}
        expected |= {_PREFIX + name + _ENDS[leaf]: sizes[leaf] for leaf in leaves}
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    misshaped = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if missing or unexpected or misshaped or not expected:
        raise WeightsError(
            f"{where}: expected the adapters of this model's linear layers that the config names, "
            f"got missing {missing}, unexpected {unexpected}, misshaped {misshaped}; "
            "give the model that PEFT wrapped, and both files of one adapter"
        )
    return configs


def _by_pattern(name: str, config: Config, patterns: str, default: str) -> int | float:
    """Look a layer's rank or alpha up as PEFT does: the first pattern that matches an end of its name, or all."""
    found = cast(Mapping[str, float] | None, config.get(patterns)) or {}
    for pattern, value in found.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return cast(float, config[default])


def _is_wanted(name: str, config: Config) -> bool:
    """Whether PEFT would adapt this layer; what it leaves to the model's own list is not known, and False."""
    if config.get("layers_to_transform") is not None or config.get("target_modules") == "all-linear":
        return False
    targets, excluded = (
        cast(str | Iterable[str] | None, config.get(key)) for key in ("target_modules", "exclude_modules")
    )
    return _names(targets, name) and not _names(excluded, name)


def _names(rule: str | Iterable[str] | None, name: str) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in rule or ())
