"""DoRA: magnitude and direction apart, nothing at init, merged as it runs, gradients as the paper says."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lora_lite import (
    LoraConfig,
    attach,
    base_state_dict,
    detach,
    disabled,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge,
    unmerge,
)


def new_model(dtype: torch.dtype = torch.float32) -> Any:
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5, bias=False)).to(dtype)


def config(**change) -> LoraConfig:
    return LoraConfig(**({"rank": 3, "alpha": 6.0, "targets": ("0", "2"), "use_dora": True} | change))


def trained(model: Any, **change) -> Any:
    attach(model, config(**change))
    for parameter in lora_parameters(model):
        with torch.no_grad():
            parameter += torch.randn_like(parameter) * 0.3
    return model


def weight_of(layer: Any) -> torch.Tensor:
    """The equation of arXiv:2402.09353 §4.1, in float64."""
    v = layer.base_weight.double() + layer.scale * layer.lora_b.double() @ layer.lora_a.double()
    return layer.lora_magnitude.double()[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_dora_changes_no_bit(dtype):
    model, x = new_model(dtype), torch.randn(4, 7).to(dtype)
    with torch.no_grad():
        model[0].weight[3] = 0  # a row without direction
    expected = model(x)
    attach(model, config(dropout=0.5))
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model[0].lora_magnitude, model[0].weight.float().norm(dim=1))


def test_layer_is_the_equation():
    model, x = trained(new_model()), torch.randn(4, 7)
    hidden = torch.tanh(x.double() @ weight_of(model[0]).t() + model[0].bias.double())
    torch.testing.assert_close(model(x).double(), hidden @ weight_of(model[2]).t(), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_equation_with_the_norm_held():
    model, x = trained(new_model(torch.float64)), torch.randn(4, 7, dtype=torch.float64)
    layer = model[0]
    out = layer(x)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [layer.lora_a, layer.lora_b, layer.lora_magnitude], grad)
    v = layer.weight + layer.scale * layer.lora_b @ layer.lora_a
    weight = (layer.lora_magnitude / v.detach().norm(dim=1))[:, None] * v
    expected = torch.autograd.grad(
        x @ weight.t() + layer.bias, [layer.lora_a, layer.lora_b, layer.lora_magnitude], grad
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_same_function_and_unmerge_is_exact(dtype):
    model, x = trained(new_model(dtype)), torch.randn(4, 7).to(dtype)
    expected, before = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=0)
    unmerge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), expected)


def test_disabled_and_detached_are_the_base():
    base, x = new_model(), torch.randn(4, 7)
    saved = copy.deepcopy(base.state_dict())
    expected = base(x)
    model = trained(base)
    with disabled(model):
        assert torch.equal(model(x), expected)
    own = base_state_dict(model)
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], saved[name]) for name in saved)
    detach(model)
    assert torch.equal(model(x), expected)


def test_magnitudes_travel_with_the_adapter():
    base, x = new_model(), torch.randn(4, 7)
    model, other = trained(copy.deepcopy(base)), trained(copy.deepcopy(base))
    state = lora_state_dict(model)
    assert sorted(name for name in state if name.startswith("0.")) == ["0.lora_a", "0.lora_b", "0.lora_magnitude"]
    load_lora_state_dict(other, state)
    assert torch.equal(model(x), other(x))
    attach(base, config(use_dora=False))
    with pytest.raises(ValueError, match=r"unexpected \['0\.lora_magnitude', '2\.lora_magnitude'\]"):
        load_lora_state_dict(base, state)


def test_dropout_acts_in_training_only_and_keeps_the_expected_value():
    model = trained(new_model(), dropout=0.25, targets=("0",))[0]
    x = torch.randn(1, 7)
    assert not torch.equal(model(x), model(x))
    mean = model(x.expand(40_000, 7)).mean(0)
    torch.testing.assert_close(mean, model.eval()(x[0]), atol=5e-2, rtol=0)
