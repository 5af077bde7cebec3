"""xGen-MM releases in and out: names, sizes, extra rows, and each trap of the released checkpoints."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from anyres_tiler import TilingConfig, tile_image
from blip3_lite import Blip3, Blip3Config, CheckpointError, Processor, SamplingConfig, collate, user_turn
from blip3_lite.checkpoint import LoadedModel
from blip3_lite.config import XGEN_MM_SYSTEM_PROMPT, CheckpointConfig
from blip3_lite.model import undrawn_model
from blip3_lite.opening import open_model
from blip3_lite.presets import EXTRA_TOKENS, xgen_mm_config
from blip3_lite.xgen_mm import (
    detect_kind,
    export_xgen_mm,
    load_xgen_mm,
    recipes,
    xgen_mm_tensors,
    xgen_mm_tokenizer,
)
from interleave_data import ImagePart, Sample, TextPart, Turn
from perceiver_resampler import ResamplerConfig
from phi3_lite import IMAGE, ChatTemplate, HFTokenizer, Phi3Config, train_tokenizer
from siglip_lite import SiglipVisionConfig
from weight_files import TensorDict, WeightsError, compare_tensors, plan_shards, unique_tensors

USED = 290
PHI3 = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "phi-3-mini" / "tokenizer.json"
needs_phi3 = pytest.mark.skipif(not PHI3.exists(), reason="the shared Phi-3 tokenizer is not here")


def tiny() -> Blip3Config:
    return Blip3Config(
        vision=SiglipVisionConfig(image_px=8, patch_px=4, width=8, num_layers=2, num_heads=2, mlp_width=12),
        connector=ResamplerConfig(dim=8, dim_out=16, depth=2, num_heads=2, head_dim=4, num_latents=3),
        lm=Phi3Config(
            vocab_size=USED + 3, width=16, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=24,
            sliding_window=7, has_head_bias=True, init_std=0.3,
        ),
        tiling=TilingConfig(tile_px=8),
        masks_padding_in_vision=False,
        tile_grouping="bands",
        system_prompt="be brief",
        image_separator="\n",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return train_tokenizer(["what is it?"], 280).with_control_tokens(EXTRA_TOKENS)


@pytest.fixture
def loaded(tokenizer: HFTokenizer) -> LoadedModel:
    torch.manual_seed(0)
    model = Blip3(tiny()).eval()
    bias = model.lang_model.head_bias
    assert bias is not None
    torch.nn.init.normal_(bias)
    return LoadedModel(model, Processor(tiny(), tokenizer), CheckpointConfig(model=tiny()))


def logits(model: Blip3, processor: Processor, picture: ImagePart) -> torch.Tensor:
    prompt = Sample(id="s", source="test", turns=(user_turn([picture], "what is it?"),))
    return model.lang_model.logits(model(collate([processor.encode_prompt(prompt)])))


@pytest.mark.parametrize(
    ("kind", "total", "shards"),
    [
        ("base", 17_437_028_876, [4_962_589_952, 4_983_103_488, 4_983_103_488, 2_508_231_948]),
        ("singleimg", 17_437_028_876, [4_962_589_952, 4_983_103_488, 4_983_103_488, 2_508_231_948]),
        ("interleave", 8_718_514_438, None),
        ("dpo", 8_718_514_438, None),
    ],
)
def test_full_size_export_has_the_published_names_and_bytes(kind, total, shards):
    with torch.device("meta"):
        model = Blip3(xgen_mm_config(kind))
    dtype = torch.float32 if shards else torch.bfloat16
    tensors = xgen_mm_tensors(model, dtype)
    names = {tensor.name for tensor in tensors}
    assert names == published_names()
    assert len(tensors) == 718
    assert sum(tensor.num_bytes for tensor in tensors) == total
    planned = [sum(tensor.num_bytes for tensor in shard) for shard in plan_shards(tensors, 5_000_000_000)]
    assert planned == shards if shards else len(planned) == 2


@pytest.mark.parametrize("kind", ["base", "singleimg", "interleave", "dpo"])
def test_full_size_import_takes_exactly_the_tensors_of_an_export(kind):
    cfg = xgen_mm_config(kind)
    model = undrawn_model(cfg)
    saved = xgen_mm_tensors(model, torch.bfloat16)
    source = TensorDict({t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in saved})
    targets = unique_tensors(model)
    assert not compare_tensors(source, targets, recipes(cfg, list(targets)))


def published_names() -> set[str]:
    """The names of the released index, written out from its description, not from the model."""
    vision = [f"embeddings.patch_embedding.{p}" for p in ("weight", "bias")] + ["embeddings.position_embedding.weight"]
    for layer in range(27):
        at = f"encoder.layers.{layer}."
        parts = ["layer_norm1", "layer_norm2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1",
                 "mlp.fc2"]  # fmt: skip
        vision += [f"{at}{part}.{p}" for part in parts for p in ("weight", "bias")]
    vision += [f"post_layernorm.{p}" for p in ("weight", "bias")]
    vision += ["head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"]
    vision += [
        f"head.{part}.{p}" for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        for p in ("weight", "bias")
    ]  # fmt: skip
    connector = ["latents", "norm.weight", "norm.bias", "projection.weight", "projection.bias"]
    for layer in range(6):
        connector += [f"layers.{layer}.0.norm_{x}.{p}" for x in ("media", "latents") for p in ("weight", "bias")]
        connector += [f"layers.{layer}.0.{x}.weight" for x in ("to_q", "to_kv", "to_out")]
        connector += [f"layers.{layer}.1.0.weight", f"layers.{layer}.1.0.bias"]
        connector += [f"layers.{layer}.1.1.weight", f"layers.{layer}.1.3.weight"]
    lm = ["model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight", "model.norm.weight"]
    lm += ["lm_head.weight", "lm_head.bias", "lm_head.additional_fc.weight", "lm_head.additional_fc.bias"]
    for layer in range(32):
        parts = ["input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "self_attn.o_proj",
                 "mlp.gate_up_proj", "mlp.down_proj"]  # fmt: skip
        lm += [f"model.layers.{layer}.{part}.weight" for part in parts]
    groups = (("vision_encoder", vision), ("vision_tokenizer", connector), ("lang_model", lm))
    return {f"vlm.{part}.{name}" for part, names in groups for name in names}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 3000])
def test_import_of_export_gives_the_same_logits_bit_for_bit(loaded, tokenizer, picture, tmp_path, max_shard_bytes):
    export_xgen_mm(tmp_path / "x", loaded, "singleimg", max_shard_bytes=max_shard_bytes)
    again = load_xgen_mm(tmp_path / "x", "singleimg", cfg=tiny(), tokenizer=tokenizer)
    image = picture(1, (20, 9))
    expected = logits(loaded.model, loaded.processor, image)
    assert logits(again.model, again.processor, image).equal(expected)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_bf16_release_is_loaded_as_bf16_or_as_asked(loaded, tokenizer, tmp_path):
    export_xgen_mm(tmp_path / "x", loaded, "interleave")
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model = load_xgen_mm(tmp_path / "x", "interleave", cfg=tiny(), tokenizer=tokenizer, dtype=dtype).model
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_logits_are_those_of_the_published_decoupled_head(loaded, tokenizer, tmp_path):
    export_xgen_mm(tmp_path / "x", loaded, "base")
    held = load_file(tmp_path / "x" / "model.safetensors")
    head = "vlm.lang_model.lm_head."
    # The padding rows of a release hold noise that no id reaches.
    held[head + "weight"][USED:] = 7.0
    held[head + "bias"][USED:] = 7.0
    held["vlm.lang_model.model.embed_tokens.weight"][USED:] = 7.0
    save_file(held, tmp_path / "x" / "model.safetensors")
    lm = load_xgen_mm(tmp_path / "x", "base", cfg=tiny(), tokenizer=tokenizer).model.lang_model
    hidden = torch.randn(5, 16)
    original = (hidden @ held[head + "weight"].T + held[head + "bias"])[:, :USED]
    added = hidden @ held[head + "additional_fc.weight"].T + held[head + "additional_fc.bias"]
    assert held[head + "bias"].abs().max() > 0.1
    torch.testing.assert_close(lm.logits(hidden), torch.cat([original, added], dim=1))
    ids = torch.tensor([0, USED - 1, USED, USED + 2])
    table, extra = (held[f"vlm.lang_model.model.embed_tokens.{n}"] for n in ("weight", "additional_embedding.weight"))
    assert lm.embed(ids).equal(torch.stack([table[0], table[USED - 1], extra[0], extra[2]]))


def test_a_head_without_its_bias_is_refused(loaded, tokenizer, tmp_path):
    export_xgen_mm(tmp_path / "x", loaded, "base")
    held = load_file(tmp_path / "x" / "model.safetensors")
    del held["vlm.lang_model.lm_head.bias"]
    held["vlm.lang_model.rotary.inv_freq"] = torch.zeros(2)
    save_file(held, tmp_path / "x" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing \(1\): vlm.lang_model.lm_head.bias") as caught:
        load_xgen_mm(tmp_path / "x", "base", cfg=tiny(), tokenizer=tokenizer)
    assert "unexpected (1): vlm.lang_model.rotary.inv_freq" in str(caught.value)
    del held["vlm.lang_model.rotary.inv_freq"]
    save_file(held, tmp_path / "x" / "model.safetensors")
    allowed = ["lang_model.lm_head.bias"]
    load_xgen_mm(tmp_path / "x", "base", cfg=tiny(), tokenizer=tokenizer, allow_missing=allowed)


def test_a_trainer_file_needs_consent_and_a_tower(loaded, tokenizer, tmp_path, picture):
    export_xgen_mm(tmp_path / "x", loaded, "base")
    held = load_file(tmp_path / "x" / "model.safetensors")
    tower = {k.replace("vlm.vision_encoder", "vision_model"): v for k, v in held.items() if ".vision_encoder." in k}
    (tmp_path / "siglip").mkdir()
    save_file({**tower, "logit_scale": torch.zeros(1)}, tmp_path / "siglip" / "model.safetensors")
    state = {k.replace("vlm.", "module.", 1): v for k, v in held.items() if ".vision_encoder." not in k}
    torch.save({"epoch": 3, "step": 7, "model_state_dict": state}, tmp_path / "checkpoint_7.pt")
    with pytest.raises(WeightsError, match="expected safetensors, got a pickle"):
        load_xgen_mm(tmp_path / "checkpoint_7.pt", "base", cfg=tiny(), tokenizer=tokenizer)
    again = load_xgen_mm(
        tmp_path / "checkpoint_7.pt", "base", cfg=tiny(), tokenizer=tokenizer, allow_pickle=True,
        vision=tmp_path / "siglip",
    )  # fmt: skip
    image = picture(1, (20, 9))
    assert logits(again.model, again.processor, image).equal(logits(loaded.model, loaded.processor, image))


def test_kind_is_told_by_the_grids(tmp_path):
    with pytest.raises(WeightsError, match="name the kind"):
        detect_kind(tmp_path)
    for grids, kind in ((None, "base"), ([[384, 768]], "singleimg")):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"grids": grids}))
        assert detect_kind(tmp_path) == kind


def test_a_wrong_tokenizer_is_refused(tmp_path):
    train_tokenizer(["abc"], 280).save(tmp_path / "tokenizer.json")
    with pytest.raises(WeightsError, match="'<image>': 32012"):
        xgen_mm_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(WeightsError, match=r"expected a tokenizer\.json"):
        xgen_mm_tokenizer(tmp_path / "none.json")


def test_an_export_is_refused_for_another_model(loaded, tokenizer):
    cfg = msgspec.structs.replace(tiny(), lm=msgspec.structs.replace(tiny().lm, has_head_bias=False))
    with pytest.raises(ValueError, match=r"lang_model\.lm_head\.bias"):
        xgen_mm_tensors(Blip3(cfg), torch.float32)


def test_the_tower_sees_padding_and_only_the_connector_does_not(loaded):
    tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    valid = torch.tensor([[True, True, True, True], [True, False, True, False]])
    unmasked = loaded.model.vision_encoder(tiles.float() / 127.5 - 1)
    torch.testing.assert_close(loaded.model.patch_features(tiles, valid), unmasked)


def test_thumbnail_is_squashed_and_first(picture):
    image = picture(1, (1200, 400)).decode()
    tiles = tile_image(image, xgen_mm_config("interleave").tiling)
    squashed = torch.tensor(list(image.resize((384, 384), 3).tobytes()), dtype=torch.uint8).view(384, 384, 3)
    assert (tiles.pixels[0].int() - squashed.permute(2, 0, 1).int()).abs().max() <= 1
    assert tiles.grid == (1, 3)


def test_released_sizes_are_the_published_ones():
    cfg = xgen_mm_config("dpo")
    assert (cfg.vision.num_patches, cfg.num_image_tokens(5), cfg.lm.vocab_size) == (729, 640, 32015)
    assert (cfg.lm.sliding_window, cfg.lm.has_head_bias, cfg.lm.is_head_tied) == (2047, True, False)
    assert xgen_mm_config("base").num_image_tokens(1) == 128


@needs_phi3
def test_prompt_of_the_instruct_models_is_the_published_one():
    tokenizer = xgen_mm_tokenizer(PHI3)
    assert [tokenizer.token_id(name) for name in EXTRA_TOKENS] == [32012, 32013, 32014]
    cfg = msgspec.structs.replace(
        tiny(),
        lm=msgspec.structs.replace(tiny().lm, vocab_size=32015),
        system_prompt=XGEN_MM_SYSTEM_PROMPT,
        has_leading_space=False,
    )
    processor = Processor(cfg, tokenizer)
    turn = Turn(role="user", parts=(ImagePart(b""), TextPart("what is it?")))
    chat = processor.template.encode([("user", processor.chat_parts(turn))], is_prompt=True)
    # Recorded from transformers 4.41.2, the release's own version: LlamaTokenizer with legacy=False over the same
    # vocabulary, given the published prompt. No <s>; the newline behind a role is swallowed, the one behind an image is
    # not; no space is put in front of "A", "what" or the newline.
    assert chat.ids == [
        32006, 29909, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444,
        29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 32007,
        32010, 32012, 13, 5816, 338, 372, 29973, 32007, 32001,
    ]  # fmt: skip
    assert chat.image_positions == [33]
    assert processor.stop_ids[0] == 32007


@needs_phi3
def test_free_interleaving_is_tokenized_as_published():
    tokenizer = xgen_mm_tokenizer(PHI3)
    template = ChatTemplate(tokenizer, has_leading_space=False)
    turns = [
        ("user", ["Hello ", IMAGE, " and  this", IMAGE, "one"]), ("assistant", ["Ok."]), ("user", ["  x"]),
    ]  # fmt: skip
    # Recorded as above, from "<|user|>\nHello <image> and  this<image>one<|end|>\n<|assistant|>\nOk.<|end|>…".
    assert template.encode(turns, is_prompt=True).ids == [
        32010, 10994, 29871, 32012, 322, 29871, 445, 32012, 650, 32007, 32001, 20434, 29889, 32007, 32010, 29916, 32007,
        32001,
    ]  # fmt: skip


@needs_phi3
def test_prompt_of_the_base_model_has_no_chat_format():
    tokenizer = xgen_mm_tokenizer(PHI3)
    template = ChatTemplate(tokenizer, kind="plain", has_leading_space=False)
    shots = [("user", [IMAGE, "A caption:"]), ("assistant", [" a cat"]), ("user", [IMAGE, "A caption:"])]
    ids = template.encode(shots, is_prompt=True).ids
    caption = tokenizer.encode("A caption:", is_continued=True)
    cat = tokenizer.encode(" a cat", is_continued=True)
    assert ids == [32012, *caption, *cat, 32014, 32012, *caption]
    assert template.stop_ids == (32014, 32000)


def test_a_checkpoint_of_ours_keeps_the_released_choices(loaded, tmp_path, picture):
    from blip3_lite import load_model, save_model

    export_xgen_mm(tmp_path / "x", loaded, "singleimg")
    released = load_xgen_mm(tmp_path / "x", "base", cfg=tiny(), tokenizer=loaded.processor.tokenizer)
    save_model(tmp_path / "ours", loaded.model, loaded.processor, sampling=released.config.sampling)
    again = load_model(tmp_path / "ours")
    image = picture(1, (20, 9))
    assert again.config.model == tiny()
    # facts of the zero-shot demo
    assert again.config.sampling == SamplingConfig(max_new_tokens=256, repetition_penalty=2.0)
    assert logits(again.model, again.processor, image).equal(logits(loaded.model, loaded.processor, image))
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_a_quantised_import_equals_quantising_the_loaded_model(loaded, tokenizer, picture, tmp_path):
    from phi3_lite import quantise_linears

    cfg = msgspec.structs.replace(
        tiny(),
        connector=msgspec.structs.replace(tiny().connector, dim_out=64),
        lm=msgspec.structs.replace(tiny().lm, width=64, mlp_width=64),
    )
    torch.manual_seed(0)
    model = Blip3(cfg).eval()
    processor = Processor(cfg, tokenizer)
    export_xgen_mm(tmp_path / "x", LoadedModel(model, processor, CheckpointConfig(model=cfg)), "base")
    again = load_xgen_mm(tmp_path / "x", "base", cfg=cfg, tokenizer=tokenizer, quantize="int4")
    quantise_linears(model.lang_model, "int4")
    image = picture(1, (20, 9))
    with torch.no_grad():
        assert logits(again.model, again.processor, image).equal(logits(model, processor, image))


def test_a_release_is_sampled_as_its_authors_do(loaded, tokenizer, tmp_path):
    export_xgen_mm(tmp_path / "x", loaded, "interleave")
    again = load_xgen_mm(tmp_path / "x", "interleave", cfg=tiny(), tokenizer=tokenizer)
    assert again.config.sampling == SamplingConfig(max_new_tokens=1024, temperature=0.0, repetition_penalty=1.0)


@pytest.mark.parametrize("kind", ["ours", "release", "language model"])
def test_opening_counts_the_tensors_before_it_names_them(kind, loaded, tokenizer, tmp_path, monkeypatch):
    from blip3_lite import save_model
    from phi3_lite import Phi3, save_huggingface

    path = tmp_path / "x"
    if kind == "ours":
        save_model(path, loaded.model, loaded.processor)
    elif kind == "release":
        export_xgen_mm(path, loaded, "singleimg")
        (path / "preprocessor_config.json").write_text('{"grids": [[384, 768]]}')
        monkeypatch.setattr("blip3_lite.xgen_mm.xgen_mm_config", lambda kind: tiny())
        monkeypatch.setattr("blip3_lite.xgen_mm.xgen_mm_tokenizer", lambda file: tokenizer)
    else:
        save_huggingface(path, Phi3(msgspec.structs.replace(tiny().lm, has_head_bias=False)), tokenizer)
    seen: list[object] = []
    open_model(path, on_tensor=seen.append, on_count=seen.append)
    count, *names = seen
    assert count == len(set(names)) == len(names) > 10


def test_a_flipped_byte_in_an_exported_release_is_found(loaded, tmp_path):
    export_xgen_mm(tmp_path / "x", loaded, "singleimg")
    weights = tmp_path / "x" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        open_model(tmp_path / "x")
