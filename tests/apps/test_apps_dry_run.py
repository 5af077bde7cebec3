"""`--dry-run`: counts are the model's own, estimates near what is measured, samples as they are learnt."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from anyres_tiler import TilingConfig
from blip3_lite import Blip3, save_model


@pytest.fixture
def dry(train, monkeypatch: pytest.MonkeyPatch, capsys):
    """Arguments → the lines of a dry run in an empty folder, in which no weight may be drawn."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was drawn")

    def call(*arguments: str) -> list[str]:
        with monkeypatch.context() as patch:
            for kind in ("normal_", "uniform_"):
                patch.setattr(torch.nn.init, kind, lambda weight, *_, **__: None if weight.is_meta else refuse())
            patch.setattr("train_run.Blip3", refuse)
            patch.setattr("train_run.open_model", refuse)
            assert train(*arguments, "--dry-run") == 0
        assert not Path("runs").exists()
        return capsys.readouterr().out.splitlines()

    return call


def row(lines: list[str], name: str, nth: int = 0) -> list[str]:
    """Cells of the n-th line that begins with a name."""
    return [line for line in lines if line.startswith(name)][nth].removeprefix(name).split()


def test_counts_are_those_of_the_model_and_nothing_is_written(
    dry, parse, toy_flags, llava_data: Path, tmp_path: Path
) -> None:
    lines = dry("sft", "--data", str(llava_data), *toy_flags)
    assert list(tmp_path.iterdir()) == []
    config = parse("sft", *toy_flags)
    model = Blip3(config.model)
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in [
            ("vision tower", model.vision_encoder),
            ("connector", model.vision_tokenizer),
            ("language model", model.lang_model),
        ]
    }
    for name, count in counts.items():
        trained = 0 if name == "vision tower" else count
        assert row(lines, name) == [f"{count:,}", f"{trained:,}"]
        weights, gradients, _, *_ = (float(cell) for cell in row(lines, name, 1))
        assert weights == pytest.approx(count * 4 / 2**20, abs=0.06)
        assert gradients == pytest.approx(trained * 4 / 2**20, abs=0.06)
    assert row(lines, "all") == [f"{sum(counts.values()):,}", f"{sum(counts.values()) - counts['vision tower']:,}"]


def test_adapters_and_pairs_are_told_too(dry, toy_flags, parse, tmp_path: Path) -> None:
    pairs = [{"prompt": f"what is {n}?", "chosen": f"word {n}", "rejected": "who knows"} for n in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "data.toml").write_text(
        '[[sources]]\nname = "pairs"\nformat = "preference-jsonl"\npath = "pairs.jsonl"\n'
    )
    lines = dry("dpo", "--data", "data.toml", *toy_flags)
    lora, lm = (parse("dpo", *toy_flags).stage.lora, parse("dpo", *toy_flags).model.lm)
    qkv = (lm.num_heads + 2 * lm.num_kv_heads) * lm.head_dim
    maps = [(lm.width, qkv), (lm.width, lm.width), (lm.width, 2 * lm.mlp_width), (lm.mlp_width, lm.width)]
    trained = lora.rank * sum(sum(sides) for sides in maps) * lm.num_layers
    assert row(lines, "language model")[1] == f"{trained:,}"
    assert row(lines, "connector")[1] == "0"
    shown = [line for line in lines if "of them learnt" in line]
    # Both answers of three pairs.
    assert len(shown) == 6
    assert [line.split(":")[0] for line in shown[::2]] == [line.split(":")[0] for line in shown[1::2]]


def test_steps_an_epoch_and_samples_of_a_data_file(dry, toy_flags, llava_data: Path) -> None:
    flags = ["--data", str(llava_data), "--max-samples", "2", "--accumulation-steps", "2", "--max-tokens", "1000"]
    lines = dry("sft", *flags, *toy_flags)
    # Eight samples, two a pack, two packs a step.
    name, samples, *_, a_step, steps = next(line for line in lines if line.startswith("toy")).split()
    assert (name, samples, a_step, steps) == ("toy", "8", "4.0", "2.0")
    assert "2 steps are these epochs: 1.00 of toy" in lines
    assert next(line for line in lines if line.startswith("tokens a step")).startswith(
        "tokens a step: 2,000 at most (2 × 1,000)"
    )
    shown = lines[lines.index("first samples; the loss is taken of what stands between « and »") + 1 :]
    assert len(shown) == 6
    for head, text in zip(shown[::2], shown[1::2], strict=True):
        number = int(head.split("json:")[1].split(":")[0])
        answer = f"word {number}" if number < 6 else ("no", "four")[number - 6]
        assert text.endswith(f"«{answer}<|end|>»")
        assert text.count("[image") == (1 if number < 6 else (2, 0)[number - 6])


def test_start_from_a_checkpoint_reads_no_weights(
    dry, toy_flags, llava_data: Path, tmp_path: Path, tiny_model, tiny_processor
) -> None:
    save_model(tmp_path / "start", tiny_model, tiny_processor)
    lines = dry("sft", "--data", str(llava_data), "--init", str(tmp_path / "start"), *toy_flags)
    total = sum(parameter.numel() for parameter in tiny_model.parameters())
    assert row(lines, "all")[0] == f"{total:,}"
    # The tiny model has 3 latents, the one of the flags 4.
    images = re.findall(r"\[image \d: (\d+) tokens?, (\d+) tiles?\]", "".join(lines))
    assert images
    assert all(int(tokens) == 3 * int(tiles) for tokens, tiles in images)


def test_optimiser_bytes_are_what_the_optimisers_hold(parse, toy_flags) -> None:
    from train_dry_run import part_sizes
    from train_stages import freeze
    from trainer_lite import Optimizers

    for recipe, kind in (("sft", "muon"), ("safety", "adamw")):
        config = parse(recipe, *toy_flags)
        assert config.stage.train.optimizer.kind == kind
        model = Blip3(config.model)
        freeze(model, config.stage)
        sizes = part_sizes(model, config.stage)
        optimizers = Optimizers(model.named_parameters(), config.stage.train.optimizer)
        for parameter in optimizers.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizers.step()
        # AdamW's count of steps, one number a tensor, is left out.
        held = sum(value.nbytes for value in optimizers.state_tensors().values() if value.ndim > 0)
        assert sum(size.optimizer_bytes for size in sizes) == held
        assert sum(size.gradient_bytes for size in sizes) == sum(grad.nbytes for grad in optimizers.gradients())
        assert sum(size.weight_bytes for size in sizes) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("kind", ["anyres", "anyres_fixed"])
def test_activation_estimate_is_near_what_autograd_keeps(parse, kind) -> None:
    from msgspec.structs import replace

    from siglip_lite import normalise
    from train_activations import kept_numbers

    cfg = parse("sft", "--model.vision.num-layers", "2", "--model.lm.num-layers", "2").model
    cfg = replace(cfg, tiling=TilingConfig(tile_px=cfg.vision.image_px, kind=kind, grids=((1, 2),)))
    model = Blip3(cfg)
    tokens, tiles = 301, 6
    groups = tiles if kind == "anyres" else tiles // 3
    features = torch.randn(groups, tiles // groups * cfg.vision.num_patches, cfg.vision.width)
    estimated = kept_numbers(cfg, tokens, tiles)
    pixels = torch.randint(0, 256, (tiles, 3, cfg.vision.image_px, cfg.vision.image_px), dtype=torch.uint8)
    runs = {
        "vision tower": lambda: model.vision_encoder(normalise(pixels)),
        "connector": lambda: model.vision_tokenizer(features),
        "language model": lambda: model.lang_model(torch.randn(tokens, cfg.lm.width)),
    }
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for part, run in runs.items():
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # The result stands for what follows, which the estimate does not count.
            result = run()
        measured = sum(storage.nbytes() for storage in kept.values()) / 4
        assert result.requires_grad
        assert estimated[part] == pytest.approx(measured, rel=0.1), part


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "--dry-run: expected a stage (pretrain, sft,"),
        (["warmup"], "got warmup"),
        (["sft", "--init", "nowhere"], "nowhere"),
        (["sft", "--data", "nowhere.toml"], "nowhere.toml"),
        (["sft-4b"], "expected --data FILE"),
    ],
)
def test_mistakes_end_with_2(train, tmp_path: Path, capsys, arguments, hint) -> None:
    assert train(*arguments, "--dry-run") == 2
    assert hint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_is_not_gone_on_with(train, toy_flags, llava_data: Path, tmp_path: Path, capsys) -> None:
    flags = ["--data", str(llava_data), *toy_flags]
    assert train("sft", *flags) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert train("sft", "--resume", "--dry-run") == 2
    assert "--dry-run: expected no --resume" in capsys.readouterr().err
    assert train("sft", "--resume", "auto", "--dry-run") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_data_of_bad_samples_alone_ends_with_3(train, toy_flags, tmp_path: Path, capsys) -> None:
    """(T12)"""
    talk = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(number), "image": "gone.png", "conversations": talk} for number in range(9)]
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    rows[0]["image"] = "there.png"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "data.toml").write_text(
        '[[sources]]\nname = "toy"\nformat = "llava-json"\npath = "train.json"\n[skip_limits]\nmax_consecutive = 3\n'
    )
    assert train("sft", "--data", "data.toml", *toy_flags, "--dry-run") == 3
    assert "unreadable_file" in capsys.readouterr().err


def test_shares_of_the_sources_are_those_of_the_mixture_though_long_samples_are_packed_first(
    dry, toy_flags, tmp_path: Path
) -> None:
    tables = []
    for name, words in (("long", 60), ("short", 6)):
        rows = [{"text": f"{n} " + "word " * words} for n in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tables.append(f'[[sources]]\nname = "{name}"\nformat = "text"\npath = "{name}.jsonl"\n')
    (tmp_path / "data.toml").write_text("".join(tables))
    for more in ([], ["--max-samples", "4"]):
        lines = dry("sft", "--data", "data.toml", "--max-tokens", "250", *more, *toy_flags)
        (_, long_tokens, _, long, _), (_, short_tokens, _, short, _) = (row(lines, name) for name in ("long", "short"))
        assert float(long) == pytest.approx(float(short), abs=0.11)
        a_step = float(long) * float(long_tokens) + float(short) * float(short_tokens)
        said = re.search(r"on average ([\d,]+) .*, ([\d.]+) samples", next(x for x in lines if "on average" in x))
        assert said is not None
        assert int(said[1].replace(",", "")) == pytest.approx(a_step, rel=0.05)
        assert float(said[2]) == pytest.approx(float(long) + float(short), abs=0.11)
        if more:
            assert float(said[2]) == pytest.approx(4, rel=0.1)
