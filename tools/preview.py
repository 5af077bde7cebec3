"""See the data: an HTML page of samples as training will draw them, with what is wrong in them.

    uv run tools/preview.py DATA.toml                          # text, pictures, tiles
    uv run tools/preview.py DATA.toml --checkpoint DIR         # and token ids, what is learnt, exact lengths
    uv run tools/preview.py DATA.toml --tokenizer FILE --num 50 --out page.html

The first draws of the data file's mixture are shown, each source in the order of its first epoch. A longer stretch of
each source is read to find skips and repeats: an answer or caption that stands on several samples, a picture (by its
bytes) that several samples have. Tiles and chat format are those of the checkpoint, of which only config.json and the
tokenizer are read; without one they are those of xGen-MM v1.5. The page needs no network and no other file.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from interleave_data import ShardError, load_data_file, open_sources
from preview_data import first_draws, is_short, make_reader, scan
from preview_page import write_page
from trainer_lite import IndexProgress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 where something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="preview", description="Write an HTML page of samples as training draws them."
    )
    parser.add_argument("data", type=Path, help="data file (TOML)")
    encoding = parser.add_mutually_exclusive_group()
    encoding.add_argument("--checkpoint", type=Path, metavar="DIR", help="tokens and tiles as for this model of ours")
    encoding.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; the rest as xGen-MM v1.5")
    parser.add_argument("--num", type=int, default=24, help="draws to show")
    parser.add_argument("--scan", type=int, default=2000, help="samples to look through for skips and repeats")
    parser.add_argument("--seed", type=int, default=0, help="the run's seed, on which the order depends")
    parser.add_argument("--out", type=Path, default=Path("preview.html"), help="the page")
    args = parser.parse_args(arguments)
    for name in ("num", "scan"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    try:
        data_file = load_data_file(args.data)
        reader = make_reader(data_file, args.checkpoint, args.tokenizer)
        with IndexProgress() as on_index:
            sources = open_sources(data_file, on_index=on_index)
        places = list(islice(first_draws(sources, data_file, args.seed, reader), args.num))
        found = scan(sources, data_file, args.seed, reader, max(args.scan, args.num))
        made_with = str(args.checkpoint or args.tokenizer or "tiles as xGen-MM v1.5 cuts them, no tokenizer")
        samples = write_page(args.out, args.data.name, data_file, sources, places, found, reader, made_with)
    except (ValueError, ShardError, OSError) as error:
        print(f"preview: {error}", file=sys.stderr)
        return 2
    names = [source.name for source in sources]
    num_skips = sum(len(about.skips) for about in found.sources)
    num_seen = sum(about.num_seen for about in found.sources)
    print(f"{args.out}: {len(samples)} samples shown; {num_seen} scanned, {num_skips} left out")
    for kind, of in (("text", found.texts), ("picture", found.images)):
        repeats = sorted(found.repeats(of), key=lambda pair: is_short(pair[0]) and kind == "text")
        for name, repeat in repeats[:3]:
            said = repr(name[:60]) if kind == "text" else repeat.places[0].id
            print(f"repeated {kind}: {said}: {found.shares(repeat, names)}")
        if len(repeats) > 3:
            print(f"and {len(repeats) - 3} more repeated {kind}s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
