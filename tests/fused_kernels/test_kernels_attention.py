"""Attention over batches and over packed documents, against loops and invariants."""

import math

import pytest
import torch

from fused_kernels import attention, cached_attention, packed_attention, plan_packing
from fused_kernels.packed import _SLACK, _STRETCH

PACKED_BACKENDS = ["bucketed", "reference"]


def boundaries(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def qkv(num_tokens, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float64):
    def new(heads):
        return torch.randn(num_tokens, heads, head_dim, dtype=torch.float64).to(dtype).requires_grad_()

    return new(num_heads), new(num_kv_heads), new(num_kv_heads)


def one_by_one(q, k, v, lengths, visible, scale=None):
    """Attend by a loop over documents, heads and queries; visible(i, j) says which keys a query sees."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        for head in range(q.shape[1]):
            for i in range(length):
                keys = [start + j for j in range(length) if visible(i, j)]
                scores = k[keys, head // group] @ q[start + i, head] * scale
                out[start + i, head] = scores.softmax(0) @ v[keys, head // group]
        start += length
    return out


@pytest.mark.parametrize("backend", PACKED_BACKENDS)
@pytest.mark.parametrize(
    ("is_causal", "window"), [(True, None), (False, None), (True, 1), (True, 3), (True, 5), (True, 100)]
)
def test_packed_attention_is_that_of_a_loop(backend, is_causal, window):
    lengths = (5, 1, 0, 7, 2)
    q, k, v = qkv(sum(lengths))
    out = packed_attention(
        q, k, v, boundaries(*lengths), is_causal=is_causal, window=window, scale=0.3, backend=backend
    )

    def visible(i, j):
        return not is_causal or (j <= i and (window is None or i - j < window))

    torch.testing.assert_close(out, one_by_one(q, k, v, lengths, visible, scale=0.3))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (False, None), (True, 9)])
@pytest.mark.parametrize("lengths", [(1,), (31,), (3, 3, 3), (40, 0, 17, 16, 2, 39, 1), (0, 0)])
def test_bucketed_attention_and_all_gradients_are_the_reference(num_kv_heads, is_causal, window, lengths):
    q, k, v = qkv(sum(lengths), num_kv_heads=num_kv_heads)
    weight = torch.randn_like(q)
    results = []
    for backend in PACKED_BACKENDS:
        out = packed_attention(q, k, v, boundaries(*lengths), is_causal=is_causal, window=window, backend=backend)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    torch.testing.assert_close(results[0], results[1])


def test_bucketed_attention_in_bf16_is_near_fp64():
    lengths = (40, 17, 16, 2)
    q, k, v = qkv(sum(lengths), dtype=torch.bfloat16)
    weight = torch.randn(q.shape).bfloat16()
    low = packed_attention(q, k, v, boundaries(*lengths))
    assert low.dtype == torch.bfloat16
    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    high = packed_attention(wide[0], wide[1], wide[2], boundaries(*lengths), backend="reference")
    pairs = zip(
        (low, *torch.autograd.grad(low, (q, k, v), weight)),
        (high, *torch.autograd.grad(high, wide, weight.double())),
        strict=True,
    )
    for got, expected in pairs:
        assert (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt() <= 1e-2


@pytest.mark.parametrize("backend", PACKED_BACKENDS)
def test_gradients_stay_within_the_document(backend):
    lengths = (5, 9, 4)
    inputs = qkv(sum(lengths))
    out = packed_attention(*inputs, boundaries(*lengths), backend=backend)
    for grad in torch.autograd.grad(out[5:14].sum(), inputs):
        assert torch.count_nonzero(grad[:5]) == 0
        assert torch.count_nonzero(grad[14:]) == 0
        assert torch.count_nonzero(grad[5:14]) > 0


@pytest.mark.parametrize(("start", "end"), [(0, 5), (5, 14), (14, 18)])
def test_a_poisoned_document_spoils_no_other(start, end):
    lengths = (5, 9, 4)
    clean = qkv(sum(lengths))
    poisoned = (clean[0].detach().clone(), clean[1].detach().clone(), clean[2].detach().clone())
    for x in poisoned:
        x[start:end] = math.nan
    out = packed_attention(*poisoned, boundaries(*lengths))
    expected = packed_attention(*clean, boundaries(*lengths))
    assert torch.equal(out[:start], expected[:start])
    assert torch.equal(out[end:], expected[end:])
    assert out[start:end].isnan().all()


def test_later_tokens_change_nothing_before_them():
    q, k, v = qkv(23)
    whole = packed_attention(q, k, v, boundaries(23))
    part = packed_attention(q[:11], k[:11], v[:11], boundaries(11))
    torch.testing.assert_close(whole[:11], part)


def test_packing_plan_bounds_its_padding_and_places_each_token_once():
    lengths = torch.randint(0, 200, (50,)).tolist()
    plan = plan_packing(boundaries(*lengths))
    assert plan.num_tokens == sum(lengths)
    assert sorted(length for bucket in plan.buckets for length in bucket.lengths) == sorted(filter(None, lengths))
    for bucket in plan.buckets:
        assert all(bucket.lengths[0] <= _STRETCH * length + _SLACK for length in bucket.lengths)
    assert len(plan.buckets) < 12
    assert plan.rows is not None
    assert plan.slots is not None
    assert plan.padding is not None
    assert torch.equal(plan.rows[plan.slots], torch.arange(plan.num_tokens))
    assert torch.equal(torch.cat([plan.slots, plan.padding]).sort().values, torch.arange(plan.num_slots))


def test_equal_documents_need_no_reordering():
    plan = plan_packing(boundaries(6, 6, 6))
    assert plan.rows is None
    assert [bucket.shape for bucket in plan.buckets] == [(3, 6)]


def test_plan_is_found_again_by_value_and_can_be_handed_over():
    cu_seqlens = boundaries(3, 8, 30)
    plan = plan_packing(cu_seqlens)
    assert plan_packing(cu_seqlens.clone()) is plan
    cu_seqlens[1] = 4
    assert plan_packing(cu_seqlens) is not plan
    q, k, v = qkv(41)
    expected = packed_attention(q, k, v, boundaries(3, 8, 30))
    assert torch.equal(packed_attention(q, k, v, boundaries(3, 8, 30), plan=plan), expected)


def test_plan_made_in_inference_mode_serves_training():
    cu_seqlens = boundaries(4, 11, 29)
    q, k, v = qkv(44)
    with torch.inference_mode():
        packed_attention(q, k, v, cu_seqlens)
    plan = plan_packing(cu_seqlens)
    assert plan.rows is not None
    assert not plan.rows.is_inference()
    (grad,) = torch.autograd.grad(packed_attention(q, k, v, cu_seqlens).sum(), v)
    assert torch.count_nonzero(grad) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window of packed_attention: expected at least 1"),
        ({"window": 3, "is_causal": False}, "window of packed_attention"),
        ({"cu_seqlens": boundaries(3, 2)}, "expected 5, the last boundary, got 6"),
        ({"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)}, "start at 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=torch.int32)}, "never decrease"),
        ({"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)}, "divide the 4 query heads, got 3"),
    ],
)
def test_packed_attention_refuses(change, message):
    q, k, v = qkv(6, dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": boundaries(6)} | change
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)


def batch(b, t, s, num_kv_heads=2, dtype=torch.float64):
    shapes = [(b, t, 4, 8), (b, s, num_kv_heads, 8), (b, s, num_kv_heads, 8)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 7), (7, 7), (3, 11)])
def test_attention_is_that_of_a_loop(backend, kind, is_causal, t, s):
    q, k, v = batch(2, t, s)
    mask = {"none": None, "keys": torch.rand(2, s) < 0.7, "pairs": torch.rand(2, t, s) < 0.7}[kind]
    out = attention(q, k, v, mask=mask, is_causal=is_causal, backend=backend)
    for row in range(2):
        for i in range(t):
            keys = [
                j
                for j in range(s)
                if (not is_causal or j <= i + s - t)
                and (mask is None or bool(mask[row, j] if kind == "keys" else mask[row, i, j]))
            ]
            for head in range(4):
                probs = (k[row, keys, head // 2] @ q[row, i, head] / math.sqrt(8)).softmax(0)
                torch.testing.assert_close(out[row, i, head], probs @ v[row, keys, head // 2])


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_gradients_are_the_reference(num_kv_heads, is_causal):
    inputs = batch(2, 5, 7, num_kv_heads)
    mask = torch.rand(2, 7) < 0.7
    mask[1] = False
    weight = torch.randn_like(inputs[0])
    results = []
    for backend in ("sdpa", "reference"):
        out = attention(*inputs, mask=mask, is_causal=is_causal, scale=0.5, backend=backend)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 3])
def test_query_that_sees_nothing_gives_zeros_and_no_nan_gradient(backend, dtype, t):
    inputs = batch(2, t, 5, dtype=dtype)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = attention(*inputs, mask=mask, backend=backend)
    assert torch.count_nonzero(out[1]) == 0
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert torch.isfinite(grad).all()


def test_attention_refuses_more_causal_queries_than_keys():
    with pytest.raises(ValueError, match=r"expected at most as many as keys \(3\), got 4"):
        attention(*batch(1, 4, 3), is_causal=True)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (1, 65), (3, 5), (7, 65)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_cached_attention_is_that_of_a_loop(backend, num_kv_heads, num_queries, num_keys, is_masked):
    batch, num_heads, head_dim = 3, 4, 8
    q = torch.randn(batch, num_queries, num_heads, head_dim, dtype=torch.float64)
    # a cache's view: what it holds behind the keys must not count
    held = torch.randn(2, batch, num_kv_heads, num_keys + 5, head_dim, dtype=torch.float64)
    keys, values = held[:, :, :, :num_keys]
    ends = (
        torch.randint(1, num_keys + 1, (batch, num_queries))
        if is_masked
        else torch.full((batch, num_queries), num_keys)
    )
    is_hidden = torch.arange(num_keys) >= ends[:, :, None]
    bias = torch.zeros(is_hidden.shape, dtype=q.dtype).masked_fill(is_hidden, -math.inf) if is_masked else None
    out = cached_attention(q, keys, values, bias=bias, backend=backend)
    expected = torch.empty_like(q)
    for row in range(batch):
        for place in range(num_queries):
            for head in range(num_heads):
                group, end = head // (num_heads // num_kv_heads), int(ends[row, place])
                scores = keys[row, group, :end] @ q[row, place, head] / math.sqrt(head_dim)
                expected[row, place, head] = scores.softmax(0) @ values[row, group, :end]
    torch.testing.assert_close(out, expected)


def test_cached_attention_in_bf16_is_near_fp64():
    q, keys, values = (torch.randn(2, 4, 33, 16).bfloat16() for _ in range(3))
    q, bias = q[:, :, :1].transpose(1, 2), torch.zeros(2, 1, 33)
    bias[1, :, 20:] = -math.inf
    low = cached_attention(q, keys, values, bias=bias)
    high = cached_attention(q.double(), keys.double(), values.double(), bias=bias.double(), backend="reference")
    assert low.dtype == torch.bfloat16
    assert (low.double() - high).square().mean().sqrt() / high.square().mean().sqrt() <= 1e-2
