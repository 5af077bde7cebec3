"""The real command line of apps/evaluate, on a model of toy size."""

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip3_lite import Blip3, save_model


@pytest.fixture
def evaluate(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Arguments → (exit status, standard output, standard error), in an empty folder."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/evaluate"))
    monkeypatch.chdir(tmp_path)
    from evaluate_config import parse_command_line
    from evaluate_run import run

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            status = run(parse_command_line([str(argument) for argument in arguments]))
        except SystemExit as end:
            status = int(end.code or 0)
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_config, tiny_processor) -> list[Path]:
    """Two models of toy size with other weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (3, 4):
        model = Blip3(tiny_config, generator=torch.Generator().manual_seed(seed)).eval()
        save_model(folder / f"m{seed}", model, tiny_processor)
    return [folder / "m3", folder / "m4"]


def _picture(level: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (24, 16), (level, 80, 255 - level)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """DAQUAR's and SEED's form, nine questions each; one picture is broken, one question has marks of HTML."""
    folder = tmp_path / "data"
    (folder / "daquar/images").mkdir(parents=True)
    (folder / "seed/SEED-Bench-image").mkdir(parents=True)
    questions, train, seed = [], [], []
    for index in range(9):
        content = b"none" if index == 4 else _picture(25 * index)
        (folder / f"daquar/images/{index}.png").write_bytes(content)
        (folder / f"daquar/images/t{index}.png").write_bytes(_picture(25 * index + 7))
        (folder / f"seed/SEED-Bench-image/{index}").write_bytes(_picture(25 * index))
        asked = "what is <script>alert(1)</script>" if index == 2 else f"what is {index}"
        questions.append(
            {"question_id": f"q{index}", "image": f"images/{index}.png", "question": asked, "answer": f"<b>{index}"}
        )
        talk = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
        train.append({"id": f"t{index}", "image": f"images/t{index}.png", "conversations": talk})
        choices = {f"choice_{letter}": f"{letter} thing" for letter in "abcd"}
        seed.append(
            {
                "question_id": str(index),
                "question": "which?",
                "answer": "ABCD"[index % 4],
                "data_id": str(index),
                **choices,
            }
        )
    (folder / "daquar/eval.json").write_text(json.dumps(questions))
    (folder / "daquar/train.json").write_text(json.dumps(train))
    (folder / "seed/SEED-Bench.json").write_text(json.dumps({"questions": seed, "question_type": {}}))
    return folder


def test_twice_gives_the_same_json_and_all_files_are_there(evaluate, checkpoints, data: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        status, said, log = evaluate(
            checkpoints[0], "--tasks", "daquar", "seed", "--data", data, "--out", out, "--json", f"{out}.json"
        )
        assert status == 0, log
        assert "daquar accuracy 0 (0 to " in said
    figures = (tmp_path / "a.json").read_bytes()
    assert figures == (tmp_path / "b.json").read_bytes()
    content = json.loads(figures)
    assert content["tasks"]["daquar"]["accuracy"].keys() == {"value", "low", "high", "n"}
    assert content["tasks"]["daquar"]["accuracy"]["n"] == 9
    assert content["left_out"] == {"daquar": {"not_an_image": 1}}
    lines = [json.loads(line) for line in (tmp_path / "a/predictions/daquar.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"q{index}" for index in range(9)]
    assert [line.get("skip_reason") for line in lines].count("not_an_image") == 1
    assert all(line["tokens"] for line in lines if "skip_reason" not in line)
    page = (tmp_path / "a/report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;0" in page
    assert "not_an_image" in page
    assert "data:image/" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_batches_of_one_and_eight_say_the_same(evaluate, checkpoints, data: Path, tmp_path: Path) -> None:
    rows = []
    for size in (1, 8):
        assert (
            evaluate(checkpoints[0], "--tasks", "daquar", "--data", data, "--out", size, "--batch-size", size)[0] == 0
        )
        path = tmp_path / str(size) / "predictions/daquar.jsonl"
        rows.append([json.loads(line) for line in path.read_text().splitlines()])
    for one, eight in zip(*rows, strict=True):
        assert one.get("tokens") == eight.get("tokens") or one["near_tie"]


def test_shots_change_the_prompt_and_follow_from_the_seed(evaluate, checkpoints, data: Path, tmp_path: Path) -> None:
    def said(out: str, *flags: str) -> str:
        status, _, log = evaluate(
            checkpoints[0], "--tasks", "daquar", "--data", data, "--out", out, "--manner", "base", *flags
        )
        assert status == 0, log
        return (tmp_path / out / "predictions/daquar.jsonl").read_text()

    random = ("--shots", "2")
    assert said("a", *random) == said("b", *random)
    answers = [said("c"), said("a", *random), said("d", *random, "--seed", "1")]
    answers += [said("e", *random, "--demonstrations", "similar"), said("f", "--text-only-shots", "2")]
    assert len(set(answers)) == 5


def test_likelihood_answers_with_letters(evaluate, checkpoints, data: Path, tmp_path: Path) -> None:
    status, _, log = evaluate(checkpoints[0], "--tasks", "seed", "--data", data, "--out", "a", "--mode", "likelihood")
    assert status == 0, log
    lines = [json.loads(line) for line in (tmp_path / "a/predictions/seed.jsonl").read_text().splitlines()]
    assert {line["prediction"] for line in lines} <= set("ABCD")
    assert all(len(line["nats"]) == 4 for line in lines)
    assert "accuracy_per_token" in json.loads((tmp_path / "a/figures.json").read_text())["tasks"]["seed"]
    status, _, log = evaluate(checkpoints[0], "--tasks", "daquar", "--data", data, "--mode", "likelihood")
    assert status == 2
    assert "list of possible answers" in log


def test_two_models_are_compared_in_pairs(evaluate, checkpoints, data: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "seed", "--data", data, "--mode", "likelihood"]
    assert evaluate(checkpoints[0], *arguments, "--out", "a", "--compare", checkpoints[1])[0] == 0
    assert evaluate(checkpoints[1], *arguments, "--out", "b")[0] == 0
    both = json.loads((tmp_path / "a/figures.json").read_text())
    alone = json.loads((tmp_path / "b/figures.json").read_text())
    assert both["compare"]["tasks"] == alone["tasks"]
    values = [part["seed"]["accuracy"]["value"] for part in (both["tasks"], alone["tasks"])]
    difference = both["compare"]["differences"]["seed"]["accuracy"]
    assert difference["value"] == pytest.approx(values[0] - values[1])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert "Difference, drawn in pairs" in (tmp_path / "a/report.html").read_text()


def test_the_world_needs_no_files(evaluate, checkpoints, tmp_path: Path) -> None:
    status, said, log = evaluate(checkpoints[0], "--limit", "1", "--out", "a")
    assert status == 0, log
    assert "world accuracy 0 (0 to 0, n 13)" in said
    status, said, log = evaluate(checkpoints[0], "--tasks", "world-documents", "--limit", "3", "--out", "a")
    assert status == 0, log
    assert "world-documents perplexity" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "daquer"], "did you mean daquar"),
        (["--tasks", "world", "world"], "expected each once"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--shots", "2", "--text-only-shots", "2"], "expected 0 beside shots"),
        (["--tasks", "pope"], "task pope: expected a folder pope with coco_pope_"),
        (["--tasks", "seed=nowhere"], "expected a folder nowhere with SEED-Bench.json"),
    ],
)
def test_bad_command_lines_end_with_status_2_and_a_reason(evaluate, checkpoints, arguments, message: str) -> None:
    status, _, log = evaluate(checkpoints[0], *arguments)
    assert status == 2
    # tyro wraps its box.
    assert message.replace(" ", "") in log.replace("\n", "").replace("│", "").replace(" ", "")


def test_a_checkpoint_that_is_none_is_named(evaluate, tmp_path: Path) -> None:
    status, _, log = evaluate("nothing", "--limit", "1")
    assert status == 2
    assert "checkpoint nothing: expected a folder" in log
    (tmp_path / "empty").mkdir()
    status, _, log = evaluate("empty", "--limit", "1")
    assert status == 2
    assert "empty" in log


def test_a_killed_run_goes_on_to_the_same_files(
    repo_root: Path, evaluate, checkpoints, data: Path, tmp_path: Path
) -> None:
    arguments = ["--tasks", "daquar", "seed", "--data", str(data), "--batch-size", "1"]
    assert evaluate(checkpoints[0], *arguments, "--out", "whole")[0] == 0
    command = [sys.executable, str(repo_root / "apps/evaluate"), str(checkpoints[0]), *arguments, "--out", "killed"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        end = time.monotonic() + 120
        # Killed once the first window's answers are on disk.
        while time.monotonic() < end and process.poll() is None:
            if any(path.stat().st_size for path in (tmp_path / "killed/answers").glob("*")):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
    assert evaluate(checkpoints[0], *arguments, "--out", "killed")[0] == 0
    for name in ("figures.json", "predictions/daquar.jsonl", "predictions/seed.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_help_and_the_command_line_import_no_torch(repo_root: Path) -> None:
    code = "import sys; import evaluate_config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root / "apps/evaluate", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
