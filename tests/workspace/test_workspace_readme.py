"""The README tells the truth: its tree exists, every package is in it, its commands and their flags can be typed.

Conventions that are read here: a tree is drawn in a fenced block marked `text`, by indentation or by lines; commands
start with `uv run`; words in <angle brackets> or in CAPITALS, and parts with `*` or `…`, are placeholders.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

FROM_ROOT = re.compile(r"(?<![\w./-])(?:packages|apps|tools|tests|\.ci)/[\w./-]*")


def fenced(markdown: str, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in blocks if language in languages]


def tree_paths(block: str) -> Iterator[str]:
    """Yield every path of a drawn tree: the first word of a line is a name, its column tells what it is in."""
    parents: list[tuple[int, str]] = []
    for line in block.splitlines():
        match = re.match(r"^([\s│├└─]*)([\w.<{*…-][^\s]*)", line)
        if not match:
            continue
        column, name = len(match[1]), match[2]
        while parents and parents[-1][0] >= column:
            parents.pop()
        prefix = parents[-1][1] if parents else ""
        if not re.search(r"[<>*…{}]", prefix + name):
            yield prefix + name
        parents.append((column, prefix + name.rstrip("/") + "/"))


def commands(markdown: str) -> list[str]:
    """List every command that starts with `uv run`, from code blocks and from code within text."""
    code = "\n".join(fenced(markdown, "sh", "bash", "console", "text", ""))
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", markdown)
    lines = code.replace("\\\n", " ").splitlines() + inline
    found = [re.split(r"\s+#|\s[|&;>]", line.strip().removeprefix("$ "))[0] for line in lines]
    return sorted({" ".join(line.split()) for line in found if line.startswith("uv run ")})


def program_call(command: str) -> tuple[str, tuple[str, ...], list[str]] | None:
    """Split a call of a program of ours into its path, its subcommands and its flags; None for any other command."""
    words = [word.strip("[]") for word in shlex.split(command)[2:]]
    if not words or not re.match(r"(apps|tools)/", words[0]):
        return None
    subcommands = []
    for word in words[1:]:
        if not re.fullmatch(r"[a-z][a-z0-9_|-]*", word):
            break
        subcommands.append(word.split("|")[0])
    flags = [word.split("=")[0] for word in words[1:] if re.match(r"--[a-z]", word)]
    return words[0], tuple(subcommands), flags


@cache
def help_text(root: Path, path: str, subcommands: tuple[str, ...]) -> str:
    command = [sys.executable, str(root / path), *subcommands, "--help"]
    wide = os.environ | {"COLUMNS": "300"}
    done = subprocess.run(command, cwd=root, env=wide, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def readme(repo_root: Path) -> str:
    return (repo_root / "README.md").read_text()


def test_every_path_in_the_readme_exists(repo_root: Path, readme: str) -> None:
    named = {match.rstrip(".") for match in FROM_ROOT.findall(readme)}
    drawn = {path for block in fenced(readme, "text", "") if "packages/" in block for path in tree_paths(block)}
    assert drawn
    # A run folder is made by running.
    wanted = {path for path in named | drawn if not path.startswith("runs")}
    assert sorted(path for path in wanted if not (repo_root / path).exists()) == []


def test_every_package_is_in_the_readme(readme: str, member) -> None:
    assert re.search(rf"(?<![\w-]){member.name}(?![\w-])", readme)


def test_every_command_in_the_readme_can_be_typed(repo_root: Path, readme: str) -> None:
    calls = [call for call in map(program_call, commands(readme)) if call]
    assert {"apps/train", "apps/chat", "apps/evaluate"} <= {path for path, _, _ in calls}
    for path, subcommands, flags in calls:
        assert (repo_root / path).exists(), path
        known = set(re.findall(r"--[\w.-]+", help_text(repo_root, path, subcommands))) | {"--help"}
        assert [flag for flag in flags if flag not in known] == [], path


def test_the_test_command_is_in_the_readme(readme: str) -> None:
    assert "uv run pytest" in commands(readme)


def test_contributing_names_existing_paths(repo_root: Path) -> None:
    text = (repo_root / "CONTRIBUTING.md").read_text()
    assert sorted(p for p in {m.rstrip(".") for m in FROM_ROOT.findall(text)} if not (repo_root / p).exists()) == []
    for path, subcommands, flags in filter(None, map(program_call, commands(text))):
        assert [flag for flag in flags if flag not in help_text(repo_root, path, subcommands)] == []


def test_tree_paths_reads_indentation_and_lines() -> None:
    indented = "packages/            all of them\n  a-b/  does a\n  <name>/\n    src/\napps/\n  train/\nREADME.md\n"
    assert list(tree_paths(indented)) == ["packages/", "packages/a-b/", "apps/", "apps/train/", "README.md"]
    lined = "packages/\n├── a-b/   does a\n│   └── src/\n└── c/\n"
    assert list(tree_paths(lined)) == ["packages/", "packages/a-b/", "packages/a-b/src/", "packages/c/"]


def test_commands_are_found_in_blocks_and_in_text() -> None:
    text = "Type `uv run apps/chat --image A` or\n```sh\nuv run apps/train sft --data B  \\\n  --out C  # so\nls\n```\n"
    assert commands(text) == ["uv run apps/chat --image A", "uv run apps/train sft --data B --out C"]


def test_program_call_tells_subcommands_from_flags() -> None:
    call = program_call("uv run apps/train pretrain|sft --data FILE [--out=DIR] --max-steps 3")
    assert call == ("apps/train", ("pretrain",), ["--data", "--out", "--max-steps"])
    assert program_call("uv run pytest -q") is None
