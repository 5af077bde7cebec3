"""Published SigLIP folders: what goes out comes in again, and what does not fit is refused by name."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from siglip_lite import (
    Siglip,
    SiglipConfig,
    SiglipText,
    SiglipTextConfig,
    SiglipTokenizer,
    SiglipVision,
    SiglipVisionConfig,
    load_siglip,
    load_siglip_text,
    load_siglip_vision,
    save_huggingface,
    so400m_patch14_384,
)
from siglip_lite.formats.huggingface import tensors_to_save
from weight_files import WeightsError

VISION = SiglipVisionConfig(image_px=17, patch_px=8, width=6, num_layers=2, num_heads=3, mlp_width=7)
TEXT = SiglipTextConfig(vocab_size=13, max_tokens=5, width=4, num_layers=1, num_heads=2, mlp_width=7, dim_out=6)


def pair() -> Siglip:
    return Siglip(SiglipConfig(vision=VISION, text=TEXT))


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; `a__b` is field b of object a."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_huggingface(tmp_path / "saved", pair())
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [500, 5_000_000_000])
def test_import_of_export_is_bit_equal(tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int):
    model = pair().to(dtype)
    save_huggingface(tmp_path, model, max_shard_bytes=max_shard_bytes)
    again = load_siglip(str(tmp_path))
    assert again.cfg == model.cfg
    pixels, ids = torch.rand(3, 3, 17, 17, dtype=dtype), torch.randint(0, 13, (2, 5))
    assert torch.equal(again(pixels, ids).logits_per_image, model(pixels, ids).logits_per_image)
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor), name


def test_each_tower_goes_out_and_in_alone(tmp_path: Path):
    vision, text = SiglipVision(VISION), SiglipText(TEXT)
    save_huggingface(tmp_path / "vision", vision)
    save_huggingface(tmp_path / "text", text)
    assert torch.equal(load_siglip_vision(tmp_path / "vision").head.probe, vision.head.probe)  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.equal(load_siglip_text(tmp_path / "text").head.weight, text.head.weight)
    assert {path.name for path in (tmp_path / "text").iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(WeightsError, match="two towers, got a vision tower alone"):
        load_siglip(tmp_path / "vision")
    with pytest.raises(WeightsError, match="a text tower, got a vision tower alone"):
        load_siglip_text(tmp_path / "vision")
    with pytest.raises(WeightsError, match="a vision tower, got a text tower alone"):
        load_siglip_vision(tmp_path / "text")


def published_vision_tensors() -> dict[str, tuple[int, ...]]:
    """The table of xGen-MM's 448 vision tensors, which are those of google/siglip-so400m-patch14-384."""
    d, mlp = 1152, 4304
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (d, 3, 14, 14),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding.weight": (729, d),
        "post_layernorm.weight": (d,),
        "post_layernorm.bias": (d,),
        "head.probe": (1, 1, d),
        "head.attention.in_proj_weight": (3456, d),
        "head.attention.in_proj_bias": (3456,),
        "head.attention.out_proj.weight": (d, d),
        "head.attention.out_proj.bias": (d,),
        "head.layernorm.weight": (d,),
        "head.layernorm.bias": (d,),
        "head.mlp.fc1.weight": (mlp, d),
        "head.mlp.fc1.bias": (mlp,),
        "head.mlp.fc2.weight": (d, mlp),
        "head.mlp.fc2.bias": (d,),
    }
    for i in range(27):
        layer = f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.{kind}": (d,) for kind in ("weight", "bias")}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (d, d), f"{layer}.self_attn.{name}.bias": (d,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (mlp, d), f"{layer}.mlp.fc1.bias": (mlp,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (d, mlp), f"{layer}.mlp.fc2.bias": (d,)}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def test_full_size_export_holds_the_published_tensors():
    with torch.device("meta"):
        tower = SiglipVision(so400m_patch14_384().vision)
    tensors = tensors_to_save(tower, torch.float32)
    assert len(tensors) == 448
    assert {tensor.name: tensor.shape for tensor in tensors} == published_vision_tensors()
    assert sum(tensor.num_bytes for tensor in tensors) == 4 * 428_225_600


def test_dtype_is_the_files_unless_one_is_asked_for(tmp_path: Path):
    save_huggingface(tmp_path / "half", pair(), dtype=torch.float16)
    assert load_siglip_vision(tmp_path / "half").post_layernorm.weight.dtype == torch.float16
    assert load_siglip(tmp_path / "half", dtype=torch.float64).logit_scale.dtype == torch.float64
    # float16 and bfloat16 have only float32 in common.
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    tensors["logit_scale"] = tensors["logit_scale"].bfloat16()
    save_file(tensors, tmp_path / "half" / "model.safetensors")
    assert load_siglip(tmp_path / "half").logit_scale.dtype == torch.float32
    assert load_siglip_vision(tmp_path / "half").post_layernorm.weight.dtype == torch.float16


def test_progress_names_each_tensor_once(saved: Path):
    seen: list[str] = []
    model = load_siglip_vision(saved, on_tensor=seen.append)
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


def test_all_faults_of_the_tensors_are_listed(saved: Path):
    tensors = load_file(saved / "model.safetensors")
    del tensors["vision_model.head.probe"], tensors["text_model.head.bias"]
    tensors["vision_model.surplus"] = torch.zeros(2)
    tensors["logit_scale"] = torch.zeros(2)
    # Old releases of transformers saved these.
    tensors["vision_model.embeddings.position_ids"] = torch.arange(4)[None]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_siglip(saved)
    message = str(caught.value)
    assert "missing (2): text_model.head.bias; vision_model.head.probe" in message
    assert "unexpected (1): vision_model.surplus" in message
    assert "misshaped (1): logit_scale: expected [1], got [2]" in message


def test_allowed_missing_is_drawn_anew_and_logged(saved: Path, caplog: pytest.LogCaptureFixture):
    tensors = load_file(saved / "model.safetensors")
    kept = tensors["vision_model.post_layernorm.weight"].fill_(3.0)
    for name in list(tensors):
        if name.startswith(("vision_model.head.", "logit_")):
            del tensors[name]
    save_file(tensors, saved / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = load_siglip(saved, allow_missing=["vision_model.head.*", "logit_*"])
    assert torch.equal(model.vision_model.post_layernorm.weight, kept)
    head = model.vision_model.head
    assert head is not None
    # Xavier's bound, and a layer norm's start: drawn, not whatever lay in memory.
    assert 0 < head.attention.in_proj_weight.abs().max() <= (6 / 24) ** 0.5
    assert head.layernorm.weight.eq(1).all()
    assert model.logit_bias.item() == -10
    assert "13 tensors were absent and drawn anew" in caplog.text
    assert "vision_model.head.probe" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "phi3"}, "expected model_type siglip, .* got phi3"),
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"vision_config__hidden_act": "gelu"}, "vision_config.hidden_act: expected 'gelu_pytorch_tanh', got 'gelu'"),
        ({"text_config__hidden_act": "quick_gelu"}, "text_config.hidden_act"),
        ({"vision_config__num_channels": 4}, "vision_config.num_channels: expected 3, got 4"),
        ({"vision_config__image_size": [17, 25]}, r"vision_config.image_size: expected 'square', got \[17, 25\]"),
        ({"vision_config__attention_dropout": 0.1}, "vision_config.attention_dropout"),
        ({"vision_config__model_type": "siglip2_vision_model"}, "vision_config.model_type"),
        ({"vision_config__num_attention_heads": 4}, "num_heads: expected a divisor"),
        ({"vision_config__hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config__projection_size": 8}, "dim_out"),
    ],
)
def test_variants_that_are_not_implemented_are_refused(saved: Path, changes: dict[str, object], message: str):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(WeightsError, match=message):
        load_siglip(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_mean", [0.485, 0.456, 0.406]),
        ("image_std", [0.5, 0.5, 0.25]),
        ("do_normalize", False),
        ("rescale_factor", 1.0),
    ],
)
def test_images_of_another_scale_are_refused(saved: Path, field: str, value: object):
    edit_json(saved / "preprocessor_config.json", **{field: value})
    with pytest.raises(WeightsError, match=field):
        load_siglip_vision(saved)


def test_square_given_by_two_sides_is_read(saved: Path):
    edit_json(saved / "config.json", vision_config__image_size=[17, 17], vision_config__patch_size=[8, 8])
    assert load_siglip(saved).cfg.vision == VISION


@pytest.mark.parametrize("fault", ["no config", "cut config", "cut weights", "no weights", "missing shard", "integers"])
def test_unfinished_or_damaged_folders_are_refused(tmp_path: Path, fault: str):
    save_huggingface(tmp_path, pair(), max_shard_bytes=1000 if fault == "missing shard" else 5_000_000_000)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    message = {
        "no config": "config.json or open_clip_config.json, got neither",
        "cut config": "config.json: expected the config",
        "cut weights": "model.safetensors",
        "no weights": "neither",
        "missing shard": "model-00002-of-",
        "integers": "floating-point tensors, got some of torch.int8",
    }[fault]
    if fault == "no config":
        config.unlink()
    elif fault == "cut config":
        config.write_bytes(config.read_bytes()[:-20])
    elif fault == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif fault == "no weights":
        weights.unlink()
    elif fault == "missing shard":
        next(tmp_path.glob("model-00002-*")).unlink()
    else:
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(WeightsError, match=message):
        load_siglip(tmp_path)


def test_nothing_is_written_over_or_without_a_published_form(tmp_path: Path, siglip_sentencepiece: bytes):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="a new or empty one"):
        save_huggingface(tmp_path / "full", pair())
    conv = SiglipVisionConfig(
        image_px=16, patch_px=8, width=8, num_layers=1, num_heads=2, mlp_width=8, stem="conv", use_head=False
    )
    with pytest.raises(ValueError, match="stem: expected patch, got conv"):
        save_huggingface(tmp_path / "new", SiglipVision(conv))
    tokenizer = SiglipTokenizer(siglip_sentencepiece, max_tokens=5)
    with pytest.raises(ValueError, match="at most 13 pieces"):
        save_huggingface(tmp_path / "new", pair(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="it reads no text"):
        save_huggingface(tmp_path / "new", SiglipVision(VISION), tokenizer=tokenizer)
    assert not (tmp_path / "new").exists()


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 768,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 32000,
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
            "width": 768,
            "heads": 12,
            "layers": 12,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_cfg__vision_cfg__timm_model_name", "vit_base_patch16_clip_224"),
        ("model_cfg__vision_cfg__timm_model_name", "vit_tiny_patch16_siglip_224"),
        ("model_cfg__vision_cfg__timm_pool", "avg"),
        ("model_cfg__vision_cfg__timm_proj", "linear"),
        ("model_cfg__vision_cfg__image_size", 378),
        ("model_cfg__embed_dim", 512),
        ("model_cfg__quick_gelu", True),
        ("model_cfg__custom_text", False),
        ("model_cfg__text_cfg__act_kwargs", {"approximate": "none"}),
        ("model_cfg__text_cfg__norm_kwargs", None),
        ("model_cfg__text_cfg__no_causal_mask", False),
        ("model_cfg__text_cfg__pool_type", "argmax"),
        ("model_cfg__text_cfg__proj_bias", False),
        ("model_cfg__text_cfg__qk_norm", True),
        ("model_cfg__text_cfg__hf_model_name", "xlm-roberta-base"),
        ("preprocess_cfg__mean", [0.48, 0.46, 0.41]),
    ],
)
def test_open_clip_models_of_another_kind_are_refused(tmp_path: Path, field: str, value: object):
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(OPEN_CLIP))
    edit_json(path, **{field: value})
    name = field.removeprefix("model_cfg__").replace("__", ".")
    with pytest.raises(WeightsError, match=f"{name}: expected"):
        load_siglip(tmp_path)


def test_timm_models_of_another_kind_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 0}))
    with pytest.raises(WeightsError, match=r"architecture: expected vit_SIZE_patchN_siglip_PX .* got resnet50"):
        load_siglip_vision(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_base_patch16_siglip_224", "model_args": {"img_size": 256}})
    )
    with pytest.raises(WeightsError, match="model_args"):
        load_siglip_vision(tmp_path)
