"""The head's loss in PyTorch alone, a chunk of rows at a time or, in half precision on a CPU, a block of columns.

A block is a part of the vocabulary for all rows at a time: a sum over chunks of rows wants the head's gradient in fp32,
twice the head itself, where a block's gradient is whole at once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import once
from .linear_product import is_multiplied_by_fp32, linear


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class _Chunk(NamedTuple):
    rows: slice
    x: Tensor
    """[c, d]"""
    log_probs: Tensor
    """[c, v], fp32 or wider; the caller may overwrite it."""
    labels: Tensor
    """int64[c, 1]"""


def _chunks(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int) -> Iterator[_Chunk]:
    for start in range(0, x.shape[0], chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = linear(x[rows], weight, bias)
        if logits.dtype == wide_dtype(x.dtype) and not torch.is_grad_enabled():
            # In place: each row is read whole before it is written.
            log_probs = torch.log_softmax(logits, dim=-1, out=logits)
        else:
            log_probs = torch.log_softmax(logits, dim=-1, dtype=wide_dtype(x.dtype))
        yield _Chunk(rows, x[rows], log_probs, labels[rows, None])
        # Here and where it is used: else two chunks lie side by side while the next is made.
        del logits, log_probs


class _HeadGradients:
    """Gradients of x, weight and bias, those that are needed, summed over chunks in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self._weight = weight
        self.x = torch.empty_like(x) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide_dtype(bias.dtype)) if bias is not None and needed[2] else None

    def add(self, chunk: _Chunk, grad_logits: Tensor) -> None:
        """Add the part of one chunk, given its gradient at the logits, [c, v] in fp32."""
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        if is_multiplied_by_fp32(chunk.x):
            x, weight = chunk.x.float(), self._weight.float() if self.x is not None else None
        else:
            grad_logits = grad_logits.to(chunk.x.dtype)
            x, weight = chunk.x, self._weight
        if self.x is not None and weight is not None:
            if weight.dtype == self.x.dtype:
                torch.mm(grad_logits, weight, out=self.x[chunk.rows])
            else:
                self.x[chunk.rows] = grad_logits @ weight
        if self.weight is not None:
            if self.weight.dtype == grad_logits.dtype:
                self.weight.addmm_(grad_logits.t(), x)
            else:
                self.weight += grad_logits.t() @ x


def _by_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, _HeadGradients]:
    """-Σ log p(label), and its gradients in fp32 or wider."""
    grads = _HeadGradients(x, weight, bias, needed)
    total = torch.zeros((), dtype=wide_dtype(x.dtype), device=x.device)
    for chunk in _chunks(x, weight, bias, labels, chunk_rows):
        total -= chunk.log_probs.gather(1, chunk.labels).sum()
        if any(needed):
            grad_logits = chunk.log_probs.exp_()
            grad_logits.scatter_add_(1, chunk.labels, grad_logits.new_full((1, 1), -1.0).expand_as(chunk.labels))
            grads.add(chunk, grad_logits)
            del grad_logits
        del chunk
    return total, grads


class _Gradients(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Columns:
    """Logits of all rows for a block of the vocabulary, fp32, and what follows from their gradients."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_columns: int) -> None:
        self.num_columns = num_columns
        self._weight, self._bias, self._labels = weight, bias, labels
        self._x = x.float() if is_multiplied_by_fp32(x) else x
        self.starts = range(0, weight.shape[0], num_columns)

    def _part(self, start: int) -> Tensor:
        return self._weight[start : start + self.num_columns].to(self._x.dtype)

    def logits(self, start: int) -> Tensor:
        """[t, c]"""
        bias = None if self._bias is None else self._bias[start : start + self.num_columns].to(self._x.dtype)
        return F.linear(self._x, self._part(start), bias).float()

    def own_labels(self, start: int) -> tuple[Tensor, Tensor]:
        """Rows whose label lies in the block, and its column there."""
        rows = ((self._labels >= start) & (self._labels < start + self.num_columns)).nonzero().squeeze(1)
        return rows, self._labels[rows] - start

    def add(self, start: int, grad_logits: Tensor, grads: _Gradients) -> None:
        """Add the part of a block to x's gradient, and set weight's and bias's."""
        columns = slice(start, start + self.num_columns)
        if grads.bias is not None:
            grads.bias[columns] = grad_logits.sum(0)
        grad_logits = grad_logits.to(self._x.dtype)
        if grads.x is not None and grads.x.dtype == grad_logits.dtype:
            grads.x.addmm_(grad_logits, self._part(start))
        elif grads.x is not None:
            grads.x.add_(grad_logits @ self._part(start))
        if grads.weight is not None:
            grads.weight[columns] = grad_logits.t() @ self._x


def _by_columns(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_held: int, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, _Gradients]:
    """-Σ log p(label), and its gradients: x's in fp32, the others in their own dtype.

    Logits that are more than `num_held` in all are made twice, once for the sums over the vocabulary.
    """
    num_rows, num_labels = x.shape[0], weight.shape[0]
    # The head's block in fp32 and its gradient's are beside the logits.
    num_columns = max(1, num_held // (4 * max(num_rows, x.shape[1])))
    grads = _Gradients(
        torch.zeros_like(x, dtype=torch.float32) if needed[0] else None,
        torch.empty_like(weight) if needed[1] else None,
        torch.empty_like(bias) if bias is not None and needed[2] else None,
    )
    kept: dict[int, Tensor] = {}
    log_sums = x.new_full((num_rows,), -torch.inf, dtype=torch.float32)
    at_labels = torch.zeros_like(log_sums)
    with torch.autocast(x.device.type, enabled=False):
        blocks = _Columns(x, weight, bias, labels, num_columns)
        for start in blocks.starts:
            logits = blocks.logits(start)
            log_sums = torch.logaddexp(log_sums, logits.logsumexp(1))
            rows, columns = blocks.own_labels(start)
            at_labels[rows] = logits[rows, columns]
            if any(needed) and num_rows * num_labels <= num_held:
                kept[start] = logits
            del logits
        for start in blocks.starts if any(needed) else ():
            grad_logits = (kept.pop(start) if kept else blocks.logits(start)).sub_(log_sums[:, None]).exp_()
            grad_logits[blocks.own_labels(start)] -= 1.0
            blocks.add(start, grad_logits, grads)
            del grad_logits
    return (log_sums - at_labels).sum(), grads


def _sum_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, _HeadGradients | _Gradients]:
    if x.device.type == "cpu" and x.dtype.itemsize == 2 and weight.dtype == x.dtype:
        return _by_columns(x, weight, bias, labels, chunk_rows * weight.shape[0], needed)
    return _by_rows(x, weight, bias, labels, chunk_rows, needed)


class SumOfNegativeLogProbs(torch.autograd.Function):
    """-Σ log p(label): scalar; gradients computed in the forward pass, scaled where they lie and given away.

    A second backward pass through the same graph, which is rare, computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, is_training: bool
    ) -> Tensor:
        """Sum over chunks or blocks."""
        ctx.needed = ctx.needs_input_grad[:3] if is_training else (False, False, False)
        ctx.chunk_rows = chunk_rows
        ctx.save_for_backward(x, weight, bias, labels)
        total, ctx.grads = _sum_and_gradients(x, weight, bias, labels, chunk_rows, ctx.needed)
        return total

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass found."""
        x, weight, bias, labels = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _sum_and_gradients(x, weight, bias, labels, ctx.chunk_rows, ctx.needed)
        dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        scaled = [
            None if own is None else own.mul_(grad_outputs[0]).to(dtype)
            for own, dtype in zip((grads.x, grads.weight, grads.bias), dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def both_sides(x: Tensor, labels: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of one side or of both, the second's behind the first's, and their labels."""
    return (x, labels) if reference is None else (torch.cat((x, reference)), labels.repeat(2))


class LogProbs(torch.autograd.Function):
    """log p(label) of each row, [sides, n]; logits of the first side computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_rows: int,
        reference: Tensor | None,
    ) -> Tensor:
        """Gather from each chunk."""
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.chunk_rows = chunk_rows
        rows, row_labels = both_sides(x, labels, reference)
        out = torch.empty(rows.shape[0], dtype=wide_dtype(x.dtype), device=x.device)
        for chunk in _chunks(rows, weight, bias, row_labels, chunk_rows):
            out[chunk.rows] = chunk.log_probs.gather(1, chunk.labels).squeeze(1)
            del chunk
        return out.view(1 if reference is None else 2, x.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Make each chunk anew."""
        x, weight, bias, labels = ctx.saved_tensors
        grad = grad_outputs[0][0]
        grads = _HeadGradients(x, weight, bias, ctx.needs_input_grad[:3])
        for chunk in _chunks(x, weight, bias, labels, ctx.chunk_rows):
            row_grad = grad[chunk.rows, None]
            grad_logits = chunk.log_probs.exp_().mul_(-row_grad)
            grads.add(chunk, grad_logits.scatter_add_(1, chunk.labels, row_grad))
            del chunk, grad_logits
        grad_weight = None if grads.weight is None else grads.weight.to(weight.dtype)
        grad_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
        return grads.x, grad_weight, grad_bias, None, None, None
