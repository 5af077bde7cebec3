"""Suite `kernels`: single operations, forward and backward, beside their plain form and PyTorch's own."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_pairs import Footprint, Pair, agree, clocked, peak_of, peer
from fused_kernels import (
    gelu_tanh,
    layer_norm,
    linear_cross_entropy,
    linear_log_prob_pairs,
    linear_log_probs,
    packed_attention,
    plan_packing,
    rms_norm,
    rotary_embedding,
    swiglu,
)

_ROWS, _WIDTH = 2048, 1024
_HEAD = (4096, 3072, 32_064)
_LENGTHS = (200, 190, 181, 171, 162, 153, 143, 134, 125, 115, 106, 97, 87, 78, 69, 60)
_HEADS, _HEAD_DIM = 6, 64

Operation = Callable[..., Tensor]


def both_ways(run: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Result and the gradients of all inputs that want one, for a fixed gradient at the result."""
    result = run(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    grad = torch.ones_like(result) if result.ndim == 0 else result.detach()
    return [result, *torch.autograd.grad(result, wanted, grad)]


def same(name: str, ours: Operation, theirs: Operation, inputs: Sequence[Tensor], tolerance: float) -> str:
    """Check the result and every gradient.

    Raises:
        GateError: they differ.
    """
    pairs = zip(both_ways(ours, inputs), both_ways(theirs, inputs), strict=True)
    return [agree(f"{name}, gradients", own, other, tolerance) for own, other in pairs][-1]


def operation_pair(
    name: str, other: str, ours: Operation, theirs: Operation, inputs: Sequence[Tensor], tolerance: float = 1e-5
) -> Pair:
    """Forward and backward of an operation."""
    return Pair(
        suite="kernels",
        name=f"{name}, forward and backward",
        peer=other,
        ours=clocked(partial(both_ways, ours, inputs)),
        theirs=clocked(partial(both_ways, theirs, inputs)),
        check=partial(same, name, ours, theirs, inputs, tolerance),
    )


def leaf(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers that want a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def pointwise_pairs() -> Iterator[Pair]:
    """Norms, rotation and activations."""
    x, weight, bias = leaf(_ROWS, _WIDTH), leaf(_WIDTH, seed=1), leaf(_WIDTH, seed=2)
    shape = f"{_ROWS} × {_WIDTH} fp32"
    for backend, other in (("reference", "plain PyTorch"), ("torch", "F.rms_norm")):
        theirs = partial(rms_norm, eps=1e-5, backend="reference")
        if backend == "torch":
            theirs = lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-5)  # noqa: E731
        yield operation_pair(f"rms_norm {shape}", other, partial(rms_norm, eps=1e-5), theirs, [x, weight])
    plain = partial(layer_norm, eps=1e-5, backend="reference")
    yield operation_pair(
        f"layer_norm {shape}", "plain PyTorch", partial(layer_norm, eps=1e-5), plain, [x, weight, bias]
    )
    yield operation_pair(f"swiglu {shape}", "plain PyTorch", swiglu, partial(swiglu, backend="reference"), [x])
    yield operation_pair(
        f"gelu_tanh {shape}", "plain PyTorch", gelu_tanh, partial(gelu_tanh, backend="reference"), [x, bias]
    )
    angles = torch.rand(_ROWS, 32, generator=torch.Generator().manual_seed(3)) * 6
    q, k = leaf(_ROWS, 16, 64), leaf(_ROWS, 16, 64, seed=1)

    def rotated(q: Tensor, k: Tensor, backend: str) -> Tensor:
        return torch.stack(rotary_embedding(q, k, angles.cos(), angles.sin(), backend=backend))

    name, plain = f"rotary_embedding {_ROWS} × 16 × 64 fp32", partial(rotated, backend="reference")
    yield operation_pair(name, "plain PyTorch", partial(rotated, backend="auto"), plain, [q, k])


def attention_pair() -> Pair:
    """Documents in a pack, and the same padded into one call."""
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).int()
    plan = plan_packing(bounds)
    q, k, v = (leaf(int(bounds[-1]), _HEADS, _HEAD_DIM, seed=seed) for seed in range(3))
    rows = torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS)[:, None]

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        empty = q.new_zeros(*rows.shape, *q.shape[1:])
        q, k, v = (empty.index_put((rows,), x).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)[rows]

    return operation_pair(
        "packed_attention, 16 documents of 60 to 200 tokens, 6 heads of 64, fp32",
        "scaled_dot_product_attention, padded",
        lambda q, k, v: packed_attention(q, k, v, bounds, plan=plan),
        padded,
        [q, k, v],
    )


def head_inputs(
    num_rows: int, share: float, shape: tuple[int, int, int] = _HEAD, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, head, and labels for a share of the rows."""
    _, width, vocab_size = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).mul_(0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) >= share] = -100
    return [hidden, weight], labels


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, then PyTorch's loss."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def same_head(dtype: torch.dtype) -> str:
    """Check loss and gradients on a smaller head, with rows without label among them."""
    inputs, labels = head_inputs(256, 0.5, (256, 96, 32_064), dtype)
    return same(
        "loss",
        lambda h, w: linear_cross_entropy(h, w, labels),
        lambda h, w: plain_cross_entropy(h, w, labels),
        inputs,
        1e-5 if dtype == torch.float32 else 1e-2,
    )


def head_name(num_rows: int, share: float, dtype: torch.dtype) -> str:
    """Sizes, dtype and targets."""
    sizes = f"{num_rows:,} × {_HEAD[1]:,} → {_HEAD[2]:,} {'fp32' if dtype == torch.float32 else 'bf16'}"
    return f"linear_cross_entropy {sizes}, {share:.0%} targets"


def head_pair(num_rows: int, share: float, dtype: torch.dtype) -> Pair:
    """The head with its loss, forward and backward."""
    inputs, labels = head_inputs(num_rows, share, dtype=dtype)
    num_targets = int((labels >= 0).sum())
    flops = 6.0 * num_targets * _HEAD[1] * _HEAD[2]
    return Pair(
        suite="kernels",
        name=f"{head_name(num_rows, share, dtype)}, forward and backward",
        peer="F.linear, F.cross_entropy",
        ours=clocked(lambda: both_ways(lambda h, w: linear_cross_entropy(h, w, labels), inputs)),
        theirs=clocked(lambda: both_ways(lambda h, w: plain_cross_entropy(h, w, labels), inputs)),
        check=partial(same_head, dtype),
        least_s=lambda floors: flops / floors.flops_per_s,
    )


def head_peak(share: float, dtype: torch.dtype, *, is_ours: bool) -> int:
    """Bytes at the peak beyond the inputs and the gradients that are returned."""
    inputs, labels = head_inputs(_HEAD[0], share, dtype=dtype)
    loss = linear_cross_entropy if is_ours else plain_cross_entropy
    small, few = head_inputs(64, share, (64, 32, 128), dtype)
    both_ways(lambda h, w: loss(h, w, few), small)
    found: list[Tensor] = []
    peak = peak_of(lambda: found.extend(both_ways(lambda h, w: loss(h, w, labels), inputs)))
    return peak - sum(tensor.nbytes for tensor in found)


def head_footprints() -> Iterator[Footprint]:
    """The same in memory."""
    for dtype in (torch.float32, torch.bfloat16):
        for share in (0.1, 1.0):
            yield Footprint(
                suite="memory",
                name=f"{head_name(_HEAD[0], share, dtype)}, beyond inputs and gradients",
                peer="F.linear, F.cross_entropy",
                ours=partial(head_peak, share, dtype, is_ours=True),
                theirs=partial(head_peak, share, dtype, is_ours=False),
                check=partial(same_head, dtype),
            )


def log_probs_pairs() -> Iterator[Pair]:
    """Log-probabilities of labels, as DPO wants them."""
    inputs, labels = head_inputs(512, 0.5, (512, 384, 32_064))

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.log_softmax(F.linear(hidden, weight), dim=-1)
        found = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        return found.masked_fill(labels < 0, 0.0)

    selective = peer("trl.trainer.utils").selective_log_softmax

    def trl(hidden: Tensor, weight: Tensor) -> Tensor:
        return selective(F.linear(hidden, weight), labels.clamp(min=0)).masked_fill(labels < 0, 0.0)

    for name, theirs in (("F.linear, F.log_softmax", plain), ("F.linear, TRL's selective_log_softmax", trl)):
        yield operation_pair(
            "linear_log_probs 512 × 384 → 32,064 fp32, 50 % targets",
            name,
            lambda h, w: linear_log_probs(h, w, labels),
            theirs,
            inputs,
        )


def two_sides_pair() -> Pair:
    """A policy and its reference, which share a frozen head: their target rows together, or side after side."""
    (hidden, weight), labels = head_inputs(80, 0.5, (80, 384, 32_064))
    weight, reference = weight.detach(), leaf(80, 384, seed=1).detach()

    def one_by_one(hidden: Tensor) -> Tensor:
        return torch.stack([linear_log_probs(x, weight, labels) for x in (hidden, reference)])

    return operation_pair(
        "linear_log_prob_pairs 80 × 384 → 32,064 fp32, 50 % targets",
        "two calls of linear_log_probs",
        lambda hidden: torch.stack(linear_log_prob_pairs(hidden, reference, weight, labels)),
        one_by_one,
        [hidden],
    )


def pairs() -> Iterator[Pair]:
    """All operations."""
    yield from pointwise_pairs()
    yield attention_pair()
    yield from log_probs_pairs()
    yield two_sides_pair()
    # A CPU without bf16 units takes plain bf16 apart in software, which for all rows is minutes.
    for num_rows, dtype in ((_HEAD[0], torch.float32), (_HEAD[0] // 4, torch.bfloat16)):
        for share in (0.1, 1.0):
            yield head_pair(num_rows, share, dtype)
