"""Ablations: intervals and verdicts by hand, samples and questions, and the command on arms of toy size."""

import json
import random
from pathlib import Path
from statistics import mean, stdev

import msgspec
import pytest
import torch

from scene_world import Picture, World

TABLE_OF_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 12: 2.179, 30: 2.042, 120: 1.980}


@pytest.fixture
def app(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app's modules can be imported."""
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))


def test_quantiles_of_t_are_those_of_the_printed_tables(app) -> None:
    from train_ablate_statistics import t_quantile

    for degrees, printed in TABLE_OF_T.items():
        assert t_quantile(degrees) == pytest.approx(printed, rel=0.003)
    assert t_quantile(float("inf")) == pytest.approx(1.95996, abs=1e-4)
    assert t_quantile(5.9) == t_quantile(5)


def test_interval_over_seeds_alone_is_student_s(app) -> None:
    """Questions that all give the same leave the seeds' means: one sample of three."""
    from train_ablate_statistics import crossed_interval

    seeds = [0.1, 0.3, 0.35]
    found = crossed_interval([[value] * 7 for value in seeds])
    half = 4.3027 * stdev(seeds) / 3**0.5
    assert found.value == pytest.approx(mean(seeds))
    assert (found.low, found.high) == pytest.approx((mean(seeds) - half, mean(seeds) + half), rel=1e-4)
    assert found.by_seed == pytest.approx(seeds)


def test_interval_over_questions_alone_is_student_s(app) -> None:
    """Seeds that all answer alike leave the questions: seeds add nothing to what is known."""
    from train_ablate_statistics import crossed_interval

    row = [1.0, 0.0, 0.0, 1.0, 0.0]
    found = crossed_interval([row] * 4)
    half = 2.776 * stdev(row) / 5**0.5
    assert found.high - found.value == pytest.approx(half, rel=1e-3)


def test_interval_covers_the_truth_where_both_vary(app) -> None:
    from train_ablate_statistics import crossed_interval

    draw, covered, tries = random.Random(0), 0, 300
    for _ in range(tries):
        seeds, questions = [draw.gauss(0, 0.2) for _ in range(3)], [draw.gauss(0, 1) for _ in range(11)]
        found = crossed_interval([[s + q + draw.gauss(0, 1) for q in questions] for s in seeds])
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / tries <= 0.99


def test_three_seeds_that_agree_by_chance_are_not_taken_for_certain(app) -> None:
    from train_ablate_statistics import contrast, crossed_interval, share
    from vlm_metrics import paired_difference, wilson_interval

    a, b = [[True] * 10] * 3, [[False] * 10] * 3
    assert crossed_interval([[1.0] * 10] * 3).low == 1.0
    assert share(a).low == wilson_interval(30, 30)[0] < 1.0
    found = contrast({"a": a, "b": b}, {"a": 1, "b": -1})
    assert (found.value, found.low) == (1.0, paired_difference([True] * 30, [False] * 30).low)


def test_contrasts_weigh_arms_question_by_question(app) -> None:
    from train_ablate_statistics import contrast

    arms = {
        "x1": [[True, False, False]] * 3,
        "x2": [[True, True, False]] * 3,
        "x4": [[True, True, True]] * 3,
    }
    assert contrast(arms, {"x4": 1, "x2": -1}).value == pytest.approx(1 / 3)
    assert contrast(arms, {"x1": -1, "x2": 2, "x4": -1}).value == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("low", "high", "expects", "verdict"),
    [
        (0.01, 0.2, "more", "agrees"),
        (0.0, 0.2, "more", "undecided"),
        (-0.2, -0.01, "more", "disagrees"),
        (-0.04, 0.05, "same", "agrees"),
        (-0.04, 0.06, "same", "undecided"),
        (0.06, 0.2, "same", "disagrees"),
        (-0.2, -0.06, "same", "disagrees"),
    ],
)
def test_a_verdict_follows_the_rule(app, low: float, high: float, expects: str, verdict: str) -> None:
    from train_ablate_statistics import Estimate, judge

    estimate = Estimate(value=(low + high) / 2, low=low, high=high, by_seed=[], n=1)
    assert judge(estimate, expects, 0.05) == verdict  # type: ignore[arg-type]


def test_without_its_control_an_ablation_is_invalid(app) -> None:
    from train_ablate_statistics import overall

    assert overall(["agrees", "agrees"], "undecided") == "invalid"
    assert overall(["agrees", "agrees"], "agrees") == "agrees"
    assert overall(["agrees", "undecided"], "agrees") == "undecided"
    assert overall(["undecided", "disagrees"], "agrees") == "disagrees"


def test_ablations_name_samples_and_skills_that_exist(app) -> None:
    from train_ablate_data import AblationDrawers, draw_questions, sample_kinds
    from train_ablate_table import ABLATIONS, TOWERS

    assert len(ABLATIONS) >= 8
    known = sample_kinds(AblationDrawers(World(0)))
    ablations = [make() for make in ABLATIONS.values()]
    skills = sorted({skill for ablation in ablations for skill in ablation.skills})
    assert sorted({item.group for item in draw_questions(skills, 1, 1)}) == skills
    for ablation in ablations:
        for arm in ablation.arms.values():
            assert arm.tower in (None, *TOWERS)
            assert all(set(lesson.sources) <= set(known) for lesson in arm.lessons)


def test_arms_see_as_many_samples_a_step_whatever_their_tokens(app) -> None:
    from train_ablate_table import tiling, tokens

    for ablation in (tiling(), tokens()):
        assert len({msgspec.json.encode(arm.lessons) for arm in ablation.arms.values()}) == 1
        stage = next(iter(ablation.arms.values())).lessons[0].stage
        assert stage.max_samples is not None
        assert stage.world_samples == stage.max_samples * stage.train.max_steps


def test_worked_examples_are_told_in_the_order_that_is_asked(app) -> None:
    from interleave_data import TextPart
    from train_ablate_data import draw_questions, is_right

    none, four = (draw_questions([skill], 8, 1) for skill in ("0-shot", "4-shot"))
    for index, (bare, shown) in enumerate(zip(none, four, strict=True)):
        assert bare.prompt.images()[-1].key == shown.prompt.images()[-1].key
        assert len(shown.prompt.images()) == 5
        assert shown.answer in bare.answer.split(" | ")
        assert is_right(shown, f"{shown.answer}, and more.")
        assert all(is_right(bare, answer) for answer in bare.answer.split(" | "))
        others = [answer for answer in bare.answer.split(" | ") if answer != shown.answer]
        assert not any(is_right(shown, answer) for answer in others)
        first = shown.prompt.turns[0].parts[1]
        assert isinstance(first, TextPart)
        # The box order has numbers, the order by place begins with a place.
        assert any(sign.isdigit() for sign in first.text) == (index % 4 == 3)


def test_captions_can_leave_out_print_or_places(app) -> None:
    from train_ablate_data import AblationDrawers

    drawers = AblationDrawers(World(0, "train"), ("word",))
    texts = {
        name: [getattr(drawers, name)(index).turns[0].parts[1].text for index in range(8)]
        for name in ("caption", "caption_without_print", "caption_without_places")
    }
    assert all(text.startswith("the print ") for text in texts["caption"])
    assert not any("print" in text for text in texts["caption_without_print"])
    assert [text.partition(" with ")[2] for text in texts["caption"]] == texts["caption_without_print"]
    for index, text in enumerate(texts["caption_without_places"]):
        picture = World(0, "train").picture(index, "word")
        told = {
            thing.removeprefix("an ").removeprefix("a ")
            for thing in text.rstrip(".").partition(" with ")[2].split(", ")
        }
        assert text.startswith(f"the print {' '.join(picture.text)} with a")
        assert told == {f"{shape.colour} {shape.name}" for shape in picture.shapes}


def test_sums_of_bars_are_true(app) -> None:
    from train_ablate_data import ask_sum

    for index in range(10):
        picture = World(3, "heldout").picture(index, "chart")
        assert isinstance(picture, Picture)
        question, answer = ask_sum(picture, random.Random(index))
        height = {bar.colour: int(bar.name) for bar in picture.items}
        a, b = question.removeprefix("How high is ").removesuffix("?").split(" plus ")
        assert a != b
        assert height[a] + height[b] == int(answer)


def test_exchanged_pictures_keep_their_places(app) -> None:
    from train_ablate_data import draw_questions, exchange_pictures

    items = draw_questions(["4-shot", "colour"], 3, 1)
    exchanged = exchange_pictures(items)
    for group in ("4-shot", "colour"):
        before, after = ([item for item in some if item.group == group] for some in (items, exchanged))
        for place, item in enumerate(after):
            assert [image.key for image in item.prompt.images()] == [
                image.key for image in before[(place + 1) % 3].prompt.images()
            ]
            kinds = [[type(part) for part in turn.parts] for turn in item.prompt.turns]
            assert kinds == [[type(part) for part in turn.parts] for turn in before[place].prompt.turns]
            assert item.answer == before[place].answer


@pytest.mark.parametrize(
    ("side", "count", "cells"),
    [(8, 16, (4, 4)), (8, 8, (2, 4)), (8, 32, (4, 8)), (8, 1, (1, 1)), (8, 12, None), (6, 6, (2, 3)), (8, 0, None)],
)
def test_a_grid_is_divided_into_cells_near_squares(app, side: int, count: int, cells: tuple[int, int] | None) -> None:
    from train_vision import cells_of

    assert cells_of(side, count) == cells


def _toy_tokenizer(vocab_size: int):
    from phi3_lite import train_tokenizer

    return train_tokenizer(World(0).texts(2), vocab_size)


@pytest.fixture
def toy(app, train, parse, toy_model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An ablation of two arms, one step each, behind a fresh model; the command: arguments → exit status."""
    import train_ablate
    import train_ablate_cli
    import train_ablate_table
    from blip3_lite import Blip3, Processor, save_model
    from train_ablate_plan import Ablation, Arm, Contrast, Control

    cfg = parse("demo", *toy_model).model
    torch.manual_seed(0)
    save_model(
        tmp_path / "runs/ablations/starts/warmup",
        Blip3(cfg),
        Processor(cfg, _toy_tokenizer(cfg.lm.vocab_size)),
        manifest={"stage": "warmup"},
    )
    lesson = train_ablate_table._questions(1, "scene")
    ablation = Ablation(
        title="Toy",
        claim="<nothing>",
        source="nowhere",
        done="as little as can be",
        start="warmup",
        arms={
            "plain": Arm(means="a step", lessons=(lesson,), num_latents=4),
            "fresh": Arm(means="a fresh connector", lessons=(lesson,), num_latents=2, connector_steps=1),
        },
        skills=("colour", "presence"),
        contrasts=(Contrast(says="one above the other", weights={"plain": 1, "fresh": -1}, skills=("colour",)),),
        control=Control(arm="plain", skills=("colour",)),
    )
    for module in (train_ablate, train_ablate_cli):
        monkeypatch.setattr(module, "ABLATIONS", {"toy": lambda: ablation})
    return lambda *arguments: train("ablate", *arguments)


def test_an_ablation_goes_on_where_it_stopped_and_writes_its_page(toy, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "runs/ablations/toy"
    assert toy("toy", "--questions", "3", "--max-arms", "2") == 0
    made = {path.name: path.stat().st_mtime_ns for path in (folder / "arms").glob("*.json")}
    assert set(made) == {"plain-0.json", "fresh-0.json"}
    assert not (folder / "page.html").exists()
    assert "missing: plain-1, plain-2, fresh-1, fresh-2" in capsys.readouterr().err
    assert toy("toy", "--questions", "3") == 0
    assert all((folder / "arms" / name).stat().st_mtime_ns == time for name, time in made.items())
    found = json.loads((folder / "result.json").read_bytes())
    # A toy that has learnt nothing sees nothing, and must not conclude anything.
    assert found["verdict"] == "invalid"
    assert capsys.readouterr().out == "toy: invalid\n"
    assert (found["num_seeds"], found["num_questions"]) == (3, 3)
    assert set(found["arms"]) == {"plain", "fresh"}
    assert [len(arm["absent_f1"]) for arm in found["arms"].values()] == [3, 3]
    page = (folder / "page.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "&lt;nothing&gt;" in page
    assert page.count("data:image/") == 4
    picture = (folder / "picture.svg").read_text()
    assert picture in page
    assert "<title>Toy: invalid</title>" in picture


def test_an_arm_that_another_command_holds_is_left_to_it(toy, tmp_path: Path, monkeypatch, capsys) -> None:
    import train_ablate

    held = train_ablate._held

    def held_elsewhere(path: Path):
        if path.name == ".plain-1.lock":
            from contextlib import nullcontext

            return nullcontext(False)
        return held(path)

    monkeypatch.setattr(train_ablate, "_held", held_elsewhere)
    assert toy("toy", "--questions", "2") == 0
    assert "missing: plain-1;" in capsys.readouterr().err
    assert len(list((tmp_path / "runs/ablations/toy/arms").glob("*.json"))) == 5


def test_results_of_other_settings_are_made_again(toy, tmp_path: Path) -> None:
    assert toy("toy", "--questions", "2", "--max-arms", "1") == 0
    path = tmp_path / "runs/ablations/toy/arms/plain-0.json"
    before = json.loads(path.read_bytes())
    assert toy("toy", "--questions", "3", "--max-arms", "1") == 0
    after = json.loads(path.read_bytes())
    assert before["fingerprint"] != after["fingerprint"]
    assert after["predictions"][:2] == before["predictions"][:2]
    assert after["loss"] == before["loss"]


def test_the_start_can_be_a_demo_s(toy, tmp_path: Path, capsys) -> None:
    assert toy("toy", "--questions", "2", "--max-arms", "1") == 0
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/ablations/starts/warmup").rename(tmp_path / "mine/checkpoints/step-00000001")
    capsys.readouterr()
    assert toy("toy", "--questions", "2", "--max-arms", "1", "--demo", "mine") == 0
    # The same weights: what is done counts.
    assert "2 arms, 3 seeds each: 1 of 6 done" in capsys.readouterr().err
    assert toy("toy", "--demo", "elsewhere") == 2
    assert "expected the run folder of a demo that got through warmup, got elsewhere" in capsys.readouterr().err


def test_starts_are_trained_once_and_kept(app, train, parse, toy_model, monkeypatch, tmp_path: Path) -> None:
    import train_ablate
    from blip3_lite import load_model
    from trainer_lite import StopFlag

    demo = parse(
        "demo", *toy_model, "--warmup.max-steps", "1", "--pretrain.max-steps", "1", "--pretrain.num-workers", "0"
    )
    monkeypatch.setattr(train_ablate, "demo_model", lambda: demo.model)
    monkeypatch.setattr(train_ablate, "warmup_stage", lambda: demo.warmup)
    monkeypatch.setattr(train_ablate, "pretrain_stage", lambda: demo.pretrain)
    monkeypatch.setattr(train_ablate, "world_tokenizer", _toy_tokenizer)
    for place in ("warmup", "pretrain"):
        train_ablate._make(place, tmp_path, torch.device("cpu"), StopFlag())
    before, after = (load_model(tmp_path / place).model.state_dict() for place in ("warmup", "pretrain"))
    moved = {name.split(".")[0] for name, tensor in after.items() if not tensor.equal(before[name])}
    assert moved == {"vision_tokenizer", "lang_model"}
    written = (tmp_path / "warmup/MANIFEST.json").stat().st_mtime_ns
    train_ablate._make("warmup", tmp_path, torch.device("cpu"), StopFlag())
    assert (tmp_path / "warmup/MANIFEST.json").stat().st_mtime_ns == written


def test_ablations_can_be_listed_and_misspelt(train, capsys) -> None:
    assert train("ablate", "--list") == 0
    listed = capsys.readouterr().out
    assert "tiling" in listed
    assert train("ablate", "tilin") == 2
    assert "did you mean tiling?" in capsys.readouterr().err
    assert train("ablate") == 2
    assert "see --list" in capsys.readouterr().err
    assert train("ablate", "tiling", "--seeds", "2") == 2


def test_small_print_is_all_that_is_asked_of_a_page(app) -> None:
    from interleave_data import Sample, TextPart
    from train_ablate_data import AblationDrawers

    sample = AblationDrawers(World(0, "train")).small_print(3)
    assert isinstance(sample, Sample)
    told = [part.text for turn in sample.turns for part in turn.parts if isinstance(part, TextPart)]
    assert told == ["Read the small print.", " ".join(World(0, "train").picture(3, "page").text)]
