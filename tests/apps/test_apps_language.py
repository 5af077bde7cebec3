"""apps/train on published parts: the recipe smollm2, and a stage that starts from a tower and a language model."""

import json
from pathlib import Path

import pytest
import torch

from blip3_lite import load_model
from phi3_lite import ChatTemplate, Phi3, Phi3Config, load_lm, save_huggingface, train_tokenizer

TOY = [
    "--vision.width", "16", "--vision.num-layers", "1", "--vision.num-heads", "2", "--vision.mlp-width", "16",
    "--connector.dim", "16", "--connector.depth", "1", "--connector.num-heads", "1", "--connector.head-dim", "8",
    "--connector.num-latents", "8", "--warmup.max-steps", "1", "--warmup.batch-size", "2", "--stage.max-steps", "2",
]  # fmt: skip


@pytest.fixture
def language(tmp_path: Path) -> Path:
    """A published language model of toy size."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["What colour is it? red green"], 290)
    model = Phi3(
        Phi3Config(vocab_size=300, width=32, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16, max_positions=512)
    )
    save_huggingface(tmp_path / "lm", model, tokenizer, chat=ChatTemplate(tokenizer))
    return tmp_path / "lm"


def test_a_language_model_is_given_sight_and_asked_with_right_and_exchanged_pictures(train, language, tmp_path):
    assert train("smollm2", "--language", str(language), "--eval-questions", "1", *TOY) == 0
    summary = json.loads((tmp_path / "runs/smollm2/summary.json").read_text())
    right, exchanged = (
        [json.loads(line)["is_correct"] for line in file.read_text().splitlines()]
        for file in (tmp_path / f"runs/smollm2/predictions/{name}.jsonl" for name in ("right", "exchanged"))
    )
    assert len(right) == len(exchanged) == len(summary["right"]["skills"])
    assert summary["difference"] == pytest.approx((sum(right) - sum(exchanged)) / len(right))
    assert summary["low"] <= summary["difference"] <= summary["high"]
    page = (tmp_path / "runs/smollm2/report.html").read_text()
    assert "<th>right pictures</th><th>exchanged pictures</th>" in page
    loaded = load_model(tmp_path / "runs/smollm2/model")
    assert loaded.config.model.lm.vocab_size == 300
    # Adapters moved the language model; its embedding, which they leave alone, is the published one.
    published = load_lm(language).model
    ours = loaded.model.lang_model
    assert ours.model.embed_tokens.weight.equal(published.model.embed_tokens.weight)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not ours.state_dict()[name].equal(published.state_dict()[name])


def test_a_missing_language_model_says_how_to_get_one(train, capsys):
    assert train("smollm2", *TOY) == 2
    assert "tools/fetch_smollm2.py" in capsys.readouterr().err


def test_a_stage_starts_from_a_tower_and_a_language_model(train, language, tmp_path):
    assert train("smollm2", "--language", str(language), "--eval-questions", "0", *TOY) == 0
    parts = ["--vision", "runs/smollm2/model", "--language", str(language)]
    sizes = ["--model.connector.depth", "1", "--model.connector.num-latents", "8"]
    assert train("sft", *parts, *sizes, "--max-steps", "1", "--trains", "vision_tokenizer") == 0
    before, after = (
        load_model(path).model for path in (tmp_path / "runs/smollm2/model", _newest(tmp_path / "runs/sft"))
    )
    tower, same = before.vision_encoder.state_dict(), after.vision_encoder.state_dict()
    assert all(tower[name].equal(same[name]) for name in tower)
    assert after.cfg.connector.dim_out == 32


def _newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vision", "x"], "vision: expected together with --language"),
        (["--language", "x"], "language: expected together with --vision"),
        (["--vision", "x", "--language", "y", "--init", "z"], "choose one start"),
        (["--vision", "x", "--language", "y"], "x"),
    ],
)
def test_parts_that_make_no_model_are_refused(train, capsys, flags, message):
    assert train("sft", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_language_model_alone_is_no_start(train, capsys, language):
    assert train("sft", "--init", str(language)) == 2
    assert "use --language" in capsys.readouterr().err
