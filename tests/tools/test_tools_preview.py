"""tools/preview.py: the page shows samples as training draws them, names skips and repeats, and needs nothing else."""

import io
import json
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image

from blip3_lite import CheckpointConfig, spans_of
from interleave_data import ImagePart, Mixture, Sample, TextPart, Turn, load_data_file, open_sources

VOID = ("meta", "img")


class Page(HTMLParser):
    """Fails on a tag closed out of order; gathers addresses, texts by class, and table rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.addresses += [found[key] or "" for key in ("src", "href") if key in found]
        self.ids |= {found["id"] or ""} if "id" in found else set()
        if tag not in VOID:
            self.open.append((tag, found.get("class") or ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.texts.setdefault(found.get("class") or tag, []).append("")

    def handle_endtag(self, tag) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data) -> None:
        for name in {css or tag for tag, css in self.open}:
            self.texts[name][-1] += data
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def preview(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Arguments behind the data file's → exit status; the page lies in page.html."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    import preview

    return lambda *arguments: preview.main([*map(str, arguments), "--out", str(tmp_path / "page.html")])


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config, tiny_tokenizer) -> Path:
    """What is read of a checkpoint: its config and its tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(msgspec.json.encode(CheckpointConfig(model=tiny_config)))
    tiny_tokenizer.save(folder / "tokenizer.json")
    return folder


def html_text(page: Page) -> str:
    """Samples' text as a reader sees it."""
    return "".join(page.texts["text"])


def png(number: int, size: tuple[int, int] = (40, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def write_captions(folder: Path, captions: list[str], pictures: list[bytes], name: str = "captions") -> str:
    """Write a shard of pairs; return its table of a data file."""
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for number, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
            for suffix, content in (("png", picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f'[[sources]]\nname = "{name}"\nformat = "caption-tars"\npath = "{name}.tar"\n'


def write_data(folder: Path, *tables: str) -> Path:
    (folder / "data.toml").write_text("\n".join(tables))
    return folder / "data.toml"


def talk(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def write_talks(folder: Path, rows: list[dict], name: str = "talks") -> str:
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return f'[[sources]]\nname = "{name}"\nformat = "llava-json"\npath = "{name}.json"\nimage_root = "."\n'


@pytest.mark.parametrize("num_planted", [0, 4])
def test_planted_repeats_are_named_with_their_source_share(preview, tmp_path: Path, capsys, num_planted) -> None:
    """(T34): the control, without any planted none is named."""
    captions = [f"picture number {number} of many" for number in range(200)]
    for number in range(num_planted):
        captions[number * 50] = "An image of an object.\n" if number % 2 else "an  image of an Object."
    data = write_data(
        tmp_path,
        write_captions(tmp_path, captions, [png(number) for number in range(200)]),
        write_talks(tmp_path, [talk(f"what is {n}?", f"it is the {n}th thing") for n in range(20)]) + "ratio = 0.1",
    )
    assert preview(data, "--num", 2, "--scan", 1000) == 0
    said = capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text())
    found = [row for row in page.rows if row[0] == "an image of an object."]
    if num_planted == 0:
        assert "repeated" not in said
        assert found == []
        assert "None among the 220 samples scanned." in "".join(page.texts["p"])
    else:
        assert "repeated text: 'an image of an object.': captions 2.0% (4 of 200)" in said
        assert [row[1:4] for row in found] == [["4", "4", "captions 2.0% (4 of 200)"]]
        assert said.count("repeated") == 1


def test_repeated_pictures_are_told_by_their_bytes_across_sources(preview, tmp_path: Path, capsys) -> None:
    (tmp_path / "same.png").write_bytes(png(3))
    # The same in another size is another picture; twice in one sample is no repeat.
    (tmp_path / "other.png").write_bytes(png(3, (41, 16)))
    rows = [
        talk("<image>what?", "a thing", image="same.png"),
        talk("<image><image>and?", "another thing", image=["other.png", "other.png"]),
    ]
    captions = [f"caption {number}" for number in range(6)]
    pictures = [png(number) for number in range(6)]
    data = write_data(tmp_path, write_talks(tmp_path, rows), write_captions(tmp_path, captions, pictures))
    assert preview(data) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == ["repeated picture: talks.json:0: talks 50.0% (1 of 2); captions 16.7% (1 of 6)"]


def test_what_is_left_out_is_listed_with_place_and_reason(preview, checkpoint: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "cut.png").write_bytes(png(1, (200, 200))[:-30])
    rows = [
        talk("<image>what?", "red", image="gone.png"),
        talk("two and two?", " "),
        talk("<image>what?", "blue", image="cut.png"),
        talk("fine?", "yes"),
    ]
    assert preview(write_data(tmp_path, write_talks(tmp_path, rows)), "--checkpoint", checkpoint, "--num", 4) == 0
    assert "4 scanned, 2 left out" in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text())
    counts = {row[1]: row[0] for row in page.rows if len(row) == 3 and row[2] == "1"}
    assert counts == {"unreadable_file": "talks", "empty_answer": "talks", "broken_image": "found on decoding"}
    listed = {row[0]: row[1] for row in page.rows if row and row[0].startswith("talks") and ":" in row[0]}
    # Only decoding shows that the third is cut.
    reasons = ("unreadable_file", "empty_answer", "broken_image")
    assert listed == {f"talks/talks.json:{place}": reason for place, reason in enumerate(reasons)}
    assert sum("left out" in heading for heading in page.texts["h3"]) == 3


def test_page_is_well_formed_stands_alone_and_escapes_text(preview, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    evil = '<script>alert("x")</script> & <b>bold'
    rows = [talk(f"<image>{evil}", f"{evil} again", image="a.png", id="<i>id"), talk(evil, f"{evil} again")]
    name = 'name = "<u>n"'
    data = write_data(tmp_path, write_talks(tmp_path, rows).replace('name = "talks"', name))
    for arguments in ([], ["--checkpoint", checkpoint], ["--tokenizer", checkpoint / "tokenizer.json"]):
        assert preview(data, *arguments) == 0
        html = (tmp_path / "page.html").read_text()
        page = Page(html)
        assert not {"script", "link", "iframe", "object", "u"} & page.tags
        assert {address.split(":")[0].split("-")[0] for address in page.addresses} == {"data", "#sample"}
        assert {address[1:] for address in page.addresses if address[0] == "#"} <= page.ids
        # Pictures may spell anything.
        assert "http" not in re.sub(r"base64,[\w+/=]+", "", html)
        assert "&lt;u&gt;n/talks.json:0" in html
        assert "<script" not in html
        assert evil in html_text(page)


def test_tokens_are_marked_as_training_learns_them(
    preview, checkpoint: Path, tmp_path: Path, tiny_processor, tiny_config
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [talk("<image>what colour?", "red é\nsquare", image="a.png")]
    assert preview(write_data(tmp_path, write_talks(tmp_path, rows)), "--checkpoint", checkpoint, "--num", 3) == 0
    page = Page((tmp_path / "page.html").read_text())
    (source,) = open_sources(load_data_file(tmp_path / "data.toml"))
    encoded = tiny_processor.encode(source[0])
    # The first of the class is the key above the samples; then text, then ids.
    learnt = [text.strip() for text in page.texts["learnt"][1:]]
    assert learnt[0] == "red é↵\nsquare<|end|>"
    assert learnt[1].split() == [str(target) for target in encoded.targets.tolist() if target != -100]
    # 40 × 16 is cut into 3 × 1 and a thumbnail, 3 latents each.
    assert page.texts["chip"][1:] == ["image 1 · 12 tokens · 4 tiles"] * 2
    read = "".join(page.texts["read"][1:]).replace(" ", "")
    assert read.startswith("<|user|>whatcolour?<|end|><|assistant|>")
    assert (
        f"{encoded.length} tokens: {encoded.num_targets} learnt, 12 of images; 1 image; 4 tiles" in page.texts["muted"]
    )
    # One sample is there; the second and third draw are it again.
    assert "2 of the 3 draws come again" in "".join(page.texts["muted note"])


def test_samples_come_in_the_order_of_the_mixture(preview, tmp_path: Path) -> None:
    tables = [
        write_talks(tmp_path, [talk(f"{name} {n}?", f"answer {name} {n}") for n in range(30)], name)
        for name in ("a", "b")
    ]
    data = write_data(tmp_path, tables[0] + "ratio = 3", tables[1])
    assert preview(data, "--num", 8, "--seed", 5) == 0
    page = Page((tmp_path / "page.html").read_text())
    sources = open_sources(load_data_file(data))
    mixture = Mixture(sources, [3, 1], seed=5)
    drawn = [sources[draw.source][mixture.index(draw)] for draw in (next(mixture) for _ in range(8))]
    expected = [f"{number}  {sample.source}/{sample.id}" for number, sample in enumerate(drawn, start=1)]
    assert page.texts["h3"] == expected
    shares = {row[0]: row[3:5] for row in page.rows if row[0] in ("a", "b")}
    assert shares == {"a": ["75.0%", "75.0%"], "b": ["25.0%", "25.0%"]}


def test_bounded_sources_are_shown_as_far_as_training_draws_them(repo_root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    from preview_data import first_draws, make_reader

    tables = []
    for name, epochs in (("a", "epochs = 0.5"), ("b", "")):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "word"}\n' * 4)
        tables.append(f'[[sources]]\nname = "{name}"\nformat = "text"\npath = "{name}.jsonl"\n{epochs}\n')
    (tmp_path / "data.toml").write_text("".join(tables))
    data_file = load_data_file(tmp_path / "data.toml")
    draws = first_draws(open_sources(data_file), data_file, 0, make_reader(data_file, None, None))
    assert [next(draws).source for _ in range(7)] == [0, 1, 0, 1, 1, 1, 1]


def test_padding_is_hatched_and_the_picture_is_not(preview, repo_root: Path) -> None:
    from anyres_tiler import TilingConfig, tile_image
    from preview_page import hatch_padding, padding_share

    # On 2 × 1 tiles of 16 the picture of 30 × 10 becomes 32 × 11: rows 2 to 13 show it, five are padding.
    tiles = tile_image(Image.new("RGB", (30, 10), "white"), TilingConfig(tile_px=16, grids=((2, 1),)))
    assert tiles.box_px == (0, 2, 32, 13)
    assert padding_share(tiles) == 1 - 11 / 16
    hatched = hatch_padding(tiles)
    is_changed = (hatched.pixels != tiles.pixels).any(dim=1)
    assert not is_changed[0].any()
    rows = is_changed[1:].any(dim=0).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [0, 1, 13, 14, 15]
    assert torch.equal(hatched.pixels[:, :, 2:13], tiles.pixels[:, :, 2:13])


def test_spans_are_the_whole_sequence_and_part_neighbouring_images(tiny_processor) -> None:
    pictures = tuple(ImagePart(png(1, size)) for size in ((40, 16), (16, 16)))
    turns = (
        Turn(role="user", parts=(TextPart("what"), *pictures, TextPart("é?"))),
        Turn(role="assistant", parts=(TextPart("red"),)),
    )
    encoded = tiny_processor.encode(Sample(id="x", source="s", turns=turns))
    spans = spans_of(encoded, tiny_processor)
    assert [span.kind for span in spans] == ["read", "image", "image", "read", "learnt"]
    assert [(span.num_tokens, span.num_tiles) for span in spans[1:3]] == [
        (3 * count, count) for count in encoded.tiles_per_image
    ]
    assert sum(span.num_tokens for span in spans) == encoded.length
    is_slot = torch.zeros(encoded.length, dtype=torch.bool)
    is_slot[encoded.image_index] = True
    assert [token.id for span in spans for token in span.tokens] == encoded.ids[~is_slot].tolist()
    assert [token.id for token in spans[-1].tokens] == encoded.targets[encoded.targets != -100].tolist()
    assert spans[3].text.strip() == "é?<|end|><|assistant|>"


def test_mistakes_are_named_with_exit_2(preview, tmp_path: Path, capsys) -> None:
    good = write_data(tmp_path, write_talks(tmp_path, [talk("fine?", "yes")]))
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "lost.toml").write_text('[[sources]]\nname = "x"\nformat = "text"\npath = "gone.txt"\n')
    for arguments, words in [
        (["absent.toml"], "absent.toml: expected a readable data file"),
        ([tmp_path / "empty.toml"], "sources"),
        ([tmp_path / "lost.toml"], "x: expected a file at"),
        ([good, "--checkpoint", tmp_path / "none"], "expected config.json, got none"),
        ([good, "--tokenizer", tmp_path / "none.json"], "none.json"),
        ([good, "--tokenizer", good], "data.toml"),
    ]:
        assert preview(*arguments) == 2, arguments
        assert words in capsys.readouterr().err
    for arguments, words in [(["--num", "0"], "--num: expected at least 1"), (["--scan", "0"], "--scan: expected")]:
        with pytest.raises(SystemExit) as end:
            preview(good, *arguments)
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
