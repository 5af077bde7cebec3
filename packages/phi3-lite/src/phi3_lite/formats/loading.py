"""Load a published language model: what lies at the path tells its format, its weights stream into their final place.

The model is built on the meta device, cast and, if asked for, quantised there, given memory once, and filled tensor by
tensor: what is in memory is the model and one tensor of the source.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weight_files import TensorSource, WeightsError, load_tensors

from ..chat import ChatTemplate
from ..config import GenerationDefaults
from ..model import Phi3
from ..quantised import Quantisation, load_targets, quantise_linears
from ..tokenizer import Tokenizer
from .huggingface import read_huggingface
from .published import PublishedLM, check_ids


class LoadedLM(NamedTuple):
    """A language model and what was published with it."""

    model: Phi3
    """In evaluation mode."""
    tokenizer: Tokenizer | None
    """The published one; None where there was none beside the weights."""
    generation: GenerationDefaults
    """Ids that end an answer, the chat format's included, and how the next token is meant to be chosen."""
    chat: ChatTemplate | None
    """Chat format; None where there is none, or one that is not known."""
    left_random: tuple[str, ...] = ()
    """Tensors that the source lacked and that `allow_missing` let be drawn anew."""


def open_published(path: Path | str) -> PublishedLM:
    """Open a GGUF file or a Hugging Face folder: everything but the weights themselves is read.

    Raises:
        WeightsError: there is none, or it cannot be loaded as it is.
    """
    published = _open_gguf(path) if Path(path).is_file() else read_huggingface(path)
    check_ids(published.config, published.tokenizer, published.generation.stop_ids, str(path))
    return published


def _open_gguf(path: Path | str) -> PublishedLM:
    # the gguf package costs a moment to import, and folders do without
    from .gguf import read_gguf

    held = read_gguf(path)
    chat = None if held.chat is None else ChatTemplate(held.tokenizer, kind=held.chat)
    return PublishedLM(held.config, held.source, held.recipes, held.tokenizer, held.generation, chat, held.ignored)


def load_lm(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: Quantisation | None = None,
    allow_missing: Sequence[str] = (),
    on_tensor: Callable[[str], None] | None = None,
    on_count: Callable[[int], None] | None = None,
) -> LoadedLM:
    """Load a GGUF file or a Hugging Face folder into `dtype` (None: the one that most of its bytes have) on `device`.

    quantize: hold the matrices as integers, made of the rows as they are read. allow_missing: shell patterns of the
    model's tensors that may be missing; they are drawn anew and named in `left_random`. on_count: called once with
    the number of tensors to come; on_tensor: with each one's name once it is there.

    Raises:
        WeightsError: the files are missing, damaged, of another architecture, or do not hold the model's tensors; the
            message names every fault, and nothing is loaded.
    """
    with ExitStack() as stack:
        published = open_published(path)
        if isinstance(published.source, AbstractContextManager):
            stack.enter_context(published.source)
        with torch.device("meta"):
            model = Phi3(published.config)
        model.to(dtype or common_dtype(published.source))
        if quantize is not None:
            quantise_linears(model, quantize)
        model.to_empty(device=device)
        targets = load_targets(model)
        if on_count is not None:
            on_count(len(targets))
        left = load_tensors(
            published.source,
            targets,
            published.recipes,
            ignored=published.ignored,
            allow_missing=allow_missing,
            on_tensor=on_tensor,
        )
    if undrawn := [name for name in left if not isinstance(targets[name], Tensor)]:
        raise WeightsError(
            f"weights {path}: expected plain tensors to draw anew, got quantised: {', '.join(undrawn[:8])}; "
            "load without quantize"
        )
    model.reset_parameters(names=left)
    chat_stops = () if published.chat is None else published.chat.stop_ids
    stop_ids = tuple(dict.fromkeys((*published.generation.stop_ids, *chat_stops)))
    generation = GenerationDefaults(stop_ids=stop_ids, sampling=published.generation.sampling)
    return LoadedLM(model.eval(), published.tokenizer, generation, published.chat, tuple(left))


def common_dtype(source: TensorSource) -> torch.dtype:
    """Return the floating-point dtype that most of a source's bytes have.

    Raises:
        WeightsError: no tensor has one.
    """
    num_bytes: dict[torch.dtype, int] = {}
    for info in source.tensors.values():
        if info.dtype.is_floating_point:
            size = torch.Size(info.shape).numel() * info.dtype.itemsize
            num_bytes[info.dtype] = num_bytes.get(info.dtype, 0) + size
    if not num_bytes:
        raise WeightsError(f"weights {source.where}: expected floating-point tensors, got none; is it a model's state?")
    return max(num_bytes, key=lambda dtype: num_bytes[dtype])
