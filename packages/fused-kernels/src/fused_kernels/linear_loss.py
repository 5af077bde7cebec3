"""The output head and its loss in one: log-probabilities of labels without ever holding the logits of all tokens.

A vocabulary is large and few tokens are targets. Only the rows that have a label meet the head, a chunk of them at a
time, and the chunk's logits are gone before the next. With z = x Wᵀ + b the gradient at the logits has a closed form,

    ∂ log p(y) / ∂z = onehot(y) - softmax(z),

so `linear_cross_entropy` computes its gradients in the forward pass, while the chunk is there, and `linear_log_probs`,
whose incoming gradient differs by row, computes each chunk's logits again in the backward pass.

In half precision on a CPU the loss goes by columns instead, a block of the vocabulary for all rows at a time: a sum
over chunks of rows wants the head's gradient in fp32, twice the head itself, where a block's gradient is whole at once.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from .dispatch import Backend, Op, apply, on_cuda_with_triton, once
from .linear_product import is_multiplied_by_fp32, linear

# Logits held at a time: 64 MiB of fp32. The sum of the head's gradient is read and written for each chunk.
_CHUNK_ELEMENTS = 1 << 24

Reduction = Literal["mean", "sum", "none"]


def _wide(dtype: torch.dtype) -> torch.dtype:
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
        if logits.dtype == _wide(x.dtype) and not torch.is_grad_enabled():
            # In place: each row is read whole before it is written.
            log_probs = torch.log_softmax(logits, dim=-1, out=logits)
        else:
            log_probs = torch.log_softmax(logits, dim=-1, dtype=_wide(x.dtype))
        yield _Chunk(rows, x[rows], log_probs, labels[rows, None])
        # Here and where it is used: else two chunks lie side by side while the next is made.
        del logits, log_probs


class _HeadGradients:
    """Gradients of x, weight and bias, those that are needed, summed over chunks in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self._weight = weight
        self.x = torch.empty_like(x) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if bias is not None and needed[2] else None

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
    total = torch.zeros((), dtype=_wide(x.dtype), device=x.device)
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


class _SumOfNegativeLogProbs(torch.autograd.Function):
    """-Σ log p(label): scalar; gradients computed in the forward pass, scaled where they lie and given away.

    A second backward pass through the same graph, which is rare, computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_rows: int, is_training: bool
    ) -> Tensor:
        ctx.needed = ctx.needs_input_grad[:3] if is_training else (False, False, False)
        ctx.chunk_rows = chunk_rows
        ctx.save_for_backward(x, weight, bias, labels)
        total, ctx.grads = _sum_and_gradients(x, weight, bias, labels, chunk_rows, ctx.needed)
        return total

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
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


class _LogProbs(torch.autograd.Function):
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
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.chunk_rows = chunk_rows
        rows, row_labels = both_sides(x, labels, reference)
        out = torch.empty(rows.shape[0], dtype=_wide(x.dtype), device=x.device)
        for chunk in _chunks(rows, weight, bias, row_labels, chunk_rows):
            out[chunk.rows] = chunk.log_probs.gather(1, chunk.labels).squeeze(1)
            del chunk
        return out.view(1 if reference is None else 2, x.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
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


class _Call(NamedTuple):
    """What an operation here was asked; `reference`: hidden states of a second side, [t, d]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    ignore_index: int
    chunk_rows: int | None
    reference: Tensor | None = None

    def in_one_dtype(self) -> "_Call":
        """Under autocast, cast as F.linear would be; the casts are differentiable."""
        device_type = self.hidden.device.type
        if not torch.is_autocast_enabled(device_type):
            return self
        dtype = torch.get_autocast_dtype(device_type)
        return self._replace(
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
            reference=None if self.reference is None else self.reference.to(dtype),
        )

    def at_targets(self) -> tuple["_Call", Tensor]:
        """Return the call for the rows alone that have a label, and their places, int64[n]."""
        rows = (self.labels != self.ignore_index).nonzero().squeeze(1)
        if rows.shape[0] == self.labels.shape[0]:
            call = self
        else:
            call = self._replace(
                hidden=self.hidden.index_select(0, rows),
                labels=self.labels.index_select(0, rows),
                reference=None if self.reference is None else self.reference.index_select(0, rows),
            )
        if call.labels.numel():
            low, high = (int(bound) for bound in torch.aminmax(call.labels))
            if low < 0 or high >= self.weight.shape[0]:
                raise ValueError(
                    f"labels: expected {self.ignore_index} or values from 0 to {self.weight.shape[0] - 1}, "
                    f"got values from {low} to {high}; check the tokenizer against the head"
                )
        return call, rows

    def rows_at_a_time(self) -> "_Call":
        """Return the call with a bound to the logits that are held at a time."""
        if self.chunk_rows is not None:
            return self
        return self._replace(chunk_rows=max(1, _CHUNK_ELEMENTS // self.weight.shape[0]))


_Function = type[torch.autograd.Function]


def _log_probs(function: _Function, call: _Call) -> Tensor:
    """[sides, t]"""
    targets, rows = call.in_one_dtype().at_targets()
    hidden, weight, labels, bias, _, chunk_rows, reference = targets
    found = apply(function, hidden, weight, bias, labels, chunk_rows, reference)
    return found.new_zeros(found.shape[0], call.labels.shape[0]).index_copy(1, rows, found)


def _summed(function: _Function, call: _Call, reduction: Reduction) -> Tensor:
    targets, _ = call.in_one_dtype().at_targets()
    hidden, weight, labels, bias, _, chunk_rows, _ = targets
    total = apply(function, hidden, weight, bias, labels, chunk_rows, torch.is_grad_enabled())
    return total / max(1, labels.shape[0]) if reduction == "mean" else total


def _log_probs_chunked(call: _Call) -> Tensor:
    return _log_probs(_LogProbs, call.rows_at_a_time())


def _log_probs_triton(call: _Call) -> Tensor:
    from .linear_loss_triton import LogProbs

    return _log_probs(LogProbs, call)


def _cross_entropy_chunked(call: _Call, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return -_log_probs_chunked(call)[0]
    return _summed(_SumOfNegativeLogProbs, call.rows_at_a_time(), reduction)


def _cross_entropy_triton(call: _Call, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return -_log_probs_triton(call)[0]
    from .linear_loss_triton import SumOfNegativeLogProbs

    return _summed(SumOfNegativeLogProbs, call, reduction)


def _log_probs_reference(call: _Call) -> Tensor:
    """All logits at once."""
    is_target = call.labels != call.ignore_index
    labels = call.labels.where(is_target, 0)[:, None]

    def side(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, call.weight, call.bias)
        log_probs = torch.log_softmax(logits, dim=-1, dtype=_wide(logits.dtype))
        return log_probs.gather(1, labels).squeeze(1).masked_fill(~is_target, 0.0)

    if call.reference is None:
        return side(call.hidden)[None]
    with torch.no_grad():
        second = side(call.reference)
    return torch.stack((side(call.hidden), second))


def _cross_entropy_reference(call: _Call, reduction: Reduction) -> Tensor:
    """All logits at once."""
    losses = -_log_probs_reference(call)[0]
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / (call.labels != call.ignore_index).sum().clamp(min=1) if reduction == "mean" else total


_TRITON_NOTE = "target rows in chunks, softmax and gradient of a chunk in one Triton kernel"
LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    Backend("triton", _cross_entropy_triton, _TRITON_NOTE, on_cuda_with_triton),
    Backend("chunked", _cross_entropy_chunked, "target rows in chunks, gradients with the loss"),
    Backend("reference", _cross_entropy_reference, "all logits at once"),
)
LINEAR_LOG_PROBS = Op(
    "linear_log_probs",
    Backend("triton", _log_probs_triton, _TRITON_NOTE, on_cuda_with_triton),
    Backend("chunked", _log_probs_chunked, "target rows in chunks, logits again in backward"),
    Backend("reference", _log_probs_reference, "all logits at once"),
)


def _check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}; leave it out for a size that fits")


def linear_cross_entropy(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    labels: Int64[Tensor, " t"],
    bias: Float[Tensor, " v"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, ""] | Float[Tensor, " t"]:
    """Cross-entropy in nats of the logits hidden · weightᵀ + bias against labels; the logits are never held in full.

    Rows labelled ignore_index cost nothing and get zero gradient. "mean" is over the target rows. Without any target
    the loss is 0 and so are the gradients. Logits are in hidden's dtype; the softmax, the loss and the sums over chunks
    are in fp32 (fp64 for fp64 input). chunk_rows: target rows at a time; None bounds the logits held to 16 Mi elements
    (16 or 128 Mi with Triton), but for a single row. Differentiable once.

    Raises:
        ValueError: if a label is neither ignore_index nor a row of weight, the reduction is unknown, or chunk_rows is
            below 1.
        BackendError: if `backend` is unknown or cannot run.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}; choose one of these")
    _check_chunk_rows(chunk_rows)
    call = _Call(hidden, weight, labels, bias, ignore_index, chunk_rows)
    return LINEAR_CROSS_ENTROPY.run(backend, hidden.device, hidden.dtype, call, reduction)


def linear_log_probs(
    hidden: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    labels: Int64[Tensor, " t"],
    bias: Float[Tensor, " v"] | None = None,
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, " t"]:
    """Log-probability in nats of each label under softmax(hidden · weightᵀ + bias); 0 where labels is ignore_index.

    fp32 (fp64 for fp64 input). Memory and precision as in `linear_cross_entropy`. Differentiable once.

    Raises:
        ValueError: if a label is neither ignore_index nor a row of weight, or chunk_rows is below 1.
        BackendError: if `backend` is unknown or cannot run.
    """
    _check_chunk_rows(chunk_rows)
    call = _Call(hidden, weight, labels, bias, ignore_index, chunk_rows)
    return LINEAR_LOG_PROBS.run(backend, hidden.device, hidden.dtype, call)[0]


def linear_log_prob_pairs(
    hidden: Float[Tensor, "t d"],
    reference: Float[Tensor, "t d"],
    weight: Float[Tensor, "v d"],
    labels: Int64[Tensor, " t"],
    bias: Float[Tensor, " v"] | None = None,
    *,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
    """Return `linear_log_probs` of hidden and of reference, whose rows go through the head together, in one pass.

    Of the second no gradient reaches anything: it is what a policy is compared with.

    Raises:
        ValueError, BackendError: as `linear_log_probs`.
    """
    _check_chunk_rows(chunk_rows)
    call = _Call(hidden, weight, labels, bias, ignore_index, chunk_rows, reference.detach())
    first, second = LINEAR_LOG_PROBS.run(backend, hidden.device, hidden.dtype, call)
    return first, second.detach()
