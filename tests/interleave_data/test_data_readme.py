import re


def test_readme_example_runs(repo_root):
    text = (repo_root / "packages" / "interleave-data" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_data_file_is_valid(repo_root, tmp_path):
    from interleave_data import load_data_file

    text = (repo_root / "packages" / "interleave-data" / "README.md").read_text()
    found = []
    for toml in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        (tmp_path / "data.toml").write_text(toml)
        found.append([source.name for source in load_data_file(tmp_path / "data.toml").sources])
    assert found == [["chat", "captions"], ["captions", "web"]]
