"""The output head and its loss in one: log-probabilities of labels without ever holding the logits of all tokens.

A vocabulary is large and few tokens are targets. Only the rows that have a label meet the head, a chunk of them at a
time, and the chunk's logits are gone before the next. With z = x Wᵀ + b the gradient at the logits has a closed form,

    ∂ log p(y) / ∂z = onehot(y) - softmax(z),

so `linear_cross_entropy` computes its gradients in the forward pass, while the chunk is there, and `linear_log_probs`,
whose incoming gradient differs by row, computes each chunk's logits again in the backward pass.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from .dispatch import Backend, Op, apply, on_cuda_with_triton
from .linear_loss_chunked import LogProbs, SumOfNegativeLogProbs, wide_dtype

# Logits held at a time: 64 MiB of fp32. The sum of the head's gradient is read and written for each chunk.
_CHUNK_ELEMENTS = 1 << 24

Reduction = Literal["mean", "sum", "none"]


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
    return _log_probs(LogProbs, call.rows_at_a_time())


def _log_probs_triton(call: _Call) -> Tensor:
    from . import linear_loss_triton

    return _log_probs(linear_loss_triton.LogProbs, call)


def _cross_entropy_chunked(call: _Call, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return -_log_probs_chunked(call)[0]
    return _summed(SumOfNegativeLogProbs, call.rows_at_a_time(), reduction)


def _cross_entropy_triton(call: _Call, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return -_log_probs_triton(call)[0]
    from . import linear_loss_triton

    return _summed(linear_loss_triton.SumOfNegativeLogProbs, call, reduction)


def _log_probs_reference(call: _Call) -> Tensor:
    """All logits at once."""
    is_target = call.labels != call.ignore_index
    labels = call.labels.where(is_target, 0)[:, None]

    def side(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, call.weight, call.bias)
        log_probs = torch.log_softmax(logits, dim=-1, dtype=wide_dtype(logits.dtype))
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
