"""Each package stands alone: built as a wheel, and run where only what it declares can be imported.

The environments of the default run need no network and no installation: the wheels are unpacked, and everything else
that they declare, at any depth, is linked from the present environment into a folder which is the only one on the path.
The test marked nightly installs the wheels for real.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Torch warns if there is no numpy; whether there is one is not for our packages to say.
WARNINGS = ["-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning"]
UV = os.environ.get("UV") or shutil.which("uv")


@dataclass(frozen=True)
class Wheel:
    path: Path
    requires: list[Requirement]
    files: list[str]

    @property
    def modules(self) -> list[str]:
        names = [name.removesuffix(".py").replace("/", ".") for name in self.files if name.endswith(".py")]
        return sorted(name.removesuffix(".__init__") for name in names if not name.endswith(".__main__"))


def read_wheel(path: Path) -> Wheel:
    with zipfile.ZipFile(path) as archive:
        files = archive.namelist()
        metadata = next(name for name in files if name.endswith(".dist-info/METADATA"))
        header = Parser().parsestr(archive.read(metadata).decode())
    requires = [Requirement(line) for line in header.get_all("Requires-Dist", [])]
    return Wheel(path, requires, [name for name in files if ".dist-info/" not in name])


def declared_closure(requires: Iterable[Requirement], wheels: dict[str, Wheel]) -> set[str]:
    """Names of all that is needed, at any depth, with wheels of the workspace preferred to what is installed."""
    found: set[tuple[str, str]] = set()
    queue = [(requirement, "") for requirement in requires]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in found:
                continue
            found.add((name, wanted))
            lines = distribution(name).requires or [] if name not in wheels else []
            children = wheels[name].requires if name in wheels else [Requirement(line) for line in lines]
            queue += [(child, wanted) for child in children]
    return {name for name, _ in found}


def link_site(site: Path, names: Iterable[str], wheels: dict[str, Wheel]) -> None:
    """Make the folder `site`: the workspace's wheels unpacked, all else linked to where it is installed."""
    site.mkdir()
    for name in names:
        if name in wheels:
            with zipfile.ZipFile(wheels[name].path) as archive:
                archive.extractall(site)
            continue
        dist = distribution(name)
        tops = {file.parts[0] for file in dist.files or [] if ".." not in file.parts and file.parts[0] != "__pycache__"}
        for top in tops:
            target = site / top
            if not target.exists():
                target.symlink_to(Path(str(dist.locate_file(top))))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Wheel]:
    if UV is None:
        pytest.skip("uv is not on the path: run the tests by `uv run pytest`")
    out = tmp_path_factory.mktemp("dist")
    command = [UV, "build", "--all-packages", "--wheel", "--out-dir", str(out)]
    # What builds them was fetched when the workspace was installed.
    done = subprocess.run([*command, "--offline"], cwd=repo_root, capture_output=True, text=True)
    if done.returncode:
        done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name.split("-")[0].replace("_", "-"): read_wheel(path) for path in out.glob("*.whl")}


def run_alone(folder: Path, site: Path, preload: list[str], tasks: list[dict]) -> dict[str, dict]:
    """Run the tasks where nothing but the standard library and `site` is on the path; return report by file name."""
    # -I -S: neither the environment's packages nor the workspace's sources are on the path.
    # One thread, because a process with several must not fork. No interpreter of Triton, which the tests of kernels
    # switch on: it wants numpy, and the package does not.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", *WARNINGS, str(Path(__file__).with_name("alone.py"))],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        input=json.dumps({"site": str(site), "preload": preload, "tasks": tasks}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {Path(task["report"]).stem: json.loads(Path(task["report"]).read_text()) for task in tasks}


@dataclass(frozen=True)
class Outcome:
    page: dict
    """What importing the package and its config brought in."""
    whole: dict
    """What importing all its modules and running its README's example gave."""


@pytest.fixture(scope="module")
def outcomes(members, blocks, wheels: dict[str, Wheel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    base = tmp_path_factory.mktemp("alone")
    pages: list[dict] = []
    wholes: dict[tuple[str, ...], list[dict]] = {}
    for member in members:
        wheel, site = wheels[member.name], base / f"site-{member.name}"
        closure = declared_closure(wheel.requires, wheels)
        link_site(site, {member.name} | closure, wheels)
        task = {"site": str(site), "module": member.module, "modules": [], "examples": []}
        pages.append(task | {"report": str(base / f"page-{member.name}.json")})
        task |= {"modules": wheel.modules, "examples": blocks(member.readme)}
        preload = tuple(name for name in ("numpy", "torch") if name in closure)
        wholes.setdefault(preload, []).append(task | {"report": str(base / f"whole-{member.name}.json")})
    (base / "site").mkdir()
    reports = run_alone(base, base / "site", [], pages)
    for preload, tasks in wholes.items():
        site = base / "-".join(["preload", *preload])
        link_site(site, declared_closure(map(Requirement, preload), {}), {})
        reports |= run_alone(base, site, list(preload), tasks)
    return {m.name: Outcome(reports[f"page-{m.name}"], reports[f"whole-{m.name}"]) for m in members}


def test_wheel_holds_every_source_file(member, wheels: dict[str, Wheel]) -> None:
    sources = {p.relative_to(member.folder / "src").as_posix() for p in member.source.rglob("*") if p.is_file()}
    assert {name for name in sources if "__pycache__" not in name} == set(wheels[member.name].files)


def test_package_alone_imports_and_runs_its_readme(member, outcomes: dict[str, Outcome]) -> None:
    error = outcomes[member.name].whole["error"]
    assert not error, error


def test_package_alone_has_every_public_name(member, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[member.name].whole["missing"] == []


def test_package_page_and_config_import_neither_torch_nor_numpy(member, outcomes: dict[str, Outcome]) -> None:
    error = outcomes[member.name].page["error"]
    assert not error, error
    assert outcomes[member.name].page["heavy"] == []


def test_readme_has_an_example(member, blocks) -> None:
    assert blocks(member.readme)


def test_undeclared_import_fails_alone(wheels: dict[str, Wheel], tmp_path: Path) -> None:
    """The negative control: where torch is not in the closure, a package that needs it cannot be imported."""
    link_site(tmp_path / "site", {"fused-kernels", "jaxtyping", "wadler-lindig"}, wheels)
    task = {"site": str(tmp_path / "site"), "module": "fused_kernels", "examples": []}
    task |= {"modules": wheels["fused-kernels"].modules, "report": str(tmp_path / "report.json")}
    (tmp_path / "empty").mkdir()
    reports = run_alone(tmp_path, tmp_path / "empty", [], [task])
    assert "No module named 'torch'" in reports["report"]["error"]


@pytest.mark.nightly
def test_wheel_installs_into_an_empty_environment(member, wheels: dict[str, Wheel], root_pyproject, blocks, tmp_path):
    assert UV is not None
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join(root_pyproject["tool"]["uv"]["constraint-dependencies"]))
    wheel, python = wheels[member.name], tmp_path / "venv" / "bin" / "python"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    install = [UV, "pip", "install", "--quiet", "--python", str(python), "--find-links", str(wheel.path.parent)]
    subprocess.run([*install, "--constraint", str(constraints), str(wheel.path)], cwd=tmp_path, check=True)
    code = "\n".join(f"import {name}" for name in wheel.modules)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for text in [code, *blocks(member.readme)]:
        command = [python, "-I", *WARNINGS, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "venv")
