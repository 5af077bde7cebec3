"""The data files of published mixtures: each can be read, says where its figures come from, and adds up."""

import re
import tomllib
from pathlib import Path

import pytest

from interleave_data import SourceConfig, load_data_file
from interleave_data.formats import FORMATS

NAMES = [
    "idefics3-sft",
    "idefics3-stage-1",
    "idefics3-stage-2",
    "idefics3-stage-3",
    "mm1-pretrain",
    "xgen-mm-dpo",
    "xgen-mm-pretrain",
    "xgen-mm-safety",
    "xgen-mm-sft",
    "xgen-mm-sft-interleaved",
]
HEADER = re.compile(
    r"# Published: (no|[\w.-]+/[\w.-]+[^.\n]*|[^.\n]+\(\?\))\. Licence: [^\n]+\.\n"
    r"(# [^\n]+\n)*"
    r"# Ratio: (published|derived|our choice)\b"
)


@pytest.fixture
def ratios(repo_root):
    """Name of a template → ratios by source."""

    def ratios(name: str) -> dict[str, float]:
        table = tomllib.loads((repo_root / "data-files" / f"{name}.toml").read_text())
        return {source["name"]: source["ratio"] for source in table["sources"]}

    return ratios


def test_every_template_is_tested(repo_root):
    assert sorted(path.stem for path in (repo_root / "data-files").iterdir()) == NAMES


def written(source: SourceConfig) -> tuple[str, ...]:
    """The path, or each of several."""
    return (source.path,) if isinstance(source.path, str) else source.path


@pytest.mark.parametrize("name", NAMES)
def test_template_is_a_data_file_with_paths_beside_it(name, repo_root):
    folder = repo_root / "data-files"
    sources = load_data_file(folder / f"{name}.toml").sources
    paths = [path for source in sources for path in (*written(source), source.image_root) if path is not None]
    assert paths
    assert all(Path(path).is_relative_to(folder / "data") for path in paths)


@pytest.mark.parametrize("name", NAMES)
def test_template_has_shards_that_its_format_can_be_read_from(name, repo_root):
    suffixes = {".tar": "tar", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    for source in load_data_file(repo_root / "data-files" / f"{name}.toml").sources:
        for path in written(source):
            assert suffixes[Path(path).suffix] in FORMATS[source.format].containers, source.name


@pytest.mark.parametrize("name", NAMES)
def test_template_says_where_each_set_and_each_figure_is_from(name, repo_root):
    head, *blocks = re.split(r"\n\n(?=# Published)", (repo_root / "data-files" / f"{name}.toml").read_text())
    assert all(line.startswith("#") for line in head.splitlines())
    assert blocks
    for block in blocks:
        assert HEADER.match(block), block
        assert block.count("[[sources]]") == 1


def test_xgen_mm_pretrain_adds_up(ratios):
    shares = ratios("xgen-mm-pretrain")
    mint = [shares[f"mint-1t-{part}"] for part in ("html", "pdf", "arxiv")]
    assert mint == [32.5 * part / 13 for part in (7, 5, 1)]
    assert sum(mint) + shares["obelics"] == 50
    assert sum(shares.values()) == 100
    assert [shares[name] for name in ("blip3-kale", "datacomp-1b", "blip3-ocr", "blip3-grounding")] == [25, 10, 5, 5]


def test_xgen_mm_sft_adds_up(ratios):
    shares = ratios("xgen-mm-sft")
    text = ("python-code-23k", "gsm8k", "slimorca", "orca-math", "lima")
    assert sum(shares.values()) == 816_639
    assert sum(shares[name] for name in text) == 42_473
    assert shares["chartqa-augmented"] + shares["chartqa-human"] == 28_299


def test_xgen_mm_safety_is_two_to_five(ratios):
    assert ratios("xgen-mm-safety") == {"vlguard": 2000, "supervised": 5000}


def test_mm1_is_45_45_10(ratios):
    shares = ratios("mm1-pretrain")
    assert (shares["obelics"], shares["text"], sum(shares.values())) == (45, 10, 100)


@pytest.mark.parametrize(("stage", "documents", "pages"), [(1, 70, 0), (2, 45, 20)])
def test_idefics3_stages_add_up(stage, documents, pages, ratios):
    shares = ratios(f"idefics3-stage-{stage}")
    assert (shares["obelics"], shares.get("pdfa", 0), sum(shares.values())) == (documents, pages, 100)


def test_idefics3_sft_adds_up(ratios):
    shares = ratios("idefics3-sft")
    assert sum(shares.values()) == pytest.approx(100)
    assert [*shares.values()][:4] == [13.03, 10.31, 8.16, 7.15]
