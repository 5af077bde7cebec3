"""A quantised model is the model with dequantised weights, however its weights came in."""

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from fused_kernels import linear_cross_entropy
from phi3_lite import Phi3, Phi3Config, SamplingConfig, collect, generate, mini_4k
from phi3_lite.quantised import Int4Linear, Int8Linear, QuantisedLinear, load_targets, quantise_linears
from weight_files import Piece, TensorDict, WeightsError, load_tensors, same_names

# widths that are no whole groups of 32, rows that are no whole blocks of 64
TINY = Phi3Config(
    vocab_size=37, width=40, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=44, sliding_window=5, init_std=0.2
)
KINDS = ["int8", "int4"]


def new_model(**change: Any) -> Phi3:
    model = Phi3(msgspec.structs.replace(TINY, **change), generator=torch.Generator().manual_seed(3)).eval()
    if model.head_bias is not None:
        nn.init.normal_(model.head_bias)
    return model


def plain_weights(model: Phi3) -> dict[str, Tensor]:
    """The state of the unquantised model that a quantised one stands for."""
    state = {name: tensor for name, tensor in load_targets(model).items() if isinstance(tensor, Tensor)}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            state[f"{name}.weight"] = module.dequantised()
    return state


def both(kind: Any, dtype: torch.dtype = torch.float32, **change: Any) -> tuple[Phi3, Phi3]:
    """A quantised model, and a plain one with its dequantised weights."""
    quantised, plain = new_model(**change).to(dtype), new_model(**change).to(dtype)
    quantise_linears(quantised, kind)
    plain.load_state_dict(plain_weights(quantised))
    return quantised, plain


def prompt(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return torch.randint(0, TINY.vocab_size, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("change", [{}, {"is_head_tied": True}, {"has_head_bias": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_weights(kind, change):
    quantised, plain = both(kind, **change)
    ids, bounds = prompt([9, 1, 5])
    got, expected = (m.logits(m(m.embed(ids), cu_seqlens=bounds)) for m in (quantised, plain))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(quantised.head_weight, plain.head_weight)
    # and not those of the weights before
    unquantised = new_model(**change)
    assert (unquantised.logits(unquantised(unquantised.embed(ids), cu_seqlens=bounds)) - got).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_bf16_are_near_those_of_the_dequantised_weights(kind):
    quantised, plain = both(kind, torch.bfloat16)
    plain.float()
    ids, bounds = prompt([9, 1, 5])
    got, expected = (m.logits(m(m.embed(ids), cu_seqlens=bounds)) for m in (quantised, plain))
    assert got.dtype == torch.bfloat16
    # bf16 activations through two layers; the plain model in bf16 itself is as far off
    assert (got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt() <= 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_tokens_of_the_dequantised_weights(kind):
    ids, bounds = prompt([6, 3])
    tokens = [
        collect(generate(model, model.embed(ids), bounds, SamplingConfig(max_new_tokens=12)))
        for model in both(kind, is_head_tied=True)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("layer", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("lengths", [[150], [30, 1, 40, 79], [64, 64, 22], [65, 85]], ids=str)
def test_rows_written_in_pieces_are_those_written_at_once(layer, lengths):
    weight = torch.randn(150, 40)
    whole, pieces = layer(40, 150), layer(40, 150)
    whole.write(0, weight)
    pieces.codes.fill_(85)
    pieces.scales.fill_(torch.nan)
    start = 0
    for length in lengths:
        pieces.write(start, weight[start : start + length].bfloat16().float())
        pieces.write(start, weight[start : start + length])
        start += length
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_load_into_an_empty_model_is_the_loaded_model_quantised(kind):
    plain = new_model(is_head_tied=True)
    state = dict(plain.state_dict())
    # as Llama's files hold them: q, k and v apart
    fused = state.pop("model.layers.1.self_attn.qkv_proj.weight")
    state |= {name: part.clone() for name, part in zip("qkv", fused.split([40, 20, 20]), strict=True)}
    recipes = same_names(plain) | {"model.layers.1.self_attn.qkv_proj.weight": [Piece("q"), Piece("k"), Piece("v")]}
    with torch.device("meta"):
        empty = Phi3(plain.cfg)
    quantise_linears(empty, kind)
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(torch.nan if buffer.is_floating_point() else 85)
    load_tensors(TensorDict(state), load_targets(empty), recipes)
    quantise_linears(plain, kind)
    ids, bounds = prompt([4, 9])
    got, expected = (m.logits(m(m.embed(ids), cu_seqlens=bounds)) for m in (empty, plain))
    assert torch.equal(got, expected)
    weights = plain_weights(plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain_weights(empty).items())


def test_load_of_other_weights_is_refused_before_anything_is_written():
    model = new_model()
    quantise_linears(model, "int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = dict(new_model().state_dict()) | {"model.layers.0.mlp.down_proj.weight": torch.zeros(40, 43)}
    with pytest.raises(WeightsError, match=r"down_proj\.weight: expected \[40, 44\], got \[40, 43\]"):
        load_tensors(TensorDict(state), load_targets(model), same_names(new_model()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_loss_over_a_quantised_head_reaches_the_hidden_states():
    quantised, plain = both("int8")
    grads = []
    for model in (quantised, plain):
        hidden = torch.linspace(-1, 1, 80).view(2, 40).requires_grad_()
        linear_cross_entropy(hidden, model.head_weight.detach(), torch.tensor([3, 30])).backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("kind", "gigabytes"), [("int8", 3.83), ("int4", 2.47)])
def test_size_of_phi3_mini(kind, gigabytes):
    with torch.device("meta"):
        model = Phi3(mini_4k()).to(torch.bfloat16)
        quantise_linears(model, kind)
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    assert sum(sizes) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_what_is_no_plain_model_is_refused_unchanged():
    model = new_model()
    model.get_submodule("model.layers.1.mlp").down_proj = nn.Linear(44, 40)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: expected a plain Projection.*got Linear"):
        quantise_linears(model, "int8")
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
    twice = new_model()
    quantise_linears(twice, "int8")
    with pytest.raises(ValueError, match="expected a plain Projection to quantise, got Int8Linear"):
        quantise_linears(twice, "int4")
