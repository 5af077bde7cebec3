"""A Phi-3 whose matrices are int8 or int4, for decoding that is bound by reading weights.

`quantise_linears` turns a model over, loaded or still on the meta device; there, each matrix is then quantised row by
row as a load hands rows in (`load_targets`), and is never held in full precision. What becomes what:

    kind     projections of the layers     head      embedding
    int8     int8                          int8      int8
    int4     int4, groups of 32 inputs     int8      int8

The head and the embedding stay at eight bits: rare tokens suffer most from four, and together they are a twentieth of
Phi-3-mini. A tied head shares the embedding's codes. Norms and the head's bias keep their dtype. In memory,
Phi-3-mini takes 7.6 GB in bf16, 3.8 GB with int8 and 2.5 GB with int4, all at bf16 scales.

The state (`codes`, `scales`) depends on the machine's layout of int4: quantise at load time, and keep the checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fused_kernels import (
    INT4_GROUP,
    dequantise_int4,
    dequantise_int8,
    int4_block,
    int4_matmul,
    int8_matmul,
    pack_int4,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)
from weight_files import Target, unique_tensors

from .model import Head, Phi3, TokenEmbedding
from .projection import Projection

Quantisation = Literal["int8", "int4"]
"""What a layer's projections are kept as."""

_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
# Weights that are quantised at a time, so that what is in between stays in a core's cache.
_CHUNK_ELEMENTS = 1 << 18


class QuantisedLinear(nn.Module, ABC):
    """A matrix [out_features, in_features] without bias, kept as integers; itself a `weight_files.Target`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def shape(self) -> Sequence[int]:
        """That of the matrix."""
        return self.out_features, self.in_features

    def target(self) -> Target:
        """What a load writes rows into."""
        return self

    @torch.no_grad()
    def write(self, start: int, rows: Float[Tensor, "n d"]) -> None:
        """Quantise rows [start, start + n) of the matrix, a few at a time."""
        step = self._rows_at_a_time()
        begin = start
        while begin < start + len(rows):
            # Steps end at whole multiples: no block of int4 is then opened twice for one tensor.
            end = min(start + len(rows), (begin // step + 1) * step)
            self._write(begin, rows[begin - start : end - start])
            begin = end

    def _rows_at_a_time(self) -> int:
        return max(1, _CHUNK_ELEMENTS // self.in_features)

    @abstractmethod
    def _write(self, start: int, rows: Tensor) -> None:
        """Quantise rows that `write` has cut to size."""

    @abstractmethod
    def dequantised(self) -> Float[Tensor, "n d"]:
        """Return the matrix in the dtype of the scales."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Multiply with the matrix, in x's dtype; differentiable with respect to x."""

    def extra_repr(self) -> str:
        """Say the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scales={self.scales.dtype}"


class Int8Linear(QuantisedLinear):
    """Symmetric, one scale a row."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """dtype: of the scales."""
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        super().__init__(in_features, out_features, codes, torch.zeros(out_features, dtype=dtype, device=device))

    def _write(self, start: int, rows: Tensor) -> None:
        codes, scales = quantise_int8(rows, self.scales.dtype)
        self.codes[start : start + len(rows)] = codes.to(self.codes.device)
        self.scales[start : start + len(rows)] = scales.to(self.scales.device)

    def dequantised(self) -> Float[Tensor, "n d"]:
        """Return the matrix in the dtype of the scales."""
        return dequantise_int8(self.codes, self.scales)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Multiply with the matrix, in x's dtype; differentiable with respect to x."""
        return int8_matmul(x, self.codes, self.scales)


class Int4Linear(QuantisedLinear):
    """Four bits, a scale and a zero for each 32 inputs; rows and inputs padded to whole blocks and groups."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """dtype: of the scales."""
        self.block = int4_block()
        num_blocks, num_groups = -(-out_features // self.block), -(-in_features // INT4_GROUP)
        codes = torch.zeros(num_blocks, num_groups * INT4_GROUP, self.block // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(num_groups, num_blocks * self.block, 2, dtype=dtype, device=device)
        super().__init__(in_features, out_features, codes, scales)

    def _rows_at_a_time(self) -> int:
        return max(1, super()._rows_at_a_time() // self.block) * self.block

    def _write(self, start: int, rows: Tensor) -> None:
        codes, scales = quantise_int4(rows, self.scales.dtype)
        end = start + len(rows)
        first, last = start // self.block, -(-end // self.block)
        if start % self.block or end % self.block:
            # The neighbours in a block share its bytes.
            whole = unpack_int4(self.codes[first:last])
            offset = start - first * self.block
            whole[offset : offset + len(rows)] = codes.to(whole.device)
            if end == self.out_features:
                whole[offset + len(rows) :] = 0
            codes = whole
        self.codes[first:last] = pack_int4(codes, self.block).to(self.codes.device)
        self.scales[:, start:end] = scales.to(self.scales.device)
        if end == self.out_features:
            # Rows of the last block that are none of the matrix; memory that is not initialised holds anything.
            self.scales[:, end:] = 0

    def dequantised(self) -> Float[Tensor, "n d"]:
        """Return the matrix in the dtype of the scales."""
        return dequantise_int4(unpack_int4(self.codes), self.scales)[: self.out_features, : self.in_features]

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Multiply with the matrix, in x's dtype; differentiable with respect to x."""
        return int4_matmul(x, self.codes, self.scales)[..., : self.out_features]


class QuantisedEmbedding(Int8Linear):
    """A token embedding in int8, and the head too where that is tied to it."""

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """The table in floating point, made anew."""
        return self.dequantised()

    def forward(self, ids: Int[Tensor, "... t"]) -> Float[Tensor, "... t d"]:
        """Look the tokens up."""
        return self.codes[ids].to(self.scales.dtype) * self.scales[ids].unsqueeze(-1)

    def project(self, hidden: Float[Tensor, "... d"], bias: Float[Tensor, " v"] | None) -> Float[Tensor, "... v"]:
        """Give the logits of a tied head."""
        logits = int8_matmul(hidden, self.codes, self.scales)
        return logits if bias is None else logits + bias


class QuantisedHead(Int8Linear):
    """An output layer in int8; the bias as it was."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype, device=device)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        """The matrix in floating point, made anew."""
        return self.dequantised()

    def project(self, hidden: Float[Tensor, "... d"], bias: Float[Tensor, " v"] | None) -> Float[Tensor, "... v"]:
        """Give the logits."""
        logits = self(hidden)
        return logits if bias is None else logits + bias


def quantise_linears(model: Phi3, kind: Quantisation) -> None:
    """Replace the projections, the head and the embedding in place; what they hold is quantised, one by one.

    On the meta device there is nothing to quantise yet: allocate (`to_empty`), then load into `load_targets`.

    Raises:
        ValueError: the kind is unknown, or a matrix is no plain one any more (quantised already, or with an adapter);
            the model is then unchanged.
    """
    layers = {"int8": Int8Linear, "int4": Int4Linear}
    if kind not in layers:
        raise ValueError(f"quantisation: expected one of {', '.join(layers)}, got {kind!r}; choose one of these")
    names = [f"model.layers.{index}.{name}" for index in range(model.cfg.num_layers) for name in _PROJECTIONS]
    plain = {**dict.fromkeys(names, Projection), "model.embed_tokens": TokenEmbedding, "lm_head": Head}
    for name, expected in plain.items():
        found = type(model.get_submodule(name))
        if found is not expected:
            raise ValueError(
                f"{name}: expected a plain {expected.__name__} to quantise, got {found.__name__}; "
                "quantise once, and before adapters are attached"
            )
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, Projection)
        new = layers[kind](old.in_features, old.out_features, dtype=old.weight.dtype, device=old.weight.device)
        _replace(model, name, old.weight, new)
    table = model.model.embed_tokens.weight
    vocab_size, width = table.shape
    _replace(
        model, "model.embed_tokens", table,
        QuantisedEmbedding(width, vocab_size, dtype=table.dtype, device=table.device),
    )  # fmt: skip
    head = model.lm_head.weight
    if head is not None:
        _replace(
            model, "lm_head", head,
            QuantisedHead(width, vocab_size, model.lm_head.bias, dtype=head.dtype, device=head.device),
        )  # fmt: skip


def _replace(model: nn.Module, name: str, weight: Tensor, new: QuantisedLinear) -> None:
    if not weight.is_meta:
        new.write(0, weight)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.train(model.training))


def load_targets(model: nn.Module) -> dict[str, Tensor | Target]:
    """What a load fills, by the names of the model without quantisation: plain tensors and quantised matrices."""
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    targets: dict[str, Tensor | Target] = {}
    for name, tensor in unique_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        if owner in quantised and leaf in ("codes", "scales"):
            targets[f"{owner}.weight"] = quantised[owner].target()
        else:
            targets[name] = tensor
    return targets
