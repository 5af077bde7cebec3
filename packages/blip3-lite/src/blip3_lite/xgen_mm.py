"""xGen-MM (BLIP-3) v1.5 checkpoints, in and out: names, extra rows, prompts and defaults of the four releases.

    base         one view an image, prompts without a chat format, fp32
    singleimg    any-resolution tiles, Phi-3 chat, fp32
    interleave   the same, further trained on several images, bf16
    dpo          the same, after preference and safety tuning; its dtype is not known here and taken as bf16

Their tensors are this package's, under `vlm.`, but for the language model's three extra tokens (`<image>`,
`<image placeholder>`, `<|endofchunk|>`), which lie in tensors of their own behind a table that is padded to a multiple
of 64 rows. Here they follow the used rows in one table, and the padding, which no id reaches, is left out (an export
writes zeros there). The head has a trained bias.

Source: xGen-MM, arXiv:2408.08872, and its released weights `Salesforce/xgen-mm-phi3-mini-*-r-v1.5`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from phi3_lite import HFTokenizer, Quantisation, load_targets, quantise_linears
from weight_files import (
    Piece,
    Recipe,
    SafetensorsFiles,
    SavedTensor,
    Target,
    TensorSource,
    WeightsError,
    compare_tensors,
    load_tensors,
    open_pickled,
    shard_writers,
    unique_tensors,
)

from .checkpoint import LoadedModel
from .config import Blip3Config, CheckpointConfig
from .folder import MANIFEST, read_manifest, write_folder
from .model import Blip3, undrawn_model
from .presets import EXTRA_TOKENS, NUM_USED_ROWS, PAD_TOKEN, XgenKind, xgen_mm_config, xgen_mm_sampling
from .processor import Processor

PREFIX = "vlm."
_FORMAT = "xgen-mm-v1.5"
_ROW_MULTIPLE = 64
PUBLISHED_DTYPE: dict[XgenKind, torch.dtype] = {
    "base": torch.float32,
    "singleimg": torch.float32,
    "interleave": torch.bfloat16,
    "dpo": torch.bfloat16,
}
_EXTRA: dict[str, str] = {
    "lang_model.model.embed_tokens.weight": "lang_model.model.embed_tokens.additional_embedding.weight",
    "lang_model.lm_head.weight": "lang_model.lm_head.additional_fc.weight",
    "lang_model.lm_head.bias": "lang_model.lm_head.additional_fc.bias",
}
"""Tensors with extra rows → where a release keeps them."""


def recipes(cfg: Blip3Config, names: Sequence[str], prefix: str = PREFIX) -> dict[str, Recipe]:
    """Of what rows of a release each of our tensors `names` is made."""
    used = cfg.lm.vocab_size - len(EXTRA_TOKENS)
    made: dict[str, Recipe] = {}
    for name in names:
        extra = _EXTRA.get(name)
        made[name] = (
            [Piece(prefix + name)] if extra is None else [Piece(prefix + name, rows=(0, used)), Piece(prefix + extra)]
        )
    return made


def xgen_mm_tokenizer(file: Path) -> HFTokenizer:
    """Read Phi-3's or a release's tokenizer.json; the tokens that xGen-MM adds get their released ids.

    Raises:
        WeightsError: no tokenizer, or one that gives these tokens other ids.
    """
    try:
        tokenizer = HFTokenizer.from_file(file)
    except (OSError, ValueError) as error:
        raise WeightsError(f"tokenizer {file}: expected a tokenizer.json, got: {error}") from error
    absent = [name for name in (PAD_TOKEN, *EXTRA_TOKENS) if name not in tokenizer.control_ids]
    tokenizer = tokenizer.with_control_tokens(absent) if absent else tokenizer
    expected = dict(zip((PAD_TOKEN, *EXTRA_TOKENS), range(NUM_USED_ROWS - 1, NUM_USED_ROWS + 3), strict=True))
    wrong = {name: tokenizer.token_id(name) for name, token in expected.items() if tokenizer.token_id(name) != token}
    if wrong:
        raise WeightsError(
            f"tokenizer {file}: expected {expected}, got {wrong}; take the tokenizer of Phi-3-mini-4k or of the release"
        )
    return tokenizer


def detect_kind(path: Path) -> XgenKind:
    """Tell a base release from an instruct one by its preprocessor_config.json, whose `grids` the base has empty.

    The three instruct releases share architecture and prompts; they are all told as `singleimg`. A folder that
    `export_xgen_mm` wrote says its kind itself.

    Raises:
        WeightsError: there is no such file.
    """
    if (path / MANIFEST).is_file():
        said = str(read_manifest(path, verify=False).get("format", ""))
        kinds: dict[str, XgenKind] = {f"{_FORMAT} {kind}": kind for kind in PUBLISHED_DTYPE}
        if said in kinds:
            return kinds[said]
    file = path / "preprocessor_config.json"
    try:
        found: dict[str, Any] = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"release {path}: expected preprocessor_config.json, which tells base from instruct, got: {error}; "
            "put it there or name the kind (base, singleimg, interleave, dpo)"
        ) from error
    return "singleimg" if found.get("grids") else "base"


def load_xgen_mm(
    path: Path,
    kind: XgenKind | None = None,
    *,
    cfg: Blip3Config | None = None,
    tokenizer: HFTokenizer | None = None,
    quantize: Quantisation | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_missing: Sequence[str] = (),
    allow_pickle: bool = False,
    vision: Path | None = None,
    on_tensor: Callable[[str], None] | None = None,
    on_count: Callable[[int], None] | None = None,
) -> LoadedModel:
    """Load a release's folder, or a `.pt` of the original trainer, tensor by tensor into its final dtype and device.

    kind: which release; by default told from the folder. cfg: another size than the published. tokenizer: instead of
    the folder's tokenizer.json. quantize: hold the language model's matrices as integers, made while they are read.
    dtype: by default the file's. allow_missing: shell patterns of our tensor names that may be missing; they are
    drawn anew and named in `left_random`. A `.pt` (`allow_pickle`) is read with `weights_only=True`; it holds
    no vision tower, which `vision` gives: a Hugging Face folder of SigLIP. on_tensor, on_count: as in `open_model`.

    Raises:
        WeightsError: missing, unexpected or misshaped tensors (all listed), an unreadable file, another tokenizer, or a
            `.pt` without `allow_pickle`.
    """
    is_pickle = path.is_file() and path.suffix in (".pt", ".pth", ".bin")
    if is_pickle and not allow_pickle:
        raise WeightsError(
            f"weights {path}: expected safetensors, got a pickle; convert it, or allow it (read with weights_only=True)"
        )
    folder = path.parent if path.is_file() else path
    kind = detect_kind(folder) if kind is None else kind
    cfg = xgen_mm_config(kind) if cfg is None else cfg
    tokenizer = xgen_mm_tokenizer(folder / "tokenizer.json") if tokenizer is None else tokenizer
    with ExitStack() as stack:
        source: TensorSource = (
            open_pickled(path, prefix="module.") if is_pickle else stack.enter_context(SafetensorsFiles(path))
        )
        prefix = PREFIX if any(name.startswith(PREFIX) for name in source.tensors) else ""
        dtypes = {info.dtype for info in source.tensors.values() if info.dtype.is_floating_point}
        dtype = (torch.float32 if len(dtypes) != 1 else dtypes.pop()) if dtype is None else dtype
        model = undrawn_model(cfg, dtype)
        if quantize is not None:
            quantise_linears(model.lang_model, quantize)
        model.to_empty(device=device)
        targets = load_targets(model)
        if on_count is not None:
            on_count(len(targets))
        if vision is not None:
            tower = {name: targets.pop(name) for name in list(targets) if name.startswith("vision_encoder.")}
            _load_tower(stack.enter_context(SafetensorsFiles(vision)), tower, on_tensor)
        made = recipes(cfg, list(targets), prefix)
        left = compare_tensors(source, targets, made, allow_missing=allow_missing).left
        _draw(model, left)
        load_tensors(source, targets, made, allow_missing=allow_missing, on_tensor=on_tensor)
    model.requires_grad_(False).eval()
    config = CheckpointConfig(model=cfg, sampling=xgen_mm_sampling(kind))
    return LoadedModel(model, Processor(cfg, tokenizer), config, left)


def _draw(model: Blip3, names: Sequence[str]) -> None:
    """Draw these anew, and what else is in their towers: to be done before loading."""
    held = unique_tensors(model)
    if quantised := [name for name in names if name not in held]:
        raise WeightsError(
            f"allow_missing: expected plain tensors to draw anew, got quantised: {', '.join(quantised[:8])}; "
            "load without quantize"
        )
    for prefix, part in (("vision_encoder.", model.vision_encoder), ("vision_tokenizer.", model.vision_tokenizer)):
        if any(name.startswith(prefix) for name in names):
            part.init_weights()
    model.lang_model.reset_parameters(
        names=[name.removeprefix("lang_model.") for name in names if name.startswith("lang_model.")]
    )


def _load_tower(
    source: TensorSource, targets: Mapping[str, Tensor | Target], on_tensor: Callable[[str], None] | None
) -> None:
    """Fill the vision tower from a SigLIP folder; its text tower is not needed."""
    made: dict[str, Recipe] = {name: [Piece(name.replace("vision_encoder.", "vision_model.", 1))] for name in targets}
    load_tensors(source, targets, made, ignored=("text_model.*", "logit_*"), on_tensor=on_tensor)


def xgen_mm_tensors(model: Blip3, dtype: torch.dtype) -> list[SavedTensor]:
    """Every tensor of a release, in the order of our model, under its published name; works on the meta device.

    Raises:
        ValueError: a model that has not the parts of xGen-MM: head bias, untied head, pooling head.
    """
    held = unique_tensors(model)
    needed = [*_EXTRA, "vision_encoder.head.probe"]
    if absent := [name for name in needed if name not in held]:
        raise ValueError(f"export: expected a model with {', '.join(absent)}, as xGen-MM has, got one without; see cfg")
    num_extra = len(EXTRA_TOKENS)
    saved: list[SavedTensor] = []
    for name, tensor in held.items():
        if name not in _EXTRA:
            saved.append(SavedTensor(PREFIX + name, tuple(tensor.shape), dtype, lambda tensor=tensor: tensor))
            continue
        used = len(tensor) - num_extra
        padded = -(-used // _ROW_MULTIPLE) * _ROW_MULTIPLE
        rest = tuple(tensor.shape[1:])
        saved.append(
            SavedTensor(
                PREFIX + name, (padded, *rest), dtype, lambda t=tensor, n=used, p=padded: _with_zero_rows(t[:n], p)
            )
        )
        saved.append(SavedTensor(PREFIX + _EXTRA[name], (num_extra, *rest), dtype, lambda t=tensor, n=used: t[n:]))
    return saved


def _with_zero_rows(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def export_xgen_mm(path: Path, loaded: LoadedModel, kind: XgenKind, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder with the weights under their published names, in the release's dtype, and the tokenizer.

    The release's own config and Python files are not made: lay the folder over a copy of the release to use its code.

    Raises:
        ValueError: the model is none of xGen-MM's.
    """
    tensors = xgen_mm_tensors(loaded.model, PUBLISHED_DTYPE[kind])
    writers = shard_writers(tensors, max_shard_bytes=max_shard_bytes)
    writers[loaded.processor.tokenizer_file] = loaded.processor.save_tokenizer
    write_folder(path, writers, {"format": f"{_FORMAT} {kind}"})
