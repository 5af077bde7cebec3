"""Triton's attention: values and every gradient against the references in fp64, with tiles small enough to be many."""

# The check hands its inputs over as a tuple.
# pyright: reportCallIssue=false

import pytest
import torch

from fused_kernels import attention, joint_attention, packed_attention, plan_packing

# No token, one, primes, an empty document, one past a tile of 16, and a document of several tiles.
PACKS = [(0,), (1,), (0, 7, 0), (17, 3, 0, 13), (41,)]


@pytest.fixture
def small_tiles(kernel_device, monkeypatch):
    from fused_kernels import dense_triton, packed_triton
    from fused_kernels.attention_triton import Tile, Tiles

    tiles = Tiles(*(Tile(*sizes, num_warps=4, num_stages=1) for sizes in ((16, 32), (32, 16), (16, 32))))
    for module in (packed_triton, dense_triton):
        monkeypatch.setattr(module, "tiles_for", lambda q: tiles)


def new(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def check_pack(check_kernel, dtype, lengths, heads, head_dim, is_causal=True, window=None, scale=None):
    from fused_kernels.packed_triton import packed_attention as kernel

    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    plan = plan_packing(cu_seqlens)
    t, (num_heads, num_kv_heads) = sum(lengths), heads
    rules = {"is_causal": is_causal, "window": window, "scale": scale}

    def reference(q, k, v, bounds, ends):
        return packed_attention(q, k, v, cu_seqlens.to(q.device), **rules, backend="reference")

    inputs = new(t, num_heads, head_dim), new(t, num_kv_heads, head_dim), new(t, num_kv_heads, head_dim)
    check_kernel(lambda *args: kernel(*args, **rules), reference, dtype, *inputs, plan.bounds, plan.ends)


@pytest.mark.parametrize("lengths", PACKS)
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (True, 1), (True, 18), (False, None)])
def test_packed_kernel_is_the_reference(small_tiles, check_kernel, kernel_dtype, lengths, is_causal, window):
    check_pack(check_kernel, kernel_dtype, lengths, (2, 1), 16, is_causal, window)


@pytest.mark.parametrize("head_dim", [1, 5, 64, 72, 80, 96, 128])
def test_packed_kernel_of_every_head_width(small_tiles, check_kernel, kernel_dtype, head_dim):
    check_pack(check_kernel, kernel_dtype, (19, 2), (1, 1), head_dim)


@pytest.mark.parametrize(("heads", "scale"), [((1, 1), 0.0), ((3, 3), -0.5), ((4, 2), 0.3), ((3, 1), 0.3)])
def test_packed_kernel_groups_queries(small_tiles, check_kernel, kernel_dtype, heads, scale):
    check_pack(check_kernel, kernel_dtype, (5, 17), heads, 8, scale=scale)


def test_packed_kernel_as_it_is_tiled_on_a_gpu(check_kernel, kernel_dtype):
    check_pack(check_kernel, kernel_dtype, (131, 3), (1, 1), 72)


def test_packed_kernel_reads_views_of_a_packed_product(small_tiles, check_kernel, kernel_dtype):
    from fused_kernels.packed_triton import packed_attention as kernel

    plan = plan_packing(torch.tensor([0, 5, 22], dtype=torch.int32))
    rules = {"is_causal": True, "window": None, "scale": None}

    def run(packed, bounds, ends):
        return kernel(*packed.split((4, 2, 2), dim=1), bounds, ends, **rules)

    def reference(packed, bounds, ends):
        cu_seqlens = torch.tensor([0, 5, 22], dtype=torch.int32, device=packed.device)
        return packed_attention(*packed.split((4, 2, 2), dim=1), cu_seqlens, backend="reference")

    check_kernel(run, reference, kernel_dtype, new(22, 8, 8), plan.bounds, plan.ends)


def test_plan_says_for_each_token_where_its_document_lies():
    plan = plan_packing(torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert plan.bounds.tolist() == [0, 0, 2, 2, 2]
    assert plan.ends.tolist() == [2, 2, 5, 5, 5]


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (7, 17), (33, 5), (3, 0)])
def test_dense_kernel_is_the_reference(small_tiles, check_kernel, kernel_dtype, t, s, has_mask):
    from fused_kernels.dense_triton import attention as kernel

    mask = torch.rand(2, s) < 0.5 if has_mask else None
    check_kernel(
        lambda q, k, v, mask: kernel(q, k, v, mask, 0.3),
        lambda q, k, v, mask: attention(q, k, v, mask=mask, scale=0.3, backend="reference"),
        kernel_dtype,
        new(2, t, 4, 8), new(2, s, 2, 8), new(2, s, 2, 8), mask,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_dense_kernel_of_every_head_width(small_tiles, check_kernel, kernel_dtype, head_dim):
    from fused_kernels.dense_triton import attention as kernel

    check_kernel(
        lambda q, k, v: kernel(q, k, v, None, None),
        lambda q, k, v: attention(q, k, v, backend="reference"),
        kernel_dtype,
        *(new(1, 19, 1, head_dim) for _ in range(3)),
    )


def test_dense_kernel_gives_zeros_to_queries_that_see_no_key(kernel_device):
    from fused_kernels.dense_triton import attention as kernel

    q, k, v = (torch.randn(1, 3, 1, 8, device=kernel_device).requires_grad_() for _ in range(3))
    out = kernel(q, k, v, torch.zeros(1, 3, dtype=torch.bool, device=kernel_device), None)
    for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize(("t", "s", "r"), [(1, 1, 1), (5, 17, 5), (19, 0, 3), (3, 33, 0)])
def test_joint_kernel_is_the_reference(small_tiles, check_kernel, kernel_dtype, t, s, r, has_mask):
    from fused_kernels.dense_triton import joint_attention as kernel

    mask = torch.rand(2, s) < 0.5 if has_mask else None
    check_kernel(
        lambda *args: kernel(*args, None),
        lambda q, k, v, more_k, more_v, mask: joint_attention(
            q, k, v, more_k, more_v, mask=mask, backend="reference"
        ),
        kernel_dtype,
        new(2, t, 2, 24), new(2, s, 2, 24), new(2, s, 2, 24), new(2, r, 2, 24), new(2, r, 2, 24), mask,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_joint_kernel_of_every_head_width(small_tiles, check_kernel, kernel_dtype, head_dim):
    from fused_kernels.dense_triton import joint_attention as kernel

    check_kernel(
        lambda *args: kernel(*args, None, None),
        lambda *args: joint_attention(*args, backend="reference"),
        kernel_dtype,
        *(new(1, length, 1, head_dim) for length in (3, 17, 17, 3, 3)),
    )


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_joint_attention_is_attention_to_joined_keys(backend):
    q, k, v, more_k, more_v = (torch.randn(2, n, 3, 8) for n in (4, 5, 5, 2, 2))
    mask = torch.rand(2, 5) < 0.5
    joined = torch.cat((k, more_k), dim=1), torch.cat((v, more_v), dim=1)
    expected = attention(q, *joined, mask=torch.cat((mask, torch.ones(2, 2, dtype=torch.bool)), dim=1))
    torch.testing.assert_close(joint_attention(q, k, v, more_k, more_v, mask=mask, backend=backend), expected)
