"""tools/describe.py: what a checkpoint or a preset holds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weight_files import TensorInfo


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The tool as a module."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    import describe

    return describe


def test_full_size_tree_has_the_published_counts(tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--preset", "xgen-mm-v1.5", "--depth", "2"]) == 0
    out = capsys.readouterr().out
    for count in ("428,225,600", "109,901,568", "3,821,130,051", "4,359,257,219"):
        assert count in out


def test_json_lists_every_tensor_of_an_export(tool, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--preset", "xgen-mm-v1.5-interleave", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 718
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert {"name": "vlm.lang_model.lm_head.additional_fc.bias", "shape": [3], "dtype": "bfloat16"} in rows


def test_layers_that_look_alike_share_a_line(tool) -> None:
    info = TensorInfo((2, 3), torch.float32)
    lines = tool.render(
        tool.tree({f"layers.{k}.weight": info for k in range(3)} | {"layers.3.bias": info}), max_depth=2
    )
    assert [line.split()[0] for line in lines] == ["all", "layers", "0", "3"]
    assert "0 … 2, each" in lines[2]


def test_a_folder_is_compared_with_a_preset(tool, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"vlm.surprise": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert tool.main([str(tmp_path), "--preset", "xgen-mm-v1.5"]) == 1
    error = capsys.readouterr().err
    assert "missing (718)" in error
    assert "unexpected (1): vlm.surprise" in error
    assert tool.main([str(tmp_path / "none")]) == 2
    assert "got nothing there" in capsys.readouterr().err
