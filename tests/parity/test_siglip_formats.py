"""SigLIP weights as others write and read them: transformers, open_clip, timm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers.models.siglip import tokenization_siglip

from siglip_lite import (
    Siglip,
    SiglipConfig,
    SiglipTextConfig,
    SiglipTokenizer,
    SiglipVision,
    SiglipVisionConfig,
    load_siglip,
    load_siglip_text,
    load_siglip_vision,
    save_huggingface,
)
from siglip_lite.formats.open_clip import TRUNK_SIZES, TrunkSize, read_timm
from weight_files import TensorDict, load_tensors, unique_tensors

# 35 px: four patches a side and three pixels that are never seen.
VISION = SiglipVisionConfig(image_px=35, patch_px=8, width=24, num_layers=2, num_heads=3, mlp_width=37)
TEXT = SiglipTextConfig(vocab_size=31, max_tokens=11, width=20, num_layers=3, num_heads=5, mlp_width=29, dim_out=24)
HF_VISION = {
    "image_size": 35,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
}
HF_TEXT = {
    "vocab_size": 31,
    "max_position_embeddings": 11,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 29,
    "projection_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 35, 35) * 2 - 1


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 31, (5, 11))


Model = TypeVar("Model", bound=nn.Module)


def randomised(model: Model) -> Model:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def hf_pair() -> transformers.SiglipModel:
    return randomised(transformers.SiglipModel(transformers.SiglipConfig(vision_config=HF_VISION, text_config=HF_TEXT)))


def our_pair() -> Siglip:
    return randomised(Siglip(SiglipConfig(vision=VISION, text=TEXT)))


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def assert_equal_pairs(ours: Siglip, theirs: transformers.SiglipModel, pixels: torch.Tensor, ids: torch.Tensor) -> None:
    expected = theirs(input_ids=ids, pixel_values=pixels)
    features, hidden = ours.vision_model(pixels), ours.text_model(ids)
    assert_near(features, expected.vision_model_output.last_hidden_state)
    assert_near(ours.vision_model.pool(features), expected.vision_model_output.pooler_output)
    assert_near(hidden, expected.text_model_output.last_hidden_state)
    assert_near(ours.text_model.pool(hidden), expected.text_model_output.pooler_output)
    assert_near(ours(pixels, ids).logits_per_image, expected.logits_per_image)


@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_what_transformers_saves_loads_here(tmp_path: Path, pixels: torch.Tensor, ids: torch.Tensor, shards: str):
    theirs = hf_pair()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "shards" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "shards")
    ours = load_siglip(tmp_path)
    assert ours.cfg == SiglipConfig(vision=VISION, text=TEXT)
    assert_equal_pairs(ours, theirs, pixels, ids)
    # A tower of the pair, without the other's tensors.
    assert_near(load_siglip_vision(tmp_path)(pixels), theirs.vision_model(pixels).last_hidden_state)
    assert_near(load_siglip_text(tmp_path)(ids), theirs.text_model(ids).last_hidden_state)


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000_000])
def test_transformers_loads_what_is_saved_here(
    tmp_path: Path, pixels: torch.Tensor, ids: torch.Tensor, max_shard_bytes: int
):
    ours = our_pair()
    save_huggingface(tmp_path, ours, max_shard_bytes=max_shard_bytes)
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(theirs) is transformers.SiglipModel
    assert_equal_pairs(ours, theirs.eval(), pixels, ids)
    processor = transformers.SiglipImageProcessorPil.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.size["width"], *processor.image_mean) == (35, 35, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("use_head", [True, False])
def test_vision_tower_alone_goes_both_ways(tmp_path: Path, pixels: torch.Tensor, use_head: bool):
    config = transformers.SiglipVisionConfig(**HF_VISION, vision_use_head=use_head)
    theirs = randomised(transformers.SiglipVisionModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_siglip_vision(tmp_path / "theirs")
    assert ours.cfg.use_head == use_head
    save_huggingface(tmp_path / "ours", ours)
    back = transformers.SiglipVisionModel.from_pretrained(tmp_path / "ours").eval()
    for model in (theirs, back):
        expected = model(pixels)
        assert_near(ours(pixels), expected.last_hidden_state)
        if use_head:
            assert_near(ours.pool(ours(pixels)), expected.pooler_output)


def test_text_tower_alone_goes_both_ways(tmp_path: Path, ids: torch.Tensor):
    theirs = randomised(transformers.SiglipTextModel(transformers.SiglipTextConfig(**HF_TEXT)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_siglip_text(tmp_path / "theirs")
    save_huggingface(tmp_path / "ours", ours)
    back = transformers.SiglipTextModel.from_pretrained(tmp_path / "ours").eval()
    for model in (theirs, back):
        expected = model(ids)
        assert_near(ours(ids), expected.last_hidden_state)
        assert_near(ours.pool(ours(ids)), expected.pooler_output)


def test_dtype_of_a_saved_model_is_read_by_transformers(tmp_path: Path):
    save_huggingface(tmp_path, our_pair(), dtype=torch.bfloat16)
    assert transformers.AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


NANO = TrunkSize(width=24, num_layers=2, num_heads=3, mlp_width=36)


@pytest.fixture
def nano_trunk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VisionTransformer]:
    """A SigLIP architecture of timm's class, too small to be published, known to us and to timm by its name."""

    def vit_nano_patch8_siglip_35(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
        kwargs = {"num_classes": 0, "global_pool": "map"} | {k: v for k, v in kwargs.items() if v is not None}
        return VisionTransformer(
            img_size=35,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=3,
            mlp_ratio=1.5,
            class_token=False,
            act_layer="gelu_tanh",
            **kwargs,  # pyright: ignore[reportArgumentType]
        )

    monkeypatch.setitem(TRUNK_SIZES, "nano", NANO)
    monkeypatch.setitem(
        timm.models._registry._model_entrypoints, "vit_nano_patch8_siglip_35", vit_nano_patch8_siglip_35
    )
    return vit_nano_patch8_siglip_35


OPEN_CLIP = {
    "embed_dim": 24,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 35,
        "timm_model_name": "vit_nano_patch8_siglip_35",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 11,
        "vocab_size": 31,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 20,
        "heads": 5,
        "layers": 3,
        "mlp_ratio": 1.45,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}


@pytest.mark.usefixtures("nano_trunk")
def test_open_clips_model_loads_here(tmp_path: Path, pixels: torch.Tensor, ids: torch.Tensor):
    config = {key: value for key, value in OPEN_CLIP.items() if key != "custom_text"}
    theirs = randomised(open_clip.CustomTextCLIP(**config))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    ours = load_siglip(tmp_path)
    assert_near(ours.vision_model(pixels), theirs.visual.trunk.forward_features(pixels))
    assert_near(ours.vision_model.pool(ours.vision_model(pixels)), theirs.encode_image(pixels))
    assert_near(ours.text_model.pool(ours.text_model(ids)), theirs.encode_text(ids))
    assert_near(ours(pixels, ids).logits_per_image, theirs.get_logits(pixels, ids)[0])
    assert_near(load_siglip_vision(tmp_path)(pixels), ours.vision_model(pixels))


def test_timms_trunk_loads_here(tmp_path: Path, pixels: torch.Tensor, nano_trunk: Callable[..., VisionTransformer]):
    theirs = randomised(nano_trunk())
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_nano_patch8_siglip_35", "num_classes": 0}))
    ours = load_siglip_vision(tmp_path)
    assert_near(ours(pixels), theirs.forward_features(pixels))
    assert_near(ours.pool(ours(pixels)), theirs(pixels))


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch32_siglip_256",
        "vit_large_patch16_siglip_384",
        "vit_so400m_patch14_siglip_384",
        "vit_so400m_patch14_siglip_gap_224",
        "vit_giantopt_patch16_siglip_256",
    ],
)
def test_sizes_read_from_a_name_are_timms(tmp_path: Path, name: str):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0, weight_init="skip")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    folder = read_timm(tmp_path)
    assert folder.vision is not None
    assert folder.vision.num_heads == next(theirs.blocks.children()).attn.num_heads
    with torch.device("meta"):
        ours = SiglipVision(folder.vision)
    targets = {f"vision_model.{name}": tensor for name, tensor in unique_tensors(ours).items()}
    # Nothing is written on the meta device; what is proved is that all names and shapes are there.
    assert load_tensors(TensorDict(theirs.state_dict()), targets, folder.recipes(())) == []


TEXTS = [
    "a photo of a cat",
    "A PHOTO, of a Cat!!",
    "trailing white space \t\n",
    "two  spaces\tand\na line",
    "",
    "   ",
    "!?",
    "x",
    "İstanbul, Ünïcode — 日本 ¿qué?",
    "under_scored and hyphen-ated (don't)",
    "no\u00a0break \u2003em",
    "the quick brown fox jumps over the lazy dog and " * 9,
]


@pytest.mark.parametrize("max_tokens", [1, 7, 64])
def test_ids_equal_transformers_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siglip_sentencepiece: bytes, max_tokens: int
):
    # Transformers asks for protobuf, which it needs for another setting (legacy=False) than SigLIP's.
    monkeypatch.setattr(tokenization_siglip, "requires_backends", lambda *_: None)
    ours = SiglipTokenizer(siglip_sentencepiece, max_tokens=max_tokens)
    ours.save(tmp_path)
    theirs = transformers.SiglipTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == max_tokens
    expected = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ours.encode_batch(TEXTS), expected)
    assert torch.equal(SiglipTokenizer.from_folder(tmp_path).encode_batch(TEXTS), expected)


def test_tokenizer_saved_by_transformers_loads_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siglip_sentencepiece: bytes
):
    monkeypatch.setattr(tokenization_siglip, "requires_backends", lambda *_: None)
    (tmp_path / "given.model").write_bytes(siglip_sentencepiece)
    theirs = transformers.SiglipTokenizer(
        vocab_file=str(tmp_path / "given.model"), pad_token="<pad>", do_lower_case=False, model_max_length=9
    )
    theirs.save_pretrained(tmp_path / "saved")
    ours = SiglipTokenizer.from_folder(tmp_path / "saved")
    expected = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert ours.pad_id == 0
    assert torch.equal(ours.encode_batch(TEXTS), expected)


def test_pair_saved_with_its_tokenizer_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siglip_sentencepiece: bytes, pixels: torch.Tensor
):
    monkeypatch.setattr(tokenization_siglip, "requires_backends", lambda *_: None)
    tokenizer = SiglipTokenizer(siglip_sentencepiece, max_tokens=11)
    text = SiglipTextConfig(
        vocab_size=tokenizer.vocab_size, max_tokens=11, width=20, num_layers=1, num_heads=5, mlp_width=29, dim_out=24
    )
    ours = randomised(Siglip(SiglipConfig(vision=VISION, text=text)))
    save_huggingface(tmp_path, ours, tokenizer=tokenizer)
    texts = ["a cat", "two dogs"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    given = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    expected = transformers.SiglipModel.from_pretrained(tmp_path)(input_ids=given, pixel_values=pixels)
    ids = SiglipTokenizer.from_folder(tmp_path).encode_batch(texts)
    assert_near(load_siglip(tmp_path)(pixels, ids).logits_per_image, expected.logits_per_image)
