"""The README's example runs as it stands, and its list of names is the public page."""

import re
import subprocess
import sys

import trainer_lite


def test_trainer_readme_example_runs(repo_root, tmp_path):
    text = (repo_root / "packages/trainer-lite/README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    ran = subprocess.run([sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    first, last = (float(number) for number in re.findall(r"\d+\.\d+", ran.stdout))
    assert last < 0.1 * first


def test_trainer_readme_names_the_public_page(repo_root):
    text = (repo_root / "packages/trainer-lite/README.md").read_text()
    table = text.partition("## Names")[2].partition("\n## ")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])}
    assert named == set(trainer_lite.__all__)
    for name in trainer_lite.__all__:
        # A table of constants has no name of its own.
        assert getattr(getattr(trainer_lite, name), "__name__", name) == name
