"""LoRA and DoRA against PEFT, both ways through PEFT's files, on a tiny Phi-3 of equal weights, float32."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import Phi3Config as HFConfig
from transformers import Phi3ForCausalLM

from lora_lite import LoraConfig, attach, load_peft, lora_layers, lora_parameters, merge, save_peft
from phi3_lite import Phi3, Phi3Config, quantise_linears
from phi3_lite.quantised import QuantisedLinear

# peft asks transformers a question whose name has changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TINY = Phi3Config(vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=44, init_std=0.25)
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
IDS = torch.randint(0, TINY.vocab_size, (9,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def pair() -> tuple[Phi3, Phi3ForCausalLM]:
    """Ours and transformers', with the same random weights; each test takes copies."""
    ours = Phi3(TINY, generator=torch.Generator().manual_seed(1)).eval()
    config = HFConfig(
        vocab_size=TINY.vocab_size, hidden_size=TINY.width, num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads, num_key_value_heads=TINY.num_kv_heads, intermediate_size=TINY.mlp_width,
        rms_norm_eps=TINY.norm_eps, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    theirs = Phi3ForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def our_logits(model: Phi3) -> torch.Tensor:
    return model.logits(model(model.embed(IDS)))


def their_logits(model) -> torch.Tensor:
    return model(input_ids=IDS[None]).logits[0]


def disturb(parameters) -> None:
    """Move an adapter away from its start."""
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn_like(parameter) * 0.1


def peft_model(base: Phi3ForCausalLM, **change) -> PeftModel:
    config = PeftConfig(**({"r": 3, "lora_alpha": 7, "target_modules": list(PROJECTIONS)} | change))
    model = get_peft_model(copy.deepcopy(base), config).eval()
    disturb(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    return model


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_reads_our_adapter(pair, tmp_path: Path, use_dora):
    ours, theirs = copy.deepcopy(pair)
    before = our_logits(ours)
    # layers of different rank and scale go through PEFT's patterns
    attach(ours, LoraConfig(rank=3, alpha=7.0, targets=("qkv_proj", "0.mlp.*_proj"), use_dora=use_dora))
    attach(ours, LoraConfig(rank=5, alpha=2.5, targets=("1.mlp.down_proj",), use_dora=use_dora))
    disturb(lora_parameters(ours))
    save_peft(ours, tmp_path)
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    expected = our_logits(ours)
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(their_logits(loaded), expected, atol=1e-5, rtol=1e-5)
    merge(ours)
    torch.testing.assert_close(their_logits(loaded.merge_and_unload()), our_logits(ours), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_rslora": True},
        {"target_modules": r".*\.1\..*(down|qkv)_proj"},
        {"rank_pattern": {"down_proj": 5, "1.self_attn.o_proj": 2}, "alpha_pattern": {"^model.layers.0.*qkv_proj": 1}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["o_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_we_read_pefts_adapter(pair, tmp_path: Path, use_dora, change):
    ours, theirs = copy.deepcopy(pair)
    model = peft_model(theirs, use_dora=use_dora, **change)
    model.save_pretrained(str(tmp_path))
    names = load_peft(ours, tmp_path)
    assert names == [name for name, _ in lora_layers(ours)]
    assert len(names) == sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    torch.testing.assert_close(our_logits(ours), their_logits(model), atol=1e-5, rtol=1e-5)


def test_our_files_are_pefts(pair, tmp_path: Path):
    """PEFT's adapter, read and saved by us, has the names and bits that PEFT gave it."""
    from safetensors.torch import load_file

    ours, theirs = copy.deepcopy(pair)
    peft_model(theirs, use_dora=True).save_pretrained(str(tmp_path / "theirs"))
    load_peft(ours, tmp_path / "theirs")
    save_peft(ours, tmp_path / "ours")
    saved, original = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert saved.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_are_pefts(pair, tmp_path: Path, use_dora):
    ours, theirs = copy.deepcopy(pair)
    model = peft_model(theirs, use_dora=use_dora)
    model.save_pretrained(str(tmp_path))
    load_peft(ours, tmp_path)
    our_logits(ours).square().mean().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    their_logits(model).square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, layer in lora_layers(ours):
        prefix = f"base_model.model.{name}"
        ends = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
        ends["lora_magnitude"] = "lora_magnitude_vector.default.weight"
        for leaf, parameter in layer.adapter_tensors().items():
            torch.testing.assert_close(parameter.grad, grads[f"{prefix}.{ends[leaf]}"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_on_a_quantised_base_is_pefts_on_its_dequantised_weights(pair, tmp_path: Path, use_dora, kind):
    ours, theirs = copy.deepcopy(pair)
    quantise_linears(ours, kind)
    state = {f"{n}.weight": m.dequantised() for n, m in ours.named_modules() if isinstance(m, QuantisedLinear)}
    theirs.load_state_dict(state, strict=False)
    model = peft_model(theirs, use_dora=use_dora)
    model.save_pretrained(str(tmp_path))
    load_peft(ours, tmp_path)
    torch.testing.assert_close(our_logits(ours), their_logits(model), atol=1e-5, rtol=1e-5)
    our_logits(ours).square().mean().backward()
    assert all(parameter.grad is not None for parameter in lora_parameters(ours))
