"""The page of a preview: sources, skips, repeats, lengths; each sample with its tiles, its text and the loss mask."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from html import escape
from pathlib import Path
from statistics import median

import torch

from anyres_tiler import contact_sheet
from anyres_tiler.tiles import Tiles
from blip3_lite import EncodedSample, Processor, Span, spans_of
from interleave_data import DataFile, ImagePart, PreferenceSample, SkipReason, SkipSample, Source, TextPart
from preview_data import (
    SHORT_WORDS,
    AnySample,
    Place,
    Reader,
    Repeat,
    Scan,
    Shown,
    is_short,
    read_samples,
    texts_of,
)
from trainer_lite import Picture, Report
from trainer_lite.charts import Bar
from trainer_lite.report import embed

MOST_IMAGES, MOST_TOKENS, MOST_CHARACTERS, MOST_ROWS = 8, 2000, 8000, 20
"""Of one sample, and of one table: more is counted and not shown."""
_PICTURE_PX, _SHEET_PX, _STRIPE_PX = 220, 420, 6
_HATCH = (255, 0, 170)
_STYLE = """
.sample{margin:0 0 14px}.sample h3{font-size:14.5px;margin:0 0 2px;overflow-wrap:anywhere}
.sample p{max-width:none;font-size:13px;margin:0 0 8px}
.views{display:flex;flex-wrap:wrap;gap:14px;margin:0 0 8px}.views figure{margin:0;max-width:100%}
.views img{display:block;max-width:100%;border-radius:4px;background:var(--line);margin:0 0 2px}
.views div{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-start}
.views figcaption{font-size:12.5px;color:var(--muted)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,Menlo,Consolas,monospace;margin:0 0 6px}
.text i{font-style:normal}.text i:hover{outline:1px solid var(--ink)}
.learnt{background:color-mix(in srgb,var(--series-3) 30%,transparent);border-radius:3px}
.read{color:var(--muted)}
.chip{background:color-mix(in srgb,var(--series-1) 26%,transparent);border-radius:9px;padding:1px 8px;
white-space:nowrap}
.said{font-size:12.5px;color:var(--muted);margin:0}
summary{font-size:12.5px;color:var(--muted);cursor:pointer}
"""


def hatch_padding(tiles: Tiles) -> Tiles:
    """The same tiles with stripes where nothing of the image is."""
    rows, columns = tiles.grid
    side = tiles.tile_px
    left, top, right, bottom = tiles.box_px
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    is_padding = (x < left) | (x >= right) | (y < top) | (y >= bottom)
    # As wide on the page for any size of tile.
    stripe = max(1, _STRIPE_PX * max(rows, columns + 1) * side // _SHEET_PX)
    is_marked = is_padding & ((x + y) // stripe % 2 == 0)
    pixels = tiles.pixels.clone()
    shift = int(tiles.thumbnail_first)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        marked = is_marked[row * side : (row + 1) * side, column * side : (column + 1) * side]
        pixels[place + shift, :, marked] = torch.tensor(_HATCH, dtype=torch.uint8)[:, None]
    return replace(tiles, pixels=pixels)


def padding_share(tiles: Tiles) -> float:
    """How much of the grid's canvas is padding."""
    left, top, right, bottom = tiles.box_px
    return 1 - (right - left) * (bottom - top) / (tiles.grid[0] * tiles.grid[1] * tiles.tile_px**2)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _image_html(place: int, image: ImagePart, tiles: Tiles, reader: Reader) -> str:
    width, height = tiles.size_px
    rows, columns = tiles.grid
    views = f"grid of {columns} × {rows}" + (" and thumbnail" if tiles.thumbnail_first else "")
    said = f"image {place}: {width} × {height} px → {views}, {_count(tiles.num_tiles, 'tile')} of {tiles.tile_px} px"
    if reader.processor is not None:
        said += f", {_count(reader.processor.cfg.num_image_tokens(tiles.num_tiles), 'token')}"
    if padding_share(tiles) > 0:
        said += f"; {padding_share(tiles):.0%} of the grid is padding (striped)"
    pictures = [image.decode(reader.limits), contact_sheet(hatch_padding(tiles))]
    sources = [embed(picture, px) for picture, px in zip(pictures, (_PICTURE_PX, _SHEET_PX), strict=True)]
    names = (f"image {place}", f"tiles of image {place}")
    shown = "".join(f'<img src="{data}" alt="{name}">' for data, name in zip(sources, names, strict=True))
    return f"<figure><div>{shown}</div><figcaption>{escape(said)}</figcaption></figure>"


def _visible(text: str) -> str:
    return escape(text).replace("\n", "↵\n")


def _chip(number: int, span: Span | None) -> str:
    said = f"image {number}"
    if span is not None:
        said += f" · {_count(span.num_tokens, 'token')} · {_count(span.num_tiles, 'tile')}"
    return f'<span class="chip">{said}</span>'


def _sequence_html(encoded: EncodedSample, processor: Processor) -> str:
    """Text by tokens, learnt ones coloured, images as chips; below it the ids in the same colours."""
    texts: list[str] = []
    ids: list[str] = []
    num_images, left = 0, MOST_TOKENS
    for span in spans_of(encoded, processor):
        if left <= 0:
            break
        if span.kind == "image":
            num_images += 1
            texts.append(_chip(num_images, span))
            ids.append(texts[-1])
            continue
        tokens = span.tokens[:left]
        left -= len(tokens)
        marked = "".join(f'<i title="{token.id}">{_visible(token.text)}</i>' for token in tokens)
        texts.append(f'<span class="{span.kind}">{marked}</span>')
        ids.append(f'<span class="{span.kind}">{" ".join(str(token.id) for token in tokens)}</span>')
    if left <= 0:
        texts.append(f'<p class="said">only the first {MOST_TOKENS:,} tokens of text are shown</p>')
    return (
        f'<div class="text">{"".join(texts)}</div>'
        f'<details><summary>token ids</summary><div class="text">{" ".join(ids)}</div></details>'
    )


def _turns_html(sample: AnySample) -> str:
    """Turns as they stand in the source, for want of a tokenizer."""
    turns: list[str] = []
    num_images = 0
    for turn in sample.turns:
        parts: list[str] = []
        for part in turn.parts:
            if isinstance(part, TextPart):
                parts.append(_visible(part.text[:MOST_CHARACTERS]))
            else:
                num_images += 1
                parts.append(_chip(num_images, None))
        turns.append(f'<p class="said">{turn.role}</p><div class="text">{"".join(parts)}</div>')
    if isinstance(sample, PreferenceSample):
        for name, answer in (("preferred answer", sample.chosen), ("rejected answer", sample.rejected)):
            turns.append(f'<p class="said">{name}</p><div class="text">{_visible(answer[:MOST_CHARACTERS])}</div>')
    return "".join(turns)


def _lengths(shown: Shown, reader: Reader) -> tuple[int, int, int]:
    """Tokens of images, only read, and learnt; without a tokenizer characters, all in the second place."""
    if reader.processor is None:
        return 0, len("".join(texts_of(shown.sample))), 0
    learnt = sum(encoded.num_targets for encoded in shown.encoded)
    image = sum(len(encoded.image_index) for encoded in shown.encoded)
    return image, sum(encoded.length for encoded in shown.encoded) - learnt - image, learnt


def _sample_html(shown: Shown, reader: Reader) -> str:
    image, read, learnt = _lengths(shown, reader)
    num_tiles = sum(tiles.num_tiles for _, tiles in shown.images)
    facts = [_count(len(shown.images), "image"), _count(num_tiles, "tile")]
    if reader.processor is None:
        facts.insert(0, _count(read, "character"))
    else:
        facts.insert(0, f"{_count(learnt + read + image, 'token')}: {learnt:,} learnt, {image:,} of images")
    views = [
        _image_html(place, image, tiles, reader)
        for place, (image, tiles) in enumerate(shown.images[:MOST_IMAGES], start=1)
    ]
    if len(shown.images) > MOST_IMAGES:
        views.append(f'<p class="said">and {len(shown.images) - MOST_IMAGES} more</p>')
    if reader.processor is None:
        body = _turns_html(shown.sample)
    elif len(shown.encoded) == 1:
        body = _sequence_html(shown.encoded[0], reader.processor)
    else:
        names = ("with the preferred answer", "with the rejected answer")
        body = "".join(
            f'<p class="said">{name}</p>{_sequence_html(encoded, reader.processor)}'
            for name, encoded in zip(names, shown.encoded, strict=True)
        )
    name = escape(f"{shown.number}  {shown.sample.source}/{shown.sample.id}")
    return (
        f'<article class="card sample" id="sample-{shown.number}"><h3>{name}</h3>'
        f'<p class="muted">{escape("; ".join(facts))}</p>'
        + (f'<div class="views">{"".join(views)}</div>' if views else "")
        + f"{body}</article>"
    )


def _skip_html(number: int, skip: SkipSample) -> str:
    said = f'<p class="said">{escape(str(skip))}</p>'
    return f'<article class="card sample"><h3>{number}  left out</h3>{said}</article>'


def _add_sources(
    report: Report, sources: Sequence[Source], data_file: DataFile, places: Sequence[Place], found: Scan
) -> None:
    drawn = Counter(place.source for place in places)
    total = sum(source.ratio for source in data_file.sources)
    rows: list[list[str | int | float | None]] = []
    for number, (source, cfg) in enumerate(zip(sources, data_file.sources, strict=True)):
        about = found.sources[number]
        tokens, tiles = [size.tokens for size in about.sizes], [size.tiles for size in about.sizes]
        rows.append(
            [
                source.name,
                cfg.format,
                f"{len(source):,}",
                f"{cfg.ratio / total:.1%}",
                f"{drawn[number] / len(places):.1%}",
                f"{about.num_seen:,}",
                f"{len(about.skips)} ({len(about.skips) / about.num_seen:.1%})",
                f"{median(tokens):,.0f} / {max(tokens):,}" if tokens else None,
                f"{median(tiles):g} / {max(tiles)}" if tiles else None,
            ]
        )
    header = ["source", "format", "samples", "ratio", "drawn here", "scanned", "left out"]
    report.add_table(
        "Sources",
        [*header, "tokens: median / most", "tiles: median / most"],
        rows,
        note=f"Ratios are of {data_file.ratio_unit}; drawn here: of the {len(places)} draws that are shown below. "
        "Lengths are of the scanned samples.",
    )


def _add_skips(
    report: Report, sources: Sequence[Source], found: Scan, samples: Sequence[Shown | tuple[int, SkipSample]]
) -> None:
    skips = [(source.name, skip) for source, about in zip(sources, found.sources, strict=True) for skip in about.skips]
    # Those that only decoding shows.
    known = {skip.where for _, skip in skips}
    late = [item[1] for item in samples if not isinstance(item, Shown) and item[1].where not in known]
    if not skips and not late:
        report.add_text("Left out", "No sample of those scanned.")
        return
    counts = Counter((name, skip.reason.value) for name, skip in skips)
    rows = [[name, reason, count] for (name, reason), count in counts.most_common()]
    if late:
        rows += [["found on decoding", reason, n] for reason, n in Counter(x.reason.value for x in late).items()]
    unwanted = SkipReason.UNWANTED.value
    report.add_table(
        "Left out",
        ["source", "reason", "samples"],
        rows,
        note=f"{unwanted}: nothing is wrong with these, but their layout's own rule leaves them out."
        if any(row[1] == unwanted for row in rows)
        else "",
    )
    shown = [*(skip for _, skip in skips), *late]
    report.add_table(
        "", ["where", "reason", "what"], [[x.where, x.reason.value, x.detail] for x in shown[:MOST_ROWS]],
        note=f"and {len(shown) - MOST_ROWS} more" if len(shown) > MOST_ROWS else "",
    )  # fmt: skip


def _add_repeats(report: Report, sources: Sequence[Source], found: Scan, reader: Reader) -> None:
    names = [source.name for source in sources]
    texts, images = found.repeats(found.texts), found.repeats(found.images)
    num_scanned = sum(about.num_seen for about in found.sources)
    if not texts and not images:
        report.add_text("Repeats", f"None among the {num_scanned:,} samples scanned.")
        return
    long = [(text, repeat) for text, repeat in texts if not is_short(text)]
    short = [(text, repeat) for text, repeat in texts if is_short(text)]
    about = f"Of {num_scanned:,} samples scanned, case and white space aside."
    _add_texts(report, "Repeated answers and captions", long, found, names, about)
    about = f"Of up to {SHORT_WORDS} words, as answers to closed questions: many repeat by nature."
    _add_texts(report, "Repeated short answers", short, found, names, about)
    pictures = [
        Picture(
            sample_image.decode(reader.limits),
            caption=f"in {len(repeat.places)} samples",
            notes={"share": found.shares(repeat, names), "in": ", ".join(place.id for place in repeat.places[:3])},
        )
        for digest, repeat in images[:MOST_ROWS]
        if (sample_image := _decodable(digest, repeat, sources, reader)) is not None
    ]
    heading = f"Repeated pictures ({len(images):,})"
    if pictures:
        report.add_pictures(heading, pictures)
    else:
        report.add_text(heading, "None." if not images else "None of them can be decoded.")


def _add_texts(
    report: Report, heading: str, texts: Sequence[tuple[str, Repeat]], found: Scan, names: Sequence[str], note: str
) -> None:
    if not texts:
        report.add_text(heading, "None.")
        return
    rows = [
        [
            text if len(text) <= 48 else f"{text[:47]}…",
            len(repeat.places),
            len(repeat.others),
            found.shares(repeat, names),
            ", ".join(place.id for place in repeat.places[:2]),
        ]
        for text, repeat in texts[:MOST_ROWS]
    ]
    more = f" {len(texts) - MOST_ROWS:,} more are not listed." if len(texts) > MOST_ROWS else ""
    header = ["text", "samples", "different pictures", "share of the source", "for example"]
    report.add_table(heading, header, rows, note=note + more)


def _decodable(digest: str, repeat: Repeat, sources: Sequence[Source], reader: Reader) -> ImagePart | None:
    """The picture of this digest, if it can be shown."""
    place = repeat.places[0]
    for image in sources[place.source][place.index].images():
        data = image.read(reader.limits.max_bytes)
        if f"{sha256(data).hexdigest()}/{image.frame}" == digest:
            try:
                image.decode(reader.limits)
            except SkipSample:
                return None
            return image
    return None


def write_page(
    out: Path,
    title: str,
    data_file: DataFile,
    sources: Sequence[Source],
    places: Sequence[Place],
    found: Scan,
    reader: Reader,
    made_with: str,
) -> list[Shown | tuple[int, SkipSample]]:
    """Write the page; return what it shows."""
    samples = read_samples(places, sources, reader)
    shown = [item for item in samples if isinstance(item, Shown)]
    report = Report(f"Preview of {title}", f"Tiles and tokens: {made_with}.", _STYLE)
    num_repeats = len(found.repeats(found.texts)), len(found.repeats(found.images))
    report.add_facts(
        {
            "sources": len(sources),
            "samples": f"{sum(len(source) for source in sources):,}",
            "shown": len(shown),
            "scanned": f"{sum(about.num_seen for about in found.sources):,}",
            "left out of these": sum(len(about.skips) for about in found.sources),
            "repeated texts": num_repeats[0],
            "repeated pictures": num_repeats[1],
        }
    )
    _add_sources(report, sources, data_file, places, found)
    _add_skips(report, sources, found, samples)
    _add_repeats(report, sources, found, reader)
    lengths = [_lengths(item, reader) for item in shown]
    unit, parts = "tokens", ["images", "only read", "learnt"]
    if reader.processor is None:
        unit, parts, lengths = "characters", ["text"], [(read,) for _, read, _ in lengths]
    bars = [
        Bar(f"{item.number} {item.sample.source}", length, f"sample-{item.number}")
        for item, length in zip(shown, lengths, strict=True)
    ]
    repeated = len(places) - len(set(places))
    again = f" {repeated} of the {len(places)} draws come again and are shown once." if repeated else ""
    report.add_bars(f"Lengths in {unit}", parts, bars, note=f"In the order in which they are drawn.{again}")
    cards = [_sample_html(item, reader) if isinstance(item, Shown) else _skip_html(*item) for item in samples]
    key = ""
    if reader.processor is not None:
        key = (
            '<p><span class="learnt">learnt: the loss is taken of it</span> · <span class="read">only read</span> · '
            '<span class="chip">slots of an image</span> · ids on hovering</p>'
        )
    report.add_html("Samples", key + "".join(cards))
    report.write(out)
    return samples
