"""The chat with every kind of model: what is opened, how it is sampled, and the same question about a folder.

In this process; the models are tiny and random, so that what they say depends on all that they were told.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from blip3_lite import Blip3, LoadedModel, Processor, SamplingConfig, load_model, save_model, stream_answer, user_turn
from blip3_lite.config import CheckpointConfig
from blip3_lite.xgen_mm import export_xgen_mm
from interleave_data import FileBytes, ImagePart, Sample
from phi3_lite import (
    SMOLLM2_SYSTEM,
    ChatTemplate,
    GenerationDefaults,
    LoadedLM,
    Phi3,
    Phi3Config,
    collect,
    generate,
    load_lm,
    quantise_linears,
    save_huggingface,
)

SAMPLING = SamplingConfig(max_new_tokens=6, repetition_penalty=1.5)


@pytest.fixture
def run_chat(repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Arguments → (exit status, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/chat"))
    from chat_config import parse_command_line
    from chat_session import run

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            status = run(parse_command_line([str(argument) for argument in arguments]))
        except SystemExit as end:
            status = int(end.code or 0)
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A language model alone, with its tokenizer and its way of being sampled."""
    path = tmp_path_factory.mktemp("lm") / "phi"
    cfg = Phi3Config(
        vocab_size=300, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=32, max_positions=96,
        init_std=0.4,
    )  # fmt: skip
    model = Phi3(cfg, generator=torch.Generator().manual_seed(4)).eval()
    generation = GenerationDefaults(sampling=SAMPLING)
    save_huggingface(path, model, tiny_tokenizer, generation=generation, chat=ChatTemplate(tiny_tokenizer))
    return path


def say(loaded: LoadedLM, turns: list[tuple[str, str]], sampling: SamplingConfig = SAMPLING) -> str:
    """What a language model answers: prompt, generation and decoding at once."""
    assert loaded.chat is not None
    ids = loaded.chat.encode([(role, [text]) for role, text in turns], is_prompt=True).ids
    stops, bounds = loaded.generation.stop_ids, torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        inputs = loaded.model.embed(torch.tensor(ids))
        (row,) = collect(generate(loaded.model, inputs, bounds, sampling, stops, prompt_ids=[ids]))
    return loaded.chat.tokenizer.decode(row)


@pytest.fixture
def joined(tiny_config, tiny_tokenizer) -> LoadedModel:
    lm = msgspec.structs.replace(tiny_config.lm, init_std=0.4)
    config = msgspec.structs.replace(tiny_config, lm=lm)
    model = Blip3(config, generator=torch.Generator().manual_seed(6)).eval().requires_grad_(False)
    return LoadedModel(model, Processor(config, tiny_tokenizer), CheckpointConfig(model=config, sampling=SAMPLING))


@pytest.fixture
def joined_folder(joined: LoadedModel, tmp_path: Path) -> Path:
    save_model(tmp_path / "joined", joined.model, joined.processor, sampling=SAMPLING)
    return tmp_path / "joined"


def say_of_picture(loaded: LoadedModel, picture: Path, text: str) -> str:
    turn = user_turn([ImagePart(FileBytes(str(picture)))], text)
    prompt = loaded.processor.encode_prompt(Sample(id="1", source="test", turns=(turn,)))
    return "".join(stream_answer(loaded.model, loaded.processor, prompt, SAMPLING))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures of noise and two files that are none, out of order."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, seed in (("c.png", 3), ("a.png", 1), ("b.png", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 40 * seed, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "ab.jpg").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "z.txt").write_text("no picture")
    (folder / ".hidden").write_text("not looked at")
    (folder / "below").mkdir()
    return folder


def test_language_model_alone_answers_as_it_generates_and_remembers(
    run_chat, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_lm(lm_folder)
    first = say(loaded, [("user", "what colour?")])
    second = say(loaded, [("user", "what colour?"), ("assistant", first), ("user", "and now?")])
    assert first.strip()
    assert second != say(loaded, [("user", "and now?")])
    lines = iter(["what colour?\n", "/image x.png\n", "and now?\n", ""])
    monkeypatch.setattr("sys.stdin", type("Typed", (), {"readline": staticmethod(lambda: next(lines))}))
    status, said, told = run_chat("--model", lm_folder)
    assert status == 0
    assert said == f"{first}\n{second}\n"
    assert f"model {lm_folder}: text alone, float32" in told
    assert "without a vision tower" in told


def test_flags_go_before_the_model_s_own_sampling(run_chat, lm_folder: Path) -> None:
    loaded = load_lm(lm_folder)
    asked = ["--model", lm_folder, "--prompt", "what colour?"]
    longer = SamplingConfig(max_new_tokens=9, repetition_penalty=1.0)
    expected = say(loaded, [("user", "what colour?")], longer)
    assert expected != say(loaded, [("user", "what colour?")])
    status, said, _ = run_chat(*asked, "--max-new-tokens", "9", "--repetition-penalty", "1")
    assert (status, said) == (0, f"{expected}\n")
    hot = [run_chat(*asked, "--temperature", "3", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]
    narrow = run_chat(*asked, "--temperature", "3", "--top-p", "0.0001", "--seed", "2")[1]
    assert narrow == say(loaded, [("user", "what colour?")]) + "\n"


def test_stop_text_ends_an_answer(run_chat, lm_folder: Path) -> None:
    whole = say(load_lm(lm_folder), [("user", "what colour?")])
    stop = whole[2:4]
    status, said, _ = run_chat("--model", lm_folder, "--prompt", "what colour?", "--stop", "never", "--stop", stop)
    assert (status, said) == (0, whole[: whole.index(stop)] + "\n")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_chat_says_what_the_quantised_model_does(run_chat, lm_folder: Path, tmp_path, quantize) -> None:
    # of the same numbers: what is quantised while it is read is not rounded to bf16 before
    loaded = load_lm(lm_folder, dtype=torch.bfloat16)
    save_huggingface(tmp_path / "lm", loaded.model, loaded.tokenizer, generation=loaded.generation, chat=loaded.chat)
    assert "text alone, bfloat16" in run_chat("--model", tmp_path / "lm", "--prompt", "x")[2]
    quantise_linears(loaded.model, quantize)
    status, said, told = run_chat("--model", tmp_path / "lm", "--quantize", quantize, "--prompt", "what colour?")
    assert (status, said) == (0, say(loaded, [("user", "what colour?")]) + "\n")
    assert f"text alone, {quantize} and bfloat16" in told


def test_quantised_checkpoint_sees_its_picture(run_chat, joined_folder: Path, pictures: Path) -> None:
    loaded = load_model(joined_folder, dtype=torch.bfloat16)
    quantise_linears(loaded.model.lang_model, "int8")
    expected = say_of_picture(loaded, pictures / "b.png", "what?")
    asked = ["--model", joined_folder, "--quantize", "int8", "--image", pictures / "b.png", "--prompt", "what?"]
    assert run_chat(*asked)[:2] == (0, f"{expected}\n")


def test_gguf_file_answers_in_its_own_chat_format(run_chat, write_gguf, gguf_metadata) -> None:
    sizes = {"width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 44, "max_positions": 128}
    values = gguf_metadata("llama", **sizes, norm_eps=1e-5) | {
        "tokenizer.chat_template": f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>"
    }
    shapes = {"token_embd": (len(values["tokenizer.ggml.tokens"]), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_output")}
    shapes |= {f"blk.0.{name}": (16, 32) for name in ("attn_k", "attn_v")}
    shapes |= {"blk.0.ffn_up": (44, 32), "blk.0.ffn_gate": (44, 32), "blk.0.ffn_down": (32, 44)}
    rng = np.random.default_rng(0)
    path = write_gguf(values, {f"{x}.weight": rng.normal(size=y).astype(np.float32) for x, y in shapes.items()})
    loaded = load_lm(path)
    assert loaded.chat is not None
    assert loaded.chat.kind == "chatml"
    status, said, told = run_chat("--model", path, "--prompt", "hello 12", "--max-new-tokens", "5")
    expected = say(loaded, [("user", "hello 12")], SamplingConfig(max_new_tokens=5))
    assert (status, said) == (0, f"{expected}\n"), told


def test_release_is_sampled_as_published(run_chat, tmp_path: Path, tiny_config, tiny_tokenizer, pictures, monkeypatch):
    lm = msgspec.structs.replace(tiny_config.lm, has_head_bias=True, max_positions=64)
    vision = msgspec.structs.replace(tiny_config.vision, use_head=True)
    config = msgspec.structs.replace(tiny_config, lm=lm, vision=vision)
    model = Blip3(config, generator=torch.Generator().manual_seed(1)).eval()
    loaded = LoadedModel(model, Processor(config, tiny_tokenizer), CheckpointConfig(model=config))
    export_xgen_mm(tmp_path / "x", loaded, "base")
    (tmp_path / "x" / "preprocessor_config.json").write_text('{"grids": []}')
    # the real sizes and ids are too large for a test
    monkeypatch.setattr("blip3_lite.xgen_mm.xgen_mm_config", lambda kind: config)
    monkeypatch.setattr("blip3_lite.xgen_mm.xgen_mm_tokenizer", lambda file: tiny_tokenizer)
    asked: list[SamplingConfig] = []

    def spy(model, processor, prompt, sampling, **_settings):
        asked.append(sampling)
        return iter(["seen"])

    run_chat("--help")
    monkeypatch.setattr("chat_talkers.stream_answer", spy)
    question = ["--model", tmp_path / "x", "--image", pictures / "a.png", "--prompt", "what?"]
    status, said, told = run_chat(*question)
    assert (status, said) == (0, "seen\n"), told
    assert run_chat(*question, "--repetition-penalty", "1")[0] == 0
    # as long as the window lets it be
    assert [(x.temperature, x.repetition_penalty) for x in asked] == [(0, 2.0), (0, 1.0)]
    assert 6 < asked[0].max_new_tokens < 64


def test_progress_bar_reaches_its_end(run_chat, lm_folder: Path, joined_folder: Path, monkeypatch) -> None:
    bars: list[tqdm] = []

    class Seen(tqdm):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "disable": False})
            bars.append(self)

    run_chat("--help")
    monkeypatch.setattr("chat_opening.tqdm", Seen)
    for path in (lm_folder, joined_folder):
        assert run_chat("--model", path, "--prompt", "x")[0] == 0
    assert [(bar.n, bar.unit) for bar in bars] == [(bar.total, "tensor") for bar in bars]
    assert min(bar.n for bar in bars) > 10


def test_model_without_a_chat_format_is_refused(run_chat, tmp_path: Path) -> None:
    cfg = Phi3Config(vocab_size=30, width=8, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=8)
    save_huggingface(tmp_path / "lm", Phi3(cfg))
    status, _, told = run_chat("--model", tmp_path / "lm", "--prompt", "x")
    assert status == 2
    assert "expected a chat format that is known" in told
    assert "got no tokenizer" in told


def test_hub_id_without_a_network_says_what_to_place_where(run_chat, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    status, said, told = run_chat("--model", "some-org/some-model", "--prompt", "x")
    assert (status, said) == (2, "")
    assert told.startswith("chat: model some-org/some-model: expected a folder of this name here")
    assert "*.json, *.safetensors, tokenizer.model" in told
    assert "put them into the folder some-org/some-model here" in told
    assert len(told.splitlines()) == 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, lm_folder: Path) -> list[dict]:
    """A hub that has every model; what was asked of it."""
    asked: list[dict] = []

    def snapshot_download(repo_id: str, **settings) -> str:
        asked.append({"repo_id": repo_id, **settings})
        return str(lm_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_from_the_hub_come_weights_and_texts_but_no_code_and_no_pickle(run_chat, lm_folder: Path, hub) -> None:
    from huggingface_hub.utils import filter_repo_objects

    status, said, _ = run_chat("--model", "some-org/some-model", "--prompt", "what colour?")
    assert (status, said) == (0, say(load_lm(lm_folder), [("user", "what colour?")]) + "\n")
    (asked,) = hub
    assert asked.pop("repo_id") == "some-org/some-model"
    held = [
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json",
        "tokenizer.model", "chat_template.jinja", "modeling_xgenmm.py", "pytorch_model.bin", "model.pt", "README.md",
        "onnx/config.json", "original/model.safetensors", "archive.pkl",
    ]  # fmt: skip
    assert list(filter_repo_objects(held, **asked)) == held[:6]


@pytest.mark.parametrize("name", ["runs/demmo", "nowhere", "./some-org/some-model", "a/b/c"])
def test_a_path_with_an_error_in_it_is_not_asked_of_the_hub(run_chat, hub, tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    status, _, told = run_chat("--model", name, "--prompt", "x")
    assert (status, hub) == (2, [])
    assert told == f"chat: model {name}: expected a folder, a GGUF file or a hub's id (org/name), got nothing there\n"


@pytest.mark.parametrize("batch", [2, 8])
def test_every_picture_of_a_folder_is_answered_or_skipped_with_a_reason(
    run_chat, joined: LoadedModel, joined_folder: Path, pictures: Path, monkeypatch, batch: int
) -> None:
    run_chat("--help")
    monkeypatch.setattr("chat_batch._BATCH", batch)
    # the file may lie among the pictures
    out = pictures / "answers.jsonl"
    status, said, told = run_chat("--model", joined_folder, "--images", pictures, "--prompt", "what?", "--out", out)
    assert (status, said) == (0, ""), told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in lines] == ["a.png", "ab.jpg", "b.png", "c.png", "z.txt"]
    for index, name in ((0, "a.png"), (2, "b.png"), (3, "c.png")):
        assert lines[index]["answer"] == say_of_picture(joined, pictures / name, "what?").strip()
    assert lines[1]["skipped"].startswith("broken_image: ")
    assert lines[4]["skipped"].startswith("not_an_image: ")
    assert len({line.get("answer") for line in lines}) == 4
    assert f"{out}: 3 answered, 2 skipped (broken_image 1, not_an_image 1)" in told
    assert sorted(path.name for path in pictures.glob("answers*")) == ["answers.jsonl"]


def test_an_interrupted_folder_leaves_whole_lines_and_says_where(
    run_chat, joined_folder: Path, pictures: Path, tmp_path: Path, monkeypatch
) -> None:
    run_chat("--help")
    monkeypatch.setattr("chat_batch._BATCH", 2)
    answers: Callable = sys.modules["chat_batch"].answer_batch
    calls: list[int] = []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(*arguments, **settings)

    monkeypatch.setattr("chat_batch.answer_batch", interrupted)
    out = tmp_path / "answers.jsonl"
    asked = ["--model", joined_folder, "--images", pictures, "--prompt", "what?", "--out", out]
    status, _, told = run_chat(*asked)
    assert status == 130
    assert not out.exists()
    assert f"what was answered is in {out}.part" in told
    assert [json.loads(line)["image"] for line in Path(f"{out}.part").read_text().splitlines()] == ["a.png", "ab.jpg"]
    assert run_chat(*asked)[0] == 0
    assert len(out.read_text().splitlines()) == 5
    before = out.read_text()
    status, _, told = run_chat(*asked)
    assert (status, out.read_text()) == (2, before)
    assert "expected a new file" in told


def test_a_folder_that_cannot_be_asked_about_is_refused(run_chat, lm_folder, joined_folder, pictures, tmp_path) -> None:
    def ask(model: Path, folder: Path, out: Path) -> str:
        status, _, told = run_chat("--model", model, "--images", folder, "--prompt", "x", "--out", out)
        assert status == 2
        assert list(tmp_path.glob("*.jsonl*")) == []
        return told

    assert "expected a folder of pictures" in ask(joined_folder, tmp_path / "nowhere", tmp_path / "x.jsonl")
    assert "expected pictures, got no file" in ask(joined_folder, pictures / "below", tmp_path / "x.jsonl")
    assert "got no folder" in ask(joined_folder, pictures, tmp_path / "nowhere" / "x.jsonl")
    assert "expected a model that sees pictures" in ask(lm_folder, pictures, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--out", "x"], "--out: expected --images FOLDER beside it"),
        (["--images", "x", "--prompt", "y"], "--images: expected --out FILE beside it"),
        (["--images", "x", "--out", "y"], "--images: expected --prompt TEXT beside it"),
        (["--images", "x", "--out", "y", "--prompt", "z", "--image", "u"], "--images: expected no --image beside it"),
        (["--stop", ""], "--stop: expected a text"),
        (["--temperature", "-1"], "SamplingConfig.temperature: expected at least 0"),
        (["--top-p", "0"], "SamplingConfig.top_p: expected above 0"),
    ],
)
def test_wrong_flags_are_exit_2(run_chat, flags: list[str], reason: str) -> None:
    status, said, told = run_chat(*flags)
    assert (status, said) == (2, "")
    assert reason in told
    assert "Traceback" not in told


def test_the_command_line_is_read_without_torch(repo_root: Path) -> None:
    code = "import sys; import chat_config; chat_config.parse_command_line([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root / "apps/chat", capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
