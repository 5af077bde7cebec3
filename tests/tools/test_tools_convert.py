"""tools/convert.py: every way between formats keeps the tensors bit for bit, and what makes no sense is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import blip3_lite.xgen_mm as xgen_mm
import lora_lite
import phi3_lite
import siglip_lite
from blip3_lite import Blip3, Blip3Config, Processor, load_model, save_model
from blip3_lite.opening import open_model
from blip3_lite.presets import EXTRA_TOKENS
from phi3_lite import HFTokenizer, Phi3, Phi3Config, load_lm, train_tokenizer
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
)

LORA = lora_lite.LoraConfig(rank=2, alpha=3.0, targets=("qkv_proj", "down_proj"))
VISION = SiglipVisionConfig(image_px=8, patch_px=4, width=6, num_layers=1, num_heads=3, mlp_width=7)
TEXT = SiglipTextConfig(vocab_size=101, max_tokens=5, width=4, num_layers=1, num_heads=2, mlp_width=7, dim_out=6)


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The tool as a module."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    import convert

    return convert


@pytest.fixture
def refused(tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Arguments → the one line with which they are refused; nothing is written."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        try:
            status = tool.main([*map(str, arguments)])
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        assert status == 2
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err.startswith("convert: ")
        assert not (tmp_path / "out").exists()
        return said.err

    return call


@pytest.fixture
def ours(tiny_model: Blip3, tiny_processor: Processor, tmp_path: Path) -> Path:
    """A checkpoint of ours without adapters."""
    save_model(tmp_path / "ours", tiny_model, tiny_processor)
    return tmp_path / "ours"


@pytest.fixture
def adapted(tiny_model: Blip3, tiny_processor: Processor, tmp_path: Path) -> Path:
    """A checkpoint of ours with adapters that change something."""
    lora_lite.attach(tiny_model.lang_model, LORA)
    for parameter in lora_lite.lora_parameters(tiny_model):
        nn.init.normal_(parameter)
    save_model(tmp_path / "adapted", tiny_model, tiny_processor, lora=LORA)
    return tmp_path / "adapted"


@pytest.fixture
def released(tiny_config: Blip3Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Blip3, Processor]:
    """A model that passes for a release, as the published sizes and ids are made tiny."""
    cfg = msgspec.structs.replace(
        tiny_config,
        vision=msgspec.structs.replace(tiny_config.vision, use_head=True),
        lm=msgspec.structs.replace(tiny_config.lm, vocab_size=293, has_head_bias=True),
    )
    tokenizer = train_tokenizer(["what is it?"], 290).with_control_tokens(EXTRA_TOKENS)
    monkeypatch.setattr(xgen_mm, "xgen_mm_config", lambda kind: cfg)
    monkeypatch.setattr(xgen_mm, "xgen_mm_tokenizer", HFTokenizer.from_file)
    model = Blip3(cfg).eval()
    assert model.lang_model.head_bias is not None
    nn.init.normal_(model.lang_model.head_bias)
    return model, Processor(cfg, tokenizer)


@pytest.fixture
def release(released: tuple[Blip3, Processor], tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of an interleave release, written from ours."""
    model, processor = released
    monkeypatch.setattr(tool, "xgen_mm_config", lambda kind: model.cfg)
    # what bf16 files can hold
    save_model(tmp_path / "ours", model.bfloat16(), processor)
    arguments = [str(tmp_path / "ours"), str(tmp_path / "release"), "--to", "xgen-mm", "--kind", "interleave"]
    assert tool.main(arguments) == 0
    return tmp_path / "release"


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A Llama folder of Hugging Face, and the tensors that Phi-3 has in their place."""
    cfg = Phi3Config(vocab_size=11, width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=5)
    model = Phi3(cfg)
    phi3_lite.save_huggingface(tmp_path / "llama", model)
    held = load_file(tmp_path / "llama" / "model.safetensors")
    expected = dict(held)
    layer = "model.layers.0."
    q, k, v = held.pop(layer + "self_attn.qkv_proj.weight").split([8, 4, 4])
    gate, up = held.pop(layer + "mlp.gate_up_proj.weight").chunk(2)
    apart = {"self_attn.q": q, "self_attn.k": k, "self_attn.v": v, "mlp.gate": gate, "mlp.up": up}
    held |= {f"{layer}{name}_proj.weight": tensor.clone() for name, tensor in apart.items()}
    save_file(held, tmp_path / "llama" / "model.safetensors")
    _change_json(tmp_path / "llama" / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    return tmp_path / "llama", expected


def _change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_equal(got: nn.Module, expected: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Compare all tensors bit for bit, after rounding what is expected to `dtype`."""
    held, wanted = got.state_dict(), expected.state_dict()
    assert held.keys() == wanted.keys()
    for name, tensor in held.items():
        assert tensor.dtype == dtype, name
        assert tensor.equal(wanted[name].to(dtype)), name


def test_a_llama_folder_becomes_phi3s_with_fused_matrices(tool, llama, tmp_path: Path) -> None:
    folder, expected = llama
    assert tool.main([str(folder), str(tmp_path / "out"), "--to", "hf", "--max-shard-gb", "5e-7"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "phi3"
    shards = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(shards) > 1
    held = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert held.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in held.items())


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tool, write_gguf, gguf_metadata, tmp_path: Path) -> None:
    metadata = gguf_metadata("llama", width=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=5, norm_eps=1e-5)
    metadata["llama.context_length"] = 16
    shapes = {"token_embd": (len(metadata["tokenizer.ggml.tokens"]), 8), "output_norm": (8,)}
    block = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "ffn_up": (5, 8), "ffn_gate": (5, 8)}
    block |= {"attn_norm": (8,), "ffn_norm": (8,), "attn_output": (8, 8), "ffn_down": (8, 5)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    path = write_gguf(metadata, {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    assert tool.main([str(path), str(tmp_path / "out"), "--to", "hf", "--dtype", "bfloat16"]) == 0
    before, after = load_lm(path), load_lm(tmp_path / "out")
    assert_equal(after.model, before.model, torch.bfloat16)
    assert before.tokenizer is not None
    assert after.tokenizer is not None
    assert after.tokenizer.encode("hello 12") == before.tokenizer.encode("hello 12")
    assert after.generation.stop_ids == before.generation.stop_ids


def test_what_is_left_random_is_said(tool, llama, refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, expected = llama
    held = load_file(folder / "model.safetensors")
    del held["lm_head.weight"], held["model.norm.weight"]
    save_file(held, folder / "model.safetensors")
    error = refused(folder, tmp_path / "out", "--to", "hf", "--allow-missing", "lm_head.*")
    assert "missing (1): model.norm.weight" in error
    arguments = [str(folder), str(tmp_path / "out"), "--to", "hf", "--allow-missing", "lm_head.*"]
    assert tool.main([*arguments, "--allow-missing", "model.norm.weight"]) == 0
    assert "left random" in (error := capsys.readouterr().err)
    assert "model.norm.weight, lm_head.weight" in error
    drawn = load_file(tmp_path / "out" / "model.safetensors")
    assert drawn["model.norm.weight"].equal(torch.ones(8))
    assert drawn["model.embed_tokens.weight"].equal(expected["model.embed_tokens.weight"])


def test_siglip_goes_out_with_what_it_came_with(tool, siglip_sentencepiece, tmp_path: Path, capsys) -> None:
    tokenizer = SiglipTokenizer(siglip_sentencepiece, max_tokens=5)
    pair, vision, text = Siglip(SiglipConfig(vision=VISION, text=TEXT)), SiglipVision(VISION), SiglipText(TEXT)
    siglip_lite.save_huggingface(tmp_path / "pair", pair, tokenizer=tokenizer)
    siglip_lite.save_huggingface(tmp_path / "vision", vision)
    siglip_lite.save_huggingface(tmp_path / "text", text)
    for name in ("pair", "vision", "text"):
        assert tool.main([str(tmp_path / name), str(tmp_path / f"{name}-out"), "--to", "hf"]) == 0
    assert_equal(load_siglip(tmp_path / "pair-out"), pair)
    assert_equal(load_siglip_vision(tmp_path / "vision-out"), vision)
    assert_equal(load_siglip_text(tmp_path / "text-out"), text)
    assert SiglipTokenizer.from_folder(tmp_path / "pair-out").encode("a cat") == tokenizer.encode("a cat")
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'text-out'}: without a tokenizer: {tmp_path / 'text'} has no spiece.model"
    ]


def test_a_release_comes_back_from_ours_bit_for_bit(tool, release: Path, tmp_path: Path) -> None:
    """(T24)"""
    assert tool.main([str(release), str(tmp_path / "again"), "--to", "ours"]) == 0
    before, after = load_model(tmp_path / "ours"), load_model(tmp_path / "again")
    assert_equal(after.model, before.model, torch.bfloat16)
    assert after.config.model == before.config.model
    opened = open_model(release)
    assert isinstance(opened.model, Blip3)
    assert_equal(opened.model, before.model, torch.bfloat16)
    arguments = [str(tmp_path / "again"), str(tmp_path / "back"), "--to", "xgen-mm", "--kind", "interleave"]
    assert tool.main(arguments) == 0
    files = [folder / "model.safetensors" for folder in (release, tmp_path / "back")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_only_the_released_model_goes_to_xgen_mm(ours: Path, refused, tmp_path: Path) -> None:
    error = refused(ours, tmp_path / "out", "--to", "xgen-mm", "--kind", "dpo")
    assert "connector.depth 2 instead of 6" in error


def test_missing_tensors_of_a_release_are_drawn_and_the_others_kept(tool, release, tmp_path, capsys) -> None:
    held = load_file(release / "model.safetensors")
    for name in ("vlm.vision_tokenizer.latents", "vlm.lang_model.model.norm.weight"):
        del held[name]
    save_file(held, release / "model.safetensors")
    arguments = [str(release), str(tmp_path / "again"), "--to", "ours", "--dtype", "float32"]
    assert tool.main([*arguments, "--allow-missing", "*latents", "--allow-missing", "lang_model.model.norm.*"]) == 0
    assert "(2): vision_tokenizer.latents, lang_model.model.norm.weight" in capsys.readouterr().err
    before, after = (load_model(tmp_path / name).model.state_dict() for name in ("ours", "again"))
    drawn = {"vision_tokenizer.latents", "lang_model.model.norm.weight"}
    assert all(tensor.equal(before[name].float()) for name, tensor in after.items() if name not in drawn)
    assert after["lang_model.model.norm.weight"].equal(torch.ones(24))
    assert 0.5 < after["vision_tokenizer.latents"].std() < 1.5


def test_a_trainers_file_becomes_ours_with_consent_and_a_tower(tool, released, refused, tmp_path: Path) -> None:
    model, processor = released
    siglip_lite.save_huggingface(tmp_path / "siglip", model.vision_encoder)
    held = {tensor.name: tensor.make() for tensor in xgen_mm.xgen_mm_tensors(model, torch.float32)}
    state = {k.replace("vlm.", "module.", 1): v for k, v in held.items() if ".vision_encoder." not in k}
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "trained.pt")
    processor.save_tokenizer(tmp_path / "tokenizer.json")
    arguments = [tmp_path / "trained.pt", tmp_path / "out", "--to", "ours", "--kind", "base"]
    assert "expected safetensors, got a pickle" in refused(*arguments, "--vision", tmp_path / "siglip")
    assert "missing (" in refused(*arguments, "--allow-pickle")
    assert tool.main([*map(str, arguments), "--allow-pickle", "--vision", str(tmp_path / "siglip")]) == 0
    assert_equal(load_model(tmp_path / "out").model, model)


def test_adapters_are_merged_before_the_result_is_rounded(tool, adapted: Path, tmp_path: Path) -> None:
    for name, more in (("merged", []), ("rounded", ["--dtype", "float16"])):
        assert tool.main([str(adapted), str(tmp_path / name), "--to", "ours", "--merge", *more]) == 0
    before = load_model(adapted).model
    layer = before.lang_model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, lora_lite.LoraLinear)
    by_hand = layer.weight + 3.0 / 2 * (layer.lora_b @ layer.lora_a)
    lora_lite.merge_and_remove(before.lang_model)
    merged = load_model(tmp_path / "merged")
    assert merged.config.lora is None
    assert_equal(merged.model, before)
    assert merged.model.lang_model.state_dict()["model.layers.1.mlp.down_proj.weight"].equal(by_hand)
    assert_equal(load_model(tmp_path / "rounded").model, before, torch.float16)


def test_adapters_alone_fit_the_merged_models_base(tool, adapted: Path, tiny_config, tmp_path: Path) -> None:
    assert tool.main([str(adapted), str(tmp_path / "out"), "--to", "peft"]) == 0
    expected = lora_lite.lora_state_dict(load_model(adapted).model.lang_model)
    bare = Phi3(tiny_config.lm)
    lora_lite.load_peft(bare, tmp_path / "out")
    held = lora_lite.lora_state_dict(bare)
    assert held.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in held.items())


def test_parts_go_out_alone(tool, adapted: Path, refused, tmp_path: Path) -> None:
    error = refused(adapted, tmp_path / "out", "--to", "hf", "--part", "language")
    assert "expected no adapters beside the weights" in error
    assert tool.main([str(adapted), str(tmp_path / "vision"), "--to", "hf", "--part", "vision"]) == 0
    assert tool.main([str(adapted), str(tmp_path / "lm"), "--to", "hf", "--part", "language", "--merge"]) == 0
    loaded = load_model(adapted)
    lora_lite.merge_and_remove(loaded.model.lang_model)
    assert_equal(load_siglip_vision(tmp_path / "vision"), loaded.model.vision_encoder)
    lm = load_lm(tmp_path / "lm")
    assert_equal(lm.model, loaded.model.lang_model)
    assert lm.chat is not None
    assert lm.generation.stop_ids == loaded.processor.stop_ids
    turns = [("user", ["what?"])]
    assert lm.chat.encode(turns, is_prompt=True) == loaded.processor.template.encode(turns, is_prompt=True)


def test_ours_in_another_dtype_keeps_its_adapters_apart_in_fp32(tool, adapted: Path, tmp_path: Path) -> None:
    assert tool.main([str(adapted), str(tmp_path / "half"), "--to", "ours", "--dtype", "bfloat16"]) == 0
    before = load_model(adapted).model.state_dict()
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        dtype = torch.float32 if "lora_" in name else torch.bfloat16
        assert tensor.dtype == dtype
        assert tensor.equal(before[name].to(dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "peft"], "--to peft: expected a checkpoint with adapters"),
        (["--to", "ours"], "expected --merge or --dtype"),
        (["--to", "ours", "--merge"], "--merge: expected a checkpoint with adapters"),
        (["--to", "hf"], "--part: expected one when ours goes to hf, got none"),
        (["--to", "xgen-mm"], "--kind: expected one"),
        (
            ["--to", "peft", "--dtype", "float32"],
            "--dtype: expected none when ours goes to peft, got one; leave it out",
        ),
        (["--to", "ours", "--dtype", "float32", "--allow-missing", "x"], "--allow-missing: expected none"),
        (["--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
        (["--to", "hf", "--max-shard-gb", "-1"], "expected a positive number, got -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(ours: Path, refused, tmp_path, arguments, message) -> None:
    assert message in refused(ours, tmp_path / "out", *arguments)


def test_a_way_that_there_is_not_is_refused_with_those_that_there_are(llama, refused, tmp_path: Path) -> None:
    error = refused(llama[0], tmp_path / "out", "--to", "xgen-mm", "--kind", "base")
    assert "got language model to xgen-mm; there are language model to hf; SigLIP to hf; xGen-MM to ours;" in error


def test_sources_are_told_by_what_they_hold(tool, refused, ours: Path, tmp_path: Path) -> None:
    assert tool.source_format(ours) == "ours"
    for name, files in {
        "SigLIP": {"open_clip_config.json": "{}"},
        "xGen-MM": {"config.json": '{"model_type": "xgenmm"}'},
        "language model": {"config.json": '{"model_type": "gpt2"}'},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        assert tool.source_format(tmp_path / name) == name
    assert "gpt2" in refused(tmp_path / "language model", tmp_path / "out", "--to", "hf")
    assert "got nothing there" in refused(tmp_path / "none", tmp_path / "out", "--to", "hf")
    (tmp_path / "SigLIP" / "adapter_config.json").write_text("{}")
    assert "got adapters alone" in refused(tmp_path / "SigLIP", tmp_path / "out", "--to", "hf")
    (tmp_path / "xGen-MM" / "config.json").write_text("{")
    assert "expected JSON" in refused(tmp_path / "xGen-MM", tmp_path / "out", "--to", "ours")
    assert "got another file" in refused(ours / "config.json", tmp_path / "out", "--to", "ours")


def test_a_damaged_checkpoint_of_ours_is_refused(ours: Path, refused, tmp_path: Path) -> None:
    weights = (ours / "model.safetensors").read_bytes()
    (ours / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert "damaged" in refused(ours, tmp_path / "out", "--to", "ours", "--dtype", "float16")


def test_nothing_is_written_over(ours: Path, refused, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in ours.iterdir()}
    assert "expected nothing there or an empty folder" in refused(ours, ours, "--to", "ours", "--dtype", "float16")
    assert "expected nothing there" in refused(ours, ours / "config.json", "--to", "ours", "--dtype", "float16")
    assert {file.name: file.read_bytes() for file in ours.iterdir()} == before


def test_a_typing_error_is_told_without_importing_torch(repo_root: Path) -> None:
    code = (
        "import sys, convert\ntry:\n    convert.main(['x', '--to', 'hf'])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root / "tools", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")
