"""The plan of a large run: operations are those that torch counts, numbers are the model's own, mistakes are named."""

import re
from math import prod

import pytest
import torch
from msgspec.structs import replace
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip3_lite import Blip3, PackedBatch
from blip3_lite.model import undrawn_model

LENGTHS, TILES = (13, 13, 13), 2


def make_batch(model: Blip3, num_targets: int) -> PackedBatch:
    """Equal documents, so that nothing is padded; the image tokens of two tiles stand in the first one."""
    cfg, tokens = model.cfg, sum(LENGTHS)
    targets = torch.full((tokens,), -100)
    targets[-num_targets:] = 1
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    side, latents = cfg.vision.image_px, cfg.connector.num_latents
    return PackedBatch(
        sample_ids=["0", "1", "2"],
        ids=torch.zeros(tokens, dtype=torch.int64),
        targets=targets,
        positions=torch.cat([torch.arange(length) for length in LENGTHS]),
        cu_seqlens=bounds,
        image_index=torch.arange(TILES * latents),
        tiles=torch.randint(0, 256, (TILES, 3, side, side), dtype=torch.uint8),
        valid=torch.ones(TILES, cfg.vision.num_patches, dtype=torch.bool),
        tiles_per_image=(TILES,),
    )


def counted(run) -> int:
    def product(a, b, *_, out_shape, **__) -> int:
        # A norm's sums over a row are not of the products that a plan counts.
        return 0 if 1 in out_shape[-2:] else 2 * prod(a) * b[-1]

    def product_in_place(_, a, b, *more, out_shape, **__) -> int:
        return product(a, b, out_shape=out_shape)

    aten = torch.ops.aten
    # torch has no formula for addmm in place.
    extra = {aten.mm: product, aten.bmm: product, aten.addmm_: product_in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("flags", "num_targets"),
    [
        (["sft"], 20),
        (["sft", "--model.vision.stem", "patch", "--model.lm.num-kv-heads", "1"], 7),
        (["sft", "--trains", "vision_tokenizer"], 20),
        (["sft", "--trains", "vision_encoder", "vision_tokenizer", "lang_model"], 20),
        (["safety"], 20),
        (["sft", "--use-lora"], 2),
        (["safety", "--lora.targets", "o_proj"], 20),
        (["safety", "--lora.use-dora"], 20),
    ],
)
def test_operations_are_those_that_torch_counts(parse, toy_flags, flags, num_targets) -> None:
    from train_operations import PackShape, pack_operations
    from train_stages import freeze

    config = parse(*flags, *toy_flags, "--model.lm.num-layers", "2", "--model.connector.depth", "2")
    torch.manual_seed(0)
    model = Blip3(config.model)
    freeze(model, config.stage)
    batch = make_batch(model, num_targets)
    measured = counted(lambda: model.loss_sum(batch).backward())
    shell = undrawn_model(config.model)
    with shell.device:
        freeze(shell, config.stage)
    shape = PackShape(LENGTHS, TILES, TILES, num_targets)
    parts = pack_operations(shell, shape, is_preference=False)
    assert sum(part.total for part in parts.values()) == measured
    if not config.stage.trains_tower:
        assert parts["vision tower"].backward == parts["vision tower"].repeated == 0


def test_pairs_are_counted_with_their_reference(parse, toy_flags, monkeypatch) -> None:
    import phi3_lite.model
    from train_objectives import PairPack, Preference
    from train_operations import PackShape, pack_operations
    from train_stages import freeze

    # Without gradients so few tokens would be turned by a product, which no real pack is.
    monkeypatch.setattr(phi3_lite.model, "_MOST_MATRIX_ELEMENTS", 0)
    config = parse("dpo", *toy_flags, "--model.lm.num-layers", "2")
    model = Blip3(config.model)
    freeze(model, config.stage)
    batch = make_batch(model, 20)
    # Two equal sequences are a pair.
    batch = PackedBatch(
        **{
            **vars(batch),
            "ids": batch.ids[:26],
            "targets": batch.targets[-26:],
            "positions": batch.positions[:26],
            "cu_seqlens": batch.cu_seqlens[:3],
        }
    )
    measured = counted(
        lambda: (
            Preference(model, config.stage.dpo).loss(PairPack(["a"], batch, ["chosen", "rejected"])).total.backward()
        )
    )
    parts = pack_operations(model, PackShape(LENGTHS[:2], TILES, TILES, 20), is_preference=True)
    assert sum(part.total for part in parts.values()) == measured


def test_layers_that_are_checkpointed_keep_what_autograd_then_keeps(parse, toy_flags) -> None:
    from torch.utils.checkpoint import checkpoint

    from train_activations import checkpointed_numbers, kept_numbers

    widths = ["--model.lm.width", "64", "--model.connector.dim-out", "64", "--model.lm.num-heads", "8"]
    cfg = parse("sft", *toy_flags, *widths, "--model.lm.num-kv-heads", "8", "--model.lm.num-layers", "5").model
    lm, tokens = Blip3(cfg).lang_model, 257
    for layer in lm.model.layers:
        plain = layer.forward
        layer.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = lm(torch.randn(tokens, cfg.lm.width))
    assert result.requires_grad
    measured = sum(storage.nbytes() for storage in kept.values()) / 4
    one, two = (
        kept_numbers(replace(cfg, lm=replace(cfg.lm, num_layers=layers)), tokens, 0)["language model"]
        for layers in (1, 2)
    )
    # Without the layer that is computed again; its input is kept, and what the head reads is not, as there is none.
    estimated = checkpointed_numbers(cfg, tokens, 0)["language model"] - (two - one)
    assert estimated == pytest.approx(measured, rel=0.1)


def plan(train, capsys, *arguments: str) -> list[str]:
    assert train(*arguments, "--dry-run") == 0
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str, nth: int = 0) -> list[str]:
    return [line for line in lines if line.startswith(name)][nth].removeprefix(name).split()


def test_plan_of_the_full_model_needs_no_data_and_no_weights(train, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("train_run.Blip3", None)
    lines = plan(train, capsys, "pretrain-4b", "--devices", "64", "--kind", "h100", "--utilisation", "0.5")
    assert list(tmp_path.iterdir()) == []
    assert row(lines, "all") == ["4,358,937,679", "3,930,712,079"]
    # By hand: 3,930,712,079 numbers of 4 bytes, and twice that of moments; divided by 64 from ZeRO-1 on. Stage 2 keeps
    # whole gradients, of at least the embedding or a gate with its neighbours.
    assert row(lines, "ZeRO-0, or DDP")[:4] == ["16.2", "0.0", "29.3", "14.6"]
    assert row(lines, "ZeRO-1")[:4] == ["16.2", "0.2", "0.5", "14.6"]
    assert row(lines, "ZeRO-2")[:4] == ["16.2", "0.2", "0.5", "0.6"]
    assert row(lines, "ZeRO-3")[:4] == ["0.3", "0.2", "0.5", "0.2"]
    # 2 × 4 bytes × 3.93e9 × 63/64.
    assert row(lines, "ZeRO-0, or DDP", 1)[0] == "31.0"
    # Days from the table's own operations.
    operations = float(row(lines, "all", 1)[0].replace(",", "")) + float(row(lines, "all", 1)[1].replace(",", ""))
    days = operations * 1e12 * 100_000 / (64 * 989e12 * 0.5) / 86_400
    assert float(row(lines, "ZeRO-3", 1)[5]) == pytest.approx(days, abs=0.06)
    assert any("104.9 B tokens" in line for line in lines)
    # 6 operations a trained number and token is not far off, for all that images cost.
    a_token = float(re.findall(r"operations a token: ([\d.]+)e9", "".join(lines))[0])
    assert 6 * 3.93 < a_token < 1.3 * 6 * 3.93


def test_plan_of_the_readme_is_what_is_printed(train, capsys, repo_root) -> None:
    blocks = (repo_root / "README.md").read_text().split("```")
    command, shown = next((a, c) for a, c in zip(blocks, blocks[2:], strict=False) if "--devices 64" in a)
    lines = plan(train, capsys, *command.split("apps/train ")[1].replace("--dry-run", "").split())
    printed = {line.rstrip() for line in lines}
    excerpt = shown.removeprefix("console\n").splitlines()
    assert len(excerpt) > 5
    assert [line for line in excerpt if line not in printed] == []


def test_plan_of_a_data_file_goes_by_its_packs(train, capsys, toy_flags, llava_data) -> None:
    flags = ["--data", str(llava_data), *toy_flags, "--devices", "1", "--kind", "a100", "--link-gb-per-s", "7"]
    lines = plan(train, capsys, "sft", *flags)
    said = next(line for line in lines if line.startswith("tokens of a step"))
    average = next(line for line in lines if "on average" in line)
    assert re.findall(r"step: ([\d,]+),", said) == re.findall(r"on average ([\d,]+)", average)
    assert any("at 7 GB/s" in line for line in lines)
    assert "first samples; the loss is taken of what stands between « and »" in lines
    # Alone there is nothing to send.
    assert row(lines, "ZeRO-3", 1)[:4] == ["0.0", "0.0", "0.0", "0.00"]


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--kind", "h100"], "--devices: expected with --kind, got none"),
        (
            ["--devices", "8"],
            "--kind: expected with --devices, got none; give --devices N and --kind a100, h100 or h200",
        ),
        (["--devices", "8", "--kind", "b9"], "--kind: expected one of a100, h100, h200, got b9"),
        (["--devices", "--kind", "h100"], "--devices: expected a name or number, got --kind behind it"),
        (["--kind", "h100", "--devices"], "--devices: expected a name or number, got nothing behind it"),
        (["--devices", "two", "--kind", "h100"], "--devices: expected a whole number, got two"),
        (["--devices", "0", "--kind", "h100"], "--devices: expected at least 1, got 0"),
        (
            ["--devices", "24", "--kind", "h100"],
            "--devices: expected a divisor of the 64 packs of a step (1, 2, 4, 8, 16, 32, 64), got 24",
        ),
        (["--devices", "8", "--kind", "h100", "--utilisation", "0"], "--utilisation: expected above 0 and at most 1"),
        (["--devices", "8", "--kind", "h100", "--utilisation", "nan"], "--utilisation: expected above 0 and at most 1"),
        (["--devices", "8", "--kind", "h100", "--link-gb-per-s=-1"], "--link-gb-per-s: expected above 0, got -1.0"),
        (["--devices", "8", "--kind", "h100", "--image-share", "2"], "--image-share: expected 0 to 1, got 2.0"),
    ],
)
def test_mistakes_in_a_plan_are_named(train, capsys, flags, hint) -> None:
    assert train("pretrain-4b", "--dry-run", *flags) == 2
    assert hint in capsys.readouterr().err


def test_plan_without_dry_run_is_refused(train, capsys) -> None:
    assert train("pretrain-4b", "--devices", "8", "--kind", "h100") == 2
    assert "--devices: expected together with --dry-run" in capsys.readouterr().err
