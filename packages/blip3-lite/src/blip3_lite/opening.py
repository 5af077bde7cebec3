"""Open whatever lies at a path: a checkpoint of ours, a release of xGen-MM, or a language model alone."""

from collections.abc import Callable
from pathlib import Path

import torch

from phi3_lite import LoadedLM, Quantisation, load_lm, quantise_linears
from weight_files import SafetensorsFiles, WeightsError

from .checkpoint import LoadedModel, load_model
from .folder import MANIFEST
from .xgen_mm import PREFIX, load_xgen_mm


def open_model(
    path: Path,
    *,
    quantize: Quantisation | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[str], None] | None = None,
) -> LoadedModel | LoadedLM:
    """Load the model at `path`; what lies there tells its format. A language model alone comes as a `LoadedLM`.

    quantize: hold the language model's matrices as integers. dtype: by default the file's. on_tensor: called with each
    tensor's name, for progress.

    Raises:
        ValueError: nothing that can be loaded, or not what it says it is (`CheckpointError`, `WeightsError`).
    """
    # First: a release that we have written has a manifest too.
    if is_release(path):
        return load_xgen_mm(path, quantize=quantize, dtype=dtype, device=device, on_tensor=on_tensor)
    if (path / MANIFEST).exists():
        loaded = load_model(path, dtype=dtype, device=device, on_tensor=on_tensor)
        if quantize is not None:
            quantise_linears(loaded.model.lang_model, quantize)
        return loaded
    return load_lm(path, quantize=quantize, dtype=dtype, device=device, on_tensor=on_tensor)


def is_release(path: Path) -> bool:
    """Whether a folder holds tensors of xGen-MM; one whose files are broken is left to the loaders to complain of."""
    try:
        if not path.is_dir():
            return False
        with SafetensorsFiles(path) as source:
            return any(name.startswith(PREFIX) for name in source.tensors)
    except WeightsError:
        return False
