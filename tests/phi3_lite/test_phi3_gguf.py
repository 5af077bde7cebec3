"""GGUF files: header, sizes, tensors, tokenizers, and what is refused."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from jinja2 import Environment
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend

from phi3_lite import (
    PHI3_CONTROL_IDS,
    SMOLLM2_SYSTEM,
    ChatTemplate,
    HFTokenizer,
    LongRope,
    Phi3,
    SamplingConfig,
    SentencePieceTokenizer,
    load_lm,
)
from phi3_lite.formats.gguf import is_gguf, read_gguf
from phi3_lite.formats.gguf_file import GGUFFile
from phi3_lite.formats.gguf_tokenizer import read_tokenizer
from weight_files import WeightsError, load_tensors, unique_tensors

SIZES = {
    "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 44, "max_positions": 128,
    "norm_eps": 1e-5,
}  # fmt: skip


def _tensors(arch: str, vocab_size: int) -> dict[str, np.ndarray]:
    """Weights for SIZES with every number another, so that no two rows can be taken for each other."""
    shapes = {"token_embd": (vocab_size, 32), "output_norm": (32,)}
    for index in range(2):
        block = {"attn_norm": (32,), "ffn_norm": (32,), "attn_output": (32, 32), "ffn_down": (32, 44)}
        if arch == "phi3":
            block |= {"attn_qkv": (64, 32), "ffn_up": (88, 32)}
        else:
            block |= {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "ffn_up": (44, 32)}
            block["ffn_gate"] = (44, 32)
        shapes |= {f"blk.{index}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def tiny(write_gguf, gguf_metadata):
    """(architecture, changed metadata, changed tensors) → a file; None as a value takes the entry away."""

    def make(arch: str = "llama", metadata: dict | None = None, tensors: dict | None = None) -> Path:
        values = gguf_metadata(arch, **SIZES)
        held = _tensors(arch, len(values["tokenizer.ggml.tokens"])) | (tensors or {})
        values |= metadata or {}
        return write_gguf(
            {key: value for key, value in values.items() if value is not None},
            {key: value for key, value in held.items() if value is not None},
        )

    return make


def _load(path: Path) -> Phi3:
    cfg, source, recipes, *_, ignored = read_gguf(path)
    model = Phi3(cfg)
    assert load_tensors(source, unique_tensors(model), recipes, ignored=ignored) == []
    return model


def test_load_lm_takes_a_file_with_its_tokenizer_chat_format_and_stop_ids(tiny) -> None:
    path = tiny("llama", {"tokenizer.chat_template": SMOLLM2_TEMPLATE})
    held, loaded = read_gguf(path), load_lm(path)
    assert loaded.model.cfg == held.config
    expected = _load(path).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("a blue") == held.tokenizer.encode("a blue")
    assert loaded.chat is not None
    assert loaded.chat.kind == held.chat == "chatml"
    assert set(loaded.generation.stop_ids) == {*held.generation.stop_ids, *loaded.chat.stop_ids}
    rounded = load_lm(path, dtype=torch.bfloat16).model
    assert all(torch.equal(weight, expected[name].bfloat16()) for name, weight in rounded.state_dict().items())


def test_load_lm_refuses_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"not one of them, whatever its name says")
    with pytest.raises(WeightsError, match="weights"):
        load_lm(tmp_path / "weights")


def test_header_equals_what_the_gguf_package_reads(tiny) -> None:
    path = tiny(metadata={"a.list": [1, -2], "a.flags": [True, False], "a.float": 0.1, "a.word": "é", "a.no": False})
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert torch.equal(ours.read(tensor.name), torch.tensor(tensor.data))


def _block(kind: str) -> tuple[bytes, list[float]]:
    """One block of a type, and the numbers in it by the format's own description (ggml-quants.c)."""
    half = struct.pack("<e", 0.5)
    nibbles = bytes(index | (15 - index) << 4 for index in range(16))
    low, high = list(range(16)), list(range(15, -1, -1))
    if kind == "Q8_0":
        return half + struct.pack("<32b", *range(-16, 16)), [0.5 * x for x in range(-16, 16)]
    if kind == "Q4_0":
        return half + nibbles, [0.5 * (x - 8) for x in low + high]
    if kind == "Q4_1":
        return half + struct.pack("<e", -3.0) + nibbles, [0.5 * x - 3 for x in low + high]
    if kind == "Q4_K":
        # scales 1 … 8 and minima 8 … 1, six bits each: those of the first four groups lie in bytes 0–3 and 4–7, the
        # others' low nibbles in bytes 8–11
        scales = bytes([1, 2, 3, 4, 8, 7, 6, 5, 5 | 4 << 4, 6 | 3 << 4, 7 | 2 << 4, 8 | 1 << 4])
        numbers: list[float] = []
        for pair in range(4):
            for group, values in ((2 * pair, low * 2), (2 * pair + 1, high * 2)):
                numbers += [0.5 * (group + 1) * x - 0.25 * (8 - group) for x in values]
        return half + struct.pack("<e", 0.25) + scales + nibbles * 8, numbers
    # Q6_K: all low nibbles 5 and 9, all high bits 2: 2 · 16 + 5 − 32 and 2 · 16 + 9 − 32, sixteen scales −8 … 7
    numbers = [0.5 * (group - 8) * (5 if group % 8 < 4 else 9) for group in range(16) for _ in range(16)]
    return bytes([5 | 9 << 4] * 128) + bytes([0b10101010] * 64) + struct.pack("<16b", *range(-8, 8)) + half, numbers


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_quantised_rows_are_read_alone_and_as_described(kind: str, write_gguf) -> None:
    block, numbers = _block(kind)
    num_rows = 5
    raw = np.frombuffer(block * 2 * num_rows, dtype=np.uint8).reshape(num_rows, -1).copy()
    # the first scale of row 3 is doubled
    at = len(block) - 2 if kind == "Q6_K" else 0
    raw[3, at : at + 2] = np.frombuffer(struct.pack("<e", 1.0), dtype=np.uint8)
    path = write_gguf({"general.architecture": "x"}, {"a": (raw, gguf.GGMLQuantizationType[kind])})
    source = GGUFFile(path)
    assert source.kinds == {"a": kind}
    assert source.tensors["a"].shape == (num_rows, 2 * len(numbers))
    whole = source.read("a")
    assert whole.dtype == torch.float32
    assert whole[0].tolist() == whole[4].tolist() == numbers * 2
    assert whole[3].tolist() != whole[0].tolist()
    assert torch.equal(source.read("a", (2, 4)), whole[2:4])
    assert source.read("a", (2, 2)).shape == (0, 2 * len(numbers))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_unquantised_tensors_are_read_exactly(kind: str, write_gguf) -> None:
    values = np.arange(-21, 21, dtype=np.float32).reshape(14, 3) / 8
    raw = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    vector = gguf.quantize(values[:, 0].copy(), gguf.GGMLQuantizationType[kind])
    number = gguf.GGMLQuantizationType[kind]
    source = GGUFFile(write_gguf({"general.architecture": "x"}, {"a": (raw, number), "b": (vector, number)}))
    assert source.read("a").tolist() == values.tolist()
    assert source.read("a", (3, 8)).tolist() == values[3:8].tolist()
    assert source.read("b", (13, 99)).tolist() == values[13:, 0].tolist()


def test_llama_rows_of_q_and_k_are_unpermuted_by_heads_and_fused(tiny) -> None:
    # one head of 8 channels in the file's order: channels 0 and 4, 1 and 5, …, are neighbours
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    q, k, v = (np.repeat(np.arange(rows, dtype=np.float32)[:, None], 32, axis=1) for rows in (32, 16, 16))
    in_file = {
        "blk.1.attn_q.weight": q.reshape(4, 8, 32)[:, order].reshape(32, 32),
        "blk.1.attn_k.weight": 100 + k.reshape(2, 8, 32)[:, order].reshape(16, 32),
        "blk.1.attn_v.weight": 200 + v,
    }
    model = _load(tiny(tensors=in_file))
    rows = model.model.layers[1].self_attn.qkv_proj.weight[:, 0]  # pyright: ignore
    assert rows.tolist() == [*range(32), *range(100, 116), *range(200, 216)]


def test_phi3_tensors_are_taken_as_they_are(tiny) -> None:
    path = tiny("phi3")
    model, held = _load(path), _tensors("phi3", read_gguf(path).config.vocab_size)
    state = model.state_dict()
    for ours, theirs in {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}.items():
        assert state[f"model.layers.1.{ours}.weight"].numpy().tolist() == held[f"blk.1.{theirs}.weight"].tolist()


def test_sizes_are_read_from_the_metadata(tiny) -> None:
    cfg = read_gguf(tiny("phi3", {"phi3.rope.freq_base": 500.0, "phi3.rope.dimension_count": 6})).config
    assert (cfg.width, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.mlp_width) == (32, 2, 4, 2, 44)
    assert (cfg.rope_theta, cfg.rotary_dim, cfg.max_positions, cfg.sliding_window) == (500.0, 6, 128, None)
    assert (cfg.norm_eps, cfg.is_head_tied) == (pytest.approx(1e-5), True)


def test_large_tensors_are_read_in_parts(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny()
    whole, sizes, read = _load(path).state_dict(), list[int](), GGUFFile.read

    def recorded(self: GGUFFile, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        found = read(self, name, rows)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(GGUFFile, "read", recorded)
    # as large as q, which stays whole as its rows change places
    monkeypatch.setattr("phi3_lite.formats.gguf._MAX_NUMBERS", 32 * 32)
    in_parts = _load(path).state_dict()
    assert max(sizes) <= 32 * 32
    assert len(sizes) > len(GGUFFile(path).tensors)
    assert all(torch.equal(in_parts[name], weight) for name, weight in whole.items())


def test_head_is_tied_only_where_the_file_has_none(tiny) -> None:
    path = tiny()
    vocab_size = read_gguf(path).config.vocab_size
    assert "lm_head.weight" not in _load(path).state_dict()
    head = np.random.default_rng(1).normal(size=(vocab_size, 32)).astype(np.float32)
    assert _load(tiny(tensors={"output.weight": head})).state_dict()["lm_head.weight"].numpy().tolist() == head.tolist()


def test_sliding_window_of_old_phi3_4k_files_is_the_published_one(tiny) -> None:
    assert read_gguf(tiny("phi3", {"phi3.context_length": 4096})).config.sliding_window == 2047
    newer = {"phi3.context_length": 4096, "phi3.attention.sliding_window": 9}
    assert read_gguf(tiny("phi3", newer)).config.sliding_window == 9
    assert read_gguf(tiny("llama", {"llama.context_length": 4096})).config.sliding_window is None


def test_generation_defaults_hold_all_stop_tokens_and_the_sampling(tiny) -> None:
    values = {"general.sampling.temp": 0.5, "general.sampling.top_p": 0.75, "general.sampling.penalty_repeat": 1.25}
    generation = read_gguf(tiny(metadata={**values, "tokenizer.ggml.eos_token_id": 5})).generation
    assert generation.stop_ids == (5, 2, 0)
    assert generation.sampling == SamplingConfig(temperature=0.5, top_p=0.75, repetition_penalty=1.25)
    assert read_gguf(tiny()).generation.sampling == SamplingConfig()


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("<|im_start|>system\n" + SMOLLM2_SYSTEM, "chatml"),
        ("<|im_start|>system\nYou are somebody else", None),
        ("{{'<|user|>' + '\n' + m + '<|end|>' + '<|assistant|>'}}", "phi3"),
        ("[INST] {{m}} [/INST]", None),
        (None, None),
    ],
)
def test_chat_format_is_told_by_the_files_template(template: str | None, kind: str | None, tiny) -> None:
    assert read_gguf(tiny(metadata={"tokenizer.chat_template": template})).chat == kind


@pytest.mark.parametrize(
    ("arch", "metadata", "message"),
    [
        ("qwen2", {}, "expected an architecture of phi3, llama, got 'qwen2'"),
        ("llama", {"llama.block_count": None}, "llama.block_count: expected int, got nothing"),
        ("llama", {"llama.embedding_length": "wide"}, "llama.embedding_length: expected int, got 'wide'"),
        ("llama", {"llama.attention.head_count": [4, 2]}, r"head_count: expected int, got \[4, 2\]"),
        ("llama", {"llama.attention.head_count": 5}, "head_count: expected a divisor of the width 32, got 5"),
        ("llama", {"llama.attention.key_length": 16}, "key_length: expected 8"),
        ("llama", {"llama.expert_count": 8}, "expected no experts, got 8"),
        (
            "llama",
            {"llama.rope.scaling.type": "linear"},
            "rope.scaling.type: expected none, .* got 'linear' and no fac",
        ),
        ("phi3", {"phi3.rope.scaling.type": "longrope"}, "rope.scaling.type: .* got 'longrope' and no factors"),
        ("llama", {"llama.rope.dimension_count": 4}, "rope.dimension_count: expected 8"),
        ("llama", {"llama.attention.head_count_kv": 3}, "Phi3Config.num_heads: expected a multiple of num_kv_heads"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: expected gpt2 or llama, got 'bert'"),
        ("llama", {"tokenizer.ggml.model": None}, "tokenizer.ggml.model: expected gpt2 or llama, got None"),
        (
            "llama",
            {"tokenizer.ggml.pre": "tekken"},
            "tokenizer.ggml.pre: expected one of gpt-2, smollm, .*, got 'tekken'",
        ),
        ("llama", {"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens: expected a list, got nothing"),
        ("llama", {"tokenizer.ggml.token_type": [1, 2]}, "tokenizer.ggml.token_type: expected 270, .* got 2"),
        ("llama", {"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges: expected pairs"),
    ],
    ids=lambda value: next(iter(value), None) if isinstance(value, dict) else "",
)
def test_models_that_are_not_handled_are_refused_by_name(arch: str, metadata: dict, message: str, tiny) -> None:
    with pytest.raises(WeightsError, match=message):
        read_gguf(tiny(arch, metadata))


FOUR = np.array([1.0, 1.5, 2.0, 4.0], dtype=np.float32)


@pytest.mark.parametrize("names", [["rope_factors_long"], ["rope_factors_short"], ["rope_freqs", "rope_factors_long"]])
def test_half_of_the_rope_factors_is_refused_by_name(names: list[str], tiny) -> None:
    with pytest.raises(WeightsError, match=f"rope.scaling.type: expected none, .* got 'none' and .*{names[-1]}.weight"):
        read_gguf(tiny(tensors={f"{name}.weight": FOUR for name in names}))


def test_long_and_short_rope_factors_are_read_with_the_original_window(tiny) -> None:
    values = {"phi3.rope.scaling.original_context_length": 32}
    factors = {"rope_factors_long.weight": 3 * FOUR, "rope_factors_short.weight": FOUR}
    cfg = read_gguf(tiny("phi3", values, factors)).config
    assert cfg.long_rope == LongRope(
        short_factors=(1.0, 1.5, 2.0, 4.0), long_factors=(3.0, 4.5, 6.0, 12.0), original_max_positions=32
    )
    named = read_gguf(tiny("phi3", {**values, "phi3.rope.scaling.attn_factor": 1.25}, factors)).config
    assert (named.rotary_scale, cfg.rotary_scale) == (1.25, pytest.approx(1.4**0.5))  # ln 4 / ln 32 = 2 / 5
    assert _load(tiny("phi3", values, factors)).cfg == cfg
    with pytest.raises(WeightsError, match="original_context_length: expected int, got nothing"):
        read_gguf(tiny("phi3", {}, factors))
    with pytest.raises(WeightsError, match=r"long_rope.long_factors: expected 4 numbers"):
        read_gguf(tiny("phi3", values, {**factors, "rope_factors_long.weight": FOUR[:3]}))


def test_tensors_that_are_missing_or_too_many_are_listed(tiny) -> None:
    path = tiny(tensors={"blk.1.attn_k.weight": None, "blk.0.attn_q.bias": np.ones(32, dtype=np.float32)})
    with pytest.raises(WeightsError, match=r"missing \(1\): blk.1.attn_k.weight\n.*unexpected.*: blk.0.attn_q.bias"):
        _load(path)


def test_tensor_types_that_are_not_handled_are_refused_by_name(write_gguf) -> None:
    plain, kind = np.ones((2, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q5_0
    tensors = {"a": plain, "b": (gguf.quantize(plain, kind), kind)}
    with pytest.raises(WeightsError, match=r"expected tensors in F32, .*Q6_K, got 1 others: b in Q5_0"):
        GGUFFile(write_gguf({"general.architecture": "x"}, tensors))


def test_file_cut_anywhere_is_refused(tiny) -> None:
    path = tiny()
    whole = path.read_bytes()
    for share in (0.0, 1e-4, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(WeightsError, match="expected a whole GGUF file"):
            read_gguf(path)


def test_damaged_lengths_end_in_an_error_and_not_in_a_loop(tiny) -> None:
    path = tiny()
    whole = path.read_bytes()
    key = b"tokenizer.ggml.token_type"
    at = {
        "number of tensors": 8,
        "number of values": 16,
        "length of a key": 24,
        "length of an array": whole.index(key) + len(key) + 8,
    }
    for place in at.values():
        damaged = bytearray(whole)
        damaged[place : place + 8] = struct.pack("<Q", 1 << 60)
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="items announced at byte"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (b"GGML", "b'GGML' in front where b'GGUF' should be"),
        (b"GGUF" + struct.pack("<I", 1), "version 1, where 2 and 3 are handled"),
        (b"GGUF" + struct.pack(">I", 3), "in big-endian order"),
    ],
)
def test_other_magic_version_and_byte_order_are_refused(front: bytes, message: str, tiny) -> None:
    path = tiny()
    path.write_bytes(front + path.read_bytes()[len(front) :])
    with pytest.raises(WeightsError, match=message):
        read_gguf(path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        assert not is_gguf(path)
        with pytest.raises(WeightsError, match="expected a GGUF file, got none there"):
            read_gguf(path)


def test_gguf_is_told_by_name_or_by_content(tmp_path: Path) -> None:
    for name, content, expected in (("a.gguf", b"", True), ("b", b"GGUF...", True), ("c.bin", b"GG", False)):
        (tmp_path / name).write_bytes(content)
        assert is_gguf(tmp_path / name) is expected


def test_digits_stand_alone_before_words_are_cut(tiny) -> None:
    tokenizer = read_gguf(tiny()).tokenizer
    names = [tokenizer.token_bytes(token).decode() for token in tokenizer.encode("hello  12 hello\n\n1\n\n")]
    # "12" has a merge that digits set apart never reach; both spaces before a digit are one word, as no letter follows
    assert names == ["hello", "  ", "1", "2", " hello", "\n\n", "1", "\n\n"]
    plain = read_gguf(tiny(metadata={"tokenizer.ggml.pre": "gpt-2"})).tokenizer
    assert [plain.token_bytes(token).decode() for token in plain.encode("hello  12")] == ["hello", " ", " ", "12"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # a capital begins a word, short forms stay with theirs in either case, at most three digits go together
        ("gpt-4o", ["Hello", "World", " don't", " I'VE", " ", "123", "45", " a", "/b", "\n\n", " x", " ", " y"]),
        ("llama-bpe", ["HelloWorld", " don", "'t", " I", "'VE", " ", "123", "45", " a", "/b", "\n\n", " x", " ", " y"]),
    ],
)
def test_words_are_cut_as_described(kind: str, expected: list[str], tiny) -> None:
    tokenizer = read_gguf(tiny(metadata={"tokenizer.ggml.pre": kind})).tokenizer
    assert isinstance(tokenizer, HFTokenizer)
    cut = Backend.from_str(tokenizer.to_json()).pre_tokenizer.pre_tokenize_str(
        "HelloWorld don't I'VE 12345 a/b\n\n x  y"
    )
    assert [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in cut] == expected


def test_word_that_is_a_token_is_whole_only_in_llama3s_tokenizer(tiny, gguf_metadata) -> None:
    # the merges lead to "use" and "r" first, as "use r" is taken away
    merges = [merge for merge in gguf_metadata("llama")["tokenizer.ggml.merges"] if merge != "use r"]
    counts = {}
    for kind in ("gpt-2", "llama-bpe"):
        metadata = {"tokenizer.ggml.pre": kind, "tokenizer.ggml.merges": merges}
        counts[kind] = len(read_gguf(tiny(metadata=metadata)).tokenizer.encode("user"))
    assert counts == {"gpt-2": 2, "llama-bpe": 1}


def test_control_tokens_of_both_types_cannot_be_spelt(tiny, gguf_metadata) -> None:
    types = gguf_metadata("llama")["tokenizer.ggml.token_type"]
    tokenizer = read_gguf(tiny(metadata={"tokenizer.ggml.token_type": [4, *types[1:]]})).tokenizer
    assert dict(tokenizer.control_ids) == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for name in tokenizer.control_ids:
        assert not {0, 1, 2} & set(tokenizer.encode(f"a{name}b"))
        assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == f"a{name}b"


def test_unused_tokens_at_the_end_are_no_tokens(tiny, gguf_metadata) -> None:
    values = gguf_metadata("llama")
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    padded = {
        "tokenizer.ggml.tokens": [*tokens, "[PAD1]", "[PAD2]"],
        "tokenizer.ggml.token_type": [*types, 5, 5],
    }
    tokenizer = read_gguf(tiny(metadata=padded)).tokenizer
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.token_bytes(len(tokens)) == b""


def test_sentencepiece_tokenizer_equals_the_published_model_file(shared_data: Path) -> None:
    file = shared_data / "tokenizers" / "llama-sentencepiece" / "tokenizer.model"
    expected, processor = SentencePieceTokenizer.from_file(file), SentencePieceProcessor(model_file=str(file))
    size = processor.GetPieceSize()
    # converters write the unknown token as control, and the added ones as user-defined
    kinds = ((processor.IsUnknown, 3), (processor.IsControl, 3), (processor.IsByte, 6))
    types = [next((kind for test, kind in kinds if test(token)), 1) for token in range(size)]
    extra = sorted(PHI3_CONTROL_IDS, key=PHI3_CONTROL_IDS.__getitem__)
    metadata = {
        "general.architecture": "phi3",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*map(processor.IdToPiece, range(size)), *extra, "[PAD32011]"],
        "tokenizer.ggml.scores": [*map(processor.GetScore, range(size)), *[-1000.0] * 12],
        "tokenizer.ggml.token_type": [*types, *[4] * len(extra), 5],
    }
    tokenizer = read_tokenizer(metadata)
    assert tokenizer.control_ids == expected.control_ids
    assert tokenizer.strips_right == expected.strips_right
    assert (tokenizer.vocab_size, tokenizer.has_prefix_space) == (32_011, True)
    assert all(tokenizer.token_bytes(token) == expected.token_bytes(token) for token in range(32_100))
    chat = "<|user|>\nHello, 12 ½ naïve 🦙\x00  x</s>\n\n<|end|>\n<|assistant|>\n"
    assert tokenizer.encode(chat) == expected.encode(chat)
    assert tokenizer.encode_with_control(chat) == expected.encode_with_control(chat)


def test_sentencepiece_follows_the_scores_and_falls_back_on_bytes(tiny) -> None:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "c", "ab", "bc", "▁"]
    scores = {"ab": -2.0, "bc": -1.0}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [scores.get(piece, -9.0) for piece in pieces],
        "tokenizer.ggml.token_type": [2, 3, *[6] * 256, *[1] * 6],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = read_gguf(tiny(metadata=metadata, tensors={"token_embd.weight": np.zeros((300, 32), "f4")})).tokenizer
    names = [pieces[token] for token in tokenizer.encode("abc é")]
    assert names == ["a", "bc", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc é")) == "abc é"
    assert not tokenizer.has_prefix_space
    assert not tokenizer.strips_right
    metadata["tokenizer.ggml.scores"][pieces.index("ab")] = -0.5
    tokenizer = read_gguf(tiny(metadata=metadata, tensors={"token_embd.weight": np.zeros((300, 32), "f4")})).tokenizer
    assert [pieces[token] for token in tokenizer.encode("abc")] == ["ab", "c"]


SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SMOLLM2_SYSTEM
    + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As in SmolLM2-135M-Instruct's file."""


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "hello")],
        [("system", "he 12"), ("user", "  hello"), ("assistant", "hello 12\n"), ("user", "\n\nhello\n")],
        [("user", ""), ("assistant", " \n"), ("user", "é 🦙")],
    ],
    ids=["default system", "white space", "empty"],
)
def test_chatml_equals_the_files_own_template(turns: list[tuple[str, str]], tiny) -> None:
    found = read_gguf(tiny(metadata={"tokenizer.chat_template": SMOLLM2_TEMPLATE}))
    assert found.chat == "chatml"
    template = ChatTemplate(found.tokenizer, kind=found.chat)
    program = Environment().from_string(SMOLLM2_TEMPLATE)
    messages = [{"role": role, "content": text} for role, text in turns]
    for is_prompt in (False, True):
        text = program.render(messages=messages, add_generation_prompt=is_prompt)
        encoded = template.encode([(role, [content]) for role, content in turns], is_prompt=is_prompt)
        assert encoded.ids == found.tokenizer.encode_with_control(text)
        assert template.render([(role, [content]) for role, content in turns], is_prompt=is_prompt) == text
