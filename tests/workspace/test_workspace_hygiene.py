"""What may stand in the tree at all."""

import re
import subprocess
from pathlib import Path

import pytest

MAX_BYTES = 1_000_000
# Spelt in pieces, or this file would hold them.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pypi", "python", "org"),
        ("python" + "hosted", "org"),
        ("download", "pytorch", "org"),
        ("conda", "anaconda", "org"),
        ("registry", "npmjs", "org"),
        ("proxy", "golang", "org"),
        ("crates", "io"),
    )
]
MACHINE_PATH = re.compile(r"(?<![\w.$}>*-])/(?:root|home|work|Users|tmp|mnt)/\w+")


@pytest.fixture(scope="module")
def tracked(repo_root: Path) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=repo_root, capture_output=True
    )
    if done.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    paths = [repo_root / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.fixture(scope="module")
def texts(tracked: list[Path]) -> dict[Path, str]:
    return {path: path.read_bytes().decode("utf-8", errors="replace") for path in tracked}


def test_no_file_is_large(tracked: list[Path]) -> None:
    assert [str(path) for path in tracked if path.stat().st_size > MAX_BYTES] == []


def test_no_registry_host_is_named(texts: dict[Path, str]) -> None:
    assert [(str(p), host) for p, text in texts.items() for host in REGISTRY_HOSTS if host in text.lower()] == []


def test_no_path_of_a_machine_is_named(texts: dict[Path, str]) -> None:
    assert [(str(p), m[0]) for p, text in texts.items() for m in MACHINE_PATH.finditer(text)] == []


@pytest.mark.parametrize("text", ["see {}root/x", '"{}home/ann/data"', "in {}work/main"])
def test_path_of_a_machine_is_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text.format("/"))


@pytest.mark.parametrize("text", ["packages/work/x", "https://a.b/home/x", "$HOME/work/x", "runs/root/x"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_lock_of_download_addresses_is_not_tracked(repo_root: Path) -> None:
    done = subprocess.run(["git", "ls-files", "uv.lock"], cwd=repo_root, capture_output=True, text=True)
    assert done.stdout == ""


def test_no_pickle_is_read_or_written(texts: dict[Path, str]) -> None:
    pattern = re.compile(
        r"^\s*(?:import|from) (?:pickle|dill|joblib|cloudpickle|shelve)\b|\btorch\.(?:load|save)\(", re.M
    )
    sources = {p: text for p, text in texts.items() if p.suffix == ".py" and "tests" not in p.parts}
    found = [(p.name, m[0]) for p, text in sources.items() for m in pattern.finditer(text)]
    # The one exception, which asks its user first and reads tensors only.
    assert found == [("pickled.py", "torch.load(")]
    (exception,) = (text for p, text in sources.items() if p.name == "pickled.py")
    assert exception.count("torch.load(") == exception.count("weights_only=True, mmap=True)") == 1


def test_package_says_that_it_is_typed(member) -> None:
    assert (member.source / "py.typed").is_file()


def test_package_is_listed_wherever_packages_are(member, root_pyproject) -> None:
    project, tool = root_pyproject["project"], root_pyproject["tool"]
    assert member.name in project["dependencies"]
    assert tool["uv"]["sources"][member.name] == {"workspace": True}
    assert member.module in tool["importlinter"]["root_packages"]
    assert re.search(rf"\b{member.module}\b", " ".join(tool["importlinter"]["contracts"][0]["layers"]))
    hook = next(o for o in tool["pytest"]["ini_options"]["addopts"] if o.startswith("--jaxtyping-packages="))
    assert member.module in hook.split("=")[1].split(",")


def test_package_describes_itself(member) -> None:
    assert member.readme.startswith(f"# {member.name}\n")
