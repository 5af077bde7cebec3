"""GGUF models against transformers: tiny files of every type, and SmolLM2-135M-Instruct where it was fetched."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from jinja2 import Environment
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM
from transformers import Phi3Config as HFPhi3Config
from transformers.integrations.gguf.dequant import dequantize as their_dequantize

from phi3_lite import ChatTemplate, Phi3, SamplingConfig, collect, generate
from phi3_lite.formats.gguf import GGUFModel, read_gguf
from weight_files import load_tensors, unique_tensors

# rows of 256 numbers, the block of the K types
WIDTH, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, MAX_POSITIONS, ORIGINAL = 256, 4, 2, 2, 64, 16
SIZES = {
    "width": WIDTH, "num_layers": NUM_LAYERS, "num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "mlp_width": 256,
    "max_positions": MAX_POSITIONS, "norm_eps": 1e-5, "rope_theta": 500.0,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
SMOLLM2 = Path(__file__).resolve().parents[2] / "runs" / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows as llama.cpp's converter does (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _unpermuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    # apply the permutation to the row numbers and see where each one went
    order = _permuted(np.arange(weight.shape[0])[:, None], num_heads)[:, 0]
    undone = np.empty_like(weight)
    undone[order] = weight
    return undone


def _heads(name: str) -> int | None:
    return {"attn_q": NUM_HEADS, "attn_k": NUM_KV_HEADS}.get(name)


def _quantised(weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks of a weight, and the numbers in them as transformers reads them."""
    try:
        raw = gguf.quantize(weight, kind)
    except NotImplementedError:
        # no quantiser for the K types: blocks of random bits, with scales that keep the numbers small
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(weight.size).integers(
            0, 256, (weight.shape[0], weight.shape[1] // 256, block_bytes), dtype=np.uint8
        )
        halves, scale = ([0, 2], 2e-4) if kind == gguf.GGMLQuantizationType.Q4_K else ([block_bytes - 2], 4e-5)
        for at in halves:
            blocks[..., at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
        raw = blocks.reshape(weight.shape[0], -1)
    if raw.dtype != np.uint8:
        return raw, raw.astype(np.float32)
    if kind == gguf.GGMLQuantizationType.BF16:
        return raw, torch.from_numpy(raw).view(torch.bfloat16).float().numpy()
    return raw, their_dequantize(torch.from_numpy(raw), int(kind)).float().view(weight.shape).numpy()


def _their_model(
    arch: str, vocab_size: int, *, is_tied: bool, rope: dict | None = None
) -> LlamaForCausalLM | Phi3ForCausalLM:
    sizes = {
        "vocab_size": vocab_size, "hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS, "intermediate_size": 256,
        "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-5, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0} | (rope or {}), "tie_word_embeddings": is_tied,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
    }  # fmt: skip
    if arch == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        model = Phi3ForCausalLM(HFPhi3Config(**sizes, sliding_window=7, original_max_position_embeddings=ORIGINAL))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model.eval()


def _as_gguf(model, kind: gguf.GGMLQuantizationType) -> dict:
    """Return the tensors of a file; the model's weights become what is in it."""
    tensors: dict = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            parts = name.removesuffix(".weight").split(".", 3)
            if parts[0] == "lm_head":
                theirs = "output"
            elif parts[1] != "layers":
                theirs = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]]
            else:
                theirs = f"blk.{parts[2]}.{NAMES[parts[3]]}"
            array, num_heads = weight.numpy().copy(), _heads(theirs.split(".")[-1])
            if weight.ndim == 1:
                tensors[f"{theirs}.weight"] = array
                continue
            raw, values = _quantised(array if num_heads is None else _permuted(array, num_heads), kind)
            tensors[f"{theirs}.weight"] = raw if raw.dtype != np.uint8 else (raw, kind)
            weight.copy_(torch.from_numpy(values if num_heads is None else _unpermuted(values, num_heads)))
    return tensors


def _load(found: GGUFModel) -> Phi3:
    with torch.device("meta"):
        model = Phi3(found.config)
    model.to_empty(device="cpu")
    load_tensors(found.source, unique_tensors(model), found.recipes, ignored=found.ignored)
    return model.eval()


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", kind) for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")]
    + [("phi3", "F32"), ("phi3", "Q8_0"), ("phi3", "Q4_K")],
)
def test_logits_equal_transformers_on_the_dequantised_weights(arch, kind, write_gguf, gguf_metadata) -> None:
    metadata = gguf_metadata(arch, **SIZES, **({"sliding_window": 7} if arch == "phi3" else {}))
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    theirs = _their_model(arch, vocab_size, is_tied=kind == "Q8_0")
    found = read_gguf(write_gguf(metadata, _as_gguf(theirs, gguf.GGMLQuantizationType[kind])))
    assert found.config.is_head_tied == (kind == "Q8_0")
    ours = _load(found)
    ids = torch.randint(0, vocab_size, (13,))
    with torch.no_grad():
        # in fp64: its own rounding in fp32 is several times ours, 1.4e-5 with weights as large as Q4_K's
        expected = theirs.double()(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids))).double(), expected, rtol=0, atol=5e-6)
    assert expected.std() > 0.05


@pytest.mark.parametrize("num_tokens", [11, 37])
def test_long_and_short_rope_factors_equal_transformers(num_tokens: int, write_gguf, gguf_metadata) -> None:
    short, long = (np.linspace(1, end, 32).astype(np.float32) for end in (1.5, 9))
    rope = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist()}
    metadata = gguf_metadata("phi3", **SIZES, sliding_window=7)
    metadata["phi3.rope.scaling.original_context_length"] = ORIGINAL
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    theirs = _their_model("phi3", vocab_size, is_tied=False, rope=rope)
    tensors = _as_gguf(theirs, gguf.GGMLQuantizationType.F32)
    tensors |= {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    ours = _load(read_gguf(write_gguf(metadata, tensors)))
    ids = torch.randint(0, vocab_size, (num_tokens,))
    with torch.no_grad():
        expected = theirs(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids))), expected, rtol=0, atol=1e-5)


def test_one_set_of_rope_factors_equals_llama3s_scaling_of_transformers(write_gguf, gguf_metadata) -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    metadata = gguf_metadata("llama", **SIZES)
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    theirs = _their_model("llama", vocab_size, is_tied=False, rope=rope)
    frequencies = 500.0 ** (-torch.arange(0, 64, 2) / 64)
    factors = (frequencies / theirs.model.rotary_emb.inv_freq).float().numpy()
    assert (factors.min(), factors.max()) == (pytest.approx(1.0), pytest.approx(8.0))
    tensors = _as_gguf(theirs, gguf.GGMLQuantizationType.F32) | {"rope_freqs.weight": factors}
    ours = _load(read_gguf(write_gguf(metadata, tensors)))
    ids = torch.randint(0, vocab_size, (41,))
    with torch.no_grad():
        expected = theirs(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids))), expected, rtol=0, atol=1e-5)


PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers.",
    "def add(a, b):",
    "Why is the sky blue?",
]


@pytest.fixture(scope="module")
def smollm2() -> GGUFModel:
    """The published file, as tools/fetch_smollm2.py leaves it."""
    if not SMOLLM2.is_file():
        pytest.skip("no SmolLM2: expected runs/downloads/…gguf; run tools/fetch_smollm2.py")
    return read_gguf(SMOLLM2)


def _template_ids(found: GGUFModel, tokenizer, messages: list[dict], *, is_prompt: bool) -> list[int]:
    """Render with the file's own template, tokenise with transformers' tokenizer."""
    program = Environment().from_string(str(found.source.metadata["tokenizer.chat_template"]))
    return tokenizer(program.render(messages=messages, add_generation_prompt=is_prompt)).input_ids


def test_smollm2_chats_have_the_ids_of_its_template_and_tokenizer(smollm2: GGUFModel) -> None:
    metadata = smollm2.source.metadata
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    theirs = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        extra_special_tokens=[token for token, kind in zip(tokens, types, strict=True) if kind == 3],
    )
    assert smollm2.chat == "chatml"
    template = ChatTemplate(smollm2.tokenizer, kind=smollm2.chat)
    turns = [
        ("system", "Be brief.\n\n  Really."),
        ("user", "\n\n What's 12 + 345 in naïve Python 3.11?\t🐩"),
        ("assistant", "  It's 357!\n"),
        ("user", "Thanks"),
    ]
    for start in (0, 1):
        chat = turns[start:]
        messages = [{"role": role, "content": text} for role, text in chat]
        for is_prompt in (False, True):
            ids = template.encode([(role, [text]) for role, text in chat], is_prompt=is_prompt).ids
            assert ids == _template_ids(smollm2, theirs, messages, is_prompt=is_prompt)
    # GPT-2's tokenizer does not set digits apart first, which shows only between two spaces and a digit
    assert [smollm2.tokenizer.token_bytes(token) for token in smollm2.tokenizer.encode("a  1")] == [b"a", b"  ", b"1"]


@pytest.mark.parametrize("num_tokens", [6, pytest.param(64, marks=pytest.mark.nightly)])
def test_smollm2_greedy_tokens_equal_transformers_for_five_prompts(num_tokens: int, smollm2: GGUFModel) -> None:
    ours, cfg, source = _load(smollm2), smollm2.config, smollm2.source
    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, intermediate_size=cfg.mlp_width,
        max_position_embeddings=cfg.max_positions, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    state = {
        "model.embed_tokens.weight": source.read("token_embd.weight"),
        "model.norm.weight": source.read("output_norm.weight"),
    }
    for index in range(cfg.num_layers):
        for name, theirs in NAMES.items():
            if f"blk.{index}.{theirs}.weight" in source.tensors and name != "mlp.gate_up_proj":
                weight = source.read(f"blk.{index}.{theirs}.weight")
                if theirs in ("attn_q", "attn_k"):
                    weight = torch.from_numpy(_unpermuted(weight.numpy(), weight.shape[0] // cfg.head_dim))
                state[f"model.layers.{index}.{name}.weight"] = weight
    theirs = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    template = ChatTemplate(smollm2.tokenizer, kind="chatml")
    prompts = [template.encode([("user", [text])], is_prompt=True).ids for text in PROMPTS]
    bounds = torch.tensor([0, *map(len, prompts)]).cumsum(0).int()
    inputs = ours.embed(torch.tensor([token for prompt in prompts for token in prompt]))
    answers = collect(generate(ours, inputs, bounds, SamplingConfig(max_new_tokens=num_tokens)))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == num_tokens
        # greedy choice, all steps in one pass: given that every token before was the best, each is the best
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        assert logits.argmax(dim=-1).tolist() == answer
    assert "Paris" in smollm2.tokenizer.decode(answers[0])
