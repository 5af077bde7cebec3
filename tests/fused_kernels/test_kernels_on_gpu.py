"""What only a GPU can show: bf16 through the public operations, as `auto` chooses, at sizes of many tiles."""

import pytest
import torch

from fused_kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    backend_report,
    gelu_tanh,
    int4_matmul,
    int8_matmul,
    joint_attention,
    linear_cross_entropy,
    linear_log_probs,
    normalised_patches,
    pack_int4,
    packed_attention,
    quantise_int4,
    quantise_int8,
    replace_rows,
    rotary_embedding,
    swiglu,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: native kernels in bf16"),
]
BF16 = torch.bfloat16


def new(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def on_both(check_kernel, op, *args, **kwargs):
    def reference(*given):
        return op(*given, **kwargs, backend="reference")

    check_kernel(lambda *given: op(*given, **kwargs), reference, BF16, *args)


def test_auto_takes_triton_on_this_gpu():
    assert {row.backend for row in backend_report("cuda", BF16) if "attention" in row.op} == {"triton"}


def test_norms_of_the_released_sizes(check_kernel):
    on_both(check_kernel, add_rms_norm, new(1031, 3072), new(1031, 3072), new(3072), 1e-5)
    on_both(check_kernel, add_layer_norm, new(729, 1152), new(729, 1152), new(1152), new(1152), 1e-6)


def test_activations_and_rotation_of_the_released_sizes(check_kernel):
    on_both(check_kernel, swiglu, new(257, 16384))
    on_both(check_kernel, gelu_tanh, new(729, 4304), new(4304))
    angles = torch.randn(513, 48, dtype=torch.float64)
    on_both(check_kernel, rotary_embedding, new(513, 32, 96), new(513, 32, 96), angles.cos(), angles.sin())


def test_loss_of_the_released_vocabulary(check_kernel):
    labels = torch.randint(0, 32064, (67,))
    labels[::3] = -100
    # Small, as hidden states and weights are: logits of a few units.
    hidden, head = (torch.randn(67, 512) * 0.3).double().requires_grad_(), (torch.randn(32064, 512) * 0.1).double()
    on_both(check_kernel, linear_cross_entropy, hidden, head.requires_grad_(), labels)
    on_both(check_kernel, linear_log_probs, hidden, head.requires_grad_(), labels, chunk_rows=16)


def test_rows_and_patches(check_kernel):
    on_both(check_kernel, replace_rows, new(1031, 3072), new(129, 3072), torch.randperm(1031)[:129])
    pixels = torch.randint(0, 256, (5, 3, 384, 384), dtype=torch.uint8).cuda()
    expected = normalised_patches(pixels, 14, torch.float64, backend="reference")
    torch.testing.assert_close(normalised_patches(pixels, 14, BF16).double(), expected, rtol=8e-3, atol=4e-3)


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_quantised_products(check_kernel, rows):
    codes, scales = quantise_int8(torch.randn(1029, 3072))
    on_both(check_kernel, int8_matmul, new(rows, 3072), codes, scales)
    codes, scales = quantise_int4(torch.randn(1024, 3072))
    on_both(check_kernel, int4_matmul, new(rows, 3072), pack_int4(codes, 64), scales)


@pytest.mark.parametrize("backend", ["triton", "varlen"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_packed_attention_of_many_tiles(check_kernel, backend, head_dim):
    cu_seqlens = torch.tensor([0, 700, 701, 701, 1031], dtype=torch.int32).cuda()

    def run(q, k, v):
        return packed_attention(q, k, v, cu_seqlens, backend=backend if q.dtype == BF16 else "reference")

    check_kernel(run, run, BF16, *(new(1031, 2, head_dim) for _ in range(3)))


@pytest.mark.parametrize(("is_causal", "window"), [(True, 200), (False, None)])
def test_packed_attention_with_a_window_and_both_ways(check_kernel, is_causal, window):
    cu_seqlens = torch.tensor([0, 700, 701, 701, 1031], dtype=torch.int32).cuda()

    def run(q, k, v):
        backend = "triton" if q.dtype == BF16 else "reference"
        return packed_attention(q, k, v, cu_seqlens, is_causal=is_causal, window=window, backend=backend)

    check_kernel(run, run, BF16, new(1031, 4, 96), new(1031, 2, 96), new(1031, 2, 96))


def test_vision_and_latent_attention_of_the_released_sizes(check_kernel):
    on_both(check_kernel, attention, *(new(2, 729, 3, 72) for _ in range(3)))
    mask = torch.rand(2, 729) < 0.7
    sets = [new(2, 128, 2, 96), new(2, 729, 2, 96), new(2, 729, 2, 96), new(2, 128, 2, 96), new(2, 128, 2, 96)]

    def run(q, k, v, more_k, more_v, mask):
        backend = "auto" if q.dtype == BF16 else "reference"
        return joint_attention(q, k, v, more_k, more_v, mask=mask, backend=backend)

    check_kernel(run, run, BF16, *sets, mask)
