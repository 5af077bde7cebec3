"""Attention over documents laid end to end, none of which sees another.

Without a kernel for ragged lengths there are two plain ways: one square over all tokens (quadratic in the pack) or one
call a document (an overhead for each). Here documents of similar length share a call: they are sorted by length, cut
into few buckets and padded on the right inside each. Under a causal rule that padding is exact and needs no mask: a
real query never sees a later key. Who goes where depends on the document lengths only, so it is planned once for all
layers of a step.
"""

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from .dense import MAX_TRITON_HEAD_DIM, check_groups, sdpa
from .dispatch import Backend, Op, apply, on_cuda_in_half_precision, once

# A document may stand in a bucket at most this many times as long as itself, plus the slack.
# 24 documents of 40 to 160 tokens, forward and backward, one CPU thread: 22 ms from 1.1 to 1.25, 26 ms with a bucket
# for each length, 28 ms at 2, 47 ms with one bucket.
_STRETCH = 1.25
_SLACK = 8
# PyTorch's flash attention holds no wider head.
_VARLEN_HEAD_DIM = 256


@dataclass(frozen=True)
class Bucket:
    """Documents that are attended to by one call."""

    lengths: tuple[int, ...]
    """Of each document, in tokens, the longest first; the others are padded to it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Documents and slots for each."""
        return len(self.lengths), self.lengths[0]

    @property
    def num_slots(self) -> int:
        """Documents times slots for each."""
        return len(self.lengths) * self.lengths[0]


@dataclass(frozen=True)
class PackPlan:
    """Where each token of a pack stands in the padded buckets; a function of the document lengths alone."""

    boundaries: tuple[int, ...]
    """0, end of the first document, …, t."""
    device: torch.device
    buckets: tuple[Bucket, ...]
    rows: Tensor | None
    """int64[slots]: the token in each slot, padding repeating its document's last; None if tokens stand in order."""
    slots: Tensor | None
    """int64[t]: the slot of each token."""
    padding: Tensor | None
    """int64[...]: the slots that hold no token of their own."""

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return self.boundaries[-1]

    @functools.cached_property
    def bounds(self) -> Tensor:
        """int32[t]: for each token the first of its document."""
        return self._for_each_token(self.boundaries[:-1])

    @functools.cached_property
    def ends(self) -> Tensor:
        """int32[t]: for each token the end of its document."""
        return self._for_each_token(self.boundaries[1:])

    def _for_each_token(self, of_documents: tuple[int, ...]) -> Tensor:
        with torch.inference_mode(False):
            lengths = torch.tensor(self.boundaries).diff()
            return torch.tensor(of_documents, dtype=torch.int32).repeat_interleave(lengths).to(self.device)

    @property
    def num_slots(self) -> int:
        """Tokens and padding together."""
        return sum(bucket.num_slots for bucket in self.buckets)


def plan_packing(cu_seqlens: Int32[Tensor, " docs_plus_1"]) -> PackPlan:
    """Plan the buckets for these document boundaries (0, end of the first, …, t); documents may be empty.

    Plans of the last few packs are kept, by value. Reads the boundaries on the host: on a GPU this waits for the
    device, so call it once a step there and hand the plan to each layer.

    Raises:
        ValueError: if the boundaries do not start at 0 or ever decrease.
    """
    return _plan(tuple(cu_seqlens.tolist()), cu_seqlens.device)


@functools.lru_cache(maxsize=8)
def _plan(boundaries: tuple[int, ...], device: torch.device) -> PackPlan:
    if not boundaries or boundaries[0] != 0 or any(end < start for start, end in pairwise(boundaries)):
        raise ValueError(
            f"cu_seqlens: expected boundaries that start at 0 and never decrease, got {list(boundaries)}; "
            "give cumulative document lengths"
        )
    spans = [(start, end) for start, end in pairwise(boundaries) if end > start]
    spans.sort(key=lambda span: span[0] - span[1])  # stable: equal lengths stay in order
    groups: list[list[tuple[int, int]]] = []
    for start, end in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else math.inf
        if longest > _STRETCH * (end - start) + _SLACK:
            groups.append([])
        groups[-1].append((start, end))
    buckets = tuple(Bucket(tuple(end - start for start, end in group)) for group in groups)
    # A plan may be made while evaluating and used while training: its tensors must not be inference tensors.
    with torch.inference_mode(False):
        return _index(boundaries, buckets, groups, device)


def _index(
    boundaries: tuple[int, ...], buckets: tuple[Bucket, ...], groups: list[list[tuple[int, int]]], device: torch.device
) -> PackPlan:
    rows: list[Tensor] = []
    is_token: list[Tensor] = []
    for bucket, group in zip(buckets, groups, strict=True):
        spans = torch.tensor(group)
        positions = spans[:, :1] + torch.arange(bucket.lengths[0])
        rows.append(torch.minimum(positions, spans[:, 1:] - 1).flatten())
        is_token.append((positions < spans[:, 1:]).flatten())
    flat_rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    if torch.equal(flat_rows, torch.arange(boundaries[-1])):
        return PackPlan(boundaries, device, buckets, None, None, None)
    flat_is_token = torch.cat(is_token)
    token_slots = flat_is_token.nonzero().squeeze(1)
    slots = torch.empty(boundaries[-1], dtype=torch.int64)
    slots[flat_rows[token_slots]] = token_slots
    padding = (~flat_is_token).nonzero().squeeze(1)
    return PackPlan(boundaries, device, buckets, flat_rows.to(device), slots.to(device), padding.to(device))


class _ToSlots(torch.autograd.Function):
    """Tokens to slots. Each token has one slot of its own, so the gradient is a gather too, not a slow scatter-add.

    The gradient at padding is dropped; it is zero: no real query sees a padding key, and padding queries go nowhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: PackPlan) -> Tensor:
        assert plan.rows is not None
        ctx.plan = plan
        return x.index_select(0, plan.rows)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].index_select(0, ctx.plan.slots), None


class _ToTokens(torch.autograd.Function):
    """Slots back to tokens; padding is dropped, and its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: PackPlan) -> Tensor:
        assert plan.slots is not None
        ctx.plan = plan
        return x.index_select(0, plan.slots)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].index_select(0, ctx.plan.rows).index_fill_(0, ctx.plan.padding, 0), None


def _bucket_mask(bucket: Bucket, is_causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """bool, broadcastable to [docs, 1, length, length], True = attend; None where the causal rule alone is exact."""
    num_docs, length = bucket.shape
    if is_causal:
        if window is None or length <= window:
            return None
        return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
    if bucket.lengths[-1] == length:
        return None
    lengths = torch.tensor(bucket.lengths, device=device)
    is_token = torch.arange(length, device=device) < lengths[:, None]
    return is_token[:, None, None, :].expand(num_docs, 1, length, length)


class _Call(NamedTuple):
    """What `packed_attention` was asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    plan: PackPlan | None
    is_causal: bool
    window: int | None
    scale: float | None

    @property
    def has_one_dtype(self) -> bool:
        return self.q.dtype == self.k.dtype == self.v.dtype

    def planned(self) -> PackPlan:
        plan = plan_packing(self.cu_seqlens) if self.plan is None else self.plan
        if plan.num_tokens != self.q.shape[0]:
            raise ValueError(
                f"tokens of packed_attention: expected {plan.num_tokens}, the last boundary, got {self.q.shape[0]}; "
                "give the boundaries of this pack"
            )
        return plan


def _packed_attention_triton(call: _Call) -> Tensor:
    from .packed_triton import packed_attention

    plan = call.planned()
    q, k, v, *_, is_causal, window, scale = call
    return packed_attention(q, k, v, plan.bounds, plan.ends, is_causal=is_causal, window=window, scale=scale)


def _refuse_heads(call: _Call) -> str | None:
    if call.q.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"it holds heads of up to {MAX_TRITON_HEAD_DIM} channels, got {call.q.shape[-1]}"
    if not call.has_one_dtype:
        return f"q, k and v must be of one dtype, got {call.q.dtype}, {call.k.dtype} and {call.v.dtype}"
    return None


def _packed_attention_varlen(call: _Call) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max((bucket.lengths[0] for bucket in call.planned().buckets), default=0)
    bounds = call.cu_seqlens
    out = varlen_attn(call.q, call.k, call.v, bounds, bounds, longest, longest, call.is_causal)
    assert isinstance(out, Tensor)
    return out


def _refuse_varlen(call: _Call) -> str | None:
    if call.window is not None or call.scale is not None:
        return "it has neither a window nor a scale of the caller's"
    num_tokens, num_heads, head_dim = call.q.shape
    if num_heads != call.k.shape[1]:
        return f"it wants as many key heads as query heads, {num_heads}, got {call.k.shape[1]}"
    if num_tokens == 0 or head_dim % 8 or head_dim > _VARLEN_HEAD_DIM:
        return f"it takes heads of a multiple of 8 channels up to {_VARLEN_HEAD_DIM}, and a token at least"
    return None if call.has_one_dtype else "q, k and v must be of one dtype"


def _refuse_varlen_device(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bf16 and fp16 on a CUDA device, got {dtype} on {device}"
    return None


def _packed_attention_bucketed(call: _Call) -> Tensor:
    plan = call.planned()
    q, k, v, *_, is_causal, window, scale = call
    if plan.rows is not None:
        q, k, v = (apply(_ToSlots, x, plan) for x in (q, k, v))
    sizes = [bucket.num_slots for bucket in plan.buckets]
    outs: list[Tensor] = []
    for bucket, *parts in zip(plan.buckets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        q_part, k_part, v_part = (part.reshape(*bucket.shape, *part.shape[1:]) for part in parts)
        mask = _bucket_mask(bucket, is_causal, window, q.device)
        out = sdpa(q_part, k_part, v_part, mask=mask, is_causal=is_causal and mask is None, scale=scale)
        outs.append(out.flatten(0, 1))
    if not outs:
        # No token at all: the sums are zero and keep all three in the graph.
        return q + (k.sum() + v.sum())
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if plan.rows is None else apply(_ToTokens, out, plan)


def _packed_attention_reference(call: _Call) -> Tensor:
    """One square over the whole pack, masked; quadratic in t."""
    q, k, v, cu_seqlens, _, is_causal, window, scale = call
    position = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(position, cu_seqlens[1:], right=True)
    visible = document[:, None] == document[None, :]
    distance = position[:, None] - position[None, :]
    if is_causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(group, dim=1).to(wide), v.repeat_interleave(group, dim=1).to(wide)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("thk,shk->hts", q.to(wide), k) * scale
    probs = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
    return torch.einsum("hts,shk->thk", probs, v).to(q.dtype)


PACKED_ATTENTION = Op(
    "packed_attention",
    Backend("triton", _packed_attention_triton, "Triton, no padding", on_cuda_in_half_precision, _refuse_heads),
    Backend("varlen", _packed_attention_varlen, "PyTorch's varlen_attn", _refuse_varlen_device, _refuse_varlen),
    Backend("bucketed", _packed_attention_bucketed, "scaled_dot_product_attention over buckets of similar length"),
    Backend("reference", _packed_attention_reference, "one masked square over the pack"),
)


def packed_attention(
    q: Float[Tensor, "t h k"],
    k: Float[Tensor, "t g k"],
    v: Float[Tensor, "t g k"],
    cu_seqlens: Int32[Tensor, " docs_plus_1"],
    *,
    is_causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    plan: PackPlan | None = None,
    backend: str = "auto",
) -> Float[Tensor, "t h k"]:
    """Attend inside each document of a pack; query head i uses key head i // (h / g).

    cu_seqlens: document boundaries 0, end of the first, …, t. Boundaries 0 2 5, causal:

        1 0 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 1 1 1

    window: a query at position i sees the keys j with i - window < j ≤ i: itself and the window - 1 before it. That is
    the meaning of `sliding_window` in transformers 5 (`sliding_window_overlay`). None: all of the document.
    scale: 1/√k if None. plan: `plan_packing(cu_seqlens)`, looked up if None.

    Raises:
        ValueError: if g does not divide h, a window is below 1 or without is_causal, or the boundaries do not end at t.
        BackendError: if `backend` is unknown or cannot run.
    """
    check_groups("packed_attention", q.shape[1], k.shape[1])
    if window is not None and (window < 1 or not is_causal):
        raise ValueError(
            f"window of packed_attention: expected at least 1 and is_causal, got {window} and is_causal={is_causal}; "
            "use window=None for no window"
        )
    call = _Call(q, k, v, cu_seqlens, plan, is_causal, window, scale)
    return PACKED_ATTENTION.run(backend, q.device, q.dtype, call)
