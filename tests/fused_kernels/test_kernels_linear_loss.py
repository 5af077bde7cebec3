"""The head and its loss: against F.cross_entropy on all logits in fp64, finite differences, and a count of memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_kernels import linear_cross_entropy, linear_log_prob_pairs, linear_log_probs

REDUCTIONS = ["mean", "sum", "none"]
BACKENDS = ["chunked", "reference"]


def problem(t=11, d=5, v=13, dtype=torch.float64, ignored=0.4):
    hidden = torch.randn(t, d, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (t,))
    labels[torch.rand(t) < ignored] = -100
    return hidden, weight, labels, bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("t", "d", "v"), [(11, 5, 13), (1, 1, 2), (64, 8, 101)])
def test_cross_entropy_and_gradients_are_those_of_all_logits(backend, reduction, chunk_rows, has_bias, t, d, v):
    hidden, weight, labels, bias = problem(t, d, v)
    labels[0] = 1
    bias = bias if has_bias else None
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    loss = linear_cross_entropy(
        hidden, weight, labels, bias, reduction=reduction, chunk_rows=chunk_rows, backend=backend
    )
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_gradients_are_those_of_finite_differences(reduction):
    hidden, weight, labels, bias = problem(5, 3, 4)

    def loss(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, chunk_rows=2, backend="chunked")

    assert gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_and_gradients_are_those_of_log_softmax(backend):
    hidden, weight, labels, bias = problem()
    out = linear_log_probs(hidden, weight, labels, bias, chunk_rows=2, backend=backend)
    log_probs = torch.log_softmax(hidden @ weight.t() + bias, dim=-1)
    expected = torch.stack([log_probs[i, y] if y >= 0 else log_probs.new_zeros(()) for i, y in enumerate(labels)])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("t", "chunk_rows"), [(0, None), (1, None), (11, 4), (11, None)])
def test_log_prob_pairs_are_two_calls_of_which_one_has_gradients(backend, t, chunk_rows):
    hidden, weight, labels, bias = problem(t, dtype=torch.float32)
    other = torch.randn_like(hidden).requires_grad_()
    rules = {"chunk_rows": chunk_rows, "backend": backend}
    found = linear_log_prob_pairs(hidden, other, weight, labels, bias, **rules)
    expected = tuple(linear_log_probs(x, weight, labels, bias, **rules) for x in (hidden, other))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not found[1].requires_grad
    leaves, upstream = (hidden, weight, bias), torch.randn(t)
    grads = [torch.autograd.grad(sides[0], leaves, upstream, retain_graph=True) for sides in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_log_prob_by_hand():
    # logits 0, log 2, log 5: probabilities 1/8, 2/8, 5/8
    weight = torch.tensor([[0.0], [2.0], [5.0]]).log().nan_to_num(neginf=0.0)
    out = linear_log_probs(torch.ones(3, 1), weight, torch.tensor([0, -100, 2]))
    torch.testing.assert_close(out.exp(), torch.tensor([1 / 8, 1.0, 5 / 8]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("t", [0, 4])
def test_without_targets_loss_and_gradients_are_zero(backend, reduction, t):
    hidden, weight, labels, bias = problem(t=t)
    labels[:] = -100
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, backend=backend)
    assert torch.count_nonzero(loss) == 0
    assert loss.shape == ((t,) if reduction == "none" else ())
    for grad in torch.autograd.grad(loss.sum(), (hidden, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 2}, {1, 2}, {0, 1, 2}])
def test_frozen_inputs_get_no_gradient_and_change_no_other(function, frozen):
    hidden, weight, labels, bias = problem()
    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(function(hidden, weight, labels, bias).sum(), leaves)
    for index in frozen:
        leaves[index] = leaves[index].detach()
    out = function(leaves[0], leaves[1], labels, leaves[2], chunk_rows=2).sum()
    assert out.requires_grad == (len(frozen) < 3)
    if out.requires_grad:
        out.backward()
    for index, leaf in enumerate(leaves):
        if index in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[index])


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_bf16_is_near_fp64_and_gives_fp32(function):
    hidden, weight, labels, bias = problem(64, 32, 101, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    low = function(hidden, weight, labels, bias, chunk_rows=7)
    high = function(wide[0], wide[1], labels, wide[2], backend="reference")
    assert low.dtype == torch.float32
    assert (low.double() - high).square().mean().sqrt() / high.square().mean().sqrt() <= 1e-2
    low_grads = torch.autograd.grad(low.sum(), (hidden, weight, bias))
    for got, expected in zip(low_grads, torch.autograd.grad(high.sum(), wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt() <= 1e-2


# Blocks of one column; of 12, the last one of 5; of 25, with all logits kept.
@pytest.mark.parametrize("chunk_rows", [1, 32, 64])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_units", [True, False])
def test_bf16_by_blocks_of_the_vocabulary_is_near_fp64(chunk_rows, has_bias, has_units, monkeypatch):
    from fused_kernels import linear_loss_chunked

    # as on a CPU that multiplies bf16 itself, and on one that does not
    monkeypatch.setattr(linear_loss_chunked, "is_multiplied_by_fp32", lambda x: not has_units)
    hidden, weight, labels, bias = problem(64, 32, 101, torch.bfloat16, ignored=0.0)
    leaves = [hidden, weight, *([bias] if has_bias else [])]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    low = linear_cross_entropy(leaves[0], leaves[1], labels, *leaves[2:], chunk_rows=chunk_rows)
    high = linear_cross_entropy(wide[0], wide[1], labels, *wide[2:], backend="reference")
    torch.testing.assert_close(low.double(), high, rtol=2e-3, atol=0)
    for got, expected in zip(torch.autograd.grad(low, leaves), torch.autograd.grad(high, wide), strict=True):
        assert (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt() <= 1e-2


def test_bf16_keeps_no_second_head():
    hidden, weight, labels, bias = problem(61, 32, 4099, torch.bfloat16, ignored=0.0)
    with LargestTensor() as seen:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, bias, chunk_rows=2), (hidden, weight, bias))
    # the gradient itself, which is returned, and nothing else of its size
    assert (seen.numel, seen.count) == (4099 * 32, 1)


def test_sums_over_chunks_are_in_fp32():
    # 512 equal parts added one by one in bf16 would stop growing at 256 of them.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_rows=1)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.flatten().tolist() == [-256.0, 256.0]


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters():
    hidden, weight, labels, bias = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels, bias), atol=2e-2, rtol=2e-2)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]), reduction="none")
    assert loss.tolist() == [2000.0, 0.0]
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.tensor([1, 1])), hidden)
    assert torch.equal(grad, torch.tensor([[1.0], [0.0]]))


def test_no_grad_gives_the_same_value_without_a_graph():
    hidden, weight, labels, bias = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, bias).detach())


def test_other_ignore_index():
    hidden, weight, labels, bias = problem()
    other = labels.where(labels != -100, -1)
    expected = linear_cross_entropy(hidden, weight, labels, bias)
    assert torch.equal(linear_cross_entropy(hidden, weight, other, bias, ignore_index=-1), expected)


@pytest.mark.parametrize("label", [-1, 13])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_label_outside_the_vocabulary_is_refused(function, label):
    hidden, weight, labels, _ = problem()
    labels[3] = label
    with pytest.raises(ValueError, match=rf"expected -100 or values from 0 to 12, got values from .*{label}"):
        function(hidden, weight, labels)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("chunk_rows", [0, -1])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_chunk_of_no_rows_is_refused(function, chunk_rows, backend):
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match=f"chunk_rows: expected at least 1, got {chunk_rows}"):
        function(hidden, weight, labels, chunk_rows=chunk_rows, backend=backend)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest floating tensor that any operation gives, and how many such lived at once."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.storages: dict[int, StorageWeakRef] = {}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.note(leaf)
        return out

    def note(self, tensor):
        if tensor.numel() > self.numel:
            self.numel, self.storages, self.count = tensor.numel(), {}, 0
        if tensor.numel() == self.numel:
            self.storages[tensor.untyped_storage().data_ptr()] = StorageWeakRef(tensor.untyped_storage())
            self.count = max(self.count, sum(not storage.expired() for storage in self.storages.values()))


def largest(function, *args, **kwargs):
    with LargestTensor() as seen:
        function(*args, **kwargs).sum().backward()
    return seen.numel


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_logits_are_held_a_chunk_at_a_time(function):
    t, d, v, chunk_rows = 97, 2, 512, 3
    hidden, weight, labels, bias = problem(t, d, v, torch.float32, ignored=0.5)
    num_targets = int((labels != -100).sum())
    assert largest(function, hidden, weight, labels, bias, backend="reference") == t * v
    assert largest(function, hidden, weight, labels, bias, chunk_rows=chunk_rows) == chunk_rows * v
    assert largest(function, hidden, weight, labels, bias, chunk_rows=10**6) == num_targets * v


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_a_chunk_is_gone_before_the_next(function):
    hidden, weight, labels, bias = problem(97, 2, 512, torch.float32, ignored=0.5)
    with LargestTensor() as seen:
        function(hidden, weight, labels, bias, chunk_rows=3).sum().backward()
    assert (seen.numel, seen.count) == (3 * 512, 1)


def test_default_chunk_bounds_the_logits(monkeypatch):
    from fused_kernels import linear_loss

    monkeypatch.setattr(linear_loss, "_CHUNK_ELEMENTS", 4096)
    hidden, weight, labels, bias = problem(97, 2, 500, torch.float32, ignored=0)
    assert largest(linear_cross_entropy, hidden, weight, labels, bias) == 8 * 500
    hidden, weight, labels, bias = problem(5, 1, 5000, torch.float32, ignored=0)
    assert largest(linear_cross_entropy, hidden, weight, labels, bias) == 5000
