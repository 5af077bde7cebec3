"""Model checkpoints: a folder with config.json, model.safetensors, the tokenizer and MANIFEST.json, loaded strictly.

No pickle is read or written and no code comes from a checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_lite
import weight_files
from phi3_lite import SamplingConfig
from weight_files import SafetensorsFiles, WeightsError, same_names, unique_tensors

from .config import CheckpointConfig
from .folder import CheckpointError, read_manifest, write_folder
from .model import Blip3, undrawn_model
from .processor import Processor, load_tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
"""In its place where several processes have written their shares of the weights."""

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "CheckpointError",
    "LoadedModel",
    "load_model",
    "load_tensors",
    "model_writers",
    "read_config",
    "read_manifest",
    "save_model",
    "write_folder",
]


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to use, and what goes with it."""

    model: Blip3
    processor: Processor
    config: CheckpointConfig
    left_random: tuple[str, ...] = ()
    """Tensors that a published source lacked and that `allow_missing` let be drawn anew."""


def model_writers(
    model: Blip3,
    processor: Processor,
    lora: lora_lite.LoraConfig | None = None,
    sampling: SamplingConfig | None = None,
) -> dict[str, Callable[[Path], object]]:
    """Name → writer of each file that a model checkpoint is made of; a training checkpoint adds its own.

    `lora`: the config of the adapters that are attached to `model.lang_model`, unmerged; None if there are none.
    `sampling`: how the model is meant to be sampled, as in `CheckpointConfig`.

    Raises:
        CheckpointError: the model's adapters are others, elsewhere or merged: it could not be loaded again as it is.
    """
    _check_adapters(model, lora)
    config = CheckpointConfig(model=model.cfg, lora=lora, sampling=sampling, tokenizer_file=processor.tokenizer_file)
    return {
        CONFIG: lambda path: path.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2)),
        WEIGHTS: lambda path: save_file(_tensors_to_save(model), path),
        processor.tokenizer_file: processor.save_tokenizer,
    }


def _check_adapters(model: Blip3, lora: lora_lite.LoraConfig | None) -> None:
    layers = lora_lite.lora_layers(model)
    if lora is None:
        if layers:
            raise CheckpointError(
                f"adapters: expected none (no LoRA config was given), got {len(layers)}, the first at {layers[0][0]}; "
                "give their config, or merge_and_remove them"
            )
        return
    if not layers:
        raise CheckpointError(f"adapters: expected those of {lora}, got none; attach them, or save without a config")
    for name, layer in layers:
        if not name.startswith("lang_model."):
            raise CheckpointError(
                f"adapter of {name}: expected adapters in lang_model only, got one elsewhere; merge_and_remove it first"
            )
        if layer.is_merged:
            raise CheckpointError(f"adapter of {name}: expected it apart, got it merged; unmerge the adapters first")
        rank = layer.lora_a.shape[0]
        if (rank, layer.scale) != (lora.rank, lora.scale):
            raise CheckpointError(
                f"adapter of {name}: expected rank {lora.rank}, scale {lora.scale:g}, got rank {rank}, scale "
                f"{layer.scale:g}; give the config that it was attached with"
            )


def save_model(
    path: Path,
    model: Blip3,
    processor: Processor,
    *,
    lora: lora_lite.LoraConfig | None = None,
    sampling: SamplingConfig | None = None,
    manifest: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint folder at `path`, all or nothing; `lora` and `sampling` as for `model_writers`.

    Raises:
        CheckpointError: the model's adapters do not fit `lora`, or `path` holds something that is no checkpoint.
        OSError: the disk is full or read-only; an older checkpoint at `path` is still there.
    """
    write_folder(path, model_writers(model, processor, lora, sampling), manifest or {})


def read_config(path: Path) -> CheckpointConfig:
    """Return a checkpoint's config.

    Raises:
        CheckpointError: no config, or keys and values that this release does not know.
    """
    try:
        return msgspec.json.decode((path / CONFIG).read_bytes(), type=CheckpointConfig)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path}: expected {CONFIG}, got none; check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"checkpoint {path / CONFIG}: expected a model config, got: {error}; is it ours?"
        ) from error


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
    on_tensor: Callable[[str], None] | None = None,
    on_count: Callable[[int], None] | None = None,
) -> LoadedModel:
    """Load a checkpoint folder, frozen; the tensors must be exactly those of its config. No random number is drawn.

    dtype: that of the parameters; by default the file's. on_tensor, on_count: as in `open_model`.

    Raises:
        CheckpointError: missing, half-written or damaged folder; missing, extra or misshaped tensors (all listed).
    """
    manifest = read_manifest(path, verify)
    _check_listed(path, manifest, [CONFIG])
    config = read_config(path)
    weights = weights_file(path)
    _check_listed(path, manifest, [weights.name, config.tokenizer_file])
    processor = Processor(config.model, load_tokenizer(path / config.tokenizer_file))
    # Frozen before the adapters take note of it: merging them for good then leaves frozen matrices.
    model = undrawn_model(config.model, _dtype_of(weights) if dtype is None else dtype).requires_grad_(False)
    if config.lora is not None:
        with torch.device("meta"):
            lora_lite.attach(model.lang_model, config.lora)
    model.to_empty(device=device).requires_grad_(False)
    if on_count is not None:
        on_count(len(unique_tensors(model)))
    load_tensors(model, weights, on_tensor)
    return LoadedModel(model.eval(), processor, config)


def weights_file(path: Path) -> Path:
    """The file of a checkpoint's weights, or the index of its shards; what `load_tensors` takes."""
    return path / (WEIGHTS_INDEX if (path / WEIGHTS_INDEX).is_file() else WEIGHTS)


def _check_listed(path: Path, manifest: Mapping[str, object], names: Iterable[str]) -> None:
    """A file that the manifest does not list has not been verified."""
    absent = [name for name in names if name not in cast(Mapping[str, object], manifest["files"])]
    if absent:
        raise CheckpointError(
            f"checkpoint {path}: expected {', '.join(absent)} among the files of its manifest, got no such entry; "
            "use another copy"
        )


def load_tensors(module: nn.Module, file: Path, on_tensor: Callable[[str], None] | None = None) -> None:
    """Copy the tensors of a safetensors file, or of the shards of an index, into `module`, one by one.

    Nothing is copied unless all of them fit.

    on_tensor: called with each tensor's name once it is there.

    Raises:
        CheckpointError: an unreadable file, or names and shapes that differ; lists every one.
    """
    try:
        with SafetensorsFiles(file) as source:
            weight_files.load_tensors(source, unique_tensors(module), same_names(module), on_tensor=on_tensor)
    except WeightsError as error:
        raise CheckpointError(f"checkpoint {error}") from error


def _tensors_to_save(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in unique_tensors(module).items()}


def _dtype_of(file: Path) -> torch.dtype:
    """The one floating-point dtype of a file's tensors, float32 if there are several."""
    try:
        with SafetensorsFiles(file) as source:
            found = {info.dtype for info in source.tensors.values() if info.dtype.is_floating_point}
    except WeightsError as error:
        raise CheckpointError(f"checkpoint {error}") from error
    return found.pop() if len(found) == 1 else torch.float32


def newest_checkpoint(root: Path) -> Path:
    """Return the checkpoint folder below `root` whose manifest was written last.

    Raises:
        CheckpointError: there is none.
    """
    found = [path.parent for path in root.glob("**/MANIFEST.json") if not path.parent.name.startswith(".")]
    if not found:
        raise CheckpointError(
            f"checkpoint: expected one below {root}/, got none; train one first (uv run apps/train) or name a folder"
        )
    return max(found, key=lambda path: (path / "MANIFEST.json").stat().st_mtime_ns)
