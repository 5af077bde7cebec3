"""The chat: answers on stdout, everything else on stderr, one line for bad input.

The models here are made to say one thing: the head's weight is zero and its bias names the token.
"""

import os
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image

from blip3_lite import Blip3, LoadedModel, Processor, SamplingConfig, save_model
from blip3_lite.config import CheckpointConfig


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (300, 100), (220, 30, 40)).save(path)
    return path


@pytest.fixture
def saying(tiny_config, tiny_tokenizer):
    """A text of one token, or None for the end of the turn → a model that says nothing else."""

    def build(text: str | None, max_positions: int = 4096) -> LoadedModel:
        lm = msgspec.structs.replace(tiny_config.lm, has_head_bias=True, max_positions=max_positions)
        config = msgspec.structs.replace(tiny_config, lm=lm)
        processor = Processor(config, tiny_tokenizer)
        model = Blip3(config).eval().requires_grad_(False)
        token = processor.stop_ids[0] if text is None else tiny_tokenizer.encode(text)[-1]
        assert text is None or tiny_tokenizer.decode([token]) == text
        assert model.lang_model.head_bias is not None
        model.lang_model.head_weight.zero_()
        model.lang_model.head_bias.zero_()[token] = 1.0
        return LoadedModel(model, processor, CheckpointConfig(model=config))

    return build


@pytest.fixture
def session(saying, repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The same, as a session with answers of four tokens."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/chat"))
    from chat_session import Session
    from chat_talkers import PictureTalker

    def build(text: str | None, max_positions: int = 4096) -> Session:
        talker = PictureTalker(saying(text, max_positions))
        return Session(talker, SamplingConfig(max_new_tokens=4), torch.Generator())

    return build


@pytest.fixture
def checkpoint(saying, tmp_path: Path) -> Path:
    """A folder with runs/mine/model, which says "e"."""
    loaded = saying("e")
    save_model(tmp_path / "runs/mine/model", loaded.model, loaded.processor)
    return tmp_path


def test_prompt_answers_once_from_the_newest_checkpoint(run_app, checkpoint: Path, picture: Path) -> None:
    shutil.copytree(checkpoint / "runs/mine/model", checkpoint / "runs/older")
    os.utime(checkpoint / "runs/older/MANIFEST.json", (0, 0))
    done = run_app("chat", ["--image", str(picture), "--prompt", "What colour?", "--max-new-tokens", "4"], checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "eeee\n"
    assert "model runs/mine/model: text and pictures, float32" in done.stderr
    assert "packed_attention=" in done.stderr
    # 300 × 100 fits three tiles side by side best: thumbnail + 3 tiles of 3 latents.
    assert "300×100 px → 3×1 tiles + thumbnail of 16 px → 12 tokens" in done.stderr


def test_session_goes_on_after_bad_input(run_app, checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>")
    os.mkfifo(tmp_path / "pipe")
    lines = [
        "/image nowhere.png",
        f"/image {broken}",
        "/image",
        "/image ~nosuchuser/x.png",
        "/image a\0b.png",
        "/image /dev/zero",
        f"/image {tmp_path}/pipe",
        "/nonsense",
        f"/image {picture}",
        f"/image {picture}",
        "How many <image> <|end|>?",
        "And \udcff now?",
        "/clear",
        "/help",
        "/quit",
        "never read",
    ]
    done = run_app("chat", ["--max-new-tokens", "3"], checkpoint, "\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "nowhere.png: cannot be read" in done.stderr
    assert "broken.jpg: not a usable picture" in done.stderr
    assert "picture: expected a path, got none" in done.stderr
    assert "~nosuchuser/x.png: cannot be read" in done.stderr
    assert "zero byte" in done.stderr
    assert "/dev/zero: cannot be read (expected a plain file)" in done.stderr
    assert "pipe: cannot be read (expected a plain file)" in done.stderr
    assert "no command /nonsense" in done.stderr
    assert done.stderr.count("12 tokens") == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == "eee\neee\n"


def test_a_picture_above_the_limit_is_refused_before_it_is_read(session, tmp_path: Path) -> None:
    """(T15): in chat, by the same gate"""
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    chat = session("e")
    with pytest.raises(ValueError, match=r"large.png: not a usable picture \(expected at most"):
        chat.attach(str(tmp_path / "large.png"))
    assert chat.pending == []


@pytest.mark.parametrize("answer", [None, "\n"], ids=["empty", "blank"])
def test_no_answer_keeps_the_pictures_and_no_turn(session, picture: Path, answer: str | None, capsys) -> None:
    from chat_session import _answer

    chat = session(answer)
    chat.attach(str(picture))
    for _ in range(2):
        _answer(chat, "What colour?")
        assert (len(chat.turns), len(chat.pending)) == (0, 1)
        assert "(no answer)" in capsys.readouterr().err


def test_the_second_turn_still_sees_the_picture(session, picture: Path, monkeypatch) -> None:
    import chat_talkers

    prompts = []
    stream = chat_talkers.stream_answer

    def spy(model, processor, prompt, *arguments, **settings):
        prompts.append(prompt)
        return stream(model, processor, prompt, *arguments, **settings)

    monkeypatch.setattr(chat_talkers, "stream_answer", spy)
    chat = session("e")
    chat.attach(str(picture))
    assert "".join(chat.ask("What colour?")) == "eeee"
    assert "".join(chat.ask("And now?")) == "eeee"
    assert [len(prompt.image_index) for prompt in prompts] == [12, 12]
    assert prompts[1].tiles.equal(prompts[0].tiles)
    # The second prompt goes on from the first, its answer included.
    assert prompts[1].ids[: prompts[0].length].equal(prompts[0].ids)
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2


def test_a_conversation_beyond_the_window_is_refused_in_words(session) -> None:
    chat = session("e", max_positions=60)
    list(chat.ask("what colour is the square?"))
    with pytest.raises(ValueError, match=r"tokens long, the model's window is 60; use /clear"):
        list(chat.ask("what colour is the square? " * 20))
    assert len(chat.turns) == 2
    chat.clear()
    assert "".join(chat.ask("red?")) == "eeee"


def test_an_interrupted_prompt_is_exit_130(session, monkeypatch, capsys) -> None:
    import chat_session
    from chat_config import ChatConfig

    def interrupted(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_session, "_open", lambda config: session("e").talker)
    monkeypatch.setattr("chat_talkers.stream_answer", interrupted)
    assert chat_session.run(ChatConfig(prompt="x")) == 130
    assert "interrupted" in capsys.readouterr().err


def test_missing_image_for_a_script_is_exit_2(run_app, checkpoint: Path) -> None:
    done = run_app("chat", ["--image", "nowhere.png", "--prompt", "x"], checkpoint)
    assert done.returncode == 2
    assert "nowhere.png" in done.stderr
    assert done.stdout == ""


def test_no_checkpoint_says_how_to_make_one(run_app, tmp_path: Path) -> None:
    done = run_app("chat", ["--prompt", "x"], tmp_path)
    assert done.returncode == 2
    assert "uv run apps/train" in done.stderr


@pytest.mark.parametrize("damage", ["no manifest", "cut", "flipped"])
def test_damaged_checkpoint_is_refused(run_app, toy_demo: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(toy_demo / "runs/demo/model", copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "no manifest":
        (copy / "MANIFEST.json").unlink()
    elif damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    else:
        data[-5] ^= 1
        weights.write_bytes(data)
    done = run_app("chat", ["--model", str(copy), "--prompt", "x"], toy_demo)
    assert done.returncode == 2
    wanted = {"no manifest": "MANIFEST.json", "cut": "bytes", "flipped": "sha256"}
    assert wanted[damage] in done.stderr
    assert "Traceback" not in done.stderr
