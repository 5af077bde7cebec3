"""Adapters: nothing at init, exact unmerge, strict files, clear refusals."""

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from lora_lite import (
    LoraConfig,
    LoraLinear,
    attach,
    base_state_dict,
    detach,
    disabled,
    load_lora_state_dict,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge,
    merge_and_remove,
    unmerge,
    xgen_mm_lora,
)


class Block(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.qkv_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(7, 11)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def new_model() -> Any:
    return Model()


def config(**change):
    return LoraConfig(**({"rank": 3, "alpha": 6.0, "targets": ("qkv_proj", "o_proj")} | change))


def adapted(model: nn.Module | None = None, **change) -> Any:
    """A model with adapters that are no longer at their start."""
    model = Model() if model is None else model
    attach(model, config(**change))
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def x(dtype=torch.float32):
    return torch.randn(2, 5, 7, dtype=torch.float64).to(dtype)


def test_attach_at_init_changes_no_bit():
    model, inputs = new_model(), x()
    expected = model(inputs)
    names = attach(model, config(dropout=0.5))
    assert names == ["layers.0.qkv_proj", "layers.0.o_proj", "layers.1.qkv_proj", "layers.1.o_proj"]
    assert torch.equal(model(inputs), expected)


def test_layer_is_the_equation():
    model: Any = nn.Sequential(nn.Linear(5, 3))
    attach(model, config(rank=2, alpha=8.0, targets=("0",)))
    layer = model[0]
    nn.init.normal_(layer.lora_b)
    inputs = torch.randn(4, 5)
    expected = inputs @ (layer.weight + 4.0 * layer.lora_b @ layer.lora_a).t() + layer.bias
    torch.testing.assert_close(model(inputs), expected)


def test_only_adapters_of_the_targets_train():
    model: Any = Model()
    attach(model, config(targets=("qkv_proj",)))
    model(x()).sum().backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {f"layers.{i}.qkv_proj.lora_{leaf}" for i in range(2) for leaf in "ab"}
    # attach freezes what it wraps and nothing else
    assert trainable == adapters | {name for name, _ in Model().named_parameters() if "qkv_proj" not in name}
    assert model.layers[0].qkv_proj.weight.grad is None
    assert torch.count_nonzero(model.layers[0].qkv_proj.lora_b.grad) > 0
    # with B = 0 the gradient of A is zero
    assert torch.count_nonzero(model.layers[0].qkv_proj.lora_a.grad) == 0
    assert len(lora_parameters(model)) == 4


def test_initial_a_is_kaiming_uniform_and_follows_the_generator():
    weights = []
    for _ in range(2):
        model: Any = nn.Sequential(nn.Linear(400, 3))
        attach(model, config(rank=64, targets=("0",)), generator=torch.Generator().manual_seed(5))
        weights.append(model[0].lora_a)
    assert torch.equal(*weights)
    bound = 1 / math.sqrt(400)
    assert weights[0].abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert weights[0].std().item() == pytest.approx(bound / math.sqrt(3), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_output_is_the_unmerged_one(dtype):
    model, inputs = adapted(Model().to(dtype)), x(dtype)
    expected = model(inputs)
    merge(model)
    torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=0)
    assert (model(inputs) - Model().to(dtype)(inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_gives_the_kept_weights_back_bit_for_bit(dtype):
    model = adapted(Model().to(dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for _ in range(3):
        merge(model)
        merge(model)
        assert not torch.equal(model.layers[0].o_proj.weight, before["layers.0.o_proj.weight"])
        unmerge(model)
        unmerge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_kept_weights_follow_a_cast_while_merged():
    model = adapted()
    expected = model.layers[0].o_proj.weight.double()
    merge(model)
    model.double()
    unmerge(model)
    assert model.layers[0].o_proj.weight.dtype == torch.float64
    assert torch.equal(model.layers[0].o_proj.weight, expected)


def test_merge_of_a_tied_weight_leaves_its_twin_alone():
    model: Any = nn.ModuleDict({"embed": nn.Embedding(11, 7), "head": nn.Linear(7, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    adapted(model, targets=("head",))
    before = model["embed"].weight.clone()
    merge(model)
    assert torch.equal(model["embed"].weight, before)
    assert not torch.equal(model["head"].weight, before)
    unmerge(model)
    assert model["head"].weight is model["embed"].weight


@pytest.mark.parametrize("is_merged", [False, True])
def test_disabled_is_the_base_model_and_is_undone_after_an_error(is_merged):
    base, inputs = new_model(), x()
    model = adapted(copy.deepcopy(base))
    if is_merged:
        merge(model)
    expected = model(inputs)
    with disabled(model):
        assert torch.equal(model(inputs), base(inputs))
    assert torch.equal(model(inputs), expected)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(inputs), expected)


def test_base_checkpoint_keeps_its_names():
    base: Any = Model()
    saved = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base)
    for step in (merge, unmerge):
        step(model)
        own = base_state_dict(model)
        assert own.keys() == saved.keys()
        assert all(torch.equal(own[name], saved[name]) for name in saved)
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert sorted(missing) == sorted(lora_state_dict(model))
    assert unexpected == []


def test_detach_gives_the_plain_model_back():
    base, inputs = new_model(), x()
    base.layers[0].o_proj.bias.requires_grad_(False)
    expected, flags = base(inputs), [p.requires_grad for p in base.parameters()]
    model = adapted(base)
    merge(model)
    detach(model)
    assert lora_layers(model) == []
    assert torch.equal(model(inputs), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert type(model.layers[0].o_proj) is nn.Linear


def test_merge_and_remove_saves_as_the_plain_model():
    model, inputs = adapted(), x()
    expected = model(inputs)
    merge_and_remove(model)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(inputs), expected, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_travel_by_their_own_state_dict():
    base, inputs = new_model(), x()
    model, other = adapted(copy.deepcopy(base)), adapted(copy.deepcopy(base))
    assert not torch.equal(model(inputs), other(inputs))
    load_lora_state_dict(other, lora_state_dict(model))
    assert torch.equal(model(inputs), other(inputs))


def test_load_lists_all_that_does_not_fit_and_changes_nothing():
    model = adapted()
    state = {name: torch.zeros_like(tensor) for name, tensor in lora_state_dict(model).items()}
    del state["layers.0.o_proj.lora_a"]
    state["lm_head.lora_a"] = torch.zeros(3, 7)
    state["layers.1.o_proj.lora_b"] = torch.zeros(7, 4)
    with pytest.raises(ValueError, match="missing") as caught:
        load_lora_state_dict(model, state)
    for part in (
        "missing ['layers.0.o_proj.lora_a']",
        "unexpected ['lm_head.lora_a']",
        "layers.1.o_proj.lora_b (7, 4) instead of (7, 3)",
    ):
        assert part in str(caught.value)
    assert all(torch.count_nonzero(tensor) > 0 for tensor in lora_state_dict(model).values())


def test_load_into_a_merged_model_is_refused():
    model = adapted()
    merge(model)
    with pytest.raises(ValueError, match="expected none merged"):
        load_lora_state_dict(model, lora_state_dict(model))


def test_dropout_acts_in_training_on_the_adapter_only():
    model, inputs = adapted(dropout=0.5), x()
    assert not torch.equal(model(inputs), model(inputs))
    with disabled(model):
        assert torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_dropout_keeps_the_expected_value():
    model: Any = nn.Sequential(nn.Linear(5, 3))
    adapted(model, dropout=0.25, targets=("0",))
    inputs = torch.randn(1, 5).expand(40_000, 5)
    mean = model(inputs).mean(0)
    torch.testing.assert_close(mean, model.eval()(inputs[0]), atol=3e-2, rtol=0)


def test_half_precision_base_has_fp32_adapters():
    model = adapted(Model().bfloat16())
    assert {parameter.dtype for parameter in lora_parameters(model)} == {torch.float32}
    out = model(x(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(model))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("qkv_proj",), ["layers.0.qkv_proj", "layers.1.qkv_proj"]),
        (("1.qkv_proj",), ["layers.1.qkv_proj"]),
        (("layers.0.*",), ["layers.0.qkv_proj", "layers.0.o_proj"]),
        (("*_proj", "lm_head"), [f"layers.{i}.{n}" for i in (0, 1) for n in ("qkv_proj", "o_proj")] + ["lm_head"]),
        (("*",), [f"layers.{i}.{n}" for i in (0, 1) for n in ("qkv_proj", "o_proj")] + ["lm_head"]),
    ],
)
def test_targets_are_ends_of_names_or_patterns(targets, names):
    assert attach(Model(), config(targets=targets)) == names


@pytest.mark.parametrize("target", ["proj", "qkv_porj", "layers", "layers.0"])
def test_target_without_a_layer_is_an_error_with_near_names_and_changes_nothing(target):
    model: Any = Model()
    with pytest.raises(ValueError, match=rf"target '{target}': expected the name of a linear layer.*qkv_proj"):
        attach(model, config(targets=("lm_head", target)))
    assert lora_layers(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_second_adapter_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.o_proj': expected none with an adapter"):
        attach(model, config(targets=("o_proj",)))


def test_layer_that_is_never_called_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 8)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        attach(model, config(targets=("out_proj",)))


def test_layer_with_two_names_stays_one_layer():
    shared = nn.Linear(4, 4)
    model: Any = nn.ModuleDict({"a": shared, "b": shared})
    assert attach(model, config(targets=("a", "b"))) == ["a", "b"]
    assert model["a"] is model["b"]
    assert isinstance(model["a"], LoraLinear)
    assert len(lora_parameters(model)) == 2
    detach(model)
    assert model["a"] is model["b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"alpha": 0.0}, "alpha: expected a positive number"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and below 1, got 1.0"),
        ({"targets": ()}, "targets: expected names"),
        ({"targets": ("",)}, "targets: expected names"),
    ],
)
def test_config_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_config_imports_without_torch():
    code = "import lora_lite.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rank_stabilised_scale_by_hand():
    assert LoraConfig(rank=16, alpha=8, targets=("x",)).scale == 0.5
    assert LoraConfig(rank=16, alpha=8, is_rank_stabilised=True, targets=("x",)).scale == 2.0
    model = adapted(is_rank_stabilised=True)
    assert {layer.scale for _, layer in lora_layers(model)} == {6.0 / math.sqrt(3)}


def test_preset_of_the_paper_is_two_and_a_half_percent_of_phi_3_mini():
    from phi3_lite import Phi3, mini_4k

    with torch.device("meta"):
        model = Phi3(mini_4k())
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        names = attach(model, xgen_mm_lora())
    num_trained = sum(parameter.numel() for parameter in lora_parameters(model))
    # 32 layers: rank 64 · Σ (d_in + d_out) of qkv, o, gate_up, down at width 3072 and MLP 8192.
    assert len(names) == 4 * 32
    assert num_trained == 32 * 64 * (4 * 3072 + 2 * 3072 + (3072 + 16384) + (8192 + 3072)) == 100_663_296
    assert num_weights == 3_821_079_552
    assert num_trained / num_weights == pytest.approx(0.0263, abs=5e-5)
