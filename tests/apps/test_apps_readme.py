"""The README's commands are typed as they stand there, in its order and with its data file; only lengths are cut."""

import io
import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

CUT = {"500": "2", "50": "1", "PICTURE": "images/0.png", "PICTURES": "images"}
"""What is typed in place of a length and of a placeholder."""


@pytest.fixture
def chat(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """`apps/chat` in this process, with a user who leaves at once: arguments → exit status."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/chat"))
    import chat_config
    from chat_session import run

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        return run(chat_config.parse_command_line(arguments))

    return call


@pytest.fixture
def evaluate(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """`apps/evaluate` in this process: arguments → exit status."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/evaluate"))
    from evaluate_config import parse_command_line
    from evaluate_run import run

    return lambda *arguments: run(parse_command_line(arguments))


@pytest.fixture
def preview(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """`tools/preview.py` in this process: arguments → exit status."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    from preview import main

    return lambda *arguments: main(arguments)


def _blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)


def _write_data(folder: Path, data_file: str) -> None:
    """Lay out what the README's data file speaks of."""
    (folder / "data.toml").write_text(data_file)
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    rows = []
    with tarfile.open(folder / "shards/0.tar", "w") as shard:
        for index in range(4):
            path = folder / f"images/{index}.png"
            Image.new("RGB", (60, 40 + index), (50 * index, 90, 120)).save(path)
            talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"word {index}"}]
            rows.append({"id": str(index), "image": path.name, "conversations": talk})
            for name, content in [(f"{index}.png", path.read_bytes()), (f"{index}.txt", b"a plain picture")]:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    (folder / "train.json").write_text(json.dumps(rows))


def test_commands_of_the_readme_run_in_its_order(
    train, chat, evaluate, preview, repo_root: Path, toy_demo: Path, tmp_path: Path, capsys
) -> None:
    readme = (repo_root / "README.md").read_text()
    (data_file,) = _blocks(readme, "toml")
    _write_data(tmp_path, data_file)
    ours = ("uv run apps/", "uv run tools/preview.py")
    lines = [line for block in _blocks(readme, "sh") for line in block.splitlines() if line.startswith(ours)]
    typed = [[CUT.get(word, word) for word in shlex.split(line)[2:]] for line in lines]
    # The first one is what `toy_demo` ran, with sizes cut too.
    assert typed.pop(0) == ["apps/train"]
    shutil.copytree(toy_demo / "runs", tmp_path / "runs")
    for app, *arguments in typed:
        calls = {"apps/train": train, "apps/chat": chat, "apps/evaluate": evaluate, "tools/preview.py": preview}
        call = calls[app]
        assert call(*arguments) == 0, (arguments, capsys.readouterr().err)
    assert (tmp_path / "preview.html").exists()
    assert any("--resume" in arguments for arguments in typed)
    metrics = [(tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("mine", "again")]
    hexes = [[json.loads(line)["loss_hex"] for line in lines] for lines in metrics]
    assert len(hexes[0]) == 2
    assert hexes[0] == hexes[1]
