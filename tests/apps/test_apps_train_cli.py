"""The training command line: quick and clear about mistakes, exact about what it resolved, resumable."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from blip3_lite import load_model
from interleave_data import InMemory, Sample, TextPart, Turn


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["sftt"], "did you mean sft?"),
        (["sft", "--max-stepss", "3"], "erhaps you meant"),
        (["sft", "--max-steps", "many"], "many"),
        (["sft", "--max-steps", "0"], "max_steps"),
        (["sft", "--max-samples", "129"], "max_samples: expected 1 to 128"),
        (["sft", "--trains"], "trains: expected at least one part"),
        (["sft", "--objective", "preference", "--noise", "0.5"], "add --use-lora"),
        (["sft", "--eval-questions", "-1"], "eval_questions: expected at least 0"),
        (["sft", "--data", "data.toml", "--eval-questions", "5"], "eval_questions: expected 0 with a data file"),
        (["sft", "--data", "nowhere.toml"], "nowhere.toml: expected a readable data file"),
        (["sft", "--data", "data.toml"], "did you mean `ratio`?"),
        (["sft", "--resume"], "--resume: expected a readable runs/sft/config.json"),
        (["--resume"], "--resume: expected a recipe or --out"),
        (["warmup", "--batch-size", "0"], "batch_size: expected at least 1"),
        (["warmup", "--world-samples", "0"], "world_samples: expected at least 1"),
        (["--eval-questions", "0"], "eval_questions: expected at least 1"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--config", "unknown.json"], "did you mean `world_samples`?"),
    ],
)
def test_a_mistake_is_named_with_exit_2(parse, tmp_path: Path, monkeypatch, capsys, arguments, hint) -> None:
    """(T23)"""
    monkeypatch.chdir(tmp_path)
    _write_mistakes(tmp_path)
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
    said = capsys.readouterr()
    # Boxes and line ends of the terminal are not part of the message.
    assert hint in " ".join((said.out + said.err).replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_the_same_flags_without_a_mistake_are_taken(parse, tmp_path: Path, monkeypatch) -> None:
    """(T23): the control."""
    monkeypatch.chdir(tmp_path)
    _write_mistakes(tmp_path)
    data = tmp_path / "data.toml"
    data.write_text(data.read_text().replace("ratioo", "ratio"))
    flags = ["--max-steps", "3", "--max-samples", "128", "--trains", "vision_tokenizer", "--data", "data.toml"]
    stage = parse("sft", *flags).stage
    assert (stage.train.max_steps, stage.max_samples, stage.trains) == (3, 128, ("vision_tokenizer",))


@pytest.mark.parametrize("arguments", [["sft", "--max-stepss", "3"], ["sft", "--data", "data.toml"]])
def test_a_mistake_is_told_before_torch_is_imported(run_app, tmp_path: Path, arguments) -> None:
    """(T23)"""
    # A torch that cannot be imported stands before the real one: whoever imports it fails loudly.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    _write_mistakes(tmp_path)
    done = run_app("train", arguments, tmp_path, environment={"PYTHONPATH": _before(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert "torch was imported" not in done.stderr


def _write_mistakes(folder: Path) -> None:
    source = '[[sources]]\nname = "a"\nformat = "llava-json"\npath = "x"\n'
    (folder / "data.toml").write_text(f"{source}ratioo = 2\n")
    (folder / "unknown.json").write_text('{"recipe": "sft", "config": {"stage": {"world_sample": 3}}}')


def _before(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def test_help_lists_recipes_and_flags(run_app, tmp_path: Path) -> None:
    done = run_app("train", ["sft", "--help"], tmp_path)
    assert done.returncode == 0
    for word in ("pretrain", "interleaved", "--data", "--init", "--out", "--max-steps", "--model.tiling.kind"):
        assert word in done.stdout


def test_a_missing_checkpoint_is_named_and_no_run_folder_is_made(train, tmp_path: Path, toy_flags, capsys) -> None:
    """(T23)"""
    assert train("sft", "--init", "nowhere", *toy_flags) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_stage_from_a_data_file_saves_config_and_a_model(run_app, tmp_path: Path, toy_flags, llava_data: Path) -> None:
    """(T31): two fresh processes, each with a hash seed of its own"""
    done = run_app("train", ["sft", "--data", str(llava_data), "--out", "mine", *toy_flags], tmp_path)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "mine/config.json").read_text())
    assert saved["recipe"] == "sft"
    assert saved["config"]["stage"]["train"]["max_steps"] == 2
    # Two steps of more tokens than the eight conversations have see each of them.
    first = _lines(tmp_path / "mine")[0]
    assert first["skipped"] == {}
    again = run_app("train", ["--config", "mine/config.json", "--out", "again"], tmp_path)
    assert again.returncode == 0, again.stderr
    hexes = [[line["loss_hex"] for line in _lines(tmp_path / name)] for name in ("mine", "again")]
    assert hexes[0] == hexes[1]
    load_model(tmp_path / "mine/checkpoints/step-00000002")


def test_resumed_run_equals_an_uninterrupted_one(run_app, tmp_path: Path, toy_flags, llava_data: Path) -> None:
    common = [
        "sft",
        "--data",
        str(llava_data),
        *toy_flags,
        "--max-steps",
        "6",
        "--save-every",
        "2",
        "--max-samples",
        "3",
    ]
    whole = run_app("train", [*common, "--out", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    partial = run_app("train", [*common, "--out", "part"], tmp_path)
    assert partial.returncode == 0, partial.stderr
    # As if the process had died behind step 4: its later checkpoint is gone, its later log lines are still there.
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000006")
    (tmp_path / "part/checkpoints/latest").write_text("step-00000004\n")
    # Pictures are read in this process first, then in two of their own: that moves no weight.
    resumed = run_app("train", [*common, "--out", "part", "--resume", "--num-workers", "2"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    wanted, got = _lines(tmp_path / "whole"), _lines(tmp_path / "part")
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    assert [line["loss_hex"] for line in got] == [line["loss_hex"] for line in wanted]
    assert [line["samples_digest"] for line in got] == [line["samples_digest"] for line in wanted]


def test_existing_run_folder_is_not_overwritten(train, toy_demo: Path, toy_flags, capsys) -> None:
    assert train("sft", "--out", str(toy_demo / "runs/demo"), *toy_flags) == 2
    assert "resume it or choose another name" in capsys.readouterr().err


def test_bad_samples_are_counted_and_fail_the_run_above_the_share(
    train, tmp_path: Path, toy_flags, llava_data: Path, capsys
) -> None:
    """(T12): the control, the same data under other limits"""
    rows = json.loads((llava_data.parent / "train.json").read_text())
    rows[0]["image"] = "missing.png"
    rows[1]["conversations"][1]["value"] = " "
    rows[2] |= {"image": ["0.png", "1.png"]}
    rows[3]["conversations"][1]["value"] = "long " * 2000
    (tmp_path / "train.json").write_text(json.dumps(rows))
    head = '[[sources]]\nname = "bad"\nformat = "llava-json"\n'
    text = head + f'path = "{tmp_path}/train.json"\nimage_root = "{llava_data.parent}"\n'
    (tmp_path / "lenient.toml").write_text(text + "[skip_limits]\nmax_share = 0.9\n")
    (tmp_path / "strict.toml").write_text(text + "[skip_limits]\nmax_share = 0.1\nmin_seen = 4\n")
    assert train("sft", "--data", "lenient.toml", "--out", "lenient", *toy_flags) == 0
    skipped = _lines(tmp_path / "lenient")[-1]["skipped"]
    assert {reason for reason, count in skipped.items() if count > 0} == {
        "unreadable_file",
        "empty_answer",
        "image_marks",
        "too_long",
    }
    assert train("sft", "--data", "strict.toml", "--out", "strict", *toy_flags) == 3
    assert "bad samples" in capsys.readouterr().err
    # Cut instead, the long one is no skipped one.
    assert train("sft", "--data", "lenient.toml", "--out", "cut", *toy_flags, "--too-long", "truncate-text") == 0
    cut = _lines(tmp_path / "cut")[-1]
    assert cut["skipped"].keys() == skipped.keys() - {"too_long"}
    assert cut["truncated"] > 0
    assert f"  skipped {sum(cut['skipped'].values())} (" in capsys.readouterr().err


def test_stage_can_start_from_a_demo_checkpoint(train, toy_demo: Path, tmp_path: Path, capsys) -> None:
    init = str(toy_demo / "runs/demo/model")
    assert train("safety", "--init", init, "--max-steps", "1", "--eval-questions", "3") == 0
    said = capsys.readouterr()
    assert "overall" in said.out
    assert "linear_cross_entropy=" in said.err
    page = (tmp_path / "runs/safety/report.html").read_text()
    assert "<h2>Accuracy on held-out questions</h2>" in page
    # Without its adapters the model is the one that the stage began with: the figures stand beside each other.
    assert "<h2>Post-training: attacks, truthfulness, helpfulness</h2>" in page
    assert "<th>before</th><td>" in page
    dpo = (toy_demo / "runs/demo/predictions/safety.jsonl").read_text()
    assert (tmp_path / "runs/safety/predictions-before.jsonl").read_text() == dpo
    assert load_model(tmp_path / "runs/safety/checkpoints/step-00000001").config.lora is not None
    # The demo, of the same seed, asked the same questions and let the model speak as long.
    theirs = [json.loads(line) for line in (toy_demo / "runs/demo/predictions/safety.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in (tmp_path / "runs/safety/predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["answer"]) for line in ours] == [(line["id"], line["answer"]) for line in theirs]


def test_a_preference_stage_makes_pairs_of_the_models_errors_and_goes_on_with_them(
    train, toy_demo: Path, tmp_path: Path
) -> None:
    init = str(toy_demo / "runs/demo/model")
    flags = ["--init", init, "--own-errors", "6", "--world-samples", "6", "--max-samples", "1", "--noise", "0.9"]
    assert train("dpo", *flags, "--max-steps", "4", "--save-every", "3", "--out", "whole") == 0
    errors = (tmp_path / "whole/own_errors.jsonl").read_text().splitlines()
    assert 1 <= len(errors) <= 6
    # Between the two steps of the second iteration.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000004")
    (tmp_path / "again/checkpoints/latest").write_text("step-00000003\n")
    assert train("--out", "again", "--resume") == 0
    one, other = (
        (tmp_path / name / "checkpoints/step-00000004/model.safetensors").read_bytes() for name in ("whole", "again")
    )
    assert one == other


def test_a_preference_stage_without_adapters_keeps_its_reference(train, toy_demo: Path, tmp_path: Path) -> None:
    flags = ["--init", str(toy_demo / "runs/demo/model"), "--world-samples", "3", "--max-steps", "2"]
    assert train("dpo", *flags, "--no-use-lora", "--trains", "lang_model", "--out", "mine") == 0
    kept = json.loads((tmp_path / "mine/reference.json").read_text())["log_probs"]
    assert len(kept) == 6
    lines = [json.loads(line) for line in (tmp_path / "mine/metrics.jsonl").read_text().splitlines()]
    # In the first step the policy is the reference.
    assert lines[0]["parts"]["kl"] == pytest.approx(0, abs=1e-8)
    assert lines[1]["parts"]["kl"] > 0


def test_adapters_are_switched_by_a_flag(train, parse, tmp_path: Path, toy_flags, llava_data: Path) -> None:
    flags = ["--data", str(llava_data), *toy_flags, "--max-steps", "1"]
    assert train("sft", "--use-lora", "--lora.rank", "3", *flags) == 0
    lora = load_model(tmp_path / "runs/sft/checkpoints/step-00000001").config.lora
    assert lora is not None
    assert lora.rank == 3
    assert train("safety", "--no-use-lora", "--trains", "lang_model", *flags) == 0
    assert load_model(tmp_path / "runs/safety/checkpoints/step-00000001").config.lora is None


def test_packs_of_many_samples_are_a_matter_of_one_flag(train, parse, tiny_processor) -> None:
    from train_stream import StageData, make_stream

    turns = (Turn(role="document", parts=(TextPart("red"),)),)
    samples = [Sample(id=str(index), source="mine", turns=turns) for index in range(7)]
    stage = parse("sft", "--max-samples", "100").stage
    batch = next(iter(make_stream(stage, StageData([InMemory("mine", samples)]), tiny_processor, None)))
    assert len(batch.sample_ids) == 100


@pytest.fixture
def stopped_run(train, toy_demo: Path, tmp_path: Path, llava_data: Path) -> list[str]:
    """A run of four steps from a demo's model, of which the last two are lost, and its copy without a loss."""
    shutil.copytree(llava_data.parent, tmp_path / "data")
    data = (tmp_path / "data/data.toml").read_text().replace(str(llava_data.parent), ".")
    (tmp_path / "data/data.toml").write_text(data.replace("./train", "train"))
    flags = ["sft", "--data", "data/data.toml", "--init", str(toy_demo / "runs/demo/model"), "--max-samples", "3"]
    assert train(*flags, "--max-steps", "4", "--save-every", "2", "--out", "mine") == 0
    shutil.copytree(tmp_path / "mine", tmp_path / "whole")
    shutil.rmtree(tmp_path / "mine/checkpoints/step-00000004")
    (tmp_path / "mine/checkpoints/latest").write_text("step-00000002\n")
    return ["--out", "mine", "--resume"]


def test_resume_takes_everything_from_the_run_folder(train, stopped_run: list[str], tmp_path: Path) -> None:
    # Neither recipe nor data nor checkpoint nor length: a fresh model of another size is what the recipe says.
    assert train(*stopped_run) == 0
    hexes = [[line["loss_hex"] for line in _lines(tmp_path / name)] for name in ("whole", "mine")]
    assert len(hexes[0]) == 4
    assert hexes[0] == hexes[1]
    whole, mine = (tmp_path / name / "checkpoints/step-00000004" for name in ("whole", "mine"))
    assert (mine / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert (mine / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_resume_refuses_other_settings(train, stopped_run: list[str], tmp_path: Path, capsys) -> None:
    for flags, hint in [
        (["--max-steps", "9"], "max_steps: 4 there, 9 now"),
        (["--views", "base"], "views: tiles there, base now"),
        (["--trains", "lang_model"], "trains: ('vision_tokenizer', 'lang_model') there, ('lang_model',) now"),
        (["--use-lora"], "use_lora: False there, True now"),
        (["--model.lm.num-layers", "9"], "model.lm.num_layers: 4 there, 9 now"),
        (["--init", "elsewhere"], "elsewhere now"),
    ]:
        assert train(*stopped_run, *flags) == 2
        assert hint in capsys.readouterr().err
    assert train("dpo", *stopped_run) == 2
    assert "expected the recipe dpo, got one of sft" in capsys.readouterr().err
    text = (tmp_path / "data/data.toml").read_text()
    (tmp_path / "data/data.toml").write_text(text + "[image_limits]\nmax_pixels = 4000000\n")
    assert train(*stopped_run) == 2
    said = capsys.readouterr().err
    assert "expected the same settings and data" in said
    assert "4000000" in said
    # What moves no weight may change.
    (tmp_path / "data/data.toml").write_text(text + "[skip_limits]\nmax_share = 0.5\n")
    assert train(*stopped_run, "--log-every", "7", "--save-every", "0") == 0


def test_a_run_that_saved_nothing_begins_again(train, stopped_run: list[str], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "mine/checkpoints")
    assert train(*stopped_run) == 0
    hexes = [[line["loss_hex"] for line in _lines(tmp_path / name)] for name in ("whole", "mine")]
    assert len(hexes[0]) == 4
    assert hexes[0] == hexes[1]


@pytest.mark.parametrize(("error", "status"), [(OSError("disk full"), 4), (KeyboardInterrupt(), 130)])
def test_trouble_of_the_loop_has_a_status(train, toy_flags, llava_data, monkeypatch, capsys, error, status) -> None:
    import train_run

    def fail(*_arguments):
        raise error

    monkeypatch.setattr(train_run, "fit_stage", fail)
    assert train("sft", "--data", str(llava_data), *toy_flags) == status
    assert "checkpoints that are there are whole" in capsys.readouterr().err


def test_a_bug_in_the_loop_is_not_taken_for_bad_input(train, toy_flags, llava_data: Path, monkeypatch) -> None:
    import train_run

    def fail(*_arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(train_run, "fit_stage", fail)
    with pytest.raises(ValueError, match="a bug"):
        train("sft", "--data", str(llava_data), *toy_flags)


def test_sigmoid_warmup_trains_the_tower_alone(train, tmp_path: Path, toy_flags) -> None:
    assert train("warmup", "--objective", "sigmoid", "--batch-size", "4", *toy_flags) == 0
    assert [line["stage"] for line in _lines(tmp_path / "runs/warmup")] == ["warmup", "warmup"]


def test_a_sample_left_out_is_named_with_its_shard_and_place(train, tmp_path: Path, toy_flags) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a word"}]
    rows = [{"image": f"{name}.png", "conversations": talk} for name in ("good", "cut", "good", "absent")]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "data.toml").write_text(
        '[[sources]]\nname = "toy"\nformat = "llava-json"\npath = "train.json"\nepochs = 1\n'
        "[skip_limits]\nmax_share = 1.0\n"
    )
    assert train("sft", "--data", "data.toml", "--out", "mine", *toy_flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "mine/skips.jsonl").read_text().splitlines()]
    assert sorted((line["stage"], line["step"], line["sample_ids"], line["reason"]) for line in lines) == [
        ("sft", 1, ["toy/train.json:1"], "broken_image"),
        ("sft", 1, ["toy/train.json:3"], "unreadable_file"),
    ]


def test_a_shard_that_goes_while_the_run_reads_it_is_bad_data(
    train, tmp_path: Path, toy_flags, monkeypatch, capsys
) -> None:
    import train_run

    (tmp_path / "x.jsonl").write_text('{"text": "some words"}\n' * 5)
    (tmp_path / "data.toml").write_text('[[sources]]\nname = "s"\nformat = "text"\npath = "x.jsonl"\n')
    fit = train_run.fit_stage

    def fit_without_shard(trainer, model):
        (tmp_path / "x.jsonl").rename(tmp_path / "gone")
        trainer.stream.stream._maker.sources[0]._open.clear()
        return fit(trainer, model)

    monkeypatch.setattr(train_run, "fit_stage", fit_without_shard)
    assert train("sft", "--data", "data.toml", *toy_flags) == 3
    assert "x.jsonl: expected it and its index as they were opened" in capsys.readouterr().err
    assert train("sft", "--data", "data.toml", "--out", "second", *toy_flags) == 2


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_sample_too_long_where_that_is_an_error_is_bad_data(
    train, tmp_path: Path, toy_flags, llava_data: Path, capsys, num_workers: str
) -> None:
    flags = ["--max-tokens", "9", "--too-long", "error", "--num-workers", num_workers]
    assert train("sft", "--data", str(llava_data), *flags, *toy_flags) == 3
    assert re.search(r"train: toy/train\.json:\d: expected at most 9 tokens", capsys.readouterr().err)
