"""Hugging Face folders of Phi-3 against transformers: each side loads what the other saved. Tiny random weights."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3ForCausalLM,
)
from transformers import Phi3Config as HFConfig

from phi3_lite import (
    ChatTemplate,
    GenerationDefaults,
    LongRope,
    Phi3,
    Phi3Config,
    SamplingConfig,
    collect,
    generate,
    load_lm,
    save_huggingface,
    train_tokenizer,
)

BORDER = 8
MINI_4K = Phi3Config(
    vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=4, mlp_width=44, sliding_window=5, init_std=0.25,
    max_positions=BORDER * 8,
)  # fmt: skip
MINI_128K = msgspec.structs.replace(
    MINI_4K,
    sliding_window=999,
    long_rope=LongRope(
        short_factors=(1.0, 1.1, 1.3, 1.9), long_factors=(1.5, 3.0, 7.0, 20.0), original_max_positions=BORDER
    ),
)
PHI4_MINI = msgspec.structs.replace(
    MINI_128K,
    num_kv_heads=2,
    rotary_fraction=0.75,
    is_head_tied=True,
    long_rope=LongRope(short_factors=(1.0, 1.0, 1.0), long_factors=(1.0, 3.0, 9.0), original_max_positions=BORDER),
)
VARIANTS = {
    "mini-4k": MINI_4K,
    "mini-128k": MINI_128K,
    "given scale": msgspec.structs.replace(
        MINI_128K, long_rope=msgspec.structs.replace(MINI_128K.long_rope, attention_factor=1.7)
    ),
    "phi4-mini": PHI4_MINI,
}
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 44, "max_position_embeddings": 64, "initializer_range": 0.25, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 5.0, 9.0],
}  # fmt: skip
THEIRS = {
    "mini-4k": lambda: Phi3ForCausalLM(HFConfig(**SIZES, sliding_window=5)),
    "phi4-mini": lambda: Phi3ForCausalLM(
        HFConfig(
            **SIZES,
            original_max_position_embeddings=BORDER,
            tie_word_embeddings=True,
            rope_parameters=LONG_ROPE | {"partial_rotary_factor": 0.75},
        )
    ),
    "given factor": lambda: Phi3ForCausalLM(
        HFConfig(
            **SIZES,
            original_max_position_embeddings=BORDER,
            rope_parameters=LONG_ROPE | {"partial_rotary_factor": 0.75, "factor": 5.0},
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-4)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
}


def _model(cfg: Phi3Config) -> Phi3:
    model = Phi3(cfg, generator=torch.Generator().manual_seed(1)).eval()
    _spread_norms(model)
    return model


def _spread_norms(model: torch.nn.Module) -> None:
    # norm weights other than 1 and than each other, or a forgotten or exchanged one would not show
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
def _assert_same_logits(ours: Phi3, theirs: torch.nn.Module) -> None:
    for length in (1, BORDER, BORDER + 1, BORDER + 9):
        ids = torch.randint(3, ours.cfg.vocab_size, (length,))
        expected = theirs(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(ours.logits(ours(ours.embed(ids))), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_our_export_and_agrees(variant: str, tmp_path: Path) -> None:
    model = _model(VARIANTS[variant])
    save_huggingface(tmp_path / "out", model, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs) is Phi3ForCausalLM
    _assert_same_logits(model, theirs.eval())


@pytest.mark.parametrize("variant", THEIRS)
def test_we_load_what_transformers_saved_and_agree(variant: str, tmp_path: Path) -> None:
    theirs = THEIRS[variant]().eval()
    _spread_norms(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_lm(tmp_path)
    assert loaded.tokenizer is None
    assert loaded.generation.stop_ids == (2,)
    _assert_same_logits(loaded.model, theirs)


def test_an_imported_llama_is_exported_as_a_phi3(tmp_path: Path) -> None:
    theirs = THEIRS["llama"]().eval()
    theirs.save_pretrained(tmp_path / "llama")
    save_huggingface(tmp_path / "phi3", load_lm(tmp_path / "llama").model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "phi3", attn_implementation="eager").eval()
    _assert_same_logits(load_lm(tmp_path / "phi3").model, theirs)
    _assert_same_logits(load_lm(tmp_path / "phi3").model, again)


@pytest.mark.parametrize("length", [BORDER - 3, BORDER, BORDER + 2])
@pytest.mark.parametrize("variant", ["mini-128k", "phi4-mini"])
def test_greedy_tokens_across_the_original_window_equal_transformers(variant: str, length: int, tmp_path: Path) -> None:
    model = _model(VARIANTS[variant])
    save_huggingface(tmp_path / "out", model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids = torch.randint(3, 61, (length,))
    bounds = torch.tensor([0, length], dtype=torch.int32)
    (tokens,) = collect(generate(model, model.embed(ids), bounds, SamplingConfig(max_new_tokens=24)))
    expected = theirs.generate(
        input_ids=ids[None], attention_mask=torch.ones(1, length, dtype=torch.long), max_new_tokens=24,
        min_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert tokens == expected[0, length:].tolist()


def test_transformers_reads_our_dtype_and_generation_config(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["what is left of the red square?", "a blue circle"] * 9, vocab_size=300)
    chat = ChatTemplate(tokenizer)
    model = _model(msgspec.structs.replace(MINI_4K, vocab_size=320)).to(torch.bfloat16)
    generation = GenerationDefaults(
        stop_ids=chat.stop_ids,
        sampling=SamplingConfig(temperature=0.7, top_p=0.9, repetition_penalty=1.1, max_new_tokens=33),
    )
    save_huggingface(tmp_path, model, tokenizer, generation=generation, chat=chat)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == list(chat.stop_ids)
    assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.7, 0.9)
    assert (theirs.repetition_penalty, theirs.max_new_tokens) == (1.1, 33)


@pytest.mark.parametrize("kind", ["phi3", "phi3 with system and bos", "chatml"])
def test_transformers_encodes_text_and_chats_as_we_do(kind: str, tmp_path: Path) -> None:
    phi3, chatml = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], ["<|im_start|>", "<|im_end|>"]
    markers = chatml if kind == "chatml" else phi3
    texts = ["what is left of the red square?", "a blue circle", "system user assistant"] * 9
    tokenizer = train_tokenizer(texts, vocab_size=320, control_tokens=["<s>", "<|endoftext|>", *markers])
    if kind == "chatml":
        chat = ChatTemplate(tokenizer, kind="chatml")
    elif kind == "phi3":
        chat = ChatTemplate(tokenizer)
    else:
        chat = ChatTemplate(tokenizer, system="Answer in 'a few' words.", has_bos=True)
    save_huggingface(tmp_path, _model(msgspec.structs.replace(MINI_4K, vocab_size=320)), tokenizer, chat=chat)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = f" a blue {markers[1]}?"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode_with_control(text)
    turns = [("user", "what is left?"), ("assistant", "a blue circle"), ("user", "and right?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat.encode([(role, [content]) for role, content in turns], is_prompt=True).ids
    own = theirs.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
    assert own == chat.render([("system", ["x"])])
    again = load_lm(tmp_path).chat
    assert again is not None
    assert again.kind == chat.kind
