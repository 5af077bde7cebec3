"""PEFT's files: what is not understood, or does not fit, is refused whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lite import LoraConfig, attach, load_peft, lora_layers, lora_parameters, save_peft
from weight_files import WeightsError


def new_model() -> Any:
    return nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})})


def config(**change) -> LoraConfig:
    return LoraConfig(**({"rank": 2, "alpha": 3.0, "targets": ("up", "down")} | change))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter on both layers."""
    model = new_model()
    attach(model, config(dropout=0.25))
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter)
    save_peft(model, tmp_path, base_model="some/model")
    return tmp_path


def change_config(folder: Path, **change) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(folder: Path, *parts: str) -> None:
    model = new_model()
    with pytest.raises(WeightsError) as caught:
        load_peft(model, folder)
    for part in parts:
        assert part in str(caught.value)
    assert lora_layers(model) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapter_comes_back_as_it_was_saved(folder: Path):
    model = new_model()
    assert load_peft(model, folder) == ["block.up", "block.down"]
    layers = dict(lora_layers(model))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted(tensors) == [
        f"base_model.model.block.{name}.lora_{leaf}.weight" for name in ("down", "up") for leaf in "AB"
    ]
    for name, layer in layers.items():
        assert torch.equal(layer.lora_a, tensors[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_b, tensors[f"base_model.model.{name}.lora_B.weight"])
        assert (layer.scale, layer.dropout.p) == (1.5, 0.25)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize(
    "change",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa_niter_4"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"layer_replication": [[0, 1]]},
        {"a_setting_of_tomorrow": 3},
    ],
    ids=str,
)
def test_config_that_asks_for_more_than_lora_is_refused(folder: Path, change):
    change_config(folder, **change)
    assert_refused(folder, "expected LoRA or DoRA on linear layers and nothing else", next(iter(change)))


@pytest.mark.parametrize("text", ["", "[1]", '{"r": "2", "lora_alpha": 3}', "{"], ids=str)
def test_config_that_is_none_is_refused(folder: Path, text):
    (folder / "adapter_config.json").write_text(text)
    assert_refused(folder, "adapter_config.json: expected")


def test_all_tensors_that_do_not_fit_are_listed(folder: Path):
    def change(tensors):
        del tensors["base_model.model.block.up.lora_A.weight"]
        tensors["base_model.model.block.down.lora_B.weight"] = torch.zeros(4, 3)
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 4)

    change_tensors(folder, change)
    assert_refused(
        folder,
        "missing ['base_model.model.block.up.lora_A.weight']",
        "unexpected ['base_model.model.lm_head.lora_A.weight']",
        "block.down.lora_B.weight [4, 3] instead of [4, 2]",
    )


def test_layer_of_the_config_without_tensors_is_missed(folder: Path):
    def change(tensors):
        for leaf in "AB":
            del tensors[f"base_model.model.block.up.lora_{leaf}.weight"]

    change_tensors(folder, change)
    assert_refused(folder, "missing ['base_model.model.block.up.lora_A.weight'")


def test_rank_of_the_config_must_be_that_of_the_tensors(folder: Path):
    change_config(folder, r=3)
    assert_refused(folder, "block.up.lora_A.weight [2, 4] instead of [3, 4]")


def test_dora_without_magnitudes_is_missed(folder: Path):
    change_config(folder, use_dora=True)
    assert_refused(folder, "missing ['base_model.model.block.down.lora_magnitude_vector'")


def test_pickled_weights_are_not_read(folder: Path):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert_refused(folder, "expected adapter_model.safetensors, got adapter_model.bin")


def test_truncated_weights_are_refused(folder: Path):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert_refused(folder, "adapter_model.safetensors")


def test_second_adapter_is_refused(folder: Path):
    model = new_model()
    attach(model, config(targets=("down",)))
    with pytest.raises(ValueError, match="expected none with an adapter"):
        load_peft(model, folder)
    assert [name for name, _ in lora_layers(model)] == ["block.down"]


def test_adapters_that_one_config_cannot_say_are_not_saved(tmp_path: Path):
    model = new_model()
    with pytest.raises(ValueError, match=r"got \(dropout, is DoRA\) \[\]"):
        save_peft(model, tmp_path)
    attach(model, config(targets=("up",)))
    attach(model, config(targets=("down",), use_dora=True))
    with pytest.raises(ValueError, match=r"\[\(0.0, False\), \(0.0, True\)\]"):
        save_peft(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
