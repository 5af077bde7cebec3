"""QLoRA: an adapter on a module that hides its weight computes and trains as on that weight."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_kernels import dequantise_int8, int8_matmul, quantise_int8
from lora_lite import (
    LoraConfig,
    LoraLinear,
    LoraQuantised,
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


class Int8(nn.Module):
    """A quantised matrix as another package might write it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        codes, scales = quantise_int8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self
        out = int8_matmul(x, state.codes, state.scales)
        return out if self.bias is None else out + self.bias

    def dequantised(self) -> Tensor:
        state: Any = self
        return dequantise_int8(state.codes, state.scales)


def new_model() -> Any:
    return nn.Sequential(Int8(torch.randn(11, 300), torch.randn(11)), nn.Tanh(), Int8(torch.randn(5, 11)))


def twin(model: Any) -> Any:
    """The same model in floating point."""
    layers = [nn.Linear(300, 11), nn.Tanh(), nn.Linear(11, 5, bias=False)]
    with torch.no_grad():
        for index in (0, 2):
            layers[index].weight.copy_(model[index].dequantised())
        layers[0].bias.copy_(model[0].bias)
    return nn.Sequential(*layers)


def config(use_dora: bool = False) -> LoraConfig:
    return LoraConfig(rank=3, alpha=6.0, targets=("0", "2"), use_dora=use_dora)


def both(use_dora: bool) -> tuple[Any, Any]:
    """A quantised model and its twin, with the same adapter, not at its start."""
    model = new_model()
    plain = twin(model)
    for each in (model, plain):
        attach(each, config(use_dora))
    for parameter in lora_parameters(model):
        with torch.no_grad():
            parameter += torch.randn_like(parameter) * 0.2
    load_lora_state_dict(plain, lora_state_dict(model))
    return model, plain


@pytest.mark.parametrize("use_dora", [False, True])
def test_fresh_adapter_changes_no_bit(use_dora):
    model, x = new_model(), torch.randn(4, 300)
    expected = model(x)
    assert attach(model, config(use_dora)) == ["0", "2"]
    assert isinstance(model[0], LoraQuantised)
    assert torch.equal(model(x), expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{index}.{leaf}" for index in (0, 2) for leaf in ("lora_a", "lora_b", "lora_magnitude")[: 2 + use_dora]
    ]


@pytest.mark.parametrize("use_dora", [False, True])
def test_results_and_gradients_are_those_on_the_dequantised_weight(use_dora):
    model, plain = both(use_dora)
    x = torch.randn(4, 300)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [each(part) for each, part in zip((model, plain), inputs, strict=True)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(lora_parameters(model), lora_parameters(plain), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_merge_is_refused_before_any_layer_is_merged():
    model: Any = nn.Sequential(nn.Linear(5, 300), *new_model())
    attach(model, LoraConfig(rank=2, alpha=2.0, targets=("0", "1", "3")))
    weight = model[0].weight
    with pytest.raises(ValueError, match="expected layers in floating point, got Int8"):
        merge(model)
    assert isinstance(model[0], LoraLinear)
    assert model[0].weight is weight
    unmerge(model)


def test_disabled_and_detached_are_the_base():
    base, x = new_model(), torch.randn(4, 300)
    saved, layers = copy.deepcopy(base.state_dict()), list(base)
    expected = base(x)
    attach(base, config())
    for parameter in lora_parameters(base):
        nn.init.normal_(parameter)
    with disabled(base):
        assert torch.equal(base(x), expected)
    own = base_state_dict(base)
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], saved[name]) for name in saved)
    with pytest.raises(ValueError, match="expected none with an adapter"):
        attach(base, LoraConfig(rank=1, alpha=1.0, targets=("*",)))
    detach(base)
    assert list(base) == layers
    assert torch.equal(base(x), expected)
    assert base[0].bias.requires_grad


def test_modules_with_a_weight_of_another_kind_are_no_targets():
    """A property is not even asked for: it could cost a whole matrix."""

    class Head(Int8):
        @property
        def weight(self) -> Tensor:
            raise RuntimeError("made in full")

    model: Any = nn.ModuleDict({"head": Head(torch.randn(4, 4)), "proj": Int8(torch.randn(4, 4))})
    with pytest.raises(ValueError, match="near it are proj"):
        attach(model, LoraConfig(rank=1, alpha=1.0, targets=("head",)))
    assert attach(model, LoraConfig(rank=1, alpha=1.0, targets=("*",))) == ["proj"]
