"""The output head and its loss on a GPU: cuBLAS for the products, one Triton kernel for softmax, loss and gradient.

The target rows meet the head a chunk at a time, z = x Wᵀ + b in x's dtype. A program of the kernel reads a row of z,
keeps log p(y), and on request writes over z its own gradient, factor · (onehot(y) - softmax(z)).

Why the products are not in the kernel too: a kernel that keeps no logit at all has to compute them twice, 8 operations
for each of n d v against 6 here (z, ∂x, ∂W), and Triton's products are the slower ones. What is paid for that are
10 bytes a logit in bf16 (written, read twice, overwritten, read by two products): 3 ps at an H100's 3.35 TB/s,
less where a chunk stays in the 50 MB cache, against 23 ps for the products' 18.4 kFLOP at d = 3072 and 800 TFLOP/s.

How many rows a chunk has: without a gradient for W, those that stay in the cache. With one, each chunk reads and
writes all of ∂W in fp32, 8 d v bytes, as much time as the three products of some 320 rows (at 800 TFLOP/s); chunks are
then many times as long, 256 MiB of bf16.
"""

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import once
from .linear_loss_chunked import both_sides
from .triton_parts import launch, power_of_two

_CHUNK_ELEMENTS = 1 << 24
_CHUNK_ELEMENTS_WITH_WEIGHT_GRAD = 1 << 27
_BLOCK = 4096


@triton.jit
@no_type_check
def _softmax_kernel(
    logits_ptr, label_ptr, factor_ptr, log_prob_ptr, num_classes,
    has_gradient: tl.constexpr, has_factor: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_classes
    label = tl.load(label_ptr + row)
    # Before the reductions below, whose barriers keep the gradient of another thread from being read here.
    label_logit = tl.load(logits_ptr + label).to(tl.float32)
    # A running maximum for each lane, joined at the end; finite, since a lane may see no class at all.
    highest = tl.full((block,), -1e30, dtype=tl.float32)
    total = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, num_classes, block):
        column = start + tl.arange(0, block)
        logits = tl.load(logits_ptr + column, mask=column < num_classes, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, logits)
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    row_highest = tl.max(highest, axis=0)
    log_total = row_highest + tl.log(tl.sum(total * tl.exp(highest - row_highest), axis=0))
    tl.store(log_prob_ptr + row, label_logit - log_total)
    if has_gradient:
        factor = tl.load(factor_ptr + row).to(tl.float32) if has_factor else -1.0
        for start in range(0, num_classes, block):
            column = start + tl.arange(0, block)
            mask = column < num_classes
            logits = tl.load(logits_ptr + column, mask=mask, other=0.0)
            grad = factor * (tl.where(column == label, 1.0, 0.0) - tl.exp(logits.to(tl.float32) - log_total))
            tl.store(logits_ptr + column, grad.to(logits.dtype), mask=mask)


def _label_log_probs(logits: Tensor, labels: Tensor, *, factors: Tensor | None, has_gradient: bool) -> Tensor:
    """Return log p(label), fp32[c]; `logits` become factor · (onehot - softmax), factor -1 where None, on request."""
    found = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, power_of_two(logits.shape[1]))
    launch(
        _softmax_kernel, (logits.shape[0],),
        logits, labels, factors, found, logits.shape[1],
        has_gradient=has_gradient, has_factor=factors is not None, block=block, num_warps=8,
    )  # fmt: skip
    return found


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in fp32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32)
    product = a.float() @ b.float()
    return product if total is None else total.add_(product)


class _Gradients:
    """Gradients of x, weight and bias, those that are needed; of the last two summed over chunks in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> None:
        self._head = weight
        self._needed = needed
        self.x = torch.empty_like(x) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] and not len(x) else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if needed[2] else None

    def add(self, rows: slice, x: Tensor, grad_logits: Tensor) -> None:
        if self.x is not None:
            torch.mm(grad_logits, self._head, out=self.x[rows])
        if self._needed[1]:
            self.weight = _add_product(self.weight, grad_logits.t(), x)
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=torch.float32)


def _chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None, has_weight_grad: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their logits."""
    if chunk_rows is None:
        elements = _CHUNK_ELEMENTS_WITH_WEIGHT_GRAD if has_weight_grad else _CHUNK_ELEMENTS
        chunk_rows = max(1, elements // weight.shape[0])
    for start in range(0, x.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        yield rows, F.linear(x[rows], weight, bias)


class SumOfNegativeLogProbs(torch.autograd.Function):
    """-Σ log p(label): scalar; gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_rows: int | None,
        is_training: bool,
    ) -> Tensor:
        """Sum over chunks."""
        needed = ctx.needs_input_grad[:3] if is_training else (False, False, False)
        grads = _Gradients(x, weight, needed)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for rows, logits in _chunks(x, weight, bias, chunk_rows, needed[1]):
            total -= _label_log_probs(logits, labels[rows], factors=None, has_gradient=any(needed)).sum()
            if any(needed):
                grads.add(rows, x[rows], logits)
        ctx.save_for_backward(grads.x, grads.weight, grads.bias)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what was computed."""
        scaled = [
            None if saved is None else (saved * grad_outputs[0]).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


class LogProbs(torch.autograd.Function):
    """log p(label) of each row, fp32 [sides, n]; logits of the first side computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_rows: int | None,
        reference: Tensor | None,
    ) -> Tensor:
        """Go through the chunks."""
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.chunk_rows = chunk_rows
        both, both_labels = both_sides(x, labels, reference)
        out = torch.empty(both.shape[0], dtype=torch.float32, device=x.device)
        for rows, logits in _chunks(both, weight, bias, chunk_rows, has_weight_grad=False):
            out[rows] = _label_log_probs(logits, both_labels[rows], factors=None, has_gradient=False)
        return out.view(1 if reference is None else 2, x.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Go through the chunks again."""
        x, weight, bias, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grads = _Gradients(x, weight, needed)
        grad = grad_outputs[0][0].contiguous()
        for rows, logits in _chunks(x, weight, bias, ctx.chunk_rows, needed[1]):
            _label_log_probs(logits, labels[rows], factors=grad[rows], has_gradient=True)
            grads.add(rows, x[rows], logits)
        grad_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        grad_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return grads.x, grad_weight, grad_bias, None, None, None
