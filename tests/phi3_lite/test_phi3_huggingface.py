"""Hugging Face folders: round trips, what is refused, and what loading costs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from phi3_lite import (
    ChatTemplate,
    GenerationDefaults,
    HFTokenizer,
    LongRope,
    Phi3,
    Phi3Config,
    SamplingConfig,
    SentencePieceTokenizer,
    load_lm,
    mini_4k,
    mini_128k,
    phi4_mini,
    quantise_linears,
    save_huggingface,
    train_tokenizer,
)
from phi3_lite.formats.huggingface_config import read_config, read_generation, write_config
from weight_files import WeightsError

TINY = Phi3Config(vocab_size=320, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, sliding_window=5)
FACTORS = LongRope(short_factors=(1.0,) * 48, long_factors=(2.5,) * 48)


def _model(**changes: Any) -> Phi3:
    return Phi3(msgspec.structs.replace(TINY, **changes), generator=torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder: several shards, tokenizer, generation config."""
    path = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(["what is left?", "a blue circle"] * 9, vocab_size=300)
    chat = ChatTemplate(tokenizer)
    generation = GenerationDefaults(
        stop_ids=(chat.end_of_text_id,), sampling=SamplingConfig(temperature=0.5, repetition_penalty=1.2)
    )
    save_huggingface(path, _model(), tokenizer, generation=generation, chat=chat, max_shard_bytes=20_000)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "lm"))


def _change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Put all tensors into one file, changed."""
    tensors = {name: x for shard in folder.glob("*.safetensors") for name, x in load_file(shard).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_head_tied", [False, True])
def test_logits_of_a_reloaded_model_are_bit_equal_in_its_own_dtype(
    tmp_path: Path, dtype: torch.dtype, is_head_tied: bool
) -> None:
    model = _model(is_head_tied=is_head_tied).to(dtype)
    save_huggingface(tmp_path / "lm", model)
    again = load_lm(tmp_path / "lm").model
    assert again.cfg == model.cfg
    assert {weight.dtype for weight in again.parameters()} == {dtype}
    assert again.state_dict().keys() == model.state_dict().keys()
    ids = torch.arange(11)
    assert torch.equal(again.logits(again(again.embed(ids))), model.logits(model(model.embed(ids))))


def test_everything_beside_the_weights_comes_back(folder: Path) -> None:
    loaded = load_lm(folder)
    assert loaded.chat is not None
    assert loaded.tokenizer is not None
    # the published stop id first, then the chat format's other one
    assert loaded.generation.stop_ids == (loaded.chat.end_of_text_id, loaded.chat.end_id)
    assert loaded.generation.sampling == SamplingConfig(temperature=0.5, repetition_penalty=1.2)
    assert loaded.tokenizer.encode("a blue <|end|>") == HFTokenizer.from_file(folder / "tokenizer.json").encode(
        "a blue <|end|>"
    )
    assert not loaded.model.training
    assert loaded.left_random == ()


def test_dtype_and_progress_are_as_asked(folder: Path) -> None:
    names: list[str] = []
    model = load_lm(folder, dtype=torch.bfloat16, on_tensor=names.append).model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert sorted(names) == sorted(model.state_dict())
    expected = {name: weight.bfloat16() for name, weight in _model().state_dict().items()}
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


class _Memory(TorchDispatchMode):
    """The most bytes of CPU tensors that were alive at once, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, Tensor) and made.device.type == "cpu":
                self._held[StorageWeakRef(made.untyped_storage())] = made.untyped_storage().nbytes()
        self._held = {storage: size for storage, size in self._held.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._held.values()))
        return result


@pytest.mark.parametrize("arch", ["phi3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_makes_no_more_than_the_model_and_its_largest_tensor(
    folder: Path, dtype: torch.dtype, arch: str
) -> None:
    if arch == "llama":
        _as_llama(folder)
    with _Memory() as memory:
        model = load_lm(folder, dtype=dtype).model
    sizes = [weight.numel() for weight in model.parameters()]
    assert memory.peak >= sum(sizes) * dtype.itemsize
    assert memory.peak <= sum(sizes) * dtype.itemsize + max(sizes) * 4


def _as_llama(folder: Path) -> None:
    """Write the folder as a llama's: q, k, v and gate, up apart."""

    def split(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            sizes, parts = ((16, 8, 8), "qkv") if "qkv_proj" in name else ((20, 20), ("gate", "up"))
            if "qkv_proj" in name or "gate_up_proj" in name:
                for part, rows in zip(parts, tensors.pop(name).split(sizes), strict=True):
                    tensors[name.replace("qkv", part).replace("gate_up", part)] = rows.contiguous()

    _change_tensors(folder, split)
    _change_json(folder / "config.json", model_type="llama", sliding_window=None, hidden_act="silu")


def test_a_llama_folder_gives_the_same_model(folder: Path) -> None:
    _as_llama(folder)
    model = load_lm(folder).model
    assert model.cfg.sliding_window is None
    assert all(torch.equal(weight, _model().state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type: expected phi3 or llama, got 'qwen2'"),
        ({"model_type": None}, "model_type: expected phi3 or llama, got None"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected none, got {'bits': 4}"),
        ({"head_dim": 8}, r"head_dim: expected hidden_size / num_attention_heads \(16 / 4\), got 8"),
        ({"num_attention_heads": 3}, "head_dim: expected hidden_size / num_attention_heads"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: expected .*longrope.*, got 'linear'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 1]}}, "expected short_factor and long_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "long_rope.short_factors: expected 2 numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1], "long_mscale": 1.2}},
            "long_mscale: expected none",
        ),
        ({"hidden_size": "16"}, "Expected `int`, got `str`.*hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers: expected a value above 0, got 0"),
        ({"num_hidden_layers": 3}, r"missing \(6\): model.layers.2.input_layernorm.weight"),
        ({"intermediate_size": 24}, r"model.layers.0.mlp.down_proj.weight: expected \[16, 24\], got \[16, 20\]"),
        ({"vocab_size": 200}, "tokenizer: expected at most 200 ids, .* got 2..; it is another model's"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_another_model_is_refused_by_name(folder: Path, changes: dict[str, object], message: str) -> None:
    _change_json(folder / "config.json", **changes)
    with pytest.raises(WeightsError, match=message):
        load_lm(folder)


def test_a_llama_with_scaled_or_partial_rotary_positions_is_refused() -> None:
    for changes, message in (
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: expected default, got 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1 for llama, got 0.5"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_config({"model_type": "llama", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 320}, r"eos_token_id: expected ids below 320, the rows of the head, got \[320\]"),
        ({"temperature": -1.0}, "generation_config.json: SamplingConfig.temperature"),
        ({"top_p": "x"}, "generation_config.json: Expected"),
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_be_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    _change_json(folder / "generation_config.json", **changes)
    with pytest.raises(WeightsError, match=message):
        load_lm(folder)


def test_stop_ids_and_sampling_follow_the_files() -> None:
    published = {"eos_token_id": [5, 7, 5], "do_sample": True, "top_p": 0.9, "top_k": 50}
    generation = read_generation({"eos_token_id": 3}, published)
    assert generation.stop_ids == (5, 7)
    assert generation.sampling == SamplingConfig(temperature=1.0, top_p=0.9)
    greedy = read_generation({"eos_token_id": 3}, {"temperature": 0.7, "do_sample": False})
    assert (greedy.stop_ids, greedy.sampling) == ((3,), SamplingConfig())
    assert read_generation({}, {}) == GenerationDefaults()


def test_missing_unexpected_and_misshaped_tensors_come_in_one_error(folder: Path) -> None:
    """(T24)"""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(32)
        tensors["lm_head.bias"] = torch.zeros(320)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(20, 16)

    _change_tensors(folder, change)
    with pytest.raises(WeightsError) as caught:
        load_lm(folder)
    message = str(caught.value)
    assert "nothing was loaded" in message
    assert "missing (1): model.norm.weight" in message
    assert "unexpected (2): lm_head.bias; model.layers.0.self_attn.qkv_proj.bias" in message
    assert "model.layers.1.mlp.down_proj.weight: expected [16, 20], got [20, 16]" in message


def test_missing_tensors_that_are_allowed_are_drawn_anew_and_named(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: [tensors.pop(name) for name in ("lm_head.weight", "model.norm.weight")])
    loaded = load_lm(folder, allow_missing=["lm_head.*", "model.norm.*"])
    assert loaded.left_random == ("model.norm.weight", "lm_head.weight")
    assert torch.equal(loaded.model.model.norm.weight, torch.ones(16))
    assert loaded.model.head_weight.std().item() == pytest.approx(TINY.init_std, rel=0.05)
    with pytest.raises(WeightsError, match=r"missing \(1\): model.norm.weight"):
        load_lm(folder, allow_missing=["lm_head.*"])


def test_half_downloaded_and_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(damage: Callable[[Path], object], message: str) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        damage(Path(shutil.copytree(folder, tmp_path / "copy")))
        with pytest.raises(WeightsError, match=message):
            load_lm(tmp_path / "copy")

    shard = min(file.name for file in folder.glob("*.safetensors"))
    refused(lambda copy: (copy / shard).unlink(), f"1 missing: {shard}; finish the download")
    cut = (folder / shard).read_bytes()[:-9]
    refused(lambda copy: (copy / shard).write_bytes(cut), f"whole safetensors files, got: {shard}")
    refused(lambda copy: (copy / "config.json").unlink(), "expected a folder with a config.json, got none")
    refused(lambda copy: (copy / "config.json").write_text('{"model_type":'), "config.json: expected a JSON object")
    refused(lambda copy: (copy / "config.json").write_text("[1]"), "config.json: expected a JSON object")
    refused(lambda copy: (copy / "tokenizer.json").unlink(), "expected tokenizer.json or tokenizer.model, got neither")
    refused(lambda copy: (copy / "tokenizer.json").write_text("{}"), "tokenizer.json: expected a tokenizer description")
    refused(lambda copy: [x.unlink() for x in copy.glob("*.safetensors*")], "got neither")

    def only_pickled(copy: Path) -> None:
        for file in copy.glob("*.safetensors*"):
            file.unlink()
        (copy / "pytorch_model.bin").write_bytes(b"")

    refused(only_pickled, "expected safetensors, got pickled .bin files")
    with pytest.raises(WeightsError, match="got none"):
        load_lm(tmp_path / "nowhere")


def test_a_tied_head_in_the_file_is_taken_only_if_it_is_the_embedding(tmp_path: Path) -> None:
    model = _model(is_head_tied=True)
    save_huggingface(tmp_path, model)
    embedding = model.head_weight.detach()
    _change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(load_lm(tmp_path).model.head_weight, embedding)
    _change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"][-1, -1].add_(1))
    with pytest.raises(WeightsError, match="expected the embedding's values"):
        load_lm(tmp_path)


def test_saving_refuses_what_the_format_has_no_place_for(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="has_head_bias: expected a head without bias"):
        save_huggingface(tmp_path / "new", _model(has_head_bias=True))
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_huggingface(folder, _model())
    wrapped = _model()
    wrapped.model.layers[0].get_submodule("mlp").register_parameter("lora_a", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"expected the tensors of a plain Phi-3, got .*layers.0.mlp.lora_a"):
        save_huggingface(tmp_path / "new", wrapped)
    with pytest.raises(WeightsError, match="tokenizer: expected at most 200 ids"):
        save_huggingface(tmp_path / "new", _model(vocab_size=200), HFTokenizer.from_file(folder / "tokenizer.json"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        mini_128k(FACTORS),
        phi4_mini(msgspec.structs.replace(FACTORS, attention_factor=1.19)),
        msgspec.structs.replace(TINY, is_head_tied=True, rope_theta=5e5, rotary_fraction=0.5, norm_eps=1e-6),
    ],
    ids=["plain", "128k", "phi4", "others"],
)
def test_a_config_comes_back_as_it_was(cfg: Phi3Config) -> None:
    published = json.loads(json.dumps(write_config(cfg, "bfloat16", (3, 4))))
    assert read_config(published) == (cfg, "phi3")


def test_values_that_a_config_leaves_out_are_those_of_transformers() -> None:
    assert read_config({"model_type": "phi3", "sliding_window": 2047})[0] == mini_4k()
    llama, arch = read_config({"model_type": "llama"})
    assert arch == "llama"
    assert (llama.vocab_size, llama.width, llama.mlp_width, llama.norm_eps) == (32_000, 4096, 11_008, 1e-6)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_the_first_releases_names_of_long_rope_are_known(kind: str) -> None:
    published = write_config(mini_128k(FACTORS), "bfloat16", ())
    published["rope_scaling"]["type"] = kind
    assert read_config(published)[0] == mini_128k(FACTORS)


def test_published_tokenizer_files_give_the_same_tokenizer_either_way(tmp_path: Path, shared_data: Path) -> None:
    data = shared_data / "tokenizers"
    shutil.copy(data / "llama-sentencepiece" / "tokenizer.model", tmp_path)
    shutil.copy(data / "phi-3-mini" / "tokenizer_config.json", tmp_path)
    cfg = msgspec.structs.replace(TINY, vocab_size=32_064, width=8, num_heads=1, num_kv_heads=1)
    model, expected = Phi3(cfg), HFTokenizer.from_file(data / "phi-3-mini" / "tokenizer.json")
    save_huggingface(tmp_path / "lm", model)
    text = "a <|end|> blue  circle\n"
    for file in tmp_path.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "lm")
    loaded = load_lm(tmp_path / "lm")
    assert isinstance(loaded.tokenizer, SentencePieceTokenizer)
    assert loaded.chat is not None
    assert loaded.generation.stop_ids == (32_007, 32_000)
    # written and read once more
    save_huggingface(tmp_path / "again", model, loaded.tokenizer, generation=loaded.generation, chat=loaded.chat)
    for tokenizer in (loaded.tokenizer, load_lm(tmp_path / "again").tokenizer):
        assert tokenizer is not None
        assert tokenizer.control_ids == expected.control_ids
        assert tokenizer.strips_right == expected.strips_right
        assert tokenizer.encode(text) == expected.encode(text)
    # published chats have no BOS
    assert loaded.chat.encode([("user", ["hi"])]).ids[0] == 32_010


@pytest.mark.parametrize("is_in_file", [False, True])
def test_a_chat_begins_with_bos_where_the_published_template_does(tmp_path: Path, is_in_file: bool) -> None:
    names = ("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    tokenizer = train_tokenizer(["a"], vocab_size=300, control_tokens=names)
    chat = ChatTemplate(tokenizer, has_bos=True)
    save_huggingface(tmp_path, _model(), tokenizer, chat=chat)
    if is_in_file:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "chat_template.jinja").write_text(config.pop("chat_template"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = load_lm(tmp_path).chat
    assert again is not None
    assert again.encode([("user", ["a"])]).ids == chat.encode([("user", ["a"])]).ids
    assert again.encode([("user", ["a"])]).ids[0] == tokenizer.token_id("<s>")


@pytest.mark.parametrize("arch", ["phi3", "llama"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_load_that_quantises_gives_what_quantising_a_loaded_model_gives(folder: Path, kind: Any, arch: str) -> None:
    if arch == "llama":
        _as_llama(folder)
    expected = load_lm(folder).model
    quantise_linears(expected, kind)
    model = load_lm(folder, quantize=kind).model
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    ids = torch.arange(9)
    hidden = model(model.embed(ids))
    assert torch.equal(model.logits(hidden), expected.logits(expected(expected.embed(ids))))
    with pytest.raises(ValueError, match="save before quantising"):
        save_huggingface(folder.parent / "new", model)


def test_a_quantised_matrix_that_is_missing_cannot_be_drawn(folder: Path) -> None:
    _change_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "qkv" in name])
    with pytest.raises(WeightsError, match=r"expected plain tensors to draw anew, got quantised: .*qkv_proj.weight"):
        load_lm(folder, quantize="int4", allow_missing=["*qkv*"])
