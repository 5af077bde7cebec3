"""A model laid out for decoding computes what it did, from the same state."""

import msgspec
import pytest
import torch

from fused_kernels.native import refuse_native
from phi3_lite import (
    Phi3,
    Phi3Config,
    SamplingConfig,
    collect,
    generate,
    lay_out_for_decoding,
    layout,
    quantise_linears,
)

TINY = Phi3Config(vocab_size=61, width=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, init_std=0.2)


def _model() -> Phi3:
    return Phi3(TINY, generator=torch.Generator().manual_seed(3)).requires_grad_(False)


def _answers(model: Phi3) -> list[list[int]]:
    inputs = model.embed(torch.tensor([5, 6, 7, 8, 9]))
    return collect(
        generate(model, inputs, torch.tensor([0, 3, 5], dtype=torch.int32), SamplingConfig(max_new_tokens=6))
    )


def test_without_kernels_values_and_answers_stay_and_wide_matrices_alone_change_their_strides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "refuse_native", lambda device, dtype: "no compiler")
    model, plain = _model(), _model()
    lay_out_for_decoding(model)
    for (name, laid), weight in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(laid, weight)
        # 24 → 48 and 24 → 61; 24 → 40 is less than twice as much
        assert laid.is_contiguous() == (not name.endswith(("qkv_proj.weight", "lm_head.weight"))), name
    assert _answers(model) == _answers(plain)


@pytest.mark.skipif(refuse_native(torch.device("cpu"), torch.float32) is not None, reason="no kernels in C++")
def test_with_kernels_all_stays_but_for_the_pages() -> None:
    cfg = msgspec.structs.replace(TINY, width=384, vocab_size=4099, mlp_width=768)
    model, plain = (Phi3(cfg, generator=torch.Generator().manual_seed(3)).requires_grad_(False) for _ in range(2))
    places = [weight.data_ptr() for weight in model.parameters()]
    lay_out_for_decoding(model)
    for laid, weight, place in zip(model.parameters(), plain.parameters(), places, strict=True):
        assert torch.equal(laid, weight)
        assert laid.is_contiguous()
        assert laid.data_ptr() == place
    assert _answers(model) == _answers(plain)


def test_quantised_matrices_and_a_tied_head_stay() -> None:
    quantised = _model()
    quantise_linears(quantised, "int8")
    lay_out_for_decoding(quantised)
    assert all(tensor.is_contiguous() for tensor in quantised.state_dict().values())
    tied = Phi3(msgspec.structs.replace(TINY, is_head_tied=True))
    lay_out_for_decoding(tied)
    assert tied.head_weight.is_contiguous()
